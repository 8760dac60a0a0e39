"""The sets of instructions that this CPU has, as parameters of a test."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.engine.simd.c_library import compiler
from pipeline.engine.simd.library import INSTRUCTION_SETS, cpu_features


def parameter(dtype: torch.dtype, instructions: tuple[str, ...], *values: Any) -> Any:
    """`values` for a test, which is skipped where instructions or a compiler are missing."""
    missing = set(instructions) - cpu_features()
    reason = f"this CPU lacks {', '.join(sorted(missing))}" if missing else "install gcc or clang"
    skip = pytest.mark.skipif(bool(missing) or compiler() is None, reason=reason)
    return pytest.param(*values, id=f"simd {instructions[-1]}", marks=skip)


every_instruction_set = pytest.mark.parametrize("instructions", [parameter(*one, one) for one in INSTRUCTION_SETS])
"""(dtype, what it needs of the CPU)"""
