"""Experts: small feed-forward networks whose linears have one more axis.

`expert_linear(rows, counts, weight, bias)` is the seam: rows come sorted by expert, `counts_E` says
how many each expert owns. Three implementations agree in values and gradients: row by row (the
plain twin), one matrix product per expert (CPU) and one grouped product (GPU). Many small SwiGLU
experts on a CPU have a form of their own, with all experts' products in one call.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fira.model.products import Product, can_batch, multiply_all, row_blocks, stacked

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
        if (all(type(part) is ExpertLinear for part in parts)  # a quantized one writes out no stack
                and _should_batch(rows_RD, self.gate.weight)):
            return BatchedSwiGLU.apply(rows_RD, counts_E, *(part.weight for part in parts))
        hidden_RF = F.silu(self.gate(rows_RD, counts_E)) * self.up(rows_RD, counts_E)
        return self.down(hidden_RF, counts_E)


def expert_linear(rows_Ri: Tensor, counts_E: Tensor, weight: Tensor,
                  bias: Tensor | None) -> Tensor:
    """The fastest implementation this device has. weight [E, out, in], bias [E, out] or None."""
    device = rows_Ri.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows_Ri, weight = rows_Ri.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if rows_Ri.is_cuda and _can_group(rows_Ri, weight):
        return expert_linear_grouped(rows_Ri, counts_E, weight, bias)
    return SortedLinear.apply(rows_Ri, counts_E, weight, bias)


def _should_batch(rows_Ri: Tensor, weight: Tensor) -> bool:
    """Whether each expert's product is too small to be divided between the cores."""
    experts, width_out, width_in = weight.shape
    return (experts > 1 and type(rows_Ri) is Tensor and rows_Ri.device.type == "cpu"
            and rows_Ri.dtype == weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and len(rows_Ri) * width_in * width_out < SMALL * experts and can_batch())


def _can_group(rows_Ri: Tensor, weight: Tensor) -> bool:
    """grouped_mm takes bf16 on Ampere and newer, with row strides of whole 16 bytes."""
    return (rows_Ri.dtype == torch.bfloat16
            and torch.cuda.get_device_capability(rows_Ri.device) >= (8, 0)
            and all(width % 8 == 0 for width in weight.shape[1:]))


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
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    out_Ro = F.grouped_mm(rows_Ri, weight.transpose(1, 2), offs=offsets_E)
    if bias is None:
        return out_Ro
    experts = torch.arange(len(counts_E), device=rows_Ri.device)
    owners_R = torch.repeat_interleave(experts, counts_E, output_size=len(rows_Ri))
    return out_Ro + bias.index_select(0, owners_R)


class SortedLinear(torch.autograd.Function):
    """One matrix product per expert, each written into its slice of one preallocated result.

    Indexing a stacked weight per expert would make autograd allocate a full-size zero gradient for
    each; here every expert's gradient is written once, and an expert without rows gets zeros.
    """

    @staticmethod
    def forward(ctx: Any, rows_Ri: Tensor, counts_E: Tensor, weight: Tensor,
                bias: Tensor | None) -> Tensor:
        ctx.segments = _segments(counts_E)
        ctx.save_for_backward(rows_Ri, weight)
        out_Ro = rows_Ri.new_empty(len(rows_Ri), weight.shape[1])
        for expert, start, stop in ctx.segments:
            matrix = weight[expert].t()
            if bias is None:
                torch.mm(rows_Ri[start:stop], matrix, out=out_Ro[start:stop])
            else:
                torch.addmm(bias[expert], rows_Ri[start:stop], matrix, out=out_Ro[start:stop])
        return out_Ro

    @staticmethod
    def backward(ctx: Any, grad_Ro: Tensor) -> tuple[Tensor | None, ...]:
        rows_Ri, weight = ctx.saved_tensors
        need_rows, _, need_weight, need_bias = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows_Ri) if need_rows else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = grad_Ro.new_empty(weight.shape[:2]) if need_bias else None
        for expert, start, stop in ctx.segments:
            grad = grad_Ro[start:stop]
            if grad_rows is not None:
                torch.mm(grad, weight[expert], out=grad_rows[start:stop])
            if grad_weight is not None:
                torch.mm(grad.t(), rows_Ri[start:stop], out=grad_weight[expert])
            if grad_bias is not None:
                torch.sum(grad, dim=0, out=grad_bias[expert])
        _zero_idle(ctx.segments, grad_weight, grad_bias)
        return grad_rows, None, grad_weight, grad_bias


