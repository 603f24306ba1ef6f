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
TEXTS = ("kind", "score", "prompt", "text")


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
    """The values of `key` in `rows`; NaN where it is null (not finite), missing or no number."""
    return np.array([value if isinstance(value := row.get(key), int | float) else np.nan
                     for row in rows])


def read_run(folder: str | Path) -> Run:
    """Read `folder`. Raises ValueError, one line, if it is not a run or a row inside is damaged.

    A last line that is incomplete, because the run still writes it or was killed, is left out.
    """
    folder = Path(folder)
    _check_folder(folder)
    about = read_json(folder / CONFIG, "restore it from a backup or train the run again")
    rows = list(read_rows(folder))
    for number, row in enumerate(rows, 1):
        if fault := _fault(row):
            raise ValueError(f"{folder / METRICS} line {number} is damaged ({fault}); remove that "
                             "line to read the rest")
    return Run(folder, about, *([row for row in rows if row["kind"] == kind] for kind in NEEDED))


def _fault(row: Row) -> str:
    """Why a row cannot be drawn; "" if it can."""
    needed = NEEDED.get(row["kind"], ())
    if missing := [key for key in needed if key not in row]:
        return f"it has no {missing[0]}"
    try:
        fits = all(isinstance(row.get(key, ""), str) for key in TEXTS) and all(
            0 <= row[key] < 1 << 53 for key in needed if key in ("step", "tokens", "seconds"))
        if row["kind"] == "routing":
            load, rest = np.array(row["load"]), np.array([row[key] for key in needed[2:]])
            fits &= (load.ndim == 2 and load.size > 0 and rest.shape == (4, len(load))
                     and {load.dtype.kind, rest.dtype.kind} <= {"i", "f"} and bool(load.min() >= 0))
    except (TypeError, ValueError):  # no number, or lists of unequal lengths
        fits = False
    return "" if fits else f"a value of its kind {row['kind']} cannot be drawn"


def _check_folder(folder: Path) -> None:
    missing = [name for name in (CONFIG, METRICS) if not (folder / name).is_file()]
    remedy = "give a folder that `fira train` wrote, for example out/tiny"
    if inside := sorted(path.parent.name for path in folder.glob(f"*/{METRICS}")):
        remedy = f"give one of the runs inside: {', '.join(inside[:5])}"
    elif folder.resolve().name.startswith("step-"):
        remedy = f"give the whole run: {folder.resolve().parent}"
    if missing:
        raise ValueError(f"{folder} is not a run folder (no {' and no '.join(missing)}); {remedy}")
