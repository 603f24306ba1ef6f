"""What a form of the model cannot hold, and why: one row a reason."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fira.model.router import Router, routers


def has_bias(router: Router) -> bool:
    """Whether the choice depends on it: a faded one is nothing."""
    return router.selection_bias_E is not None and bool(router.selection_bias_E.any())


class Limit(NamedTuple):
    """`targets` cannot hold a model for which `hits` is true."""

    targets: tuple[str, ...]
    hits: Callable[[Any], bool]
    reason: str


LIMITS = (
    Limit(("gguf",), lambda model: model.spec.architecture == "fira",
          "llama.cpp has no model with FIRA's learned positions, LayerNorm and biased experts; "
          "fira export hf, or train a FIRA2"),
    Limit(("gguf",), lambda model: model.spec.num_experts > 1 and model.spec.top_k == 1,
          "llama.cpp renormalizes the chosen experts' weights, so at top_k=1 each becomes 1, but "
          "this model multiplies by the router's probability; fira export hf, or train with "
          "top_k=2"),
    Limit(("hf", "gguf"), lambda model: any(has_bias(router) for router in routers(model)),
          "its router chooses with a bias that only selects, and the other side has no place for "
          "it; take a finished run of model.balance=handover, or use fira export int8"),
)


def check_target(model: Any, target: str) -> None:
    """Raises ValueError, one line, if `model` has no form in `target`."""
    if getattr(model, "quantization", None):
        raise ValueError(f"the weights are {model.quantization} already; export the run that they "
                         "were made from")
    for limit in LIMITS:
        if target in limit.targets and limit.hits(model):
            raise ValueError(f"this {model.spec.architecture} cannot become {target}: "
                             f"{limit.reason}")
