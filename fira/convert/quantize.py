"""Weight-only int8 and int4: linears, stacked experts and the token embedding as small integers.

Layout of a weight [..., out, in]; both are symmetric, so there are no zero points:
  int8   numbers int8 [..., out, in], scale float32 [..., out]; weight = numbers * scale, and the
         largest magnitude of a row is 127 steps.
  int4   numbers uint8 [..., out, in/2], scale float32 [..., out, in/32], one for 32 neighbors
         along `in`. Byte i of a group's 16 holds weight i in its low half and weight i + 16 in its
         high half, each plus 8; weight = (half - 8) * scale, and the weight of largest magnitude is
         exactly -8 steps, so that all 16 values are used and a scale may be negative.

Activations keep their dtype. The modules here turn a weight's numbers into floats before each
product, which saves memory but little time; `fira.infer` has a kernel that reads the integers. The
weights are frozen: gradients pass through them, to adapters (Dettmers et al. 2023, 2305.14314).
Routers, norms, biases and learned positions are not quantized, and in int4 neither is a matrix
whose rows are no multiple of 32. The embedding and the head are int8 in both kinds.
"""
from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import fira.model.fast as fast
from fira.convert.files import load_run, number_of, write_run
from fira.files import check_new
from fira.model import build_meta
from fira.model.adapter import attach_like, merge
from fira.model.files import CONFIG, NOTES, assemble, read_config, read_into
from fira.model.moe import ExpertLinear

GROUP = 32  # int4 weights that share a scale
BLOCK = 1024  # rows of a head that are dequantized at once
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


