"""Reads a run folder: config.json and the rows of metrics.jsonl, which stay plain dicts.

Training never calls this package. Reports are made from these two files alone, so a run can be
drawn later, on another machine, while it trains, or after it was killed.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fira.files import read_json
from fira.runlog import METRICS, Row, read_rows

CONFIG = "config.json"
# The fields that a report needs of each kind of row; rows of other kinds are ignored.
NEEDED = {"step": ("step", "loss", "lr", "tokens", "tokens_per_second", "seconds"),
          "validation": ("step", "tokens", "seconds"),
          "routing": ("step", "load", "cv", "max_mean", "entropy", "dead"),
          "sample": ("step", "prompt", "text"),
          "event": ("step", "text")}


@dataclass
class Run:
    """A run folder as read."""

    path: Path
    about: dict[str, Any]  # config.json: config, preset, argv, versions, commit, ...
    steps: list[Row]
    validations: list[Row]
    routings: list[Row]
    samples: list[Row]
    events: list[Row]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def score(self) -> str:
        """The name of the validation score. Rows of older versions name none: bits per byte."""
        return (self.validations or [{}])[-1].get("score", "bits_per_byte")

    @property
    def lower_is_better(self) -> bool:
        return (self.validations or [{}])[-1].get("lower_is_better", True)

    @property
    def best(self) -> Row | None:
        """The validation row with the best finite score."""
        scores = numbers(self.validations, self.score) * (1 if self.lower_is_better else -1)
        finite = np.isfinite(scores)
        return self.validations[np.where(finite, scores, np.inf).argmin()] if any(finite) else None


def numbers(rows: list[Row], key: str) -> np.ndarray:
    """The values of `key` in `rows`; NaN where it is null (not finite) or missing."""
    return np.array([row.get(key) for row in rows], dtype=float)


def read_run(folder: str | Path) -> Run:
    """Read `folder`. Raises ValueError, one line, if it is not a run or a row inside is damaged.

    A last line that is incomplete, because the run still writes it or was killed, is left out.
    """
    folder = Path(folder)
    _check_folder(folder)
    about = read_json(folder / CONFIG, "restore it from a backup or train the run again")
    rows = list(read_rows(folder))
    for number, row in enumerate(rows, 1):
        if missing := [key for key in NEEDED.get(row["kind"], ()) if key not in row]:
            raise ValueError(f"{folder / METRICS} line {number} is damaged (it has no "
                             f"{missing[0]}); remove that line to read the rest")
    return Run(folder, about, *([row for row in rows if row["kind"] == kind] for kind in NEEDED))


def _check_folder(folder: Path) -> None:
    missing = [name for name in (CONFIG, METRICS) if not (folder / name).is_file()]
    remedy = "give a folder that `fira train` wrote, for example out/tiny"
    if inside := sorted(path.parent.name for path in folder.glob(f"*/{METRICS}")):
        remedy = f"give one of the runs inside: {', '.join(inside[:5])}"
    elif folder.resolve().name.startswith("step-"):
        remedy = f"give the whole run: {folder.resolve().parent}"
    if missing:
        raise ValueError(f"{folder} is not a run folder (no {' and no '.join(missing)}); {remedy}")
