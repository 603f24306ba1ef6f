"""Pipelines: each rank keeps some blocks, micro-batches flow through (GPipe, Huang et al. 2019).

Stages share one convention: the first takes tokens, the last gives features, and the loss sees a
model whose features are ready. Balance losses enter inside the layers, once per micro-batch.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from fira import runtime

SCHEDULES = {"gpipe": (ScheduleGPipe, 1), "1f1b": (Schedule1F1B, 1),  # class, stages a rank
             "interleaved": (ScheduleInterleaved1F1B, 2),
             "zero_bubble": (ScheduleInterleavedZeroBubble, 2)}


def stages_of(rank: int, ranks: int, schedule: str) -> list[int]:
    """The stages of a rank: dealt out in turn."""
    return list(range(rank, ranks * SCHEDULES[schedule][1], ranks))


def blocks_of(stage: int, stages: int, num_layers: int) -> range:
    """The layers of a stage, as even as may be."""
    return range(stage * num_layers // stages, (stage + 1) * num_layers // stages)


def keep_stages(model: Any, held: Iterable[int], stages: int) -> None:
    """Leave of `model` what the stages `held` need, under the same names."""
    num_layers, held = len(model.blocks), list(held)
    layers = {layer for stage in held for layer in blocks_of(stage, stages, num_layers)}
    for layer in set(range(num_layers)) - layers:
        del model.blocks._modules[str(layer)]  # a ModuleList would renumber the rest
    kept = (model.before if 0 in held else ()) + (model.after if stages - 1 in held else ())
    for name in {*model.before, *model.after} - set(kept):
        setattr(model, name, None)


class Stage(nn.Module):
    """One stage of `model`: tokens or x_BTD in, x_BTD out (normalized by the last)."""

    def __init__(self, model: Any, stage: int, stages: int) -> None:
        super().__init__()
        layers = blocks_of(stage, stages, model.spec.num_layers)
        self.first, self.last = stage == 0, stage == stages - 1
        self.blocks = nn.ModuleList(model.blocks._modules[str(layer)] for layer in layers)
        own = (model.before if self.first else ()) + (model.after if self.last else ())
        self.parts = nn.ModuleDict({name: getattr(model, name) for name in dict.fromkeys(own)})
        self.embed, self.through = model.embed, model.through

    def forward(self, x: Tensor) -> Tensor:
        with runtime.autocast(x.device):
            x = self.through(self.blocks, self.embed(x) if self.first else x)
            return self.parts["norm"](x) if self.last else x


class Finished:
    """A model whose features are there already, for the loss: every other attribute is its own."""

    def __init__(self, model: Any, x_BTD: Tensor) -> None:
        self.model, self.x_BTD = model, x_BTD

    def __call__(self, tokens_BT: Tensor, targets_BT: Tensor | None = None,
                 loss: Callable[..., Tensor] | None = None) -> Tensor:
        return self.model.read_out(self.x_BTD, targets_BT, loss)

    def features(self, tokens_BT: Tensor) -> Tensor:
        return self.x_BTD

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class Pipeline:
    """Runs the stages of this rank in step with those of the other ranks of `group`."""

    def __init__(self, model: Any, schedule: str, device: torch.device, group: Any) -> None:
        self.model, self.schedule, self.device, self.group = model, schedule, device, group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.stages = self.ranks * SCHEDULES[schedule][1]
        self.held = {stage: Stage(model, stage, self.stages)
                     for stage in stages_of(self.rank, self.ranks, schedule)}
        self.is_last = self.stages - 1 in self.held
        self.batch: Any = None
        self.loss_fn: Any = None
        self._plans: dict[Any, Any] = {}

    def run(self, batches: Iterable[Any], loss_fn: Callable[..., Any]) -> tuple[float, int]:
        """Forward and backward of every micro-batch: (sum of losses, here or 0, their number)."""
        parts = list(batches)
        self.batch = type(parts[0])(*map(torch.cat, zip(*parts, strict=True)))
        self.loss_fn = loss_fn
        rows = torch.arange(len(self.batch[0]), device=self.device)  # the loss picks its targets
        plan = self._plan(len(parts), parts[0].tokens_BT.shape)
        inputs = [self.batch.tokens_BT] if 0 in self.held else []
        if self.is_last:
            losses: list[Tensor] = []
            plan.step(*inputs, target=rows, losses=losses, return_outputs=False)
            total = float(torch.stack([loss.detach() for loss in losses]).sum())
        else:
            plan.step(*inputs, return_outputs=False)
            total = 0.0
        self.batch = self.loss_fn = None
        return total, len(parts)

    def _plan(self, count: int, shape: torch.Size) -> Any:
        """The schedule of `count` micro-batches of `shape`, with given shapes: none is probed."""
        if (count, shape) not in self._plans:
            made = [self._stage(stage, module, shape) for stage, module in self.held.items()]
            kind, each = SCHEDULES[self.schedule]
            self._plans[count, shape] = kind(
                made[0] if each == 1 else made, n_microbatches=count,  # type: ignore[arg-type]
                loss_fn=self._loss, scale_grads=False)
        return self._plans[count, shape]

    def _stage(self, stage: int, module: Stage, shape: torch.Size) -> PipelineStage:
        x_BTD = torch.empty(*shape, self.model.spec.d_model, device="meta")
        tokens_BT = torch.empty(shape, dtype=torch.long, device="meta")
        return PipelineStage(module, stage, self.stages, self.device,
                             input_args=(tokens_BT if stage == 0 else x_BTD.requires_grad_(),),
                             output_args=(x_BTD.requires_grad_(),), group=self.group)

    def _loss(self, x_BTD: Tensor, rows: Tensor) -> Tensor:
        batch = type(self.batch)(*(part[rows] for part in self.batch))
        with runtime.autocast(x_BTD.device):
            return self.loss_fn(Finished(self.model, x_BTD), batch)[0]

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None,
                loss: Callable[..., Tensor] | None = None) -> Tensor | None:
        """The model's forward without gradients, on the rank of the last stage; else None."""
        x = tokens_BT
        for stage in range(self.stages):
            owner, next_owner = stage % self.ranks, (stage + 1) % self.ranks
            if owner == self.rank:
                x = self.held[stage](x)
            if stage < self.stages - 1 and owner != next_owner:
                if owner == self.rank:
                    dist.send(x.contiguous(), group=self.group, group_dst=next_owner)
                elif next_owner == self.rank:
                    x = torch.empty(*tokens_BT.shape, self.model.spec.d_model, device=self.device)
                    dist.recv(x, group=self.group, group_src=owner)
        return self.model.read_out(x, targets_BT, loss) if self.is_last else None
