"""FIRA2, the second generation: exactly Qwen3-MoE's mathematics (Qwen3 report, 2505.09388).

RMSNorm, rotary positions, grouped-query attention with per-head QK-norm, SwiGLU experts, no biases,
a head tied to the token embedding or of its own, every layer MoE. With one expert it is the dense
Qwen3.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fira.config import parse
from fira.model.initialize import initialize, look_back
from fira.model.moe import SwiGLUExperts, make_layer
from fira.model.spec import FIRA2Spec
from fira.model.transformer import (
    Block,
    KeyValueCache,
    LayerCache,
    Transformer,
    attention,
    embedding,
    find_positions,
)


class FIRA2(Transformer):
    """tokens_BT -> logits_BTV. Takes the fields of `FIRA2Spec`; raises ConfigError on bad ones."""

    architecture = "fira2"

    def __init__(self, **fields: Any) -> None:
        spec = parse(FIRA2Spec, fields)
        super().__init__(spec)
        self.token_embedding = embedding(spec.vocab_size, spec.d_model)
        self.rotary = Rotary(spec.context, spec.head_dim, spec.rope_theta)
        self.blocks = nn.ModuleList(Block(
            RMSNorm(spec.d_model, spec.norm_eps), Attention(spec),
            RMSNorm(spec.d_model, spec.norm_eps),
            make_layer(spec, SwiGLUExperts(spec.num_experts, spec.d_model, spec.d_ff),
                       router_bias=False, renormalize=spec.renormalize))
            for _ in range(spec.num_layers))
        self.norm = RMSNorm(spec.d_model, spec.norm_eps)
        if not spec.tied:
            self.head = nn.Linear(spec.d_model, spec.vocab_size, bias=False)
        initialize(self)

    @property
    def initial_offsets(self) -> dict[str, Tensor]:
        """What initial weights have besides noise, by name."""
        return look_back(self.spec) if self.spec.look_back else {}

    def rotation(self, x_BTD: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, Tensor]:
        return self.rotary(find_positions(x_BTD, cache, self.spec.context))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))  # [width]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention; queries and keys are normalized per head, then rotated."""

    def __init__(self, spec: FIRA2Spec) -> None:
        super().__init__()
        self.heads = (spec.n_head, spec.n_kv_head, spec.n_kv_head)
        self.head_dim = spec.head_dim
        self.qkv = nn.Linear(spec.d_model, sum(self.heads) * spec.head_dim, bias=False)
        self.query_norm = RMSNorm(spec.head_dim, spec.norm_eps)
        self.key_norm = RMSNorm(spec.head_dim, spec.norm_eps)
        self.output = nn.Linear(spec.n_head * spec.head_dim, spec.d_model, bias=False)

    def forward(self, x_BTD: Tensor, tables: tuple[Tensor, Tensor],
                cache: LayerCache | None) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BTHC, k_BTGC, v_BTGC = self.qkv(x_BTD).view(B, T, -1, self.head_dim).split(
            self.heads, dim=2)
        q_BTHC = rotate(self.query_norm(q_BTHC), *tables)
        k_BTGC = rotate(self.key_norm(k_BTGC), *tables)
        y_BHTC = attention(q_BTHC.transpose(1, 2), k_BTGC.transpose(1, 2),
                           v_BTGC.transpose(1, 2), cache)
        return self.output(y_BHTC.transpose(1, 2).reshape(B, T, -1))


class Rotary(nn.Module):
    """Cosines and sines of rotary positions (Su et al. 2021), as fp32 tables [context, C/2]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, context: int, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta
        shape = (context, head_dim // 2)
        self.register_buffer("cos", torch.empty(shape), persistent=False)
        self.register_buffer("sin", torch.empty(shape), persistent=False)

    def reset_buffers(self) -> None:
        """Fill the tables; needed after construction on the meta device."""
        device = self.cos.device
        powers = torch.arange(0, self.head_dim, 2, device=device).float() / self.head_dim
        positions = torch.arange(len(self.cos), device=device).float()
        angles = torch.outer(positions, 1.0 / self.theta**powers)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """The tables' rows at these positions, [T, C/2] each."""
        return self.cos[positions_T], self.sin[positions_T]


def rotate(x_BTHC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """RoPE pairing halves of the last axis: (a, b) -> (a cos - b sin, b cos + a sin)."""
    cos, sin = (table.to(x_BTHC.dtype).unsqueeze(-2) for table in (cos_TC, sin_TC))
    first, second = x_BTHC.chunk(2, dim=-1)
    return torch.cat([(first * cos).addcmul_(second, sin, value=-1),
                      (second * cos).addcmul_(first, sin)], dim=-1)
