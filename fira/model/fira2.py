"""FIRA2, the second generation: exactly Qwen3-MoE's mathematics (Qwen3 report, 2505.09388).

RMSNorm, rotary positions, grouped-query attention with per-head QK-norm, SwiGLU experts, no biases,
a head tied to the token embedding or of its own, every layer MoE. With one expert it is the dense
Qwen3.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fira.config import parse
from fira.model.attention import (
    KeyValueCache,
    LayerCache,
    Rotary,
    Rotate,
    attention,
    find_positions,
)
from fira.model.experts import SwiGLUExperts
from fira.model.generate import generate
from fira.model.initialize import initialize
from fira.model.look_back import look_back
from fira.model.moe import Dense, MoE
from fira.model.norm import RMSNorm
from fira.model.router import Router
from fira.model.spec import FIRA2Spec


class FIRA2(nn.Module):
    """tokens_BT -> logits_BTV. Takes the fields of `FIRA2Spec`; raises ConfigError on bad ones."""

    before = ("token_embedding",)  # parts that come before the blocks

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        spec = parse(FIRA2Spec, fields)
        self.spec = spec
        self.end_of_text: int | None = None
        self.trained_length: int | None = None
        self.token_embedding = nn.Embedding(spec.vocab_size, spec.d_model)
        self.rotary = Rotary(spec.context, spec.head_dim, spec.rope_theta)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        self.norm = RMSNorm(spec.d_model)
        if not spec.tied:
            self.head = nn.Linear(spec.d_model, spec.vocab_size, bias=False)
        initialize(self)

    @property
    def prior(self) -> dict[str, Tensor]:
        """What first weights have besides noise."""
        return look_back(self.spec) if self.spec.look_back else {}

    @property
    def after(self) -> tuple[str, str]:
        """Parts that come after the blocks, the head last."""
        return ("norm", "token_embedding" if self.spec.tied else "head")

    def forward(self, tokens_BT: Tensor, cache: KeyValueCache | None = None,
                targets_BT: Tensor | None = None,
                loss: Callable[..., Tensor] | None = None) -> Tensor:
        """Logits at every position. With a cache, the tokens continue what it holds.

        With `loss`, what it makes of features, head and targets: whole logits need not exist.
        """
        return self.read_out(self.features(tokens_BT, cache), targets_BT, loss)

    def features(self, tokens_BT: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """The normalized residual stream x_BTD that the head reads."""
        return self.norm(self.through(self.blocks, self.embed(tokens_BT, cache), cache))

    def embed(self, tokens_BT: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """What the first block reads."""
        return self.token_embedding(tokens_BT)

    def through(self, blocks: Iterable[nn.Module], x_BTD: Tensor,
                cache: KeyValueCache | None = None) -> Tensor:
        """x_BTD after `blocks`: all of them, or those of one stage of a pipeline."""
        tables = self.rotary(find_positions(x_BTD, cache, self.spec.context))
        for layer, block in enumerate(blocks):
            x_BTD = block(x_BTD, tables, cache.layers[layer] if cache else None)
        return x_BTD

    def read_out(self, x_BTD: Tensor, targets_BT: Tensor | None = None,
                 loss: Callable[..., Tensor] | None = None) -> Tensor:
        """Logits, or with `loss` what it makes of features, head and targets."""
        if loss is None:
            return self.logits(x_BTD)
        return loss(x_BTD, self._head(), None, targets_BT)

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """What the head multiplies features with, [V, D], and adds, [V]."""
        return self._head(), None

    def logits(self, x_BTD: Tensor) -> Tensor:
        """What the head says of every position."""
        return F.linear(x_BTD, self._head())

    def _head(self) -> Tensor:
        return (self.token_embedding if self.spec.tied else self.head).weight

    def new_cache(self, batch: int, capacity: int | None = None) -> KeyValueCache:
        """An empty key-value cache for `capacity` positions (the whole context)."""
        spec = self.spec
        return KeyValueCache(spec.num_layers, batch, spec.n_kv_head, capacity or spec.context,
                             spec.head_dim, like=self.token_embedding.weight)

    generate = generate

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> FIRA2:
        """Read a step folder, or the newest complete step of a run folder."""
        from fira.model.files import load_pretrained
        return load_pretrained(folder, cls)


class Block(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, spec: FIRA2Spec) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(spec.d_model)
        self.attention = Attention(spec)
        self.moe_norm = RMSNorm(spec.d_model)
        experts = SwiGLUExperts(spec.num_experts, spec.d_model, spec.d_ff)
        self.moe = Dense(experts) if spec.num_experts == 1 else MoE(
            Router(spec.d_model, spec.num_experts, spec.top_k, bias=False,
                   balance_weight=spec.balance_weight, z_weight=spec.z_weight,
                   balance=spec.balance), experts)

    def forward(self, x_BTD: Tensor, tables: tuple[Tensor, Tensor],
                cache: LayerCache | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), tables, cache)
        return x_BTD + self.moe(self.moe_norm(x_BTD))


class Attention(nn.Module):
    """Grouped-query attention; queries and keys are normalized per head, then rotated."""

    def __init__(self, spec: FIRA2Spec) -> None:
        super().__init__()
        self.heads = (spec.n_head, spec.n_kv_head, spec.n_kv_head)
        self.head_dim = spec.head_dim
        self.qkv = nn.Linear(spec.d_model, sum(self.heads) * spec.head_dim, bias=False)
        self.query_norm = RMSNorm(spec.head_dim)
        self.key_norm = RMSNorm(spec.head_dim)
        self.output = nn.Linear(spec.n_head * spec.head_dim, spec.d_model, bias=False)

    def forward(self, x_BTD: Tensor, tables: tuple[Tensor, Tensor],
                cache: LayerCache | None) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BTHC, k_BTGC, v_BTGC = self.qkv(x_BTD).view(B, T, -1, self.head_dim).split(
            self.heads, dim=2)
        q_BTHC = Rotate.apply(self.query_norm(q_BTHC), *tables)
        k_BTGC = Rotate.apply(self.key_norm(k_BTGC), *tables)
        y_BHTC = attention(q_BTHC.transpose(1, 2), k_BTGC.transpose(1, 2),
                           v_BTGC.transpose(1, 2), cache)
        return self.output(y_BHTC.transpose(1, 2).reshape(B, T, -1))
