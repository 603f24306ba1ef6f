"""Sharding: every rank keeps some rows of every weight and gathers the rest when needed (FSDP2).

ZeRO stage 3 (Rajbhandari et al. 2020), by torch's `fully_shard`. Gradients arrive as plain sums.
"""
from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from fira.model.moe import MoE


def shard(model: Any, dense: DeviceMesh, experts: DeviceMesh) -> None:
    """Shard `model` in place: its experts over one mesh (replicas, shards), the rest over another.

    A loss calls `model.features`, then `model.head_weights`: the parameters outside the blocks stay
    gathered from the first until the backward pass, or until `release`.
    """
    for block in model.blocks:
        if isinstance(block.moe, MoE):
            fully_shard(block.moe.experts, mesh=experts)
        fully_shard(block, mesh=dense)
    fully_shard(model, mesh=dense, reshard_after_forward=False)
    for method in ("features", "logits"):
        register_fsdp_forward_method(model, method)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def set_last(model: FSDPModule, last: bool) -> None:
    """Say whether the next micro-batch is the last of its step.

    Gradients are scattered after every micro-batch, because whole ones would be as large as the
    model, and summed over replicas after the last.
    """
    model.set_requires_all_reduce(last)
    model.set_is_last_backward(last)


def release(model: FSDPModule) -> None:
    """Free the gathered parameters outside the blocks, where no backward pass does."""
    model.reshard()
