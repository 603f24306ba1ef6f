"""A run folder read back: the rows that training wrote, typed, and nothing else.

Reports read and never hook: whatever a report shows stands in config.json and metrics.jsonl, so any
run can be drawn again later, on another machine, while it trains or after it died in mid-line.
"""
from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fira.config import ConfigError, load_preset

NAN = math.nan


@dataclass(frozen=True)
class Step:
    """One optimizer step. `loss` is in nats per token, `tokens` and `seconds` are totals so far."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    seconds: float
    imbalance: float | None  # CV of expert load, mean over layers; None when dense
    dead: int
    skipped: int


@dataclass(frozen=True)
class Validation:
    step: int
    loss: float
    bits_per_byte: float
    seconds: float
    tokens: int


@dataclass(frozen=True)
class Routing:
    """The router's health at one step; lists run over layers, `load[layer][expert]` sums to 1."""

    step: int
    load: list[list[float]]
    cv: list[float]
    max_mean: list[float]
    entropy: list[float]
    dead: list[int]


@dataclass(frozen=True)
class Sample:
    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Event:
    step: int
    text: str


@dataclass
class Run:
    """Everything a report needs. `notes` are things the reader of the report should be told."""

    path: Path
    about: dict[str, Any]  # config.json: config, preset, argv, versions, commit, ...
    steps: list[Step] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    routings: list[Routing] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def parameters(self) -> dict[str, int]:
        """Parameter counts, `total` and `active`, where the run wrote them down; else empty."""
        return self.about.get("parameters") or {}

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved configuration, dotted key -> value."""
        return _flat(self.about.get("config") or {})

    @property
    def best(self) -> Validation | None:
        finite = [row for row in self.validations if math.isfinite(row.bits_per_byte)]
        return min(finite, key=lambda row: row.bits_per_byte, default=None)


def read_run(folder: str | Path) -> Run:
    """Read `folder`. Raises ValueError, one line, if it is not a run or a row inside is damaged."""
    folder = Path(folder)
    _refuse_other_folders(folder)
    run = Run(folder, _read_about(folder / "config.json"))
    rows: dict[Any, tuple[list[Any], Any]] = {
            "step": (run.steps, _step), "validation": (run.validations, _validation),
            "routing": (run.routings, _routing), "sample": (run.samples, _sample),
            "event": (run.events, _event)}
    for number, row in _read_lines(folder / "metrics.jsonl", run.notes):
        if row.get("kind") in rows:  # other kinds belong to stages this report does not draw
            place, make = rows[row["kind"]]
            place.append(_typed(make, row, folder / "metrics.jsonl", number))
    return run


def differences(run: Run) -> list[tuple[str, Any, Any]]:
    """(key, preset's value, this run's value) for every setting in which the run left its preset.

    Where the preset left a key to its default and the command line set it, its value there is None.
    """
    given = {word.partition("=")[0] for word in run.about.get("argv") or [] if "=" in word}
    preset = run.about.get("preset")
    try:
        base = _flat(load_preset(preset)) if preset else {}
    except ConfigError as error:
        run.notes.append(f"settings are not compared with the preset: {error}")
        base = {}
    return [(key, base.get(key), value) for key, value in run.settings.items()
            if (key in base and base[key] != value) or (key in given and key not in base)]


def _refuse_other_folders(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file, not a run folder" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}; give a folder that `fira train` wrote, "
                         "for example out/tiny")
    missing = [name for name in ("config.json", "metrics.jsonl") if not (folder / name).is_file()]
    if missing and folder.resolve().name.startswith("step-"):
        raise ValueError(f"{folder} is a step folder, a report needs the whole run; "
                         f"give {folder.resolve().parent}")
    if missing:
        inside = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
        remedy = f"; give one of the runs inside: {', '.join(inside[:5])}" if inside else \
            "; give a folder that `fira train` wrote, for example out/tiny"
        raise ValueError(f"{folder} is not a run folder (no {' and no '.join(missing)}){remedy}")


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it from a backup "
                         "or train the run again") from None
    if not isinstance(about, dict):
        raise ValueError(f"{path} holds no JSON object; restore it from a backup "
                         "or train the run again")
    return about


def _read_lines(path: Path, notes: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """Numbered rows; a last line cut short is left out and noted, another is an error."""
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            rows.append((number, row))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            if number < len(lines):
                raise ValueError(f"{path} line {number} is damaged ({error}); "
                                 "remove that line to read the rest") from None
            notes.append(f"the last line of {path.name} ({number}) is torn and left out: "
                         "the run was stopped while writing it")
    return rows


def _typed(make: Callable[[dict[str, Any]], Any], row: dict[str, Any], path: Path,
           number: int) -> Any:
    try:
        return make(row)
    except (KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} line {number}: a {row['kind']} row needs other fields ({what}); "
                         "remove that line to read the rest") from None


def _number(value: Any) -> float:
    """A float; what JSON cannot say of a number that is not finite is written as null."""
    return NAN if value is None else float(value)


def _step(row: dict[str, Any]) -> Step:
    imbalance = row.get("imbalance")
    return Step(int(row["step"]), _number(row["loss"]), _number(row["lr"]),
                _number(row["grad_norm"]), int(row["tokens"]),
                _number(row["tokens_per_second"]), _number(row["seconds"]),
                None if imbalance is None else float(imbalance),
                int(row.get("dead") or 0), int(row.get("skipped") or 0))


def _validation(row: dict[str, Any]) -> Validation:
    return Validation(int(row["step"]), _number(row["loss"]), _number(row["bits_per_byte"]),
                      _number(row["seconds"]), int(row["tokens"]))


def _routing(row: dict[str, Any]) -> Routing:
    load = [[float(share) for share in layer] for layer in row["load"]]
    routing = Routing(int(row["step"]), load, [_number(v) for v in row["cv"]],
                      [_number(v) for v in row["max_mean"]], [_number(v) for v in row["entropy"]],
                      [int(v) for v in row["dead"]])
    lengths = {len(routing.load), len(routing.cv), len(routing.max_mean), len(routing.entropy),
               len(routing.dead)}
    if len(lengths) != 1 or len({len(layer) for layer in load}) > 1:
        raise ValueError("its lists differ in length")
    return routing


def _sample(row: dict[str, Any]) -> Sample:
    return Sample(int(row["step"]), str(row["prompt"]), str(row["text"]))


def _event(row: dict[str, Any]) -> Event:
    return Event(int(row["step"]), str(row["text"]))


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
