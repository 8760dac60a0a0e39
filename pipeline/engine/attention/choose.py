"""Which attention backend runs here: the first that works, or the one that was asked for."""

from __future__ import annotations

import importlib.util

import torch

from pipeline.engine.attention.interface import AttentionBackend
from pipeline.errors import CheckpointError

INSTALL_FLASH = "pip install 'qwen2-vl-batch[gpu]' (or: pip install flash-attn --no-build-isolation)"


def flash_attn_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def torch_varlen_available() -> bool:
    return (
        importlib.util.find_spec("torch.nn.attention.varlen") is not None
        and importlib.util.find_spec("triton") is not None
    )


def pick_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The first that works here, or the one that was asked for; CheckpointError says what is missing."""
    from pipeline.engine.attention.sdpa import SdpaAttention

    can_flash = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if wanted in ("flash", "torch") and not can_flash:
        raise CheckpointError(
            f"engine.attention is {wanted!r}, which needs an NVIDIA GPU and bfloat16 or float16, not {device} in "
            f"{str(dtype).removeprefix('torch.')}; use auto or sdpa"
        )
    if wanted == "flash" and not flash_attn_installed():
        raise CheckpointError(
            f"engine.attention is 'flash', but flash-attn is missing; install it with {INSTALL_FLASH}"
        )
    if wanted == "torch" and not torch_varlen_available():
        raise CheckpointError(
            "engine.attention is 'torch', but this torch has no varlen kernels or no triton; "
            "install them with pip install 'torch>=2.11' triton"
        )
    if wanted == "flash" or (wanted == "auto" and can_flash and flash_attn_installed()):
        from pipeline.engine.attention.flash import FlashAttention

        return FlashAttention()
    if wanted == "torch" or (wanted == "auto" and can_flash and torch_varlen_available()):
        from pipeline.engine.attention.torch_varlen import TorchAttention

        return TorchAttention()
    return SdpaAttention()
