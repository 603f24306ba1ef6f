"""The engine's key-value cache: S slots, one request each, and the flat batch that reads them.

Memory layout, which a compiled decode step reads and writes by address: `keys` and `values` are
contiguous tensors [L, S, G, T, C], with rotated keys, T = capacity, in the model's dtype or in
another, to which what is written is rounded. On a CPU the system gives them memory, page by page,
when they are first written to. Row t of a slot belongs to position t. `tokens[slot]` are the tokens
whose rows are there, so its length is where the next one goes. They stay after a request has ended,
until another request takes the slot: a prompt with the same beginning reuses those rows instead of
reading the tokens again.

A batch is one flat row of tokens [1, N]: the next tokens of every slot one after the other, as many
of each as there are. There is no padding; only attention distinguishes the requests.
"""
from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fira.model.transformer import attention

# A prompt waits for an earlier one that will read this many more of its tokens than are cached.
WORTH_WAITING = 16
BLOCK = 128  # tokens of a prompt that are read by themselves, if rounding may depend on no others


class Part(NamedTuple):
    """`size` tokens of one slot, the first at position `start`."""

    slot: int
    start: int
    size: int


class SlotCache:
    """Keys and values of `slots` requests, `capacity` positions each.

    `idle` are the slots that no request owns, the one unused for longest first. `repeated` is how
    many first tokens of each slot were read in whole blocks, each by itself.
    """

    def __init__(self, model: Any, slots: int, capacity: int,
                 dtype: torch.dtype | None = None) -> None:
        """Raises ValueError if the machine has not so much memory."""
        spec, like = model.spec, model.norm.weight
        shape = (spec.num_layers, slots, spec.n_kv_head, capacity, spec.head_dim)
        self.keys, self.values = (_zeros(shape, dtype or like.dtype, like.device) for _ in "kv")
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        self.repeated = [0] * slots
        self.idle = list(range(slots))

    def take(self, prompt: Sequence[int], earlier: Sequence[Sequence[int]],
             reuse: bool = True, repeats: bool = False) -> tuple[int, int] | None:
        """An idle slot for a prompt, and how many of the prompt's first tokens it already holds.

        If it `repeats`, only whole blocks count, whose rows are those that it would compute itself.
        None: one of the `earlier` prompts, which are being read now, will soon hold more of the
        same beginning; so of prompts that come together only one reads it.
        """
        wanted = prompt[:-1] if reuse else []  # the last token must be read for its logits

        def usable(tokens: Sequence[int], repeated: int) -> int:
            length = common_prefix(wanted, tokens)
            return min(length, repeated) // BLOCK * BLOCK if repeats else length

        shared = list(map(usable, self.tokens, self.repeated))
        length = max(shared)
        if any(usable(other, len(other)) >= length + WORTH_WAITING for other in earlier):
            return None
        source, slot = shared.index(length), self.idle[0]  # the slot unused for longest
        if source in self.idle and length == len(self.tokens[source]):
            slot = source  # nothing that it holds is lost
        elif source != slot:
            for rows in (self.keys, self.values):
                rows[:, slot, :, :length] = rows[:, source, :, :length]
        self.idle.remove(slot)
        self.tokens[slot] = self.tokens[source][:length]
        self.repeated[slot] = min(length, self.repeated[source])
        return slot, length

    def extend(self, part: Part, tokens: Sequence[int], repeats: bool) -> None:
        """The rows of a part have been written."""
        self.tokens[part.slot].extend(tokens)
        self.repeated[part.slot] = (part.start + BLOCK if repeats and part.size == BLOCK else
                                    min(self.repeated[part.slot], part.start))

    def release(self, slot: int) -> None:
        """A request has ended; what its slot holds stays for prompts with the same beginning."""
        self.idle.append(slot)

    def forget(self) -> None:
        """Reuse nothing of what the slots hold."""
        self.tokens = [[] for _ in self.tokens]


# decode_step(model, cache, tokens_N, parts) -> (logits_PV, experts_LNK or None): read the tokens of
# the P parts and write their keys and values. The logits follow the last token of each part.
# experts_LNK are the experts that process each token, best first; None for a dense model.
DecodeStep = Callable[[Any, SlotCache, Tensor, Sequence[Part]], "tuple[Tensor, Tensor | None]"]


