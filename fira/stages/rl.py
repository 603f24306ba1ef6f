"""`fira rl`: a model learns from the rewards of its own answers (GRPO; see fira/loss/policy.py).

A step draws prompts by its number, writes a group of answers to each with the present weights, and
takes one step on them. Groups whose answers all have the same reward teach nothing and are replaced
by other prompts. On many ranks each has its part of the prompts.
"""
from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import AfterValidator, Field
from rich.console import Console

from fira.config import Config, ConfigError
from fira.data.batches import Folder
from fira.data.tokenizer import Tokenizer
from fira.eval.answers import pass_at
from fira.files import read_json
from fira.loss.policy import policy_loss
from fira.model.files import CONFIG, knows_chat
from fira.parallel.layout import Layout
from fira.runlog import console
from fira.stages.config import Opened, RunConfig, Stage, open_start
from fira.stages.questions import is_made, read_questions
from fira.stages.reward import Question, Reward, check_reward, open_reward
from fira.stages.rollouts import Rollouts
from fira.stages.start import settings_for, tune
from fira.stages.tune import HELD_OUT, Files, TuneOptions, adapt
from fira.train.loop import LoopState, Recipe, Score

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
    train, held_out = (read_questions(config, names, split) for names, split in (
        (data.tasks, "train"), (data.held_out or filter(is_made, data.tasks), "test")))
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
