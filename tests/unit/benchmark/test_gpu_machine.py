"""What must work on a GPU machine as it is: no package index, and none of Ray, av and pydantic."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
WITHOUT = "import sys; sys.modules.update(dict.fromkeys(['ray', 'av', 'pydantic']))"


def run(*command: str) -> str:
    # This may run inside of make, which tells the makes below it to print more.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_make_test_gpu_with_a_python_that_is_there_installs_nothing() -> None:
    assert "pip install" in run("make", "-n", "-W", "pyproject.toml", "test-gpu")
    assert run("make", "-n", "-W", "pyproject.toml", "test-gpu", "PY=python3").split("\n")[:-1] == [
        "python3 -m pytest -m gpu tests/gpu "
    ]


@pytest.mark.slow
def test_gpu_tests_need_no_ray_av_or_pydantic_and_are_skipped_without_a_gpu() -> None:
    options = ["-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
    printed = run(sys.executable, "-c", f"{WITHOUT}; import pytest; sys.exit(pytest.main({options}))")
    assert "skipped" in printed and "passed" not in printed
