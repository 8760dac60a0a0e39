"""The arithmetic and memory traffic of a workload, and the peaks of GPUs by their makers' data sheets.

    rows --> FLOP and bytes --(GPU's peaks)--> shortest possible seconds; engines reach a share of that pace

The arithmetic of Qwen-VL models: a vision tower over patches (attention within each temporal step, or windows of it),
mergers, a decoder over prompt tokens (causal attention), then one token at a time. Plain numbers: knows no torch,
config or manifest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.engine.sequence import MERGE_SIZE, TEMPORAL_PATCH_SIZE

PATCHES_PER_TOKEN = MERGE_SIZE**2
WINDOW_SIDE = 8
"""Patches on each side of a full window, of the layers that attend within windows; those at the edges are smaller."""


@dataclass(frozen=True)
class Gpu:
    """A GPU by its maker's data sheet."""

    name: str
    """A part of the name that the driver gives."""
    flops: float
    """Dense bfloat16 FLOP/s (float16 before Ampere), without sparsity."""
    bytes_per_s: float
    """Memory bandwidth."""
    memory_gb: float
    has_bfloat16: bool = True


# The first name that the driver's name contains is taken, so longer names come before their prefixes.
GPUS = (
    Gpu("B200", 2_250e12, 8.0e12, 180),
    Gpu("H200", 989e12, 4.8e12, 141),
    Gpu("H100 PCIe", 756e12, 2.0e12, 80),
    Gpu("H100 NVL", 835e12, 3.9e12, 94),
    Gpu("H100", 989e12, 3.35e12, 80),
    Gpu("A100 40GB", 312e12, 1.555e12, 40),
    Gpu("A100", 312e12, 2.039e12, 80),
    Gpu("L40S", 362e12, 864e9, 48),
    Gpu("L40", 181e12, 864e9, 48),
    Gpu("L4", 121e12, 300e9, 24),
    Gpu("A10G", 70e12, 600e9, 24),
    Gpu("A10", 125e12, 600e9, 24),
    Gpu("RTX 4090", 165e12, 1_008e9, 24),
    Gpu("RTX 3090", 71e12, 936e9, 24),
    Gpu("V100", 125e12, 900e9, 32, has_bfloat16=False),
    Gpu("T4", 65e12, 320e9, 16, has_bfloat16=False),
)


