"""`fira rl`: a model learns from the rewards of its own answers (GRPO; see fira/loss/policy.py).

A step draws prompts by its number, writes a group of answers to each with the present weights, and
takes one step on them. Groups whose answers all have the same reward teach nothing and are replaced
by other prompts. On many ranks each has its part of the prompts.
"""
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import AfterValidator, Field
from rich.console import Console

from fira.config import Config, ConfigError
from fira.data.batches import Folder, permute
from fira.data.chat import prompt_ids
from fira.data.records import records
from fira.data.sources import RECORDS, inputs
from fira.data.tokenizer import Tokenizer
from fira.eval.answers import pass_at
from fira.eval.task import make_row
from fira.eval.tasks.generate import FAMILIES, is_spec, open_tasks
from fira.files import read_json
from fira.infer.load import load
from fira.infer.request import SamplingParams
from fira.infer.thought import limit_thought
from fira.loss.policy import PolicyBatch, policy_loss
from fira.loss.preference import log_probabilities
from fira.model.files import CONFIG, knows_chat, read_config
from fira.model.router import routers
from fira.parallel.layout import Layout, read, to_device
from fira.runlog import console
from fira.stages.config import Opened, RunConfig, Stage, open_start
from fira.stages.reward import Question, Reward, check_reward, open_reward
from fira.stages.rollouts import Rollout, draw_seed, pack_rollouts, write_answers
from fira.stages.start import settings_for, tune
from fira.stages.tune import HELD_OUT, Files, TuneOptions, adapt
from fira.train.loop import LoopState, Recipe, Score

MADE = 2000  # questions of a spec to train on
TRIES = 4  # prompts of a place in the batch until one has answers of different rewards
DRY = 5  # steps in a row without any such prompt end the run
FIRST = 32  # prompts, each with FIRST answers, by which a model is judged before it is trained
EASIEST, HARDEST = 0.95, 0.05  # pass@1 above and pass@16 below which there is little to learn


class RlData(Config):
    start: Folder = Field(description="step folder of the model that is trained")
    tasks: Files = Field(description="specs such as runsum:1-8, or files of rows with messages and "
                         "answers")
    held_out: Files = Field([], description="the same to evaluate on; without them the split test "
                            "of the specs, or a twentieth of the rows")
    reward: Annotated[str, AfterValidator(os.path.abspath)] | None = Field(
        None, description="FILE.py:FUNCTION; null: the rows' checkers")

    @property
    def chat(self) -> Files:
        return self.tasks


class RlOptions(Config):
    prompts: int = Field(16, ge=1, description="prompts of a step")
    group: int = Field(8, ge=2, description="answers to each prompt")
    clip: float | None = Field(0.2, gt=0, lt=1, description="how far p / p_sampled may leave 1")
    kl: float = Field(0.0, ge=0, description="weight of the divergence from the start")
    max_new: int = Field(128, ge=1, description="tokens of an answer at most")
    think: Literal["on", "off"] | None = Field(None, description="whether thoughts come before "
                                               "answers; null: as the model was tuned")
    max_thinking_tokens: int | None = Field(None, ge=0, description="tokens that close a thought")
    replay: bool = Field(False, description="train with the experts that were chosen in rollouts")


class RlConfig(RunConfig):
    """Everything that decides a run of reinforcement learning."""

    data: RlData
    tune: TuneOptions = TuneOptions()
    rl: RlOptions = RlOptions()


class Data(NamedTuple):
    train: list[Question]
    held_out: list[Question]
    reward: Reward


