"""How one model lies on the ranks of a mesh, and the sums that its training needs across them.

On one rank every method is the plain thing, so the training loop knows only this.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fira.config import ConfigError
from fira.model.balance import end_step, health
from fira.model.files import build_meta
from fira.model.initialize import TensorSlice as Piece
from fira.model.initialize import initialize
from fira.model.router import Router, routers
from fira.parallel.expert import keep_experts
from fira.parallel.mesh import AXES, Mesh
from fira.parallel.pipeline import SCHEDULES, Pipeline, keep_stages, stages_of
from fira.parallel.replicate import GradientSum
from fira.parallel.shard import first_row, local, make_device_mesh, set_sync, shard
from fira.parallel.team import Team


class Layout:
    """A model of `spec` on `mesh`; `model` is this rank's part of it, under the whole's names."""

    def __init__(self, mesh: Mesh, spec: Any, seed: int | None, schedule: str = "1f1b") -> None:
        self.mesh, self.spec = mesh, spec
        self.shapes = {name: tuple(tensor.shape)
                       for name, tensor in build_meta(spec).state_dict().items()}
        model = build_meta(spec)
        self.tied = {*model.before} & {*model.after} if mesh.sizes["pipeline"] > 1 else set()
        if mesh.sizes["pipeline"] > 1:
            stages = mesh.sizes["pipeline"] * SCHEDULES[schedule][1]
            keep_stages(model, stages_of(mesh.place["pipeline"], mesh.sizes["pipeline"], schedule),
                        stages)
        if mesh.sizes["expert"] > 1:
            keep_experts(model, mesh.place["expert"], mesh.sizes["expert"], mesh.group("expert"))
        if mesh.sizes["shard"] > 1:
            shard(model, *self._device_meshes())
        self.model: Any = model.to_empty(device=mesh.device)
        initialize(model, seed, list(self.pieces(model.named_parameters())))
        self.pipeline = (Pipeline(model, schedule, mesh.device, mesh.group("pipeline"))
                         if mesh.sizes["pipeline"] > 1 else None)
        self.gradients = self._gradient_sum() if mesh.batch_ranks > 1 else None
        self.layers = self._all_routers()
        self.teams: dict[tuple[Any, ...], Team] = {}

    def _device_meshes(self) -> list[Any]:
        """(replicas, shards) for the dense weights, whose replicas include the expert axis, and
        for the experts."""
        ranks = np.arange(self.mesh.size).reshape(self.mesh.shape)
        pipeline, data, expert, shards = self.mesh.shape
        dense = ranks.reshape(pipeline, data * expert, shards)
        return [make_device_mesh(self.mesh.device, dense, self.mesh.timeout),
                make_device_mesh(self.mesh.device, ranks.transpose(0, 2, 1, 3),
                                 self.mesh.timeout)]

    def _gradient_sum(self) -> GradientSum | None:
        if self.mesh.sizes["shard"] > 1:
            return None  # fully_shard sums its own
        members = [(parameter, self.mesh.group(*self._replica_axes(name)))
                   for name, parameter in self.model.named_parameters()]
        return GradientSum([(p, group) for p, group in members if group is not None])

    def _replica_axes(self, name: str) -> tuple[str, ...]:
        """The axes along which ranks hold the same rows of a parameter."""
        return ("data",) if ".experts." in name else ("data", "expert")

    def _all_routers(self) -> list[Router]:
        """The routers of all layers; those of other ranks are stand-ins that take their counts."""
        here = {layer: found[0] for layer, block in self.model.blocks._modules.items()
                if (found := routers(block))}
        if not self.spec.num_experts > 1:
            return []
        stand_in = [here.get(str(layer)) or Router(1, self.spec.num_experts, self.spec.top_k, False)
                    for layer in range(self.spec.num_layers)]
        for layer, router in enumerate(stand_in):
            if str(layer) not in here:
                router.reset_buffers()
        return stand_in

    def rows(self, batch_size: int) -> slice:
        """Which rows of a global batch are this rank's."""
        each = batch_size // self.mesh.batch_ranks
        return slice(self.mesh.batch_rank * each, (self.mesh.batch_rank + 1) * each)

    def forward_backward(self, accumulate: Callable[..., tuple[Any, int]]) -> Callable[..., Any]:
        """The loop's seam: (model, micro-batches, loss_fn) -> (mean loss, number) of all ranks.

        Gradients are left summed over all micro-batches of all ranks.
        """
        if self.mesh.size == 1:
            return accumulate

        def run(model: Any, batches: Iterable[Any], loss_fn: Any) -> tuple[float, int]:
            if self.pipeline:
                loss, count = self.pipeline.run(batches, loss_fn)
            else:
                loss, count = accumulate(model, self._syncing(batches), loss_fn)
                loss = loss * count
            if self.tied:
                self._sum_tied()
            if self.gradients:
                self.gradients.finish()
            count *= self.mesh.batch_ranks
            return self.sum(torch.tensor([float(loss)], dtype=torch.float64)).item() / count, count
        return run

    def _syncing(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same micro-batches; gradients travel during the last one's backward pass."""
        coming = list(batches)
        for number, batch in enumerate(coming, start=1):
            set_sync(self.model, number == len(coming))
            if self.gradients and number == len(coming):
                self.gradients.arm()
            yield batch

    def _sum_tied(self) -> None:
        """A weight that the first and the last stage share has a gradient from both."""
        for name in sorted(self.tied):
            part = getattr(self.model, name)
            if part is not None:
                dist.all_reduce(part.weight.grad, group=self.mesh.group("ends"))

    def gradient_norm(self, model: nn.Module) -> float:
        """The norm of the whole model's gradient: every row of every parameter once."""
        grads = [(name, local(p.grad)) for name, p in model.named_parameters()
                 if p.grad is not None]
        norms = torch._foreach_norm([grad for _, grad in grads])
        total = sum(norm.double() ** 2 / self._copies(name)
                    for (name, _), norm in zip(grads, norms, strict=True))
        assert isinstance(total, Tensor)
        return math.sqrt(self.sum(total.cpu().reshape(1)).item())

    def each(self, function: Callable[[Tensor], Tensor], stacks: list[Tensor],
             owners: list[Tensor]) -> list[Tensor]:
        """function(stack) of every stack, which belong to the parameters `owners`: ranks that hold
        the same divide them."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        parts: dict[tuple[str, ...], list[int]] = {}
        for number, owner in enumerate(owners):
            parts.setdefault(self._replica_axes(names[owner]), []).append(number)
        results = list(stacks)
        for axes, numbers in parts.items():
            mine = [stack.reshape(math.prod(stack.shape[:-2]), *stack.shape[-2:])
                    for stack in (stacks[n] for n in numbers)]
            if self.mesh.size == 1 or self.mesh.sizes["shard"] > 1 or not self.mesh.group(*axes):
                found = [function(stack) for stack in mine]
            else:
                shapes = tuple(stack.shape for stack in mine)
                if (axes, shapes) not in self.teams:
                    self.teams[axes, shapes] = Team(self.mesh.group(*axes), shapes,
                                                    self.mesh.device)
                found = self.teams[axes, shapes].each(function, mine)
            for number, result in zip(numbers, found, strict=True):
                results[number] = result.view_as(stacks[number])
        return results

    def _copies(self, name: str) -> int:
        """How many ranks hold the same rows of a tensor."""
        copies = math.prod(self.mesh.sizes[axis] for axis in self._replica_axes(name))
        return copies * (2 if name.split(".")[0] in self.tied else 1)

    def end_step(self) -> dict[str, Any] | None:
        """Sum the routing counts over all ranks, close the step with them, return its health."""
        if self.mesh.size > 1 and self.layers:
            held = {id(router) for router in routers(self.model)}
            counts = torch.stack([torch.cat([
                counter.double().reshape(-1) * (id(router) in held) for counter in router.counters])
                for router in self.layers]).cpu()
            for router, row in zip(self.layers, self.sum(counts), strict=True):
                sizes = [counter.numel() for counter in router.counters]
                for counter, total in zip(router.counters, row.split(sizes), strict=True):
                    counter.copy_(total.view_as(counter))
        found = health(self.layers)
        end_step(self.model)
        return found

    def sum(self, tensor: Tensor) -> Tensor:
        return self.mesh.sum(tensor)

    def turns(self, batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """Batches in turn, and whether this rank's result counts: as many on every rank."""
        coming = iter(batches)
        while group := list(islice(coming, self.mesh.batch_ranks)):
            mine = self.mesh.batch_rank < len(group)
            yield group[self.mesh.batch_rank if mine else 0], mine

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None,
                loss: Callable[..., Tensor] | None = None) -> Tensor | None:
        """The model's forward of this rank's rows, for scoring; None on ranks without a head."""
        forward = self.pipeline.forward if self.pipeline else self.model
        return forward(tokens_BT, targets_BT=targets_BT, loss=loss)

    def pieces(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Piece]:
        """Which rows of the whole the model's tensors are; also of optimizer state, `name/key`."""
        parameters = dict(self.model.named_parameters())
        for name, tensor in tensors:
            whole = name.partition("/")[0]
            start, shape = first_row(parameters.get(whole, tensor)), self.shapes[whole]
            if ".experts." in whole:
                start += self.mesh.place["expert"] * (shape[0] // self.mesh.sizes["expert"])
            rows = local(tensor.detach())
            yield Piece(name, rows, start, shape) if rows.dim() else Piece(name, rows, 0, ())

    def writes(self, piece: Piece) -> bool:
        """Is this the rank that writes a piece to a file?"""
        place, whole = self.mesh.place, piece.name.partition("/")[0]
        if whole.split(".")[0] in self.tied and place["pipeline"] > 0:
            return False
        divided = bool(piece.shape) and whole in dict(self.model.named_parameters())
        axes = self._replica_axes(whole) if divided else ("data", "expert", "shard")
        return all(place[axis] == 0 for axis in axes)


def check_fit(sizes: dict[str, int], schedule: str, spec: Any, batch_size: int,
              micro_batch: int, sequence_length: int) -> None:
    """Raises ConfigError, one line, where a model or batch cannot be divided as asked."""
    expert, pipeline = sizes["expert"], sizes["pipeline"]
    if spec.num_experts % expert:
        fit = max(size for size in range(1, expert) if spec.num_experts % size == 0)
        raise ConfigError(f"parallel.expert={expert} must divide model.num_experts="
                          f"{spec.num_experts}; try parallel.expert={fit}")
    if sizes["shard"] > 1 and pipeline > 1:
        raise ConfigError(f"parallel.shard={sizes['shard']} does not go with parallel.pipeline="
                          f"{pipeline}; try parallel.shard=1 with parallel.data or parallel.expert")
    stages = pipeline * (SCHEDULES[schedule][1] if pipeline > 1 else 1)
    if stages > spec.num_layers:
        raise ConfigError(f"parallel.pipeline={pipeline} with parallel.schedule={schedule} makes "
                          f"{stages} stages, more than model.num_layers={spec.num_layers}; "
                          "try a smaller parallel.pipeline")
    ranks = sizes["data"] * sizes["shard"] * expert
    each = ranks * micro_batch * (pipeline if pipeline > 1 else 1)
    if batch_size % each:
        least = max(1, round(batch_size / each)) * each
        asked = " x ".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes[axis] > 1)
        raise ConfigError(f"train.batch_tokens={batch_size * sequence_length} are {batch_size} "
                          f"sequences, which do not divide into micro-batches of {micro_batch} "
                          f"on parallel {asked}; try train.batch_tokens={least * sequence_length}")
