"""The text half of every family over packed tokens: transformers' weights, our forward pass.

q, k and v are joined into one product, gate and up into another. What lies between products and attention is in
kernels/, eager or fused; each operation rounds where transformers' does, so that greedy tokens agree.

    N packed tokens   H query heads   K kv heads   D head_dim   C hidden size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from pipeline.engine.dense import Dense, dense
from pipeline.engine.kernels.eager import EAGER, EagerKernels
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.models.architecture import Architecture
from pipeline.engine.models.mlp import GatedMlp

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q [N, H, D], k [N, K, D], v [N, K, D]) -> [N, H, D]; the cache holds k and v already."""


@dataclass
class _Layer:
    input_norm: torch.Tensor
    qkv: Dense
    out: Dense
    post_norm: torch.Tensor
    mlp: GatedMlp
    head_norm: torch.Tensor | None
    """[H + K, D]: weights of the norm that each query and key head gets before it is rotated."""


class DeepFeatures(NamedTuple):
    """What the vision tower hands to later layers: added to rows of the hidden states behind layers 0, 1, ..."""

    rows: torch.Tensor
    """[V]"""
    features: torch.Tensor
    """[V, layers, C]"""


class TextModel:
    def __init__(self, model: Any, architecture: Architecture, *, release: bool = False) -> None:
        """`model` is transformers' own, of the family's class; its joined weights become views of ours.

        `release`: the model loses the weights of which this holds a copy.
        """
        config = model.config.text_config
        language = model.model.language_model
        self.kernels: EagerKernels = EAGER
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.eps: float = config.rms_norm_eps
        self.embed_weight: torch.Tensor = language.embed_tokens.weight
        self.dtype = self.embed_weight.dtype
        self.final_norm: torch.Tensor = language.norm.weight
        is_tied = model.lm_head.weight is self.embed_weight
        self.lm_head = dense(model.lm_head, release=release and not is_tied)
        join = partial(dense, release=release)
        self.layers = [
            _Layer(
                layer.input_layernorm.weight,
                join(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                join(layer.self_attn.o_proj),
                layer.post_attention_layernorm.weight,
                GatedMlp(join(layer.mlp.gate_proj, layer.mlp.up_proj), join(layer.mlp.down_proj)),
                self._head_norm(layer.self_attn),
            )
            for layer in language.layers
        ]
        rotary = language.rotary_emb
        device = self.embed_weight.device
        # model.to(bfloat16) may have rounded the buffer, so the default rule is computed again in float32.
        is_default = rotary.rope_type == "default"
        inv_freq = rotary.compute_default_rope_parameters(config)[0] if is_default else rotary.inv_freq
        self.inv_freq = inv_freq.float().to(device)
        self.rope_scaling = float(rotary.attention_scaling)
        sections = (config.rope_parameters or {}).get("mrope_section", architecture.mrope_section)
        axes = axis_of_frequency(sections, interleaved=architecture.interleaved)
        self.axis_of_frequency = torch.tensor(axes, device=device)

    def _head_norm(self, attention: Any) -> torch.Tensor | None:
        if not hasattr(attention, "q_norm"):
            return None
        q, k = attention.q_norm.weight, attention.k_norm.weight
        return torch.cat([q.expand(self.num_heads, -1), k.expand(self.num_kv_heads, -1)])

    def embed(self, ids: torch.Tensor) -> torch.Tensor:  # [N] -> [N, C]
        return F.embedding(ids, self.embed_weight)

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [N, 1, D] in the model's dtype, for positions [3, N] or [N] (same on all axes)."""
        if positions.ndim == 2:
            # Each frequency follows one axis: [3, N] -> [N, D / 2].
            angles = positions.float().index_select(0, self.axis_of_frequency).T * self.inv_freq
        else:
            angles = positions.float()[:, None] * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        cos = (angles.cos() * self.rope_scaling).to(self.dtype)
        sin = (angles.sin() * self.rope_scaling).to(self.dtype)
        return cos[:, None], sin[:, None]

    def forward(
        self,
        hidden: torch.Tensor,  # [N, C]
        rotation: tuple[torch.Tensor, torch.Tensor],
        cache: KVCache,
        slots: torch.Tensor,  # [N]
        attend: Attend,
        deep: DeepFeatures | None = None,
        wanted: torch.Tensor | None = None,  # [W]
    ) -> torch.Tensor:
        """All layers; keys and values go to these slots of the cache. Returns the hidden states of the wanted tokens:
        of the last layer the others need keys and values only. The last norm is left to `logits`. Hidden states move to
        the device of the next layer."""
        cos, sin = rotation
        num_tokens = hidden.shape[0]
        kernels = self.kernels
        delta: torch.Tensor | None = None  # added to the hidden states by the next norm
        num_deep = 0 if deep is None else deep.features.shape[1]
        last = len(self.layers) - 1
        leaves_out = wanted is not None and num_deep <= last  # deep features are numbered by all tokens
        for index, layer in enumerate(self.layers):
            if hidden.device != (device := layer.input_norm.device):
                hidden = hidden if delta is None else hidden + delta
                hidden, cos, sin, delta = hidden.to(device), cos.to(device), sin.to(device), None
            hidden, normed = kernels.add_rms_norm(hidden, delta, layer.input_norm, self.eps)
            qkv = layer.qkv(normed).view(num_tokens, -1, self.head_dim)
            if layer.head_norm is not None:
                qkv = kernels.norm_heads(qkv, layer.head_norm, self.eps)
            q, k, v = kernels.rotate_and_cache(qkv, cos, sin, self.num_heads, cache, index, slots)
            attended = attend(index, q, k, v).reshape(num_tokens, -1)
            if leaves_out and index == last:
                hidden, attended = _rows(hidden, wanted), _rows(attended, wanted)
            delta = layer.out(attended)
            hidden, normed = kernels.add_rms_norm(hidden, delta, layer.post_norm, self.eps)
            delta = layer.mlp(normed, kernels)
            if deep is not None and index < num_deep:
                hidden, delta = hidden + delta, None
                rows = deep.rows.to(device)
                hidden[rows] = hidden[rows] + deep.features[:, index].to(device)
        hidden = hidden if delta is None else hidden + delta
        return hidden if leaves_out else _rows(hidden, wanted)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:  # [R, C] -> [R, vocabulary]
        hidden = hidden.to(self.final_norm.device)
        return self.lm_head(self.kernels.add_rms_norm(hidden, None, self.final_norm, self.eps)[1])


def _rows(x: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
    return x if wanted is None else x.index_select(0, wanted.to(x.device))


def axis_of_frequency(sections: Sequence[int], *, interleaved: bool) -> list[int]:
    """Which axis each frequency of the rotation follows: 0 time, 1 height, 2 width."""
    if not interleaved:
        return [axis % 3 for axis, size in enumerate(sections) for _ in range(size)]
    return [index % 3 if index < 3 * sections[index % 3] else 0 for index in range(sum(sections))]
