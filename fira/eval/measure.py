"""A model's results on tasks: accuracy, bits per byte, floors, an interval, the experts' load."""
from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fira.convert.files import Loaded
from fira.eval.answers import Asking, answer
from fira.eval.experts import GeneralLoad, general_load, over_used
from fira.eval.score import Loads, Window, encode_rows, score
from fira.eval.statistics import mean, wilson
from fira.eval.suites import open_suite, open_task
from fira.eval.task import Row, Task
from fira.eval.tasks.generate import is_spec, open_tasks, task_names
from fira.files import read_json, sha256, write_text
from fira.infer.load import load
from fira.model import build
from fira.model.files import ADAPTER, WEIGHTS
from fira.model.generate import window_length
from fira.runlog import ProgressLine
from fira.runtime import keep_large_blocks, versions

RULE = ("after end-of-text, context and continuation are encoded together; the likeliest "
        "continuation, also per byte without white space at its ends; a tie is shared; a gold text "
        "is right if each of its tokens is the likeliest; an answer follows its thought")
FLOOR_ROWS = 200  # that the random-weight model scores, evenly spread over the task
TIE = 1e-6  # relative; nats that are closer are the same
GREEDY = Asking()
Values = list["float | None"]  # one for each row; None for a row that was left out
GENERATED = 200  # questions of a spec, equally many of each depth


def measure(run: str | Path, suites: Sequence[str], files: Sequence[str], data: str = ".",
            target: Path | None = None, limit: int | None = None, resume: bool = False,
            letters: bool = False, general: Sequence[str] = (), device: str = "auto",
            screen: Console | None = None, adapter: Path | None = None,
            as_chat: bool = False, asking: Asking = GREEDY) -> dict[str, Any]:
    """Results of a run's newest step on suites and on task files ("own"), and its experts' load on
    them relative to that on the text of the sources `general`; see `general_load`.

    They are written to `target` after each task; with `resume` those that are there are kept.
    Raises ValueError, one line, for sets that are missing or wrong, damaged weights, and rows of
    messages for a model without chat turns, unless it reads them nevertheless (`as_chat`).
    """
    screen = screen or Console(quiet=True)
    if resume and not target:
        raise ValueError("--resume continues the file of --json FILE; give both")
    old = read_json(target, "leave out --resume") if resume and target else {}
    chosen = _open_tasks(suites, files, data, limit, letters, asking)
    for name, (_, missing) in chosen.items():
        if missing:
            screen.print(f"suite {name}: no rows of {', '.join(missing)}", soft_wrap=True)
    keep_large_blocks()
    loaded = load(run, device, adapter)
    loaded.model.chat |= as_chat
    weights = loaded.folder / (WEIGHTS if (loaded.folder / WEIGHTS).exists() else ADAPTER)
    result = {"run": str(loaded.folder), "model_sha256": sha256(weights), "versions": versions()}
    found = old["suites"] if old.get("model_sha256") == result["model_sha256"] else {}
    for suite, (tasks, missing) in chosen.items():
        if found.get(suite, {}).get("protocol") != (protocol := _protocol(tasks, asking)):
            found[suite] = {"protocol": protocol, "tasks": {}}
        found[suite]["missing"] = missing
    todo = [(found[suite]["tasks"], task) for suite, (tasks, _) in chosen.items() for task in tasks
            if task.name not in found[suite]["tasks"]]
    usual = general_load(loaded, general) if todo else None
    random = build(loaded.model.spec, 0, next(loaded.model.parameters()).device)
    start = time.monotonic()
    with ProgressLine("eval", screen) as line:
        def show(share: float) -> None:
            line.update((number + share) / len(todo), task.name, time.monotonic() - start)

        for number in range(len(todo)):
            results, task = todo[number]
            results[task.name] = judge(loaded, task, random, usual, show, asking)
            if target:
                write_text(target, json.dumps({**result, "suites": found}) + "\n")
    return {**result, "suites": found}


def _open_tasks(suites: Sequence[str], files: Sequence[str], data: str, limit: int | None,
                letters: bool, asking: Asking) -> dict[str, tuple[list[Task], list[str]]]:
    """The tasks of each suite, and the names of those that are not there."""
    own = [task for file in files for task in (
        open_tasks(file, limit or GENERATED) if _is_made(file)
        else [open_task(Path(file).name, file, limit, letters)])]
    gone = [name for file in files if _is_made(file) for name in task_names(file)
            if name not in {task.name for task in own}]
    if files and not own:
        raise ValueError(f"the split test has no {', '.join(gone)}; try larger depths")
    found = {name: open_suite(name, data, limit, letters) for name in suites} | (
        {"own": (own, gone)} if files else {})
    every = (task for tasks, _ in found.values() for task in tasks)
    if asking != GREEDY and not any(task.rows[0].messages for task in every):
        raise ValueError("--think, --max-thinking, --samples and --temperature are for tasks whose "
                         "rows are messages, and no task here has any; leave them out")
    return found


def _is_made(file: str) -> bool:
    return is_spec(file) and not Path(file).exists()


