"""Open a run, whatever stage it is of: configure, describe, claim, resume, train, close.

A stage is a name, its settings, what it opens before anything is written, and a recipe for the
training loop (fira/stages/pretrain.py is the first). All else about runs stands here, once.
"""
from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from fira import files, runtime
from fira.checkpoint import Checkpoints, read_weights, restore
from fira.config import Config, ConfigError, flatten, load_preset, override, parse
from fira.convert.files import find_whole
from fira.data.tokenizer import Tokenizer
from fira.model import build_meta
from fira.model.files import CONFIG, WEIGHTS, check_tensors, knows_chat, read_config
from fira.model.moe import grouping_obstacle
from fira.model.spec import ModelSpec
from fira.model.transformer import count_parameters
from fira.parallel.layout import Layout
from fira.parallel.mesh import Mesh, ParallelConfig, check_fit, joined
from fira.runlog import NoLog, RunLog, tracker
from fira.train.config import TrainConfig
from fira.train.loop import Loop, LoopState, Recipe, fraction_done
from fira.train.optim import OptimConfig, ScheduleConfig, make_optimizer, rate_factor
from fira.train.recompute import recompute_blocks

# Model settings that may change with --from, because they do not change what the model computes.
FREE = ("balance", "balance_weight", "dropout")
# Settings of older runs that are constants now, with the value that they all have; and new names.
WITHDRAWN = {"model.z_weight": 0.001, "model.init_std": 0.02, "optim.weight_decay": 0.1,
             "optim.clip": 1.0, "train.keep": 2, "parallel.schedule": "1f1b"}
RENAMED = {"optim.turns": "optim.expert_interval"}


class RunConfig(Config):
    """The settings of every run; a stage adds a section `data` of its own."""

    model: ModelSpec
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()

    def check(self) -> None:
        """Raises ConfigError where sections do not fit each other."""
        if self.train.sequence_length > self.model.context:
            raise ConfigError(f"train.sequence_length={self.train.sequence_length} is longer than "
                              f"model.context={self.model.context}; "
                              f"try train.sequence_length={self.model.context}")
        follows, pipeline = self.optim.head_follows, self.parallel.pipeline
        if follows and getattr(self.model, "tied", False):
            raise ConfigError(f"optim.head_follows={follows:g}, but the head is the embedding; set "
                              "model.tied=false or optim.head_follows=0")
        if follows and pipeline > 1:
            raise ConfigError(f"optim.head_follows={follows:g} needs embedding and head on one "
                              f"rank, not at the ends of parallel.pipeline={pipeline}; set the "
                              "first to 0 or the second to 1")


Opened = tuple[Path, Any]  # the folder of a stage's tokenizer, and its data


class Stage(NamedTuple):
    """One kind of training: open(config) checks the data before anything is written; recipe(config,
    data, tokenizer, layout) makes the batches, the loss and the probe of this rank."""

    name: str
    config: type[RunConfig]
    open: Callable[[Any], Opened]
    recipe: Callable[[Any, Any, Tokenizer, Layout], Recipe]


class Start(NamedTuple):
    """A step folder whose weights a run starts from, and its model's spec (`--from RUN`)."""

    folder: Path
    spec: Any


def configure(stage: Stage, preset: dict[str, Any], settings: Iterable[str],
              start: Start | None = None) -> Any:
    """`settings` over `preset`, checked. Raises ConfigError. A length given in steps or minutes
    replaces the preset's, and a `start` replaces its model."""
    if start:
        preset = preset | {"model": start.spec.model_dump()}
    settings = list(settings)
    given = {setting.partition("=")[0] for setting in settings}
    for key in given & (WITHDRAWN.keys() | RENAMED.keys()):
        raise ConfigError(f"{key} is called {RENAMED[key]} now" if key in RENAMED else
                          f"{key} cannot be set any more: it is {WITHDRAWN[key]} in every run; "
                          "leave it out")
    lengths = {"train.steps", "train.minutes"}
    if len(given & lengths) == 1:
        settings.append(f"{(lengths - given).pop()}=null")
    config = parse(stage.config, override(preset, settings))
    config.check()
    before = flatten(start.spec) if start else {}
    for key, value in flatten(config.model).items():
        if start and value != before.get(key) and key not in FREE:
            raise ConfigError(f"model.{key}={value} does not go with --from {start.folder}, "
                              f"whose model has {key}={before.get(key)}; leave it out, or "
                              "train a new model without --from")
    return config


def describe(stage: Stage, preset: str, settings: Iterable[str],
             source: Path | None = None) -> str:
    """The resolved configuration, one setting per line; what differs from the preset is marked."""
    base = flatten(configure(stage, load_preset(preset), ()))
    start = open_start(source) if source else None
    lines = []
    for key, value in flatten(configure(stage, load_preset(preset), settings, start)).items():
        changed = f"   # preset: {json.dumps(base.get(key))}" if value != base.get(key) else ""
        lines.append(f"{key} = {json.dumps(value)}{changed}")
    return "\n".join(lines)