class BatchedSwiGLU(torch.autograd.Function):
    """SwiGLU experts whose products of one kind are one call. float32 on a CPU."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, counts_E: Tensor, gate_EFD: Tensor, up_EFD: Tensor,
                down_EDF: Tensor) -> Tensor:
        counts = counts_E.numpy().astype(np.int32)
        ctx.experts = counts.nonzero()[0]
        ctx.blocks = (counts.cumsum(dtype=np.int64) - counts)[ctx.experts], counts[ctx.experts]
        gates_RF, ups_RF = rows_RD.new_empty(2, len(rows_RD), gate_EFD.shape[1])
        rows, gates, ups = (row_blocks(x, *ctx.blocks) for x in (rows_RD, gates_RF, ups_RF))
        gate, up, down = (stacked(x, ctx.experts) for x in (gate_EFD, up_EFD, down_EDF))
        multiply_all(Product(rows, gate.t, gates), Product(rows, up.t, ups))
        hidden_RF = F.silu(gates_RF).mul_(ups_RF)
        out_RD = torch.empty_like(rows_RD)
        multiply_all(Product(row_blocks(hidden_RF, *ctx.blocks), down.t,
                             row_blocks(out_RD, *ctx.blocks)))
        ctx.save_for_backward(rows_RD, gate_EFD, up_EFD, down_EDF, gates_RF, ups_RF)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, gate_EFD, up_EFD, down_EDF, gates_RF, ups_RF = ctx.saved_tensors
        gate, up, down = (stacked(x, ctx.experts) for x in (gate_EFD, up_EFD, down_EDF))
        new = torch.empty_like if len(ctx.experts) == len(gate_EFD) else torch.zeros_like
        grad_gate_EFD, grad_up_EFD, grad_down_EDF = (new(x) for x in (gate_EFD, up_EFD, down_EDF))
        silu_RF = F.silu(gates_RF)
        hidden_RF, grad_hidden_RF = silu_RF * ups_RF, torch.empty_like(silu_RF)
        grad_RD = grad_RD.contiguous()
        grads, rows, hidden, grad_hidden = (
            row_blocks(x, *ctx.blocks) for x in (grad_RD, rows_RD, hidden_RF, grad_hidden_RF))
        multiply_all(Product(grads, down, grad_hidden),
                     Product(grads.t, hidden, stacked(grad_down_EDF, ctx.experts)))
        grad_gates_RF = torch.ops.aten.silu_backward(grad_hidden_RF * ups_RF, gates_RF)
        grad_ups_RF = silu_RF.mul_(grad_hidden_RF)
        grad_rows_RD = torch.empty_like(rows_RD)
        grad_rows = row_blocks(grad_rows_RD, *ctx.blocks)
        for grad_RF, weight, grad_weight, add in ((grad_gates_RF, gate, grad_gate_EFD, False),
                                                  (grad_ups_RF, up, grad_up_EFD, True)):
            part, matrices = row_blocks(grad_RF, *ctx.blocks), stacked(grad_weight, ctx.experts)
            multiply_all(Product(part, weight, grad_rows, add), Product(part.t, rows, matrices))
        return grad_rows_RD, None, grad_gate_EFD, grad_up_EFD, grad_down_EDF


def _segments(counts_E: Tensor) -> list[tuple[int, int, int]]:
    """(expert, start, stop) of each expert that has rows."""
    segments, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            segments.append((expert, start, start + count))
        start += count
    return segments


def _zero_idle(segments: list[tuple[int, int, int]], *grads: Tensor | None) -> None:
    busy = {expert for expert, _, _ in segments}
    for grad in grads:
        if grad is not None:
            for expert in set(range(len(grad))) - busy:
                grad[expert].zero_()
