"""Inputs become documents, streamed, so that memory does not grow with the corpus.

A .txt or .md file is one document, a .jsonl line and a .parquet row one each (key or column
`text`). A long text file is handed on in parts, cut only where every supported pre-tokenizer
splits anyway (tests/data/test_text.py proves it), so parts give the same tokens as the whole.
"""
from __future__ import annotations

import codecs
import collections
import contextlib
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import pyarrow
import pyarrow.parquet

from fira.data.sources import Input, inputs

BLOCK = 1 << 22  # bytes read at a time from a text file; a part has between one and two blocks
Progress = Callable[[int, "int | None"], None]  # bytes of input read, bytes in all if known


class Item(NamedTuple):
    """A document, or a part of one."""

    text: str
    ends: bool = True  # is this the document's last part?
    file: int = 0      # which input it came from ...
    number: int = 0    # ... and how many items of that input came before: a place to resume at
    done: int = 0      # bytes of all inputs read so far, for progress


def texts(sources: list[str], progress: Progress | None = None) -> Iterator[str]:
    """The text of every document of `sources`, a long one in parts: for training a tokenizer."""
    given = inputs(sources)
    total = total_bytes(given)
    for item in items(given):
        yield item.text
        if progress:
            progress(item.done, total)


def items(given: list[Input], file: int = 0, number: int = 0) -> Iterator[Item]:
    """Stream the items of `given`, starting after the first `number` items of input `file`.

    Raises ValueError, one line with file and place, on text that is damaged or not UTF-8.
    """
    done = sum(one.size or 0 for one in given[:file])
    for index in range(file, len(given)):
        place, read = given[index], _Counter()
        for count, (text, ends) in enumerate(_read(place, read)):
            if index > file or count >= number:
                yield Item(text, ends, index, count, done + read.bytes)
        done += place.size or 0


def total_bytes(given: list[Input]) -> int | None:
    """Bytes of all inputs; None where one of them cannot tell."""
    sizes = [one.size for one in given]
    return None if None in sizes else sum(size for size in sizes if size)


class _Counter:
    """How far into an input the reader is."""

    bytes = 0  # as it lies on disk, compressed


def _read(place: Input, read: _Counter) -> Iterator[tuple[str, bool]]:
    if place.ending == "hub":
        return _hub(place)
    if place.ending == ".parquet":
        return _parquet(place, read)
    return (_lines if place.ending.startswith(".jsonl") else _whole)(place, read)


def safe_cut(text: str) -> int:
    """The last place in `text` where every supported pre-tokenizer splits, whatever surrounds it:
    before a space, or after a newline, that stands alone between letters or digits. 0 if none."""
    for start in (max(0, len(text) - 4096), max(0, len(text) - BLOCK)):
        found = collections.deque(_CUT.finditer(text, start), maxlen=1)
        if found:
            return found[0].end() - (found[0][0] == " ")
    return 0


def pieces(text: str) -> Iterator[str]:
    """`text` in pieces of about BLOCK characters, cut at safe places as far as there are any."""
    start = 0
    while len(text) - start > 2 * BLOCK:
        cut = safe_cut(text[start:start + BLOCK])
        if not cut:
            break
        yield text[start:start + cut]
        start += cut
    yield text[start:]


_CUT = re.compile(r"(?<=[^\W_])[ \n](?=[^\W_])")


