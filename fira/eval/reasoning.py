"""The reasoning card: what thoughts are worth to a model at each depth of tasks that need steps.

A question is answered after a thought of the model's own (think), after an empty one (direct), and
after the one that it wrote about the next question of the same depth (swapped): if answers come
from the thoughts, the last are right by chance only.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fira.convert.files import Loaded
from fira.data.chat import prompt_ids
from fira.data.conversations import Row as Ids
from fira.data.packs import Packs, in_order
from fira.data.tokenizer import TURN_END
from fira.eval.answers import generate_answers, pass_at, vote
from fira.eval.statistics import average, difference, mean, wilson
from fira.eval.task import Row, Task
from fira.eval.tasks.generate import check_steps
from fira.infer.request import SamplingParams
from fira.model.router import routers
from fira.model.usage import read_use

ANSWER_TOKENS = 16  # at most, after the thought
FIFTH = 5  # one in so many rows is sampled
GAIN, KEPT, TASKS = 0.3, 0.95, 3  # the goals
Gain = tuple[float, float, float]  # and its 95% interval


class Reply(NamedTuple):
    """A thought and an answer. Of all `ids`, read and written, the last `new` were written, the
    first `thinking` of these for the thought. `cut`: the thought was closed at its limit, or the
    answer did not end."""

    thought: str
    answer: str
    ids: np.ndarray
    new: int
    thinking: int
    cut: bool

    def part(self, thought: bool) -> Ids:
        """The ids, with those that were written for the thought, or else the answer, trained on."""
        place = np.arange(len(self.ids)) - len(self.ids) + self.new
        return Ids(self.ids, (place >= 0) & ((place < self.thinking) == thought))


def write_replies(loaded: Loaded, rows: Sequence[Row], limit: int,
                  thoughts: Sequence[str] | None = None, samples: int = 0) -> list[list[Reply]]:
    """A greedy reply to each row, or so many `samples` at temperature 1; after the row's own
    thought of at most `limit` tokens, or after that of `thoughts` ("": an empty one)."""
    begun: list[list[dict[str, str]]] = [[] for _ in rows] if thoughts is None else [
        [{"role": "assistant", "reasoning_content": one, "content": ""}] for one in thoughts]
    prompts = [prompt_ids(loaded.tokenizer, [*row.messages, *one], True, continue_final=bool(one))
               for row, one in zip(rows, begun, strict=True)]
    each = samples or 1
    events, _ = generate_answers(
        loaded.model, loaded.tokenizer, [ids for ids in prompts for _ in range(each)],
        SamplingParams(limit + ANSWER_TOKENS, float(samples > 0), max_thinking_tokens=limit,
                       stop_ids=(loaded.tokenizer.special(TURN_END),)), lambda share: None)
    replies = [_reply(prompts[number // each], found, limit) for number, found in enumerate(events)]
    return [replies[first:first + each] for first in range(0, len(replies), each)]


def _reply(prompt: list[int], events: list[Any], limit: int) -> Reply:
    *tokens, end = events
    texts = ["".join(one.text for one in tokens if one.thought == part) for part in (True, False)]
    return Reply(texts[0].strip(), texts[1] + end.text,
                 np.array([*prompt, *(one.id for one in tokens)], np.int32), len(tokens),
                 sum(one.thought for one in tokens),
                 end.reason == "length" or end.thinking_tokens >= limit)


def measure_task(loaded: Loaded, task: Task, limit: int, forms: Sequence[str] = (),
                 samples: int = 0) -> tuple[dict[str, Any], list[Reply]]:
    """What a model gets right with thoughts, in the other `forms`, and with `samples` of each
    FIFTH row: pass@k with k = samples / 2, and maj@k; and its greedy replies with thoughts."""
    rows = task.rows
    own = [one for one, in write_replies(loaded, rows, limit)]
    found = {"floors": task.protocol["floors"], "think": rate(rows, own) | {
        "steps_right": mean([check_steps(row, one.thought) for row, one in zip(
            rows, own, strict=True)]),
        "cut": mean([one.cut for one in own]),
        "thought_tokens": mean([one.thinking for one in own]),
        "answer_tokens": mean([one.new - one.thinking for one in own])}}
    others = {"direct": [""] * len(rows), "swapped": [one.thought for one in own[1:] + own[:1]]}
    for form in forms:
        found[form] = rate(rows, [one for one, in write_replies(loaded, rows, limit, others[form])])
    if samples:
        some, k = rows[::FIFTH], samples // 2
        drawn = write_replies(loaded, some, limit, samples=samples)
        scores = [[row.score(one.answer) for one in each]
                  for row, each in zip(some, drawn, strict=True)]
        found["sampled"] = {
            "k": k, "pass@1": mean([pass_at(1, each) for each in scores]),
            "pass@k": mean([pass_at(k, each) for each in scores]),
            "maj@k": mean([vote(row, [one.answer for one in each[:k]])
                           for row, each in zip(some, drawn, strict=True)])}
    return found, own


def rate(rows: Sequence[Row], replies: Sequence[Reply]) -> dict[str, Any]:
    """The share of answers that are right, its 95% interval, and each answer's score."""
    right = [row.score(one.answer) for row, one in zip(rows, replies, strict=True)]
    return {"accuracy": mean(right), "interval": wilson(right), "right": right}


