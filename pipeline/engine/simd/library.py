"""The C files beside this one as a library, for a dtype and the instructions that this CPU has for it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from pipeline.engine.simd.c_library import load_library

_AVX512 = ("fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")
INSTRUCTION_SETS = (
    (torch.bfloat16, (*_AVX512, "avx512_bf16")),
    (torch.float32, _AVX512),
    (torch.float32, ("fma", "avx2")),
)
"""What each dtype needs of a CPU, in Linux's words, the fastest first."""

POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64
_SHARED: list[Any] = [POINTER, ctypes.c_uint]
"""GOMP_parallel, and the number of threads."""
_ARGUMENTS: dict[str, list[Any]] = {
    "attention": [POINTER],
    "add_norm": [POINTER, SIZE, POINTER, SIZE, POINTER, SIZE, POINTER, POINTER, *3 * [SIZE], ctypes.c_float],
    "rotate": [POINTER, SIZE, POINTER, POINTER, *4 * [SIZE]],
    "rotate_and_cache": [POINTER, SIZE, POINTER, POINTER, *5 * [SIZE], *3 * [POINTER]],
    "quick_gelu": [POINTER, *3 * [SIZE]],
    "silu_times_up": [POINTER, SIZE, POINTER, *3 * [SIZE]],
}


@lru_cache
def cpu_features() -> frozenset[str]:
    """What Linux says that this CPU has; nothing on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def instruction_set(dtype: torch.dtype) -> tuple[str, ...] | None:
    """The fastest one of this CPU for a dtype; None without one."""
    return next((needed for each, needed in INSTRUCTION_SETS if each == dtype and cpu_features() >= set(needed)), None)


class SimdLibrary:
    """The functions, called with torch's threads. The C files say what their arguments are."""

    def __init__(self, dtype: torch.dtype, instructions: Sequence[str] | None = None) -> None:
        """For a dtype, with the fastest instructions that this CPU has for it unless others are given."""
        instructions = instructions or instruction_set(dtype)
        if instructions is None:
            raise RuntimeError(f"this CPU has no vector instructions that are used here for {dtype}")
        self.dtype = dtype
        flags = [f"-m{name.replace('_', '')}" for name in instructions]
        defined = ["-DBFLOAT16"] if dtype == torch.bfloat16 else []
        self._library = load_library(Path(__file__).parent, "simd", [*flags, *defined])
        for name, arguments in _ARGUMENTS.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = None, [*arguments, *_SHARED]
        self._library.workspace_bytes.restype = SIZE
        self._library.workspace_bytes.argtypes = [SIZE, SIZE]
        self._parallel = _torch_threads()

    def call(self, name: str, *arguments: object) -> None:
        getattr(self._library, name)(*arguments, self._parallel, torch.get_num_threads())

    def workspace_bytes(self, longest: int, dim: int) -> int:
        """Of a thread for attention over rows of `longest` keys at most."""
        return int(self._library.workspace_bytes(longest, dim))


def _torch_threads() -> ctypes.c_void_p:
    """GOMP_parallel of whichever OpenMP torch is linked with: a second one would bring threads of its own, which would
    take the cores from torch's."""
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return ctypes.cast(ctypes.CDLL(str(torch_library)).GOMP_parallel, ctypes.c_void_p)
