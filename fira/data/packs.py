"""Rows packed into sequences of one length, masked from each other, and batches of them.

A row is never cut, so a sequence may end with places that hold nothing; each of those is a document
of its own without a target. Which sequences a step reads follows from the number of sequences read
before, so a run is resumed from one number for each source.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from fira.data.batches import GOLDEN, IGNORED, PackedBatch, Tokens, permute
from fira.data.conversations import Row


class Sequences(Protocol):
    """Something that has sequences of one length: `read(numbers)` gives ids, targets and positions
    of some of them, and perhaps more, [B, T] each; `key` is a checksum of all that they hold."""

    key: str
    length: int

    def __len__(self) -> int: ...

    def read(self, numbers: np.ndarray) -> Sequence[np.ndarray]: ...


class Packs:
    """Rows packed by best fit, the longest first: sequences have few empty places.

    `length` T: a row of n ids takes n - 1 places, because its last id is only a target. Every
    `together` consecutive rows stay together. Raises ValueError if there is no row.
    """

    def __init__(self, rows: Sequence[Row], length: int, together: int = 1) -> None:
        if not rows:
            raise ValueError("no row is left to train on; give more data, or longer sequences with "
                             f"train.sequence_length above {length}")
        self.rows, self.length = rows, length
        self.groups = [rows[first:first + together] for first in range(0, len(rows), together)]
        self.packs = pack([sum(len(row.ids) - 1 for row in group) for group in self.groups], length)
        digest = hashlib.sha256(str(length).encode())
        for row in rows:
            digest.update(row.ids.tobytes() + row.trained.tobytes())
        self.key = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.packs)

    def read(self, numbers: np.ndarray) -> Sequence[np.ndarray]:
        fields = np.zeros((3, len(numbers), self.length), np.int64)
        fields[1] = IGNORED
        for index, number in enumerate(numbers):
            end = 0
            for row in (row for one in self.packs[number] for row in self.groups[one]):
                begin, end = end, end + len(row.ids) - 1
                fields[0, index, begin:end] = row.ids[:-1]
                fields[1, index, begin:end] = np.where(row.trained[1:], row.ids[1:], IGNORED)
                fields[2, index, begin:end] = np.arange(end - begin)
        return list(fields)


class Windows:
    """A prepared text cut into windows of `length` tokens, as it was in pre-training."""

    def __init__(self, tokens: Tokens, length: int, key: str) -> None:
        self.tokens, self.length, self.key = tokens, length, key

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def read(self, numbers: np.ndarray) -> Sequence[np.ndarray]:
        windows = np.stack([self.tokens[start:start + self.length + 1]
                            for start in numbers * self.length]).astype(np.int64)
        positions = np.tile(np.arange(self.length), (len(windows), 1))
        return windows[:, :-1], windows[:, 1:], positions


def pack(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Indices of `sizes` in groups whose sums are at most `length`: each size, the largest first,
    goes into the fullest group that has room for it."""
    groups: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # groups by the room they have
    rooms = np.zeros(length + 1, bool)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[index]
        assert 0 < size <= length, (size, length)
        room = size + int(rooms[size:].argmax())
        if rooms[room]:
            group = with_room[room].pop()
            rooms[room] = bool(with_room[room])
        else:
            group, room = len(groups), length
            groups.append([])
        groups[group].append(index)
        with_room[room - size].append(group)
        rooms[room - size] = True
    return groups


class Part(NamedTuple):
    """Sequences of one kind, and their share (0..1) of all that are read."""

    name: str
    sequences: Sequences
    share: float


class PackedBatches:
    """Batches of sequences from several parts, mixed by their shares; every part has an order of
    its own in each epoch. `rows`: which rows of a batch this rank has; `kind`: of a batch."""

    def __init__(self, parts: Sequence[Part], config: Any,
                 rows: Callable[[int], slice] = slice, kind: Any = PackedBatch) -> None:
        self.parts, self.config, self.rows, self.kind = parts, config, rows, kind
        self.bounds = np.cumsum([part.share for part in parts])[:-1]

    def batch(self, state: Any, fraction: float) -> tuple[list[Any], dict[str, int], Any]:
        """This rank's micro-batches, the sequences read of each part after them, epochs."""
        size, length = self.config.batch_size, self.config.sequence_length
        numbers = np.arange(size)
        chosen = np.searchsorted(self.bounds, (state.step * size + numbers) * GOLDEN % 1,
                                 side="right")
        own = np.isin(numbers, numbers[self.rows(size)])
        fields, read = list[np.ndarray](), dict[str, int]()
        for index, (_, sequences, _) in enumerate(self.parts):
            mine, begun = chosen == index, self._begun(state, sequences)
            places = begun + np.cumsum(mine) - 1
            read[sequences.key] = begun + int(mine.sum())
            if (mine & own).any():
                found = sequences.read(self._order(places[mine & own], len(sequences)))
                fields = fields or [np.empty((size, length), field.dtype) for field in found]
                for field, values in zip(fields, found, strict=True):
                    field[mine & own] = values
        batches = [self.kind(*(torch.from_numpy(field[rows]) for field in fields)) for rows in
                   np.split(numbers[own], range(self.config.micro_batch, own.sum(),
                                                self.config.micro_batch))]
        return batches, read, self._epochs(read)

    def describe(self, state: Any) -> str:
        """How much of each part was read. Raises ValueError if the run has read something else."""
        if gone := state.position.keys() - {part.sequences.key for part in self.parts}:
            raise ValueError(f"this run was begun with other data (checksum {min(gone)}, not "
                             f"{', '.join(part.sequences.key for part in self.parts)}); put the "
                             "files back as they were, or tune anew into another --run folder")
        read = self._epochs({part.sequences.key: self._begun(state, part.sequences)
                             for part in self.parts})
        return ", ".join(f"{part.name}: {part.share:.1%} of the sequences, {epochs:.2f} epochs "
                         "read" for part, epochs in zip(self.parts, read.values(), strict=True))

    def _begun(self, state: Any, sequences: Sequences) -> int:
        return int(state.position.get(sequences.key, 0))

    def _order(self, places: np.ndarray, size: int) -> np.ndarray:
        """The numbers of the sequences at these places in the order of all epochs."""
        epochs = places // size
        return np.concatenate([permute(places[epochs == epoch] % size, size, self.config.seed,
                                       int(epoch)) for epoch in np.unique(epochs)])

    def _epochs(self, read: dict[str, int]) -> dict[str, float]:
        return {f"epochs/{part.name}" if len(self.parts) > 1 else "epochs":
                round(read[part.sequences.key] / len(part.sequences), 4) for part in self.parts}


def in_order(sequences: Sequences, batch_size: int, most: int | None = None,
             kind: Any = PackedBatch) -> Iterator[Any]:
    """Batches of `most` sequences, each once, to evaluate on: evenly spread, as packs of long rows
    come first."""
    count = len(sequences) if most is None else min(len(sequences), most)
    for first in range(0, count, batch_size):
        numbers = np.arange(first, min(first + batch_size, count))
        fields = sequences.read(numbers * len(sequences) // count)
        yield kind(*(torch.from_numpy(np.ascontiguousarray(field)) for field in fields))
