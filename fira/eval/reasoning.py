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
from fira.eval.answers import Asking, answer, generate_answers
from fira.eval.statistics import Values, average, difference, mean, wilson
from fira.eval.task import Row, Task
from fira.eval.tasks.generate import check_steps
from fira.infer.request import SamplingParams
from fira.model.generate import window_length
from fira.model.router import routers
from fira.model.usage import read_use

ANSWER_TOKENS = 16  # at most, after the thought
FIFTH = 5  # one in so many rows is sampled
GAIN, KEPT, TASKS = 0.3, 0.95, 3  # the goals
Gain = tuple[float, float, float]  # and its 95% interval


class Reply(NamedTuple):
    """A thought and an answer; `ids` of the prompt, the thought and the answer. `cut`: the thought
    was closed at its limit, or the answer did not end."""

    thought: str
    answer: str
    ids: tuple[list[int], list[int], list[int]]
    cut: bool


def write_replies(loaded: Loaded, rows: Sequence[Row], limit: int,
                  thoughts: Sequence[str] | None = None) -> list[Reply]:
    """A greedy reply to each row, after a thought of its own of at most `limit` tokens, or after
    that of `thoughts`. What the model cannot read at once has an empty reply, which is cut."""
    begun: list[list[dict[str, str]]] = [[] for _ in rows] if thoughts is None else [
        [{"role": "assistant", "reasoning_content": one, "content": ""}] for one in thoughts]
    prompts = [prompt_ids(loaded.tokenizer, [*row.messages, *one], True, continue_final=bool(one))
               for row, one in zip(rows, begun, strict=True)]
    replies = [Reply("", "", (ids, [], []), True) for ids in prompts]
    read = [number for number, ids in enumerate(prompts)
            if len(ids) <= window_length(loaded.model)]
    events, _ = generate_answers(
        loaded.model, loaded.tokenizer, [prompts[number] for number in read], SamplingParams(
            limit + ANSWER_TOKENS, 0.0, max_thinking_tokens=limit,
            stop_ids=(loaded.tokenizer.special(TURN_END),)), lambda share: None)
    for number, (*tokens, end) in zip(read, events, strict=True):
        thought, said = ([one for one in tokens if one.thought == part] for part in (True, False))
        replies[number] = Reply(
            "".join(one.text for one in thought).strip(), "".join(one.text for one in said)
            + end.text, (prompts[number], [one.id for one in thought], [one.id for one in said]),
            end.reason == "length" or end.thinking_tokens >= limit)
    return replies


def measure_task(loaded: Loaded, task: Task, limit: int, samples: int = 0, whole: bool = False
                 ) -> tuple[dict[str, Any], list[Reply]]:
    """What a model gets right with thoughts, with `whole` also directly and after swapped thoughts,
    and with `samples` of each FIFTH row pass@k, k = samples / 2, and maj@samples; and its replies
    with thoughts."""
    rows, own = task.rows, write_replies(loaded, task.rows, limit)
    found = {"floors": task.protocol["floors"], "think": rate(_scores(rows, own)) | {
        "steps_right": mean([check_steps(row, one.thought)
                             for row, one in zip(rows, own, strict=True)]),
        "cut": mean([one.cut for one in own]),
        "tokens": [mean([len(one.ids[part]) for one in own]) for part in (1, 2)]}}
    if whole:
        swapped = write_replies(loaded, rows, limit, [one.thought for one in own[1:] + own[:1]])
        found |= {"swapped": rate(_scores(rows, swapped)), "direct": rate(
            answer(loaded, rows, Asking("off"), lambda share: None)[0]["correct"])}
    if samples:
        drawn = answer(loaded, rows[::FIFTH], Asking("on", limit, samples), lambda share: None
                       )[0]["answers"]
        found["sampled"] = {"k": [samples // 2, samples], "pass@1": drawn["pass"]["1"],
                            "pass@k": drawn["pass"][str(samples // 2)], "maj@k": drawn["maj@k"]}
    return found, own


def _scores(rows: Sequence[Row], replies: Sequence[Reply]) -> list[float]:
    return [row.score(one.answer) for row, one in zip(rows, replies, strict=True)]


def rate(right: Values) -> dict[str, Any]:
    """The share of answers that are right, its 95% interval, and the score of each."""
    return {"accuracy": mean(right), "interval": wilson(right), "right": right}


def expert_load(loaded: Loaded, replies: Sequence[Reply]) -> dict[str, Any] | None:
    """Each expert's share of a layer's rows in thoughts and in answers, [L, E], and half the sum of
    their differences, by layer; None for a dense model, or without answers."""
    replies = [one for one in replies if one.ids[2]]
    if not routers(loaded.model) or not replies:
        return None
    loads, spec = list[torch.Tensor](), loaded.model.spec
    for part in (1, 2):
        rows = [Ids(np.array(sum(one.ids, []), np.int32), np.repeat(
            np.arange(3) == part, [len(ids) for ids in one.ids])) for one in replies]
        longest = max(len(row.ids) for row in rows) - 1  # the last token is only a target
        use = read_use(loaded.model, in_order(Packs(rows, longest), 8))
        loads.append(use.total(torch.ones_like(use.gates_LNK), spec.num_experts)
                     / use.experts_LNK[0].numel())
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
                  _listed(found), sum(one[1] >= GAIN for one in found.values()) >= TASKS))
    if "student" in models:
        room, kept = (above_chance(models[name], trained) for name in ("think", "student"))
        goals.append((f"the student keeps {KEPT:.0%} of the teacher's accuracy above chance",
                      f"{kept / room:.1%}" if room > 0 else "the teacher has none",
                      kept >= KEPT * room > 0))
        gain = versus(models["student"], models["gold-student"], "think", trained)
        goals.append(("it beats the student of the few right traces, trained as long",
                      _listed({"all": gain} if gain else {}), bool(gain and gain[1] > 0)))
    if "rl" in models or not card["edge"]:
        found = gains("rl", "more", "think", card["edge"]) if card["edge"] else {}
        won = any(one[1] > 0 for one in found.values())
        goals.append(("RL beats as much more tuning on a task at its edge", "no gain: " * (
            not won) + (_listed(found) or "no task has an edge to learn at"), won))
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
    return mean([model["tasks"][name]["think"]["accuracy"] - model["tasks"][name]["floors"][
        "majority"] for name in names if name in model["tasks"]]) or 0.0


def _listed(gains: dict[str, Gain]) -> str:
    return ", ".join(f"{name} {gain:+.0%} ({low:+.0%} to {high:+.0%})"
                     for name, (gain, low, high) in gains.items())
