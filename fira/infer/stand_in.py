"""Names that other rooms will define. When they do, import them from there and delete this file.

routers, Watch          fira.model.router
knows_chat              fira.model.files
head_weights            a method of the models
token_losses            fira.loss.head (head_token_losses today)
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from fira.loss.head import head_token_losses as token_losses
from fira.model.moe import routers

__all__ = ["PRETRAIN", "Watch", "head_weights", "knows_chat", "routers", "token_losses"]
PRETRAIN = "pretrain"


class Watch:
    """`experts` are the experts_NK that each layer's router chose in the latest forward."""

    def __init__(self, model: Any) -> None:
        layers = routers(model)
        self.experts: list[Tensor | None] = [None] * len(layers)

        def note(router: Any, _: Any, output: tuple[Tensor, Tensor]) -> None:
            self.experts[layers.index(router)] = output[1]

        self._hooks = [router.register_forward_hook(note) for router in layers]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def head_weights(model: Any) -> tuple[Tensor, Tensor | None]:
    """The head's weight_VD and bias_V."""
    if hasattr(model, "_head"):
        return model._head(), None
    return model.head.weight, model.head.bias


def knows_chat(step: Path) -> bool:
    """Whether the run that a step folder belongs to was trained on chat turns."""
    record = step.resolve().parent / "config.json"
    if not record.is_file():
        return False
    return bool(json.loads(record.read_text(encoding="utf-8")).get("stage", PRETRAIN) != PRETRAIN)
