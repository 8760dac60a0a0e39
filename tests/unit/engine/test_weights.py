"""Loading: a folder that works, and one line for every way it can't."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.engine import EngineOptions, load_engine
from pipeline.engine.attention.choose import attention_candidates
from pipeline.errors import CheckpointError
from tests.unit.engine.tiny import make_config, make_model, mixed_requests, tokens_of


@pytest.fixture(scope="module")
def folder(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model.save_pretrained(path)
    return path


def test_a_saved_checkpoint_gives_the_same_tokens_in_both_engines(folder: Path) -> None:
    requests = mixed_requests(8, seed=2)
    native = load_engine(EngineOptions(str(folder)))
    reference = load_engine(EngineOptions(str(folder), kind="transformers", batch_size=3))
    assert native.describe()["kind"] == "native" and reference.describe()["kind"] == "transformers"
    assert native.describe()["dtype"] == "float32"  # auto on a CPU
    assert native.describe()["eos_token_ids"] == [300, 302]
    assert tokens_of(native.generate(requests)) == tokens_of(reference.generate(requests))


def check_refused(path: Path | str, message: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_engine(EngineOptions(str(path), **options))
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    check_refused(tmp_path / "nowhere", "no such checkpoint folder")


def test_a_folder_without_config_is_one_line(tmp_path: Path) -> None:
    check_refused(tmp_path, "has no config.json")


def test_missing_weights_are_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    check_refused(tmp_path, "can't load the weights")


def test_damaged_weights_are_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 not a header")
    check_refused(tmp_path, "weights")


def test_missing_tensors_are_refused_instead_of_random(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    dropped = next(name for name in tensors if name.endswith("merger.mlp.0.weight"))
    del tensors[dropped]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_refused(tmp_path, "1 tensors are missing")


def test_another_architecture_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "qwen2"
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_refused(tmp_path, "model_type is .qwen2.; supported: qwen2_vl, qwen2_5_vl, qwen3_vl")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU; CUDA_VISIBLE_DEVICES= hides it")
def test_a_gpu_that_is_not_there_is_refused(folder: Path) -> None:
    check_refused(folder, "no GPU here", device="cuda")


@pytest.mark.parametrize("name", ["flash", "torch"])
def test_forcing_gpu_attention_on_a_cpu_is_refused(folder: Path, name: str) -> None:
    check_refused(folder, "needs an NVIDIA GPU", attention=name)


def test_forcing_flash_without_the_package_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.engine.attention.choose.flash_attn_installed", lambda: False)
    with pytest.raises(CheckpointError, match=r"flash-attn is missing; install it with pip install"):
        attention_candidates("flash", torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize(
    ("option", "value"), [("kind", "vllm"), ("dtype", "int8"), ("max_running", 0), ("gpu_memory_fraction", 1.5)]
)
def test_a_wrong_option_says_what_is_allowed(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option} is .*; allowed: "):
        EngineOptions("x", **{option: value})


def test_a_gpu_that_is_not_there_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_refused(folder, r"model.device is 'cuda:2', but torch sees 2 GPU\(s\) here, counted from 0", device="cuda:2")
    check_refused(
        folder,
        "torch sees 2 here and model.device is cuda:1; lower resources.gpus_per_engine",
        device="cuda:1",
        num_devices=2,
    )


def test_an_old_layout_with_another_vocabulary_loads_as_it_is(tmp_path: Path) -> None:
    """A flat config.json, `visual.` and `model.` names, and rows of the embedding for tokens of a fine-tune's own."""
    from safetensors.torch import load_file, save_file

    config = make_config()
    config.text_config.vocab_size = 333
    model = make_model(config=config)
    new, old = tmp_path / "new", tmp_path / "old"
    model.save_pretrained(new)
    old.mkdir()
    values = json.loads((new / "config.json").read_text())
    text = values.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {**text, **values, "rope_theta": rope["rope_theta"], "torch_dtype": "float32"}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat.pop("dtype", None)
    (old / "config.json").write_text(json.dumps({**flat, "model_type": "qwen2_vl"}))
    names = {"model.language_model.": "model.", "model.visual.": "visual."}

    def before(name: str) -> str:
        found = next((new for new in names if name.startswith(new)), "")
        return names[found] + name.removeprefix(found) if found else name

    tensors = load_file(new / "model.safetensors")
    save_file({before(name): tensor for name, tensor in tensors.items()}, old / "model.safetensors", {"format": "pt"})
    requests = mixed_requests(4, seed=2)
    engines = [load_engine(EngineOptions(str(folder), dtype="float32")) for folder in (new, old)]
    first, second = (tokens_of(engine.generate(requests)) for engine in engines)
    assert first == second
    (old / "adapter_config.json").write_text("{}")
    check_refused(old, "an adapter beside config.json")


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_quantised_weights_and_a_checkpoint_s_own_code_are_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    for changed, message in (
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config is set"),
        ({"auto_map": {"AutoModelForImageTextToText": "evil.Model"}}, "auto_map names code"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
        (tmp_path / "evil.py").write_text("raise SystemExit('was run')")
        check_refused(tmp_path, message, kind=kind)
