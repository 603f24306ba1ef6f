"""An MoE layer's SwiGLU experts on CUDA in Triton kernels: rows are gathered, activated and
weighted inside the products, so that only a token's K results are added up apart.

Equal to `Scatter`, `SwiGLUExperts` and `Gather` in values and gradients, and as repeatable.
"""
from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fira.model.eager import opaque
from fira.model.experts import ExpertLinear, SwiGLUExperts, grouping_obstacle
from fira.model.moe import MoE, apply_here


class Tile(NamedTuple):
    """Of a result that one program computes, and how far along the sum it goes at a time."""

    rows: int
    columns: int
    inner: int

    def across(self, width: int) -> int:
        return -(-width // self.columns)

    @property
    def sizes(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns, "INNER": self.inner}


WIDE = Tile(128, 128, 64)
NARROW = WIDE._replace(columns=64)  # where registers hold several numbers of each result
OPTIONS = {"num_warps": 8, "num_stages": 3}


class Tiles(NamedTuple):
    """The tiles of rows that lie within one expert each. Tiles left over are owned by expert E."""

    owner_T: Tensor
    first_T: Tensor
    ends_E: Tensor

    @classmethod
    def of(cls, counts_E: Tensor, rows: int) -> Tiles:
        """Without waiting for the device: as many tiles as `rows` could need at most."""
        height = WIDE.rows
        tiles_E, ends_E = (counts_E + height - 1) // height, counts_E.cumsum(0)
        last_E = tiles_E.cumsum(0)
        number_T = torch.arange(rows // height + len(counts_E), device=counts_E.device)
        owner_T = torch.searchsorted(last_E, number_T, right=True)
        known_T = owner_T.clamp(max=len(counts_E) - 1)
        within_T = number_T - (last_E - tiles_E)[known_T]
        return cls(owner_T, (ends_E - counts_E)[known_T] + height * within_T, ends_E)


def use_kernels(model: nn.Module, kernels: str, device: torch.device) -> list[str]:
    """Let the MoE layers of `model` train with "torch" or "triton", as far as they can.

    Returns why something slower must do, a line each.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    reasons = []
    if kernels == "triton":
        if reason := obstacle(layers, device):
            reasons.append(f"experts by torch: {reason}")
        else:
            for layer in layers:
                layer.in_one = swiglu_in_one
            return []
    if device.type == "cuda" and layers:
        widths = layers[0].experts.get_parameter("up.weight").shape[1:]
        if reason := grouping_obstacle(widths, device):
            reasons.append(f"experts one after the other: {reason}")
    return reasons


def obstacle(layers: list[MoE], device: torch.device) -> str | None:
    """Why the kernels cannot run these layers; None if they can."""
    if not layers:
        return "a dense model has no rows to sort"
    if device.type != "cuda":
        return f"Triton's kernels need a CUDA device, not {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton's kernels need compute capability 8.0 or newer"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if any(not is_plain(layer.experts) for layer in layers):
        return "Triton's kernels are for FIRA2's SwiGLU experts with whole, plain weights"
    if any(layer.dispatch is not apply_here for layer in layers):
        return "Triton's kernels need all experts on this device"
    return None


def is_plain(experts: nn.Module) -> bool:
    """Neither another class nor what sharding or quantizing makes of this one."""
    return type(experts) is SwiGLUExperts and all(
        type(part) is ExpertLinear for part in (experts.gate, experts.up, experts.down))


def swiglu_in_one(experts: nn.Module, x_ND: Tensor, weights_NK: Tensor, order_R: Tensor,
                  counts_E: Tensor) -> Tensor:
    """Each token the weighted sum of what its experts make of it: [N, D]."""
    assert isinstance(experts, SwiGLUExperts)
    dtype = (torch.get_autocast_dtype(x_ND.device.type)
             if torch.is_autocast_enabled(x_ND.device.type) else x_ND.dtype)
    stacks = (part.weight.to(dtype) for part in (experts.gate, experts.up, experts.down))
    return TritonSwiGLU.apply(x_ND.to(dtype), weights_NK.float(), order_R, counts_E, *stacks)


class TritonSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weights_NK: Tensor, order_R: Tensor, counts_E: Tensor,
                gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
        given = [one.contiguous() for one in (x_ND, weights_NK, order_R, counts_E, gate_EFD,
                                              up_EFD, down_EDF)]
        out_ND, gates_RF, ups_RF = triton_swiglu(*given)
        ctx.save_for_backward(*given, gates_RF, ups_RF)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weights, *grads = triton_swiglu_gradients(grad_ND.contiguous(),
                                                               *ctx.saved_tensors)
        return grad_x, grad_weights, None, None, *grads


@opaque(lambda x_ND, weights_NK, order_R, counts_E, gate_EFD, up_EFD, down_EDF: (
    torch.empty_like(x_ND), x_ND.new_empty(len(order_R), gate_EFD.shape[1]),
    x_ND.new_empty(len(order_R), gate_EFD.shape[1])))
def triton_swiglu(x_ND: Tensor, weights_NK: Tensor, order_R: Tensor, counts_E: Tensor,
                  gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor,
                  ) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's output, gate x and up x."""
    from fira.model.triton_kernels import hidden_kernel, pair_kernel

    (E, F, D), K, R = gate_EFD.shape, weights_NK.shape[1], len(order_R)
    gates_RF, ups_RF, hidden_RF = (x_ND.new_empty(R, F) for _ in range(3))
    pairs_RD = x_ND.new_empty(R, D)
    with torch.cuda.device_of(x_ND):
        tiles = Tiles.of(counts_E, R)
        hidden_kernel[NARROW.across(F), len(tiles.owner_T)](
            x_ND, order_R, gate_EFD, up_EFD, *tiles, gates_RF, ups_RF, hidden_RF, D, F, E, K,
            **NARROW.sizes, **OPTIONS)
        pair_kernel[WIDE.across(D), len(tiles.owner_T)](
            hidden_RF, down_EDF, hidden_RF, down_EDF, order_R, weights_NK, *tiles, pairs_RD, D, F,
            1, F, E, TWO=False, WEIGHTED=True, **WIDE.sizes, **OPTIONS)
    return sum_pairs(pairs_RD, K), gates_RF, ups_RF


@opaque(lambda grad_ND, x_ND, weights_NK, order_R, counts_E, gate_EFD, up_EFD, down_EDF, gates_RF,
        ups_RF: tuple(torch.empty_like(x)
                      for x in (x_ND, weights_NK, gate_EFD, up_EFD, down_EDF)))
def triton_swiglu_gradients(
        grad_ND: Tensor, x_ND: Tensor, weights_NK: Tensor, order_R: Tensor, counts_E: Tensor,
        gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, gates_RF: Tensor, ups_RF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of x, the weights of the choices, gate, up and down."""
    from fira.model.triton_kernels import (
        hidden_gradient_kernel,
        pair_kernel,
        weight_gradient_kernel,
    )

    (E, F, D), (N, K), R = gate_EFD.shape, weights_NK.shape, len(order_R)
    grad_gates_RF, grad_ups_RF, hidden_RF = (torch.empty_like(gates_RF) for _ in range(3))
    grad_gate_EFD, grad_up_EFD = torch.empty_like(gate_EFD), torch.empty_like(up_EFD)
    grad_down_EDF, pairs_RD = torch.empty_like(down_EDF), x_ND.new_empty(R, D)
    dots = weights_NK.new_empty(R, NARROW.across(F))
    with torch.cuda.device_of(x_ND):
        tiles, common = Tiles.of(counts_E, R), WIDE.sizes | OPTIONS
        hidden_gradient_kernel[NARROW.across(F), len(tiles.owner_T)](
            grad_ND, order_R, weights_NK, down_EDF, *tiles, gates_RF, ups_RF, grad_gates_RF,
            grad_ups_RF, hidden_RF, dots, D, F, E, K, **NARROW.sizes, **OPTIONS)
        pair_kernel[WIDE.across(D), len(tiles.owner_T)](
            grad_gates_RF, gate_EFD, grad_ups_RF, up_EFD, order_R, weights_NK, *tiles, pairs_RD,
            D, F, D, 1, E, TWO=True, WEIGHTED=False, **common)
        for a, b, out, gathers in ((grad_ND, hidden_RF, grad_down_EDF, (True, False)),
                                   (grad_gates_RF, x_ND, grad_gate_EFD, (False, True)),
                                   (grad_ups_RF, x_ND, grad_up_EFD, (False, True))):
            _, height, width = out.shape
            weight_gradient_kernel[WIDE.across(width), -(-height // WIDE.rows), E](
                a, b, order_R, tiles.ends_E, out, height, width, K, *gathers, **common)
    return (sum_pairs(pairs_RD, K), dots.sum(1).view(N, K), grad_gate_EFD, grad_up_EFD,
            grad_down_EDF)


def sum_pairs(pairs_RD: Tensor, top_k: int) -> Tensor:
    """Each token the sum of its pairs, which lie together."""
    if top_k == 1:
        return pairs_RD
    return pairs_RD.view(-1, top_k, pairs_RD.shape[1]).sum(1, dtype=pairs_RD.dtype)
