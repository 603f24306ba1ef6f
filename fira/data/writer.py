"""One split's stream of ids, written as shards that survive being cut off at any moment."""
from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from fira.data.shards import shard_name


def write_json(file: Path, content: Any) -> None:
    """Replace a file as a whole: at any moment it holds the old or the new content."""
    partial = file.with_name(file.name + ".partial")
    with open(partial, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Writer:
    """Appends ids to NAME.partial and renames it to NAME when the shard is full.

    `state`, as `sync` returned it, brings the files back to that moment, whatever came after.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int,
                 state: dict[str, Any] | None = None):
        self.folder, self.split, self.dtype = folder, split, np.dtype(dtype)
        self.shard_tokens = shard_tokens
        state = state or {"documents": 0, "bytes": 0, "shards": [], "open_tokens": 0}
        self.documents, self.bytes = state["documents"], state["bytes"]
        self.shards: list[dict[str, Any]] = list(state["shards"])
        self.tokens = state["open_tokens"]  # in the open shard
        self.digest = hashlib.sha256()
        self._roll_back()
        self.stream = open(self._partial, "ab")

    def add(self, ids: np.ndarray, text_bytes: int, ends: bool) -> None:
        """Append the ids of a document, or of a part of one."""
        self.bytes += text_bytes
        self.documents += ends
        while len(ids):
            head, ids = np.split(ids, [self.shard_tokens - self.tokens])
            data = head.astype(self.dtype, copy=False).tobytes()
            self.stream.write(data)
            self.digest.update(data)
            self.tokens += len(head)
            if self.tokens == self.shard_tokens:
                self._close_shard()
                self.stream = open(self._partial, "ab")

    def sync(self) -> dict[str, Any]:
        """Put all that was added on disk and return the state to come back to."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        return {"documents": self.documents, "bytes": self.bytes, "shards": list(self.shards),
                "open_tokens": self.tokens}

    def finish(self) -> dict[str, Any]:
        """Close the last shard and return the manifest's account of the split."""
        if self.tokens:
            self._close_shard()
        else:
            self.stream.close()
            self._partial.unlink()
        return {"tokens": sum(shard["tokens"] for shard in self.shards),
                "documents": self.documents, "bytes": self.bytes, "shards": self.shards}

    @property
    def _final(self) -> Path:
        return self.folder / shard_name(self.split, len(self.shards))

    @property
    def _partial(self) -> Path:
        return self._final.with_name(self._final.name + ".partial")

    def _close_shard(self) -> None:
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        os.replace(self._partial, self._final)
        self.shards.append({"file": self._final.name, "tokens": self.tokens,
                            "sha256": self.digest.hexdigest()})
        self.tokens, self.digest = 0, hashlib.sha256()

    def _roll_back(self) -> None:
        """Reopen the shard the state was in, cut it to the state's length, drop what came after."""
        known = {shard["file"] for shard in self.shards}
        if self._final.exists() and not self._partial.exists():
            os.replace(self._final, self._partial)
        for file in self.folder.glob(f"{self.split}-*.bin*"):
            if file.name not in known and file != self._partial:
                file.unlink()
        size = self.tokens * self.dtype.itemsize
        self._partial.touch()
        with open(self._partial, "r+b") as stream:
            stream.truncate(size)
            while block := stream.read(1 << 20):
                self.digest.update(block)
