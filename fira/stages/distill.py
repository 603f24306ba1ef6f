"""Distillation: a student learns from a teacher, which stays as it is.

Data, probe and loop are those of pre-training (a prepared folder) or of tuning (text and
conversations, packed). The loss differs, and answers may be the teacher's or the student's own.
"""
from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from rich.console import Console
from torch import Tensor

from fira.checkpoint import read_weights
from fira.config import Config, ConfigError, load_preset, preset_names
from fira.convert.quantize import quantize
from fira.data.batches import DataConfig, Folder
from fira.data.packs import PackedBatches, Part
from fira.data.tokenizer import Tokenizer
from fira.infer.request import SamplingParams
from fira.loss.distill import distillation_loss, forward, jensen_shannon, reverse
from fira.model import build_meta
from fira.model.files import CONFIG, read_config
from fira.parallel.layout import Layout, read
from fira.parallel.mesh import Mesh
from fira.stages import pretrain, tune
from fira.stages.answers import OwnAnswers, write_teacher_answers
from fira.stages.config import Opened, RunConfig, Stage, open_start
from fira.stages.run import train_run
from fira.stages.start import record_of
from fira.train.loop import LoopState, Recipe
from fira.train.optim import product_dtype

ANSWERS = "answers.jsonl"  # the teacher's, in the run folder


class DistillData(tune.TuneData, DataConfig):
    start: Folder = Field(description="step folder of the model that the student starts as, or "
                                      "of the teacher")


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
    max_new: int = Field(256, ge=1, description="tokens of an answer that a model writes, at most")


class DistillConfig(RunConfig):
    """Everything that decides a distillation."""

    data: DistillData
    distill: DistillOptions

    def check(self) -> None:
        super().check()
        data, ranks, own = self.data, self.parallel, self.distill.on_policy
        if bool(data.folder or data.mix) == bool(data.text or data.chat):
            raise ConfigError("give --data FOLDER, or else --text FILES or --chat FILES")
        if ranks.pipeline > 1 or own and ranks.shard * ranks.expert > 1:
            raise ConfigError("on every rank the teacher reads, and with --on-policy the student "
                              "writes, with all blocks; set parallel.pipeline=1, and with "
                              "--on-policy also parallel.shard=1 and parallel.expert=1")
        if own and not data.chat:
            raise ConfigError(f"--on-policy {own:g} needs prompts to answer; give --chat FILES")


def open_data(config: DistillConfig) -> Opened:
    """The text or the rows. Raises ConfigError if the teacher cannot read, or score, what the
    student does."""
    folder = Path(config.distill.teacher)
    teacher = read_config(folder / CONFIG)[0]
    rows, length = config.model.vocab_size, config.train.sequence_length
    if teacher.vocab_size < rows:
        raise ConfigError(f"model.vocab_size={rows} is more than the {teacher.vocab_size} tokens "
                          "that the teacher knows; choose another student, or for a new one "
                          f"model.vocab_size={teacher.vocab_size}")
    if teacher.context < length:
        raise ConfigError(f"train.sequence_length={length} is longer than the {teacher.context} "
                          "tokens that the teacher reads; set "
                          f"train.sequence_length={teacher.context}")
    opened = _parent(config).open_data(config)
    _check_tokenizer(folder, opened.folder, f"prepare the text with --tokenizer {folder}")
    return opened._replace(about={**opened.about, "teacher": str(folder)})


def _parent(config: DistillConfig) -> Any:
    """The stage that reads such data."""
    return tune if config.data.text or config.data.chat else pretrain


def _check_tokenizer(teacher: Path, other: Path, remedy: str) -> None:
    """Raises ConfigError, with both hashes, if the ids of one mean other text in the other."""
    one, two = (Tokenizer.load(folder).hash for folder in (teacher, other))
    if one != two:
        raise ConfigError(f"the teacher {teacher} has tokenizer {one[:12]}, but {other} has "
                          f"{two[:12]}; {remedy}")