def open_data(config: RlConfig) -> Opened:
    """Read the rows and try the reward on them. Raises ValueError, one line, for what is wrong."""
    data, ranks = config.data, config.parallel
    if ranks.shard > 1 or ranks.pipeline > 1 or ranks.expert > 1:
        raise ConfigError("each rank writes answers with the whole model; set parallel.shard, "
                          "parallel.pipeline and parallel.expert to 1, and parallel.data instead")
    if not knows_chat(data.start):
        raise ValueError(f"{data.start} was not trained on chat turns, so it answers no question; "
                         "tune it first with fira tune --chat")
    reward = open_reward(data.reward)
    train, held_out = (_questions(config, names, split) for names, split in (
        (data.tasks, "train"), (data.held_out or filter(_is_made, data.tasks), "test")))
    if not held_out:
        held_out, train = train[::HELD_OUT], [one for number, one in enumerate(train)
                                              if number % HELD_OUT]
    seen = {tuple(one.ids) for one in held_out}
    kept = [one for one in train if tuple(one.ids) not in seen]
    if not kept:
        raise ConfigError(f"{', '.join(data.tasks)}: no row is left to train on that is not held "
                          "out; give more tasks, or others with --held-out")
    check_reward(reward, [*kept, *held_out])
    about = {"sources": [Path(name).name for name in data.tasks], "rows": len(kept),
             "rows held out": len(held_out), "rows equal to held-out rows": len(train) - len(kept)}
    return Opened(Path(data.start), Data(kept, held_out, reward), about, [
        ", ".join(f"{value:,} {name}" for name, value in about.items() if isinstance(value, int))])


def _is_made(name: str) -> bool:
    return (is_spec(name) or name in FAMILIES) and not Path(name).exists()