class SlotBatch:
    """What a model takes as its cache to read the tokens of `parts`, [1, N] in this order."""

    def __init__(self, cache: SlotCache, parts: Sequence[Part]) -> None:
        self.parts = parts
        sizes_P = torch.tensor([part.size for part in parts], device=cache.keys.device)
        self.lasts_P = sizes_P.cumsum(0) - 1  # the last token of each part
        self.single_tokens = len(parts) > 1 and all(part.size == 1 for part in parts)
        self.layers = [SlotLayer(keys, values, self)
                       for keys, values in zip(cache.keys, cache.values, strict=True)]
        if self.single_tokens:
            device = cache.keys.device
            self.slots_N = torch.tensor([part.slot for part in parts], device=device)
            self.starts_N = torch.tensor([part.start for part in parts], device=device)
            self.rows, self.longest = max(part.slot for part in parts) + 1, self.end(len(parts))
            seen_S11T = torch.zeros(self.rows, 1, 1, self.longest, dtype=torch.bool, device=device)
            positions_T = torch.arange(self.longest, device=device)
            seen_S11T[self.slots_N, 0, 0] = positions_T <= self.starts_N[:, None]
            self.seen_S11T = seen_S11T

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
        """Write the new rows, then attend from each part to its own slot: 1HNC.

        Long parts are computed one after the other, which is also the definition.
        """
        if self.batch.single_tokens:
            return self._attend_at_once(q_1HNC, k_1GNC, v_1GNC)
        sizes = [part.size for part in self.batch.parts]
        outputs = []
        for (slot, start, size), q, k, v in zip(
                self.batch.parts, q_1HNC.split(sizes, 2), k_1GNC.split(sizes, 2),
                v_1GNC.split(sizes, 2), strict=True):
            own, stop = slice(slot, slot + 1), start + size
            self.keys_SGTC[own, :, start:stop] = k
            self.values_SGTC[own, :, start:stop] = v
            outputs.append(attention(q, self.keys_SGTC[own, :, :stop].to(q.dtype),
                                     self.values_SGTC[own, :, :stop].to(q.dtype)))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _attend_at_once(self, q_1HNC: Tensor, k_1GNC: Tensor, v_1GNC: Tensor) -> Tensor:
        """Parts of one token: one masked attention over the slots in use, without a copy."""
        batch, (H, _, C) = self.batch, q_1HNC.shape[1:]
        S, G = batch.rows, self.keys_SGTC.shape[1]
        for rows_SGTC, new_1GNC in ((self.keys_SGTC, k_1GNC), (self.values_SGTC, v_1GNC)):
            rows_SGTC[batch.slots_N, :, batch.starts_N] = new_1GNC[0].transpose(0, 1).to(
                rows_SGTC.dtype)
        q_SHC = q_1HNC.new_zeros(S, H, C)
        q_SHC[batch.slots_N] = q_1HNC[0].transpose(0, 1)
        y_SGRC = F.scaled_dot_product_attention(
            q_SHC.view(S, G, H // G, C), self.keys_SGTC[:S, :, :batch.longest].to(q_SHC.dtype),
            self.values_SGTC[:S, :, :batch.longest].to(q_SHC.dtype), attn_mask=batch.seen_S11T)
        return y_SGRC.reshape(S, H, C)[batch.slots_N].transpose(0, 1)[None]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. torch's would be written, and so take memory and time before they are needed."""
    size = math.prod(shape) * dtype.itemsize
    try:
        if device.type == "cpu":
            memory = mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
            return torch.frombuffer(memory, dtype=dtype).view(shape)
        return torch.zeros(shape, dtype=dtype, device=device)
    except (OSError, OverflowError, torch.OutOfMemoryError):
        raise ValueError(f"a cache of {2 * size / 1e9:.1f} GB is more than this machine has free; "
                         "give fewer --slots, a smaller --context or --cache float16") from None


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first items two lists share."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                min(len(a), len(b)))


def split_budget(budget: int, needs: Sequence[int]) -> list[int]:
    """Split a step's prompt tokens among prompts, the oldest first in `needs`.

    The oldest gets half, so that it always advances; the rest goes to the shortest first, so that a
    short prompt does not wait for a long one.
    """
    if not needs:
        return []
    given = [0] * len(needs)
    given[0] = min(needs[0], (budget + 1) // 2)
    left = budget - given[0]
    for index in sorted(range(len(needs)), key=lambda index: needs[index]):
        more = min(left, needs[index] - given[index])
        given[index] += more
        left -= more
    return given


def group_prompts(parts: Sequence[tuple[Any, int]]) -> list[list[tuple[Any, int]]]:
    """(Request, size) that are read at once: all but those that repeat, of which each is read by
    itself, to the end of its block at most."""
    parts = [part for part in parts if part[1]]
    return [[part for part in parts if not part[0].repeats],
            *([(request, min(request.unread, BLOCK - request.read % BLOCK))]
              for request, _ in parts if request.repeats)]
