"""The showcase `fira reason`: a small model learns to think in steps, a student of a quarter of its
size learns that from it, reinforcement goes on where it is unsure, and a card compares them all.

Every model is a run that a stage of its own trains. What is done stands in OUT/reason.json, with
which an interrupted showcase goes on.
"""
from __future__ import annotations

import difflib
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from fira.config import ConfigError, load_preset
from fira.data.prepare import learn_tokenizer, prepare
from fira.data.tokenizer import Tokenizer
from fira.eval.answers import Asking, answer
from fira.eval.reasoning import ANSWER_TOKENS, expert_load, judge, measure_task
from fira.eval.task import Task
from fira.eval.tasks.generate import FAMILIES, make, open_tasks, read_spec, record
from fira.files import read_json, write_json, write_text
from fira.infer.load import load
from fira.model import build_meta
from fira.model.files import CONFIG
from fira.model.transformer import count_parameters
from fira.runlog import REASON
from fira.stages.config import configure, open_start
from fira.stages.distill import distill
from fira.stages.pretrain import PRETRAIN, pretrain
from fira.stages.rl import rl
from fira.stages.start import record_of, tune

TEXT = "sotu"  # that the base reads beside the questions
TASKS = "runsum", "swap", "add", "word"
BEYOND = 2  # depths above the trained ones that are measured
EDGE = 0.05, 0.95  # pass@1 from so much above chance to this leaves something to reinforce
RL_RATE, MORE_RATE = 0.1, 0.3  # of the base's learning rates
LENGTH = 256
FULL_TUNING = {"method": "full", "router": "train"}


class Size(NamedTuple):
    """How much of everything there is in a showcase."""

    depth: int      # the largest that is trained on
    steps: int      # of training the base, and the student before it is taught
    rows: int       # questions of a task with steps that the base is tuned on
    think: int      # steps of that tuning
    prompts: int    # questions without steps that the student learns from
    traces: int     # questions with steps that its control learns from
    student: int    # steps of the distillation
    rl: int         # steps of reinforcement
    questions: int  # of a task and depth on the card
    samples: int    # of the answer to some of them


FULL = Size(4, 600, 12000, 10000, 5000, 400, 6000, 40, 100, 8)
QUICK = Size(2, 20, 400, 60, 60, 20, 20, 2, 10, 4)


class Showcase(NamedTuple):
    """One showcase, with the record of what is done."""

    out: Path
    record: dict[str, Any]
    device: str
    screen: Console

    @property
    def size(self) -> Size:
        return Size(**self.record["size"])

    @property
    def base(self) -> Path:
        return Path(self.record["base"] or self.out / "base")

    def run(self, name: str) -> tuple[Path, str, bool, Console]:
        """The last arguments of a stage whose run has this name."""
        run = self.out / name
        return run, self.device, (run / CONFIG).exists(), self.screen

    def specs(self, beyond: int = 0) -> list[str]:
        """Those of all tasks, from depth 1 to the largest that is trained on, or `beyond` that."""
        return [f"{task}:1-{min(self.size.depth + beyond, FAMILIES[task][1])}"
                for task in self.record["tasks"]]

    def write_rows(self, name: str, specs: Sequence[str], rows: int, seed: int) -> Path:
        """A file of questions with their steps, `rows` of each spec, in any order."""
        lines = [json.dumps(record(key, one)) for spec in specs for made in make(
            spec, rows, "train", 10 * self.record["seed"] + seed)
            for key, one in made.instances.items()]
        random.Random(seed).shuffle(lines)
        path = self.out / "rows" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "\n".join([*lines, ""]))
        return path

    def settings(self, factor: float, length: str) -> list[str]:
        """Of a tuning at `factor` times the base's learning rates."""
        optim = record_of(self.base, open_start(self.base).folder).get("optim", {"lr": 1e-3})
        return [*(f"optim.{key}={factor * value}" for key, value in optim.items()
                  if key.endswith("lr") and value),
                f"train.sequence_length={LENGTH}", f"train.batch_tokens={4 * LENGTH}",
                "train.micro_batch=4", "train.validation_tokens=16384", "schedule.kind=constant",
                "schedule.decay=0.5", "schedule.floor=0.05", f"train.seed={self.record['seed']}",
                f"train.{length}"]

    def tune(self, name: str, source: Path, rows: str, settings: list[str], direct: bool) -> None:
        """Tune `source` on a file of rows, with `direct` also on their questions with no thought.
        """
        data = {"chat": [str(self.out / "rows" / f"{rows}.jsonl")], "direct": direct}
        tune(source, {"data": data, "tune": dict(FULL_TUNING)}, 1.0, settings, *self.run(name))

    def limit(self) -> int:
        """Tokens of a thought at most: half more than the longest right one."""
        tokenizer = Tokenizer.load(open_start(self.base).folder)
        return max(len(tokenizer.encode("\n".join(one.steps))) for spec in self.specs(BEYOND)
                   for made in make(spec, 60, "test") for one in made.instances.values()) * 3 // 2

    def tasks(self, rows: int, split: str = "test") -> list[Task]:
        """`rows` questions of each task and depth, and of the depths beyond those trained on."""
        return [task for spec in self.specs(BEYOND)
                for task in open_tasks(spec, rows * len(read_spec(spec)), split)]


