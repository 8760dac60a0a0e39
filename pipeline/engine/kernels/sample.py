"""Every operation once, on random inputs: for comparing two implementations, and for compiling one without a GPU."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from pipeline.engine.kernels.eager import EagerKernels
from pipeline.engine.kv_cache import KVCache


class Widths(NamedTuple):
    """The sizes of a model that the operations see."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vision_heads: int
    vision_head_dim: int
    vision_mlp: int


def run_every_operation(
    kernels: EagerKernels,
    widths: Widths,
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_rows: int = 16,
    gap: int = 0,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The results by name. The rows of an input are `gap` values apart."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        width = math.prod(shape)
        rows = scale * torch.randn(num_rows, width + gap, generator=generator)
        return rows.to(device, dtype)[:, :width].view(num_rows, *shape)

    def rotation(head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        angles = 10 * torch.randn(num_rows, head_dim // 2, generator=generator)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(device, dtype), angles.sin().to(device, dtype)

    results: dict[str, torch.Tensor] = {}
    vision_width = widths.vision_heads * widths.vision_head_dim
    norm = torch.nn.LayerNorm(vision_width, eps=1e-6, device=device, dtype=dtype).requires_grad_(False)
    norm.weight.copy_(random(vision_width)[0])
    norm.bias.copy_(random(vision_width)[0])
    for name, delta in (("", random(vision_width)), (" alone", None)):
        summed, normed = kernels.add_layer_norm(random(vision_width), delta, norm)
        results |= {f"vision sum{name}": summed, f"layer norm{name}": normed}
    cos, sin = (part[:, None, None] for part in rotation(widths.vision_head_dim, torch.float32))
    rotated = kernels.rotate_vision(random(3, widths.vision_heads, widths.vision_head_dim), cos, sin)
    results |= {f"vision {name}": part for name, part in zip("qkv", rotated, strict=True)}
    results["quick gelu"] = kernels.quick_gelu(random(widths.vision_mlp, scale=4.0))

    weight = random(widths.hidden)[0].contiguous()
    for name, delta in (("", random(widths.hidden)), (" alone", None)):
        summed, normed = kernels.add_rms_norm(random(widths.hidden), delta, weight, 1e-6)
        results |= {f"sum{name}": summed, f"rms norm{name}": normed}
    cache = KVCache(
        [device],
        num_blocks=num_rows,
        block_size=1,
        num_kv_heads=widths.kv_heads,
        head_dim=widths.head_dim,
        dtype=dtype,
    )
    slots = torch.randperm(num_rows, generator=generator).to(device)
    cos, sin = (part[:, None] for part in rotation(widths.head_dim, dtype))
    qkv = random(widths.heads + 2 * widths.kv_heads, widths.head_dim)
    head_weight = random(widths.heads + widths.kv_heads, widths.head_dim)[0].contiguous()
    results["head norm"] = kernels.norm_heads(qkv.clone(), head_weight, 1e-6)
    rotated = kernels.rotate_and_cache(qkv, cos, sin, widths.heads, cache, 0, slots)
    results |= dict(zip("qkv", rotated, strict=True))
    results |= {"cached keys": cache.keys[0], "cached values": cache.values[0]}
    results["silu times up"] = kernels.silu_times_up(random(2 * widths.mlp, scale=4.0))
    return results
