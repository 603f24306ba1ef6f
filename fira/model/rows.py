"""Rows sorted by expert: their order, how they get there, and how a token's rows come together."""
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fira.model.eager import on_cpu, opaque


class Order(NamedTuple):
    """order_R: the (token, choice) pair that each row is a copy of; inverse_R: each pair's row;
    counts_E: rows of each expert."""

    order_R: Tensor
    inverse_R: Tensor
    counts_E: Tensor


def sort_by_expert(experts_NK: Tensor, num_experts: int) -> Order:
    """A stable sort, so that the result depends on nothing but the choices."""
    experts_R = experts_NK.flatten()
    if on_cpu(experts_R):  # NumPy sorts 16-bit numbers by their digits, ten times as fast
        keys = experts_R.numpy().astype(np.uint16)
        order = keys.argsort(kind="stable")
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        counts = np.bincount(keys, minlength=num_experts)
        return Order(*map(torch.from_numpy, (order, inverse, counts)))
    order_R = experts_R.to(torch.int16).sort(stable=True).indices  # short keys, fewer passes
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    return Order(order_R, inverse_R, count_each(experts_R, num_experts))


def count_each(experts_R: Tensor, num_experts: int) -> Tensor:
    """Rows of each expert, int64 [E], without a thread waiting for another."""
    experts_E = torch.arange(num_experts, device=experts_R.device)
    return (experts_R.unsqueeze(1) == experts_E).sum(dim=0)


class Scatter(torch.autograd.Function):
    """x_ND -> rows_RD sorted by expert; row r is a copy of token order[r] // K."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.top_k = len(order_R) // len(x_ND)
        ctx.save_for_backward(inverse_R)
        return x_ND.index_select(0, order_R // ctx.top_k)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return sum_rows(grad_RD, inverse_R.view(-1, ctx.top_k)), None, None


class Gather(torch.autograd.Function):
    """rows_RD sorted by expert, weights_NK -> x_ND, each token the weighted sum of its rows."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_NK: Tensor, order_R: Tensor,
                inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_NK, order_R, inverse_R)
        return sum_rows(rows_RD, inverse_R.view_as(weights_NK), weights_NK.to(rows_RD.dtype))

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_RD, weights_NK, order_R, inverse_R = ctx.saved_tensors
        fast = rows_RD.device.type == "cpu" and rows_RD.dtype == grad_ND.dtype == weights_NK.dtype
        share = share_by_bags if fast else share_gradient
        return *share(grad_ND, rows_RD, weights_NK, order_R, inverse_R), None, None


def sum_rows(rows_RD: Tensor, index_NK: Tensor, weights_NK: Tensor | None = None) -> Tensor:
    """Each token the (weighted) sum of its K rows, gathered and added in one pass."""
    if index_NK.is_cuda and torch.compiler.is_compiling():
        return sum_rows_plain(rows_RD, index_NK, weights_NK)
    return F.embedding_bag(index_NK, rows_RD, mode="sum", per_sample_weights=weights_NK)


def sum_rows_plain(rows_RD: Tensor, index_NK: Tensor, weights_NK: Tensor | None = None) -> Tensor:
    """The definition, of which a graph for a GPU makes one pass, together with what is around.

    Choice by choice: a sum over an axis of 8 would be compiled as a reduction, three times as slow.
    """
    parts = [rows_RD[index_N] for index_N in index_NK.unbind(dim=1)]
    if weights_NK is not None:
        parts = [part * weight_N.unsqueeze(1)
                 for part, weight_N in zip(parts, weights_NK.unbind(dim=1), strict=True)]
    return functools.reduce(torch.add, parts)


def share_gradient(grad_ND: Tensor, rows_RD: Tensor, weights_NK: Tensor, order_R: Tensor,
                   inverse_R: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `Gather`: of the rows, and of the weights they are summed with."""
    weights_R1 = weights_NK.flatten()[order_R].unsqueeze(1)
    grad_RD = grad_ND.index_select(0, order_R // weights_NK.shape[1])
    dots_R = torch.linalg.vecdot(grad_RD.to(weights_R1.dtype), rows_RD.to(weights_R1.dtype))
    return grad_RD * weights_R1.to(grad_RD.dtype), dots_R[inverse_R].view_as(weights_NK)


@opaque(lambda grad_ND, rows_RD, weights_NK, order_R, inverse_R: (
    torch.empty_like(rows_RD), torch.empty_like(weights_NK)))
def share_by_bags(grad_ND: Tensor, rows_RD: Tensor, weights_NK: Tensor, order_R: Tensor,
                  inverse_R: Tensor) -> tuple[Tensor, Tensor]:
    """`share_gradient` without a pass over all rows that an embedding bag's kernels do not need."""
    N, K = weights_NK.shape
    weights_R1 = weights_NK.flatten()[order_R].unsqueeze(1)
    bags_N = torch.arange(0, N * K, K)
    dots_R = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_ND, rows_RD, inverse_R, bags_N, torch.arange(N).repeat_interleave(K), mode=0)
    return (sum_rows(grad_ND, (order_R // K).unsqueeze(1), weights_R1), dots_R.view(N, K))
