"""Pre-training: the next token of prepared text."""
from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from rich.console import Console

from fira.config import Config, ConfigError
from fira.data.batches import Batch, Batches, Shards, sequential
from fira.data.tokenizer import Tokenizer
from fira.loss.head import next_token_loss
from fira.parallel.layout import Layout
from fira.stages.config import Opened, RunConfig, Stage
from fira.stages.run import train_run
from fira.train.config import TrainConfig
from fira.train.loop import LoopState, Recipe, Score
from fira.train.validate import validate


class DataConfig(Config):
    folder: Annotated[str, AfterValidator(os.path.abspath)] | None = Field(
        None, description="folder that `fira data` wrote")  # absolute: a run resumes from anywhere


class PretrainConfig(RunConfig):
    """Everything that decides a pre-training run."""

    data: DataConfig = DataConfig()


class TextBatches:
    """This rank's rows of every batch, in sequences that may grow over the run."""

    def __init__(self, tokens: Any, config: TrainConfig, layout: Layout) -> None:
        """Raises ValueError if the tokens are too few for one sequence."""
        self.config, self.layout = config, layout
        self.of_length = {length: Batches(tokens, length, config.batch_tokens // length,
                                          config.seed) for length in config.lengths}

    def batch(self, step: int, fraction: float) -> list[Batch]:
        length, model = self.config.length_at(fraction), self.layout.model
        if model.trained_length is not None:  # None: a model made elsewhere knows all its context
            model.trained_length = max(model.trained_length, length)
        source, rows = self.of_length[length], self.config.rows_of(length)
        own = source.batch(step, self.layout.rows(source.batch_size))
        return [Batch(*(part[first:first + rows] for part in own))
                for first in range(0, len(own.tokens_BT), rows)]


def open_data(config: PretrainConfig) -> Opened:
    """Training and validation tokens, checked against their checksums."""
    if config.data.folder is None:
        raise ConfigError("data.folder is not set; prepare text with `fira data SOURCE "
                          "--tokenizer DIR --out DIR` and give data.folder=DIR")
    folder = Path(config.data.folder)
    train, validation = (Shards(folder, split) for split in ("train", "validation"))
    train.verify()
    validation.verify()
    if len(validation) < 2:
        raise ValueError(f"{folder} holds out no text; prepare it with more documents, "
                         "a smaller --validation-every, or --validation SOURCE")
    return folder, (train, validation[:config.train.validation_tokens + 1])


def recipe(config: PretrainConfig, data: Any, tokenizer: Tokenizer, layout: Layout) -> Recipe:
    """Shuffled windows of text, cross-entropy, bits per byte of the held-out text."""
    train, validation = data
    batches = TextBatches(train, config.train, layout)
    token_bytes_V = torch.zeros(config.model.vocab_size, dtype=torch.long)
    sizes = torch.tensor([len(text) for text in tokenizer.token_bytes()])
    token_bytes_V[:len(sizes)] = sizes

    def probe() -> tuple[dict[str, float], Score]:
        full = config.train.sequence_length
        length = min(layout.model.trained_length or full, full)
        row = validate(layout, sequential(validation, length, config.train.rows_of(length)),
                       token_bytes_V)
        return row, Score("bits_per_byte", row["bits_per_byte"])

    return Recipe(batches, next_token_loss, probe)


PRETRAIN = Stage("pretrain", PretrainConfig, open_data, recipe)


def pretrain(preset: str | None, settings: Iterable[str], run: Path, device: str, resume: bool,
             screen: Console, source: Path | None = None, step: int | None = None) -> LoopState:
    """`fira train`: see `fira.stages.run.train_run`."""
    return train_run(PRETRAIN, preset, settings, run, device, resume, screen, source, step)
