"""Matrix multiplication by one weight of the checkpoint, or by several joined into one call.

On a CPU the weight is packed once into the layout in which oneDNN multiplies, which it would otherwise do in every
call: the same bits in bfloat16, and faster for the few rows of a decode pass (`python -m jobs.benchmark dense`;
figures in docs/performance.md).

On a CPU without bfloat16 instructions torch multiplies bfloat16 about seven times slower than float32. There the weight
is held in float32 and the product rounded to bfloat16 once: the same numbers as a bfloat16 kernel, which also
accumulates in float32, for twice the memory.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

_PACKED_FOR_ROWS = 64
"""Rows of the inputs that oneDNN chooses the layout for; others are multiplied in the same layout."""


def needs_float32_matmul(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or dtype == torch.float32:
        return False
    query = "_is_mkldnn_fp16_supported" if dtype == torch.float16 else "_is_mkldnn_bf16_supported"
    try:
        return not getattr(torch.ops.mkldnn, query)()
    except (AttributeError, RuntimeError):
        return False  # a torch without this query: leave the choice of kernel to it


@lru_cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch packs weights of a dtype on the CPU, and multiplies by them as it does without."""
    weight, x = torch.eye(8, dtype=dtype), torch.arange(16, dtype=dtype).view(2, 8)
    try:
        return torch.equal(multiply_packed(x, pack(weight), None), F.linear(x, weight))
    except (AttributeError, RuntimeError):  # these operators are not public
        return False


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] in oneDNN's layout."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACKED_FOR_ROWS)
    return packed


def multiply_packed(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [N, in] times a packed weight, plus bias: [N, out]."""
    rows = len(x)
    if missing := padded_rows(rows) - rows:
        return multiply_packed(F.pad(x, (0, 0, 0, missing)), packed, bias)[:rows]
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


def padded_rows(rows: int) -> int:
    """The next of eight numbers between two powers of two; from 4 to 16 rows are as they are, and fewer take longer.

    oneDNN compiles code for each shape, which takes 1 ms and 0.6 MB or more, and keeps the last 1,024 of them: with
    passes of any length that would be gigabytes.
    """
    step = 1 << max(0, (rows - 1).bit_length() - 4)
    return max(4, -(-rows // step) * step)


class Dense:
    """y = x W^T + b; weight [out, in], bias [out] or None."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.dtype = weight.dtype
        self.out_features, self.in_features = weight.shape
        self.device = weight.device
        self._upcast = needs_float32_matmul(weight.device, weight.dtype)
        if self._upcast:
            weight, bias = weight.float(), None if bias is None else bias.float()
        self.matmul_dtype = weight.dtype
        self._bias = bias
        self._is_packed = type(weight.data) is torch.Tensor and weight.device.type == "cpu" and can_pack(weight.dtype)
        self._weight = pack(weight) if self._is_packed else weight

    @property
    def holds_a_copy(self) -> bool:
        """Of the weight, which is then not needed any more."""
        return self._is_packed or self._upcast

    def __call__(self, x: torch.Tensor) -> torch.Tensor:  # [N, in] -> [N, out]
        product = self._multiply(x.float() if self._upcast else x)
        return product.to(self.dtype) if self._upcast else product

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self._is_packed:
            return multiply_packed(x, self._weight, self._bias)
        return F.linear(x, self._weight, self._bias)


def dense(linear: Any, *others: Any, release: bool = False) -> Dense:
    """One product for one nn.Linear or for several over the same input.

    Of several, the joined weight replaces theirs, so memory does not double. `release`: where the product holds a
    copy, the linears lose their weights and are of no further use.
    """
    linears = (linear, *others)
    if not others:
        made = Dense(linear.weight, linear.bias)
    else:
        weight = torch.cat([each.weight.data for each in linears])
        bias = None if linear.bias is None else torch.cat([each.bias.data for each in linears])
        made = Dense(weight, bias)
        if not made.holds_a_copy:
            sizes = [len(each.weight) for each in linears]
            for each, part in zip(linears, torch.split(weight, sizes), strict=True):
                each.weight.data = part
    if release and made.holds_a_copy:
        for each in linears:
            each.weight.data = each.weight.data.new_empty(0)
    return made
