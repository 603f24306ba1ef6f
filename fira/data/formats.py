"""Files of every format become items: documents and parts of them, and rows that hold no text.

Each row of a .jsonl, .csv or .parquet file is a document; any other file is one document, or, if
.txt, one for each separator. A long text file is read in parts, cut where every supported
pre-tokenizer splits anyway (tests/data/test_text.py proves it), so that the parts give the same
tokens as the whole; only where there is no such place for 2 CHUNK characters, it is cut anywhere.
A row has at most LONGEST characters. Memory is therefore bounded, whatever the input.
"""
from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, TextIO

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from fira.data import encoder
from fira.data.encoder import safe_cut, to_utf8
from fira.data.sources import LINES, TABLES, Input

LONGEST = 1 << 25  # characters of a row
END_OF_TEXT_LINE = r"<\|endoftext\|>[ \t\r]*(?:\n|\Z)"  # at the end of a line
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
        codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_BAD = re.compile("[\0\udc80-\udcff]")  # NUL, and what the handler `surrogateescape` makes of bytes
_BAD_LINE = re.compile(f"^[^\n]*{_BAD.pattern}[^\n]*\n?", re.MULTILINE)
Position = Callable[[], int]  # bytes of the file read so far


@dataclass(frozen=True)
class Reading:
    """How sources are read; every field decides which documents there are."""

    text_key: str = "text"     # key or column of the text; dots lead into nested objects
    encoding: str = "utf-8"    # of files without a byte order mark
    separator: str = ""        # what ends a document in a .txt file; "": END_OF_TEXT_LINE
    skip_bad: bool = False     # leave out what cannot be read
    deduplicate: bool = False  # leave out documents that were read before
    min_chars: int = 0         # leave out shorter documents
    quality: bool = False      # leave out documents by the rules of text.unfit

    def __post_init__(self) -> None:
        try:
            "".encode(self.encoding)
        except LookupError:
            raise ValueError(f"encoding {self.encoding} is not known; give one that Python knows, "
                             "like latin-1, cp1252, utf-16-le or gb18030") from None


class Item(NamedTuple):
    """A document, a part of one, or (without text, and ending none) something that is left out."""

    text: str
    ends: bool = True       # whether this is the document's last part
    file: int = 0           # index of the input it comes from
    number: int = 0         # its index among the items of that input, where reading can resume
    done: int = 0           # bytes of all inputs read so far, for progress
    where: str = ""         # file and line
    left_out: str = ""      # the kind of reason why there is no text
    problem: str = ""       # why a row cannot be read, one line
    held_out: bool = False  # whether it is after the place where validation begins


def read_file(place: Input, how: Reading) -> Iterator[Item]:
    """The items of one input. Raises ValueError, one line, if it is damaged as a whole."""
    form = place.ending
    try:
        if form in ("hub", ".parquet"):
            yield from (_hub if form == "hub" else _parquet)(place, how)
        else:
            read = (_objects if form.startswith(LINES) else
                    _table if form.startswith(TABLES) else _text)
            with _opened(place, how.encoding) as (stream, position):
                yield from read(stream, position, place, how)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place.name} is not {error.encoding} text ({error.reason}); check the "
                         "file or give another --encoding") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error, csv.Error,
            pyarrow.ArrowException) as error:
        line = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{place.name} cannot be read to its end as {form} ({line}); check the "
                         "file or fetch it again") from None


def _zstd(packed: BinaryIO) -> Any:
    """pyarrow would refuse windows of more than 128 MB, as `zstd --long=31` makes them."""
    try:
        from compression import zstd  # from Python 3.14 on
    except ImportError:
        from backports import zstd
    return zstd.ZstdFile(packed, options={zstd.DecompressionParameter.window_log_max: 31})


UNPACK: dict[str, Callable[[BinaryIO], Any]] = {
    "gz": lambda packed: gzip.GzipFile(fileobj=packed), "bz2": bz2.BZ2File, "xz": lzma.LZMAFile,
    "zst": _zstd}


@contextlib.contextmanager
def _opened(place: Input, encoding: str) -> Iterator[tuple[TextIO, Position]]:
    """The characters of a file without a byte order mark, and how much of it was read."""
    with open(place.path, "rb", buffering=0) as file:
        unpack = UNPACK.get(place.ending.rpartition(".")[2], lambda plain: plain)
        stream = io.BufferedReader(unpack(io.BufferedReader(file, encoder.CHUNK)), encoder.CHUNK)
        head = stream.peek(4)
        named = next((name for mark, name in BOMS.items() if head.startswith(mark)), encoding)
        yield io.TextIOWrapper(stream, named, "surrogateescape", newline="\n"), file.tell


def _text(stream: TextIO, position: Position, place: Input, how: Reading) -> Iterator[Item]:
    """A text file as one document, or one for each separator; long ones in parts."""
    separable = place.ending.startswith((".txt", ".text"))
    separator = re.compile(re.escape(how.separator) or END_OF_TEXT_LINE)
    text, line, begins = "", 1, False  # begins: `text` is the start of what follows a separator
    while block := stream.read(encoder.CHUNK):
        block += stream.readline(encoder.CHUNK)  # so that no separator is seen in half
        number, line = line, line + block.count("\n")
        if _BAD.search(block):
            for bad in _BAD_LINE.finditer(block):
                where = f"{place.name}:{number + block[:bad.start()].count(chr(10))}"
                yield _row(where, position(), _raw, bad[0], how)
            block = _BAD_LINE.sub("", block)
        *whole, text = separator.split(text + block) if separable else [text + block]
        yield from (Item(document.strip("\r\n"), done=position()) for document in whole)
        begins = begins or bool(whole)
        text = text.lstrip("\r\n") if begins else text
        if len(text) >= encoder.CHUNK:
            head = text[:len(text) - len(how.separator)]
            if cut := safe_cut(head) or (len(text) >= 2 * encoder.CHUNK) * len(head):
                yield Item(text[:cut], False, done=position())
                text, begins = text[cut:], False
    yield Item(text, done=position())


