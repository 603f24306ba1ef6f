"""Results of `fira eval` on tasks, as tables; those of a run are in its files eval*.json."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fira.files import MANIFEST, read_json

AGAIN = "copy the file again, or use another step"
CELLS: dict[str, Callable[[dict[str, Any]], str]] = {
    "n": lambda task: f"{task['n']:,}",
    "bits/byte": lambda task: _bits(task["bits_per_byte"]),
    "right": lambda task: _percent(task["accuracy"]),
    "95%": lambda task: _percent(*task["interval"]),
    "per byte": lambda task: _percent(task["accuracy_per_byte"]),
    "centred": lambda task: _percent(task["centred"]),
    "floors": lambda task: _percent(*task["floors"].values()),
    "": lambda task: "at chance" * task["at_chance"],
    "experts": lambda task: " ".join(
        f"{one['layer']}.{one['expert']} x{one['ratio']:.1f}"
        for one in (task["experts"] or {"over_used": []})["over_used"]),
    **{key: lambda task, key=key: _percent(*task.get("answers", {}).get(key, ()))  # type: ignore
       for key in ("pass@k", "maj@k", "cut off")},
    "tokens": lambda task: " + ".join("-" if mean is None else f"{mean:.0f}" for mean in
                                      task.get("answers", {}).get("tokens", ()))}
ANSWERED = ("pass@k", "maj@k", "cut off", "tokens")  # of a suite with generated answers
ON_SCREEN = ("n", "bits/byte", "right", "95%", "per byte", "floors", "", "experts")
ON_PAGE = ("n", "bits/byte", "right", "95%", "centred", "floors", "")
SPECIAL_ROWS = {  # what is said of rows that are not read as they are: the list of their numbers
    "have a continuation longer than the model reads and are left out": "left_out",
    "are longer than the model reads and lose the beginning of their context": "cut",
    "have a token across the border, which counts as the continuation's": "unsplit"}


def newest_step(folder: Path) -> Path:
    """The newest complete step of a run; `folder` itself if it has none."""
    steps = [path.parent for path in folder.glob(f"step-*/{MANIFEST}")]
    return max(steps, key=lambda path: (len(path.name), path.name), default=folder)


def read_results(run: Path, step: Path) -> tuple[list[tuple[str, str, str, dict[str, Any]]], str]:
    """File, name, protocol (of its SHA-256 12 digits) and content of each suite in the files
    eval*.json of a run that were measured with the weights of `step`; and a sentence on the files
    that were not, if there are any.

    Raises ValueError, one line, for a file that `fira eval --json` did not write.
    """
    manifest, found, others = step / MANIFEST, [], list[str]()
    files = read_json(manifest, AGAIN).get("files") or {} if manifest.is_file() else {}
    for path in sorted(run.glob("eval*.json")):
        content = read_json(path, "measure again with fira eval --json, or move it away")
        if "suites" not in content:  # of a text
            continue
        if content.get("model_sha256") not in {file.get("sha256") for file in files.values()}:
            others.append(path.name)
            continue
        try:
            for name, suite in content["suites"].items():
                suite_view(name, suite)
                found.append((path.name, name, suite["protocol"]["sha256"][:12], suite))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path} has a suite that cannot be shown ({error!r}); measure again "
                             "with fira eval --json, or move it away") from error
    return found, (f"{', '.join(others)}: of other weights than those of {step.name}, not shown; "
                   "measure again with fira eval --json" if others else "")


def suite_summary(name: str, suite: dict[str, Any]) -> str:
    """One line: the means over the tasks, rates in percent."""
    bits, accuracy, centred = ([task[key] for task in suite["tasks"].values()
                                if task[key] is not None]
                               for key in ("bits_per_byte", "accuracy", "centred"))
    return (f"{name}: {_mean(bits, 1, 3)} bits per byte, accuracy {_mean(accuracy)}, centred "
            f"{_mean(centred)}, {sum(task['at_chance'] for task in suite['tasks'].values())} of "
            f"{len(suite['tasks'])} tasks at chance")


def suite_view(name: str, suite: dict[str, Any], columns: tuple[str, ...] = ON_PAGE) -> Group:
    """The tasks of a suite below its summary, and what was not read whole; rates in percent."""
    usual = {task["experts"].get("relative_to", "the text of training")
             for task in suite["tasks"].values() if task["experts"] and "experts" in columns}
    missing = suite.get("missing")
    notes = [f"experts: load relative to that on {text}" for text in sorted(usual)]
    if drawn := [task["answers"] for task in suite["tasks"].values() if "answers" in task]:
        columns = (*columns, *ANSWERED[2 * (drawn[0]["samples"] == 1):])
        notes.append(f"k = {drawn[0]['samples']} answers to each row at temperature "
                     f"{drawn[0]['temperature']:g}; mean tokens of thought + answer")
    notes += [f"without {', '.join(missing)}, which are not there"] if missing else []
    table = Table("task", box=None, padding=(0, 1, 0, 0))
    for title in columns:
        table.add_column(title, justify="right")
    for label, task in suite["tasks"].items():
        table.add_row(label.partition("/")[2] or label, *(CELLS[key](task) for key in columns))
        for reason, key in SPECIAL_ROWS.items():
            if rows := task.get(key):
                numbers = ", ".join(str(row + 1) for row in rows[:3]) + ", ..." * (len(rows) > 3)
                notes.append(f"{label}: {len(rows):,} of {task['rows']:,} rows {reason}: {numbers}")
    return Group(Text(suite_summary(name, suite)), table, *map(Text, notes))


def show(result: dict[str, Any], *more: Table) -> None:
    """Print each suite, and more tables."""
    screen = Console(highlight=False)
    screen.width = max(screen.width, 120)
    for suite, content in result["suites"].items():
        screen.print(suite_view(suite, content, ON_SCREEN))
    screen.print(*more, sep="\n")


def _percent(*values: float | None) -> str:
    return " ".join("-" if value is None else f"{100 * value:.1f}" for value in values)


def _mean(values: list[float], factor: float = 100, digits: int = 1) -> str:
    return f"{factor * sum(values) / len(values):.{digits}f}" if values else "-"


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
