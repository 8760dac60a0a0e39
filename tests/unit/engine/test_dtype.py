"""Which dtype `auto` is, on devices with and without instructions for it, and how an engine says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.engine import EngineOptions, load_engine
from pipeline.engine.dtype import Arithmetic, arithmetic, own_dtype, pick_dtype
from tests.unit.engine.tiny import make_model

NEW_GPU, OLD_GPU = Arithmetic("an A100", True, True), Arithmetic("a T4", True, False)
NEW_CPU, OLD_CPU = Arithmetic("a CPU (avx512_bf16)", False, True), Arithmetic("a CPU", False, False)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("bfloat16", ["bfloat16", "float16", "bfloat16", "float32"]),
        ("float16", ["float16", "float16", "float32", "float32"]),
        ("float32", ["float32"] * 4),
    ],
)
def test_auto_is_the_checkpoint_s_own_where_the_device_has_it(own: Any, expected: list[str]) -> None:
    devices = (NEW_GPU, OLD_GPU, NEW_CPU, OLD_CPU)
    assert [pick_dtype("auto", own, device).name for device in devices] == expected
    assert {pick_dtype("bfloat16", own, device).name for device in devices} == {"bfloat16"}
    assert "not native to a T4" in pick_dtype("auto", "bfloat16", OLD_GPU).reason


def test_the_own_dtype_is_read_from_either_key_and_either_layout() -> None:
    assert own_dtype({"torch_dtype": "bfloat16"}) == own_dtype({"dtype": torch.bfloat16}) == "bfloat16"
    assert own_dtype({"dtype": None, "text_config": {"dtype": "float16"}}) == "float16"
    assert own_dtype({"dtype": "float8_e4m3fn"}) is own_dtype({}) is None


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_have_bfloat16_from_compute_capability_8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    found = arithmetic("cuda:0")
    assert found.has_bfloat16 is has and found.name == f"NVIDIA X (compute capability {capability[0]}.{capability[1]})"


@pytest.mark.parametrize("kind", ["native", "transformers"])
@pytest.mark.parametrize("states_it", [True, False], ids=["config.json states it", "only the weights"])
def test_an_engine_on_a_cpu_picks_by_its_instructions_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, states_it: bool
) -> None:
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    if not states_it:
        config = json.loads((tmp_path / "config.json").read_text())
        for section in (config, config["text_config"], config["vision_config"]):
            section.pop("dtype", None)
        (tmp_path / "config.json").write_text(json.dumps(config))
    for capabilities, dtype in (({"avx512_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        described = load_engine(EngineOptions(str(tmp_path), kind=kind)).describe()
        assert described["dtype"] == dtype
        assert described["dtype_reason"].startswith("the checkpoint's own")