def find_gpu(name: str) -> Gpu | None:
    """The GPU that a driver, a cloud or a person gives this name: `NVIDIA H100 80GB HBM3`, `a100-80gb`, `H100_PCIe`."""
    wanted = _plain(name)
    if "a100" in wanted and "40gb" in wanted:
        return next(gpu for gpu in GPUS if gpu.name == "A100 40GB")
    return next((gpu for gpu in GPUS if _plain(gpu.name) in wanted), None)


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("-", " ").replace("_", " ").split())


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model. Those with defaults are what the first family does not have."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    tied: bool
    """Whether the output matrix is the input embedding."""
    vision_width: int
    vision_layers: int
    vision_heads: int
    given_head_dim: int | None = None
    """Width of an attention head where it is not hidden / heads."""
    vision_mlp: int | None = None
    """Where it is not 4 times the width."""
    vision_gated: bool = False
    """Whether the tower's MLP has a third matrix, the gate."""
    windowed_layers: int = 0
    """Layers of the tower that attend within windows."""
    further_mergers: int = 0
    """For features that go to later layers of the decoder."""
    num_positions: int = 0
    """Learned positions of patches."""
    patch_size: int = 14
    bytes_per_value: int = 2
    """Of a weight, key or value: 2 in bfloat16 or float16, 4 in float32."""

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.given_head_dim or self.hidden // self.heads

    @property
    def attention_width(self) -> int:
        """Of all heads together."""
        return self.heads * self.head_dim

    @property
    def body(self) -> int:
        """Weights of the decoder's layers that every token is multiplied with."""
        attention = 2 * self.hidden * (self.attention_width + self.kv_heads * self.head_dim)
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def head(self) -> int:
        """Weights of the output matrix."""
        return self.hidden * self.vocab

    @property
    def vision_body(self) -> int:
        """Weights of the vision tower that every patch is multiplied with."""
        width, mlp = self.vision_width, self.vision_mlp or 4 * self.vision_width
        patch_values = 3 * TEMPORAL_PATCH_SIZE * self.patch_size**2
        num_matrices = 3 if self.vision_gated else 2
        return self.vision_layers * (4 * width**2 + num_matrices * width * mlp) + patch_values * width

    @property
    def merger(self) -> int:
        """Weights that every visual token is multiplied with before the decoder."""
        merged = PATCHES_PER_TOKEN * self.vision_width
        return (1 + self.further_mergers) * (merged**2 + merged * self.hidden)

    @property
    def num_parameters(self) -> int:
        """All weights, norms and biases left out: they are a few in ten thousand."""
        positions = self.num_positions * self.vision_width
        return self.body + self.vision_body + positions + self.merger + self.head * (1 if self.tied else 2)

    def kv_bytes(self) -> int:
        """Bytes of keys and values for each token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_value


SHAPES: Mapping[str, ModelShape] = {
    "2b": ModelShape(1536, 28, 12, 2, 8960, 151936, True, 1280, 32, 16),
    "7b": ModelShape(3584, 28, 28, 4, 18944, 152064, False, 1280, 32, 16),
    "72b": ModelShape(8192, 80, 64, 8, 29568, 152064, False, 1280, 32, 16),
    "qwen2.5-vl-3b": ModelShape(2048, 36, 16, 2, 11008, 151936, True, 1280, 32, 16, None, 3420, True, 28),
    "qwen2.5-vl-7b": ModelShape(3584, 28, 28, 4, 18944, 152064, False, 1280, 32, 16, None, 3420, True, 28),
    "qwen2.5-vl-32b": ModelShape(5120, 64, 40, 8, 27648, 152064, False, 1280, 32, 16, None, 3456, True, 28),
    "qwen2.5-vl-72b": ModelShape(8192, 80, 64, 8, 29568, 152064, False, 1280, 32, 16, None, 3456, True, 28),
    "qwen3-vl-2b": ModelShape(2048, 28, 16, 8, 6144, 151936, True, 1024, 24, 16, 128, 4096, False, 0, 3, 2304, 16),
    "qwen3-vl-4b": ModelShape(2560, 36, 32, 8, 9728, 151936, True, 1024, 24, 16, 128, 4096, False, 0, 3, 2304, 16),
    "qwen3-vl-8b": ModelShape(4096, 36, 32, 8, 12288, 151936, False, 1152, 27, 16, 128, 4304, False, 0, 3, 2304, 16),
    "qwen3-vl-32b": ModelShape(5120, 64, 64, 8, 25600, 151936, False, 1152, 27, 16, 128, 4304, False, 0, 3, 2304, 16),
}
"""The published checkpoints by their config.json, for when there is only a name. Plain sizes are Qwen2-VL's."""


