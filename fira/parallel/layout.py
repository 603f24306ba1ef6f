"""How one model is divided between the ranks of a mesh, and the gradient of a step on all of them.

A micro-batch's share is its weight over that of the global batch. Each loss is multiplied by its
share, so the sum of the gradients over all micro-batches of all ranks is the gradient of the
weighted mean, and nothing is divided afterwards. On one rank every method is the plain computation,
so the training loop knows only this class.
"""
from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from fira.model.adapter import hold_frozen
from fira.model.initialize import TensorSlice, initialize
from fira.model.moe import MoE
from fira.model.router import end_step, health, replay, routers, set_loss_share
from fira.model.transformer import Documents
from fira.parallel.expert import keep_experts
from fira.parallel.mesh import Mesh
from fira.parallel.pipeline import Pipeline, Ready, autocast, keep_stage

LossFn = Callable[[Any, Any], "tuple[Tensor, dict[str, Any]]"]
Result = tuple[float, Tensor, dict[str, Tensor]]  # of a micro-batch: share, mean loss, metrics
BUCKET = 4 << 20  # elements per message: enough for full bandwidth, and little memory on top


class Layout:
    """A model that is divided between the ranks of `mesh`; `model` is the part of this rank.

    Takes a model on the meta device, divides it in place, and gives it memory and initial values;
    frozen parameters get none, as they are read from a file. Parameters keep their names. Some may
    be added; in experts the first axis is E.
    """

    def __init__(self, mesh: Mesh, model: Any, seed: int | None = None,
                 schedule: str = "1f1b") -> None:
        self.mesh, self.model = mesh, model
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.routers = routers(model)
        self.tied: set[str] = set()
        if mesh.sizes["pipeline"] > 1:
            self.tied = {*model.before} & {*model.after}
            keep_stage(model, mesh.place["pipeline"], mesh.sizes["pipeline"])
        if mesh.sizes["expert"] > 1:
            keep_experts(model, mesh.place["expert"], mesh.sizes["expert"], mesh.groups["expert",])
        self.sharded = mesh.sizes["shard"] > 1
        if self.sharded:
            shard(model, *mesh.shard_meshes)
        elif mesh.device.type == "cuda":
            hold_frozen(model, torch.bfloat16)
        model.to_empty(device=mesh.device)
        initialize(model, seed, self.slices(
            one for one in model.named_parameters() if one[1].requires_grad))
        self._make_counters()
        self.pipeline = (Pipeline(model, schedule, mesh.device, mesh.groups["pipeline",])
                         if mesh.sizes["pipeline"] > 1 else None)

    def _make_counters(self) -> None:
        """Give routers of other pipeline stages memory for counts, which all ranks sum, only."""
        self._own = {id(router) for router in routers(self.model)}
        for router in self.routers:
            if id(router) not in self._own:
                router._parameters.clear()
                router.to_empty(device=self.mesh.device).reset_buffers()

    def rows(self, batch_size: int) -> slice:
        """The rows of a global batch that belong to this rank."""
        count = batch_size // self.mesh.batch_ranks
        return slice(self.mesh.batch_rank * count, (self.mesh.batch_rank + 1) * count)

    def forward_backward(self, batches: Sequence[Any], loss_fn: LossFn,
                         check: Callable[[], None] = lambda: None
                         ) -> tuple[float, dict[str, float]]:
        """The mean loss and metrics of the global batch; leaves its gradient in `grad`.

        `batches` are this rank's micro-batches: named tuples of tensors on the CPU, one of them
        tokens_BT, with a `weight`. loss_fn(model, batch) gives the mean loss of a micro-batch and
        its metrics. Everything is averaged by weight over all micro-batches of all ranks; the
        router's own losses, which are means over tokens, by tokens. Without any weight the loss is
        NaN and nothing is computed.

        `check` is called before every micro-batch on one rank, once on many. If it raises, no
        gradients or counts of this step are left.
        """
        try:
            return self._forward_backward(batches, loss_fn, check)
        except BaseException:
            self.model.zero_grad(set_to_none=True)
            for router in self.routers:
                torch._foreach_zero_(router.counters)
            raise

    def _forward_backward(self, batches: Sequence[Any], loss_fn: LossFn,
                          check: Callable[[], None]) -> tuple[float, dict[str, float]]:
        if self.mesh.size > 1:
            check()
        if self.model.trained_length is not None:  # a model made elsewhere knows all its context
            self.model.trained_length = max(self.model.trained_length,
                                            *(batch.tokens_BT.shape[1] for batch in batches))
        counts = [(batch.weight, batch.tokens_BT.numel()) for batch in batches]
        totals = self.sum(torch.tensor(counts, dtype=torch.float64).sum(0))
        weight, tokens = (totals / self.mesh.sizes["pipeline"]).tolist()
        if weight == 0:
            return math.nan, {}
        shares = [(own / weight, size / tokens) for own, size in counts]
        results: list[Result] = []

        def loss_of(model: Any, number: int) -> Tensor:
            batch, share = to_device(batches[number], self.mesh.device), shares[number][0]
            with autocast():
                loss, metrics = loss_fn(read(model, batch), batch)
            results.append((share, loss.detach(), {
                name: torch.as_tensor(value).detach() for name, value in metrics.items()}))
            return loss * share

        if self.pipeline:
            set_loss_share(self.model, shares[0][1])  # its micro-batches are equally large
            self.pipeline.run([batch.tokens_BT for batch in batches], loss_of)
        else:
            for number in range(len(batches)):
                if self.mesh.size == 1:
                    check()
                set_loss_share(self.model, shares[number][1])
                if self.sharded:  # gradients are summed over replicas after the last micro-batch
                    self.model.set_requires_all_reduce(number == len(batches) - 1)
                    self.model.set_is_last_backward(number == len(batches) - 1)
                loss_of(self.model, number).backward()
        set_loss_share(self.model, 1.0)
        self._sum_over_ranks()
        means = self._average(results)
        return means.pop("loss"), means

    def _average(self, results: list[Result]) -> dict[str, float]:
        """The mean of the loss and of every metric, by weight, over the results of all ranks.

        Micro-batches without weight do not count, and a rank may lack a metric that others have. Of
        a metric whose name ends in _max it is the largest value.
        """
        own: dict[str, list[tuple[float, float]]] = {}
        for share, loss, metrics in results:
            assert "loss" not in metrics, "the loss itself has this name"
            for name, value in {"loss": loss, **metrics}.items() if share else ():
                own.setdefault(name, []).append((float(value), share))
        everyone = [own] if self.mesh.size == 1 else self.mesh.gather(own)
        means = {}
        for name in dict.fromkeys(name for found in everyone for name in found):
            values, shares = zip(*(pair for found in everyone for pair in found.get(name, ())),
                                 strict=True)
            means[name] = max(values) if name.endswith("_max") else (
                sum(map(operator.mul, values, shares)) / sum(shares))
        return means

    def _sum_over_ranks(self) -> None:
        """Sum gradients over the ranks that hold the same rows; `fully_shard` sums its own."""
        if self.mesh.size == 1:
            return
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        # the first and the last stage hold a tied matrix, and each has a part of its gradient
        sum_gradients([p for name, p in trained if name.split(".")[0] in self.tied],
                      self.mesh.groups.get(("ends",)))
        for axes in () if self.sharded else (("data",), ("data", "expert")):
            sum_gradients([p for name, p in trained if _replica_axes(name) == axes],
                          self.mesh.groups[axes])

    def gradient_norm(self) -> float:
        """The norm of the whole model's gradient: every row of every parameter counts once."""
        grads = [(name, local(p.grad)) for name, p in self.model.named_parameters()
                 if p.grad is not None]
        total = torch.zeros(1, dtype=torch.float64)
        if grads:
            norms = torch.stack(torch._foreach_norm([grad for _, grad in grads])).cpu().double()
            copies = torch.tensor([self._copies(name) for name, _ in grads])
            total += (norms ** 2 / copies).sum()
        return math.sqrt(self.sum(total).item())

    def _copies(self, name: str) -> int:
        """How many ranks hold the same rows of a tensor."""
        copies = math.prod(self.mesh.sizes[axis] for axis in _replica_axes(name))
        return copies * (2 if name.split(".")[0] in self.tied else 1)

    def end_step(self) -> dict[str, Any] | None:
        """Sum the routing counts over all ranks, end the step with them, return its health."""
        if self.mesh.size > 1 and self.routers:
            counts = torch.stack([torch.cat([counter.double().reshape(-1)
                                             for counter in router.counters])
                                  * (id(router) in self._own) for router in self.routers]).cpu()
            for router, row in zip(self.routers, self.sum(counts), strict=True):
                sizes = [counter.numel() for counter in router.counters]
                for counter, total in zip(router.counters, row.split(sizes), strict=True):
                    counter.copy_(total.view_as(counter))
        found = health(self.routers)
        end_step(self.model)
        return found

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks of a small CPU tensor."""
        if self.mesh.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def take_turns(self, batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """This rank's part of `batches` and whether its results count: all get equally many."""
        coming = iter(batches)
        while group := list(islice(coming, self.mesh.batch_ranks)):
            counts = self.mesh.batch_rank < len(group)
            yield group[self.mesh.batch_rank if counts else 0], counts

    @torch.no_grad()  # sharded weights cannot be gathered in inference mode
    def score(self, function: Callable[[Any, Any], Any], batch: Any) -> Any:
        """function(model, batch) without gradients; None on pipeline ranks without the head.

        All ranks must call this, each with a batch of its own.
        """
        batch, model = to_device(batch, self.mesh.device), self.model
        if self.pipeline:
            x_BTD = self.pipeline.features(batch.tokens_BT)
            if x_BTD is None:
                return None
            model = Ready(model, x_BTD)
        with autocast():
            result = function(read(model, batch), batch)
        if self.sharded:
            self.model.reshard()  # free what stays gathered until a backward pass
        return result

    def slices(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[TensorSlice]:
        """Which rows of the whole each tensor holds: one of the model, or one of the optimizer's
        state, which is named parameter/key."""
        parameters = dict(self.model.named_parameters())
        for name, tensor in tensors:
            whole = name.partition("/")[0]
            start, shape = first_row(parameters.get(whole, tensor)), self.shapes[whole]
            if ".experts." in whole:
                start += self.mesh.place["expert"] * (shape[0] // self.mesh.sizes["expert"])
            rows = local(tensor.detach())
            yield TensorSlice(name, rows, *((start, shape) if rows.dim() else (0, ())))

    def writes(self, part: TensorSlice) -> bool:
        """Whether this is the rank that writes a slice to a file."""
        place, whole = self.mesh.place, part.name.partition("/")[0]
        if whole.split(".")[0] in self.tied and place["pipeline"] > 0:
            return False
        divided = bool(part.shape) and whole in dict(self.model.named_parameters())
        axes = _replica_axes(whole) if divided else ("data", "expert", "shard")
        return all(place[axis] == 0 for axis in axes)


def _replica_axes(name: str) -> tuple[str, ...]:
    """The axes along which ranks hold the same rows of a parameter."""
    return ("data",) if ".experts." in name else ("data", "expert")


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch, which is a named tuple of tensors, on `device`."""
    return type(batch)(*(field.to(device, non_blocking=True) for field in batch))


def read(model: Any, batch: Any) -> Any:
    """`model` for the loss of `batch`. If a batch has `positions_BT`, its rows hold documents that
    are masked from each other, and the features are ready. `experts_BTLK` are taken by the routers,
    if it has any."""
    if not hasattr(batch, "positions_BT"):
        return model
    documents = Documents(batch.positions_BT, model.spec.num_layers)
    given = batch.experts_BTLK.flatten(0, 1).unbind(1) if hasattr(batch, "experts_BTLK") else ()
    with replay(model, given, counted=True) if given else contextlib.nullcontext():
        return Ready(model, model.features(batch.tokens_BT, documents))


def sum_gradients(parameters: Sequence[nn.Parameter], group: Any) -> None:
    """Sum the gradients over the ranks of `group`, several of them in each message. Without a group
    no other rank holds these parameters."""
    while parameters and group is not None:
        count = size = 0
        while count < len(parameters) and size < BUCKET:
            size += parameters[count].numel()
            count += 1
        bucket, parameters = parameters[:count], parameters[count:]
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                          for p in bucket])
        for parameter in bucket:
            parameter.grad = None  # gradients are not held twice
        dist.all_reduce(flat, group=group)
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)


def shard(model: Any, dense: DeviceMesh, experts: DeviceMesh) -> None:
    """Shard `model` in place by FSDP2 (ZeRO stage 3, Rajbhandari et al. 2020): its experts over one
    mesh (replicas, shards), the rest over another.

    Every rank keeps some rows of every weight and gathers the rest when needed. A loss calls
    `model.features`, then `model.head_weights`: the parameters outside the blocks stay gathered
    from the first until the backward pass. Gradients arrive as plain sums, after every micro-batch,
    because whole ones would be as large as the model.
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


def local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that this rank holds; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """All rows of a tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """The row of the whole tensor at which `local(tensor)` begins."""
    if not isinstance(tensor, DTensor):
        return 0
    ranks, me = tensor.device_mesh.size(-1), tensor.device_mesh.get_local_rank(-1)
    return min(me * -(-tensor.shape[0] // ranks), tensor.shape[0])  # as torch.chunk cuts


def whole_matrices(update: Tensor, like: Tensor) -> tuple[Tensor, slice]:
    """The whole of a matrix of which `update` is this rank's part, and the rows that it is.

    The parameter `like` says how it is divided: the rows of a sharded matrix are gathered. Stacks
    are sharded between matrices, so a part of a stack has whole matrices already."""
    if not isinstance(like, DTensor) or like.dim() > 2:
        return update, slice(None)
    shards = DTensor.from_local(update, like.device_mesh, like.placements, shape=like.shape,
                                stride=like.stride(), run_check=False)
    return shards.full_tensor(), slice(first_row(like), first_row(like) + len(update))
