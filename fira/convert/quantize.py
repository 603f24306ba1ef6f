"""Weight-only int8 and int4: linears, stacked experts and the token embedding as small integers.

Layout, of a weight [..., out, in]; both are symmetric, so there are no zero points:
  int8   numbers int8 [..., out, in], scale float32 [..., out]; weight = numbers * scale, and the
         largest magnitude of a row is 127 steps.
  int4   numbers uint8 [..., out, in/2], scale float32 [..., out, in/32], one for 32 neighbors
         along `in`. Byte i of a group's 16 holds weight i in its low half and weight i + 16 in its
         high half, each plus 8; weight = (half - 8) * scale, and the weight of largest magnitude is
         exactly -8 steps, so that all 16 values are used and a scale may be negative.

Activations keep their dtype: a product is taken with the weights written out again, which saves
memory on disk and at rest, not time. Routers, norms, biases and learned positions are left alone;
so is a matrix whose rows are no multiple of 32 in int4. The embedding, in FIRA2 the head too, is
int8 in both.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fira.convert.limits import check_target
from fira.model.files import (
    CONFIG,
    WEIGHTS,
    assemble,
    build_meta,
    load_pretrained,
    read_config,
    read_tensors,
)
from fira.model.moe import ExpertLinear

GROUP = 32  # int4 weights that share a scale
KINDS = ("int8", "int4")


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(numbers, scale) of a float weight [..., out, in]."""
    scale = weight.float().abs().amax(dim=-1) / 127
    steps = weight.float() / scale.clamp(min=1e-30).unsqueeze(-1)
    return steps.round().to(torch.int8), scale


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(numbers, scale) of a float weight [..., out, in]; `in` is a multiple of 32."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    scale = largest / -8
    steps = torch.where(scale == 0, 0, groups / scale).round().clamp(-8, 7) + 8
    low, high = steps.to(torch.uint8).chunk(2, dim=-1)
    return (low | high << 4).flatten(-2), scale.squeeze(-1)


def dequantize(numbers: Tensor, scale: Tensor) -> Tensor:
    """The float32 weight [..., out, in] that numbers of either kind stand for."""
    if numbers.dtype == torch.int8:
        return numbers * scale.unsqueeze(-1)
    halves = numbers.unflatten(-1, (-1, GROUP // 2))
    steps = torch.cat([halves & 15, halves >> 4], dim=-1).float() - 8
    return (steps * scale.unsqueeze(-1)).flatten(-2)


class Quantized(nn.Module):
    """Numbers and scales in the place of a weight; a bias is kept as it was."""

    numbers: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, like: Any, kind: str) -> None:
        super().__init__()
        numbers, scale = (quantize_int4 if kind == "int4" else quantize_int8)(like.weight.detach())
        self.kind = kind
        self.register_buffer("numbers", numbers)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", getattr(like, "bias", None))

    @property
    def weight(self) -> Tensor:
        """The weight written out, as whoever asks for a plain module's would find it."""
        return dequantize(self.numbers, self.scale)


class QuantizedLinear(Quantized):
    """`nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class QuantizedEmbedding(Quantized):
    """`nn.Embedding`, which as a tied head is read through `weight`."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return dequantize(self.numbers[tokens_BT], self.scale[tokens_BT])


class QuantizedExpertLinear(Quantized):
    """`ExpertLinear`: rows sorted by expert; only the experts that have rows are written out."""

    def forward(self, rows_Ri: Tensor, counts_E: Tensor) -> Tensor:
        out = []
        for expert, rows in enumerate(rows_Ri.split(counts_E.tolist())):
            if len(rows):
                weight = dequantize(self.numbers[expert], self.scale[expert]).to(rows.dtype)
                bias = None if self.bias is None else self.bias[expert]
                out.append(F.linear(rows, weight, bias))
        return torch.cat(out)


REPLACED = {nn.Linear: QuantizedLinear, ExpertLinear: QuantizedExpertLinear,
            nn.Embedding: QuantizedEmbedding}
ALONE = ("position_embedding",)


def quantize(model: Any, kind: str) -> Any:
    """Replace what can be quantized, in place, and note it in the model; returns the model.

    What is left alone becomes float32, since activations then are. Raises
    ValueError, one line, if the weights are quantized already.
    """
    check_target(model, kind)
    model.float()
    for name, module in list(model.named_modules()):
        if type(module) in REPLACED and name not in ALONE:
            fits = module.weight.shape[-1] % GROUP == 0
            inner = "int8" if isinstance(module, nn.Embedding) or name == "head" else kind
            if inner == "int8" or fits:
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, REPLACED[type(module)](module, inner))
    model.quantization = kind
    return model


def load_model(folder: Path) -> Any:
    """The model in a step folder, plain or quantized, in eval mode."""
    spec, notes = read_config(folder / CONFIG)
    kind = notes["quantization"]
    if kind is None:
        return load_pretrained(folder)
    if kind not in KINDS:
        raise ValueError(f"{folder / CONFIG} has quantization {kind!r}, not one of "
                         f"{', '.join(KINDS)}; copy the file again")
    model = quantize(build_meta(spec), kind)
    return assemble(model, read_tensors(folder / WEIGHTS, model.state_dict()), notes)


class Stored(NamedTuple):
    """Tensors of one name in all layers: how they are stored, and bytes in float32 and now."""

    name: str
    how: str
    float32: int
    now: int


def stored(model: Any) -> list[Stored]:
    """Every tensor of a quantized model, equal ones of all layers together."""
    rows: dict[str, Stored] = {}

    def add(name: str, how: str, float32: int, now: int) -> None:
        name = ".".join("*" if part.isdigit() else part for part in name.split("."))
        old = rows.get(name, Stored(name, how, 0, 0))
        rows[name] = Stored(name, how, old.float32 + float32, old.now + now)

    for owner, module in model.named_modules():
        if isinstance(module, Quantized):
            weights = module.numbers.numel() * (2 if module.kind == "int4" else 1)
            how = f"int4 in {GROUP}s" if module.kind == "int4" else "int8 in rows"
            add(f"{owner}.weight", how, 4 * weights, module.numbers.nbytes + module.scale.nbytes)
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if not (isinstance(model.get_submodule(owner), Quantized) and leaf in ("numbers", "scale")):
            add(name, "left alone", tensor.nbytes, tensor.nbytes)
    return list(rows.values())