def _objects(stream: TextIO, position: Position, place: Input, how: Reading) -> Iterator[Item]:
    for number, line in _lines(stream):
        if line.strip():
            yield _row(f"{place.name}:{number}", position(), _object, line, how)


def _table(stream: TextIO, position: Position, place: Input, how: Reading) -> Iterator[Item]:
    """Rows of values with commas, semicolons or tabs between, below a line of names."""
    csv.field_size_limit(LONGEST)
    lines = (_short(line) for _, line in _lines(stream))
    first = next(lines, "")
    mark = "\t" if place.ending.startswith(".tsv") else max(",;", key=first.count)
    table = csv.DictReader(itertools.chain([first], lines), delimiter=mark)
    for row in table:
        yield _row(f"{place.name}:{table.line_num}", position(), _cells, row, how)


def _parquet(place: Input, how: Reading) -> Iterator[Item]:
    """Rows of a column, which may lie in a struct. A text that rows share is in memory once, and
    few rows are decoded at a time, since they may be long."""
    with pyarrow.parquet.ParquetFile(place.path, read_dictionary=[how.text_key]) as file:
        names = [file.schema.column(index).path for index in range(len(file.schema))]
        header = _row(place.name, 0, _picked, dict.fromkeys(names), how)
        if header.problem:
            yield header
            return
        number, size = 0, place.size or 0
        for batch in file.iter_batches(16, columns=[how.text_key], use_threads=False):
            column = batch.column(0)
            if pyarrow.types.is_struct(column.type):
                column = pyarrow.compute.struct_field(column, how.text_key.split(".")[1:])
            for number, value in enumerate(column, start=number + 1):  # noqa: B020
                yield _row(f"{place.name}:{number}", size * number // file.metadata.num_rows,
                           _picked, {how.text_key: value.as_py()}, how)


def _hub(place: Input, how: Reading) -> Iterator[Item]:
    """A split of a Hugging Face data set, streamed without storing it."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{place.name} needs the datasets library; "
                         "run: pip install 'fira-moe[hub]'") from None
    address, config, split, *_ = f"{place.name.removeprefix('hub:')}::".split(":")
    name, _, revision = address.partition("@")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True,
                                     revision=revision or None)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{place.name} cannot be opened ({error}); check the name, the config, "
                         "the split and the network") from error
    done = 0
    for number, row in enumerate(rows):
        item = _row(f"{place.name} row {number}", done, _picked, row, how)
        done += len(item.text.encode())
        yield item._replace(done=done)


def _row(where: str, done: int, read: Callable[[Any, Reading], str | None], content: Any,
         how: Reading) -> Item:
    """The item of a row whose text `read` returns, or raises why there is none."""
    try:
        text = read(content, how)
        reason, problem = "" if text else "null or empty", ""
    except ValueError as error:
        text, reason, problem = "", "unreadable", f"{where}: {error}"
    return Item(text or "", bool(text), done=done, where=where, left_out=reason, problem=problem)


def _lines(stream: TextIO) -> Iterator[tuple[int, str]]:
    """Numbered lines; LONGEST characters of one that is longer, which `_short` refuses."""
    for number in itertools.count(1):
        line = rest = stream.readline(LONGEST)
        while len(rest) == LONGEST and rest[-1] != "\n":
            rest = stream.readline(LONGEST)
        if not line:
            return
        yield number, line


def _object(line: str, how: Reading) -> str | None:
    try:
        row = json.loads(_raw(line, how))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error}); write one object per line, like "
                         '{"text": "..."}; jq -c ".[]" FILE > NEW.jsonl does so with an '
                         "array") from None
    return _picked(row, how)


def _cells(row: dict[Any, Any], how: Reading) -> str | None:
    if None in row or None in row.values():
        raise ValueError("not as many values as the first line names; put values that hold the "
                         "separator or a newline in double quotes")
    _raw(row.get(how.text_key, ""), how)
    return _picked(row, how)


def _picked(row: Any, how: Reading) -> str | None:
    """The text under the key of a row; None if it is null."""
    key, value = how.text_key, row
    for name in [key] if isinstance(row, dict) and key in row else key.split("."):
        if value is not None:
            value = value.get(name, ...) if isinstance(value, dict) else ...
    if value is None:
        return None
    if not isinstance(value, str):
        has = ", ".join(list(row)[:12]) or "none" if isinstance(row, dict) else "not an object"
        raise ValueError(f"no string under the key {key} (keys: {has}); give fira data the right "
                         "one with --text-key, or rename it to text")
    to_utf8(_short(value))
    return value


def _short(text: str) -> str:
    if len(text) >= LONGEST:
        raise ValueError(f"a row of {LONGEST:,} characters or more; cut it into several, or leave "
                         "it out with --skip-bad")
    return text


def _raw(text: str, how: Reading) -> str:
    """The text, if none of its characters shows that it has another encoding."""
    if bad := _BAD.search(_short(text)):
        byte = ord(bad[0]) & 0xff
        guess = "latin1" if byte else "utf-16le" if bad.start() % 2 else "utf-16be"
        raise ValueError(f"not {how.encoding.upper()} text: 0x{byte:02x} at character "
                         f"{bad.start() + 1}; leave it out if it is no text, else give fira data "
                         f"its encoding, for example --encoding {guess}, or convert it: "
                         f"iconv -f {guess} -t utf-8 FILE > NEW")
    return text
