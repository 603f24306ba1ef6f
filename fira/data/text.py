"""Inputs become documents, streamed, so that memory does not grow with the corpus.

What is left out (null texts, rows that cannot be read, duplicates, what the filters refuse) passes
through the stream as items without text, so that it is counted once, also when an interrupted
preparation is continued.
"""
from __future__ import annotations

import collections
import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from fira.data.encoder import chunks, safe_cut
from fira.data.formats import Item, Reading, read_file
from fira.data.sources import Input, inputs

AS_THEY_ARE = Reading()
MOST_SYMBOLS = 0.4   # of the characters that are not blank: digits, ASCII punctuation, symbols
MOST_REPEATED = 0.2  # of the characters, in lines that were there before (Rae et al. 2021, A1)
_SYMBOL = re.compile(r"[!-@\[-`{-~\u2010-\u2bff]")


def texts(sources: Sequence[str]) -> Iterator[str]:
    """The text of every document of `sources`; a long document comes in parts."""
    return (item.text for item in items(inputs(sources)))


def items(given: list[Input], file: int = 0, number: int = 0) -> Iterator[Item]:
    """The documents of `given`, from item `number` of input `file` on; see `read`."""
    return (item for item in read(given, start=(file, number)) if not item.left_out)


def read(given: list[Input], how: Reading = AS_THEY_ARE, start: tuple[int, int] = (0, 0),
         held_out_from: int | None = None) -> Iterator[Item]:
    """Stream `given` from item start[1] of input start[0] on, with what is left out.

    Validation begins at character `held_out_from` of the whole text; the document there is cut in
    two. Raises ValueError, one line with file and place, for text that is damaged or in another
    encoding.
    """
    selection = _Selection(how, held_out_from)
    first = 0 if selection.depends else start[0]
    before = sum(one.size or 0 for one in given[:first])
    for file in range(first, len(given)):
        done = 0
        for number, item in enumerate(selection.items(given[file])):
            done = item.done
            if (file, number) >= start:
                yield item._replace(file=file, number=number, done=before + done)
        before += given[file].size or done


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


def unfit(text: str, how: Reading, seen: set[int]) -> str:
    """Why a document is to be left out, or ""; `seen` are hashes of the documents before.

    The rules of `how.quality` need no language: the share of symbols and of repeated lines.
    """
    if len(text) < how.min_chars:
        return f"shorter than {how.min_chars} characters"
    if how.quality:
        if len(_SYMBOL.findall(text)) > MOST_SYMBOLS * len("".join(text.split())):
            return "mostly symbols"
        lines = collections.Counter(map(str.strip, text.split("\n")))
        repeated = sum(len(line) * (count - 1) for line, count in lines.items())
        if repeated > MOST_REPEATED * len(text):
            return "with repeated lines"
    if how.deduplicate:
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        if key in seen:
            return "duplicate"
        seen.add(key)
    return ""


class _Selection:
    """What is taken of the inputs and what is held out, given all that came before."""

    def __init__(self, how: Reading, held_out_from: int | None):
        self.how, self.seen = how, set[int]()
        self.left = sys.maxsize if held_out_from is None else held_out_from  # characters
        self.depends = how.deduplicate or held_out_from is not None  # on the inputs before

    def items(self, place: Input) -> Iterator[Item]:
        """Of one input. A document that is read in parts is neither compared nor judged."""
        begun = False  # a part of a document was read, but not yet its last part
        try:
            for item in read_file(place, self.how):
                if item.problem and not self.how.skip_bad:
                    raise ValueError(item.problem)
                whole = item.text and item.ends and not begun
                if whole and (reason := unfit(item.text, self.how, self.seen)):
                    item = Item("", False, done=item.done, where=item.where, left_out=reason)
                if item.text or item.left_out or begun:
                    yield from self._parts(item)
                    begun = not item.ends and (begun or not item.left_out)
        except ValueError:
            if not self.how.skip_bad:
                raise
            yield Item("", False, where=place.name, left_out="unreadable")
        if begun:
            yield Item("")

    def _parts(self, item: Item) -> Iterator[Item]:
        """An item in parts that are not too long, and cut where validation begins."""
        *parts, last = chunks(item.text)
        for text, ends in [*((part, False) for part in parts), (last, item.ends)]:
            left, self.left = self.left, self.left - len(text)
            if self.left <= 0 < left:
                cut = safe_cut(text[:left]) or left
                yield item._replace(text=text[:cut], ends=True)
                text = text[cut:]
            yield item._replace(text=text, ends=ends, held_out=self.left <= 0)
