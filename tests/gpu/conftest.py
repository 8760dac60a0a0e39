"""GPU tests are skipped, with a reason, where there is no NVIDIA GPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: run `make test-gpu` on a machine that has one")
