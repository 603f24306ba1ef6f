"""FIRA2 with a shared expert, which every token goes to, beside the routed ones.

It would leave Qwen3-MoE's mathematics, which FIRA2 keeps, so it is here and not in the model: only
to measure what it would be worth. Any command of `fira`, with such an expert in every block:

    python benchmarks/shared_expert.py WIDTH train tiny ...
"""
from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from torch import Tensor, nn

from fira.model import fira2
from fira.model.moe import Dense, SwiGLUExperts


class Beside(nn.Module):
    """x_BTD -> the routed experts' answer plus the shared one's."""

    def __init__(self, routed: nn.Module, shared: nn.Module) -> None:
        super().__init__()
        self.routed = routed
        self.shared = shared

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.routed(x_BTD) + self.shared(x_BTD)


@contextlib.contextmanager
def shared_expert(width: int) -> Iterator[None]:
    """Blocks of FIRA2 that are built inside have one of this width; of width 0 none."""
    plain = fira2.Block.__init__

    def init(self: fira2.Block, spec: fira2.FIRA2Spec) -> None:
        plain(self, spec)
        if width:
            self.moe = Beside(self.moe, Dense(SwiGLUExperts(1, spec.d_model, width)))

    fira2.Block.__init__ = init
    try:
        yield
    finally:
        fira2.Block.__init__ = plain


if __name__ == "__main__":
    from fira.cli import main

    with shared_expert(int(sys.argv.pop(1))):
        main()