def train_run(stage: Stage, preset: str, settings: Iterable[str], run: Path, device_name: str,
              resume: bool, screen: Console, source: Path | None = None) -> LoopState:
    """Train into the folder `run`, or continue there. Raises ValueError on bad input.

    With `source`, a run or step folder, the model and its first weights are taken from there.
    Every rank that a launcher started calls this; the first one writes.
    """
    resume = resume or runtime.launch().restarts > 0
    config, start = _configure_run(stage, preset, settings, run, resume, source, screen)
    if config.parallel.shard == 1:  # sharded layers come and go: kept memory would be twice as much
        runtime.keep_large_blocks()
    with joined(config.parallel, device_name) as mesh, contextlib.ExitStack() as held:
        if mesh.rank:
            screen = Console(quiet=True)
        check_fit(mesh.sizes, config.model, config.train.batch_size, config.train.micro_batch,
                  config.train.sequence_length)
        opened = stage.open(config)
        if mesh.rank == 0:
            run.mkdir(parents=True, exist_ok=True)
            held.enter_context(runtime.claim(run))
        mesh.wait()
        loop = _open(stage, preset, config, start, run, mesh, opened, screen)
        held.callback(loop.log.close)
        return loop.run()


def _open(stage: Stage, preset: str, config: Any, start: Start | None, run: Path, mesh: Mesh,
          opened: Opened, screen: Console) -> Loop:
    """The loop of a run that this process has claimed, at its newest checkpoint."""
    folder, data = opened
    tokenizer, checkpoints = Tokenizer.load(folder), Checkpoints(run, folder, mesh)
    newest = checkpoints.newest_whole(lambda text: screen.print(text, soft_wrap=True))
    origin = newest or (start.folder if start else None)
    if origin is not None:
        _check_same_tokenizer(origin, tokenizer, folder)
    check_vocabulary(tokenizer, config.model)

    layout = Layout(mesh, build_meta(config.model), config.train.seed)
    _note(layout.model, stage, tokenizer, origin)
    recipe = stage.recipe(config, data, tokenizer, layout)
    optimizer = make_optimizer(layout.model, config.optim)
    state = LoopState(**restore(newest, layout, optimizer)) if newest else LoopState()
    if start and not newest:
        read_weights(start.folder, layout)
    _speed_up(layout.model, config.train.recompute, mesh, screen)
    log: RunLog | NoLog = NoLog()
    if mesh.rank == 0:
        _write_config(run, stage, config, preset, start)
        log = RunLog.resume(run, state.step, sinks=tracker(config.train.track, run))
    _introduce(config, state, start, mesh, screen)
    return Loop(layout, optimizer, config.train, config.schedule, recipe, log, checkpoints, screen,
                state)


def _note(model: Any, stage: Stage, tokenizer: Tokenizer, origin: Path | None) -> None:
    """What the step folders of this run say of their model, besides its spec."""
    model.stage, model.end_of_text = stage.name, tokenizer.end_of_text
    model.chat = bool(origin and knows_chat(origin))
    # 0: nothing read yet. A model made elsewhere has no such note: it reads its whole context.
    model.trained_length = read_config(origin / CONFIG)[1]["trained_length"] if origin else 0


def _speed_up(model: Any, recompute: bool, mesh: Mesh, screen: Console) -> None:
    """Recompute blocks to save memory, or compile them on CUDA (compiled code would keep them)."""
    if reason := grouping_obstacle(model, mesh.device):
        screen.print(f"experts are multiplied one after the other: {reason}", soft_wrap=True)
    if recompute:
        recompute_blocks(model)
    elif mesh.device.type == "cuda" and mesh.size == mesh.sizes["data"]:
        for block in model.blocks:  # the same graph for every block, so it is made once
            block.compile(fullgraph=True)


def _configure_run(stage: Stage, preset: str, settings: Iterable[str], run: Path, resume: bool,
                   source: Path | None, screen: Console) -> tuple[Any, Start | None]:
    """The run's configuration and start: as asked, or when resuming those it was begun with."""
    path = run / CONFIG
    if not path.exists():
        if resume:
            screen.print(f"nothing to resume in {run}; starting at step 0", soft_wrap=True)
        start = open_start(source) if source else None
        return configure(stage, load_preset(preset), settings, start), start
    if not resume:
        raise ValueError(f"{run} already holds a run; --resume continues it, "
                         "or choose another folder for a new one")
    saved = files.read_json(path, "restore it from a backup or start a new run")
    if "config" not in saved:
        raise ConfigError(f"{run} was written by fira import or export, so there is no training to "
                          f"resume; tune it with fira train {preset} --from {run} --run FOLDER")
    if saved["preset"] != preset:
        raise ConfigError(f"{run} was started from preset {saved['preset']}, not {preset}; "
                          f"write fira train {saved['preset']} --resume, or choose another --run")
    kept = modernize(saved["config"])
    before, now = configure(stage, kept, ()), configure(stage, kept, settings)
    if now.model != before.model:
        changed = next(key for key, value in flatten(now.model).items()
                       if value != flatten(before.model).get(key))
        raise ConfigError(f"model.{changed} cannot change when a run is resumed; "
                          "start a new run with --run")
    return now, _start_of(saved, now.model, run, source)


