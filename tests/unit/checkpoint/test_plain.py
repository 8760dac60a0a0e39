"""Checkpoints that are more than weights: refused, with what to use in their place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.checkpoint.locate import read_family
from pipeline.checkpoint.plain import check_plain
from pipeline.errors import CheckpointError


def test_code_of_a_checkpoint_s_own_is_refused(tmp_path: Path) -> None:
    check_plain({}, str(tmp_path))
    with pytest.raises(CheckpointError, match=r"brings code of its own \(auto_map"):
        check_plain({"auto_map": {"AutoModel": "evil.Model"}}, str(tmp_path))


@pytest.mark.parametrize(
    ("card", "folder", "expected"),
    [
        ("---\nbase_model: Qwen/Qwen2-VL-7B-Instruct\n---\n# x", "mine", "set model.path to Qwen/Qwen2-VL-7B-Instruct"),
        ("---\nbase_model:\n- org/finetune\n---\n", "mine", "set model.path to org/finetune"),
        ("---\nbase_model: org/other-AWQ\n---\n", "mine", "set model.path to the checkpoint that it was made from"),
        ("no metadata", "mine", "set model.path to the checkpoint that it was made from"),
    ],
)
def test_a_quantised_checkpoint_names_its_original_by_its_card(
    tmp_path: Path, card: str, folder: str, expected: str
) -> None:
    (tmp_path / "README.md").write_text(card)
    config = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    with pytest.raises(CheckpointError, match=rf"is quantised \(awq in .*: {expected}"):
        check_plain(config, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("Qwen/Qwen2-VL-7B-Instruct-AWQ", "Qwen/Qwen2-VL-7B-Instruct"),
        ("Qwen/Qwen2-VL-2B-Instruct-GPTQ-Int4", "Qwen/Qwen2-VL-2B-Instruct"),
        ("Qwen/Qwen3-VL-8B-Instruct-FP8", "Qwen/Qwen3-VL-8B-Instruct"),
        ("org/model-bnb-4bit", "org/model"),
        ("org/model", "the checkpoint that it was made from"),
    ],
)
def test_a_hub_name_tells_the_original_where_it_has_no_card(
    monkeypatch: pytest.MonkeyPatch, name: str, original: str
) -> None:
    monkeypatch.setattr("pipeline.checkpoint.plain.find_file", lambda *args, **kwargs: None)
    with pytest.raises(CheckpointError, match=f"set model.path to {original}$"):
        check_plain({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, name)


def test_an_adapter_in_the_place_of_a_checkpoint_or_beside_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen2-VL-2B"}))
    with pytest.raises(CheckpointError, match=r"is an adapter: set model\.path to Qwen/Qwen2-VL-2B, and model"):
        read_family(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"holds an adapter beside its config\.json"):
        check_plain({}, str(tmp_path))
