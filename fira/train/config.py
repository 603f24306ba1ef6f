"""Settings of a run: how long it is, how often it is saved, and how text is cut into batches."""
from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fira.config import Config


class LoopConfig(Config):
    """What the training loop itself reads."""

    steps: int | None = Field(None, ge=1, description="length of the run in optimizer steps")
    minutes: float | None = Field(None, gt=0, description="length of the run in minutes")
    stop_after_minutes: float | None = Field(
        None, gt=0, description="minutes of training after which a launch saves and ends")
    patience: int | None = Field(
        None, ge=1, description="evaluations without a better score after which the run ends")
    save_every: int = Field(500, ge=1, description="steps between checkpoints, each evaluated")
    keep_every: int | None = Field(
        None, ge=1, description="steps between checkpoints that are never deleted")
    seed: int = Field(1, ge=0, description="seed of initialization, data order and dropout")
    recompute: bool = Field(
        False, description="save memory: keep only each block's input and compute the block again "
        "in the backward pass")
    track: Literal["none", "tensorboard", "wandb"] = Field(
        "none", description="experiment tracker that also receives every row")
    track_project: str = Field("fira", min_length=1, description="project of the run in wandb")
    track_name: str | None = Field(
        None, min_length=1, description="name of the run in wandb; null takes the run folder's")

    @model_validator(mode="after")
    def _check_length(self) -> LoopConfig:
        if self.steps is None and self.minutes is None:
            raise ValueError("train.steps and train.minutes are both unset; "
                             "give one, for example train.steps=500")
        if self.keep_every and self.keep_every % self.save_every:
            fit = -(-self.keep_every // self.save_every) * self.save_every
            raise ValueError(f"train.keep_every={self.keep_every} must be a multiple of "
                             f"train.save_every={self.save_every}; try train.keep_every={fit}")
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

    @property
    def batch_size(self) -> int:
        """Sequences of the full length per optimizer step."""
        return self.batch_tokens // self.sequence_length
