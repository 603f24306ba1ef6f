"""Experts: small feed-forward networks whose linears have one more axis.

`expert_linear(rows, counts, weight, bias)` is the seam: rows come sorted by expert, `counts_E` says
how many each expert owns. Three implementations agree in values and gradients: row by row (the
plain twin), one matrix product per expert (CPU) and one grouped product (GPU). Many small SwiGLU
experts on a CPU have a form of their own, with all experts' products in one call.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fira.model.batched import BatchedSwiGLU
from fira.model.products import HAS_BATCH
from fira.model.sorted_linear import SortedLinear

SMALL = 2**26  # multiplications of one expert's product, below which all cores on it are too many


class ExpertLinear(nn.Module):
    """`nn.Linear` with an expert axis: rows_Ri, counts_E -> rows_Ro."""

    def __init__(self, num_experts: int, width_in: int, width_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width_out, width_in))  # [E, out, in]
        self.bias = nn.Parameter(torch.empty(num_experts, width_out)) if bias else None  # [E, out]

    def forward(self, rows_Ri: Tensor, counts_E: Tensor) -> Tensor:
        return expert_linear(rows_Ri, counts_E, self.weight, self.bias)


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
        if all(type(part) is ExpertLinear for part in parts):  # a quantized one writes out no stack
            weights = [part.weight for part in parts]
            if _should_batch(rows_RD, weights[0]):
                return BatchedSwiGLU.apply(rows_RD, counts_E, *weights)
            if rows_RD.is_cuda:
                return self.down(self.hidden_at_once(rows_RD, counts_E), counts_E)
        hidden_RF = F.silu(self.gate(rows_RD, counts_E)) * self.up(rows_RD, counts_E)
        return self.down(hidden_RF, counts_E)

    def hidden_at_once(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        """What `down` reads, from one product with gate and up: a GPU has fewer and larger ones."""
        both_EWD = torch.cat(multiplied(self.gate.weight, self.up.weight), dim=1)
        gate_RF, up_RF = expert_linear(rows_RD, counts_E, both_EWD, None).chunk(2, dim=1)
        return F.silu(gate_RF) * up_RF


def expert_linear(rows_Ri: Tensor, counts_E: Tensor, weight: Tensor,
                  bias: Tensor | None) -> Tensor:
    """The fastest implementation this device has. weight [E, out, in], bias [E, out] or None."""
    rows_Ri, weight = multiplied(rows_Ri, weight)
    bias = None if bias is None else bias.to(rows_Ri.dtype)
    if len(weight) == 1:
        return F.linear(rows_Ri, weight.squeeze(0), None if bias is None else bias.squeeze(0))
    if _can_group(rows_Ri, weight):
        return expert_linear_grouped(rows_Ri, counts_E, weight, bias)
    return SortedLinear.apply(rows_Ri, counts_E, weight, bias)


def multiplied(*tensors: Tensor) -> list[Tensor]:
    """In the numbers that autocast, where it is on, would multiply."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


def _should_batch(rows_Ri: Tensor, weight: Tensor) -> bool:
    """Whether each expert's product is too small to be divided between the cores."""
    experts, width_out, width_in = weight.shape
    return (experts > 1 and type(rows_Ri) is Tensor and rows_Ri.device.type == "cpu"
            and rows_Ri.dtype == weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and len(rows_Ri) * width_in * width_out < SMALL * experts and HAS_BATCH)


def _can_group(rows_Ri: Tensor, weight: Tensor) -> bool:
    return (rows_Ri.is_cuda and rows_Ri.dtype == torch.bfloat16
            and not _obstacle(weight.shape[1:], rows_Ri.device))


def grouping_obstacle(model: nn.Module, device: torch.device) -> str | None:
    """Why CUDA cannot multiply all experts of a layer at once, in bfloat16; None if it can."""
    stacks = [part.weight for part in model.modules()
              if type(part) is ExpertLinear and len(part.weight) > 1]
    if device.type != "cuda" or not stacks:
        return None
    return _obstacle(stacks[0].shape[1:], device)


def _obstacle(widths: Iterable[int], device: torch.device) -> str | None:
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "grouped_mm needs compute capability 8.0 or newer"
    uneven = [width for width in widths if width % 8]  # row strides of whole 16 bytes
    return f"grouped_mm needs widths that divide by 8, not {uneven[0]}" if uneven else None


def expert_linear_plain(rows_Ri: Tensor, counts_E: Tensor, weight: Tensor,
                        bias: Tensor | None) -> Tensor:
    """Row by row: the definition."""
    owners = torch.repeat_interleave(torch.arange(len(counts_E)), counts_E.cpu()).tolist()
    out = [weight[e] @ row + (0 if bias is None else bias[e])
           for row, e in zip(rows_Ri, owners, strict=True)]
    return torch.stack(out) if out else rows_Ri.new_zeros(0, weight.shape[1])


def expert_linear_grouped(rows_Ri: Tensor, counts_E: Tensor, weight: Tensor,
                          bias: Tensor | None) -> Tensor:
    """One grouped matrix product; no synchronization with the device."""
    ends_E = counts_E.cumsum(0)
    out_Ro = F.grouped_mm(rows_Ri, weight.transpose(1, 2), offs=ends_E.to(torch.int32))
    if bias is None:
        return out_Ro
    rows_R = torch.arange(len(rows_Ri), device=rows_Ri.device)
    return AddBias.apply(out_Ro, bias, torch.searchsorted(ends_E, rows_R, right=True))


class AddBias(torch.autograd.Function):
    """rows_Ro + bias_Eo[owners_R]; the bias's gradient is a product, not rows added one by one."""

    @staticmethod
    def forward(ctx: Any, rows_Ro: Tensor, bias_Eo: Tensor, owners_R: Tensor) -> Tensor:
        ctx.num_experts = len(bias_Eo)
        ctx.save_for_backward(owners_R)
        return rows_Ro + bias_Eo.index_select(0, owners_R)

    @staticmethod
    def backward(ctx: Any, grad_Ro: Tensor) -> tuple[Tensor, Tensor, None]:
        (owners_R,) = ctx.saved_tensors
        experts_E1 = torch.arange(ctx.num_experts, device=owners_R.device).unsqueeze(1)
        return grad_Ro, (experts_E1 == owners_R).to(grad_Ro.dtype) @ grad_Ro, None
