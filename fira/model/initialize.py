"""Initial weights, reproducible from one generator and complete after meta-device construction."""
from __future__ import annotations

import math

import torch
from torch import nn


@torch.no_grad()
def initialize(model: nn.Module, num_layers: int, std: float,
               generator: torch.Generator | None = None) -> None:
    """Fill every parameter and buffer of `model` in place.

    Normal with `std`; matrices that write into the residual stream (`output`, `down`) get
    std / sqrt(2L), so that its variance does not grow with depth (GPT-2); biases 0, norms 1.
    """
    for name, parameter in model.named_parameters():
        module = name.split(".")[-2]
        if name.endswith("bias"):
            parameter.zero_()
        elif module.endswith("norm"):
            parameter.fill_(1)
        else:
            scale = math.sqrt(2 * num_layers) if module in ("output", "down") else 1
            parameter.normal_(0, std / scale, generator=generator)
    reset_buffers(model)


def reset_buffers(model: nn.Module) -> None:
    """Recompute what is not a weight: rotary tables, load shares, counters."""
    for module in model.modules():
        reset = getattr(module, "reset_buffers", None)
        if reset is not None:
            reset()
