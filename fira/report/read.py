"""Reads a run folder: config.json and the rows of metrics.jsonl, which stay plain dicts.

Training never calls this package. Everything that a report shows is read from these two files, so
that any run can be drawn later, on another machine, while it trains, or after it was killed.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fira.config import ConfigError, load_preset
from fira.runlog import METRICS, Row, read_rows

CONFIG = "config.json"
# The fields that a report needs of each kind of row; it leaves out rows of other kinds.
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
    notes: list[str]  # warnings for the reader of the report
    steps: list[Row]
    validations: list[Row]
    routings: list[Row]
    samples: list[Row]
    events: list[Row]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved configuration, dotted key -> value."""
        return _flatten(self.about.get("config") or {})

    @property
    def parameters(self) -> dict[str, int]:
        """`total` and `active`, the parameters that one token uses; empty if not recorded."""
        return self.about.get("parameters") or {}

    @property
    def score(self) -> str:
        """The name of the validation score."""
        return _score(self.validations[-1]) if self.validations else "bits_per_byte"

    @property
    def lower_is_better(self) -> bool:
        return not self.validations or self.validations[-1].get("lower_is_better", True)

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
    """Read `folder`. Raises ValueError, one line, if it is not a run or a row inside is damaged."""
    folder = Path(folder)
    _check_folder(folder)
    path, rows = folder / METRICS, []
    try:
        about = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} holds no JSON object ({error}); restore it from a "
                         "backup or train the run again") from None
    try:
        for row in read_rows(folder):
            _check_row(row)
            rows.append(row)
    except ValueError as error:
        raise ValueError(f"{path} line {len(rows) + 1} is damaged ({error}); "
                         "remove that line to read the rest") from None
    whole = path.stat().st_size == 0 or path.read_bytes().endswith(b"\n")
    notes = [] if whole else [f"the last line of {METRICS} is incomplete and left out: the run was "
                              "stopped while writing it"]
    return Run(folder, about, notes,
               *([row for row in rows if row["kind"] == kind] for kind in NEEDED))


def differences(run: Run) -> list[tuple[str, Any, Any]]:
    """(key, value in the preset, value in this run) for every setting that differs.

    A setting of the command line that the preset does not name has None as the preset's value.
    """
    given = {word.partition("=")[0] for word in run.about.get("argv") or [] if "=" in word}
    preset = run.about.get("preset")
    try:
        base = _flatten(load_preset(preset)) if preset else {}
    except ConfigError as error:
        run.notes.append(f"settings are not compared with the preset: {error}")
        base = {}
    return [(key, base.get(key), value) for key, value in run.settings.items()
            if (key in base and base[key] != value) or (key in given and key not in base)]


def _check_folder(folder: Path) -> None:
    missing = [name for name in (CONFIG, METRICS) if not (folder / name).is_file()]
    inside = sorted(path.parent.name for path in folder.glob(f"*/{METRICS}"))
    remedy = "give a folder that `fira train` wrote, for example out/tiny"
    if inside:
        remedy = f"give one of the runs inside: {', '.join(inside[:5])}"
    elif folder.resolve().name.startswith("step-"):
        remedy = f"give the whole run: {folder.resolve().parent}"
    if missing:
        raise ValueError(f"{folder} is not a run folder (no {' and no '.join(missing)}); {remedy}")


def _check_row(row: Any) -> None:
    if not isinstance(row, dict) or "kind" not in row:
        raise ValueError("not a JSON object with a kind")
    needed = {*NEEDED.get(row["kind"], ()), *([_score(row)] * (row["kind"] == "validation"))}
    if missing := sorted(needed - row.keys()):
        raise ValueError(f"a {row['kind']} row needs {', '.join(missing)}")


def _score(validation: Row) -> str:
    """The name of its score; rows of older versions name none and hold bits per byte."""
    return str(validation.get("score", "bits_per_byte"))


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
