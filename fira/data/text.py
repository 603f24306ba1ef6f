"""Inputs become documents, streamed, so that memory does not grow with the corpus.

A .txt or .md file is one document; so is each line of a .jsonl file and each row of a .parquet file
(key or column `text`). A long text file is read in parts. It is cut only where every supported
pre-tokenizer splits anyway (tests/data/test_text.py proves it), so that the parts give the same
tokens as the whole.
"""
from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import pyarrow
import pyarrow.parquet

from fira.data import encoder
from fira.data.encoder import safe_cut, to_utf8
from fira.data.sources import Input, inputs

UNPACK: dict[str, Callable[[BinaryIO], Any]] = {
    "gz": lambda packed: gzip.GzipFile(fileobj=packed), "xz": lzma.LZMAFile,
    "zst": lambda packed: pyarrow.CompressedInputStream(packed, "zstd")}
Progress = Callable[[int, "int | None"], None]  # called with bytes of input read, and their total
Reader = Iterator[tuple[str, bool, int]]  # text, whether it ends its document, bytes of input read


class Item(NamedTuple):
    """A document, or a part of one."""

    text: str
    ends: bool = True  # whether this is the document's last part
    file: int = 0      # index of the input it comes from
    number: int = 0    # its index among the items of that input, where reading can resume
    done: int = 0      # bytes of all inputs read so far, for progress


def texts(sources: Sequence[str], progress: Progress | None = None) -> Iterator[str]:
    """The text of every document of `sources`; a long document comes in parts."""
    given = inputs(sources)
    total = total_bytes(given)
    for item in items(given):
        yield item.text
        if progress:
            progress(item.done, total)


def items(given: list[Input], file: int = 0, number: int = 0) -> Iterator[Item]:
    """Stream `given` from item `number` of input `file` on; empty documents are left out.

    Raises ValueError, one line with file and place, for text that is damaged or not UTF-8.
    """
    done = sum(one.size or 0 for one in given[:file])
    for index in range(file, len(given)):
        begun, read = False, 0  # begun: a part of a document was read, but not yet its last part
        for count, (text, ends, read) in enumerate(_read(given[index])):
            if (text or begun) and (index > file or count >= number):
                yield Item(text, ends, index, count, done + read)
            begun = not ends
        done += given[index].size or read


def group(stream: Iterable[Any], limit: int, size: Callable[[Any], int]) -> Iterator[list[Any]]:
    """The stream in lists, each ended by the thing that brings its `size` to `limit`."""
    things: list[Any] = []
    total = 0
    for thing in stream:
        things.append(thing)
        total += size(thing)
        if total >= limit:
            yield things
            things, total = [], 0
    if things:
        yield things


def total_bytes(given: list[Input]) -> int | None:
    """Bytes of all inputs; None if the size of one is not known in advance."""
    sizes = [one.size for one in given]
    return None if None in sizes else sum(size for size in sizes if size)


def _read(place: Input) -> Reader:
    if place.ending == "hub":
        return _hub(place)
    if place.ending == ".parquet":
        return _parquet(place)
    return _lines(place) if place.ending.startswith(".jsonl") else _whole(place)


def _whole(place: Input) -> Reader:
    """A text file as one document, in parts."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, seen = "", 0
    with _opened(place) as (stream, position):
        while block := stream.read(encoder.CHUNK):
            text += _decode(place, decoder, block, seen)
            seen += len(block)
            if len(text) >= encoder.CHUNK and (cut := safe_cut(text)):
                yield text[:cut], False, position()
                text = text[cut:]
        yield text + _decode(place, decoder, b"", seen), True, position()


def _decode(place: Input, decoder: Any, block: bytes, seen: int) -> str:
    """The next block as text; an empty one ends the file, `seen` bytes came before it."""
    kept = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        raise _not_utf8(place.name, f"byte {seen - kept + error.start:,}", error) from None


def _lines(place: Input) -> Reader:
    """One document per line, under the key `text`."""
    with _opened(place) as (stream, position):
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _line(f"{place.name}:{number}", line), True, position()


def _line(where: str, line: bytes) -> str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, f"byte {error.start:,} of the line", error) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}); a .jsonl file holds one object per "
                         'line, like {"text": "..."}') from None
    return _text_of(where, row)


def _text_of(where: str, row: Any) -> str:
    """The string under `text` in a row."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        has = ", ".join(list(row)[:8]) or "none" if isinstance(row, dict) else "not an object"
        raise ValueError(f"{where}: no string under the key text (keys: {has}); rename the key "
                         "that holds the documents to text")
    to_utf8(row["text"], where)
    return row["text"]


def _parquet(place: Input) -> Reader:
    """One document per row, from the column `text`; a null counts as an empty document."""
    try:
        with pyarrow.parquet.ParquetFile(place.path) as file:
            names, rows = file.schema_arrow.names, 0
            if "text" not in names:
                raise ValueError(f"{place.name} has no column text (columns: {', '.join(names)}); "
                                 "rename the column that holds the documents to text")
            for batch in file.iter_batches(batch_size=256, columns=["text"], use_threads=False):
                rows += batch.num_rows
                done = (place.size or 0) * rows // max(1, file.metadata.num_rows)
                for text in batch.column(0).to_pylist():
                    yield "" if text is None else _text_of(place.name, {"text": text}), True, done
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{place.name} cannot be read as parquet ({_first_line(error)}); "
                         "fetch or write the file again") from None
    except UnicodeDecodeError as error:
        raise _not_utf8(place.name, "a value of column text", error) from None


def _hub(place: Input) -> Reader:
    """The split `train` of a Hugging Face data set, streamed without storing it."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{place.name} needs the datasets library; "
                         "run: pip install 'fira-moe[hub]'") from None
    name, _, config = place.name.removeprefix("hub:").partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{place.name} cannot be opened ({_first_line(error)}); check the name, "
                         "the config and the network") from error
    done = 0
    for number, row in enumerate(rows):
        text = _text_of(f"{place.name} row {number}", row)
        done += len(text.encode())
        yield text, True, done


@contextlib.contextmanager
def _opened(place: Input) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """The uncompressed bytes of a file without a byte order mark, and how much of it was read."""
    try:
        with open(place.path, "rb", buffering=0) as file:
            buffered = io.BufferedReader(file, encoder.CHUNK)
            unpack = UNPACK.get(place.ending.rpartition(".")[2], lambda plain: plain)
            stream = io.BufferedReader(unpack(buffered), encoder.CHUNK)
            if stream.peek(3)[:3] == codecs.BOM_UTF8:
                stream.read(3)
            yield stream, file.tell
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{place.name} cannot be read to its end ({_first_line(error)}); "
                         "check the file or fetch it again") from None


def _not_utf8(name: str, where: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{name} is not UTF-8 text: 0x{error.object[error.start]:02x} at {where}; "
                      "convert it first, for example: iconv -f latin1 -t utf-8 FILE > NEW")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