def reason(out: Path, tasks: Sequence[str], depth: int | None, base: Path | None, quick: bool,
           settings: Iterable[str], device: str, resume: bool, screen: Console) -> None:
    """`fira reason`: the card is in OUT/reason.json. Raises ValueError, one line, for bad input and
    for a folder with another showcase."""
    found = _open(out, tasks, depth, base, quick, list(settings), resume)
    show = Showcase(out, found, device, screen)
    for name, step in STEPS.items():
        if name not in show.record["seconds"]:
            screen.rule(name)
            began = time.monotonic()
            step(show)
            show.record["seconds"][name] = time.monotonic() - began
            write_json(out / REASON, show.record)


def _open(out: Path, tasks: Sequence[str], depth: int | None, base: Path | None, quick: bool,
          settings: list[str], resume: bool) -> dict[str, Any]:
    """The record of a new showcase, or of the one in the folder."""
    size = QUICK if quick else FULL
    size = size._replace(depth=depth or size.depth)
    for task in tasks:
        if task not in FAMILIES:
            near = difflib.get_close_matches(task, FAMILIES, 1) or TASKS
            raise ConfigError(f"--tasks {task} is none of {', '.join(FAMILIES)}; try {near[0]}")
        read_spec(f"{task}:{size.depth}")
    seed = configure(PRETRAIN, load_preset("reason"), settings).train.seed
    others = [one for one in settings if not one.startswith("train.seed=")]
    if base and others:
        raise ConfigError(f"{others[0]} is a setting of the base, which --base {base} gives; leave "
                          "one of them out")
    asked = {"tasks": [*(tasks or TASKS)], "depth": size.depth, "size": size._asdict(),
             "base": str(base.resolve()) if base else None, "settings": settings, "seed": seed}
    if not (out / REASON).is_file():
        return {**asked, "seconds": {}, "models": {}}
    if not resume:
        raise ValueError(f"{out} already holds a showcase; --resume goes on with it, or choose "
                         "another --run folder")
    found: dict[str, Any] = read_json(out / REASON, "choose another --run folder")
    given = {"tasks": tasks, "depth": depth, "size": quick, "base": base, "settings": settings}
    for name in (name for name, value in given.items() if value and found[name] != asked[name]):
        raise ConfigError(f"{out} was begun with {name} {found[name]}, not {asked[name]}; leave "
                          "that out to resume it, or choose another --run folder")
    return found


