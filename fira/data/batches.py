"""Ids become training batches: windows of a fixed length in a seeded order that needs no memory.

Window i predicts positions i*T+1 .. i*T+T from the ones before, so over an epoch each position
is a target at most once. The order is a permutation computed per index (a Feistel network with
cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains"), another one for
every epoch and seed, so any step's batch is computed directly, for any number of windows.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch


class Tokens(Protocol):
    """A sequence of ids: `Shards`, or a numpy array."""

    def __len__(self) -> int: ...
    def __getitem__(self, where: slice) -> np.ndarray: ...


class Batch(NamedTuple):
    """Ids and, at each place, the id that follows (-100: not scored): int64, [B, T] both."""

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor

    @property
    def weight(self) -> int:
        """The number of scored targets: what the mean loss of this batch counts for."""
        return int((self.targets_BT != -100).sum())


class Batches:
    """Shuffled batches of `batch_size` windows; `batch(index)` depends on nothing but the index.

    Windows follow each other from epoch to epoch without a gap, so a batch may hold the last
    windows of one epoch and the first of the next.
    """

    def __init__(self, tokens: Tokens, sequence_length: int, batch_size: int, seed: int = 0):
        self.tokens, self.sequence_length = tokens, sequence_length
        self.batch_size, self.seed = batch_size, seed
        self.windows = (len(tokens) - 1) // sequence_length
        if self.windows < 1:
            raise ValueError(f"{len(tokens):,} tokens are too few for one sequence of "
                             f"{sequence_length} (and the token after it); give more text, or a "
                             "shorter sequence")

    @property
    def per_epoch(self) -> int:
        """Whole batches in one pass over the windows; at least 1."""
        return max(1, self.windows // self.batch_size)

    def batch(self, index: int, rows: slice = slice(None)) -> Batch:
        """Batch number `index`, from 0; of its rows only `rows`, as a rank of many wants."""
        drawn = index * self.batch_size + np.arange(self.batch_size)[rows]
        epochs, places = np.divmod(drawn, self.windows)
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            chosen[of_epoch] = permute(places[of_epoch], self.windows, self.seed, int(epoch))
        return _gather(self.tokens, chosen * self.sequence_length, self.sequence_length)


def sequential(tokens: Tokens, sequence_length: int, batch_size: int) -> Iterator[Batch]:
    """Every window in order, each position that has one before it a target exactly once.

    The last batch may have fewer rows, and a remainder shorter than a window comes last, alone.
    """
    windows, rest = divmod(len(tokens) - 1, sequence_length)
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens are too few to predict one from another; give "
                         "more text to validate on")
    for first in range(0, windows, batch_size):
        numbers = np.arange(first, min(first + batch_size, windows))
        yield _gather(tokens, numbers * sequence_length, sequence_length)
    if rest:
        yield _gather(tokens, np.array([windows * sequence_length]), rest)


def permute(places: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where each of `places` (0 .. size-1) goes in the permutation named by `seed` and `epoch`."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = np.random.Generator(np.random.Philox(key=[seed, epoch])).integers(
        0, 1 << 63, size=6, dtype=np.uint64)
    result = places.astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():  # walk on until inside; at most 4 * size values, so 4 turns on average
        result[outside] = _feistel(result[outside], np.uint64(half), keys)
        outside = result >= size
    return result.astype(np.int64)


def _feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    """A bijection of 2*half-bit numbers, whatever the function of the rounds."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread every bit over all (the finalizer of MurmurHash3, 64 bits)."""
    values = (values ^ values >> np.uint64(33)) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ values >> np.uint64(33)) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ values >> np.uint64(33)


def _gather(tokens: Tokens, starts: np.ndarray, length: int) -> Batch:
    rows = np.stack([tokens[start:start + length + 1] for start in starts.tolist()])
    ids = torch.from_numpy(rows.astype(np.int64))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
