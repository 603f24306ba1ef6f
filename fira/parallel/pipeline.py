"""Pipelines: each rank keeps some blocks, micro-batches flow through (GPipe, Huang et al. 2019).

The first stage takes tokens, the last gives features; the loss sees a model whose features are
ready. The router's own losses enter inside the layers.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

# bfloat16 products on CUDA, plain float32 elsewhere (bf16 products are slow on most CPUs)
autocast = partial(torch.autocast, "cuda", torch.bfloat16, enabled=torch.cuda.is_available())

SCHEDULES: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


def layers_of(stage: int, stages: int, num_layers: int) -> range:
    """The layers of a stage; numbers of layers differ by at most one between stages."""
    return range(stage * num_layers // stages, (stage + 1) * num_layers // stages)


def keep_stage(model: Any, stage: int, stages: int) -> None:
    """Delete from `model` what belongs to other stages; the rest keeps its names."""
    num_layers = len(model.blocks)
    for layer in set(range(num_layers)) - set(layers_of(stage, stages, num_layers)):
        del model.blocks._modules[str(layer)]  # `del model.blocks[layer]` would renumber the rest
    kept = (model.before if stage == 0 else ()) + (model.after if stage == stages - 1 else ())
    for name in {*model.before, *model.after} - set(kept):
        setattr(model, name, None)


class Stage(nn.Module):
    """`blocks` of `model`: tokens or x_BTD in, x_BTD out (normalized by the last stage)."""

    def __init__(self, model: Any, blocks: Iterable[nn.Module], first: bool, last: bool) -> None:
        super().__init__()
        self.model, self.first, self.last = model, first, last
        self.layers = list(blocks)

    def forward(self, x: Tensor) -> Tensor:
        with autocast():
            x = self.model.embed(x) if self.first else x
            if torch.is_grad_enabled() and not x.requires_grad:
                x = x.requires_grad_()  # a frozen embedding; a pipeline's outputs need a gradient
            x = self.model.through(self.layers, x)
            return self.model.norm(x) if self.last else x


class Ready:
    """Replaces `model` in a loss function: returns features that are computed already."""

    def __init__(self, model: Any, x_BTD: Tensor) -> None:
        self.model, self.x_BTD = model, x_BTD

    def features(self, tokens_BT: Tensor) -> Tensor:
        return self.x_BTD

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        return self.model.logits(self.x_BTD)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class Pipeline:
    """Runs this rank's stage of `model` together with the other ranks of `group`."""

    def __init__(self, model: Any, schedule: str, device: torch.device, group: Any) -> None:
        self.model, self.device, self.group = model, device, group
        self.kind = SCHEDULES[schedule]
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.stage = Stage(model, model.blocks, self.rank == 0, self.rank == self.ranks - 1)
        self._schedules: dict[Any, Any] = {}
        self._loss_of: Callable[[Any, int], Tensor]

    def run(self, micro_batches: Sequence[Tensor],
            loss_of: Callable[[Any, int], Tensor]) -> None:
        """Forward and backward of equally large micro-batches of tokens_BT on all stages.

        loss_of(model, number) is called on the rank of the last stage, in order. It gives the loss
        of a micro-batch from a model whose features are ready.
        """
        shape, count = micro_batches[0].shape, len(micro_batches)
        assert all(part.shape == shape for part in micro_batches), "unequal micro-batches"
        self._loss_of = loss_of
        inputs = [torch.cat(list(micro_batches)).to(self.device)] if self.stage.first else []
        numbers = torch.arange(count) if self.stage.last else None  # the loss finds its batch
        self._schedule(count, shape).step(*inputs, target=numbers, return_outputs=False)

    def _loss(self, x_BTD: Tensor, number: Tensor) -> Tensor:
        return self._loss_of(Ready(self.model, x_BTD), int(number))

    def _schedule(self, count: int, shape: torch.Size) -> Any:
        """The schedule of `count` micro-batches of `shape`; torch need not infer the shapes."""
        if (count, shape) not in self._schedules:
            x_BTD = torch.empty(*shape, self.model.spec.d_model, device="meta").requires_grad_()
            tokens_BT = torch.empty(shape, dtype=torch.long, device="meta")
            stage = PipelineStage(self.stage, self.rank, self.ranks, self.device,
                                  input_args=(tokens_BT if self.stage.first else x_BTD,),
                                  output_args=(x_BTD,), group=self.group)
            self._schedules[count, shape] = self.kind(stage, n_microbatches=count,
                                                      loss_fn=self._loss, scale_grads=False)
        return self._schedules[count, shape]

    def features(self, tokens_BT: Tensor) -> Tensor | None:
        """The model's features without gradients, on the rank of the last stage; else None."""
        x = tokens_BT
        if not self.stage.first:
            x = torch.empty(*tokens_BT.shape, self.model.spec.d_model, device=self.device)
            dist.recv(x, group=self.group, group_src=self.rank - 1)
        x = self.stage(x)
        if self.stage.last:
            return x
        dist.send(x.contiguous(), group=self.group, group_dst=self.rank + 1)
        return None
