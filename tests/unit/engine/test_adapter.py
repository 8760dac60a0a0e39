"""A LoRA merged at load: the tokens of peft's own merged model, and one line for every adapter that does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.engine import EngineOptions, load_engine
from pipeline.engine.models.registry import ARCHITECTURES
from pipeline.errors import CheckpointError
from tests.unit.engine.plain_generate import clip_pixels, numbered_alike, plain_generate
from tests.unit.engine.tiny import make_config, make_model, mixed_requests, tokens_of

TOWER_AND_TEXT = ["qkv", "attn.proj", "fc1", "merger.mlp.0", "q_proj", "v_proj", "o_proj", "down_proj"]

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(path)
    return path


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """A function that saves an adapter of random weights, as a trainer would leave it."""

    def save(model: Any = None, **settings: Any) -> Path:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        adapted = get_peft_model(make_model() if model is None else model, LoraConfig(r=4, lora_alpha=8, **settings))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.15)
        adapted.save_pretrained(tmp_path)
        return tmp_path

    return save


def merged_by_peft(base: Path, adapter: Path, family: str = "qwen2_vl") -> Any:
    import transformers
    from peft import PeftModel

    model = getattr(transformers, ARCHITECTURES[family].model_class).from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": TOWER_AND_TEXT, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True},
    ],
    ids=["tower and text", "saved embeddings"],
)
def test_tokens_equal_those_of_peft_s_merged_model(base: Path, train: Train, settings: dict[str, Any]) -> None:
    adapter = train(**settings)
    requests = [request for request in mixed_requests(10, seed=5) if numbered_alike(request)][:5]
    model = merged_by_peft(base, adapter)
    expected = [plain_generate(model, request, clip_pixels)[0] for request in requests]
    for kind in ("native", "transformers"):
        options = EngineOptions(str(base), adapter=str(adapter), dtype="float32", kind=kind)  # type: ignore[arg-type]
        engine = load_engine(options)
        assert engine.describe()["model"] == f"{base} with {adapter}"
        assert tokens_of(engine.generate(requests)) == expected
    assert tokens_of(load_engine(EngineOptions(str(base), dtype="float32")).generate(requests)) != expected


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_an_adapter_of_another_family_is_merged(
    train: Train, tmp_path_factory: pytest.TempPathFactory, family: str
) -> None:
    base, config = tmp_path_factory.mktemp("base"), make_config(family)
    make_model(config=config).save_pretrained(base)
    adapter = train(make_model(config=config), target_modules=["qkv", "attn.proj", "q_proj", "down_proj"])
    rule = ARCHITECTURES[family].positions(config)
    drawn = mixed_requests(10, seed=5, family=family)
    requests = [request for request in drawn if numbered_alike(request, rule)][:4]
    model = merged_by_peft(base, adapter, family)
    expected = [plain_generate(model, request, clip_pixels)[0] for request in requests]
    options = EngineOptions(str(base), adapter=str(adapter), dtype="float32")
    assert tokens_of(load_engine(options).generate(requests)) == expected
    assert tokens_of(load_engine(EngineOptions(str(base), dtype="float32")).generate(requests)) != expected


def rename(adapter: Path, change: Callable[[str], str]) -> None:
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)


def edit_config(adapter: Path, **settings: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_an_adapter_with_the_names_of_older_transformers_is_merged(base: Path, train: Train) -> None:
    """`model.layers` and `visual.` without the prefixes of today, and a pattern that names the text model alone."""
    adapter = train(target_modules=["qkv", "q_proj"])
    options = EngineOptions(str(base), adapter=str(adapter), dtype="float32")
    requests = mixed_requests(3, seed=5)
    expected = tokens_of(load_engine(options).generate(requests))
    old = {"model.model.language_model.": "model.model.", "model.model.visual.": "model.visual."}

    def before(name: str) -> str:
        for new, renamed in old.items():
            name = name.replace(new, renamed)
        return name

    rename(adapter, before)
    assert tokens_of(load_engine(options).generate(requests)) == expected


def test_an_adapter_of_a_hub_name_is_merged_in_its_revision(
    base: Path, train: Train, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as hub

    adapter, cache, commit = train(target_modules=["q_proj"]), tmp_path_factory.mktemp("hub"), "a" * 40
    repository = cache / "models--org--lora"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text(commit)
    shutil.copytree(adapter, repository / "snapshots" / commit)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    requests = mixed_requests(3, seed=5)
    expected = tokens_of(
        load_engine(EngineOptions(str(base), adapter=str(adapter), dtype="float32")).generate(requests)
    )
    options = EngineOptions(str(base), adapter="org/lora", adapter_revision="v1", dtype="float32")
    assert tokens_of(load_engine(options).generate(requests)) == expected
    with pytest.raises(CheckpointError, match=r"org/lora has no adapter_config\.json or no adapter_model"):
        load_engine(replace(options, adapter_revision="v2"))


def test_a_pattern_that_matches_untrained_modules_changes_nothing_there(base: Path, train: Train) -> None:
    adapter = train(target_modules=["q_proj"])
    options = EngineOptions(str(base), adapter=str(adapter), dtype="float32")
    requests = mixed_requests(3, seed=5)
    expected = tokens_of(load_engine(options).generate(requests))
    edit_config(adapter, target_modules=r"^model.*\.(q_proj|qkv)$")
    assert tokens_of(load_engine(options).generate(requests)) == expected


def check_refused(base: Path, adapter: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_engine(EngineOptions(str(base), adapter=str(adapter), dtype="float32"))
    assert "\n" not in str(caught.value) and str(adapter) in str(caught.value)


def test_adapters_that_do_not_fit_are_refused_in_one_line(base: Path, train: Train, tmp_path: Path) -> None:
    from tests.unit.engine.tiny import make_config

    good = shutil.copytree(train(target_modules=["q_proj", "down_proj"]), tmp_path / "good")

    def copy(**settings: Any) -> Path:
        shutil.copytree(good, tmp_path / "changed", dirs_exist_ok=True)
        edit_config(tmp_path / "changed", **settings)
        return tmp_path / "changed"

    check_refused(base, copy(peft_type="PROMPT_TUNING"), "of type PROMPT_TUNING; only LORA can be merged")
    check_refused(base, copy(layer_replication=[[0, 2], [1, 3]]), "repeats layers")
    check_refused(base, copy(new_idea={"x": 1}), "settings that the installed peft does not know: new_idea")
    check_refused(base, copy(target_modules=["gate_up"]), "does not fit the checkpoint: .*gate_up.*not found")
    check_refused(base, copy(target_modules=["q_proj"]), "the model has no .*down_proj.*lora_A")
    check_refused(base, copy(alpha_pattern={"no_such_proj": 3}), "rank_pattern or alpha_pattern names no_such_proj")
    half = copy()
    rename(half, lambda name: name.replace("layers.0.mlp.down_proj.lora_B", "layers.9.mlp.down_proj.lora_B"))
    check_refused(base, half, "does not fit the checkpoint")
    (half / "adapter_model.safetensors").unlink()
    check_refused(base, half, "has no adapter_config.json or no adapter_model.safetensors")
    config = make_config()
    config.text_config.intermediate_size = 64
    other = train(model=make_model(config=config), target_modules=["down_proj"])
    check_refused(base, other, "size mismatch for .*down_proj.*expected a LoRA trained on it")
    config = make_config()
    config.text_config.vocab_size = 330
    resized = train(model=make_model(config=config), target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    check_refused(base, resized, "size mismatch for .*embed_tokens")
