"""Distillation: a student learns from a teacher, which stays as it is.

Data, probe and loop are those of pre-training (a prepared folder) or of tuning (text and
conversations, packed). The loss differs, and answers may be the teacher's or the student's own.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from rich.console import Console

from fira.checkpoint import read_weights
from fira.config import Config, ConfigError, load_preset
from fira.convert.quantize import quantize
from fira.data.batches import DataConfig, Folder
from fira.data.conversations import Row
from fira.data.packs import PackedBatches, Packs, Part
from fira.data.tokenizer import THINK, Tokenizer
from fira.infer.request import SamplingParams
from fira.loss.distill import UNKNOWN, distillation_loss, forward, jensen_shannon, reverse
from fira.loss.head import IGNORED
from fira.model import build_meta
from fira.model.files import CONFIG, read_config
from fira.parallel.layout import Layout, read
from fira.parallel.mesh import Mesh
from fira.stages import pretrain, tune
from fira.stages.config import Opened, RunConfig, Stage, configure_new, open_start
from fira.stages.rollouts import draw_seed, write_answers
from fira.stages.run import train_run
from fira.stages.start import record_of
from fira.stages.teacher import ANSWERS, write_teacher_answers
from fira.stages.tune import TuneData, TuneOptions
from fira.train.loop import LoopState, Recipe
from fira.train.optim import product_dtype


class DistillData(TuneData, DataConfig):
    start: Folder = Field(description="step folder of the run that the student starts from, or of "
                          "the teacher")


class DistillOptions(Config):
    teacher: Folder = Field(description="step folder of the teacher")
    loss: Literal["forward", "reverse", "jsd"] = Field("forward", description="KL(teacher || "
        "student), KL(student || teacher), or their generalized Jensen-Shannon divergence")
    beta: float = Field(0.5, gt=0, lt=1, description="weight of the teacher in loss jsd")
    temperature: float = Field(1.0, gt=0, description="divisor of both models' logits")
    ce: float = Field(0.5, ge=0, le=1, description="weight of the cross-entropy of given text; the "
                      "divergence has the rest")
    on_policy: float = Field(0.0, ge=0, le=1, description="share of the conversations' sequences "
                             "with answers that the student writes itself")


class DistillConfig(RunConfig):
    """Everything that decides a distillation."""

    data: DistillData
    distill: DistillOptions

    def check(self) -> None:
        super().check()
        data, ranks, own = self.data, self.parallel, self.distill.on_policy
        if bool(data.folder or data.mix) == bool(data.text or data.chat):
            raise ConfigError("give --data FOLDER, or else --text FILES or --chat FILES")
        if own and (self.distill.ce == 1 or not data.chat):
            raise ConfigError(f"--on-policy {own:g} needs prompts to answer, and a divergence to "
                              "learn from the answers; give --chat FILES and --ce below 1")
        if ranks.pipeline > 1 or own and ranks.shard * ranks.expert > 1:
            raise ConfigError("the teacher reads with all blocks on a rank, and the student writes "
                              "with all weights; set parallel.pipeline=1, and with --on-policy "
                              "also parallel.shard=1 and parallel.expert=1")


def check_fit(config: DistillConfig) -> None:
    """Raises ConfigError if the teacher cannot read or score what the student does."""
    folder = Path(config.distill.teacher)
    teacher = read_config(folder / CONFIG)[0]
    for name, value, most in (("model.vocab_size", config.model.vocab_size, teacher.vocab_size),
                              ("train.sequence_length", config.train.sequence_length,
                               teacher.context)):
        if value > most:
            raise ConfigError(f"{name}={value} is more than the {most} tokens of the teacher; set "
                              f"{name}={most}, or choose another student")
    wanted = Tokenizer.load(folder).hash[:12]
    for other in {config.data.start, *(config.data.mix or [config.data.folder])} - {None}:
        if (found := Tokenizer.load(other).hash[:12]) != wanted:
            raise ConfigError(f"the teacher has tokenizer {wanted}, but {other} has {found}; give "
                              "a student that has the teacher's, and data prepared with "
                              f"--tokenizer {folder}")


def open_data(config: DistillConfig) -> Opened:
    """The text or the rows."""
    check_fit(config)
    return _parent(config).open_data(config)


def _parent(config: DistillConfig) -> Any:
    """The stage that reads such data."""
    return tune if config.data.text or config.data.chat else pretrain


def open_teacher(folder: Path, mesh: Mesh) -> Callable[[Any], tuple[Any, ...]]:
    """The model in a step folder, divided between the ranks like any other, as a function from
    batches to its features and head. It multiplies in bfloat16 where that is faster."""
    spec, notes = read_config(folder / CONFIG)
    model, kind, dtype = build_meta(spec), notes["quantization"], product_dtype(mesh.device)
    model = (quantize(model, kind) if kind else model).eval().requires_grad_(False)
    read_weights(folder, layout := Layout(mesh, model, seed=0))

    @torch.no_grad()
    def teach(batch: Any) -> tuple[Any, ...]:
        with torch.autocast(mesh.device.type, dtype, enabled=dtype != torch.float32):
            teacher = read(layout.model, batch)
            found = teacher.features(batch.tokens_BT), *teacher.head_weights()
        return tuple(None if one is None else one.to(dtype) for one in found)
    return teach


def recipe(config: DistillConfig, data: Any, tokenizer: Tokenizer, layout: Layout) -> Recipe:
    """That of pre-training or of tuning, with the loss of distillation, unless the cross-entropy is
    all of it."""
    options, parent, settings = config.distill, _parent(config), SimpleNamespace(**dict(config))
    if parent is tune:
        think = tokenizer.added.get(THINK)
        settings.tune = TuneOptions(thoughts=any(think in row.ids for row in data.train.rows))
    made = parent.recipe(settings, data, tokenizer, layout)
    if own := options.on_policy:
        target, *others = made.batches.parts
        answers = OwnAnswers(data.train, layout.model, tokenizer, config.train.seed)
        made = made._replace(batches=PackedBatches([
            target._replace(share=target.share * (1 - own)),
            Part("own answers", answers, target.share * own), *others], config.train, layout.rows))
    if options.ce == 1:
        return made
    divergence = {"forward": forward, "reverse": reverse, "jsd": jensen_shannon(options.beta)}
    return made._replace(loss_fn=distillation_loss(
        open_teacher(Path(options.teacher), layout.mesh), divergence[options.loss],
        options.temperature, options.ce))


class OwnAnswers:
    """The sequences of `packs`, whose rows' first answers `model` writes anew when they are read,
    with at most as many tokens as the row has left. Their targets are UNKNOWN."""

    def __init__(self, packs: Packs, model: Any, tokenizer: Tokenizer, seed: int) -> None:
        self.packs, self.model, self.tokenizer, self.seed = packs, model, tokenizer, seed
        self.length, self.key = packs.length, f"own-{packs.key}"

    def __len__(self) -> int:
        return len(self.packs)

    def read(self, numbers: np.ndarray) -> list[np.ndarray]:
        numbered = [(place, one) for place, number in enumerate(numbers)
                    for one in self.packs.packs[number]]
        rows = [self.packs.rows[one] for _, one in numbered]
        prompts = [row.ids[:row.trained.argmax()].tolist() for row in rows]
        room = max(len(row.ids) - len(ids) for row, ids in zip(rows, prompts, strict=True))
        answers = write_answers(self.model, self.tokenizer, prompts, [
            draw_seed(self.seed, one) for _, one in numbered], SamplingParams(room))
        cut = [Row(own.row.ids[:len(row.ids)], own.row.trained[:len(row.ids)])
               for row, own in zip(rows, answers, strict=True)]
        found = [Packs([row for row, (own, _) in zip(cut, numbered, strict=True) if own == place],
                       self.length).read(np.zeros(1, int)) for place in range(len(numbers))]
        ids, targets, positions = map(np.concatenate, zip(*found, strict=True))
        return [ids, np.where(targets == IGNORED, IGNORED, UNKNOWN), positions]


DISTILL = Stage("distill", DistillConfig, open_data, recipe)


def distill(teacher: Path | None, student: str | None, given: dict[str, Any],
            settings: Iterable[str], run: Path, device: str, resume: bool, screen: Console,
            sequence: bool = False, keep_right: bool = False, max_new: int = 256) -> LoopState:
    """`fira distill`: see `fira.stages.run.train_run`.

    `student` is a preset or a run, `given` are settings of data and distill; None and () are left
    out. A student that is a run has the rates and the length with which it, or else the teacher,
    was trained. With `sequence` the teacher answers the prompts of `given["chat"]`, and the loss is
    the cross-entropy of its answers.
    """
    values = {f"{'distill' if key in DistillOptions.model_fields else 'data'}.{key}": value
              for key, value in given.items() if value not in (None, ())}
    if sequence:
        values |= {"data.chat": [str(run / ANSWERS)], "distill.ce": 1.0}
    folder = open_start(teacher, quantized=True).folder if teacher else None
    if folder:
        values["distill.teacher"] = str(folder)
    if not (teacher and folder and student) or (run / CONFIG).exists():
        return train_run(DISTILL, None, [*_as_settings(values), *settings], run, device, resume,
                         screen)
    source = Path(student) if Path(student).is_dir() else None
    start = open_start(source) if source else None
    values["data.start"] = str(start.folder if start else folder)
    if source and start:
        base = record_of(source, start.folder) or record_of(teacher, folder)
        base = {key: base[key] for key in ("optim", "schedule", "train") if key in base}
    else:
        base = load_preset(student)
        values["model.vocab_size"] = read_config(folder / CONFIG)[0].vocab_size
    stage = DISTILL._replace(preset={**base, "data": {}, "distill": {}})
    settings = [*_as_settings(values), *settings]
    if sequence:
        check_fit(configure_new(stage, student, settings, start))  # before the long writing
        write_teacher_answers(folder, given["chat"], run / ANSWERS, SamplingParams(
            max_new, given.get("temperature") or 1.0), keep_right, device, screen)
    return train_run(stage, student, settings, run, device, resume, screen, source)


def _as_settings(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
