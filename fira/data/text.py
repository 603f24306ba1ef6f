"""Inputs become documents, streamed, so that memory does not grow with the corpus.

Each row of a .jsonl, .csv or .parquet file is a document; any other file is one document, or, if
.txt, one for each separator. A long text is read in parts, cut where every supported pre-tokenizer
splits anyway (tests/data/test_text.py proves it), so that the parts give the same tokens as the
whole; only where there is no such place for 2 CHUNK characters, it is cut anywhere.

What is left out (null texts, unreadable rows, duplicates, short documents) passes through the
stream as items without text, so that it is counted once even if the work is interrupted.
"""
from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TextIO

import pyarrow
import pyarrow.parquet

from fira.data import encoder
from fira.data.encoder import chunks, safe_cut, to_utf8
from fira.data.sources import DEFAULT, LINES, TABLES, UNPACK, UNPACK_ERRORS, Input, Reading, inputs

# What decoding and parsing raise; anything else is a fault of this program, and is not caught.
ERRORS = (*UNPACK_ERRORS, ValueError, RecursionError, csv.Error, pyarrow.ArrowException,
          pyarrow.ArrowMemoryError)
EMPTY, UNREADABLE = "null or empty", "unreadable"  # why something is left out
LONGEST = 1 << 25  # characters of a row
END_OF_TEXT_LINE = r"<\|endoftext\|>[ \t\r]*(?:\n|\Z)"  # at the end of a line
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
        codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_BAD = re.compile("[\0\udc80-\udcff]")  # NUL, and what the handler `surrogateescape` makes of bytes
_BAD_LINE = re.compile(f"^[^\n]*{_BAD.pattern}[^\n]*\n?", re.MULTILINE)
Rows = Iterator[tuple[int, int, Any]]  # number, bytes read so far, and the row: an object or JSON


class Item(NamedTuple):
    """A document, a part of one, or (without text, and ending none) something left out."""

    text: str
    ends: bool = True       # whether this is the document's last part
    file: int = 0           # index of the input it comes from
    number: int = 0         # its index among the items of that input, where reading can resume
    done: int = 0           # bytes of all inputs read so far, for progress
    where: str = ""         # file and line, and what cannot be read there
    left_out: str = ""      # why there is no text
    held_out: bool = False  # whether it is after the place where validation begins


def texts(sources: Sequence[str]) -> Iterator[str]:
    """The text of every document of `sources`; a long document comes in parts."""
    return (item.text for item in items(inputs(sources)))


def items(given: list[Input], file: int = 0, number: int = 0) -> Iterator[Item]:
    """The documents of `given`, from item `number` of input `file` on; see `read`."""
    return (item for item in read(given, start=(file, number)) if not item.left_out)


def read(given: list[Input], how: Reading = DEFAULT, start: tuple[int, int] = (0, 0),
         held_out_from: int | None = None) -> Iterator[Item]:
    """Stream `given` from item start[1] of input start[0] on, with what is left out. Validation
    begins at character `held_out_from` of the whole text; the document there is cut in two. Raises
    ValueError, one line with file and place, for what cannot be read."""
    seen: set[bytes] = set()
    left = sys.maxsize if held_out_from is None else held_out_from
    first = 0 if how.deduplicate or held_out_from is not None else start[0]  # what came before
    before = sum(one.size or 0 for one in given[:first])
    for file in range(first, len(given)):
        number = done = 0
        for item in _chosen(given[file], how, seen):
            if item.left_out == UNREADABLE and not how.skip_bad:
                raise ValueError(item.where)
            done = item.done
            for part in _split(item, left):
                if (file, number) >= start:
                    yield part._replace(file=file, number=number, done=before + done)
                number += 1
            left -= len(item.text)
        before += given[file].size or done


def group(stream: Iterable[Item], limit: int) -> Iterator[list[Item]]:
    """The stream in lists of about `limit` characters, of which an item has at least one."""
    total = 0

    def number(item: Item) -> int:
        nonlocal total
        total += max(1, len(item.text))
        return total // limit

    return (list(items) for _, items in itertools.groupby(stream, number))


def _split(item: Item, left: int) -> list[Item]:
    """The item, or its parts before and after character `left`, where validation begins."""
    if left <= 0 or left > len(item.text):
        return [item._replace(held_out=True) if left <= 0 else item]
    cut = safe_cut(item.text[:left]) or left
    return [item._replace(text=item.text[:cut], ends=True),
            item._replace(text=item.text[cut:], held_out=True)]


