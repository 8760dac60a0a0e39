"""Which configs this code computes as transformers does; all others are refused before weights are read.

A field of the config that is named here has a fixed value in our code. Every other field is either read by the engine
or without effect on inference; the tests go through all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.engine.models.architecture import Architecture
from pipeline.engine.models.registry import ARCHITECTURES
from pipeline.engine.sequence import MERGE_SIZE, TEMPORAL_PATCH_SIZE
from pipeline.errors import CheckpointError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
"""Their frequencies do not change with a prompt's length, as long as it fits the context."""


def check_supported(config: Any, *, path: str, native: bool) -> None:
    """Raise CheckpointError for a config (transformers') that would give other tokens than the model's.

    `native`: for the native engine; transformers' own forward pass honours more.
    """
    architecture = ARCHITECTURES[config.model_type]
    problems = list(_everywhere(config, architecture))
    remedy = "use a checkpoint without that change"
    if not problems and native:
        problems = [*_native(config), *architecture.problems(config)]
        remedy += ", or set engine.kind to transformers"
    if problems:
        raise CheckpointError(f"{path}: config.json is not supported: {'; '.join(problems)}; {remedy}")


def _everywhere(config: Any, architecture: Architecture) -> Iterator[str]:
    """What the weights, the prompt, the patches and the positions of either engine take for granted."""
    if getattr(config, "quantization_config", None) is not None:
        yield "quantization_config is set, expected weights in bfloat16, float16 or float32"
    if getattr(config, "auto_map", None):
        yield "auto_map names code of the checkpoint's own, which is never run"
    text, vision = config.text_config, config.vision_config
    fixed = {
        "patch_size": architecture.patch_size,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "in_channels": 3,
    }
    for name, expected in fixed.items():
        found = getattr(vision, name)
        if any(size != expected for size in (found if isinstance(found, (list, tuple)) else [found])):
            yield f"vision_config.{name} is {found}, expected {expected}"
    width = getattr(vision, architecture.output_width)
    if width != text.hidden_size:
        yield f"vision_config.{architecture.output_width} is {width}, expected the text model's {text.hidden_size}"
    sections = (text.rope_parameters or {}).get("mrope_section", architecture.mrope_section)
    half = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) // 2
    if len(sections) != 3 or sum(sections) != half:
        yield f"mrope_section is {list(sections)}, expected three sizes with the sum {half}"


def _native(config: Any) -> Iterator[str]:
    text = config.text_config
    if text.hidden_act not in ("silu", "swish"):
        yield f"hidden_act of the text model is {text.hidden_act!r}, expected 'silu'"
    layer_types = getattr(text, "layer_types", None) or []
    windowed = [index for index, kind in enumerate(layer_types) if kind != "full_attention"]
    if windowed:
        yield f"layer {windowed[0]} has {layer_types[windowed[0]]} (use_sliding_window), expected full_attention"
    rope_type = (text.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        yield f"rope_type is {rope_type!r}, expected one of {', '.join(ROPE_TYPES)}"
