"""A data folder: token ids in memory-mapped shards, described by a manifest with checksums.

Each split is one long stream of ids, every document followed by end-of-text, cut every
`shard_tokens` ids: position p lies in shard p // shard_tokens.
"""
from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = "manifest.json"
SPLITS = ("train", "validation")


def dtype_for(vocab_size: int) -> str:
    """The smallest of the two unsigned types that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.bin"


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a data folder. Raises ValueError if the folder is not (yet) one."""
    file = Path(folder) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        manifest["splits"], manifest["dtype"], manifest["tokenizer_hash"]
    except FileNotFoundError:
        begun = (Path(folder) / "journal.json").is_file()
        remedy = ("its preparation is not finished; run the same fira data command again" if begun
                  else f"make it with: fira data SOURCE --tokenizer FOLDER --out {folder}")
        raise ValueError(f"{folder} is not a data folder (no {MANIFEST}); {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete {folder} and prepare the data "
                         "again") from None
    return manifest


class Shards:
    """One split of a data folder as a sequence of ids: `len(shards)`, `shards[start:stop]`."""

    def __init__(self, folder: str | Path, split: str, manifest: dict[str, Any]):
        self.folder, self.split, self.manifest = Path(folder), split, manifest
        self.tokenizer_hash: str = manifest["tokenizer_hash"]
        self.shard_tokens: int = manifest["shard_tokens"]
        self.described: list[dict[str, Any]] = manifest["splits"][split]["shards"]
        self.length: int = manifest["splits"][split]["tokens"]
        self.shards = [self._map(shard) for shard in self.described]

    @classmethod
    def open(cls, folder: str | Path, split: str = "train") -> Shards:
        """Map a split. Raises ValueError at once for a missing or truncated shard."""
        manifest = read_manifest(folder)
        if split not in manifest["splits"]:
            raise ValueError(f"{folder} has no split {split!r}; it has: "
                             f"{', '.join(manifest['splits'])}")
        return cls(folder, split, manifest)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, where: slice) -> np.ndarray:
        """Ids of a range of positions; a view into the map unless it spans shards."""
        start, stop, step = where.indices(self.length)
        assert step == 1, step
        parts = []
        while start < stop:
            number, offset = divmod(start, self.shard_tokens)
            parts.append(self.shards[number][offset:offset + stop - start])
            start += len(parts[-1])
        if not parts:
            return np.empty(0, self.manifest["dtype"])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @property
    def documents(self) -> int:
        return self.manifest["splits"][self.split]["documents"]

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text behind the split."""
        return self.manifest["splits"][self.split]["bytes"]

    def verify(self) -> None:
        """Read every shard against its checksum. Raises ValueError for one that was altered."""
        for shard in self.described:
            if file_digest(self.folder / shard["file"]) != shard["sha256"]:
                raise ValueError(f"{self.folder / shard['file']} was altered (its sha256 is not "
                                 f"the manifest's); delete {self.folder} and prepare it again")

    def _map(self, shard: dict[str, Any]) -> np.ndarray:
        file, dtype = self.folder / shard["file"], np.dtype(self.manifest["dtype"])
        size, due = file.stat().st_size if file.is_file() else 0, shard["tokens"] * dtype.itemsize
        if size != due:
            what = f"is truncated: {size:,} bytes, not" if file.is_file() else "is missing, of"
            raise ValueError(f"{file} {what} {due:,}; delete {self.folder} and prepare it again")
        return np.memmap(file, dtype, mode="r")


def file_digest(file: Path) -> str:
    """Hex sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
