"""Records of JSON, JSON lines, Parquet and the hub, each with its place."""
from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow.parquet

from fira.data import addresses
from fira.data.sources import DEFAULT, Input
from fira.data.text import ERRORS, check_text, hub_rows, lines_of, opened


def records(given: Sequence[Input]) -> Iterator[tuple[str, Any]]:
    """Every record of `given` and its place: the value in each line of JSON lines, each element of
    a JSON array, each row of a Parquet file or hub data set. Raises ValueError, one line with the
    place, for what cannot be read."""
    for where, row in unread_records(given):
        try:
            yield where, read_record(row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error.__cause__


def unread_records(given: Sequence[Input]) -> Iterator[tuple[str, Any]]:
    """`records`, but a line of JSON lines is still text, for `read_record`."""
    for place in given:
        where = place.name
        try:
            with contextlib.ExitStack() as stack:
                for number, row in _rows(place, stack):
                    where = f"{place.name}:{number}"
                    if not isinstance(row, str) or row.strip():
                        yield where, row
        except ERRORS as error:
            line = str(error).strip().split("\n")[0] or type(error).__name__
            rule = "check the name and the network" if place.ending == "hub" else (
                "write one JSON object per line")
            raise ValueError(f"{where}: cannot be read ({line}); {rule}") from error


def read_record(row: Any) -> Any:
    """What a line of JSON says; anything else as it is. Raises ValueError."""
    if not isinstance(row, str):
        return row
    check_text(row, DEFAULT.encoding)
    try:
        return json.loads(row)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read ({error}); write one JSON object per line") from error


def _rows(place: Input, stack: contextlib.ExitStack) -> Iterator[tuple[int, Any]]:
    """The number and the content of each record: an object, or a line of JSON."""
    rows: Iterable[Any]
    if place.ending == "hub":
        rows = (row for *_, row in hub_rows(place, DEFAULT))
    elif place.ending == "sotu":
        rows = ({"messages": messages} for messages in addresses.conversations())
    elif place.ending == ".parquet":
        file = stack.enter_context(pyarrow.parquet.ParquetFile(place.path))
        rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
    else:
        lines = (row for *_, row in lines_of(*stack.enter_context(opened(place, DEFAULT.encoding))))
        first = next(lines, "")
        rows = (json.loads("".join([first, *lines])) if first.lstrip().startswith("[")
                else itertools.chain([first], lines))
    yield from enumerate(rows, start=1)