def _train_bases(show: Showcase) -> None:
    """A tokenizer and text, the base, and the student before it is taught; all unless given."""
    out, given, size, seed = show.out, show.record["base"], show.size, show.record["seed"]
    show.write_rows("think", show.specs(), size.rows, 0)
    show.write_rows("prompts", show.specs(), size.prompts // len(show.record["tasks"]), 1)
    show.write_rows("traces", show.specs(), size.traces // len(show.record["tasks"]), 2)
    questions = out / "rows" / "questions.txt"
    rows = [json.loads(line) for line in (out / "rows" / "think.jsonl").open(encoding="utf-8")]
    write_text(questions, "\n\n".join("\n".join(
        message["content"] for message in row["messages"]) for row in rows[:len(rows) // 3]))
    tokenizer = (Tokenizer.load(open_start(Path(given)).folder) if given else
                 learn_tokenizer([TEXT], out / "tokenizer", 320, 1 << 22, show.screen))
    prepare([TEXT, str(questions)], out / "data", tokenizer, screen=show.screen)
    fixed = [f"data.folder={out / 'data'}", f"train.steps={size.steps}", f"train.seed={seed}"]
    if not given:
        pretrain("reason", [*fixed, *show.record["settings"]], *show.run("base"))
    pretrain("reason-student", fixed, *show.run("student-base"))


def _tune_to_think(show: Showcase) -> None:
    show.tune("think", show.base, "think", show.settings(1.0, f"steps={show.size.think}"), True)


def _train_students(show: Showcase) -> None:
    """The student learns from the think model's own right answers; its control from the few steps
    that there are, for as long, with the time in which the answers were written."""
    start, began = show.out / "student-base", time.monotonic()
    seconds = distill(
        show.out / "think", str(start), {"chat": [str(show.out / "rows" / "prompts.jsonl")]},
        show.settings(1.0, f"steps={show.size.student}"), *show.run("student"), sequence=True,
        keep_right=True, max_new=show.limit() + ANSWER_TOKENS).seconds
    seconds = max(seconds, time.monotonic() - began)
    show.tune("gold-student", start, "traces", show.settings(1.0, f"minutes={seconds / 60}"), False)


def _find_edge(show: Showcase) -> None:
    """Where the model is right in more of its samples than by the commonest answer, but not in all;
    on training questions, as those of the test split are for the card."""
    loaded, asking = load(show.out / "think", show.device), Asking(
        "on", show.limit(), show.size.samples)
    found, edge = dict[str, float](), list[str]()
    for task in show.tasks(20, "train"):
        drawn = answer(loaded, task.rows, asking, lambda share: None)[0]["answers"]
        found[task.name] = drawn["pass"]["1"][0]
        if EDGE[0] + task.protocol["floors"]["majority"] <= found[task.name] <= EDGE[1]:
            edge.append(task.name)
    show.record.update({"pass@1": found, "edge": edge})


def _reinforce(show: Showcase) -> None:
    """Reinforcement at the edge, and as many seconds of more tuning."""
    if edge := show.record["edge"]:
        think, sections = show.out / "think", {
            "data": {"tasks": edge}, "tune": dict(FULL_TUNING),
            "rl": {"max_new": show.limit() + ANSWER_TOKENS}}
        state = rl(think, sections, show.settings(RL_RATE, f"steps={show.size.rl}"),
                   *show.run("rl"))
        show.tune("more", think, "think",
                  show.settings(MORE_RATE, f"minutes={state.seconds / 60}"), True)


def _measure(show: Showcase) -> None:
    """Every model on the same questions; what is measured once stays."""
    models, size, limit = show.record["models"], show.size, show.limit()
    for name in ("think", "student", "gold-student", "rl", "more"):
        if name in models or not (show.out / name).is_dir():
            continue
        loaded, replies, found = load(show.out / name, show.device), list[Any](), dict[str, Any]()
        for task in show.tasks(size.questions):
            sampled = name == "think" or name in ("rl", "more") and task.name in show.record["edge"]
            found[task.name], own = measure_task(
                loaded, task, limit, size.samples * sampled, whole=name == "think")
            replies += own
        count = count_parameters(build_meta(loaded.model.spec))
        models[name] = {"total": count.total, "active": count.active, "tasks": found,
                        "experts": expert_load(loaded, replies)}
        write_json(show.out / REASON, show.record)
    show.record["goals"] = judge(show.record)


STEPS: dict[str, Callable[[Showcase], None]] = {
    "bases": _train_bases, "think": _tune_to_think, "students": _train_students,
    "edge": _find_edge, "rl": _reinforce, "card": _measure}
