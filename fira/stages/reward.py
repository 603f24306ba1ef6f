"""What an answer is worth: the score of its row, or what a user's function says.

Nothing is trained on a reward that failed: an exception, a wrong number of values or a value that
is not finite ends the run with one line.
"""
from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from fira.data.tokenizer import THINK_END
from fira.eval.task import Row

CORRECT = "correct the function, and start again or continue with --resume"


class Question(NamedTuple):
    """A row, the ids of its prompt, its columns in the file, and its place there."""

    row: Row
    ids: list[int]
    columns: dict[str, Any]
    where: str


# reward(question, its completions) -> a finite number for each completion
Reward = Callable[[Question, Sequence[str]], list[float]]


def score(question: Question, completions: Sequence[str]) -> list[float]:
    """The row's score, 0 to 1, of what each completion says after its thoughts."""
    return [question.row.score(text.rpartition(THINK_END)[2]) for text in completions]


def open_reward(name: str | None) -> Reward:
    """`score`, or the function of "FILE.py:FUNCTION". Raises ValueError if there is none.

    It gets lists: function(prompts=, completions=, and a keyword for each of the row's columns).
    """
    if name is None:
        return score
    file, _, attribute = name.rpartition(":")
    spec = importlib.util.spec_from_file_location("reward", file) if Path(file).is_file() else None
    if not (spec and spec.loader):
        raise ValueError(f"--reward {name} is not FILE.py:FUNCTION with a file that exists; give "
                         "for example rewards.py:score")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} cannot be imported: {error!r}; correct it") from error
    if not callable(function := getattr(module, attribute, None)):
        raise ValueError(f"{file} has no function {attribute!r}; define it there, or give the name "
                         "of another after the colon")

    def reward(question: Question, completions: Sequence[str]) -> list[float]:
        columns = {"prompts": list(question.row.messages), **question.columns}
        try:
            values = function(completions=list(completions), **{
                name: [value] * len(completions) for name, value in columns.items()})
        except Exception as error:
            raise ValueError(f"{name} failed on {question.where}: {error!r}; {CORRECT}") from error
        if not isinstance(values, list | tuple) or len(values) != len(completions):
            raise ValueError(f"{name} returned {values!r} for {len(completions)} completions of "
                             f"{question.where}, not a list with a number for each; {CORRECT}")
        for value in values:
            if not (isinstance(value, Real) and math.isfinite(value)):
                raise ValueError(f"{name} returned {value!r} for {question.where}, which is not a "
                                 f"finite number; {CORRECT}")
        return list(map(float, values))

    return reward


def check_reward(reward: Reward, questions: Sequence[Question]) -> None:
    """Raises ValueError unless every gold answer gets 1 and every empty one 0. Where gold is a
    regular expression or a key, there is no such text."""
    for question in questions:
        gold = [] if question.row.checker in ("regex", "gym") else [question.row.answers[0]]
        for text, value in zip(["", *gold], reward(question, ["", *gold]), strict=True):
            if value != bool(text):
                raise ValueError(f"{question.where}: the answer {text!r} gets the reward {value:g} "
                                 f"and not {bool(text):d}, which would teach something else; "
                                 "correct the row or the reward")
