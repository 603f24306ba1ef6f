"""How long a run is, how often it is saved, and its learning rate over time: settings and rules.

Time is the fraction of the run that is done, 0 to 1, so that the same rules serve a run whose
length is given in steps and one whose length is given in minutes.
"""
from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from fira.config import Config


class LoopConfig(Config):
    """What the training loop itself reads."""

    steps: int | None = Field(None, ge=1, description="length of the run in optimizer steps")
    minutes: float | None = Field(None, gt=0, description="length of the run in minutes")
    save_every: int = Field(500, ge=1, description="steps between checkpoints, each evaluated")
    seed: int = Field(1, ge=0, description="seed of initialization, data order and dropout")
    recompute: bool = Field(
        False, description="save memory: keep only each block's input and compute the block again "
        "in the backward pass")
    track: Literal["none", "tensorboard", "wandb"] = Field(
        "none", description="experiment tracker that also receives every row")

    @model_validator(mode="after")
    def _check_length(self) -> LoopConfig:
        if self.steps is None and self.minutes is None:
            raise ValueError("train.steps and train.minutes are both unset; "
                             "give one, for example train.steps=500")
        return self


class TrainConfig(LoopConfig):
    """The loop's settings and how text is cut into batches, which the batch source reads."""

    sequence_length: int = Field(512, ge=1, description="tokens per sequence")
    first_length: int | None = Field(
        None, ge=1, description="tokens per sequence at the start of the run; the length doubles "
        "until it is sequence_length, and every length gets an equal part of the run")
    batch_tokens: int = Field(8192, ge=1, description="tokens per optimizer step")
    micro_batch: int = Field(4, ge=1, description="sequences per forward and backward pass")
    validation_tokens: int = Field(65536, ge=1, description="held-out tokens per evaluation")

    @model_validator(mode="after")
    def _check_batch(self) -> TrainConfig:
        rows = self.micro_batch * self.sequence_length
        if self.batch_tokens % rows:
            raise ValueError(f"train.batch_tokens={self.batch_tokens} must divide by micro_batch * "
                             f"sequence_length = {rows}; try "
                             f"train.batch_tokens={max(1, round(self.batch_tokens / rows)) * rows}")
        if self.lengths[-1] != self.sequence_length:
            raise ValueError(f"train.first_length={self.first_length} does not become "
                             f"train.sequence_length={self.sequence_length} by doubling; "
                             f"try train.first_length={self.sequence_length // 2 or 1}")
        return self

    @property
    def lengths(self) -> list[int]:
        """Tokens per sequence, from the first length to the last."""
        lengths = [self.first_length or self.sequence_length]
        while lengths[-1] < self.sequence_length:
            lengths.append(2 * lengths[-1])
        return lengths

    def length_at(self, fraction: float) -> int:
        """Tokens per sequence after `fraction` (0..1) of the run."""
        return self.lengths[min(math.floor(fraction * len(self.lengths)), len(self.lengths) - 1)]

    def rows_of(self, length: int) -> int:
        """Sequences of `length` per micro-batch: shorter ones are more, so that tokens stay."""
        return self.micro_batch * self.sequence_length // length

    @property
    def batch_size(self) -> int:
        """Sequences of the full length per optimizer step."""
        return self.batch_tokens // self.sequence_length


class ScheduleConfig(Config):
    """The learning rate as a factor of its peak."""

    kind: Literal["cosine", "constant"] = Field(
        "cosine", description="cosine: annealed all the way; constant: held, then decayed linearly")
    warmup: float = Field(0.02, ge=0, lt=1, description="fraction of the run that warms up")
    decay: float = Field(0.3, gt=0, le=1, description="constant: fraction of the run that decays")
    floor: float = Field(0.1, ge=0, le=1, description="final factor of the peak")


def fraction_done(config: LoopConfig, step: int, seconds: float) -> float:
    """The fraction of the run that is done, 0..1: by steps or by the clock, the larger."""
    by_steps = step / config.steps if config.steps else 0.0
    by_clock = seconds / (60 * config.minutes) if config.minutes else 0.0
    return max(by_steps, by_clock)


def rate_factor(config: ScheduleConfig, fraction: float) -> float:
    """Learning rate over its peak after `fraction` (0..1) of the run."""
    fraction = min(max(fraction, 0.0), 1.0)
    if fraction < config.warmup:
        # The first step's fraction is 0: with a hundredth of the peak it learns a little.
        return max(fraction / config.warmup, 0.01)
    if config.kind == "cosine":
        angle = math.pi * (fraction - config.warmup) / (1 - config.warmup)
        return config.floor + (1 - config.floor) * (1 + math.cos(angle)) / 2
    left = min((1 - fraction) / config.decay, 1.0)
    return config.floor + (1 - config.floor) * left
