"""How long a run is and how it is cut: into steps, micro-batches and sequences."""
from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from fira.config import Config


class TrainConfig(Config):
    sequence_length: int = Field(512, ge=1, description="tokens per sequence")
    first_length: int | None = Field(
        None, ge=1, description="of the sequences a run begins with; they double, up to "
        "sequence_length, each length for an equal part of the run")
    batch_tokens: int = Field(8192, ge=1, description="tokens per optimizer step")
    micro_batch: int = Field(4, ge=1, description="sequences per forward and backward pass")
    recompute: bool = Field(
        False, description="save memory: keep each block's input only, run it again in backward")
    steps: int | None = Field(None, ge=1, description="length of the run in optimizer steps")
    minutes: float | None = Field(None, gt=0, description="length of the run on the clock")
    save_every: int = Field(500, ge=1, description="steps between checkpoints, each evaluated")
    keep: int = Field(2, ge=1, description="newest checkpoints kept, besides the best")
    validation_tokens: int = Field(65536, ge=1, description="held-out tokens per evaluation")
    seed: int = Field(1, ge=0, description="of initialization, data order and dropout")
    track: Literal["none", "tensorboard", "wandb"] = Field("none", description="extra tracker")

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.steps is None and self.minutes is None:
            raise ValueError("train.steps and train.minutes are both unset; "
                             "give one, for example train.steps=500")
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
        """Tokens per sequence, from the first to the last."""
        lengths = [self.first_length or self.sequence_length]
        while lengths[-1] < self.sequence_length:
            lengths.append(2 * lengths[-1])
        return lengths

    def length_at(self, fraction: float) -> int:
        """Tokens per sequence after `fraction` (0..1) of the run."""
        return self.lengths[min(math.floor(fraction * len(self.lengths)), len(self.lengths) - 1)]

    def rows_of(self, length: int) -> int:
        """Sequences of a forward and backward pass, which are more if they are shorter."""
        return self.micro_batch * self.sequence_length // length

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.batch_tokens // self.sequence_length


def fraction_done(config: TrainConfig, step: int, seconds: float) -> float:
    """How much of the run is behind us, 0..1: by steps, by the clock, or whichever is further."""
    by_steps = step / config.steps if config.steps else 0.0
    by_clock = seconds / (60 * config.minutes) if config.minutes else 0.0
    return max(by_steps, by_clock)
