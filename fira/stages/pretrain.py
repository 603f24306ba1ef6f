"""Pre-training: the next token of prepared text."""
from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console

from fira.config import ConfigError
from fira.data.batches import DataConfig, Source, TextBatches, open_sources, sequential
from fira.data.shards import describe, read_manifest
from fira.data.tokenizer import Tokenizer
from fira.loss.head import next_token_loss
from fira.parallel.layout import Layout
from fira.stages.config import Opened, RunConfig, Stage
from fira.stages.run import train_run
from fira.train.loop import LoopState, Recipe, Score
from fira.train.validate import validate


class PretrainConfig(RunConfig):
    """Everything that decides a pre-training run."""

    data: DataConfig = DataConfig()

    def check(self) -> None:
        super().check()
        if self.data.separate_documents and self.parallel.pipeline > 1:
            raise ConfigError("data.separate_documents=true cannot mask attention with parallel."
                              f"pipeline={self.parallel.pipeline}; set one of them to its default")


def open_data(config: PretrainConfig) -> Opened:
    """The texts, and the folder of their tokenizer; all are compared with the manifests."""
    sources = open_sources(config.data, config.train.validation_tokens)
    for source in sources:
        if Tokenizer.load(source.folder).hash != read_manifest(source.folder)["tokenizer_hash"]:
            raise ValueError(f"{source.folder}/tokenizer.json is not the one that made its data "
                             "(see its manifest); copy that one back, or prepare the data again")
    return Opened(Path(sources[0].folder), sources, describe([one.folder for one in sources]))


def recipe(config: PretrainConfig, sources: list[Source], tokenizer: Tokenizer,
           layout: Layout) -> Recipe:
    """Shuffled text, cross-entropy, bits per byte: the mean over the texts by their shares."""
    end_of_text = tokenizer.end_of_text if config.data.separate_documents else None
    batches = TextBatches(sources, config.train, layout.rows, end_of_text)
    token_bytes_V = torch.zeros(config.model.vocab_size, dtype=torch.long)
    sizes = torch.tensor([len(text) for text in tokenizer.token_bytes()])
    token_bytes_V[:len(sizes)] = sizes

    def probe() -> tuple[dict[str, float], Score]:
        full, row = config.train.sequence_length, dict[str, float]()
        mean: dict[str, float] = {}
        length = min(layout.model.trained_length or full, full)
        for source in sources:
            found = validate(layout, sequential(
                source.held_out, length, config.train.micro_batch * full // length, end_of_text),
                token_bytes_V)
            for name, value in found.items():
                row[source.label(name)] = value
                mean[name] = (math.hypot if name.endswith("error") else operator.add)(
                    mean.get(name, 0.0), source.share * value)
        return row | mean, Score("bits_per_byte", mean["bits_per_byte"])

    return Recipe(batches, next_token_loss, probe)


PRETRAIN = Stage("pretrain", PretrainConfig, open_data, recipe)


def pretrain(preset: str | None, settings: Iterable[str], run: Path, device: str, resume: bool,
             screen: Console, source: Path | None = None, step: int | None = None) -> LoopState:
    """`fira train`: see `fira.stages.run.train_run`."""
    return train_run(PRETRAIN, preset, settings, run, device, resume, screen, source, step)
