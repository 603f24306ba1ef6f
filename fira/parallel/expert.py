"""Expert parallelism: each rank keeps some experts whole; rows are sent to them and back.

This replaces the dispatch of `fira.model.moe.MoE`: two all-to-all exchanges around the experts
(GShard, Lepikhin et al. 2020). No row is dropped: every rank sends what it has, however uneven.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fira.model.moe import MoE


class AllToAll:
    """Dispatch to experts that are divided between the ranks of `group`, in their order."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)

    def __call__(self, experts: nn.Module, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        """The results of this rank's rows, which are sorted by expert; counts_E is theirs."""
        counts_PE = counts_E.view(self.ranks, -1)  # P ranks, each with E of the experts
        arriving_PE = torch.zeros_like(counts_PE)
        dist.all_to_all_single(arriving_PE, counts_PE, group=self.group)
        send, receive = counts_PE.sum(1).tolist(), arriving_PE.sum(1).tolist()
        arrived_RD = Exchange.apply(rows_RD, send, receive, self.group)
        order_R = _by_expert(arriving_PE, len(arrived_RD))
        inverse_R = torch.empty_like(order_R)
        inverse_R[order_R] = torch.arange(len(order_R), device=order_R.device)
        results_RD = experts(arrived_RD.index_select(0, order_R), arriving_PE.sum(0))
        return Exchange.apply(results_RD.index_select(0, inverse_R), receive, send, self.group)


def _by_expert(arriving_PE: Tensor, rows: int) -> Tensor:
    """The order of rows by expert and then by rank; they arrive by rank and then by expert."""
    experts_PE = torch.arange(arriving_PE.shape[1], device=arriving_PE.device).expand_as(
        arriving_PE)
    owners_R = experts_PE.flatten().repeat_interleave(arriving_PE.flatten(), output_size=rows)
    return owners_R.argsort(stable=True)


class Exchange(torch.autograd.Function):
    """Send `send[r]` rows to each rank r and receive `receive[r]`.

    Backward sends each row's gradient to the rank that the row came from. (torch's own function
    with a gradient is deprecated, and what replaces it is private.)
    """

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, send: list[int], receive: list[int],
                group: Any) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(rows_RD, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad_RD, ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(rows_RD: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    arrived_RD = rows_RD.new_empty(sum(receive), rows_RD.shape[1])
    dist.all_to_all_single(arrived_RD, rows_RD.contiguous(), receive, send, group=group)
    return arrived_RD


def keep_experts(model: nn.Module, part: int, parts: int, group: Any) -> None:
    """Keep part number `part` of `parts` of every stack of experts; dispatch through `group`."""
    for moe in model.modules():
        if isinstance(moe, MoE):
            moe.dispatch = AllToAll(group)
            for module in moe.experts.modules():
                for name, stack in list(module.named_parameters(recurse=False)):
                    kept = nn.Parameter(stack.detach().chunk(parts)[part].clone(),
                                        requires_grad=stack.requires_grad)
                    module.register_parameter(name, kept)
                for name, numbers in list(module.named_buffers(recurse=False)):
                    setattr(module, name, numbers.chunk(parts)[part].clone())
