"""Sharding: every rank keeps some rows of every weight and gathers the rest when needed (FSDP2).

ZeRO stage 3 (Rajbhandari et al. 2020), by torch's `fully_shard`. Gradients arrive as plain sums.
"""
from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from fira.model.moe import MoE


def shard(model: Any, dense: DeviceMesh, experts: DeviceMesh) -> None:
    """Shard `model` in place over two meshes (replicas, shards): of its experts, of the rest."""
    for block in model.blocks:
        if isinstance(block.moe, MoE):
            fully_shard(block.moe.experts, mesh=experts)
        fully_shard(block, mesh=dense)
    fully_shard(model, mesh=dense)
    for method in ("features", "logits"):  # a loss may call these instead of the model
        register_fsdp_forward_method(model, method)
    for module in _sharded(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def set_sync(model: nn.Module, last: bool) -> None:
    """Scatter gradients after every micro-batch, for whole ones would be as large as the model; sum
    them over replicas only after the last."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
        model.set_is_last_backward(last)


def _sharded(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that are here; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Where `local(tensor)` begins along the first axis."""
    if not isinstance(tensor, DTensor):
        return 0
    ranks, me = tensor.device_mesh.size(-1), tensor.device_mesh.get_local_rank(-1)
    return min(me * -(-tensor.shape[0] // ranks), tensor.shape[0])  # as torch.chunk cuts


def whole_matrices(update: Tensor, like: Tensor) -> Tensor:
    """Matrices that no rank holds whole are gathered; stacks are sharded between matrices.

    `update` is local, `like` its parameter.
    """
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


def make_device_mesh(device: torch.device, ranks: Any, timeout: timedelta) -> DeviceMesh:
    """A (replicas, shards) mesh from the array of all ranks, whose last two axes these are."""
    names = tuple(f"axis{number}" for number in range(ranks.ndim - 2)) + ("replica", "shard")
    mesh = DeviceMesh(device.type, torch.from_numpy(ranks.copy()), mesh_dim_names=names)
    mesh = mesh["replica", "shard"]
    for group in mesh.get_all_groups():
        _set_pg_timeout(timeout, group)  # DeviceMesh makes them with torch's own limit
    return mesh
