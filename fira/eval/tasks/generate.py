"""Rows of the tasks of a spec: NAME:DEPTH or NAME:FIRST-LAST, like runsum:8 or runsum:1-8.

An instance is of the split train or test by a hash of its canonical form, so no question of one
split is in the other under other names or in another order. Its key, the `group` of its row, says
how it is made again.
"""
from __future__ import annotations

import difflib
import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from fira.eval.task import Row, Task, make_row
from fira.eval.tasks import gym
from fira.eval.tasks.chains import deduce, modchain, runsum, swap
from fira.eval.tasks.instance import Instance
from fira.eval.tasks.sums import add, circuit, multiply, word

FAMILIES: dict[str, tuple[Callable[[random.Random, int], Instance], int]] = {  # largest depth
    "runsum": (runsum, 25), "swap": (swap, 26), "modchain": (modchain, 16), "deduce": (deduce, 8),
    "add": (add, 12), "multiply": (multiply, 12), "circuit": (circuit, 12), "word": (word, 12)}
SPEC = re.compile(r"([a-z_]+):(\d+)(?:-(\d+))?")
GYM = re.compile(r"gym:\w+")
TEST_SHARE = 5   # one in so many canonical forms is of the test split
IN_VAIN = 2000   # draws without a new question after which there is none


class Made(NamedTuple):
    """The instances of one depth by their keys, and in how many questions fewer were found."""

    name: str
    instances: dict[str, Instance]
    missing: int


def is_spec(text: str) -> bool:
    """Whether `text` has the form of a spec, of a known task or not."""
    return bool(SPEC.fullmatch(text) or GYM.fullmatch(text))


def read_spec(spec: str) -> list[tuple[str, int]]:
    """Name and depth of each task of a spec. Raises ValueError, one line, if there is none."""
    if GYM.fullmatch(spec):
        raise ValueError(f"task {spec!r}: it has no steps to write; measure it with fira eval "
                         "RUN --task")
    found = SPEC.fullmatch(spec)
    name = found[1] if found else spec.partition(":")[0]
    if not found or name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, 1) or [*FAMILIES]
        raise ValueError(f"task {spec!r} is none of {', '.join(FAMILIES)} with a depth; try "
                         f"{near[0]}:4 or {near[0]}:1-4")
    first, last, largest = int(found[2]), int(found[3] or found[2]), FAMILIES[name][1]
    if not 1 <= first <= last <= largest:
        raise ValueError(f"task {spec!r}: the depths of {name} are 1 to {largest}; try "
                         f"{name}:1-{largest}")
    return [(name, depth) for depth in range(first, last + 1)]


def task_names(spec: str) -> list[str]:
    """The names of the tasks of a spec, one for each depth. Raises ValueError as `read_spec`."""
    if GYM.fullmatch(spec):
        return [spec]
    return [f"{name}:{depth}" for name, depth in read_spec(spec)]


def make_again(key: str) -> Instance:
    """The instance of a key (NAME:DEPTH/SEED.NUMBER). Raises ValueError if it is none."""
    ((name, depth),) = read_spec(key.partition("/")[0])
    return FAMILIES[name][0](random.Random(key), depth)


def split_of(instance: Instance) -> str:
    """The split that an instance belongs to."""
    digest = hashlib.sha256(instance.canonical.encode()).digest()
    return "train" if int.from_bytes(digest[:8], "big") % TEST_SHARE else "test"


def make(spec: str, rows: int, split: str, seed: int = 0) -> list[Made]:
    """`rows` different questions of a split, equally many of each depth if there are so many."""
    depths = read_spec(spec)
    made = []
    for place, (name, depth) in enumerate(depths):
        wanted = rows // len(depths) + (place < rows % len(depths))
        found, number, seen, last = dict[str, Instance](), 0, set[str](), 0
        while len(found) < wanted and number - last < IN_VAIN:
            key = f"{name}:{depth}/{seed}.{number}"
            instance, number = make_again(key), number + 1
            if split_of(instance) == split and instance.question not in seen:
                found[key], last = instance, number
                seen.add(instance.question)
        made.append(Made(f"{name}:{depth}", found, wanted - len(found)))
    return made


def record(key: str, instance: Instance, direct: bool = False) -> dict[str, Any]:
    """The conversation of an instance, without its steps if the answer is to be `direct`."""
    return {"messages": [{"role": "user", "content": instance.question},
                         {"role": "assistant", "content": instance.answer,
                          "reasoning_content": "" if direct else "\n".join(instance.steps)}],
            "answer": instance.answer, "checker": "exact", "group": key}


def floors(made: Made) -> dict[str, float]:
    """The share that the commonest answer gets right, and the one that the shortcut does."""
    right = [one.answer for one in made.instances.values()]
    return {"majority": Counter(right).most_common(1)[0][1] / len(right),
            "shortcut": sum(one.answer == one.shortcut for one in made.instances.values())
            / len(right)}


def open_tasks(spec: str, rows: int, split: str = "test", seed: int = 0) -> list[Task]:
    """A task for each depth of a spec, with `rows` questions in all, but for depths that have none;
    gym:NAME is one task of the package reasoning-gym. Raises ValueError as `read_spec`."""
    if GYM.fullmatch(spec):
        return [_open_gym(spec, rows, seed)]
    return [Task(one.name, [_row(key, each) for key, each in one.instances.items()],
                 {"source": "fira tasks", "split": split, "seed": seed, "floors": floors(one)})
            for one in make(spec, rows, split, seed) if one.instances]


def _open_gym(spec: str, rows: int, seed: int) -> Task:
    entries = {key: gym.find(key)[1] for key in (f"{spec}/{seed}.{n}" for n in range(rows))}
    answers = Counter(str(entry["answer"]) for entry in entries.values())
    return Task(spec, [Row((), 0, (key,), ({"role": "user", "content": entry["question"]},), "gym",
                           key) for key, entry in entries.items()],
                {"source": "reasoning-gym", "seed": seed,
                 "floors": {"majority": answers.most_common(1)[0][1] / rows}})


def _row(key: str, instance: Instance) -> Row:
    whole = record(key, instance)
    return make_row({**whole, "messages": whole["messages"][:1]}, key)


def check_steps(row: Row, thought: str) -> bool:
    """Whether every step of a thought about the question of `row` is right; see
    `Instance.is_right`. Raises ValueError for a row of no generator, or of an earlier one."""
    instance = make_again(row.group or "")
    if row.messages[-1]["content"] != instance.question:
        raise ValueError(f"the question of row {row.group} is not the one that is made now; write "
                         "the rows again with fira tasks")
    return instance.is_right(thought)
