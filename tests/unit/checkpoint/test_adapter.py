"""An adapter's small files: found, and compared with the checkpoint's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.checkpoint.adapter import check_tokens, other_base, read_adapter_config, resolve_adapter
from pipeline.demo import CHECKPOINT
from pipeline.errors import CheckpointError


def test_a_folder_that_is_not_there_or_not_whole_says_what_is_missing(tmp_path: Path) -> None:
    assert resolve_adapter("someone/lora") == "someone/lora" and resolve_adapter(None) is None
    with pytest.raises(CheckpointError, match="no adapter folder at /nowhere"):
        resolve_adapter("/nowhere")
    with pytest.raises(CheckpointError, match=r"can't find adapter_config\.json in .*set model\.adapter"):
        read_adapter_config(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"but no adapter_model\.safetensors"):
        read_adapter_config(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").touch()
    assert read_adapter_config(str(tmp_path)) == {"peft_type": "LORA"}


def test_tokens_that_the_checkpoint_s_tokenizer_lacks_are_refused(tmp_path: Path) -> None:
    check_tokens(str(tmp_path), str(CHECKPOINT))  # brings no tokenizer
    tokenizer = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(tokenizer))
    check_tokens(str(tmp_path), str(CHECKPOINT))
    tokenizer["added_tokens"].append({"id": 999, "content": "<|box|>"})
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"tokens that the tokenizer of .* does not have, such as '<\|box\|>'"):
        check_tokens(str(tmp_path), str(CHECKPOINT))


def test_another_base_is_named() -> None:
    config = {"base_model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct"}
    assert other_base(config, "/models/qwen2-vl-2b-instruct/") is None and other_base({}, "any") is None
    assert other_base(config, "/models/mine") == "Qwen/Qwen2-VL-2B-Instruct"
