"""The engine's key-value cache: S slots, one request each, and the flat batch that reads them.

Layout, which a fused decode step reads and writes by address: `keys` and `values` are contiguous
tensors [L, S, G, T, C] in the model's dtype, rotated keys, T = capacity. Row t of a slot belongs to
position t; `held[slot]` are the tokens whose rows are there, so its length is where the next one
goes. What a finished request left stays held until the slot is taken, for prompts that begin alike.

A batch is one flat row of tokens [1, N]: every slot's next tokens one after the other, as many of
each as there are. No padding; only attention sees that they belong to different requests.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fira.model.transformer import attention


class Part(NamedTuple):
    """`size` tokens of one slot, the first at position `start`."""

    slot: int
    start: int
    size: int


class SlotCache:
    """Keys and values of `slots` requests, `capacity` positions each."""

    def __init__(self, model: Any, slots: int, capacity: int) -> None:
        spec = model.spec
        shape = (spec.num_layers, slots, spec.n_kv_head, capacity, spec.head_dim)
        self.keys = model.token_embedding.weight.new_zeros(shape, requires_grad=False)
        self.values = torch.zeros_like(self.keys)
        self.held: list[list[int]] = [[] for _ in range(slots)]

    def batch(self, parts: Sequence[Part]) -> SlotBatch:
        """What a model takes as its cache to read the parts' tokens, [1, N] in this order."""
        return SlotBatch(self, parts)

    def copy(self, source: int, target: int, length: int) -> None:
        """Let `target` hold the first `length` tokens of `source`."""
        for rows in (self.keys, self.values):
            rows[:, target, :, :length] = rows[:, source, :, :length]
        self.held[target] = self.held[source][:length]

    def best_prefix(self, ids: Sequence[int], besides: int = -1) -> tuple[int, int]:
        """The slot that holds most of the beginning of `ids`, and how much: (slot, length)."""
        lengths = [-1 if slot == besides else common_prefix(ids, held)
                   for slot, held in enumerate(self.held)]
        longest = max(lengths)
        return lengths.index(longest), max(longest, 0)


class SlotBatch:
    """Stands where a model expects its key-value cache."""

    def __init__(self, cache: SlotCache, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.together = len(parts) > 1 and all(part.size == 1 for part in parts)
        self.layers = [SlotLayer(keys, values, self)
                       for keys, values in zip(cache.keys, cache.values, strict=True)]
        if self.together:
            device = cache.keys.device
            self.slots_N = torch.tensor([part.slot for part in parts], device=device)
            self.starts_N = torch.tensor([part.start for part in parts], device=device)
            self.rows, self.longest = max(part.slot for part in parts) + 1, self.end(len(parts))
            seen_SN = torch.zeros(self.rows, 1, 1, self.longest, dtype=torch.bool, device=device)
            places = torch.arange(self.longest, device=device)
            seen_SN[self.slots_N, 0, 0] = places <= self.starts_N[:, None]
            self.seen_S11T = seen_SN

    def end(self, T: int) -> int:
        """The longest sequence's length once the T tokens of the batch are read."""
        assert T == sum(part.size for part in self.parts), (T, self.parts)
        return max(part.start + part.size for part in self.parts)

    def positions(self, T: int, device: torch.device) -> Tensor:
        return torch.cat([torch.arange(part.start, part.start + part.size, device=device)
                          for part in self.parts])


class SlotLayer(NamedTuple):
    """One layer's keys and values [S, G, T, C] and the batch that reads them."""

    keys_SGTC: Tensor
    values_SGTC: Tensor
    batch: SlotBatch

    def attend(self, q_1HNC: Tensor, k_1GNC: Tensor, v_1GNC: Tensor) -> Tensor:
        """Write the new rows, then each part's attention to its own slot: 1HNC."""
        if self.batch.together:
            return self._attend_together(q_1HNC, k_1GNC, v_1GNC)
        return self.attend_plain(q_1HNC, k_1GNC, v_1GNC)

    def attend_plain(self, q_1HNC: Tensor, k_1GNC: Tensor, v_1GNC: Tensor) -> Tensor:
        """One part after the other: the definition, and the fast way for long parts."""
        sizes = [part.size for part in self.batch.parts]
        pieces = []
        for (slot, start, size), q, k, v in zip(
                self.batch.parts, q_1HNC.split(sizes, 2), k_1GNC.split(sizes, 2),
                v_1GNC.split(sizes, 2), strict=True):
            own, stop = slice(slot, slot + 1), start + size
            self.keys_SGTC[own, :, start:stop] = k
            self.values_SGTC[own, :, start:stop] = v
            pieces.append(attention(q, self.keys_SGTC[own, :, :stop],
                                    self.values_SGTC[own, :, :stop]))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def _attend_together(self, q_1HNC: Tensor, k_1GNC: Tensor, v_1GNC: Tensor) -> Tensor:
        """Parts of one token: one masked attention over the slots in use, without a copy."""
        batch, (H, _, C) = self.batch, q_1HNC.shape[1:]
        S, G = batch.rows, self.keys_SGTC.shape[1]
        self.keys_SGTC[batch.slots_N, :, batch.starts_N] = k_1GNC[0].transpose(0, 1)
        self.values_SGTC[batch.slots_N, :, batch.starts_N] = v_1GNC[0].transpose(0, 1)
        q_SHC = q_1HNC.new_zeros(S, H, C)
        q_SHC[batch.slots_N] = q_1HNC[0].transpose(0, 1)
        y_SGRC = F.scaled_dot_product_attention(
            q_SHC.view(S, G, H // G, C), self.keys_SGTC[:S, :, :batch.longest],
            self.values_SGTC[:S, :, :batch.longest], attn_mask=batch.seen_S11T)
        return y_SGRC.reshape(S, H, C)[batch.slots_N].transpose(0, 1)[None]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first items two lists share; halving, for slices compare in C."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
