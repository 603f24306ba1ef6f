"""The learning rate over a run, as a factor of its peak.

Time is the fraction of the run that is done, so one schedule serves a run measured in steps and a
run measured in minutes.
"""
from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from fira.config import Config


class ScheduleConfig(Config):
    kind: Literal["cosine", "constant"] = Field(
        "cosine", description="cosine: annealed all the way; constant: held, then decayed linearly")
    warmup: float = Field(0.02, ge=0, lt=1, description="fraction of the run that warms up")
    decay: float = Field(0.3, gt=0, le=1, description="constant: fraction of the run that decays")
    floor: float = Field(0.1, ge=0, le=1, description="final factor of the peak")


def factor(config: ScheduleConfig, fraction: float) -> float:
    """Learning rate over its peak after `fraction` (0..1) of the run."""
    fraction = min(max(fraction, 0.0), 1.0)
    if fraction < config.warmup:
        # The first step's fraction is 0; a hundredth of the peak lets it learn a little.
        return max(fraction / config.warmup, 0.01)
    if config.kind == "cosine":
        angle = math.pi * (fraction - config.warmup) / (1 - config.warmup)
        return config.floor + (1 - config.floor) * (1 + math.cos(angle)) / 2
    left = min((1 - fraction) / config.decay, 1.0)
    return config.floor + (1 - config.floor) * left
