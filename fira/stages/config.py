"""What a run is to do: a preset with settings over it, or the settings that a run was begun with.

What cannot be is refused here, before a device is used or a file is written.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from fira import files
from fira.config import Config, ConfigError, flatten, load_preset, override, parse
from fira.convert.files import find_whole
from fira.convert.quantize import quantize
from fira.data.shards import read_manifest
from fira.data.tokenizer import Tokenizer
from fira.model import build_meta
from fira.model.files import CONFIG, WEIGHTS, check_tensors, read_config
from fira.model.spec import ModelSpec
from fira.parallel.layout import Layout
from fira.parallel.mesh import ParallelConfig
from fira.runlog import METRICS, TABLE
from fira.train.config import TrainConfig
from fira.train.loop import Recipe
from fira.train.optim import WEIGHT_DECAY, OptimConfig, ScheduleConfig

ROWS = 64  # token rows come in multiples of it, which matrix units of GPUs need for full speed
# Model settings that may change with --from, because they do not change what the model computes.
FREE = ("balance", "balance_weight", "dropout")
# Settings of older runs that are constants now, with the value that they all have; and new names.
WITHDRAWN = {"model.z_weight": 0.001, "model.init_std": 0.02, "optim.weight_decay": 0.1,
             "optim.clip": 1.0, "train.keep": 2, "parallel.schedule": "1f1b"}
RENAMED = {"optim.turns": "optim.expert_interval"}
# Settings that a checkpoint depends on: its tensors, the optimizer's state, the order of the data,
# the teacher.
FIXED = ("model.", "optim.rule", "train.seed", "distill.")
# What a run writes, or a model or data folder holds: a new run does not begin beside them.
TAKEN = (METRICS, TABLE, "training_progress.*", "step-*", "*.safetensors", "tokenizer.json")


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


class Opened(NamedTuple):
    """The data of a run, checked: the folder of its tokenizer, what the record says of it, and what
    the screen does."""

    folder: Path
    data: Any
    about: dict[str, Any]
    lines: Sequence[str] = ()


class Stage(NamedTuple):
    """One kind of training: open(config) checks the data before anything is written; recipe(config,
    data, tokenizer, layout) makes the batches, the loss and the probe of this rank.

    adapt(config, model, tokenizer) may freeze parameters of a model on meta and add others. A stage
    without presets has the settings `preset`. Only a `quantized` one starts from int8 or int4
    weights.
    """

    name: str
    config: type[RunConfig]
    open: Callable[[Any], Opened]
    recipe: Callable[[Any, Any, Tokenizer, Layout], Recipe]
    adapt: Callable[[Any, Any, Tokenizer], None] = lambda config, model, tokenizer: None
    preset: dict[str, Any] | None = None
    weight_decay: float = WEIGHT_DECAY
    quantized: bool = False

    def load(self, preset: str) -> dict[str, Any]:
        return load_preset(preset) if self.preset is None else self.preset


class Start(NamedTuple):
    """A step folder whose weights a run starts from, and its model's spec (`--from RUN`)."""

    folder: Path
    spec: Any


class Plan(NamedTuple):
    """What a run does; `before` are the settings that a run that is resumed had until now."""

    preset: str
    config: Any
    start: Start | None
    before: Any = None


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


