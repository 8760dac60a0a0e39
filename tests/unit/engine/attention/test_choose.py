"""Which attention backends may be tried here."""

from __future__ import annotations

import ctypes
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.engine import EngineOptions
from pipeline.engine.attention import choose
from pipeline.engine.attention.choose import attention_candidates, flash_attn_installed
from pipeline.engine.attention.simd import SimdAttention
from pipeline.engine.engine import NativeEngine
from pipeline.engine.simd import library
from pipeline.engine.simd.library import instruction_set
from pipeline.engine.weights import from_model
from pipeline.errors import CheckpointError
from tests.unit.engine.tiny import make_model, mixed_requests, tokens_of

AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")


def test_a_folder_that_flash_attn_4_leaves_is_not_flash_attn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    importlib.invalidate_caches()
    assert not flash_attn_installed()
    (tmp_path / "flash_attn" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert flash_attn_installed()


def names(dtype: torch.dtype, wanted: str = "auto", device: str = "cpu") -> list[str]:
    return [candidate.name for candidate in attention_candidates(wanted, torch.device(device), dtype)]


def test_a_cpu_tries_simd_where_it_has_the_instructions_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "compiler", lambda: ["cc"])
    for features, with_bfloat16, with_float32 in (
        (["fma", "avx2"], False, True),
        (["fma", "avx2", *AVX512], False, True),
        (["fma", "avx2", *AVX512, "avx512_bf16"], True, True),
        (["sse4_2"], False, False),
    ):
        monkeypatch.setattr(library, "cpu_features", lambda found=frozenset(features): found)
        assert names(torch.bfloat16) == ["simd"] * with_bfloat16 + ["sdpa"]
        assert names(torch.float32) == ["simd"] * with_float32 + ["sdpa"]
        assert names(torch.float16) == ["sdpa"]
        with pytest.raises(CheckpointError, match="use auto, simd or sdpa" if with_float32 else "use auto or sdpa"):
            names(torch.float32, "flash")
    with pytest.raises(CheckpointError, match=r"engine.attention is 'simd', which needs a CPU with AVX2 for float32"):
        names(torch.float32, "simd")
    monkeypatch.setattr(library, "cpu_features", lambda: frozenset(["fma", "avx2"]))
    monkeypatch.setattr(choose, "compiler", lambda: None)
    assert names(torch.float32) == ["sdpa"]
    with pytest.raises(CheckpointError, match=r"is 'simd', but no C compiler is installed; install gcc or clang"):
        names(torch.float32, "simd")


def test_the_fastest_instructions_of_a_cpu_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "cpu_features", lambda: frozenset(["fma", "avx2", *AVX512]))
    assert set(instruction_set(torch.float32) or ()) == {"fma", *AVX512}
    monkeypatch.setattr(library, "cpu_features", lambda: frozenset(["fma", "avx2"]))
    assert instruction_set(torch.float32) == ("fma", "avx2")


@pytest.mark.skipif(names(torch.float32)[0] != "simd", reason="needs a CPU with AVX2 and a C compiler")
def test_simd_that_computes_other_numbers_or_does_not_compile_is_replaced_by_sdpa(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, requests = make_model(), mixed_requests(4)

    def engine(attention: str) -> NativeEngine:
        return NativeEngine(from_model(model), EngineOptions("tiny", attention=attention))

    expected = tokens_of(engine("sdpa").generate(requests))
    used = engine("auto")
    assert (used.describe()["attention"], used.trial.replaced) == ("simd", {})
    assert tokens_of(used.generate(requests)) == expected

    def shifted(self: SimdAttention, *args: Any, **options: Any) -> torch.Tensor:
        return 1.01 * attend(self, *args, **options)

    attend = SimdAttention._attend
    with monkeypatch.context() as patch:
        patch.setattr(SimdAttention, "_attend", shifted)
        replaced = engine("auto")
        assert replaced.describe()["attention"] == "sdpa"
        assert "computes other numbers than sdpa" in replaced.trial.replaced["attention simd"]
        assert tokens_of(replaced.generate(requests)) == expected
    library.simd_library.cache_clear()
    monkeypatch.setattr(library, "load_library", lambda *_: ctypes.CDLL("/no/such/library.so"))
    replaced = engine("auto")
    assert (replaced.describe()["attention"], replaced.describe()["kernels"]) == ("sdpa", "eager")
    assert all("OSError: /no/such/library.so" in reason for reason in replaced.trial.replaced.values())
    with pytest.raises(CheckpointError, match=r"engine.attention is 'simd', which does not work here: OSError"):
        engine("simd")
