"""Sharding: every rank keeps some rows of every weight and gathers the rest when needed (FSDP2).

ZeRO stage 3 (Rajbhandari et al. 2020), by torch's `fully_shard`. Gradients arrive as plain sums.
"""
from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

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


def set_last(model: nn.Module, last: bool) -> None:
    """Say whether the next micro-batch is the last of its step.

    Gradients are scattered after every micro-batch, because whole ones would be as large as the
    model, and summed over replicas after the last.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
        model.set_is_last_backward(last)


def release(model: nn.Module) -> None:
    """Free the gathered parameters outside the blocks, where no backward pass does."""
    if isinstance(model, FSDPModule):
        model.reshard()


def local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that are on this rank; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """The row of the whole tensor at which `local(tensor)` begins."""
    if not isinstance(tensor, DTensor):
        return 0
    ranks, me = tensor.device_mesh.size(-1), tensor.device_mesh.get_local_rank(-1)
    return min(me * -(-tensor.shape[0] // ranks), tensor.shape[0])  # as torch.chunk cuts


def whole_matrices(update: Tensor, like: Tensor) -> Tensor:
    """The whole of a matrix whose rows are sharded as those of the parameter `like`; `update` is
    local. Stacks are sharded between matrices, which are whole already."""
    if not isinstance(like, DTensor) or like.dim() > 2:
        return update
    shards = DTensor.from_local(update, like.device_mesh, like.placements, shape=like.shape,
                                stride=like.stride(), run_check=False)
    return shards.full_tensor()


def own_rows(matrices: Tensor, like: Tensor) -> Tensor:
    """The rows of gathered matrices that belong to this rank."""
    if not isinstance(like, DTensor) or like.dim() > 2:
        return matrices
    start = first_row(like)
    return matrices[start:start + len(local(like))]
