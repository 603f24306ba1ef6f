"""Pretraining: a preset and a data folder become a run."""
from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from rich.console import Console

from fira import runtime
from fira.checkpoint import Checkpoints, read_weights, restore
from fira.config import Config, ConfigError, flatten, load_preset, override, parse
from fira.data.batches import Batches, sequential
from fira.data.shards import Shards
from fira.data.tokenizer import Tokenizer
from fira.loss.next_token import Batch, next_token_loss
from fira.model.count import count_parameters
from fira.model.experts import grouping_obstacle
from fira.model.files import build_meta
from fira.model.spec import ModelSpec
from fira.parallel.layout import Layout, check_fit
from fira.parallel.mesh import Mesh, ParallelConfig, joined
from fira.runlog import NoLog, RunLog, tracker
from fira.stages.start import Start, begun_from, longest_read, open_start
from fira.train.compiled import compiled
from fira.train.horizon import TrainConfig, fraction_done
from fira.train.loop import Loop, LoopState
from fira.train.optim import OptimConfig, make_optimizer
from fira.train.recompute import recompute_blocks
from fira.train.schedule import ScheduleConfig, factor
from fira.train.validate import validate

CONFIG = "config.json"


class DataConfig(Config):
    folder: str | None = Field(None, description="folder that `fira data` wrote")


class PretrainConfig(Config):
    """Everything that decides a pretraining run."""

    data: DataConfig = DataConfig()
    model: ModelSpec
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="after")
    def _check_head(self) -> PretrainConfig:
        follows, pipeline = self.optim.head_follows, self.parallel.pipeline
        if follows and getattr(self.model, "tied", False):
            raise ValueError(f"optim.head_follows={follows:g}, but the head is the embedding; set "
                             "model.tied=false or optim.head_follows=0")
        if follows and pipeline > 1:
            raise ValueError(f"optim.head_follows={follows:g} wants embedding and head on one "
                             f"rank, not at the ends of parallel.pipeline={pipeline}; set the "
                             "first to 0 or the second to 1")
        return self


def configure(preset: dict[str, Any], settings: Iterable[str],
              start: Start | None = None) -> PretrainConfig:
    """`settings` over `preset`; a horizon given in steps or minutes replaces the preset's, and a
    `start` its model."""
    preset = start.over(preset) if start else preset
    settings = list(settings)
    given = {setting.partition("=")[0] for setting in settings}
    horizons = {"train.steps", "train.minutes"}
    if len(given & horizons) == 1:
        settings.append(f"{(horizons - given).pop()}=null")
    config = parse(PretrainConfig, override(preset, settings))
    if config.train.sequence_length > config.model.context:
        raise ConfigError(f"train.sequence_length={config.train.sequence_length} is longer than "
                          f"model.context={config.model.context}; "
                          f"try train.sequence_length={config.model.context}")
    if start:
        start.check(config.model)
    return config


def describe(preset: str, settings: Iterable[str], source: Path | None = None) -> str:
    """The resolved configuration, a setting a line, with what differs from the preset marked."""
    base = flatten(configure(load_preset(preset), ()))
    lines = []
    start = open_start(source) if source else None
    for key, value in flatten(configure(load_preset(preset), settings, start)).items():
        changed = f"   # preset: {_toml(base.get(key))}" if value != base.get(key) else ""
        lines.append(f"{key} = {_toml(value)}{changed}")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    return json.dumps(value)


def pretrain(preset: str, settings: Iterable[str], run: Path, device_name: str, resume: bool,
             screen: Console, source: Path | None = None) -> LoopState:
    """Train `preset` into the folder `run`, or continue there. Raises ValueError on bad input.

    With `source`, a run or step folder, the model and its first weights are taken from there.
    Every rank that a launcher started calls this; the first writes what there is to write.
    """
    resume = resume or runtime.launch().restarts > 0
    config, start = _configure_run(preset, settings, run, resume, source, screen)
    if config.parallel.shard == 1:  # whole layers that come and go, kept, take twice the memory
        runtime.keep_large_blocks()
    with joined(config.parallel, device_name) as mesh, contextlib.ExitStack() as held:
        if mesh.rank:
            screen = Console(quiet=True)
        return _train(preset, config, start, run, mesh, screen, held)


