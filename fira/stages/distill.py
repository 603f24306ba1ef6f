"""Distillation: a student learns the whole distribution of a teacher on the same text.

Data, probe and loop are those of pre-training (a prepared folder) or of tuning (text and
conversations, packed); only the loss differs. The teacher is divided between the ranks as the
student is, and stays as it was.
"""
from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rich.console import Console

from fira.checkpoint import read_weights
from fira.config import Config, ConfigError, load_preset, preset_names
from fira.convert.quantize import quantize
from fira.data.batches import DataConfig, Folder
from fira.data.tokenizer import Tokenizer
from fira.files import MANIFEST, sha256
from fira.loss.distill import distillation_loss, forward, jensen_shannon, reverse
from fira.model import build_meta
from fira.model.files import CONFIG, WEIGHTS, read_config
from fira.parallel.layout import Layout, read
from fira.parallel.mesh import Mesh
from fira.stages import pretrain, tune
from fira.stages.config import Opened, RunConfig, Stage, open_start
from fira.stages.run import train_run
from fira.stages.start import record_of
from fira.train.loop import LoopState, Recipe
from fira.train.optim import product_dtype


class DistillData(tune.TuneData, DataConfig):
    start: Folder = Field(description="step folder of the model that the student starts as, or "
                                      "of the teacher")


class DistillOptions(Config):
    teacher: Folder = Field(description="step folder of the teacher")
    checksum: str = Field(description="SHA-256 of its weights")
    loss: Literal["forward", "reverse", "jsd"] = Field("forward", description="KL(teacher || "
        "student), KL(student || teacher), or their generalized Jensen-Shannon divergence")
    beta: float = Field(0.5, gt=0, lt=1, description="weight of the teacher in loss jsd")
    temperature: float = Field(1.0, gt=0, description="divisor of both models' logits")
    ce: float = Field(0.5, ge=0, le=1, description="weight of the cross-entropy of the text; the "
                      "divergence has the rest")


class DistillConfig(RunConfig):
    """Everything that decides a distillation."""

    data: DistillData
    distill: DistillOptions

    def check(self) -> None:
        super().check()
        if self.parallel.pipeline > 1:
            raise ConfigError(f"parallel.pipeline={self.parallel.pipeline} has no place for a "
                              "teacher; set it to 1, and parallel.shard instead")


def open_data(config: DistillConfig) -> Opened:
    """The text or the rows, and the teacher's files, compared with what the run was begun with."""
    options, teacher = config.distill, Path(config.distill.teacher)
    if sha256(teacher / WEIGHTS) != options.checksum:
        raise ValueError(f"{teacher} does not hold the teacher that the run was begun with "
                         f"(SHA-256 {options.checksum[:12]}); put it back, or begin a new run")
    if not (_is_prepared(config) or config.data.text or config.data.chat):
        raise ConfigError("there is nothing to read; give --data or --chat")
    _check_fit(config, read_config(teacher / CONFIG)[0])
    parent: Any = pretrain if _is_prepared(config) else tune
    opened = parent.open_data(config)
    _check_tokenizer(teacher, opened.folder, f"prepare the text with --tokenizer {teacher}")
    return opened._replace(about={**opened.about, "teacher": str(teacher)})


def _check_fit(config: DistillConfig, teacher: Any) -> None:
    """Raises ConfigError if the teacher cannot read, or score, what the student does."""
    rows, length = config.model.vocab_size, config.train.sequence_length
    if teacher.vocab_size < rows:
        raise ConfigError(f"model.vocab_size={rows} is more than the {teacher.vocab_size} tokens "
                          "that the teacher knows; choose another student, or for a new one "
                          f"model.vocab_size={teacher.vocab_size}")
    if teacher.context < length:
        raise ConfigError(f"train.sequence_length={length} is longer than the {teacher.context} "
                          "tokens that the teacher reads; set "
                          f"train.sequence_length={teacher.context}")


