"""`create_pipeline_model`: a model split over the devices of one process, or over ranks.

In one process the stages lie on several devices and micro-batches pass through them in GPipe's
order: kernels are queued along diagonals, so that the devices work at the same time. Started by
torchrun, every rank keeps its own stage and torch's schedules run them.
"""
from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fira import runtime
from fira.config import ConfigError
from fira.data.batches import Batch
from fira.loss.head import next_token_loss
from fira.model import build_meta
from fira.model.router import end_step, set_loss_share, set_progress
from fira.parallel.layout import Layout
from fira.parallel.mesh import ParallelConfig, enter
from fira.parallel.pipeline import SCHEDULES, Ready, Stage, layers_of


def create_pipeline_model(model: Any, num_stages: int = 2, devices: list[Any] | None = None,
                          chunks: int = 4, schedule: str = "GPipe") -> nn.Module:
    """Split `model` into `num_stages`, one after the other, and train with the result.

    `devices`: one per stage; CUDA devices if there are enough, else the CPU for all. A batch is cut
    into `chunks` micro-batches. `schedule` is GPipe, or 1F1B under torchrun. The result has
    `train_batch(tokens_BT, targets_BT)` (returns the mean loss, leaves gradients),
    `clip_gradients(max_norm)`, `end_step(fraction)` after the optimizer's step,
    `forward(tokens_BT)`, and the parameters under the model's own names. `fraction` (0..1) of the
    run is done: balance=handover needs it. Raises ConfigError.
    """
    if schedule.lower() not in SCHEDULES:
        raise ConfigError(f"schedule={schedule!r} is unknown; choose GPipe or 1F1B")
    if not 1 <= num_stages <= len(model.blocks):
        raise ConfigError(f"num_stages={num_stages} must be from 1 to the model's "
                          f"{len(model.blocks)} blocks; try num_stages=2")
    if runtime.launch().world > 1:
        return RankPipeline(model, num_stages, chunks, schedule.lower())
    if schedule.lower() != "gpipe":
        raise ConfigError(f"schedule={schedule} needs a process for every stage; start this script "
                          f"with torchrun --nproc-per-node {num_stages}, or use schedule=GPipe")
    return DevicePipeline(model, pick_devices(num_stages, devices), chunks)


def pick_devices(num_stages: int, devices: list[Any] | None) -> list[torch.device]:
    """One device per stage. Raises ConfigError if their number differs."""
    if devices is None:
        enough = torch.cuda.device_count() >= num_stages
        devices = [f"cuda:{stage}" if enough else "cpu" for stage in range(num_stages)]
    if len(devices) != num_stages:
        raise ConfigError(f"devices={devices} are {len(devices)}, but num_stages={num_stages}; "
                          "give one device per stage (the same may be given twice)")
    return [runtime.pick_device(str(device)) for device in devices]


class PipelineModel(nn.Module):
    """What both pipelines share: the model's own names of parameters and buffers."""

    def __init__(self, model: Any, chunks: int) -> None:
        super().__init__()
        self.model, self.chunks = model, chunks

    def named_parameters(self, *args: Any, **options: Any) -> Any:
        return self.model.named_parameters(*args, **options)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self.model.state_dict(*args, **options)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        return self.model.load_state_dict(*args, **options)


class DevicePipeline(PipelineModel):
    """tokens_BT -> logits_BTV; the stages of `model` lie on `devices`, a tied head on the first."""

    def __init__(self, model: Any, devices: list[torch.device], chunks: int) -> None:
        super().__init__(model, chunks)
        for part in model.after:
            getattr(model, part).to(devices[-1])
        for part in model.before:
            getattr(model, part).to(devices[0])
        self.devices, self.stages = devices, nn.ModuleList()
        for number, device in enumerate(devices):
            layers = layers_of(number, len(devices), len(model.blocks))
            blocks = [model.blocks[layer].to(device) for layer in layers]
            self.stages.append(Stage(_view(model, device), blocks, first=number == 0,
                                     last=number == len(devices) - 1))

    def features(self, tokens_BT: Tensor) -> Tensor:
        """The model's features of the whole batch; gradients flow back through all stages."""
        parts = list(tokens_BT.tensor_split(min(self.chunks, len(tokens_BT))))
        shares = [len(part) / len(tokens_BT) for part in parts]
        for clock in range(len(parts) + len(self.stages) - 1):
            for number, (stage, device) in enumerate(zip(self.stages, self.devices, strict=True)):
                chunk = clock - number
                if 0 <= chunk < len(parts):
                    set_loss_share(stage, shares[chunk])
                    parts[chunk] = stage(parts[chunk].to(device, non_blocking=True))
        set_loss_share(self.model, 1.0)
        return torch.cat(parts).to(self.model.head_weights()[0].device)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.model.logits(self.features(tokens_BT))

    def train_batch(self, tokens_BT: Tensor, targets_BT: Tensor) -> float:
        """The mean loss of a batch; its gradients are added to the parameters'."""
        x_BTD = self.features(tokens_BT)
        loss, _ = next_token_loss(Ready(self.model, x_BTD),
                                  Batch(tokens_BT, targets_BT.to(x_BTD.device)))
        loss.backward()
        return float(loss.detach())

    def clip_gradients(self, max_norm: float) -> float:
        return float(nn.utils.clip_grad_norm_(self.model.parameters(), max_norm))

    def end_step(self, fraction: float = 0.0) -> None:
        set_progress(self.model, fraction)
        for stage in self.stages:
            end_step(stage)


def _view(model: Any, device: torch.device) -> Any:
    """`model` as one stage sees it: what belongs to no stage (rotary tables) copied to `device`."""
    view = copy.copy(model)
    view._modules = dict(model._modules)
    for name, module in model._modules.items():
        if name != "blocks" and name not in model.before + model.after:
            view._modules[name] = copy.deepcopy(module).to(device)
    return view


class RankPipeline(PipelineModel):
    """This rank's stage of `model`, with the interface of `DevicePipeline`."""

    def __init__(self, model: Any, num_stages: int, chunks: int, schedule: str) -> None:
        mesh = enter(ParallelConfig(pipeline=num_stages), runtime.pick_device())
        self.layout = Layout(mesh, build_meta(model.spec), 0, schedule)
        super().__init__(self.layout.model, chunks)
        whole = model.state_dict()
        with torch.no_grad():
            for part in self.layout.slices(self.model.state_dict().items()):
                part.rows.copy_(whole[part.name])

    def forward(self, tokens_BT: Tensor) -> Tensor | None:
        """Logits without gradients, on the rank of the last stage; None on the others."""
        return self.layout.score(lambda model, batch: model(batch.tokens_BT),
                                 Batch(tokens_BT, tokens_BT))

    def train_batch(self, tokens_BT: Tensor, targets_BT: Tensor) -> float:
        """Every rank gives the whole batch; replicas of the pipeline take their rows of it."""
        rows = self.layout.rows(len(tokens_BT))
        parts = [part[rows].tensor_split(self.chunks) for part in (tokens_BT, targets_BT)]
        return self.layout.forward_backward(list(map(Batch, *parts)), next_token_loss)[0]

    def clip_gradients(self, max_norm: float) -> float:
        norm = self.layout.gradient_norm()
        nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, torch.tensor(norm))
        return norm

    def end_step(self, fraction: float = 0.0) -> None:
        set_progress(self.model, fraction)
        self.layout.end_step()
