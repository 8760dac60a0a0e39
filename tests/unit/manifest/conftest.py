"""Opening a manifest as a job does, with a run folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.manifest.files import Manifest
from pipeline.manifest.find import open_manifest


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Manifest]:
    def open_it(path: Path | str, **options: Any) -> Manifest:
        return open_manifest(str(path), listing_path=str(tmp_path / "run" / "listing.parquet"), **options)

    return open_it