def _check_tokenizer(teacher: Path, other: Path, remedy: str) -> None:
    """Raises ConfigError, with both hashes, if the ids of one mean other text in the other."""
    one, two = (Tokenizer.load(folder).hash for folder in (teacher, other))
    if one != two:
        raise ConfigError(f"the teacher {teacher} has tokenizer {one[:12]}, but {other} has "
                          f"{two[:12]}; {remedy}")


def open_teacher(folder: Path, mesh: Mesh) -> Any:
    """The model in a step folder, divided like any other, in evaluation mode and frozen."""
    spec, notes = read_config(folder / CONFIG)
    model = build_meta(spec)
    layout = Layout(mesh, quantize(model, notes["quantization"]) if notes["quantization"]
                    else model, seed=0)
    read_weights(folder, layout)
    return layout.model.eval().requires_grad_(False)


def recipe(config: DistillConfig, data: Any, tokenizer: Tokenizer, layout: Layout) -> Recipe:
    """That of pre-training or of tuning, with the loss of distillation."""
    options = config.distill
    teacher = open_teacher(Path(options.teacher), layout.mesh)
    divergence = {"forward": forward, "reverse": reverse,
                  "jsd": jensen_shannon(options.beta)}[options.loss]
    parent: Any = pretrain if _is_prepared(config) else tune
    made = parent.recipe(config, data, tokenizer, layout)
    return made._replace(loss_fn=distillation_loss(
        lambda batch: read(teacher, batch), divergence, options.temperature, options.ce,
        product_dtype(layout.mesh.device)))


DISTILL = Stage("distill", DistillConfig, open_data, recipe)


def distill(teacher: Path | None, student: str | None, given: dict[str, Any],
            settings: Iterable[str], run: Path, device: str, resume: bool,
            screen: Console) -> LoopState:
    """`fira distill`: see `fira.stages.run.train_run`.

    `student` is a preset or a run, `given` the options by name, None or () where they are left out.
    A student that is a run is trained with the rates and the length that it, or else the teacher,
    was trained with, unless `settings` say otherwise.
    """
    stage, preset, source, values = DISTILL, None, None, _settings(given)
    if teacher is not None:
        folder = open_start(teacher, quantized=True).folder
        values |= {"distill.teacher": str(folder), "distill.checksum": sha256(folder / WEIGHTS)}
        if not (run / CONFIG).exists() and student is not None:
            preset, values["data.start"] = student, str(folder)
            if student in preset_names() or student.endswith(".toml") or not (
                    os.sep in student or Path(student).is_dir()):
                base = load_preset(student)
                values["model.vocab_size"] = read_config(folder / CONFIG)[0].vocab_size
            else:
                source = Path(student)
                start = open_start(source).folder
                _check_tokenizer(folder, start, "choose a student with the same one")
                base = record_of(source, start) or record_of(teacher, folder)
                base = {key: base[key] for key in ("optim", "schedule", "train") if key in base}
                values["data.start"] = str(start)
            stage = stage._replace(preset={**base, "data": {}, "distill": {}})
    settings = [*(f"{key}={json.dumps(value)}" for key, value in values.items()), *settings]
    return train_run(stage, preset, settings, run, device, resume, screen, source)


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """Options as settings by name. Raises ConfigError if a prepared folder is not alone."""
    values = {f"distill.{key}": given[key] for key in DistillOptions.model_fields
              if given.get(key) is not None}
    sources = [*(given.get("data") or ()), *(given.get("chat") or ())]
    prepared = [one for one in sources if (Path(one) / MANIFEST).is_file()]
    if prepared and len(sources) > 1:
        raise ConfigError(f"{prepared[0]} is a folder of fira data, which is read alone; leave the "
                          "other --data and --chat out, or mix such folders with settings "
                          "data.mix.FOLDER=WEIGHT instead of --data")
    if prepared:
        return {**values, "data.folder": os.path.abspath(prepared[0])}
    return values | {f"data.{key}": list(given[name]) for key, name in (
        ("text", "data"), ("chat", "chat"), ("held_out", "held_out")) if given.get(name)}


def _is_prepared(config: DistillConfig) -> bool:
    return bool(config.data.folder or config.data.mix)
