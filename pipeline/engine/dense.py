"""Matrix multiplication by a weight of the checkpoint, and weights joined so that one call does for several.

On a CPU without bfloat16 instructions torch multiplies bfloat16 about seven times slower than float32. There the
weight is held in float32 and the product rounded to bfloat16 once: the same numbers as a bfloat16
kernel, which also adds up in float32, at the price of twice the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F


def needs_float32_matmul(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or dtype == torch.float32:
        return False
    if dtype == torch.float16:
        return not _cpu_supports("_is_mkldnn_fp16_supported")
    return not _cpu_supports("_is_mkldnn_bf16_supported")


def _cpu_supports(question: str) -> bool:
    try:
        return bool(getattr(torch.ops.mkldnn, question)())
    except (AttributeError, RuntimeError):
        return True  # another torch: leave the choice of kernel to it


class Dense:
    """y = x W^T + b; `weight` [out, in], `bias` [out] or None."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.dtype = weight.dtype
        self.upcast = needs_float32_matmul(weight.device, weight.dtype)
        self.weight = weight.float() if self.upcast else weight
        self.bias = bias.float() if self.upcast and bias is not None else bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.upcast:
            return F.linear(x.float(), self.weight, self.bias).to(self.dtype)
        return F.linear(x, self.weight, self.bias)


def dense(linear: Any) -> Dense:
    return Dense(linear.weight, linear.bias)


def joined(linears: Sequence[Any]) -> Dense:
    """Several nn.Linear over the same input as one; their weights become views, so no memory doubles."""
    weight = torch.cat([linear.weight.data for linear in linears])
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([linear.bias.data for linear in linears])
    start = 0
    for linear in linears:
        stop = start + linear.weight.shape[0]
        linear.weight.data = weight[start:stop]
        if bias is not None:
            linear.bias.data = bias[start:stop]
        start = stop
    return Dense(weight, bias)
