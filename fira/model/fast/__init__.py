"""Which form of an operation runs on which device: the only place in `model` that asks.

Each form equals a plain definition in values and gradients (tests/model/test_fast.py). It is kept
because it wins at least 5% of a whole training step on some preset, or because a GPU needs it to
train deterministically without waiting for single rows.
"""
from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fira.model.fast.experts import HAS_BATCH, SortedLinear, add_bias, grouped_linear

# Multiplications per expert, below which dividing one product between the cores costs more than
# it gains: with two threads the batched form is then 5 to 6% of a training step of `tiny` faster.
SMALL_PRODUCT = 2**26


def linear_fp32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer in float32, also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


def cast_for_product(x: Tensor) -> Tensor:
    """x in the dtype that autocast, where it is on, multiplies in."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def expert_linear(rows_Ri: Tensor, counts_E: Tensor, weight: Tensor,
                  bias: Tensor | None) -> Tensor:
    """`moe.expert_linear_plain` in this device's fastest form."""
    rows_Ri, weight = cast_for_product(rows_Ri), cast_for_product(weight)
    bias = None if bias is None else bias.to(rows_Ri.dtype)
    if len(weight) == 1:
        return F.linear(rows_Ri, weight.squeeze(0), None if bias is None else bias.squeeze(0))
    grouped = (rows_Ri.is_cuda and rows_Ri.dtype == torch.bfloat16
               and not grouping_obstacle(weight.shape[1:], rows_Ri.device))
    multiply = grouped_linear if grouped else SortedLinear.apply
    out_Ro = multiply(rows_Ri, counts_E, weight)
    return out_Ro if bias is None else add_bias(out_Ro, counts_E, bias)


def should_batch(rows_RD: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether `BatchedSwiGLU` is the fastest form: float32 on a CPU, and products so small that
    dividing each between the cores costs more than it gains.

    It always computes the gradients of all weights, so frozen ones take the other form.
    """
    frozen = torch.is_grad_enabled() and not all(weight.requires_grad for weight in weights)
    return (HAS_BATCH and not frozen and len(weights[0]) > 1
            and type(rows_RD) is Tensor and rows_RD.device.type == "cpu"
            and rows_RD.dtype == weights[0].dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and len(rows_RD) * weights[0][0].numel() < SMALL_PRODUCT * len(weights[0]))


def grouping_obstacle(widths: Iterable[int], device: torch.device) -> str | None:
    """Why CUDA cannot multiply all experts of a layer at once, in bfloat16; None if it can."""
    if device.type != "cuda":
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "grouped_mm needs compute capability 8.0 or newer"
    uneven = [width for width in widths if width % 8]  # row strides of whole 16 bytes
    return f"grouped_mm needs widths that divide by 8, not {uneven[0]}" if uneven else None


def count_rows(experts_R: Tensor, num_experts: int) -> Tensor:
    """The number of rows of each expert, int64 [E]."""
    if experts_R.is_cuda:  # atomic additions would make threads wait for each other
        experts_E = torch.arange(num_experts, device=experts_R.device)
        return (experts_R.unsqueeze(1) == experts_E).sum(dim=0)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=experts_R.device)
    return counts_E.index_add_(0, experts_R, torch.ones_like(experts_R))


class Scatter(torch.autograd.Function):
    """rows_r = x[tokens_r]; the gradient is dx_n = sum_k drows[inverse_nk].

    torch's own gradient of a gather adds row by row: with two threads that costs 6 to 9% of a
    training step (`small`, `tiny`), and on a GPU the order of additions, and so the last bits of
    the sum, would differ between runs. The gradients of `Scatter` and `Gather` only gather.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, tokens_R: Tensor, inverse_NK: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_NK)
        return x_ND.index_select(0, tokens_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_NK,) = ctx.saved_tensors
        return sum_rows(grad_RD, inverse_NK), None, None


class Gather(torch.autograd.Function):
    """x_n = sum_k w_nk rows[inverse_nk].

    The gradients are drows_r = w_nk dx_n and dw_nk = dx_n . rows_r, where row r is choice k of n.
    """

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_NK: Tensor, order_R: Tensor,
                inverse_NK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_NK, order_R, inverse_NK)
        return sum_rows(rows_RD, inverse_NK, weights_NK.to(rows_RD.dtype))

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_RD, weights_NK, order_R, inverse_NK = ctx.saved_tensors
        weights_R1 = weights_NK.flatten()[order_R].unsqueeze(1)
        grad_RD = grad_ND.index_select(0, order_R // weights_NK.shape[1])
        dots_R = torch.linalg.vecdot(grad_RD.to(weights_R1.dtype), rows_RD.to(weights_R1.dtype))
        return grad_RD * weights_R1.to(grad_RD.dtype), dots_R[inverse_NK], None, None


def sum_rows(rows_RD: Tensor, index_NK: Tensor, weights_NK: Tensor | None = None) -> Tensor:
    """The (weighted) sum of each token's K rows."""
    if index_NK.is_cuda and torch.compiler.is_compiling():
        return sum_rows_by_choice(rows_RD, index_NK, weights_NK)
    return F.embedding_bag(index_NK, rows_RD, mode="sum", per_sample_weights=weights_NK)


def sum_rows_by_choice(rows_RD: Tensor, index_NK: Tensor,
                       weights_NK: Tensor | None = None) -> Tensor:
    """`sum_rows` as K additions, which a GPU's graph fuses into one pass.

    A sum over an axis of 8 is compiled as a reduction, three times as slow on an H100.
    """
    parts = [rows_RD[index_N] for index_N in index_NK.unbind(dim=1)]
    if weights_NK is not None:
        parts = [part * weight_N.unsqueeze(1)
                 for part, weight_N in zip(parts, weights_NK.unbind(dim=1), strict=True)]
    return functools.reduce(torch.add, parts)
