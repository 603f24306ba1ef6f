"""What a tuning changed, from the run's tuning.json: for the terminal, the page and the card."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fira.files import read_json
from fira.runlog import TUNING

HEAD = "measure", "before", "after", "change"
SHOWN_TEXT = 160  # characters of an answer
CAPTION = ("±: a 95% interval; *: without 0. Answers are greedy, to held-out prompts, "
           "within 256 tokens or half of what the model reads. Experts kept: the share of tokens "
           "with the same set of experts.")


def read_tuning(folder: Path) -> dict[str, Any]:
    """The record; empty if the run has none."""
    path = folder / TUNING
    return read_json(path, "tune again, or delete it") if path.is_file() else {}


def tuning_rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A table with the columns HEAD, which CAPTION explains."""
    for row in found.get("measures", ()):
        yield row["measure"], *(_shown(row[name], name == "change") for name in HEAD[1:])


def tuning_view(found: dict[str, Any]) -> RenderableType:
    """The record for a terminal: the table, and the answers to fixed prompts below."""
    table = Table(*HEAD, title="What the tuning changed", title_style="bold",
                  title_justify="left", box=None, padding=(0, 2, 0, 0), caption=CAPTION,
                  caption_justify="left")
    for row in tuning_rows(found):
        table.add_row(*map(Text, row))
    answers = [Text.assemble((f"\n{prompt}", "bold"), *(
        f"\n{when}: {' '.join(text.split())[:SHOWN_TEXT] or '(nothing)'}"
        for when, text in zip(HEAD[1:3], texts, strict=True)))
        for prompt, *texts in found.get("samples", ())]
    return Group(table, *answers)


def _shown(value: Any, signed: bool) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    middle, low, high = value
    mark = "*" * (signed and not low <= 0 <= high)
    return f"{middle:{'+' * signed}.4f}{mark} ±{max(high - middle, middle - low):.2g}"