def _whole(place: Input, read: _Counter) -> Iterator[tuple[str, bool]]:
    """A text file as one document, in parts."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, seen = "", 0
    with _opened(place, read) as stream:
        while block := stream.read(BLOCK):
            text += _decode(place, decoder, block, seen, final=False)
            seen += len(block)
            if len(text) >= BLOCK and (cut := safe_cut(text)):
                yield text[:cut], False
                text = text[cut:]
        yield text + _decode(place, decoder, b"", seen, final=True), True


def _decode(place: Input, decoder: Any, block: bytes, seen: int, final: bool) -> str:
    kept = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(place.name, f"byte {seen - kept + error.start:,}",
                                   error)) from None


def _lines(place: Input, read: _Counter) -> Iterator[tuple[str, bool]]:
    """One document a line, under the key `text`."""
    with _opened(place, read) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _line(f"{place.name}:{number}", line), True


def _line(where: str, line: bytes) -> str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(where, f"byte {error.start:,} of the line", error)) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}); a .jsonl file holds one object a "
                         'line, like {"text": "..."}') from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        has = ", ".join(list(row)[:8]) or "none" if isinstance(row, dict) else "not an object"
        raise ValueError(f"{where}: no string under the key text (keys: {has}); rename the key "
                         "that holds the text to text")
    if not row["text"].isascii():
        _check_surrogates(where, row["text"])
    return row["text"]


def _check_surrogates(where: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half of a surrogate pair (\\u{ord(text[error.start]):04x}) is "
                         "not a character; remove it or write both halves") from None


def _parquet(place: Input, read: _Counter) -> Iterator[tuple[str, bool]]:
    """One document a row, from the column `text`; rows without text are passed over as empty."""
    try:
        with pyarrow.parquet.ParquetFile(place.path) as file:
            _check_column(place, file.schema_arrow)
            total = max(1, file.metadata.num_rows)
            rows = 0
            for batch in file.iter_batches(batch_size=256, columns=["text"], use_threads=False):
                rows += batch.num_rows
                read.bytes = (place.size or 0) * rows // total
                for text in batch.column(0).to_pylist():
                    yield text or "", True
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{place.name} cannot be read as parquet ({_first_line(error)}); "
                         "fetch or write the file again") from None
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(place.name, "a value of column text", error)) from None


def _check_column(place: Input, schema: pyarrow.Schema) -> None:
    if "text" not in schema.names:
        raise ValueError(f"{place.name} has no column text (columns: {', '.join(schema.names)}); "
                         "rename the one that holds the text to text")
    kind = schema.field("text").type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
            or pyarrow.types.is_string_view(kind)):
        raise ValueError(f"{place.name}: column text holds {kind}, not strings; "
                         "convert the column to strings")


def _hub(place: Input) -> Iterator[tuple[str, bool]]:
    """The split `train` of a Hugging Face data set, streamed without storing it."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{place.name} needs the datasets library; "
                         "run: pip install 'fira-moe[hub]'") from None
    name, _, config = place.name[len("hub:"):].partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{place.name} cannot be opened ({_first_line(error)}); check the name, "
                         "the config and the network") from error
    for number, row in enumerate(rows):
        if not isinstance(row.get("text"), str):
            raise ValueError(f"{place.name} row {number}: no string under text (it has: "
                             f"{', '.join(row)}); choose a data set with a column text")
        yield row["text"], True


@contextlib.contextmanager
def _opened(place: Input, read: _Counter) -> Iterator[BinaryIO]:
    """The uncompressed bytes of a file, without a byte order mark, counting what is read."""
    try:
        with open(place.path, "rb") as raw:
            stream = io.BufferedReader(_Counted(raw, read), BLOCK)
            opened = io.BufferedReader(_uncompress(place.ending, stream), BLOCK)
            if opened.peek(3)[:3] == codecs.BOM_UTF8:
                opened.read(3)
            yield opened
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{place.name} cannot be read to its end ({_first_line(error)}); "
                         "check the file or fetch it again") from None


def _uncompress(ending: str, stream: BinaryIO) -> Any:
    if ending.endswith(".gz"):
        return gzip.GzipFile(fileobj=stream)
    if ending.endswith(".xz"):
        return lzma.LZMAFile(stream)
    if ending.endswith(".zst"):
        return pyarrow.CompressedInputStream(stream, "zstd")
    return stream


class _Counted(io.RawIOBase):
    """A file that tells a counter how much of it was read."""

    def __init__(self, raw: BinaryIO, read: _Counter):
        self.raw, self.count = raw, read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self.raw.readinto(buffer)  # type: ignore[attr-defined]
        self.count.bytes += size
        return size


def _not_utf8(name: str, where: str, error: UnicodeDecodeError) -> str:
    value = error.object[error.start]
    return (f"{name} is not UTF-8 text: 0x{value:02x} at {where}; convert it first, for example: "
            "iconv -f latin1 -t utf-8 FILE > NEW")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