def _chosen(place: Input, how: Reading, seen: set[bytes]) -> Iterator[Item]:
    """The items of one input. A document that is read in parts is neither compared nor judged."""
    begun = False  # a part of a document was read, but not yet its last part
    for item in _read_file(place, how):
        if item.text and item.ends and not begun and (why := how.unfit(item.text, seen)):
            item = item._replace(text="", ends=False, left_out=why)
        if item.left_out:
            yield item
        elif item.text or begun:
            *parts, last = chunks(item.text) if len(item.text) > encoder.CHUNK else [item.text]
            yield from (item._replace(text=part, ends=False) for part in parts)
            yield item._replace(text=last) if parts else item
            begun = not item.ends
    if begun:
        yield Item("")


def _read_file(place: Input, how: Reading) -> Iterator[Item]:
    form = place.ending
    try:
        if form in ("hub", ".parquet"):
            yield from _of_rows((hub_rows if form == "hub" else _parquet)(place, how), place, how)
            return
        with opened(place, how.encoding) as (stream, position):
            if form.startswith(LINES):
                rows = (row for row in lines_of(stream, position) if row[2].strip())
                yield from _of_rows(rows, place, how)
            elif form.startswith(TABLES):
                yield from _of_rows(_table(stream, position, form), place, how)
            else:
                yield from _text(stream, position, place, how)
    except ERRORS as error:
        line = str(error).strip().split("\n")[0] or type(error).__name__
        where = (f"{place.name}: cannot be read to its end as {form} ({line}); check the file and "
                 "its encoding, or fetch it again")
        if not how.skip_bad:
            raise ValueError(where) from error
        yield Item("", False, left_out=UNREADABLE, where=where)


@contextlib.contextmanager
def opened(place: Input, encoding: str) -> Iterator[tuple[TextIO, Callable[[], int]]]:
    """The characters of a file without a byte order mark, and how much of it was read."""
    with open(place.path, "rb", buffering=0) as file:
        unpack = UNPACK.get(place.ending.rpartition(".")[2], lambda plain: plain)
        stream = io.BufferedReader(unpack(io.BufferedReader(file, encoder.CHUNK)), encoder.CHUNK)
        head = stream.peek(4)
        named = next((name for mark, name in BOMS.items() if head.startswith(mark)), encoding)
        yield io.TextIOWrapper(stream, named, "surrogateescape", newline="\n"), file.tell


def _text(stream: TextIO, position: Callable[[], int], place: Input,
          how: Reading) -> Iterator[Item]:
    """A text file as one document, or one for each separator; long ones in parts."""
    separable = place.ending.startswith((".txt", ".text"))
    separator = re.compile(re.escape(how.separator) or END_OF_TEXT_LINE)
    longest = 2 + len(how.separator or END_OF_TEXT_LINE)  # of a separator and the newline before
    text, line, begins = "", 1, False  # begins: `text` is the start of what follows a separator
    while block := stream.read(encoder.CHUNK):
        block += stream.readline(encoder.CHUNK)  # so that no separator is seen in half
        number, line = line, line + block.count("\n")
        if _is_bad(block):
            yield from _of_rows(((number + block[:bad.start()].count("\n"), position(), bad[0])
                                 for bad in _BAD_LINE.finditer(block)), place, how)
            block = _BAD_LINE.sub("", block)
        *whole, text = separator.split(text + block) if separable else [text + block]
        yield from (Item(document.strip("\r\n"), done=position(), where=place.name)
                    for document in whole)
        begins = begins or bool(whole)
        text = text.lstrip("\r\n") if begins else text
        if len(text) >= encoder.CHUNK:
            head = text[:max(0, len(text) - longest)]
            if cut := safe_cut(head) or (len(text) >= 2 * encoder.CHUNK) * len(head):
                yield Item(text[:cut], False, done=position())
                text, begins = text[cut:], False
    yield Item(text, done=position(), where=place.name)


def lines_of(stream: TextIO, position: Callable[[], int], done: int = 0) -> Rows:
    for number in itertools.count(1):
        line = stream.readline(LONGEST)
        if len(line) == LONGEST:
            raise ValueError(f"line {number} has {LONGEST:,} characters or more; cut it in several")
        if not line:
            return
        done = position() if number % 64 == 1 else done  # it asks the system
        yield number, done, line


