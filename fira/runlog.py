"""What a run writes while it goes: metrics.jsonl, training_log.csv, the live line on the console.

metrics.jsonl is the record; everything else (CSV, plots, reports) can be made from it. Rows are
written one by one, so a killed run loses none, and `resume` cuts the record back to a checkpoint.
"""
from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column

from fira import files

METRICS, TABLE, TUNING = "metrics.jsonl", "training_log.csv", "tuning.json"
REASON = "reason.json"  # in the folder of a showcase
TRACKED = "tracker.json"  # which run of a tracker this is
AFTER_SAVE = ("validation", "sample", "average", "stop")  # rows that a resumed run writes again
NOT_IN_TABLE = ("kind", "score", "lower_is_better")
Row = dict[str, Any]


class RunLog:
    """Appends rows to a run folder. `sinks` are called with every row (trackers, tests).

    training_log.csv is made from the record at every checkpoint and at the end. It has a line for
    each step and a column for each value that any step has; what a validation found stands in the
    line of its step, in columns named val_NAME. Every method raises ValueError if the disk is full.
    """

    def __init__(self, folder: Path, sinks: tuple[Callable[[Row], None], ...] = ()) -> None:
        self.folder, self.sinks = folder, sinks
        self._metrics = open(folder / METRICS, "ab", buffering=0)
        files.sync(folder)

    @classmethod
    def resume(cls, folder: Path, step: int, say: Any = print, **options: Any) -> RunLog:
        """Continue the record of a run whose checkpoint is `step`: later rows are dropped.

        Rows written after that checkpoint was saved (its own evaluation too) are dropped as well,
        since the resumed run writes them again. Sinks receive the rows of `step` once more. A
        record with damaged lines is kept under another name, which `say` reports; it continues
        without them.
        """
        path, faults = folder / METRICS, list[str]()
        kept = [row for row in read_rows(folder, faults.append)
                if row["step"] < step or (row["step"] == step and row["kind"] not in AFTER_SAVE)]
        if faults:
            shutil.copyfile(path, aside := files.free_name(path))
            say(f"{faults[0]}{f' and {len(faults) - 1} more' if faults[1:] else ''}; damaged lines "
                f"are left out, and the record as it was is now {aside}")
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        log = cls(folder, **options)
        for row in kept:
            for sink in log.sinks if row["step"] == step else ():
                sink(row)
        return log

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add one row; it has left this process when the call returns."""
        row = {"kind": kind, "step": step, **values}
        line = json.dumps(row).encode() + b"\n"
        with _explained(self.folder):
            while line:  # a disk that is nearly full takes a part
                line = line[self._metrics.write(line):]
            for sink in self.sinks:
                sink(row)

    def sync(self) -> None:
        """Put the record on the disk itself, before a checkpoint that relies on it."""
        with _explained(self.folder):
            os.fsync(self._metrics.fileno())
            write_table(self.folder)

    def close(self) -> None:
        self.sync()
        self._metrics.close()


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turns an OSError into a ValueError that says how to go on."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write the record of {folder}: {error.strerror or error}; the "
                         "newest checkpoint is whole: free some disk space and continue with "
                         "--resume") from error


def write_table(folder: Path) -> None:
    """Make training_log.csv from the record."""
    lines: list[Row] = []
    for row in read_rows(folder):
        values = {name: value for name, value in row.items() if name not in NOT_IN_TABLE}
        if row["kind"] == "step":
            lines.append(values)
        elif row["kind"] == "validation" and lines and lines[-1]["step"] == row["step"]:
            lines[-1] |= {f"val_{name}": value for name, value in values.items()
                          if name not in ("step", "tokens", "seconds")}
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)))
    table.writeheader()
    table.writerows(lines)
    files.write_text(folder / TABLE, text.getvalue())


class NoLog:
    """The record of a rank that keeps none: the first rank writes what all of them did."""

    def write(self, *_: Any, **__: Any) -> None:
        pass

    sync = close = write


def read_rows(folder: Path, skip: Callable[[str], None] | None = None) -> Iterator[Row]:
    """Rows of a run's record, oldest first. A last line that is not finished, because the run still
    writes it or was killed, is left out. Any other line that is no row raises ValueError, one line;
    with `skip` all of these are left out and reported to it."""
    path = folder / METRICS
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            whole, faults = line.endswith(b"\n"), []
            try:
                row = dict(json.loads(line))
                faults = [f"it has no {key}" for key, kind in (("kind", str), ("step", int))
                          if not isinstance(row.get(key), kind)]
            except (ValueError, TypeError, RecursionError) as error:
                faults = [str(error)]
            fault = f"{path} line {number} is damaged ({(faults or ['it has no end'])[0]})"
            if whole and not faults:
                yield row
            elif skip:
                skip(fault)
            elif whole:
                raise ValueError(f"{fault}; remove that line to read the rest")


def tracker(folder: Path, step: int, config: dict[str, Any]) -> tuple[Callable[[Row], None], ...]:
    """Sinks for the tracker that the run's resolved `config` names: none, tensorboard or wandb
    (both in the `track` extra). What was sent from `step` on is sent again and replaces it."""
    settings = config["train"]
    try:
        if settings["track"] == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

            def write(row: Row) -> None:
                for name, value in _scalars(row):
                    writer.add_scalar(name, value, row["step"])
                writer.flush()
            return (write,)
        if settings["track"] == "none":
            return ()
        import wandb
    except ImportError:
        raise ValueError(f"train.track={settings['track']} needs a package that is not installed; "
                         "pip install 'fira-moe[track]', or use train.track=none") from None
    if not (folder / TRACKED).exists():
        files.write_json(folder / TRACKED, {"wandb": uuid.uuid4().hex})
    known = files.read_json(folder / TRACKED, "delete it, and a new wandb run begins")
    run = wandb.init(project=settings["track_project"], dir=str(folder), config=config,
                     name=settings["track_name"] or folder.resolve().name, id=known.get("wandb"),
                     resume="allow")
    return (lambda row: run.log(dict(_scalars(row)), step=row["step"]),)


def _scalars(row: Row) -> list[tuple[str, float]]:
    return [(f"{row['kind']}/{name}", value) for name, value in row.items()
            if isinstance(value, int | float) and name not in ("step", "kind")]


def console(**options: Any) -> Console:
    """Where progress and messages go: standard error, so that output can be piped."""
    return _Screen(**{"stderr": True, "highlight": False, "markup": False} | options)


def visible(text: str) -> str:
    """`text` with its control characters written out, so that a terminal shows an escape sequence
    from a prompt, a model or a file name and does not obey it. Tabs and newlines stay."""
    return re.sub(r"[^\t\n -~\xa0-\ud7ff\ue000-\U0010ffff]",
                  lambda found: f"\\x{ord(found[0]):02x}", text)


class _Screen(Console):
    """A console that gives a terminal `visible` text, and its own control codes as they are."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for part in super().render(renderable, options):
            plain = part.control or not self.is_terminal
            yield part if plain else part._replace(text=visible(part.text))