def modernize(config: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration in today's terms, without how many ranks trained. Raises ConfigError
    for a setting that was withdrawn and had another value than all runs have now."""
    config = {name: dict(section) for name, section in config.items()}
    for key, value in WITHDRAWN.items():
        section, leaf = key.split(".")
        if (found := config[section].pop(leaf, value)) != value:
            raise ConfigError(f"this run was begun with {key}={found}, which is {value} in every "
                              "run now; start a new run from its weights with --from")
    for old, new in RENAMED.items():
        section, leaf = old.split(".")
        if leaf in config[section]:
            config[section][new.split(".")[1]] = config[section].pop(leaf)
    del config["parallel"]
    return config


def open_start(run: Path) -> Start:
    """The newest complete step of a run folder, or a step folder. Raises ValueError, one line, if
    there is none that can be trained."""
    folder = find_whole(run)
    spec, notes = read_config(folder / CONFIG)
    if notes["quantization"]:
        raise ValueError(f"{folder} holds {notes['quantization']} weights, which cannot be "
                         "trained; use the run it was made from")
    check_tensors(folder / WEIGHTS, build_meta(spec).state_dict())
    return Start(folder, spec)


def _start_of(saved: dict[str, Any], spec: Any, run: Path, asked: Path | None) -> Start | None:
    """What a run that is resumed was started from, by its record. Raises ConfigError if `asked`,
    the --from of today, is something else."""
    before = saved.get("from")
    if asked is not None and (before is None or asked.resolve() not in (
            Path(before).resolve(), Path(before).resolve().parent)):
        raise ConfigError(f"{run} was started from {before or 'new weights'}, not {asked}; leave "
                          "--from out to resume it, or choose another --run")
    if before is None:
        return None
    own = any(run.glob("step-*"))  # with steps of its own it no longer needs the other run
    return Start(Path(before), spec) if own else open_start(Path(before))


def check_vocabulary(tokenizer: Tokenizer, spec: Any) -> None:
    """Raises ConfigError if the model has no row for some token of `tokenizer`."""
    if tokenizer.vocab_size > spec.vocab_size:
        raise ConfigError(f"model.vocab_size={spec.vocab_size} is smaller than the "
                          f"tokenizer's {tokenizer.vocab_size}; "
                          f"try model.vocab_size={tokenizer.vocab_size}")


def _check_same_tokenizer(step: Path, tokenizer: Tokenizer, folder: Path) -> None:
    trained_with = Tokenizer.load(step).hash
    if trained_with != tokenizer.hash:
        raise ValueError(f"{folder} was made with tokenizer {tokenizer.hash[:12]}, "
                         f"but {step} was trained with {trained_with[:12]}; prepare the text again "
                         f"with --tokenizer {step}")


def _write_config(run: Path, stage: Stage, config: Any, preset: str, start: Start | None) -> None:
    count = count_parameters(build_meta(config.model))
    files.write_json(run / CONFIG, {
        "preset": preset, "stage": stage.name,
        **({"from": str(start.folder.resolve())} if start else {}),
        "config": config.model_dump(), "argv": sys.argv,
        "parameters": {"total": count.total, "active": count.active},
        "versions": runtime.versions(), "commit": runtime.commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")})


def _introduce(config: Any, state: LoopState, start: Start | None, mesh: Mesh,
               screen: Console) -> None:
    """Say what is about to run, and where a resumed run continues."""
    count = count_parameters(build_meta(config.model))
    screen.print(f"{config.model.architecture}: {count.total / 1e6:.2f}M parameters, "
                 f"{count.active / 1e6:.2f}M active per token, on {mesh}", soft_wrap=True)
    if start and not state.step:
        screen.print(f"starting from the weights in {start.folder}", soft_wrap=True)
    if state.step:
        fraction = fraction_done(config.train, state.step, state.seconds)
        rate = config.optim.lr * rate_factor(config.schedule, fraction)
        screen.print(f"resuming after step {state.step}: {fraction:.0%} of the run is done, "
                     f"the learning rate continues at {rate:.2e}", soft_wrap=True)
