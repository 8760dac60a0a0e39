"""What a workload costs in arithmetic and memory traffic, and what the makers' data sheets say a GPU can do.

    rows --> FLOP and bytes --(GPU's peaks)--> seconds that no engine can beat; real ones reach a share of it

The arithmetic of Qwen2-VL: a vision tower over patches (attention within each temporal step), a merger, a decoder over
prompt tokens (causal attention), then one token at a time. Plain numbers: knows no torch, config or rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BYTES_PER_VALUE = 2
"""Of a weight, key or value in bfloat16 or float16."""
VISION_HIDDEN_RATIO = 4
PATCH_VALUES = 3 * 2 * 14 * 14
PATCHES_PER_TOKEN = 4


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker's data sheet has it."""

    name: str
    """As it appears in the name that the driver gives."""
    flops: float
    """Dense bfloat16 FLOP/s (float16 before Ampere), without sparsity."""
    bytes_per_s: float
    """Memory bandwidth."""
    memory_gb: float


# The first whose name is found in the driver's wins, so that a longer name stands before its beginning.
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
    """The GPU that a driver, a cloud or a person calls so: `NVIDIA H100 80GB HBM3`, `a100-80gb`, `H100_PCIe`."""
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
    def vision(self) -> int:
        """Weights of the vision tower's layers, patch embedding and merger."""
        width = self.vision_width
        layers = self.vision_layers * (4 + 2 * VISION_HIDDEN_RATIO) * width**2
        merged = PATCHES_PER_TOKEN * width
        return layers + PATCH_VALUES * width + merged**2 + merged * self.hidden

    @property
    def num_parameters(self) -> int:
        """All weights, norms and biases left out: they are a few in ten thousand."""
        return self.body + self.vision + self.head * (1 if self.tied else 2)

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights take in bfloat16."""
        return BYTES_PER_VALUE * self.num_parameters

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
    patches = t * in_step
    width, merged = shape.vision_width, PATCHES_PER_TOKEN * shape.vision_width
    layers = shape.vision_layers * (4 + 2 * VISION_HIDDEN_RATIO) * width**2
    linear = 2 * patches * (layers + PATCH_VALUES * width)
    merger = 2 * (patches / PATCHES_PER_TOKEN) * (merged**2 + merged * shape.hidden)
    return linear + merger + 4 * in_step**2 * t * width * shape.vision_layers


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


@dataclass(frozen=True)
class RowWork:
    """A row as the engine sees it."""

    grids: tuple[tuple[int, int, int], ...]
    """grid_thw of each medium."""
    prompt_tokens: int
    output_tokens: float
    samples: int = 1
    """Answers (`sampling.n`): the prompt is run once, each answer decodes for itself."""


def row_seconds(shape: ModelShape, row: RowWork, gpu: Gpu, *, running: float) -> float:
    """The least seconds of one GPU's time that the row takes with so many sequences decoding together."""
    before = sum(vision_flops(shape, grid) for grid in row.grids) + prefill_flops(shape, row.prompt_tokens)
    decode = decode_flops(shape, row.prompt_tokens, row.output_tokens)
    traffic = decode_bytes(shape, row.prompt_tokens, row.output_tokens, running)
    return before / gpu.flops + row.samples * max(decode / gpu.flops, traffic / gpu.bytes_per_s)


def cache_tokens(shape: ModelShape, gpu: Gpu, *, gpus: float, cache_fraction: float) -> int:
    """Tokens that fit into the key-value cache beside the weights on so many GPUs; 0 where the weights don't fit."""
    free = gpus * gpu.memory_gb * 1e9 - shape.weight_bytes
    return max(0, int(cache_fraction * free / shape.kv_bytes()))


def total_flops(shape: ModelShape, rows: Iterable[RowWork]) -> float:
    """FLOP of all the rows."""
    return sum(
        sum(vision_flops(shape, grid) for grid in row.grids)
        + prefill_flops(shape, row.prompt_tokens)
        + row.samples * decode_flops(shape, row.prompt_tokens, row.output_tokens)
        for row in rows
    )