def configure_new(stage: Stage, preset: str, settings: Iterable[str], start: Start | None) -> Any:
    """`configure` for a run that begins. Unless `settings` or `start` say otherwise, its model gets
    the token rows that the data folder's tokenizer needs, up to a multiple of ROWS."""
    config = configure(stage, stage.load(preset), settings, start)
    if start or config.data.folder is None:
        return config
    rows = -(-read_manifest(config.data.folder)["vocab_size"] // ROWS) * ROWS
    return configure(stage, stage.load(preset), [f"model.vocab_size={rows}", *settings])


def describe(stage: Stage, preset: str, settings: Iterable[str],
             source: Path | None = None) -> str:
    """The resolved configuration, one setting per line; what differs from the preset is marked."""
    start = open_start(source, stage.quantized) if source else None
    base = flatten(configure(stage, load_preset(preset), ()))
    now = flatten(configure_new(stage, preset, settings, start))
    return "\n".join(f"{key} = {json.dumps(value)}" + (
        f"   # preset: {json.dumps(base.get(key))}" if value != base.get(key) else "")
        for key, value in now.items())


def make_plan(stage: Stage, preset: str | None, settings: Iterable[str], run: Path, resume: bool,
              source: Path | None, screen: Console) -> Plan:
    """A new run as asked, or the run in the folder as it was begun, with `settings` over that."""
    if (run / CONFIG).exists():
        return _continued(stage, preset, settings, run, resume, source)
    if taken := [path.name for pattern in TAKEN for path in run.glob(pattern)]:
        raise ValueError(f"{run} holds {taken[0]} but no {CONFIG} of a run; choose another --run "
                         f"folder, or put {CONFIG} back if this was a run")
    if preset is None:
        raise ConfigError(f"{run.absolute()} holds no run to resume; give the PRESET of a new run, "
                          "or the --run folder of one that exists")
    if resume:
        screen.print(f"nothing to resume in {run.absolute()}; starting at step 0", soft_wrap=True)
    start = open_start(source, stage.quantized) if source else None
    return Plan(preset, configure_new(stage, preset, settings, start), start)


def _continued(stage: Stage, preset: str | None, settings: Iterable[str], run: Path, resume: bool,
               source: Path | None) -> Plan:
    path = run / CONFIG
    remedy = f"restore it from a backup, or start a new run from its weights with --from {run}"
    saved = files.read_json(path, remedy)
    begun = saved.get("preset")
    if not isinstance(begun, str):
        raise ValueError(f"{path} is not the record of a run: it has no preset; choose another "
                         "--run folder, or restore the file from a backup")
    if "config" not in saved:
        raise ConfigError(f"{run} is an import or export, with no training to resume; tune it with "
                          f"fira train {preset or 'PRESET'} --from {run} --run FOLDER")
    if not resume:
        raise ValueError(f"{run} already holds a run; --resume continues it, "
                         "or choose another folder for a new one")
    if preset is not None and Path(preset).stem != Path(begun).stem:  # a file may have moved
        raise ConfigError(f"{run} was started from preset {begun}, not {preset}; leave the preset "
                          "out, or choose another --run")
    try:
        kept = modernize(saved["config"])
        before = configure(stage, kept, ())
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: {error}; {remedy}") from None
    now, old = configure(stage, kept, settings), flatten(before)
    for key, value in flatten(now).items():
        if key.startswith(FIXED) and value != old.get(key):
            raise ConfigError(f"{key}={value} cannot change when a run is resumed, which has "
                              f"{old.get(key)}; leave it out, or start a new run with --run")
    return Plan(begun, now, _start_of(stage, saved, now.model, run, source), before)


def modernize(config: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration in today's terms, without how many ranks trained. Raises ConfigError
    for a setting that was withdrawn and had another value than all runs have now."""
    config = {name: dict(section) for name, section in config.items()}
    for key, value in WITHDRAWN.items():
        section, leaf = key.split(".")
        if (found := config.get(section, {}).pop(leaf, value)) != value:
            raise ConfigError(f"this run was begun with {key}={found}, which is {value} in every "
                              "run now")
    for old, new in RENAMED.items():
        section, leaf = old.split(".")
        if leaf in config.get(section, {}):
            config[section][new.split(".")[1]] = config[section].pop(leaf)
    config.pop("parallel", None)
    return config


def open_start(run: Path, quantized: bool = False) -> Start:
    """The newest complete step of a run folder, or a step folder. Raises ValueError, one line, if
    there is none that can be trained: an adapter, or int8 or int4 weights unless `quantized`."""
    folder = find_whole(run)
    spec, notes = read_config(folder / CONFIG)
    if notes["base"]:
        raise ValueError(f"{folder} holds an adapter, which is not trained further by another run; "
                         f"write a whole model with fira merge {run} OUT, and give OUT")
    model, kind = build_meta(spec), notes["quantization"]
    if kind and not quantized:
        raise ValueError(f"{folder} holds {kind} weights, which cannot be trained; use the run it "
                         "was made from, or train an adapter with fira tune")
    check_tensors(folder / WEIGHTS, (quantize(model, kind) if kind else model).state_dict())
    return Start(folder, spec)


def _start_of(stage: Stage, saved: dict[str, Any], spec: Any, run: Path, asked: Path | None
              ) -> Start | None:
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
    return Start(Path(before), spec) if own else open_start(Path(before), stage.quantized)
