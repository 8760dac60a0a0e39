"""GPU tests are skipped, with a reason, where there is no NVIDIA GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# The tests import tests.engine.tiny, however pytest was started.
sys.path.insert(0, str(Path(__file__).parents[2]))


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: run `make test-gpu` on a machine that has one")
