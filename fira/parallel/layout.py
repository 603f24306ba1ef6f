"""How one model is divided between the ranks of a mesh, and the sums that its training needs.

On one rank every method is the plain computation, so the training loop knows only this.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fira.config import ConfigError
from fira.model.balance import end_step, health, set_loss_share
from fira.model.initialize import TensorSlice, initialize
from fira.model.router import routers
from fira.parallel.accumulate import LossFn, Result, accumulate, average, sum_gradients, to_device
from fira.parallel.expert import keep_experts
from fira.parallel.mesh import Mesh, describe_sizes
from fira.parallel.pipeline import Pipeline, Ready, keep_stage
from fira.parallel.shard import first_row, local, release, set_last, shard
from fira.runtime import autocast


class Layout:
    """A model divided on `mesh`; `model` is this rank's part of it, under the whole's names.

    Takes a model on the meta device, which may have frozen parameters and extra ones (of experts
    with the expert axis first), divides it in place, then gives it memory and initial values.
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
            keep_experts(model, mesh.place["expert"], mesh.sizes["expert"], mesh.group("expert"))
        if mesh.sizes["shard"] > 1:
            shard(model, *mesh.shard_meshes)
        model.to_empty(device=mesh.device)
        initialize(model, seed, self.slices(model.named_parameters()))
        self._make_counters()
        self.pipeline = (Pipeline(model, schedule, mesh.device, mesh.group("pipeline"))
                         if mesh.sizes["pipeline"] > 1 else None)

    def _make_counters(self) -> None:
        """Let the routers of other pipeline stages, which have no weights here, take counts."""
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

        `batches` are this rank's micro-batches: named tuples of tensors on the CPU, of them
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
        counts = torch.tensor([(batch.weight, batch.tokens_BT.numel()) for batch in batches],
                              dtype=torch.float64)
        weight, tokens = (self.sum(counts.sum(0)) / self.mesh.sizes["pipeline"]).tolist()
        if weight == 0:
            return math.nan, {}
        shares, token_shares = (counts[:, 0] / weight).tolist(), (counts[:, 1] / tokens).tolist()

        def before(number: int) -> None:
            if self.mesh.size == 1:
                check()
            set_loss_share(self.model, token_shares[number])
            set_last(self.model, number == len(batches) - 1)

        results: list[Result]
        if self.pipeline:
            set_loss_share(self.model, token_shares[0])  # its micro-batches are equally large
            results = self.pipeline.run(batches, shares, loss_fn)
        else:
            results = accumulate(self.model, batches, shares, loss_fn, self.mesh.device, before)
        set_loss_share(self.model, 1.0)
        self._sum_over_ranks()
        means = average(results, self.mesh.gather)
        return means.pop("loss"), means

    def _sum_over_ranks(self) -> None:
        """Sum gradients over the ranks that hold the same rows; `fully_shard` sums its own."""
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        tied = [p for name, p in trained if name.split(".")[0] in self.tied]
        if tied:  # the first and the last stage hold it, and each has a part of its gradient
            sum_gradients(tied, self.mesh.group("ends"))
        if self.mesh.batch_ranks == 1 or self.mesh.sizes["shard"] > 1:
            return
        for axes in ("data",), ("data", "expert"):
            members = [p for name, p in trained if _replica_axes(name) == axes]
            if members and self.mesh.group(*axes):
                sum_gradients(members, self.mesh.group(*axes))

    def gradient_norm(self) -> float:
        """The norm of the whole model's gradient: every row of every parameter counts once."""
        grads = [(name, local(p.grad)) for name, p in self.model.named_parameters()
                 if p.grad is not None]
        total = torch.zeros(1, dtype=torch.float64)
        if grads:
            norms = torch.stack(torch._foreach_norm([grad for _, grad in grads]))
            copies = torch.tensor([self._copies(name) for name, _ in grads], device=norms.device)
            total += (norms.double() ** 2 / copies).sum().cpu()
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
        return self.mesh.sum(tensor)

    def take_turns(self, batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """Every n-th of `batches`, as many on every rank, and whether this rank's result counts."""
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
        with autocast(self.mesh.device):
            result = function(model, batch)
        release(self.model)
        return result

    def slices(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[TensorSlice]:
        """Which rows of the whole these tensors of the model are, or of optimizer state, which is
        named parameter/key."""
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


def check_fit(sizes: dict[str, int], spec: Any, batch_size: int, micro_batch: int,
              sequence_length: int) -> None:
    """Raises ConfigError, one line, where a model or batch cannot be divided as asked."""
    expert, pipeline = sizes["expert"], sizes["pipeline"]
    if spec.num_experts % expert:
        fit = max(size for size in range(1, expert) if spec.num_experts % size == 0)
        raise ConfigError(f"parallel.expert={expert} must divide model.num_experts="
                          f"{spec.num_experts}; try parallel.expert={fit}")
    if sizes["shard"] > 1 and pipeline > 1:
        raise ConfigError(f"parallel.shard={sizes['shard']} cannot be combined with "
                          f"parallel.pipeline={pipeline}; try parallel.shard=1 with parallel.data "
                          "or parallel.expert")
    if pipeline > spec.num_layers:
        raise ConfigError(f"parallel.pipeline={pipeline} is more than model.num_layers="
                          f"{spec.num_layers}; try parallel.pipeline={spec.num_layers}")
    ranks = sizes["data"] * sizes["shard"] * expert
    least = ranks * micro_batch * pipeline  # a pipeline needs a micro-batch for every stage
    if batch_size % least:
        fit = max(1, round(batch_size / least)) * least
        raise ConfigError(f"train.batch_tokens={batch_size * sequence_length} are {batch_size} "
                          f"sequences, which do not divide into micro-batches of {micro_batch} on "
                          f"parallel {describe_sizes(sizes, sign='=')}; "
                          f"try train.batch_tokens={fit * sequence_length}")
