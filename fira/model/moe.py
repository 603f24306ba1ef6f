"""The Mixture-of-Experts layer: gate, choose, scatter, experts, gather.

    y_n = sum_k weights_nk * expert_e(x_n),  e = experts_nk,  with weights and experts of `router`

Dropless: every token reaches all K experts that it chose. Rows are sorted by expert, so that each
expert multiplies one block of them. Nothing here depends on the order in which threads run, so
training repeats bit for bit.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fira.model.fast as fast
from fira.model.router import METHODS, Router


class Order(NamedTuple):
    """How rows sorted by expert belong to tokens; "pair" is one choice of one token.

    order_R: the pair, numbered n*K + k, of each row; tokens_R: the token n of each row;
    inverse_NK: the row of each pair; counts_E: the number of rows of each expert.
    """

    order_R: Tensor
    tokens_R: Tensor
    inverse_NK: Tensor
    counts_E: Tensor


class MoE(nn.Module):
    """x_BTD -> x_BTD through the K experts that the router chooses for each token."""

    def __init__(self, router: Router, experts: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatch: Callable[..., Tensor] = apply_here

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        weights_NK, experts_NK = self.router(x_ND)
        order = sort_by_expert(experts_NK, self.router.num_experts)
        rows_RD = Scatter.apply(fast.cast_for_product(x_ND), order.tokens_R, order.inverse_NK)
        rows_RD = self.dispatch(self.experts, rows_RD, order.counts_E)
        mixed_ND = Gather.apply(rows_RD, weights_NK, order.order_R, order.inverse_NK)
        return mixed_ND.view(x_BTD.shape)


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
        return fast.sum_rows(grad_RD, inverse_NK), None, None


class Gather(torch.autograd.Function):
    """x_n = sum_k w_nk rows[inverse_nk].

    The gradients are drows_r = w_nk dx_n and dw_nk = dx_n . rows_r, where row r is choice k of n.
    """

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_NK: Tensor, order_R: Tensor,
                inverse_NK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_NK, order_R, inverse_NK)
        return fast.sum_rows(rows_RD, inverse_NK, weights_NK.to(rows_RD.dtype))

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_RD, weights_NK, order_R, inverse_NK = ctx.saved_tensors
        weights_R1 = weights_NK.flatten()[order_R].unsqueeze(1)
        grad_RD = grad_ND.index_select(0, order_R // weights_NK.shape[1])
        dots_R = torch.linalg.vecdot(grad_RD.to(weights_R1.dtype), rows_RD.to(weights_R1.dtype))
        return grad_RD * weights_R1.to(grad_RD.dtype), dots_R[inverse_NK], None, None


class Dense(nn.Module):
    """The dense baseline: one expert, no router. Its weights have the names of an MoE's experts."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        counts_E = torch.full((1,), len(x_ND), device=x_ND.device)
        return self.experts(x_ND, counts_E).view(x_BTD.shape)


def make_layer(spec: Any, experts: nn.Module, router_bias: bool,
               renormalize: bool = True) -> MoE | Dense:
    """The feed-forward layer of a block: an MoE, or with one expert the dense baseline."""
    if spec.num_experts == 1:
        return Dense(experts)
    return MoE(Router(spec.d_model, spec.num_experts, spec.top_k, router_bias,
                      METHODS[spec.balance], spec.balance_weight, renormalize), experts)


def apply_here(experts: nn.Module, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
    """The plain dispatch: every expert is on this device."""
    return experts(rows_RD, counts_E)


def sort_by_expert(experts_NK: Tensor, num_experts: int) -> Order:
    """A stable sort, so that the order of rows depends on nothing but the choices."""
    experts_R = experts_NK.flatten()
    order_R = experts_R.to(torch.int16).sort(stable=True).indices  # a GPU sorts short keys faster
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    return Order(order_R, order_R // experts_NK.shape[1], inverse_R.view_as(experts_NK),
                 fast.count_rows(experts_R, num_experts))


class ExpertLinear(nn.Module):
    """`nn.Linear` with an expert axis: rows_Ri sorted by expert, counts_E -> rows_Ro."""

    def __init__(self, num_experts: int, width_in: int, width_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width_out, width_in))  # [E, out, in]
        self.bias = nn.Parameter(torch.empty(num_experts, width_out)) if bias else None  # [E, out]

    def forward(self, rows_Ri: Tensor, counts_E: Tensor) -> Tensor:
        return fast.expert_linear(rows_Ri, counts_E, self.weight, self.bias)


def expert_linear_plain(rows_Ri: Tensor, counts_E: Tensor, weight: Tensor,
                        bias: Tensor | None) -> Tensor:
    """The definition of `ExpertLinear`, row by row."""
    owners = torch.repeat_interleave(torch.arange(len(counts_E)), counts_E.cpu()).tolist()
    out = [weight[e] @ row + (0 if bias is None else bias[e])
           for row, e in zip(rows_Ri, owners, strict=True)]
    return torch.stack(out) if out else rows_Ri.new_zeros(0, weight.shape[1])


class GELUExperts(nn.Module):
    """FIRA's experts: linear, GELU (GPT-2's tanh form), linear, with biases."""

    def __init__(self, num_experts: int, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = ExpertLinear(num_experts, d_model, d_ff, bias=True)
        self.down = ExpertLinear(num_experts, d_ff, d_model, bias=True)

    def forward(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(rows_RD, counts_E), approximate="tanh"), counts_E)


class SwiGLUExperts(nn.Module):
    """FIRA2's experts: down(silu(gate(x)) * up(x)), no biases (Shazeer 2020)."""

    def __init__(self, num_experts: int, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate = ExpertLinear(num_experts, d_model, d_ff, bias=False)
        self.up = ExpertLinear(num_experts, d_model, d_ff, bias=False)
        self.down = ExpertLinear(num_experts, d_ff, d_model, bias=False)

    def forward(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        parts = self.gate, self.up, self.down
        if all(type(part) is ExpertLinear for part in parts):  # none is adapted or quantized
            weights = [part.weight for part in parts]
            if fast.should_batch(rows_RD, weights):
                return fast.BatchedSwiGLU.apply(rows_RD, counts_E, *weights)
        hidden_RF = F.silu(self.gate(rows_RD, counts_E)) * self.up(rows_RD, counts_E)
        return self.down(hidden_RF, counts_E)


def grouping_obstacle(model: nn.Module, device: torch.device) -> str | None:
    """Why CUDA cannot multiply all experts of a layer at once, in bfloat16; None if it can."""
    stacks = [part.weight for part in model.modules()
              if type(part) is ExpertLinear and len(part.weight) > 1]
    return fast.grouping_obstacle(stacks[0].shape[1:], device) if stacks else None
