"""The verb `fira tasks`: a file of conversations, and a table of what is in it."""
from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tokenizers import Regex, pre_tokenizers

from fira.data.encoder import QWEN2
from fira.eval.tasks.generate import FAMILIES, TEST_SHARE, floors, make, record
from fira.files import write_text

PIECES = pre_tokenizers.Split(Regex(QWEN2), "isolated")  # each is at least one token


def write_tasks(specs: Sequence[str], out: Path, screen: Console, rows: int, split: str, seed: int,
                direct: bool) -> None:
    """Write `rows` conversations of each spec to `out`. Raises ValueError if there are none."""
    table = Table("task", box=None, padding=(0, 1, 0, 0))
    for title in ("rows", "majority %", "shortcut %", "question, tokens", "steps, tokens"):
        table.add_column(title, justify="right")
    lines = []
    for made in (one for spec in specs for one in make(spec, rows, split, seed)):
        if made.missing:
            screen.print(f"{made.name}: only {len(made.instances)} different questions are of the "
                         f"split {split}, {made.missing} fewer than asked for", soft_wrap=True)
        lines += [json.dumps(record(key, one, direct)) for key, one in made.instances.items()]
        if made.instances:
            table.add_row(
                made.name, f"{len(made.instances):,}",
                *(f"{100 * share:.1f}" for share in floors(made).values()),
                *(f"{sum(map(_count, texts)) / len(texts):.1f}" for texts in (
                    [one.question for one in made.instances.values()],
                    ["\n".join(one.steps) for one in made.instances.values()])))
    if not lines:
        raise ValueError(f"{' '.join(specs)}: the split {split} has no questions of such small "
                         "depths; try a larger depth")
    write_text(out, "".join(f"{line}\n" for line in lines))
    screen.print(table)
    screen.print(f"wrote {len(lines):,} conversations to {out}; tokens are at least the words, "
                 "digits and signs that are counted here", soft_wrap=True)


def list_tasks(screen: Console) -> None:
    """Print every task with its depths, what is asked, and an example with its steps."""
    for name, (family, largest) in FAMILIES.items():
        one = family(random.Random(name), min(3, largest))
        screen.print(f"{name}:1-{largest}  {' '.join((family.__doc__ or '').split())}",
                     soft_wrap=True)
        table = Table("question", "steps", "answer", box=None, padding=(0, 3, 0, 2))
        table.add_row(one.question, "\n".join(one.steps), one.answer)
        screen.print(table, "")
    screen.print(f"One in {TEST_SHARE} forms of questions is of the split test.")


def _count(text: str) -> int:
    return len(PIECES.pre_tokenize_str(text))
