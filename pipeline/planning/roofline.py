"""The arithmetic and memory traffic of a workload, and the peaks of GPUs by their makers' data sheets.

    rows --> FLOP and bytes --(GPU's peaks)--> shortest possible seconds; engines reach a share of that pace

The arithmetic of Qwen2-VL: a vision tower over patches (attention within each temporal step), a merger, a decoder over
prompt tokens (causal attention), then one token at a time. Plain numbers: knows no torch, config or manifest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.checkpoint.families import DEFAULT_FAMILY
from pipeline.checkpoint.families.family import MERGE_SIZE

BYTES_PER_VALUE = 2
"""Of a weight, key or value in bfloat16 or float16."""
VISION_MLP_RATIO = 4
PATCH_VALUES = DEFAULT_FAMILY.patch_bytes("video")
PATCHES_PER_TOKEN = MERGE_SIZE**2


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
    Gpu("V100", 125e12, 900e9, 32),
    Gpu("T4", 65e12, 320e9, 16),
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
    """The sizes of a Qwen2-VL."""

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

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden // self.heads

    @property
    def body(self) -> int:
        """Weights of the decoder's layers that every token is multiplied with."""
        kv_width = self.kv_heads * self.head_dim
        return self.layers * (2 * self.hidden**2 + 2 * self.hidden * kv_width + 3 * self.hidden * self.mlp)

    @property
    def head(self) -> int:
        """Weights of the output matrix."""
        return self.hidden * self.vocab

    @property
    def vision_body(self) -> int:
        """Weights of the vision tower that every patch is multiplied with."""
        width = self.vision_width
        return self.vision_layers * (4 + 2 * VISION_MLP_RATIO) * width**2 + PATCH_VALUES * width

    @property
    def merger(self) -> int:
        """Weights that every visual token is multiplied with before the decoder."""
        merged = PATCHES_PER_TOKEN * self.vision_width
        return merged**2 + merged * self.hidden

    @property
    def num_parameters(self) -> int:
        """All weights, norms and biases left out: they are a few in ten thousand."""
        return self.body + self.vision_body + self.merger + self.head * (1 if self.tied else 2)

    def kv_bytes(self, bytes_per_value: int = BYTES_PER_VALUE) -> int:
        """Bytes of keys and values for each token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value


SHAPES: Mapping[str, ModelShape] = {
    "2b": ModelShape(1536, 28, 12, 2, 8960, 151936, True, 1280, 32, 16),
    "7b": ModelShape(3584, 28, 28, 4, 18944, 152064, False, 1280, 32, 16),
    "72b": ModelShape(8192, 80, 64, 8, 29568, 152064, False, 1280, 32, 16),
}
"""The published checkpoints, for when there is only a name."""


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape in a checkpoint's `config.json`, old layout (flat) or new (`text_config`). Raises KeyError."""
    text = config.get("text_config") or config
    vision = config["vision_config"]
    return ModelShape(
        hidden=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        mlp=text["intermediate_size"],
        vocab=text["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        vision_width=vision["embed_dim"],
        vision_layers=vision["depth"],
        vision_heads=vision["num_heads"],
    )


def vision_flops(shape: ModelShape, grid_thw: Sequence[int]) -> float:
    """FLOP of one medium's patches in the vision tower and the merger; attention stays within a temporal step."""
    t, grid_h, grid_w = grid_thw
    in_step = grid_h * grid_w
    weights = shape.vision_body + shape.merger / PATCHES_PER_TOKEN
    return 2 * t * in_step * weights + 4 * in_step**2 * t * shape.vision_width * shape.vision_layers


def prefill_flops(shape: ModelShape, prompt: int) -> float:
    """FLOP of a prompt's pass through the decoder, for its first token."""
    return 2 * shape.body * prompt + 2 * prompt**2 * shape.hidden * shape.layers + 2 * shape.head


def decode_flops(shape: ModelShape, prompt: int, output: float) -> float:
    """FLOP of the tokens after the first."""
    attention = 4 * shape.hidden * shape.layers * (prompt + output / 2)
    return (output - 1) * (2 * (shape.body + shape.head) + attention)


def decode_bytes(shape: ModelShape, prompt: int, output: float, running: float) -> float:
    """Memory traffic of one row's tokens: its keys and values, and its share of reading the weights each step."""
    weights = BYTES_PER_VALUE * (shape.body + shape.head) / running
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
    needed = BYTES_PER_VALUE * shape.num_parameters + cache_tokens * shape.kv_bytes()
    return math.ceil(needed / (memory_fraction * gpu.memory_gb * 1e9))


def cache_tokens(shape: ModelShape, gpu: Gpu, *, gpus: float, memory_fraction: float) -> int:
    """Tokens that fit into the key-value cache beside the weights on so many GPUs; 0 where the weights don't fit."""
    left = memory_fraction * gpus * gpu.memory_gb * 1e9 - BYTES_PER_VALUE * shape.num_parameters
    return max(0, int(left / shape.kv_bytes()))
