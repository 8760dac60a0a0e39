"""Whether a checkpoint is nothing but weights: no code of its own, no quantised values, no adapter beside it.

Knows `config.json` and the card's metadata; not which families there are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.checkpoint.locate import find_file
from pipeline.errors import CheckpointError

_SUFFIX = re.compile(
    r"[-_](AWQ|GPTQ([-_]Int\d+)?|FP8([-_]dynamic)?|(bnb[-_])?[48]bit|quantized\.w\d+a\d+|W\d+A\d+|NF4|INT[48])$", re.I
)
"""Of names of quantised checkpoints, which the name of their original lacks."""


def check_plain(config: Mapping[str, Any], model_path: str, *, revision: str | None = None) -> None:
    """Raise CheckpointError for a checkpoint that is more than weights of a known architecture, or less."""
    if config.get("auto_map"):
        raise CheckpointError(
            f"{model_path!r} brings code of its own (auto_map in config.json), which is never run: use a checkpoint in "
            "transformers' own format"
        )
    text = config.get("text_config") or {}
    quantization = config.get("quantization_config") or text.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") or "unknown"
        original = _original(model_path, revision)
        use = f"set model.path to {original}" if original else "set model.path to the checkpoint that it was made from"
        raise CheckpointError(
            f"{model_path!r} is quantised ({method} in config.json's quantization_config), which this engine does not "
            f"compute: {use}"
        )
    if find_file(model_path, "adapter_config.json", revision=revision) is not None:
        raise CheckpointError(
            f"{model_path!r} holds an adapter beside its config.json, and it is not clear whether its weights have "
            "it already: remove adapter_config.json if they do, or else move the adapter into a folder of its own and "
            "set model.adapter to that"
        )


def _original(model_path: str, revision: str | None) -> str | None:
    """The unquantised checkpoint, by the card's `base_model` or where the name says it."""
    card = find_file(model_path, "README.md", revision=revision)
    found = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.S) if card else None
    try:
        metadata = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        metadata = None
    base = metadata.get("base_model") if isinstance(metadata, dict) else None
    base = base[0] if isinstance(base, list) and base else base
    if isinstance(base, str) and not _SUFFIX.search(base):
        return base
    is_folder = Path(model_path).is_dir()
    name = _SUFFIX.sub("", model_path.rstrip("/"))
    return None if is_folder or name == model_path.rstrip("/") else name
