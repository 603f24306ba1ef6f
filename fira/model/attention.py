"""Causal attention behind one seam, with rotary positions and the key-value cache it may be given.

`attention` is what the models call. `attention_plain` is its slow twin, the softmax written out
(Vaswani et al. 2017, section 3.2.1); query heads share key-value heads as in Ainslie et al. 2023.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
    """One `LayerCache` per layer; `length` is how many positions every layer holds."""

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
        """The sequence's length once T more tokens are read."""
        return self.length + T

    def positions(self, T: int, device: torch.device) -> Tensor:
        return torch.arange(self.length, self.length + T, device=device)

    def reset(self) -> None:
        for layer in self.layers:
            layer.length = 0


def attention(q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor,
              cache: LayerCache | None = None) -> Tensor:
    """Causal attention of T new positions to themselves and to everything in the cache: BHTC.

    With a cache the work is the cache's (`attend`), for it knows which rows belong together.
    """
    if cache is not None:
        return cache.attend(q_BHTC, k_BGTC, v_BGTC)
    B, H, T, C = q_BHTC.shape
    G, S = k_BGTC.shape[1:3]
    if T == 1:  # heads that share keys become query positions, so nothing is copied per head
        q_BGRC = q_BHTC.reshape(B, G, H // G, C)
        return F.scaled_dot_product_attention(q_BGRC, k_BGTC, v_BGTC).view(B, H, T, C)
    mask_TS = None if T == S else _causal_mask(T, S, q_BHTC.device)
    return F.scaled_dot_product_attention(q_BHTC, k_BGTC, v_BGTC, attn_mask=mask_TS,
                                          is_causal=T == S, enable_gqa=H != G)


def attention_plain(q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor,
                    cache: LayerCache | None = None) -> Tensor:
    """The same mathematics with the softmax written out."""
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
    """Absolute positions of the new tokens, [T]. Raises ValueError past the context."""
    T, device = tokens_BT.shape[1], tokens_BT.device
    check_length(T if cache is None else cache.end(T), context)
    return torch.arange(T, device=device) if cache is None else cache.positions(T, device)


def check_length(length: int, context: int) -> None:
    """Raises ValueError for a sequence the model has no positions for."""
    if length > context:
        raise ValueError(f"sequence of {length} tokens is longer than context={context}; "
                         f"shorten it to {context} tokens or train with a larger context")


def _causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """True where the query at absolute position S-T+t may see position s."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


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


class Rotate(torch.autograd.Function):
    """`rotate` with its gradient, the opposite rotation; nothing but the tables is kept."""

    @staticmethod
    def forward(ctx: Any, x_BTHC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TC, sin_TC)
        return rotate(x_BTHC, cos_TC, sin_TC)

    @staticmethod
    def backward(ctx: Any, grad_BTHC: Tensor) -> tuple[Tensor, None, None]:
        cos_TC, sin_TC = ctx.saved_tensors
        return rotate(grad_BTHC, cos_TC, -sin_TC), None, None


def rotate(x_BTHC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """RoPE pairing halves of the last axis: (a, b) -> (a cos - b sin, b cos + a sin)."""
    cos, sin = cos_TC.to(x_BTHC.dtype)[:, None], sin_TC.to(x_BTHC.dtype)[:, None]
    first, second = x_BTHC.chunk(2, dim=-1)
    return torch.cat([(first * cos).addcmul_(second, sin, value=-1),
                      (second * cos).addcmul_(first, sin)], dim=-1)