def open_teacher(folder: Path, mesh: Mesh) -> Callable[[Any], tuple[Tensor, Tensor, Tensor | None]]:
    """The model in a step folder, divided between the ranks like any other, as a function from
    batches to its features and head. It multiplies in bfloat16 where that is faster."""
    spec, notes = read_config(folder / CONFIG)
    model, kind = build_meta(spec), notes["quantization"]
    layout = Layout(mesh, quantize(model, kind) if kind else model, seed=0)
    read_weights(folder, layout)
    layout.model.eval().requires_grad_(False)
    dtype = product_dtype(mesh.device)

    @torch.no_grad()
    def teach(batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        with (contextlib.nullcontext() if dtype == torch.float32 else
              torch.autocast(mesh.device.type, dtype)):
            teacher = read(layout.model, batch)
            y_BTD, (weight_VD, bias_V) = teacher.features(batch.tokens_BT), teacher.head_weights()
        return y_BTD.to(dtype), weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
    return teach


def recipe(config: DistillConfig, data: Any, tokenizer: Tokenizer, layout: Layout) -> Recipe:
    """That of pre-training or of tuning; unless the cross-entropy is all of the loss, it becomes
    that of distillation."""
    options, made = config.distill, _parent(config).recipe(config, data, tokenizer, layout)
    if own := options.on_policy:
        target, *others = made.batches.parts
        written = OwnAnswers(data.train, layout.model, tokenizer, options.max_new,
                             config.train.seed)
        made = made._replace(batches=PackedBatches([
            target._replace(share=target.share * (1 - own)),
            Part("own answers", written, target.share * own), *others], config.train, layout.rows))
    if options.ce == 1:
        return made
    divergence = {"forward": forward, "reverse": reverse,
                  "jsd": jensen_shannon(options.beta)}[options.loss]
    return made._replace(loss_fn=distillation_loss(
        open_teacher(Path(options.teacher), layout.mesh), divergence, options.temperature,
        options.ce))


DISTILL = Stage("distill", DistillConfig, open_data, recipe)


def distill(teacher: Path | None, student: str | None, given: dict[str, Any],
            settings: Iterable[str], run: Path, device: str, resume: bool, screen: Console,
            sequence: bool = False, keep_right: bool = False) -> LoopState:
    """`fira distill`: see `fira.stages.run.train_run`.

    `student` is a preset or a run, `given` are settings of data and distill; None and () are left
    out. A student that is a run has the rates and the length with which it, or else the teacher,
    was trained. With `sequence` the teacher answers the prompts of `given["chat"]`, and the loss is
    the cross-entropy of its answers.
    """
    stage, preset, source = DISTILL, None, None
    values = {f"{'distill' if key in DistillOptions.model_fields else 'data'}.{key}": value
              for key, value in given.items() if value not in (None, ())}
    if teacher is not None:
        values["distill.teacher"] = str(open_start(teacher, quantized=True).folder)
    if teacher is not None and student is not None and not (run / CONFIG).exists():
        preset, source, base = student, *_open_student(student, teacher, values)
        stage = stage._replace(preset={**base, "data": {}, "distill": {}})
    if sequence:
        params = SamplingParams(given.get("max_new") or 256, given.get("temperature") or 1.0)
        if preset:
            write_teacher_answers(Path(values["distill.teacher"]), given["chat"], run / ANSWERS,
                                  params, keep_right, device, screen)
        values |= {"data.chat": [str(run / ANSWERS)], "distill.ce": 1.0}
    settings = [*(f"{key}={json.dumps(value)}" for key, value in values.items()), *settings]
    return train_run(stage, preset, settings, run, device, resume, screen, source)


def _open_student(student: str, teacher: Path, values: dict[str, Any]
                  ) -> tuple[Path | None, dict[str, Any]]:
    """The run that the student starts from, if it is no preset, and what it is trained with."""
    folder = Path(values["distill.teacher"])
    values["data.start"] = str(folder)
    if student in preset_names() or student.endswith(".toml") or not (
            os.sep in student or Path(student).is_dir()):
        values["model.vocab_size"] = read_config(folder / CONFIG)[0].vocab_size
        return None, load_preset(student)
    start = open_start(Path(student)).folder
    values["data.start"] = str(start)
    _check_tokenizer(folder, start, "choose a student with the same one")
    record = record_of(Path(student), start) or record_of(teacher, folder)
    return Path(student), {key: record[key] for key in ("optim", "schedule", "train")
                           if key in record}
