"""Token ids, mapped from data folders, become batches: rows of text in a seeded random order.

An epoch has every target of a text once. Its blocks, as long as the longest sequence, follow a
permutation that is computed for each index alone (a Feistel network with cycle walking: Black and
Rogaway 2002). GROUP blocks at a time are read in strips of one sequence, first the first strip of
every block, so that short sequences come from many places. A block keeps its size until the epoch
ends and a strip until the group ends; so the number of tokens read tells what is left, and batches
and sequences may change their size.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
import torch
from pydantic import AfterValidator, Field

from fira.config import Config, ConfigError
from fira.data.shards import read_manifest
from fira.files import MANIFEST, sha256

IGNORED = -100  # the target that is not scored, as in torch's cross_entropy
GROUP = 64  # blocks that are read in turn
GOLDEN = (5 ** 0.5 - 1) / 2  # however many of its multiples modulo 1 are evenly spread


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


class PackedBatch(NamedTuple):
    """A batch whose rows hold several documents that are masked from each other."""

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    positions_BT: torch.Tensor  # in its document, which begins where this is 0

    @property
    def weight(self) -> int:
        return Batch(*self[:2]).weight


Folder = Annotated[str, AfterValidator(os.path.abspath)]  # so that a run resumes from anywhere


class DataConfig(Config):
    folder: Folder | None = Field(None, description="folder that `fira data` wrote")
    mix: dict[Folder, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="several such folders, each with its weight: data.mix.FOLDER=WEIGHT")
    separate_documents: bool = Field(
        False, description="attention does not cross an end-of-text, and positions restart there")


class Source(NamedTuple):
    """A text to train on, its share (0..1) of the tokens, and what is held out from it."""

    folder: str
    name: str  # the folder's path below what the folders have in common
    key: str  # of its manifest's checksum: a resumed run knows the text by it
    share: float
    tokens: Tokens
    held_out: Tokens

    def label(self, name: str) -> str:
        """The name in a row of a value that belongs to this text."""
        return name if self.share == 1 else f"{name}/{self.name}"


def open_sources(config: DataConfig, validation_tokens: int) -> list[Source]:
    """The texts, compared with their checksums. Raises ValueError, one line."""
    if bool(config.folder) == bool(config.mix):
        raise ConfigError("data.mix is set beside data.folder; set one to null" if config.mix else
                          "data.folder is not set; prepare text with `fira data SOURCE --tokenizer "
                          "DIR --out DIR` and give data.folder=DIR")
    weights = config.mix or {str(config.folder): 1.0}
    one, *others = {read_manifest(folder)["tokenizer_hash"]: folder for folder in weights}.values()
    if others:
        raise ValueError(f"{one} and {others[0]} were made with different tokenizers; prepare the "
                         f"text of {others[0]} again with --tokenizer {one}")
    sources, common = [], os.path.commonpath([os.path.dirname(folder) for folder in weights])
    for folder, weight in weights.items():
        tokens, held_out = (Shards(folder, split) for split in ("train", "validation"))
        tokens.verify()
        held_out.verify()
        if len(held_out) < 2:
            raise ValueError(f"{folder} holds out no text; prepare it with more documents, "
                             "a smaller --validation-every, or --validation SOURCE")
        sources.append(Source(folder, os.path.relpath(folder, common),
                              sha256(Path(folder) / MANIFEST)[:16], weight / sum(weights.values()),
                              tokens, held_out[:validation_tokens + 1]))
    return sources


class Place(NamedTuple):
    """Where the order of a text is continued, in numbers alone."""

    epoch: int
    token: int  # tokens read of this epoch
    block: int  # tokens of a block in this epoch
    strip: int  # tokens of a strip in this group of blocks


class TextBatches:
    """Batches of one text, or of several mixed by their shares, in sequences that may grow.

    `config`: the settings of train. `rows`: which rows of a batch this rank has. `end_of_text`: if
    given, documents are masked from each other. Raises ValueError if a text is too short.
    """

    def __init__(self, sources: Sequence[Source], config: Any,
                 rows: Callable[[int], slice] = slice, end_of_text: int | None = None) -> None:
        self.sources, self.config, self.rows, self.end_of_text = sources, config, rows, end_of_text
        self.lengths, self.longest = config.lengths, config.sequence_length
        self.bounds = np.cumsum([source.share for source in sources])[:-1]
        if (size := min(len(source.tokens) for source in sources)) <= self.longest:
            raise ValueError(f"{size:,} tokens are too few for one sequence of {self.longest} (and "
                             "the token after it); give more text, or a shorter sequence")

    def batch(self, state: Any, fraction: float) -> tuple[list[Any], dict[str, Place], Any]:
        """This rank's micro-batches, the place in each text after them, the epochs read of it."""
        length = self.lengths[min(int(fraction * len(self.lengths)), len(self.lengths) - 1)]
        numbers = np.arange(self.config.batch_tokens // length)
        chosen = np.searchsorted(self.bounds, (state.tokens // length + numbers) * GOLDEN % 1,
                                 side="right")
        own = np.isin(numbers, numbers[self.rows(len(numbers))])
        fields, places = np.empty((3, len(numbers), length), np.int64), self._places(state)
        for index, source in enumerate(self.sources):
            mine = chosen == index
            plan, places[source.key] = self._take(source, places[source.key], length,
                                                  int(mine.sum()))
            if (mine & own).any():
                fields[:, mine & own] = _read(source.tokens, plan[0, own[mine]],
                                              plan[1, own[mine]] > 0, self.end_of_text)
        fields, rows = fields[:, own], self.config.micro_batch * self.longest // length
        return ([_batch(fields[:, first:first + rows], self.end_of_text)
                 for first in range(0, own.sum(), rows)], places, self._epochs(places))

    def describe(self, state: Any) -> str:
        """How much of each text was read; "" if there is but one, unread. Raises ValueError if a
        text of the run is missing."""
        if gone := state.position.keys() - {source.key for source in self.sources}:
            raise ValueError(f"this run has read a text with the manifest {min(gone)}, which "
                             f"{', '.join(source.folder for source in self.sources)} lacks; give "
                             "the folder that it was begun with, or start a new run with --from")
        read = [f"{epochs:.2f}" for epochs in self._epochs(self._places(state)).values()]
        if len(read) == 1:
            return f"epochs of the text read: {read[0]}" if state.tokens else ""
        return ", ".join(f"{source.name}: {source.share:.1%} of the tokens, {epochs} epochs read"
                         for source, epochs in zip(self.sources, read, strict=True))

    def _places(self, state: Any) -> dict[str, Place]:
        """Those in `state`. A run that recorded none has read the tokens that it counted."""
        read, block = 0 if state.position else state.tokens, self.longest
        return {key: Place(*state.position.get(key) or (
            *divmod(read, (len(tokens) - 1) // block * block), block, block))
            for _, _, key, _, tokens, _ in self.sources}

    def _epochs(self, places: dict[str, Place]) -> dict[str, float]:
        return {source.label("epochs"): round(place.epoch + place.token / _size(source, place), 4)
                for source, place in ((one, places[one.key]) for one in self.sources)}

    def _take(self, source: Source, place: Place, length: int, rows: int,
              ) -> tuple[np.ndarray, Place]:
        """The next positions of a text and whether the token after each is scored, [2, rows,
        length], and the place after them. The last block of an epoch begins early enough to be
        whole; what it repeats is not scored."""
        parts, count, targets = [np.empty((2, 0), np.int64)], rows * length, len(source.tokens) - 1
        while count:
            epoch, token, block, strip = place
            if token == _size(source, place):
                place = Place(epoch + 1, 0, self.longest, 0)
                continue
            group, inside = divmod(token, GROUP * block)
            if inside == 0:
                strip = length if block % length == 0 else block
            number = min(count, GROUP * block - inside, _size(source, place) - token)
            place, count = Place(epoch, token + number, block, strip), count - number
            blocks = np.arange(group * GROUP, min((group + 1) * GROUP, -(-targets // block)))
            whole = targets // block
            starts = permute(np.minimum(blocks, whole - 1), whole, self.config.seed, epoch) * block
            starts[blocks == whole] = targets - block
            strips, inside_N = np.divmod(inside + np.arange(number), len(blocks) * strip)
            members, columns = np.divmod(inside_N, strip)
            positions = starts[members] + strips * strip + columns
            scored = (blocks[members] < whole) | (positions >= whole * block)
            parts.append(np.stack([positions, scored]))
        return np.concatenate(parts, axis=1).reshape(2, rows, length), place


def _size(source: Source, place: Place) -> int:
    """Tokens in the order of the epoch."""
    return -(-(len(source.tokens) - 1) // place.block) * place.block


def sequential(tokens: Tokens, sequence_length: int, batch_size: int,
               end_of_text: int | None = None) -> Iterator[Batch | PackedBatch]:
    """Every window in order; every position but the first is a target exactly once.

    The last batch may have fewer rows. A remainder shorter than a window is a batch of its own.
    """
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens are too few to predict one from another; give "
                         "more text to validate on")
    places, whole = np.arange(len(tokens) - 1), (len(tokens) - 1) // sequence_length
    whole_BT, rest_T = np.split(places, [whole * sequence_length])
    whole_BT = whole_BT.reshape(whole, sequence_length)
    for rows_BT in (*np.split(whole_BT, range(batch_size, whole, batch_size)), rest_T[None]):
        if rows_BT.size:
            yield _batch(_read(tokens, rows_BT, rows_BT >= 0, end_of_text), end_of_text)


def permute(places: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """What the permutation of 0 .. size-1 for `seed` and `epoch` has at each of `places`.

    A Feistel network is a bijection of 2*half-bit numbers, whatever function is mixed in.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    keys = np.random.Generator(np.random.Philox(key=[seed, epoch])).integers(
        0, 1 << 63, size=6, dtype=np.uint64)
    mask, result = (np.uint64(1) << half) - np.uint64(1), places.astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():  # cycle walking: the domain is at most 4 * size, so 4 rounds on average
        left, right = result[outside] >> half, result[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        result[outside] = left << half | right
        outside = result >= size
    return result.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Let every bit of the input affect every bit of the result (MurmurHash3's finalizer)."""
    values = (values ^ values >> np.uint64(33)) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ values >> np.uint64(33)) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ values >> np.uint64(33)


def _read(tokens: Tokens, positions_BT: np.ndarray, scored_BT: np.ndarray,
          end_of_text: int | None) -> np.ndarray:
    """[3, B, T]: ids, targets, and the position of each id in its document, which begins with the
    token `end_of_text`, or where a row continues at another place of the text."""
    flat = positions_BT.ravel()
    runs = [tokens[run[0]:run[-1] + 2]
            for run in np.split(flat, np.flatnonzero(np.diff(flat) != 1) + 1)]
    ids, targets = (np.concatenate([run[part] for run in runs]).astype(np.int64).reshape(
        positions_BT.shape) for part in (slice(-1), slice(1, None)))
    begins, numbers = ids == end_of_text, np.arange(positions_BT.shape[1])
    begins[:, 1:] |= np.diff(positions_BT) != 1
    return np.stack([ids, np.where(scored_BT, targets, IGNORED),
                     numbers - np.maximum.accumulate(numbers * begins, axis=1)])


def _batch(fields: np.ndarray, end_of_text: int | None) -> Batch | PackedBatch:
    packed = PackedBatch(*map(torch.from_numpy, fields))
    return Batch(*packed[:2]) if end_of_text is None else packed