def _shapes(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(numbers, scale) on meta, where arithmetic would import torch's compiler, in 2 seconds."""
    *rows, width = weight.shape
    if kind == "int4":
        return (weight.new_empty(*rows, width // 2, dtype=torch.uint8),
                weight.new_empty(*rows, width // GROUP))
    return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(rows)


def dequantize(numbers: Tensor, scale: Tensor) -> Tensor:
    """The float32 weight [..., out, in] of numbers and scales of either kind."""
    if numbers.dtype == torch.int8:
        return numbers * scale.unsqueeze(-1)
    halves = numbers.unflatten(-1, (-1, GROUP // 2))
    steps = torch.cat([halves & 15, halves >> 4], dim=-1).float() - 8
    return (steps * scale.unsqueeze(-1)).flatten(-2)


def product(x: Tensor, numbers: Tensor, scale: Tensor, transpose: bool = True) -> Tensor:
    """x W^T with numbers and scales of W [out, in]; without `transpose`, x W.

    int8 numbers are converted without their scales, which the result is multiplied by: for 256 x
    512 of them that takes 7 us, and `dequantize` 24 us.
    """
    if numbers.dtype != torch.int8:
        weight = dequantize(numbers, scale).to(x.dtype)
        return x @ (weight.mT if transpose else weight)
    if transpose:
        return (x @ numbers.to(x.dtype).mT * scale).to(x.dtype)
    return (x * scale).to(x.dtype) @ numbers.to(x.dtype)


class FrozenProduct(torch.autograd.Function):
    """out = x W^T, of rows sorted by expert if there are counts; its gradient is dx = dout W.

    W becomes a float for each of the two products: autograd would keep it in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts_E: Tensor | None, numbers: Tensor,
                scale: Tensor) -> Tensor:
        ctx.save_for_backward(counts_E, numbers, scale)
        ctx.width = x.shape[-1]
        return _product(x, counts_E, numbers, scale, numbers.shape[-2], True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        counts_E, numbers, scale = ctx.saved_tensors
        return _product(grad, counts_E, numbers, scale, ctx.width, False), None, None, None


def _product(x: Tensor, counts_E: Tensor | None, numbers: Tensor, scale: Tensor,
             width: int, transpose: bool) -> Tensor:
    """x times W, or W transposed; the result has `width` columns."""
    if counts_E is None:
        return product(x, numbers, scale, transpose)
    if x.is_cuda or torch.compiler.is_compiling():  # all experts at once: no graph has their counts
        weight = dequantize(numbers, scale).to(x.dtype)
        return fast.expert_linear(x, counts_E, weight if transpose else weight.mT, None)
    out, start = x.new_empty(len(x), width), 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            out[start:start + count] = product(x[start:start + count], numbers[expert],
                                               scale[expert], transpose)
        start += count
    return out


class Quantized(nn.Module):
    """Numbers and scales in the place of a weight; a bias is kept as it was."""

    stands_for: type[nn.Module]
    numbers: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, like: Any, kind: str) -> None:
        super().__init__()
        weight = like.weight.detach()
        numbers, scale = (_shapes(weight, kind) if weight.is_meta else
                          (quantize_int4 if kind == "int4" else quantize_int8)(weight))
        self.kind = kind
        self.register_buffer("numbers", numbers)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", getattr(like, "bias", None))

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, for code that reads the weight of a plain module."""
        return dequantize(self.numbers, self.scale)

    def multiply(self, x: Tensor) -> Tensor:
        """x W^T + bias without the whole W, which as float32 takes four times the stored bytes."""
        out = x.new_empty(*x.shape[:-1], len(self.scale))
        for start in range(0, len(self.scale), BLOCK):
            rows = slice(start, start + BLOCK)
            out[..., rows] = product(x, self.numbers[rows], self.scale[rows])
        return out if self.bias is None else out + self.bias.to(out.dtype)


class QuantizedLinear(Quantized):
    """An `nn.Linear` with a quantized weight."""

    stands_for = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        out = FrozenProduct.apply(fast.cast_for_product(x), None, self.numbers, self.scale)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class QuantizedEmbedding(Quantized):
    """An `nn.Embedding` with a quantized weight, which a tied head reads too."""

    stands_for = nn.Embedding

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return dequantize(self.numbers[tokens_BT], self.scale[tokens_BT])


class QuantizedExpertLinear(Quantized):
    """An `ExpertLinear` with quantized weights; on a CPU one expert at a time is dequantized."""

    stands_for = ExpertLinear

    def forward(self, rows_Ri: Tensor, counts_E: Tensor) -> Tensor:
        rows_Ri = fast.cast_for_product(rows_Ri)
        out_Ro = FrozenProduct.apply(rows_Ri, counts_E, self.numbers, self.scale)
        return out_Ro if self.bias is None else fast.add_bias(
            out_Ro, counts_E, self.bias.to(out_Ro.dtype))


REPLACED = {kind.stands_for: kind for kind in (QuantizedLinear, QuantizedExpertLinear,
                                               QuantizedEmbedding)}
KEPT = ("position_embedding",)


def quantize(model: Any, kind: str) -> Any:
    """Replace what can be quantized, in place, and note it in the model; returns the model.

    All other weights become float32, since activations then are. Raises ValueError, one line, if
    the weights are quantized already.
    """
    if getattr(model, "quantization", None):
        raise ValueError(f"the weights are {model.quantization} already; quantize the model that "
                         "they were made from")
    model.float()
    for name, module in list(model.named_modules()):
        if type(module) not in REPLACED or name in KEPT:
            continue
        inner = "int8" if isinstance(module, nn.Embedding) or name == "head" else kind
        if inner == "int8" or module.weight.shape[-1] % GROUP == 0:
            model.set_submodule(name, REPLACED[type(module)](module, inner))
    model.quantization = kind
    return model


def load_model(folder: Path, base: Path | None = None, merged: bool = True,
               mapped: bool = False) -> Any:
    """The model in a step folder, plain or quantized, in eval mode.

    An adapter is merged into the weights of its base (of those in the step folder `base`, if that
    is given), or stays beside them if they are quantized or not `merged`. `mapped`: see
    `read_tensors`.
    """
    spec, notes = read_config(folder / CONFIG)
    kind, model = notes["quantization"], build_meta(spec)
    model = read_into(quantize(model, kind) if kind else model, folder, notes, base, mapped)
    return merge(model) if merged and not kind else model


def dequantized(model: Any) -> Any:
    """A model with the float32 weights that the numbers of `model` stand for, adapted like it."""
    plain, tensors = build_meta(model.spec), model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            tensors[f"{name}.weight"] = module.weight
            del tensors[f"{name}.numbers"], tensors[f"{name}.scale"]
    attach_like(plain, {name: one for name, one in tensors.items() if ".lora." in name})
    return assemble(plain, tensors, {note: getattr(model, note, None) for note in NOTES}
                    | {"quantization": None})


def export_run(run: Path, folder: Path, kind: str, screen: Console,
               measure: Callable[[Any, Any], float] | None = None) -> None:
    """Write the newest step of `run` as the new run `folder` in int8 or int4 and print a table of
    its tensors. With `measure`, a function of (model, tokenizer) that gives bits per byte, print
    what quantization costs. Raises ValueError, one line, if that is not possible."""
    check_new(folder)
    model, tokenizer, step = load_run(run)
    before = measure(model, tokenizer) if measure else 0.0
    screen.print(_table(quantize(model, kind)))
    if measure:
        after = measure(model, tokenizer)
        screen.print(f"bits per byte: {before:.5f} before, {after:.5f} in {kind} "
                     f"({after - before:+.5f})")
    write_run(folder, model, tokenizer, number_of(step),
              {"stage": "export", "preset": kind, "quantized_from": str(step)})
    screen.print(f"wrote {folder}; fira generate, chat, serve and eval read it", soft_wrap=True)


def stored(model: Any) -> dict[str, tuple[str, int, int]]:
    """How each tensor of a quantized model is stored, and its bytes in float32 and now, added up
    over the layers."""
    found: dict[str, tuple[str, int, int]] = {}
    for key, tensor in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        module = model.get_submodule(owner)
        how, size = "not quantized", tensor.nbytes
        if isinstance(module, Quantized) and leaf != "bias":
            key = f"{owner}.weight"
            how = f"int4 in {GROUP}s" if module.kind == "int4" else "int8 in rows"
            weights = tensor.numel() * (2 if module.kind == "int4" else 1)
            size = 4 * weights if leaf == "numbers" else 0
        name = re.sub(r"\.\d+\.", ".*.", key)
        _, float32, now = found.get(name, (how, 0, 0))
        found[name] = (how, float32 + size, now + tensor.nbytes)
    return found


def _table(model: Any) -> Table:
    table = Table("tensor", "stored", title="weights", title_justify="left")
    for title in ("float32 MB", "MB"):
        table.add_column(title, justify="right")
    rows = stored(model)
    totals = ("", sum(row[1] for row in rows.values()), sum(row[2] for row in rows.values()))
    for name, (how, float32, now) in [*rows.items(), ("all", totals)]:
        table.add_row(name, how, f"{float32 / 1e6:.3f}", f"{now / 1e6:.3f}")
    return table
