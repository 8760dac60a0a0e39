"""Triton's interpreter with correct bfloat16. These tests are skipped where there is no Triton, or none that works."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch

# Triton is a dev dependency, but has no wheels for all systems that the project runs on.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


def release(package: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version(package))[:2])


@pytest.fixture(autouse=True, scope="session")
def _needs_an_interpreter_that_works() -> None:
    if release("triton") < (3, 7) and release("numpy") >= (2, 4):
        pytest.skip("Triton's interpreter needs Triton 3.7 or numpy below 2.4: it calls int() on an array")


@pytest.fixture(autouse=True)
def bfloat16_rounds_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU rounds float32 to the nearest bfloat16, ties to even, as torch does; the interpreter cuts the bits off. It
    also reads subnormal bfloat16 numbers wrongly."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source.is_fp32() and target.is_bf16():
            rounded = torch.from_numpy(np.array(data)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16)
        if source.is_bf16() and target.is_fp32():
            return data.astype(np.uint32) << 16
        return convert(data, source, target, rounding_mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