def _protocol(tasks: list[Task], asking: Asking) -> dict[str, Any]:
    """The rule, how answers are asked for, each task's form, and a hash of the exact requests."""
    return {"rule": RULE, "answers": asking._asdict(),
            "tasks": {task.name: task.protocol for task in tasks},
            "sha256": hashlib.sha256("".join(task.sha256 for task in tasks).encode()).hexdigest()}


def judge(loaded: Loaded, task: Task, random: Any, usual: GeneralLoad | None,
          progress: Callable[[float], None], asking: Asking) -> dict[str, Any]:
    """The result of a task; its lists have None for a row that was left out. `random` is a model of
    the same shape with random weights."""
    found, loads_LE = (answer(loaded, task.rows, asking, progress) if task.rows[0].messages
                       else _compare(loaded, task, random, progress))
    n, accuracy = sum(value is not None for value in found["correct"]), mean(found["correct"])
    floors = {"majority": majority(task.rows), **found.pop("floors"),
              **task.protocol.get("floors", {})}
    low, high = wilson(found["correct"])
    room = 1 - task.protocol.get("baseline", floors["majority"])
    return {"n": n, "accuracy": accuracy, "bits_per_byte": mean(found["item_bits"]),
            "floors": floors, "interval": [low, high],
            "at_chance": low <= max(floors.get(name) or 0 for name in
                                    ("majority", "unigram", "shortcut")),
            "centred": 1 - (1 - accuracy) / room if room and accuracy is not None else None,
            "experts": usual and over_used(loads_LE, usual),
            "groups": [row.group for row in task.rows], **found}


def _compare(loaded: Loaded, task: Task, random: Any, progress: Callable[[float], None]
             ) -> tuple[dict[str, Any], np.ndarray]:
    rows, loads = task.rows, Loads(loaded.model)
    given = encode_rows(loaded.tokenizer, rows, window_length(loaded.model))
    with loads:
        costs = score(loaded.model, given.rows, progress=progress)
    nats = _sums(costs)
    per_token = task.protocol.get("divided_by") == "tokens"
    sizes = [[len(cost_P2) if per_token else 1 for cost_P2 in options] for options in costs]
    exact = {number: float((options[0][:, 1] == 0).all())  # gold texts
             for number, options in enumerate(costs) if len(options) == 1}
    right, per_byte = ([exact.get(number, value) for number, value in enumerate(
        best(rows, nats, each))] for each in (
            sizes, [[size(end) for _, end in row.options] for row in rows]))
    some = slice(None, None, math.ceil(len(rows) / FLOOR_ROWS))
    floors = {"unigram": mean(best(rows, unigram(
                  given.rows, loaded.model.spec.vocab_size), sizes)),
              "random": mean(best(rows[some], _sums(score(random, given.rows[some])), sizes[some]))}
    bits = [options[row.gold] / math.log(2) / size(row.options[row.gold][1]) if options else None
            for row, options in zip(rows, nats, strict=True)]
    return {"correct": right, "accuracy_per_byte": mean(per_byte), "item_bits": bits,
            "floors": floors, **given._asdict(), "rows": len(rows)}, loads.counts_LE


def _sums(costs: list[list[np.ndarray]]) -> list[list[float]]:
    return [[float(cost_P2[:, 0].sum()) for cost_P2 in options] for options in costs]


def size(continuation: str) -> int:
    """Bytes of a continuation without white space at its ends."""
    return max(1, len(continuation.strip().encode()))


def best(rows: Sequence[Row], nats: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]]
         ) -> Values:
    """1 for a row whose gold option has the fewest nats for its size; a share of 1 if others have
    as few; 0 for a gold text, which has no other option."""
    found: Values = []
    for row, options, each in zip(rows, nats, sizes, strict=True):
        costs = np.array(options) / each if options else np.empty(0)
        equal = np.isclose(costs, costs.min(initial=math.inf), rtol=TIE, atol=0)
        found.append((len(equal) > 1) * float(equal[row.gold] / equal.sum()) if options else None)
    return found


def majority(rows: Sequence[Row]) -> float:
    """What the best constant answer gets: the commonest gold text, or chance among the options."""
    chance = [1 / len(row.options) if len(row.options) > 1 else 0.0 for row in rows]
    fixed = len({frozenset(end for _, end in row.options) for row in rows}) == 1
    commonest = Counter(row.answers[0] for row in rows).most_common(1)[0][1] / len(rows)
    return max(sum(chance) / len(rows), commonest if fixed else 0.0)


def unigram(rows: Sequence[Sequence[Window]], vocab_size: int) -> list[list[float]]:
    """Nats of every option by token frequencies alone, counted in all options and contexts."""
    counts_V = np.ones(vocab_size)
    for options in rows:
        for tokens, _ in options:
            np.add.at(counts_V, tokens[1:], 1)
    nats_V = -np.log(counts_V / counts_V.sum())
    return [[float(nats_V[tokens[known + 1:]].sum()) for tokens, known in options]
            for options in rows]
