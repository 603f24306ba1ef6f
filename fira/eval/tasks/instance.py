"""One question of a generator, with the steps that lead to its answer.

Questions are written for small models: a statement a line, and a name or digit for each token of
the byte-level vocabularies used here. A step names the statement that it uses, so that it is found
by its content and not by its place. What it computes from stands just before its result: a sum mod
10 tells nothing about either digit, so a model that must find both and add them at once learns
nothing for long (steps like b4=7 were not learned from 840,000 tokens, b3+4=7 from 500,000).
"""
from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LETTERS = string.ascii_lowercase


class Instance(NamedTuple):
    """A question and its answer. `steps` are the lines of a right trace. `canonical` is the same
    for questions that differ in names and in the order of statements only. `shortcut` is what is
    answered without the steps. `needs` has every right line, not only those of the trace, with the
    lines that it needs before it; without it only the trace itself is right."""

    question: str
    steps: Sequence[str]
    answer: str
    canonical: str
    shortcut: str
    needs: Mapping[str, Sequence[str]] | None = None

    def is_right(self, thought: str) -> bool:
        """Whether each line of `thought` is a right step after the lines that it needs, and the
        last step of the trace is among them."""
        lines = [line.strip() for line in thought.splitlines() if line.strip()]
        if self.needs is None:
            return lines == list(self.steps)
        known = set[str]()
        for line in lines:
            if line not in self.needs or not known.issuperset(self.needs[line]):
                return False
            known.add(line)
        return self.steps[-1] in known


def labels(rng: random.Random, count: int) -> str:
    """`count` neighboring letters of the alphabet, which z and a close to a ring."""
    begin = rng.randrange(len(LETTERS))
    return (LETTERS * 2)[begin:begin + count]


def names(rng: random.Random, count: int) -> list[str]:
    """`count` different letters."""
    return rng.sample(LETTERS, count)