def _records(name: str, split: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file, or of a spec: MADE to train on, a tenth of them to evaluate on."""
    if not _is_made(name):
        yield from records(inputs([name], RECORDS))
        return
    test = split == "test"
    for task in open_tasks(name, MADE // 10 if test else MADE, split, 0 if test else 1):
        for row in task.rows:
            yield str(row.group), {"messages": list(row.messages), "answer": row.answers[0],
                                   "checker": row.checker, "group": row.group}


def _questions(config: RlConfig, names: Iterable[str], split: str) -> list[Question]:
    tokenizer, found = Tokenizer.load(config.data.start), list[Question]()
    rl = config.rl
    room = config.train.sequence_length + 1 - rl.max_new
    direct, _ = limit_thought(SimpleNamespace(**read_config(Path(config.data.start) / CONFIG)[1]),
                              rl.think, rl.max_thinking_tokens, rl.max_new)
    for where, record in (one for name in names for one in _records(name, split)):
        row = make_row(record, where)
        if not row.messages:
            raise ValueError(f"{where}: a prompt for rl is a list of chat messages; write the row "
                             'as {"messages": [...], "answer": ...}')
        ids = prompt_ids(tokenizer, row.messages, tuned=True, direct=direct)
        if len(ids) > room:
            raise ConfigError(
                f"{where}: the prompt has {len(ids)} tokens and {room} fit beside an answer of "
                f"rl.max_new={rl.max_new}; give a smaller --max-new, or a larger "
                f"train.sequence_length, up to model.context={config.model.context}")
        found.append(Question(row, ids, record, where))
    return found


class Rollouts:
    """Batches of answers to prompts in the order of the run's seed, with their advantages."""

    def __init__(self, config: RlConfig, data: Data, tokenizer: Tokenizer, layout: Layout) -> None:
        self.config, self.data, self.tokenizer, self.layout = config, data, tokenizer, layout
        self.reference: Any = None
        rl = config.rl
        _, limit = limit_thought(layout.model, rl.think, rl.max_thinking_tokens, rl.max_new)
        self.params = SamplingParams(rl.max_new, experts=rl.replay, max_thinking_tokens=limit)
        digest = hashlib.sha256(repr([one.columns for one in data.train]).encode())
        self.key = digest.hexdigest()[:16]

    def answer(self, numbers: Sequence[int], questions: Sequence[Question], size: int,
               temperature: float = 1.0) -> tuple[list[Rollout], np.ndarray]:
        """`size` answers to each question, with seeds made of its number, and their rewards
        [questions, size]. An answer that was cut off is worth nothing."""
        answers = write_answers(
            self.layout.model, self.tokenizer, [one.ids for one in questions for _ in range(size)],
            [draw_seed(self.config.train.seed, number, place) for number in numbers
             for place in range(size)], replace(self.params, temperature=temperature))
        rewards_PG = np.zeros((len(questions), size))
        for question, rewards_G, first in zip(questions, rewards_PG, range(0, len(answers), size),
                                              strict=True):
            some = answers[first:first + size]
            rewards_G[:] = self.data.reward(question, [one.text for one in some])
            np.minimum(rewards_G, 0.0, out=rewards_G, where=[one.truncated for one in some])
        return answers, rewards_PG

    def batch(self, state: Any, fraction: float) -> tuple[list[Any], dict[str, Any], Any]:
        """This rank's micro-batches; the checksum of the prompts and the number of steps without a
        group to learn from; metrics over all ranks."""
        rl, step = self.config.rl, state.step
        missing = list(range(rl.prompts))[self.layout.rows(rl.prompts)]
        answers, advantages, sums = list[Rollout](), list[float](), np.zeros(6)
        for attempt in range(TRIES):
            numbers = [(step * TRIES + attempt) * rl.prompts + place for place in missing]
            found, rewards_PG = self.answer(numbers, list(map(self._draw, numbers)), rl.group)
            useful_P = np.ptp(rewards_PG, axis=1) > 0
            kept_P = useful_P | (attempt == TRIES - 1)
            for index in np.flatnonzero(kept_P):
                answers += found[index * rl.group:(index + 1) * rl.group]
                advantages += (rewards_PG[index] - rewards_PG[index].mean()).tolist()
            sums += (rewards_PG.sum(), sum(len(one.logs_A) for one in found),
                     sum(one.truncated for one in found), rewards_PG.size, useful_P.sum(),
                     len(numbers))
            missing = [place for place, kept in zip(missing, kept_P, strict=True) if not kept]
            if not missing:
                break
        reward, tokens, cut, count, useful, groups = self.layout.sum(
            torch.from_numpy(sums)).tolist()
        dry = 0 if useful else state.position.get("dry", 0) + 1
        if dry == DRY:
            raise ValueError(f"in {DRY} steps up to {step + 1} no prompt had answers of different "
                             f"rewards (mean reward {reward / count:.3g}), so there is nothing to "
                             "learn: give harder tasks if it is near 1; if it has fallen, train "
                             "again from the start with a lower optim.lr")
        row = {"reward": reward / count, "signal": useful / groups, "truncated": cut / count,
               "answer_tokens": tokens / count}
        return self._pack(answers, advantages), {self.key: step + 1, "dry": dry}, row

    def _draw(self, number: int) -> Question:
        """The prompt at a place in the order of all epochs."""
        size = len(self.data.train)
        epoch, place = divmod(number, size)
        return self.data.train[permute(np.array([place]), size, self.config.train.seed, epoch)[0]]

    def _pack(self, answers: list[Rollout], advantages: list[float]) -> list[PolicyBatch]:
        train, spec = self.config.train, self.config.model
        layers = len(routers(self.layout.model)) if self.config.rl.replay else 0
        fields = pack_rollouts(answers, advantages, train.sequence_length, layers, spec.top_k)
        batches = [PolicyBatch(*parts) for parts in zip(*(
            field.split(train.micro_batch) for field in fields), strict=True)]
        if self.config.rl.kl:
            self.reference = self.reference or load(self.config.data.start, str(
                self.layout.mesh.device)).model.eval()
            with torch.no_grad():
                batches = [one._replace(reference_BT=log_probabilities(read(
                    self.reference, on), on).cpu()) for one in batches
                    for on in [to_device(one, self.layout.mesh.device)]]
        return batches

    def describe(self, state: Any) -> str:
        """Raises ValueError if the run of `state` has learned from other tasks."""
        if state.position and self.key not in state.position:
            raise ValueError(f"this run was begun with other tasks (their checksum is not "
                             f"{self.key}); put the files back as they were, or start anew into "
                             "another --run folder")
        return ""


def recipe(config: RlConfig, data: Data, tokenizer: Tokenizer, layout: Layout) -> Recipe:
    """Rollouts, the policy gradient, and the reward of greedy answers to held-out prompts."""
    if config.rl.prompts % layout.mesh.batch_ranks:
        raise ConfigError(f"rl.prompts={config.rl.prompts} must divide by the "
                          f"{layout.mesh.batch_ranks} ranks; try a multiple of it")
    rollouts = Rollouts(config, data, tokenizer, layout)
    name = "reward" if config.data.reward else "accuracy"
    own = slice(layout.mesh.batch_rank, None, layout.mesh.batch_ranks)

    def probe() -> tuple[dict[str, float], Score]:
        questions = data.held_out[own]
        answers, rewards_P1 = rollouts.answer(range(len(questions)), questions, 1, temperature=0.0)
        total, cut, count = layout.sum(torch.tensor([
            rewards_P1.sum(), sum(one.truncated for one in answers), len(answers)])).tolist()
        return {name: total / count, "truncated": cut / count}, Score(name, total / count, False)

    def begin(run: Path, fresh: bool) -> None:
        if not fresh:
            return
        questions = data.train[:FIRST][own]
        _, rewards_PG = rollouts.answer(range(FIRST)[own][:len(questions)], questions, FIRST)
        once, often, count = layout.sum(torch.tensor([*(
            sum(pass_at(k, rewards_G) for rewards_G in rewards_PG.tolist()) for k in (1, 16)),
            len(questions)])).tolist()
        told = f"before training, pass@1 is {once / count:.1%} and pass@16 {often / count:.1%}"
        if once / count > EASIEST:
            raise ValueError(f"{told}: these tasks are solved; give harder ones")
        if often / count < HARDEST:
            raise ValueError(f"{told}: the model hardly ever solves these tasks; tune it on rows "
                             "with answers first, or give easier ones")
        if layout.mesh.rank == 0:
            console().print(told, soft_wrap=True)

    return Recipe(rollouts, policy_loss(config.rl.clip, config.rl.kl), probe, begin)


RL = Stage("rl", RlConfig, open_data, recipe, adapt,
           {"optim": {}, "train": {"steps": 1}}, 0.0, quantized=True)
# What rl sets unless it is told otherwise.
SETTINGS = "schedule.kind=constant", "train.save_every=10", "train.patience=5"
SLOWER = 10  # times than a tuning of the same run, whose rates broke a model within five steps


def rl(source: Path | None, sections: dict[str, dict[str, Any]], settings: Iterable[str], run: Path,
       device: str, resume: bool, screen: Console) -> LoopState:
    """`fira rl`: see `fira.stages.start.tune`. Raises ConfigError if a run that is resumed has
    other tasks than those given."""
    settings = list(settings)
    if source is not None and not (run / CONFIG).exists():
        lengths = {"train.steps", "train.minutes"} & {one.partition("=")[0] for one in settings}
        usual = (one.partition("=") for one in settings_for(
            source, open_start(source, True).folder, sections["tune"]["method"], settings))
        settings = [*SETTINGS, *([] if lengths else ["train.steps=100"]),
                    *(f"{key}={float(rate) / SLOWER}" for key, _, rate in usual
                      if key.endswith("lr")), *settings]
    elif (asked := sections["data"]["tasks"]) and (run / CONFIG).exists():
        begun = read_json(run / CONFIG, "restore it")["config"]["data"].get("tasks")
        if begun != RlData(start=".", tasks=asked).tasks:
            raise ConfigError(f"{run} was begun with --tasks {','.join(begun or ['(none)'])}; "
                              "leave --tasks out to resume it, or choose another --run")
    return tune(source, sections, 1.0, settings, run, device, resume, screen, RL)
