"""Tiny random Qwen2-VL models and seeded requests of every kind, for the engine's tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# The tests import tests.engine.tiny, however pytest was started.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.engine.tiny import make_model


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model() -> Any:
    return make_model()