def _table(stream: TextIO, position: Callable[[], int], form: str) -> Rows:
    """Rows of values with commas, semicolons or tabs between, below a line of names."""
    csv.field_size_limit(LONGEST)
    lines = (line for *_, line in lines_of(stream, position))
    first = next(lines, "")
    mark = "\t" if form.startswith(".tsv") else max(",;", key=first.count)
    table = csv.DictReader(itertools.chain([first], lines), delimiter=mark)
    for row in table:
        yield table.line_num, position(), row


def _parquet(place: Input, how: Reading) -> Rows:
    """Few rows are decoded at a time, and a text that they share once, since it may be long."""
    key = how.text_key
    schema = pyarrow.parquet.read_metadata(place.path).schema
    names = [schema.column(index).path for index in range(len(schema))]
    if key not in names:
        yield 0, 0, dict.fromkeys(names)
        return
    number = 0
    with pyarrow.parquet.ParquetFile(place.path, read_dictionary=[key]) as file:
        for batch in file.iter_batches(16, columns=[key], use_threads=False):
            column = batch.column(0)
            if pyarrow.types.is_struct(column.type):
                from pyarrow import compute  # its import takes 20 ms, in every process

                column = compute.struct_field(column, key.split(".")[1:])
            for value in column:
                number += 1
                done = (place.size or 0) * number // file.metadata.num_rows
                yield number, done, {key: value.as_py()}


def hub_rows(place: Input, how: Reading) -> Rows:
    """A split of a Hugging Face data set, streamed without storing it."""
    try:
        import datasets
    except ImportError:
        raise ValueError("it needs the datasets library: pip install 'fira-moe[hub]'") from None
    address, config, split, *_ = f"{place.name.removeprefix('hub:')}::".split(":")
    name, _, revision = address.partition("@")
    rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True,
                                 revision=revision or None)
    done = 0
    for number, row in enumerate(rows):
        done += len(json.dumps(row, default=str))
        yield number, done, row


def _of_rows(rows: Rows, place: Input, how: Reading) -> Iterator[Item]:
    for number, done, row in rows:
        where = f"{place.name}:{number}"
        try:
            text = _text_of(row, how) or ""
            yield Item(text, bool(text), 0, 0, done, where, "" if text else EMPTY)
        except ValueError as error:
            yield Item("", False, done=done, where=f"{where}: {error}", left_out=UNREADABLE)


def _text_of(row: Any, how: Reading) -> str | None:
    """The text under the key of a row, which may be a line of JSON; None if it is null."""
    escaped = not isinstance(row, str) or "\\u" in row  # only then can the value hold more
    if isinstance(row, str):
        check_text(row, how.encoding)
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not valid JSON ({error}); write one object per line (an array "
                             'becomes that with: jq -c ".[]" FILE > NEW.jsonl)') from None
    key, value = how.text_key, row
    for name in [key] if isinstance(row, dict) and key in row else key.split("."):
        if value is not None:
            value = value.get(name, ...) if isinstance(value, dict) else ...
    if isinstance(row, dict) and None in row:
        raise ValueError("more values than the first line names; put a value that holds the "
                         "separator in double quotes")
    if value is not None and not isinstance(value, str):
        has = ", ".join(list(row)[:12]) or "none" if isinstance(row, dict) else "not an object"
        raise ValueError(f"no string under the key {key} (keys: {has}); give fira data the right "
                         "one with --text-key, or rename it to text")
    if value and escaped and _is_bad(value):
        check_text(value.replace("\0", ""), how.encoding)
        to_utf8(value)
    return value


def _is_bad(text: str) -> bool:
    """Whether _BAD may be found: much faster than looking for it."""
    try:
        return "\0" in text or not (text.isascii() or text.encode())
    except UnicodeEncodeError:
        return True


def check_text(text: str, encoding: str) -> None:
    if bad := _is_bad(text) and _BAD.search(text):
        byte = ord(bad[0]) & 0xff
        guess = "latin1" if byte else "utf-16le" if bad.start() % 2 else "utf-16be"
        raise ValueError(f"not {encoding.upper()} text: 0x{byte:02x} at character {bad.start() + 1}"
                         "; leave out a file that is no text; of others give fira data the "
                         f"--encoding, perhaps {guess}, or convert them: iconv -f {guess} -t utf-8 "
                         "FILE > NEW")
