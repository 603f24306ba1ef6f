"""One forward over the engine's slots, and which experts it went through.

A decode step is the seam that a fused kernel fills (`Engine.decode_step`):

    decode_step(model, cache, tokens_N, positions_N, slots) -> (logits_NV, experts_LNK)

Row n is one token, int64, of slot slots[n], to be read at positions_N[n]; the step writes its keys
and values into the cache's rows there. experts_LNK are the experts each token was sent to, best
first; None for a dense model.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fira.infer.cache import Part, SlotCache
from fira.model.router import routers

DecodeStep = Callable[[Any, SlotCache, Tensor, Tensor, Sequence[int]],
                      "tuple[Tensor, Tensor | None]"]


class RouterProbe:
    """Sees the experts that every router of a model chose in its latest forward, by hooks."""

    def __init__(self, model: Any) -> None:
        self.layers = routers(model)
        self.latest: list[Tensor | None] = [None] * len(self.layers)
        self.hooks = [router.register_forward_hook(self._hook(layer))
                      for layer, router in enumerate(self.layers)]

    def experts(self) -> Tensor | None:
        """[L, N, K] of the latest forward; None for a dense model."""
        return torch.stack([one for one in self.latest if one is not None]) if self.hooks else None

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _hook(self, layer: int) -> Callable[..., None]:
        def remember(module: Any, arguments: Any, output: tuple[Tensor, Tensor]) -> None:
            self.latest[layer] = output[1]
        return remember


class TorchStep:
    """The plain decode step, through the model's own forward; also reads prompts."""

    def __init__(self, model: Any) -> None:
        self.probe = RouterProbe(model)

    def __call__(self, model: Any, cache: SlotCache, tokens_N: Tensor, positions_N: Tensor,
                 slots: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        parts = [Part(slot, start, 1)
                 for slot, start in zip(slots, positions_N.tolist(), strict=True)]
        x_ND, experts_LNK = self.read(model, cache, tokens_N, parts)
        return model.logits(x_ND), experts_LNK

    def read(self, model: Any, cache: SlotCache, tokens_N: Tensor,
             parts: Sequence[Part]) -> tuple[Tensor, Tensor | None]:
        """What the head reads at every token, [N, D], and the experts chosen for it."""
        x_1ND = model.features(tokens_N[None], cache.batch(parts))
        return x_1ND[0], self.probe.experts()

    def close(self) -> None:
        self.probe.close()
