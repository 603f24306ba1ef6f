"""Many small SwiGLU experts on a CPU, float32: all experts' products of one kind are one call.

What lies between the products is done in blocks that stay in cache.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fira.model.eager import blocks, opaque
from fira.model.products import Matrices, Product, multiply_all, row_blocks, stacked


class Busy(NamedTuple):
    """The experts that have rows, where those begin and how many they are."""

    experts: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int32]

    @classmethod
    def of(cls, counts_E: Tensor) -> Busy:
        counts = counts_E.numpy()
        experts = np.flatnonzero(counts)
        return cls(experts, (counts.cumsum() - counts)[experts], counts[experts].astype(np.int32))

    def rows(self, x_Ri: Tensor) -> Matrices:
        return row_blocks(x_Ri, self.starts, self.counts)

    def weights(self, weight_Eoi: Tensor) -> Matrices:
        return stacked(weight_Eoi, self.experts)


class BatchedSwiGLU(torch.autograd.Function):
    """rows_RD sorted by expert, counts_E, weights of gate, up and down -> rows_RD."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, counts_E: Tensor, gate_EFD: Tensor, up_EFD: Tensor,
                down_EDF: Tensor) -> Tensor:
        out_RD, gates_RF, ups_RF = batched_swiglu(rows_RD, counts_E, gate_EFD, up_EFD, down_EDF)
        ctx.save_for_backward(rows_RD, counts_E, gate_EFD, up_EFD, down_EDF, gates_RF, ups_RF)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, *grads = batched_swiglu_gradients(grad_RD.contiguous(), *ctx.saved_tensors)
        return grad_rows, None, *grads


def _hidden_like(rows_RD: Tensor, gate_EFD: Tensor) -> Tensor:
    return rows_RD.new_empty(len(rows_RD), gate_EFD.shape[1])


@opaque(lambda rows_RD, counts_E, gate_EFD, up_EFD, down_EDF: (
    torch.empty_like(rows_RD), _hidden_like(rows_RD, gate_EFD), _hidden_like(rows_RD, gate_EFD)))
def batched_swiglu(rows_RD: Tensor, counts_E: Tensor, gate_EFD: Tensor, up_EFD: Tensor,
                   down_EDF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """down(silu(gate x) * up x), gate x and up x."""
    busy, out_RD = Busy.of(counts_E), torch.empty_like(rows_RD)
    gates_RF, ups_RF, hidden_RF = (_hidden_like(rows_RD, gate_EFD) for _ in range(3))
    multiply_all(Product(busy.rows(rows_RD), busy.weights(gate_EFD).t, busy.rows(gates_RF)),
                 Product(busy.rows(rows_RD), busy.weights(up_EFD).t, busy.rows(ups_RF)))
    for block in blocks(*hidden_RF.shape):
        torch.mul(F.silu(gates_RF[block]), ups_RF[block], out=hidden_RF[block])
    multiply_all(Product(busy.rows(hidden_RF), busy.weights(down_EDF).t, busy.rows(out_RD)))
    return out_RD, gates_RF, ups_RF


@opaque(lambda grad_RD, rows_RD, counts_E, gate_EFD, up_EFD, down_EDF, gates_RF, ups_RF: tuple(
    torch.empty_like(x) for x in (rows_RD, gate_EFD, up_EFD, down_EDF)))
def batched_swiglu_gradients(
        grad_RD: Tensor, rows_RD: Tensor, counts_E: Tensor, gate_EFD: Tensor, up_EFD: Tensor,
        down_EDF: Tensor, gates_RF: Tensor, ups_RF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows, gate, up and down."""
    busy, grad_rows_RD = Busy.of(counts_E), torch.empty_like(rows_RD)
    new = torch.empty_like if len(busy.experts) == len(counts_E) else torch.zeros_like
    grad_gate_EFD, grad_up_EFD, grad_down_EDF = new(gate_EFD), new(up_EFD), new(down_EDF)
    hidden_RF, grad_gates_RF, grad_ups_RF = (torch.empty_like(gates_RF) for _ in range(3))
    grads, rows, grad_rows, hidden, grad_gates, grad_ups = (busy.rows(x) for x in (
        grad_RD, rows_RD, grad_rows_RD, hidden_RF, grad_gates_RF, grad_ups_RF))
    multiply_all(Product(grads, busy.weights(down_EDF), grad_gates))  # of hidden, for now
    for block in blocks(*hidden_RF.shape):
        gates_BF, ups_BF, grad_BF = gates_RF[block], ups_RF[block], grad_gates_RF[block]
        silu_BF = F.silu(gates_BF)
        torch.mul(silu_BF, ups_BF, out=hidden_RF[block])
        torch.mul(silu_BF, grad_BF, out=grad_ups_RF[block])
        torch.ops.aten.silu_backward.grad_input(grad_BF * ups_BF, gates_BF, grad_input=grad_BF)
    multiply_all(Product(grads.t, hidden, busy.weights(grad_down_EDF)),
                 Product(grad_gates, busy.weights(gate_EFD), grad_rows),
                 Product(grad_gates.t, rows, busy.weights(grad_gate_EFD)))
    multiply_all(Product(grad_ups, busy.weights(up_EFD), grad_rows, add=True),
                 Product(grad_ups.t, rows, busy.weights(grad_up_EFD)))
    return grad_rows_RD, grad_gate_EFD, grad_up_EFD, grad_down_EDF