def named_shape(path: str) -> ModelShape | None:
    """The shape of the published checkpoint that a folder or hub name names."""
    names = sorted(SHAPES, key=len, reverse=True)
    found = (name for name in names if re.search(rf"(?<![0-9.]){re.escape(name)}(?![a-z0-9])", path, re.I))
    return next((SHAPES[name] for name in found), None)


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape in a checkpoint's `config.json`, old layout (flat) or new (`text_config`). Raises KeyError."""
    text = config.get("text_config") or config
    vision = config["vision_config"]
    full_layers = vision.get("fullatt_block_indexes")
    return ModelShape(
        hidden=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        mlp=text["intermediate_size"],
        vocab=text["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        # Qwen2-VL calls the output's width `hidden_size`.
        vision_width=vision["embed_dim"] if "embed_dim" in vision else vision["hidden_size"],
        vision_layers=vision["depth"],
        vision_heads=vision["num_heads"],
        given_head_dim=text.get("head_dim"),
        vision_mlp=vision.get("intermediate_size"),
        vision_gated=vision.get("hidden_act") == "silu",
        windowed_layers=vision["depth"] - len(full_layers) if full_layers is not None else 0,
        further_mergers=len(vision.get("deepstack_visual_indexes") or ()),
        num_positions=vision.get("num_position_embeddings", 0),
        patch_size=vision.get("patch_size", 14),
    )


def vision_flops(shape: ModelShape, grid_thw: Sequence[int]) -> float:
    """FLOP of one medium's patches in the vision tower and the merger; attention stays within a temporal step."""
    t, grid_h, grid_w = grid_thw
    in_step = grid_h * grid_w
    weights = shape.vision_body + shape.merger / PATCHES_PER_TOKEN
    windowed = shape.windowed_layers
    in_windows = _sum_of_squares(grid_h) * _sum_of_squares(grid_w)
    pairs = (shape.vision_layers - windowed) * in_step**2 + windowed * in_windows
    return 2 * t * in_step * weights + 4 * t * shape.vision_width * pairs


def _sum_of_squares(side: int) -> int:
    """Of the parts into which windows cut a side."""
    full, rest = divmod(side, WINDOW_SIDE)
    return full * WINDOW_SIDE**2 + rest**2


def prefill_flops(shape: ModelShape, prompt: int) -> float:
    """FLOP of a prompt's pass through the decoder, for its first token: all layers over all tokens, as is usual to
    count them. Of the last layer an engine may leave out most: of 28 layers 3 %."""
    return 2 * shape.body * prompt + 2 * prompt**2 * shape.attention_width * shape.layers + 2 * shape.head


def decode_flops(shape: ModelShape, prompt: int, output: float) -> float:
    """FLOP of the tokens after the first."""
    attention = 4 * shape.attention_width * shape.layers * (prompt + output / 2)
    return (output - 1) * (2 * (shape.body + shape.head) + attention)


def decode_bytes(shape: ModelShape, prompt: int, output: float, running: float) -> float:
    """Memory traffic of one row's tokens: its keys and values, and its share of reading the weights each step."""
    weights = shape.bytes_per_value * (shape.body + shape.head) / running
    return output * (weights + shape.kv_bytes() * (prompt + output / 2))


class RowWork(NamedTuple):
    """A row as the engine processes it. The prompt is run once, each of its answers decodes for itself."""

    grids: Sequence[tuple[int, int, int]]
    """grid_thw of each medium."""
    prompt_tokens: int
    output_tokens: float
    num_samples: int = 1


def row_flops(shape: ModelShape, row: RowWork) -> tuple[float, float, float]:
    """(vision, prefill, decode) FLOP."""
    vision = sum(vision_flops(shape, grid) for grid in row.grids)
    decode = row.num_samples * decode_flops(shape, row.prompt_tokens, row.output_tokens)
    return vision, prefill_flops(shape, row.prompt_tokens), decode


def row_seconds(shape: ModelShape, gpu: Gpu, row: RowWork, *, running: float) -> float:
    """The shortest time in seconds that a row takes of one GPU while `running` sequences decode together."""
    vision, prefill, decode = row_flops(shape, row)
    traffic = row.num_samples * decode_bytes(shape, row.prompt_tokens, row.output_tokens, running)
    return (vision + prefill) / gpu.flops + max(decode / gpu.flops, traffic / gpu.bytes_per_s)


def min_gpus(shape: ModelShape, gpu: Gpu, *, cache_tokens: int, memory_fraction: float) -> int:
    """GPUs that hold the weights and a key-value cache of so many tokens."""
    needed = shape.bytes_per_value * shape.num_parameters + cache_tokens * shape.kv_bytes()
    return math.ceil(needed / (memory_fraction * gpu.memory_gb * 1e9))


def cache_tokens(shape: ModelShape, gpu: Gpu, *, gpus: float, memory_fraction: float) -> int:
    """Tokens that fit into the key-value cache beside the weights on so many GPUs; 0 where the weights don't fit."""
    left = memory_fraction * gpus * gpu.memory_gb * 1e9 - shape.bytes_per_value * shape.num_parameters
    return max(0, int(left / shape.kv_bytes()))