def _train(preset: str, config: PretrainConfig, start: Start | None, run: Path, mesh: Mesh,
           screen: Console, held: contextlib.ExitStack) -> LoopState:
    check_fit(mesh.sizes, config.model, config.train.batch_size,
              config.train.micro_batch, config.train.sequence_length)
    data = _data_folder(config)
    train_tokens, validation_tokens = _open_data(data, config.train.validation_tokens)
    tokenizer = Tokenizer.load(data)
    checkpoints = Checkpoints(run, data, mesh)
    newest = checkpoints.newest_whole(lambda text: screen.print(text, soft_wrap=True))
    origin = newest or (start.folder if start else None)
    if origin is not None:
        _check_same_tokenizer(origin, tokenizer, config)
    check_vocabulary(tokenizer, config)

    layout = Layout(mesh, build_meta(config.model), config.train.seed)
    model = layout.model
    model.end_of_text = tokenizer.end_of_text
    first_length = config.train.lengths[0]
    model.trained_length = longest_read(origin, first_length) if origin else first_length
    optimizer = make_optimizer(model, config.optim)
    state = LoopState(**restore(newest, layout, optimizer)) if newest else LoopState()
    if start and not newest:
        read_weights(start.folder, layout)
    log: RunLog | NoLog = NoLog()
    if mesh.rank == 0:
        held.enter_context(runtime.claim(run))
        _write_config(run, config, preset, start)
        log = RunLog.resume(run, state.step, sinks=tracker(config.train.track, run))
    _introduce(config, state, start, mesh, screen)
    token_bytes_V = torch.zeros(config.model.vocab_size, dtype=torch.long)
    lengths = torch.tensor([len(text) for text in tokenizer.token_bytes()])
    token_bytes_V[:len(lengths)] = lengths
    _forward(model, config.train, mesh, screen)
    loop = Loop(
        layout=layout, optimizer=optimizer, clip=config.optim.clip, config=config.train,
        schedule=config.schedule,
        batches=OwnRows(train_tokens, config.train, layout), loss_fn=next_token_loss,
        probe=lambda length: validate(
            layout, sequential(validation_tokens, length, config.train.rows_of(length)),
            token_bytes_V),
        log=log, checkpoints=checkpoints, screen=screen, state=state)
    try:
        return loop.run()
    finally:
        log.close()


class OwnRows:
    """This rank's rows of every batch. Raises ValueError if the tokens are too few for one."""

    def __init__(self, tokens: Any, config: TrainConfig, layout: Layout) -> None:
        self.of_length = {}
        for length in config.lengths:
            size = config.batch_tokens // length
            self.of_length[length] = Batches(tokens, length, size, config.seed), layout.rows(size)

    def batch(self, index: int, length: int) -> Batch:
        batches, rows = self.of_length[length]
        return Batch(*batches.batch(index, rows))


def _forward(model: Any, config: TrainConfig, mesh: Mesh, screen: Console) -> Any:
    """The model as training calls it. Compiled code would not keep what recomputing saves."""
    if reason := grouping_obstacle(model, mesh.device):
        screen.print(f"experts one after the other: {reason}", soft_wrap=True)
    if config.recompute:
        recompute_blocks(model)
        return model
    whole = mesh.device.type == "cuda" and mesh.size == mesh.sizes["data"]
    return compiled(model) if whole else model


