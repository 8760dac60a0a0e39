"""The C files beside this one as a library, for a dtype and the instructions that this CPU has for it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.autograd import profiler
from torch.profiler import record_function

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
        for name in ("packed_keys", "workspace_bytes"):
            function = getattr(self._library, name)
            function.restype, function.argtypes = SIZE, [SIZE, SIZE]
        self._parallel = _torch_threads()

    def call(self, name: str, *arguments: object, threads: int | None = None) -> None:
        # torch's profiler sees its own operations alone.
        in_profile = record_function(f"simd::{name}") if profiler._is_profiler_enabled else nullcontext()
        with in_profile:
            getattr(self._library, name)(*arguments, self._parallel, threads or torch.get_num_threads())

    def workspace(self, most_keys: int, most_queries: int, dim: int) -> tuple[int, int]:
        """Keys that a thread packs at once, and the bytes for it: rows of these many keys and queries at most."""
        keys = int(self._library.packed_keys(most_keys, most_queries))
        return keys, int(self._library.workspace_bytes(keys, dim))


@lru_cache
def simd_library(dtype: torch.dtype) -> SimdLibrary:
    """The fastest one for a dtype, loaded once per process."""
    return SimdLibrary(dtype)


def _torch_threads() -> ctypes.c_void_p:
    """GOMP_parallel of whichever OpenMP torch uses: a second one would bring threads of its own, which would take the
    cores from torch's."""
    torch_library = str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
    # First in the process's own scope, since one that is preloaded comes before the one that torch is linked with.
    for path in (None, torch_library):
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel"):
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p)
    raise RuntimeError("torch uses an OpenMP without GOMP_parallel")
