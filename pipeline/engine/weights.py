"""Load a checkpoint through transformers; whatever goes wrong is a CheckpointError.

Knows transformers' classes, devices and dtypes; not requests. The checkpoint's own sampling defaults are not read: the
caller decides how tokens are chosen.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.engine.adapter import merge_adapter
from pipeline.engine.dtype import PickedDtype, arithmetic, own_dtype, pick_dtype
from pipeline.engine.loading import Report, ignore
from pipeline.engine.models.architecture import Architecture
from pipeline.engine.models.registry import ARCHITECTURES
from pipeline.engine.models.supported import check_supported
from pipeline.engine.settings import EngineOptions
from pipeline.engine.shard import device_map
from pipeline.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model on its device, and what both engines need to know about it."""

    model: Any
    """transformers' own, of the family's class."""
    architecture: Architecture
    device: torch.device
    """Of the vision tower and the embedding, where a pass begins."""
    dtype: torch.dtype
    eos_token_ids: frozenset[int]
    image_token_id: int
    video_token_id: int
    vocab_size: int
    max_context: int
    name: str = "random weights"
    dtype_reason: str = ""
    """Why it computes in this dtype."""
    layer_devices: tuple[torch.device, ...] = ()
    """Of each layer of the text model."""
    is_owned: bool = False
    """Whether nobody else needs the model, so that an engine may take its weights away."""


def pick_device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise CheckpointError(f"model.device is {wanted!r}; allowed: auto, cpu, cuda, cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(f"model.device is {wanted!r}, but torch sees no GPU here; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= (found := torch.cuda.device_count()):
        raise CheckpointError(f"model.device is {wanted!r}, but torch sees {found} GPU(s) here, counted from 0")
    return device


def end_token_ids(model: Any) -> frozenset[int]:
    """End tokens of the generation config, else of the model's config."""
    config = model.config
    for source in (model.generation_config, config, config.text_config):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            ids = found if isinstance(found, (list, tuple)) else [found]
            return frozenset(int(i) for i in ids if int(i) < config.text_config.vocab_size)
    return frozenset()


def from_model(model: Any, *, name: str = "random weights", picked: PickedDtype | None = None) -> Checkpoint:
    """Wrap a model that is already on its device in its dtype."""
    parameter = next(model.parameters())
    text = model.config.text_config
    model.eval().requires_grad_(False)
    return Checkpoint(
        model=model,
        architecture=ARCHITECTURES[model.config.model_type],
        device=parameter.device,
        dtype=parameter.dtype,
        eos_token_ids=end_token_ids(model),
        image_token_id=model.config.image_token_id,
        video_token_id=model.config.video_token_id,
        vocab_size=text.vocab_size,
        max_context=text.max_position_embeddings,
        name=name,
        dtype_reason=picked.reason if picked else "the model's",
        layer_devices=tuple(layer.mlp.down_proj.weight.device for layer in model.model.language_model.layers),
    )


def load_checkpoint(options: EngineOptions, report: Report = ignore) -> Checkpoint:
    """Read config and weights, check them, and put the model on its device."""
    import transformers

    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    path, device = options.model_path, pick_device(options.device)
    config = _read_config(options)
    devices = _devices(options, device)
    own = own_dtype(config.to_dict())
    picked = None if own is None else pick_dtype(options.dtype, own, arithmetic(str(device)))
    model_class = getattr(transformers, ARCHITECTURES[config.model_type].model_class)
    try:
        model, info = model_class.from_pretrained(
            path,
            config=config,
            revision=options.revision,
            dtype=getattr(torch, picked.name) if picked else "auto",
            output_loading_info=True,
            device_map=device_map(config, devices) if len(devices) > 1 else None,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: can't load the weights: {_one_line(error)}") from error
    except Exception as error:  # safetensors raises its own type for a damaged file
        raise CheckpointError(f"{path}: damaged weights: {_one_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers only warns and continues with random numbers.
        raise CheckpointError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if picked is None:  # config.json says nothing, and transformers went by the weights
        picked = pick_dtype(options.dtype, own_dtype({"dtype": model.dtype}) or "float32", arithmetic(str(device)))
        for parameter in model.parameters():  # buffers stay in float32
            parameter.data = parameter.data.to(getattr(torch, picked.name))
    name = path
    if options.adapter is not None:
        report("merging the adapter")
        model = merge_adapter(model, options.adapter, revision=options.adapter_revision)
        name = f"{path} with {options.adapter}"
    model = model if len(devices) > 1 else model.to(device)
    return replace(from_model(model, name=name, picked=picked), is_owned=True)


def _read_config(options: EngineOptions) -> Any:
    from transformers import AutoConfig

    path = options.model_path
    looks_local = os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1
    if looks_local and not os.path.isdir(os.path.expanduser(path)):
        raise CheckpointError(f"{path}: no such checkpoint folder")
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise CheckpointError(f"{path}: the checkpoint folder has no config.json")
    try:
        config = AutoConfig.from_pretrained(path, revision=options.revision)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: can't read the checkpoint's config: {_one_line(error)}") from error
    if config.model_type not in ARCHITECTURES:
        raise CheckpointError(f"{path}: model_type is {config.model_type!r}; supported: {', '.join(ARCHITECTURES)}")
    if os.path.isfile(os.path.join(path, "adapter_config.json")):  # transformers would load it unmerged
        raise CheckpointError(f"{path}: there is an adapter beside config.json; move it away, or to model.adapter")
    check_supported(config, path=path, native=options.kind == "native")
    return config


def _devices(options: EngineOptions, device: torch.device) -> list[torch.device]:
    """The devices over which the layers are spread; `device` alone where that is enough."""
    if options.num_devices == 1 or device.type != "cuda":
        return [device]
    found, first = torch.cuda.device_count(), device.index or 0
    if found < first + options.num_devices:
        raise CheckpointError(
            f"the model is to be spread over {options.num_devices} GPUs, but torch sees {found} here"
            f"{f' and model.device is cuda:{first}' if first else ''}; lower resources.gpus_per_engine, "
            "or run on a machine with more GPUs"
        )
    if importlib.util.find_spec("accelerate") is None:
        raise CheckpointError(
            "a model over several GPUs is loaded by the accelerate package, which is missing; "
            "install it with pip install 'qwen2-vl-batch[gpu]' (or: pip install accelerate)"
        )
    return [torch.device("cuda", first + index) for index in range(options.num_devices)]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
