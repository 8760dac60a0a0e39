"""Matrix multiplication by one weight of the checkpoint, or by several joined into one call.

On a CPU without bfloat16 instructions torch multiplies bfloat16 about seven times slower than float32. There the
weight is held in float32 and the product rounded to bfloat16 once: the same numbers as a bfloat16 kernel, which also
accumulates in float32, for twice the memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


def needs_float32_matmul(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or dtype == torch.float32:
        return False
    query = "_is_mkldnn_fp16_supported" if dtype == torch.float16 else "_is_mkldnn_bf16_supported"
    try:
        return not getattr(torch.ops.mkldnn, query)()
    except (AttributeError, RuntimeError):
        return False  # a torch without this query: leave the choice of kernel to it


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


def dense(linear: Any, *others: Any) -> Dense:
    """One product for one nn.Linear or for several over the same input.

    The weights of several are copied into one tensor and become views of it, so memory does not double.
    """
    if not others:
        return Dense(linear.weight, linear.bias)
    linears = (linear, *others)
    weight = torch.cat([each.weight.data for each in linears])
    bias = None if linear.bias is None else torch.cat([each.bias.data for each in linears])
    start = 0
    for each in linears:
        stop = start + each.weight.shape[0]
        each.weight.data = weight[start:stop]
        if bias is not None:
            each.bias.data = bias[start:stop]
        start = stop
    return Dense(weight, bias)
