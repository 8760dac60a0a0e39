"""A LoRA adapter in PEFT's form, merged into transformers' model before an engine takes its weights.

Knows peft, and what an adapter must be so that a merged model answers as the adapted one would; no requests. An adapter
that does not fit is a CheckpointError: peft itself ignores weights for modules that the model does not have.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError, first_line

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_BEYOND_WEIGHTS = {
    "layer_replication": "repeats layers",
    "alora_invocation_tokens": "begins at certain tokens of a prompt",
    "arrow_config": "chooses between adapters for each token",
    "megatron_config": "is for Megatron's layers",
}
"""Settings of a LoRA that changes more than weights."""


def check_adapter(config: Mapping[str, Any], name: str) -> None:
    """Raise CheckpointError for an adapter (its `adapter_config.json`) that cannot be merged into weights."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"model.adapter {name} is an adapter of type {kind}; only LORA can be merged")
    for setting, meaning in _BEYOND_WEIGHTS.items():
        if config.get(setting):
            raise CheckpointError(
                f"model.adapter {name} {meaning} ({setting} in {CONFIG_FILE}) and can't be merged into weights"
            )


def merge_adapter(model: Any, name: str, *, revision: str | None = None) -> Any:
    """The model with the adapter's weights added to its own; `name` is a folder or a hub name."""
    # Seconds of imports, for adapters only.
    from peft import LoraConfig, PeftModel
    from transformers.utils import cached_file

    try:
        file = cached_file(name, CONFIG_FILE, revision=revision)
        cached_file(name, WEIGHTS_FILE, revision=revision)
    except OSError as error:
        raise CheckpointError(
            f"model.adapter {name} has no {CONFIG_FILE} or no {WEIGHTS_FILE}: {first_line(error)}"
        ) from error
    stated = json.loads(Path(file).read_text(encoding="utf-8"))
    check_adapter(stated, name)
    known = {each.name for each in dataclasses.fields(LoraConfig)}
    if unknown := sorted(key for key, value in stated.items() if value and key not in known):
        raise CheckpointError(
            f"model.adapter {name} has settings that the installed peft does not know: {', '.join(unknown)}; "
            "install the peft that wrote it"
        )
    try:
        config = LoraConfig.from_pretrained(str(Path(file).parent))
        config.inference_mode = True
        adapted = PeftModel(model, config)
        loaded = adapted.load_adapter(
            str(Path(file).parent), "default", torch_device="cpu", key_mapping=_renamings(model)
        )
        _check_patterns(config, adapted)
        if loaded.unexpected_keys:
            raise ValueError(f"the model has no {loaded.unexpected_keys[0]} ({len(loaded.unexpected_keys)} in all)")
        if missing := _half_loaded(adapted, set(loaded.missing_keys)):
            raise ValueError(f"it has no weights for {missing[0]} ({len(missing)} in all)")
        return adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # peft raises nearly every type
        raise CheckpointError(
            f"model.adapter {name} does not fit the checkpoint: {' '.join(str(error).split())[:300]}; expected a LoRA "
            f"trained on it (this one was trained on {stated.get('base_model_name_or_path')})"
        ) from error


def _renamings(model: Any) -> dict[str, str]:
    """Patterns of names that older versions of transformers gave to the model's parts, and today's names. peft takes
    them from transformers for some families only."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [each for each in get_model_conversion_mapping(model) if type(each) is WeightRenaming]
    return {source: each.target_patterns[0] for each in renamings for source in each.source_patterns}


def _check_patterns(config: Any, adapted: Any) -> None:
    """Raise ValueError for a rank or scale of modules that the model does not have: peft would use the default."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import get_pattern_key

    names = [name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]
    for pattern in {**config.rank_pattern, **config.alpha_pattern}:
        if not any(get_pattern_key([pattern], name) == pattern for name in names):
            raise ValueError(f"its rank_pattern or alpha_pattern names {pattern}, which no adapted module has")


def _half_loaded(adapted: Any, missing: set[str]) -> list[str]:
    """Names of missing tensors that would change the model. A pattern of modules may match some that were not
    trained and have no weights: these are left as they are, since a new B is zero."""
    state = {name: value for name, value in adapted.state_dict().items() if ".lora_" in name}
    loaded = {_module(name) for name in state.keys() - missing}
    return sorted(
        name for name in missing if _module(name) in loaded or (".lora_B." in name and bool(state[name].any()))
    )


def _module(name: str) -> str:
    return name.rpartition(".lora_")[0]
