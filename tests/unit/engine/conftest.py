"""Tiny random Qwen2-VL models and seeded requests of every kind, for the engine's tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.engine.tiny import make_model


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model() -> Any:
    return make_model()
