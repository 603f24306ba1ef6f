"""The expert linear on a CPU: one matrix product per expert, over its rows."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fira.model.eager import opaque


class SortedLinear(torch.autograd.Function):
    """One matrix product per expert, each written into its slice of one preallocated result.

    Indexing a stacked weight per expert would make autograd allocate a full-size zero gradient for
    each; here every expert's gradient is written once, and an expert without rows gets zeros.
    """

    @staticmethod
    def forward(ctx: Any, rows_Ri: Tensor, counts_E: Tensor, weight: Tensor,
                bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows_Ri, counts_E, weight)
        return sorted_products(rows_Ri, counts_E, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Ro: Tensor) -> tuple[Tensor | None, ...]:
        rows_Ri, counts_E, weight = ctx.saved_tensors
        need_rows, _, need_weight, need_bias = ctx.needs_input_grad
        return (sorted_row_gradient(grad_Ro, counts_E, weight) if need_rows else None, None,
                sorted_weight_gradient(grad_Ro, rows_Ri, counts_E) if need_weight else None,
                sorted_sums(grad_Ro, counts_E) if need_bias else None)


@opaque(lambda rows_Ri, counts_E, weight, bias: rows_Ri.new_empty(len(rows_Ri), weight.shape[1]))
def sorted_products(rows_Ri: Tensor, counts_E: Tensor, weight: Tensor,
                    bias: Tensor | None) -> Tensor:
    out_Ro = rows_Ri.new_empty(len(rows_Ri), weight.shape[1])
    for expert, start, stop in _segments(counts_E):
        matrix = weight[expert].t()
        if bias is None:
            torch.mm(rows_Ri[start:stop], matrix, out=out_Ro[start:stop])
        else:
            torch.addmm(bias[expert], rows_Ri[start:stop], matrix, out=out_Ro[start:stop])
    return out_Ro


@opaque(lambda grad_Ro, counts_E, weight: grad_Ro.new_empty(len(grad_Ro), weight.shape[2]))
def sorted_row_gradient(grad_Ro: Tensor, counts_E: Tensor, weight: Tensor) -> Tensor:
    grad_Ri = grad_Ro.new_empty(len(grad_Ro), weight.shape[2])
    for expert, start, stop in _segments(counts_E):
        torch.mm(grad_Ro[start:stop], weight[expert], out=grad_Ri[start:stop])
    return grad_Ri


@opaque(lambda grad_Ro, rows_Ri, counts_E: rows_Ri.new_empty(
    len(counts_E), grad_Ro.shape[1], rows_Ri.shape[1]))
def sorted_weight_gradient(grad_Ro: Tensor, rows_Ri: Tensor, counts_E: Tensor) -> Tensor:
    grad_Eoi = rows_Ri.new_empty(len(counts_E), grad_Ro.shape[1], rows_Ri.shape[1])
    for expert, start, stop in _segments(counts_E):
        torch.mm(grad_Ro[start:stop].t(), rows_Ri[start:stop], out=grad_Eoi[expert])
    return _zero_idle(grad_Eoi, counts_E)


@opaque(lambda grad_Ro, counts_E: grad_Ro.new_empty(len(counts_E), grad_Ro.shape[1]))
def sorted_sums(grad_Ro: Tensor, counts_E: Tensor) -> Tensor:
    """The sum of each expert's rows: the gradient of a bias."""
    sums_Eo = grad_Ro.new_empty(len(counts_E), grad_Ro.shape[1])
    for expert, start, stop in _segments(counts_E):
        torch.sum(grad_Ro[start:stop], dim=0, out=sums_Eo[expert])
    return _zero_idle(sums_Eo, counts_E)


def _segments(counts_E: Tensor) -> list[tuple[int, int, int]]:
    """(expert, start, stop) of each expert that has rows."""
    segments, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            segments.append((expert, start, start + count))
        start += count
    return segments


def _zero_idle(grad: Tensor, counts_E: Tensor) -> Tensor:
    for expert, count in enumerate(counts_E.tolist()):
        if not count:
            grad[expert].zero_()
    return grad
