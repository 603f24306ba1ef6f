"""Token ids, mapped from a data folder, become batches: windows in a seeded random order.

Window i predicts positions i*T+1 .. i*T+T from the ones before, so in an epoch each position is a
target at most once. Every epoch and seed has a permutation of its own, which is computed for each
index alone (a Feistel network with cycle walking: Black and Rogaway 2002).
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from fira.data.shards import read_manifest
from fira.files import sha256

IGNORED = -100  # the target that is not scored, as in torch's cross_entropy


class Tokens(Protocol):
    """A sequence of ids: `Shards`, or a numpy array."""

    def __len__(self) -> int: ...
    def __getitem__(self, where: slice) -> np.ndarray: ...


class Shards:
    """One split of a data folder as a sequence of ids: `len(shards)`, `shards[start:stop]`."""

    def __init__(self, folder: str | Path, split: str = "train"):
        """Map a split. Raises ValueError for a missing or truncated shard."""
        manifest = read_manifest(folder)
        if split not in manifest["splits"]:
            raise ValueError(f"{folder} has no split {split!r}; it has: "
                             f"{', '.join(manifest['splits'])}")
        self.folder, self.dtype = Path(folder), np.dtype(manifest["dtype"])
        self.shard_tokens: int = manifest["shard_tokens"]
        self.length: int = manifest["splits"][split]["tokens"]
        self.described: list[dict[str, Any]] = manifest["splits"][split]["shards"]
        self.shards = [self._map(shard) for shard in self.described]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, where: slice) -> np.ndarray:
        """Ids of a range of positions: a view into the map unless the range spans shards."""
        start, stop, step = where.indices(self.length)
        assert step == 1, step
        parts = []
        while start < stop:
            number, offset = divmod(start, self.shard_tokens)
            parts.append(self.shards[number][offset:offset + stop - start])
            start += len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def verify(self) -> None:
        """Compare every shard with its checksum. Raises ValueError for one that was altered."""
        for shard in self.described:
            file = self.folder / shard["file"]
            if sha256(file) != shard["sha256"]:
                raise ValueError(f"{file} was altered (its SHA-256 differs from the manifest); "
                                 f"delete {self.folder} and prepare it again")

    def _map(self, shard: dict[str, Any]) -> np.ndarray:
        file, due = self.folder / shard["file"], shard["tokens"] * self.dtype.itemsize
        size = file.stat().st_size if file.is_file() else None
        if size != due:
            what = "missing" if size is None else f"truncated: {size:,} bytes, not {due:,}"
            raise ValueError(f"{file} is {what}; delete {self.folder} and prepare it again")
        return np.memmap(file, self.dtype, mode="r")


class Batch(NamedTuple):
    """Token ids and, at each position, the id to predict there: int64 [B, T] both."""

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor

    @property
    def weight(self) -> int:
        """Number of scored targets."""
        return int((self.targets_BT != IGNORED).sum())


class Batches:
    """Windows in random order; each depends on nothing but its number in the endless order.

    Epochs follow each other without a gap, so a batch may hold the last windows of one epoch and
    the first of the next.
    """

    def __init__(self, tokens: Tokens, sequence_length: int, batch_size: int, seed: int = 0):
        self.tokens, self.sequence_length = tokens, sequence_length
        self.batch_size, self.seed = batch_size, seed
        self.windows = (len(tokens) - 1) // sequence_length
        if self.windows < 1:
            raise ValueError(f"{len(tokens):,} tokens are too few for one sequence of "
                             f"{sequence_length} (and the token after it); give more text, or a "
                             "shorter sequence")

    def batch(self, index: int, rows: slice = slice(None)) -> Batch:
        """Batch number `index`, counted from 0, or only the range `rows` of its rows."""
        numbers = index * self.batch_size + np.arange(self.batch_size)[rows]
        epochs, places = np.divmod(numbers, self.windows)
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            chosen[inside] = permute(places[inside], self.windows, self.seed, int(epoch))
        return _gather(self.tokens, chosen * self.sequence_length, self.sequence_length)


def sequential(tokens: Tokens, sequence_length: int, batch_size: int) -> Iterator[Batch]:
    """Every window in order; every position but the first is a target exactly once.

    The last batch may have fewer rows. A remainder shorter than a window is a batch of its own.
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
    """What the permutation of 0 .. size-1 for `seed` and `epoch` has at each of `places`."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = np.random.Generator(np.random.Philox(key=[seed, epoch])).integers(
        0, 1 << 63, size=6, dtype=np.uint64)
    result = places.astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():  # cycle walking: the domain is at most 4 * size, so 4 rounds on average
        result[outside] = _feistel(result[outside], np.uint64(half), keys)
        outside = result >= size
    return result.astype(np.int64)


def _feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    """A Feistel network: a bijection of 2*half-bit numbers, whatever function is mixed in."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Let every bit of the input affect every bit of the result (MurmurHash3's finalizer)."""
    values = (values ^ values >> np.uint64(33)) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ values >> np.uint64(33)) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ values >> np.uint64(33)


def _gather(tokens: Tokens, starts: np.ndarray, length: int) -> Batch:
    rows = np.stack([tokens[start:start + length + 1] for start in starts.tolist()])
    ids = torch.from_numpy(rows.astype(np.int64))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
