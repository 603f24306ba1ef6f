"""Contamination: how many consecutive tokens of each item of a task stand in the training data.

The runs of 8 tokens of all items are hashed and sorted. The training tokens pass by once; where a
run of theirs has the hash of one of the items, both are compared token by token, so a collision of
hashes costs time and is never reported.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fira.data.batches import Shards, Tokens
from fira.data.tokenizer import Tokenizer
from fira.eval.measure import mean
from fira.eval.statistics import wilson
from fira.eval.suites import open_task
from fira.eval.task import Row

SHORTEST = 8  # tokens of a run, a power of two
LEAKS = (8, 13)  # an item with such a run is left out; 13 as for GPT-3 (Brown et al. 2020, C)
CHUNK = 1 << 20  # training tokens at a time, which bounds the memory (0.2 GB beside the items)
FACTOR = 0x9E3779B97F4A7C15  # of the hash, a polynomial; any large odd number does
SHIFT = np.uint64(64 - 24)  # a table of the first 24 bits excludes most runs before the search
GAPS = 2**32 - 1, 2**32 - 2  # ids of no token, which end the parts of items and of training text


def add_leaks(result: dict[str, Any], folder: Path) -> Table:
    """Add to each task in a result of `measure`, as `leak`, the longest run that each item shares
    with the training text of a data folder, and the scores without those items; as a table.

    An item is its context and gold continuation, without examples before it. Raises ValueError, one
    line, if `folder` is no data folder or a task's file is gone.
    """
    table = Table("task", "items without", title=f"runs of tokens shared with {folder}",
                  title_justify="left", box=None)
    for title in ("n", "bits/byte", "accuracy", "95%"):
        table.add_column(title, justify="right")
    tokens, tokenizer, items = Shards(folder), Tokenizer.load(folder), []
    tasks = [(name, found, suite["protocol"]["tasks"][name]) for suite in result["suites"].values()
             for name, found in suite["tasks"].items()]
    for name, found, form in tasks:
        task = open_task(name, form["source"], len(found["correct"]), form["letters"])
        items += [tokenizer.encode_array(_text(row)) for row in task.rows]
    runs = longest_runs(items, tokens)
    for name, found, _ in tasks:
        own, runs = np.split(runs, [len(found["correct"])])
        found["leak"] = {"longest": own.tolist()}
        for title, least in (("-", np.inf), *((f"runs of {n}", n) for n in LEAKS)):
            right, bits = (
                [value for value, run in zip(found[key], own, strict=True)
                 if run < least and value is not None] for key in ("correct", "item_bits"))
            found["leak"][title] = {"n": len(right), "accuracy": mean(right),
                                    "bits_per_byte": mean(bits)}
            table.add_row(name, title, f"{len(right):,}", f"{mean(bits):.3f}" if bits else "-",
                          f"{mean(right):.1%}" if right else "-",
                          "{:.1%} to {:.1%}".format(*wilson(right)))
    return table


def _text(row: Row) -> str:
    """What of a row would give it away."""
    return ("\n".join([*(message["content"] for message in row.messages), row.answers[0]])
            if row.messages else "".join(row.options[row.gold]))


def longest_runs(items: Sequence[np.ndarray], tokens: Tokens) -> np.ndarray:
    """Length of the longest run of each item's ids that is in `tokens`; 0 if it is below 8."""
    found, longest = np.zeros(len(items), np.int64), max(map(len, items), default=0)
    if longest < SHORTEST:
        return found
    ids = np.concatenate([part for item in items for part in (item, [GAPS[0]])])
    owner = np.repeat(np.arange(len(items)), [len(item) + 1 for item in items])
    wanted, numbers = np.unique(_hashes(ids), return_inverse=True)
    table = np.zeros(1 << 24, bool)
    table[wanted >> SHIFT] = True
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start:start + CHUNK + longest]  # longer, so that no shared run is cut
        hashes = _hashes(part)
        places = np.flatnonzero(table[hashes >> SHIFT])
        nearest = np.searchsorted(wanted[:-1], hashes[places])
        equal, shared = wanted[nearest] == hashes[places], np.zeros(len(wanted), bool)
        shared[nearest[equal]] = True
        mine, where = _around(ids, np.flatnonzero(shared[numbers]), GAPS[0])
        theirs, _ = _around(part, places[equal], GAPS[1])
        _compare(mine, owner[where], theirs, found)
    return found


def _around(ids: np.ndarray, places: np.ndarray, gap: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids in runs that begin at `places`, a `gap` after each stretch of them; their indices."""
    inside = np.zeros(len(ids) + 1, bool)
    for offset in range(SHORTEST):
        inside[places + offset] = True
    marked = np.where(inside, np.append(ids, gap), gap).astype(np.uint64)
    inside[1:] |= inside[:-1]
    return marked[inside], np.flatnonzero(inside)


def _compare(mine: np.ndarray, owner: np.ndarray, theirs: np.ndarray, found: np.ndarray) -> None:
    """Raise `found[owner]` to the length of the longest run of `mine` that is in `theirs`.

    Each place has a number such that runs which begin at two places are equal exactly if their
    numbers are. Those of longer runs number pairs: of two runs, then of a run and the next id.
    """
    ids, length = np.concatenate([mine, theirs]), 1
    numbers = ids
    while length < SHORTEST:
        numbers, length = _number(numbers[:-length], numbers[length:]), 2 * length
    places = np.arange(len(numbers))
    while len(places):
        own = places < len(mine)
        seen = np.zeros((2, int(numbers.max()) + 1), bool)
        seen[0, numbers[own]] = seen[1, numbers[~own]] = True
        alive = (seen[0] & seen[1])[numbers]
        items = owner[places[alive & own]]
        found[items] = np.maximum(found[items], length)
        alive &= places + length < len(ids)
        places = places[alive]
        numbers, length = _number(numbers[alive], ids[places + length]), length + 1


def _number(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A number from 0 for each pair, equal for equal pairs."""
    return np.unique(first << np.uint64(32) | second, return_inverse=True)[1].astype(np.uint64)


def _hashes(ids: np.ndarray) -> np.ndarray:
    """The hash of the run that begins at each place."""
    hashes, length = ids.astype(np.uint64), 1
    while length < SHORTEST:
        hashes = hashes[:-length] * np.uint64(pow(FACTOR, length, 2**64)) + hashes[length:]
        length *= 2
    return hashes * np.uint64(FACTOR)  # the last id reaches the first bits, too
