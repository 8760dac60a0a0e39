"""What `model.dtype: auto` is, for engines and plans: the checkpoint's own dtype where the device computes it natively.

Knows what a device can compute as plain facts; torch is asked about this machine's devices only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pipeline.engine.settings import Dtype

_NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Capabilities of CPUs as torch names them: x86, and the last ARM's."""
_FIRST_BFLOAT16_GPU = (8, 0)
"""Compute capability of CUDA."""


@dataclass(frozen=True)
class Arithmetic:
    """What a device is, and whether it has instructions for bfloat16."""

    name: str
    is_gpu: bool
    has_bfloat16: bool


@dataclass(frozen=True)
class PickedDtype:
    name: Dtype
    reason: str


def own_dtype(config: Mapping[str, Any]) -> Dtype | None:
    """The dtype that a `config.json` states; None where it states none of ours."""
    for section in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            name = str(section.get(key)).removeprefix("torch.")
            if name in get_args(Dtype) and name != "auto":
                return name  # type: ignore[return-value]
    return None


def pick_dtype(wanted: Dtype, own: Dtype, device: Arithmetic) -> PickedDtype:
    """What to compute in, for a checkpoint whose own dtype is `own`."""
    if wanted != "auto":
        return PickedDtype(wanted, "model.dtype")
    if own == "float32" or (own == "bfloat16" and device.has_bfloat16) or (own == "float16" and device.is_gpu):
        return PickedDtype(own, f"the checkpoint's own, native to {device.name}")
    name: Dtype = "float16" if device.is_gpu else "float32"
    return PickedDtype(name, f"the checkpoint's own is {own}, which is not native to {device.name}")


def arithmetic(device: str) -> Arithmetic:
    """Of a device of this machine, by torch's name for it."""
    import torch  # plans for other machines do without

    if device.startswith("cuda"):
        capability = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} (compute capability {'.'.join(map(str, capability))})"
        return Arithmetic(name, True, capability >= _FIRST_BFLOAT16_GPU)
    found = [name for name in _NATIVE_BFLOAT16 if torch.cpu.get_capabilities().get(name)]
    return Arithmetic(f"this CPU ({found[0]})" if found else "this CPU", False, bool(found))
