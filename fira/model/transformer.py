"""The transformer around the MoE layer, which both architectures share.

Attention with its key-value cache, the block, the loop over the blocks, the head, and the count of
parameters. `attention_plain` is the definition of `attention`, the softmax written out (Vaswani et
al. 2017, section 3.2.1); query heads share key-value heads as in Ainslie et al. 2023.
"""
from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fira.model.files import NOTES, read_model
from fira.model.generate import generate


class LayerCache:
    """Keys and values of one layer, preallocated for `capacity` positions."""

    def __init__(self, keys_BGSC: Tensor, values_BGSC: Tensor) -> None:
        self.keys_BGSC = keys_BGSC
        self.values_BGSC = values_BGSC
        self.length = 0

    def attend(self, q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
        """Attention of T new positions to themselves and to all before: BHTC."""
        return attention(q_BHTC, *self.extend(k_BGTC, v_BGTC))

    def extend(self, k_BGTC: Tensor, v_BGTC: Tensor) -> tuple[Tensor, Tensor]:
        """Append T positions; return views of all positions so far."""
        start, self.length = self.length, self.length + k_BGTC.shape[2]
        assert self.length <= self.keys_BGSC.shape[2], (self.length, self.keys_BGSC.shape)
        self.keys_BGSC[:, :, start:self.length] = k_BGTC
        self.values_BGSC[:, :, start:self.length] = v_BGTC
        return self.keys_BGSC[:, :, :self.length], self.values_BGSC[:, :, :self.length]


class KeyValueCache:
    """One `LayerCache` per layer; `length` is the number of positions that every layer holds."""

    def __init__(self, num_layers: int, batch: int, kv_heads: int, capacity: int, head_dim: int,
                 like: Tensor) -> None:
        """Device and dtype are those of `like`."""
        shape = (num_layers, 2, batch, kv_heads, capacity, head_dim)
        self.capacity = capacity
        self.layers = [LayerCache(keys, values) for keys, values in like.new_zeros(shape)]

    @property
    def length(self) -> int:
        return self.layers[-1].length

    def end(self, T: int) -> int:
        """The sequence's length after T more tokens."""
        return self.length + T

    def positions(self, T: int, device: torch.device) -> Tensor:
        return torch.arange(self.length, self.length + T, device=device)

    def reset(self) -> None:
        for layer in self.layers:
            layer.length = 0


class Documents:
    """What a model takes as its cache to read rows of several documents: a token attends to its own
    document. `positions_BT` are those in the documents; one begins wherever they are 0."""

    def __init__(self, positions_BT: Tensor, num_layers: int) -> None:
        self.positions_BT, self.num_layers = positions_BT, num_layers
        document_BT = (positions_BT == 0).cumsum(1)
        self.seen_B1TT = (document_BT[:, None, :, None] == document_BT[:, None, None]).tril()

    @property
    def layers(self) -> list[Documents]:
        return [self] * self.num_layers

    def end(self, T: int) -> int:
        return T

    def positions(self, T: int, device: torch.device) -> Tensor:
        return self.positions_BT

    def attend(self, q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q_BHTC, k_BGTC, v_BGTC, attn_mask=self.seen_B1TT,
                                              enable_gqa=q_BHTC.shape[1] != k_BGTC.shape[1])


def attention(q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor,
              cache: LayerCache | None = None) -> Tensor:
    """Causal attention of T new positions to themselves and to everything in the cache: BHTC.

    With a cache, its `attend` does the work, because it knows which rows belong together.
    """
    if cache is not None:
        return cache.attend(q_BHTC, k_BGTC, v_BGTC)
    B, H, T, C = q_BHTC.shape
    G, S = k_BGTC.shape[1:3]
    if T == 1:  # heads that share keys become query positions, which copies nothing per head
        q_BGRC = q_BHTC.reshape(B, G, H // G, C)
        return F.scaled_dot_product_attention(q_BGRC, k_BGTC, v_BGTC).view(B, H, T, C)
    mask_TS = None if T == S else _causal_mask(T, S, q_BHTC.device)
    return F.scaled_dot_product_attention(q_BHTC, k_BGTC, v_BGTC, attn_mask=mask_TS,
                                          is_causal=T == S, enable_gqa=H != G)


def attention_plain(q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor,
                    cache: LayerCache | None = None) -> Tensor:
    """The definition of `attention`: softmax(q k^T / sqrt(C)) v."""
    if cache is not None:
        k_BGTC, v_BGTC = cache.extend(k_BGTC, v_BGTC)
    H, T, C = q_BHTC.shape[1:]
    G, S = k_BGTC.shape[1:3]
    k_BHSC = k_BGTC.repeat_interleave(H // G, dim=1)
    v_BHSC = v_BGTC.repeat_interleave(H // G, dim=1)
    scores_BHTS = q_BHTC @ k_BHSC.transpose(-2, -1) / math.sqrt(C)
    scores_BHTS = scores_BHTS.masked_fill(~_causal_mask(T, S, q_BHTC.device), -math.inf)
    return scores_BHTS.softmax(dim=-1) @ v_BHSC


def find_positions(tokens_BT: Tensor, cache: KeyValueCache | None, context: int) -> Tensor:
    """Positions of the new tokens, [T] or [B, T]. Raises ValueError past the context."""
    T, device = tokens_BT.shape[1], tokens_BT.device
    length = T if cache is None else cache.end(T)
    if length > context:
        raise ValueError(f"sequence of {length} tokens is longer than context={context}; "
                         f"shorten it to {context} tokens or train with a larger context")
    return torch.arange(T, device=device) if cache is None else cache.positions(T, device)


def _causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """True where the query at absolute position S-T+t may see position s."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


class Transformer(nn.Module):
    """tokens_BT -> logits_BTV. A subclass builds the parts: embedding, `blocks`, `norm`, head."""

    architecture: str  # the name in config.json
    before: tuple[str, ...] = ("token_embedding",)  # names of the parts before the blocks
    token_embedding: nn.Embedding
    blocks: nn.ModuleList
    norm: nn.Module

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.spec = spec
        self.end_of_text: int | None = None
        self.trained_length: int | None = None

    @property
    def after(self) -> tuple[str, str]:
        """Names of the parts after the blocks, the head's last."""
        return "norm", "head" if hasattr(self, "head") else "token_embedding"

    def forward(self, tokens_BT: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits at every position. With a cache, the tokens continue what it holds."""
        return self.logits(self.features(tokens_BT, cache))

    def features(self, tokens_BT: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """The normalized residual stream x_BTD that the head reads."""
        return self.norm(self.through(self.blocks, self.embed(tokens_BT, cache), cache))

    def embed(self, tokens_BT: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """x_BTD that the first block reads."""
        return self.token_embedding(tokens_BT)

    def through(self, blocks: Iterable[nn.Module], x_BTD: Tensor,
                cache: KeyValueCache | None = None) -> Tensor:
        """x_BTD after `blocks`: all of them, or those of one stage of a pipeline."""
        tables = self.rotation(x_BTD, cache)
        for layer, block in enumerate(blocks):
            x_BTD = block(x_BTD, tables, cache.layers[layer] if cache else None)
        return x_BTD

    def rotation(self, x_BTD: Tensor, cache: KeyValueCache | None) -> Any:
        """What every block's attention reads about the positions; None if nothing."""
        return None

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """weight_VD and bias_V of the head, for losses that never hold all logits."""
        head = getattr(self, self.after[-1])
        weight_VD = head.lora.added_to(head.weight) if hasattr(head, "lora") else head.weight
        return weight_VD, getattr(head, "bias", None)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """The head, for callers that need only some positions of `features`."""
        head = getattr(self, self.after[-1])
        if hasattr(head, "multiply") and not hasattr(head, "lora"):  # its weight is quantized
            return head.multiply(x_BTD)
        return F.linear(x_BTD, *self.head_weights())

    def new_cache(self, batch: int, capacity: int | None = None) -> KeyValueCache:
        """An empty key-value cache for `capacity` positions (the whole context)."""
        spec = self.spec
        return KeyValueCache(spec.num_layers, batch, spec.n_kv_head, capacity or spec.context,
                             spec.head_dim, like=self.token_embedding.weight)

    def config(self) -> dict[str, Any]:
        """What config.json holds: the spec, and those of NOTES that are known."""
        notes = {note: getattr(self, note, None) for note in NOTES}
        return self.spec.model_dump() | {k: v for k, v in notes.items() if v is not None}

    generate = generate

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Any:
        """Read a step folder, or the newest complete step of a run folder."""
        return read_model(folder, {cls.architecture: cls})


def embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding without values; torch's would draw some, which on meta imports its compiler."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Block(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x)), with dropout on both branches."""

    def __init__(self, attention_norm: nn.Module, attention: nn.Module, moe_norm: nn.Module,
                 moe: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.attention_norm = attention_norm
        self.attention = attention
        self.moe_norm = moe_norm
        self.moe = moe

    def forward(self, x_BTD: Tensor, tables: Any, cache: LayerCache | None) -> Tensor:
        attended_BTD = self.attention(self.attention_norm(x_BTD), tables, cache)
        x_BTD = x_BTD + F.dropout(attended_BTD, self.dropout, self.training)
        mixed_BTD = self.moe(self.moe_norm(x_BTD))
        return x_BTD + F.dropout(mixed_BTD, self.dropout, self.training)


class Row(NamedTuple):
    """One part of a model: its parameters, and those that one token passes through."""

    part: str
    total: int
    active: int


class Count(NamedTuple):
    """`rows` by part, their sums, and floating-point operations per token in training."""

    rows: tuple[Row, ...]
    total: int
    active: int
    flops_per_token: int


PARTS = {"token_embedding": "token embedding", "position_embedding": "positions",
         "attention": "attention", "router": "router", "experts": "experts", "head": "head"}
MATRICES = ("attention", "router", "experts", "head")  # parts whose weights multiply activations


def count_parameters(model: Transformer, sequence_length: int | None = None) -> Count:
    """Count `model` (it may be on meta) at `sequence_length` (its context if None).

    By custom the whole embedding counts as active. FLOPs of one token forward and backward: 6 per
    active matrix weight (the head's too when tied) and, per layer, 6 * T * H * C for causal
    attention, which reads T/2 positions on average.
    """
    spec = model.spec
    totals = dict.fromkeys((*PARTS.values(), "norms", "other"), 0)
    matrices, share = 0, spec.top_k / spec.num_experts
    for name, parameter in model.named_parameters():
        part = _part(name)
        totals[part] += parameter.numel()
        if part in MATRICES and not name.endswith("bias"):
            matrices += round(parameter.numel() * (share if part == "experts" else 1))
    if "head" not in model.after:  # tied
        matrices += model.token_embedding.weight.numel()
    rows = tuple(Row(part, size, round(size * share) if part == "experts" else size)
                 for part, size in totals.items() if size)
    attention = 6 * spec.num_layers * spec.n_head * spec.head_dim * (
        sequence_length or spec.context)
    return Count(rows, sum(row.total for row in rows), sum(row.active for row in rows),
                 6 * matrices + attention)


def _part(name: str) -> str:
    parts = name.split(".")
    if any(part.endswith("norm") for part in parts):
        return "norms"
    return next((PARTS[part] for part in parts if part in PARTS), "other")