def expert_load(loaded: Loaded, replies: Sequence[Reply]) -> dict[str, Any] | None:
    """Each expert's share of a layer's rows in thoughts and in answers, [L, E], and half the sum of
    their differences, by layer; None for a dense model."""
    if not routers(loaded.model):
        return None
    longest, loads = max(len(one.ids) for one in replies), list[torch.Tensor]()
    for thought in (True, False):
        packs = Packs([one.part(thought) for one in replies], longest)
        use = read_use(loaded.model, in_order(packs, 8))
        counts_LE = use.total(torch.ones_like(use.gates_LNK), loaded.model.spec.num_experts)
        loads.append(counts_LE / use.experts_LNK[0].numel())
    return {"thoughts": loads[0].tolist(), "answers": loads[1].tolist(),
            "moved": ((loads[0] - loads[1]).abs().sum(dim=1) / 2).tolist()}


def judge(card: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals of the showcase that its models allow, each with its result and whether it is met.
    """
    models, depth, goals = card["models"], card["depth"], list[tuple[str, str, bool]]()
    trained = [f"{task}:{each}" for task in card["tasks"] for each in range(1, depth + 1)]

    def gains(one: str, other: str, form: str, names: Sequence[str]) -> dict[str, Gain]:
        found = {task: versus(models[one], models[other], form, [
            name for name in names if name.startswith(f"{task}:")]) for task in card["tasks"]}
        return {task: gain for task, gain in found.items() if gain}

    found = gains("think", "think", "direct", [f"{task}:{depth}" for task in card["tasks"]])
    goals.append((f"thinking beats direct by {GAIN:.0%} at depth {depth} on {TASKS} tasks",
                  _listed(found), sum(one[0] >= GAIN for one in found.values()) >= TASKS))
    if "student" in models:
        room, kept = (above_chance(models[name], trained) for name in ("think", "student"))
        goals.append((f"the student keeps {KEPT:.0%} of the teacher's accuracy above chance",
                      f"{kept / room:.1%}" if room > 0 else "the teacher has none",
                      kept >= KEPT * room > 0))
        gain = versus(models["student"], models["gold-student"], "think", trained)
        goals.append(("it beats the student of the few right traces, trained as long",
                      _listed({"all": gain} if gain else {}), bool(gain and gain[1] > 0)))
    if "rl" in models:
        found = gains("rl", "more", "think", card["edge"])
        won = any(one[1] > 0 for one in found.values())
        goals.append(("RL beats as much more tuning on a task at its edge",
                      "no gain: " * (not won) + _listed(found), won))
    return [{"goal": goal, "result": result, "met": met} for goal, result, met in goals]


def versus(one: dict[str, Any], other: dict[str, Any], form: str,
           names: Sequence[str]) -> Gain | None:
    """How much more of the same questions `one` gets right with thoughts than `other` does in a
    form, with the 95% interval; None without questions."""
    pairs = [(one["tasks"][name]["think"]["right"], other["tasks"][name][form]["right"])
             for name in names if name in one["tasks"]]
    found = [each for each in (difference(*pair) for pair in pairs) if each]
    return (total := average(found)) and (total.mean, total.low, total.high) if found else None


def above_chance(model: dict[str, Any], names: Sequence[str]) -> float:
    """The mean accuracy with thoughts, minus that of the commonest answer."""
    return float(np.mean([one["think"]["accuracy"] - one["floors"]["majority"] for one in (
        model["tasks"][name] for name in names if name in model["tasks"])]))


def _listed(gains: dict[str, Gain]) -> str:
    return ", ".join(f"{name} {gain:+.0%} ({low:+.0%} to {high:+.0%})"
                     for name, (gain, low, high) in gains.items()) or "-"
