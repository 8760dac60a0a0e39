"""Where a LoRA adapter is, and whether its small files go with a checkpoint's.

Knows `adapter_config.json` and tokenizers' lists of tokens; not weights, nor whether an adapter can be merged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.checkpoint.locate import read_json, why_missing
from pipeline.errors import CheckpointError

_SETTING = "model.adapter"


def resolve_adapter(path: str | None) -> str | None:
    """The folder, hub name or bucket prefix that `model.adapter` stands for."""
    if path is None or not path.startswith(("/", "./", "../", "~")):
        return path
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"no adapter folder at {path}: set {_SETTING} to a folder of PEFT's or to a hub name")
    return str(folder)


def read_adapter_config(path: str, *, revision: str | None = None) -> dict[str, Any]:
    """The adapter's `adapter_config.json`. Raises CheckpointError where it has none, or no weights."""
    config = read_json(path, "adapter_config.json", revision, setting=_SETTING)
    if config is None:
        raise CheckpointError(
            f"can't find adapter_config.json in {path!r}{why_missing(path)}; set {_SETTING} to a folder that PEFT has "
            "written, or to a hub name that this machine can reach"
        )
    if Path(path).is_dir() and not Path(path, "adapter_model.safetensors").is_file():
        raise CheckpointError(f"{path!r} has an adapter_config.json but no adapter_model.safetensors")
    return config


def check_tokens(path: str, model_path: str, *, revision: str | None = None, model_revision: str | None = None) -> None:
    """Raise CheckpointError where the adapter was trained with tokens that the checkpoint's tokenizer does not have."""
    theirs = _added_tokens(path, revision)
    ours = _added_tokens(model_path, model_revision) if theirs else {}
    if new := [token for token, number in theirs.items() if ours.get(token) != number] if ours else []:
        raise CheckpointError(
            f"the adapter {path!r} was trained with tokens that the tokenizer of {model_path!r} does not have, such as "
            f"{new[0]!r}: merge it into a checkpoint of its own (peft's merge_and_unload, then save_pretrained of "
            "model and tokenizer), and set model.path to that"
        )


def other_base(config: dict[str, Any], model_path: str) -> str | None:
    """The checkpoint that the adapter says it was trained on, where its name is another one than the model's."""
    base = str(config.get("base_model_name_or_path") or "").rstrip("/")
    same = not base or Path(base).name.lower() == Path(model_path.rstrip("/")).name.lower()
    return None if same else base


def _added_tokens(path: str, revision: str | None) -> dict[str, int]:
    tokenizer = read_json(path, "tokenizer.json", revision)
    if tokenizer is not None:
        return {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    config = read_json(path, "tokenizer_config.json", revision) or {}
    return {token["content"]: int(number) for number, token in config.get("added_tokens_decoder", {}).items()}