def _configure_run(preset: str, settings: Iterable[str], run: Path, resume: bool,
                   source: Path | None, screen: Console) -> tuple[PretrainConfig, Start | None]:
    """The run's configuration and start: as asked, or when resuming those it was begun with."""
    path = run / CONFIG
    if not path.exists():
        if resume:
            screen.print(f"nothing to resume in {run}; starting at step 0", soft_wrap=True)
        start = open_start(source) if source else None
        return configure(load_preset(preset), settings, start), start
    if not resume:
        raise ValueError(f"{run} already holds a run; --resume continues it, "
                         "or choose another folder for a new one")
    saved = json.loads(path.read_text(encoding="utf-8"))
    if "config" not in saved:
        raise ConfigError(f"{run} was written by fira import or export, so there is no training to "
                          f"resume; tune it with fira train {preset} --from {run} --run FOLDER")
    if saved["preset"] != preset:
        raise ConfigError(f"{run} was started from preset {saved['preset']}, not {preset}; "
                          f"write fira train {saved['preset']} --resume, or choose another --run")
    saved["config"].pop("parallel", None)  # a run does not remember who worked on it
    before, now = configure(saved["config"], ()), configure(saved["config"], settings)
    if now.model != before.model:
        changed = next(key for key, value in flatten(now.model).items()
                       if value != flatten(before.model).get(key))
        raise ConfigError(f"model.{changed} cannot change when a run is resumed; "
                          "start a new run with --run")
    return now, begun_from(saved, now.model, run, source)


def _data_folder(config: PretrainConfig) -> Path:
    if config.data.folder is None:
        raise ConfigError("data.folder is not set; prepare text with `fira data SOURCE "
                          "--tokenizer DIR --out DIR` and give data.folder=DIR")
    return Path(config.data.folder)


def _open_data(folder: Path, validation_tokens: int) -> tuple[Any, Any]:
    """Training and validation tokens, checked against their checksums."""
    train_tokens, validation = (Shards.open(folder, split) for split in ("train", "validation"))
    train_tokens.verify()
    validation.verify()
    if len(validation) < 2:
        raise ValueError(f"{folder} holds out no text; prepare it with more documents, "
                         "a smaller --validation-every, or --validation SOURCE")
    return train_tokens, validation[:validation_tokens + 1]


def check_vocabulary(tokenizer: Tokenizer, config: PretrainConfig) -> None:
    """Raises ConfigError if the model has no row for some token of `tokenizer`."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(f"model.vocab_size={config.model.vocab_size} is smaller than the "
                          f"tokenizer's {tokenizer.vocab_size}; "
                          f"try model.vocab_size={tokenizer.vocab_size}")


def _check_same_tokenizer(step: Path, tokenizer: Tokenizer, config: PretrainConfig) -> None:
    trained_with = Tokenizer.load(step).hash
    if trained_with != tokenizer.hash:
        raise ValueError(f"{config.data.folder} was made with tokenizer {tokenizer.hash[:12]}, "
                         f"but {step} was trained with {trained_with[:12]}; prepare the text again "
                         f"with --tokenizer {step}")


def _write_config(run: Path, config: PretrainConfig, preset: str, start: Start | None) -> None:
    count = count_parameters(config.model)
    record = {"preset": preset, **(start.record if start else {}),
              "config": config.model_dump(), "argv": sys.argv,
              "parameters": {"total": count.total, "active": count.active},
              "versions": runtime.versions(), "commit": runtime.commit(),
              "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    partial = run / f".{CONFIG}.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, run / CONFIG)


def _introduce(config: PretrainConfig, state: LoopState, start: Start | None, mesh: Mesh,
               screen: Console) -> None:
    """Say what is about to run, and what a changed horizon does to a resumed one."""
    count = count_parameters(config.model)
    screen.print(f"{config.model.architecture}: {count.total / 1e6:.2f}M parameters, "
                 f"{count.active / 1e6:.2f}M active per token, on {mesh}", soft_wrap=True)
    if start and not state.step:
        screen.print(f"starting from the weights in {start.folder}", soft_wrap=True)
    if state.step:
        fraction = fraction_done(config.train, state.step, state.seconds)
        rate = config.optim.lr * factor(config.schedule, fraction)
        screen.print(f"resuming after step {state.step}: {fraction:.0%} of the run is done, "
                     f"the learning rate continues at {rate:.2e}", soft_wrap=True)