class ProgressLine:
    """The live display of long work: a bar on a terminal, now and then a plain line elsewhere."""

    def __init__(self, title: str, screen: Console, plain_every: float = 10.0) -> None:
        self.title, self.screen, self.plain_every = title, screen, plain_every
        self._last_plain, self._ended = -plain_every, False
        bar = [BarColumn(bar_width=8)] if screen.width >= 100 else []  # the numbers come first
        name, share, time_left = (Column(no_wrap=True, min_width=width)
                                  for width in (len(title), 4, 5))
        self._bar = Progress(TextColumn("[bold]{task.description}", table_column=name), *bar,
                             TaskProgressColumn(table_column=share),
                             TimeRemainingColumn(compact=True, table_column=time_left),
                             TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
                             console=screen, disable=not screen.is_terminal)
        self._task = self._bar.add_task(title, total=1.0, note="")

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, fraction: float, note: str, seconds: float) -> None:
        """Show progress: `fraction` done in 0..1, a short note, seconds of work so far."""
        self._bar.update(self._task, completed=min(fraction, 1.0), note=note)
        ends = fraction >= 1.0 and not self._ended  # a reader may be done long before the work is
        if not self.screen.is_terminal and (seconds - self._last_plain >= self.plain_every or ends):
            self._last_plain, self._ended = seconds, self._ended or ends
            self.screen.print(f"{self.title} {fraction:4.0%}  {note}", soft_wrap=True)
