"""FIRA, the founding model: learned positions, LayerNorm, GELU experts with biases, untied head.

With one expert it is GPT-2 (Radford et al. 2019) without biases in the attention projections.
Dropout follows the embeddings, the attention and the experts; attention probabilities are not
dropped, so that every device keeps its fused attention.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fira.config import parse
from fira.model.attention import KeyValueCache, LayerCache, attention, find_positions
from fira.model.experts import GELUExperts
from fira.model.generate import generate
from fira.model.initialize import initialize
from fira.model.moe import Dense, MoE
from fira.model.router import Router
from fira.model.spec import FIRASpec


class FIRA(nn.Module):
    """tokens_BT -> logits_BTV. Takes the fields of `FIRASpec`; raises ConfigError on bad ones."""

    before = ("token_embedding", "position_embedding")  # parts that come before the blocks
    after = ("norm", "head")  # and after them

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        spec = parse(FIRASpec, fields)
        self.spec = spec
        self.end_of_text: int | None = None
        self.trained_length: int | None = None
        self.token_embedding = nn.Embedding(spec.vocab_size, spec.d_model)
        self.position_embedding = nn.Embedding(spec.context, spec.d_model)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        self.norm = nn.LayerNorm(spec.d_model)
        self.head = nn.Linear(spec.d_model, spec.vocab_size)
        initialize(self)

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
        positions_T = find_positions(tokens_BT, cache, self.spec.context)
        x_BTD = self.token_embedding(tokens_BT) + self.position_embedding(positions_T)
        return F.dropout(x_BTD, self.spec.dropout, self.training)

    def through(self, blocks: Iterable[nn.Module], x_BTD: Tensor,
                cache: KeyValueCache | None = None) -> Tensor:
        """x_BTD after `blocks`: all of them, or those of one stage of a pipeline."""
        for layer, block in enumerate(blocks):
            x_BTD = block(x_BTD, cache.layers[layer] if cache else None)
        return x_BTD

    def read_out(self, x_BTD: Tensor, targets_BT: Tensor | None = None,
                 loss: Callable[..., Tensor] | None = None) -> Tensor:
        """Logits, or with `loss` what it makes of features, head and targets."""
        if loss is None:
            return self.logits(x_BTD)
        return loss(x_BTD, self.head.weight, self.head.bias, targets_BT)

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """What the head multiplies features with, [V, D], and adds, [V]."""
        return self.head.weight, self.head.bias

    def logits(self, x_BTD: Tensor) -> Tensor:
        """The head, for callers that need only some positions of `features`."""
        return self.head(x_BTD)

    def new_cache(self, batch: int, capacity: int | None = None) -> KeyValueCache:
        """An empty key-value cache for `capacity` positions (the whole context)."""
        spec = self.spec
        return KeyValueCache(spec.num_layers, batch, spec.n_kv_head, capacity or spec.context,
                             spec.head_dim, like=self.token_embedding.weight)

    generate = generate

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> FIRA:
        """Read a step folder, or the newest complete step of a run folder."""
        from fira.model.files import load_pretrained
        return load_pretrained(folder, cls)


class Block(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, spec: FIRASpec) -> None:
        super().__init__()
        self.dropout = spec.dropout
        self.attention_norm = nn.LayerNorm(spec.d_model)
        self.attention = Attention(spec)
        self.moe_norm = nn.LayerNorm(spec.d_model)
        experts = GELUExperts(spec.num_experts, spec.d_model, spec.d_ff)
        self.moe = Dense(experts) if spec.num_experts == 1 else MoE(
            Router(spec.d_model, spec.num_experts, spec.top_k, bias=True,
                   balance_weight=spec.balance_weight, z_weight=spec.z_weight,
                   balance=spec.balance), experts)

    def forward(self, x_BTD: Tensor, cache: LayerCache | None) -> Tensor:
        attended_BTD = self.attention(self.attention_norm(x_BTD), cache)
        x_BTD = x_BTD + F.dropout(attended_BTD, self.dropout, self.training)
        mixed_BTD = self.moe(self.moe_norm(x_BTD))
        return x_BTD + F.dropout(mixed_BTD, self.dropout, self.training)


class Attention(nn.Module):
    """Causal multi-head self-attention without biases."""

    def __init__(self, spec: FIRASpec) -> None:
        super().__init__()
        self.n_head = spec.n_head
        self.qkv = nn.Linear(spec.d_model, 3 * spec.d_model, bias=False)
        self.output = nn.Linear(spec.d_model, spec.d_model, bias=False)

    def forward(self, x_BTD: Tensor, cache: LayerCache | None) -> Tensor:
        B, T, D = x_BTD.shape
        qkv_BTHC = self.qkv(x_BTD).view(B, T, 3 * self.n_head, D // self.n_head)
        q_BHTC, k_BHTC, v_BHTC = qkv_BTHC.transpose(1, 2).chunk(3, dim=1)
        y_BHTC = attention(q_BHTC, k_BHTC, v_BHTC, cache)
        return self.output(y_BHTC.transpose(1, 2).reshape(B, T, D))
