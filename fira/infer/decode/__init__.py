"""Decode on a CPU with one compiled function per token instead of torch's operators.

Plain torch dispatches about thirty small operators per layer and token, which takes longer than
reading the weights does. `kernel.py` is one function for the whole model and runs at the speed of
memory. It supports FIRA and FIRA2 in float32, int8 and int4; `find_obstacle` tells why it cannot
run a model. Nothing here imports numba, which is an optional dependency, until a step is opened.
"""
from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fira.convert.quantize import quantize
from fira.infer.cache import Part, SlotCache
from fira.model import build_meta

if TYPE_CHECKING:
    from fira.infer.decode.step import FusedStep

PATIENCE = 1.0  # seconds until a message; loading from numba's cache takes 0.3 s, compiling 15 s


def open_step(model: Any, precision: str, say: Callable[[str], object]) -> FusedStep | None:
    """The compiled decode step of a model on a CPU, or None if plain torch must decode.

    `say` receives one line that says why there is none, or what takes longer than a second.
    Raises ValueError if `precision` is not "float32" and cannot be had.
    """
    obstacle = find_obstacle(model, precision)
    if obstacle and precision != "float32":
        raise ValueError(f"precision={precision} cannot be had: {obstacle}; "
                         "leave --precision out")
    if obstacle:
        if next(model.parameters()).device.type == "cpu":
            say(f"Decoding with plain torch: {obstacle}.")
        return None
    from fira.infer.decode import kernel
    from fira.infer.decode.step import FusedStep

    later = ("later starts are quick." if kernel.decode_step.stats.cache_path else
             "every start does, as numba may not write to its cache; set NUMBA_CACHE_DIR to a "
             "folder of yours.")
    timer = threading.Timer(PATIENCE, say, [f"Compiling the decoding step; {later}"])
    timer.start()
    try:
        step = FusedStep(model, precision)
        step(model, SlotCache(model, slots=1, capacity=1), torch.tensor([0]), [Part(0, 0, 1)])
    finally:
        timer.cancel()
    return step


def find_obstacle(model: Any, precision: str = "float32") -> str | None:
    """Why the compiled step cannot run this model here, in one line; None if it can."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed; pip install 'fira-moe[fast]'"
    if sys.platform == "win32":
        return "the compiled step needs Linux or macOS"
    kind = getattr(model, "quantization", None)
    if kind and precision != "float32":
        return f"the weights are {kind} already"
    plain, weights = build_meta(model.spec), model.state_dict()
    expected = (quantize(plain, kind) if kind else plain).state_dict()
    if {name: w.shape for name, w in weights.items()} != {n: w.shape for n, w in expected.items()}:
        return "the model has other weights than its architecture (an adapter perhaps)"
    odd = {f"{w.dtype} on {w.device}".removeprefix("torch.") for w in weights.values()
           if w.device.type != "cpu" or w.is_floating_point() and w.dtype != torch.float32}
    if odd:
        return f"it runs float32 on cpu, and the model is {', '.join(sorted(odd))}"
    return None
