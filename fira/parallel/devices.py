"""`create_pipeline_model`: a model split over the devices of one process, or over ranks.

In one process the stages lie on several devices and micro-batches pass through them in GPipe's
order: kernels are queued along diagonals, so devices work at the same time on different ones.
Started by torchrun, every rank keeps its own stage and torch's schedules run them.
"""
from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fira import runtime
from fira.config import ConfigError
from fira.loss.next_token import next_token_loss
from fira.model.balance import begin_step, end_step
from fira.model.router import routers
from fira.parallel.layout import Layout
from fira.parallel.mesh import ParallelConfig, enter, resolve_sizes
from fira.parallel.pipeline import SCHEDULES, Stage, blocks_of


class Batch(NamedTuple):
    """Ids and, at each place, the id that follows."""

    tokens_BT: Tensor
    targets_BT: Tensor


def create_pipeline_model(model: Any, num_stages: int = 2, devices: list[Any] | None = None,
                          chunks: int = 4, schedule: str = "GPipe") -> nn.Module:
    """Split `model` into `num_stages`, one after the other, and train with the result.

    `devices`: one per stage; CUDA devices if there are enough, else the CPU for all. A batch is cut
    into `chunks` micro-batches. The result has `train_batch(tokens_BT, targets_BT)` (loss, with
    averaged gradients left behind), `clip_gradients(max_norm)`, `end_step(fraction)` after the
    optimizer's step, `forward(tokens_BT)`, and the parameters under the model's own names.
    `fraction` (0..1) of the run is done: of use to balance=handover. Raises ConfigError.
    """
    name = schedule.lower()
    if name not in SCHEDULES:
        raise ConfigError(f"schedule={schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    if not 1 <= num_stages <= len(model.blocks):
        raise ConfigError(f"num_stages={num_stages} must be from 1 to the model's "
                          f"{len(model.blocks)} blocks; try num_stages=2")
    if runtime.launch().world > 1:
        return RankPipeline(model, num_stages, chunks, name)
    if name != "gpipe":
        raise ConfigError(f"schedule={schedule} needs a process for every stage; start this script "
                          f"with torchrun --nproc-per-node {num_stages}, or use schedule=GPipe")
    return DevicePipeline(model, pick_devices(num_stages, devices), chunks)


def pick_devices(num_stages: int, devices: list[Any] | None) -> list[torch.device]:
    """One device per stage. Raises ConfigError if their number differs."""
    if devices is None:
        enough = torch.cuda.device_count() >= num_stages
        return [torch.device("cuda", stage) if enough else torch.device("cpu")
                for stage in range(num_stages)]
    if len(devices) != num_stages:
        raise ConfigError(f"devices={devices} are {len(devices)}, but num_stages={num_stages}; "
                          "give one device per stage (a device may come twice)")
    return [runtime.pick_device(str(device)) for device in devices]


class DevicePipeline(nn.Module):
    """tokens_BT -> logits_BTV; the stages of `model` lie on `devices`, a tied head on the first."""

    def __init__(self, model: Any, devices: list[torch.device], chunks: int) -> None:
        super().__init__()
        self.model, self.devices, self.chunks = model, devices, chunks
        for stage, device in enumerate(devices):
            for layer in blocks_of(stage, len(devices), len(model.blocks)):
                model.blocks[layer].to(device)
        for part in model.after:
            getattr(model, part).to(devices[-1])
        for part in model.before:
            getattr(model, part).to(devices[0])
        self.views = [_view(model, device) for device in devices]  # lists: no part is named twice
        self.stages = [Stage(view, stage, len(devices)) for stage, view in enumerate(self.views)]

    def train(self, mode: bool = True) -> DevicePipeline:
        for view in getattr(self, "views", []):
            view.training = mode
        return super().train(mode)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None,
                loss: Callable[..., Tensor] | None = None) -> Tensor:
        """The model's forward of the whole batch; gradients flow back through all stages."""
        parts = tokens_BT.tensor_split(min(self.chunks, len(tokens_BT)))
        flowing = list(parts)
        for clock in range(len(parts) + len(self.stages) - 1):
            for stage, device in enumerate(self.devices):
                number = clock - stage
                if 0 <= number < len(parts):
                    share = len(parts[number]) / len(tokens_BT)
                    with _weighted(self.stages[stage], share):
                        x = flowing[number].to(device, non_blocking=True)
                        flowing[number] = self.stages[stage](x)
        head = getattr(self.model, self.model.after[-1]).weight.device
        return self.model.read_out(torch.cat(flowing).to(head), targets_BT, loss)

    def train_batch(self, tokens_BT: Tensor, targets_BT: Tensor) -> float:
        """The mean loss of a batch; its gradients are added to the parameters'."""
        head = getattr(self.model, self.model.after[-1]).weight.device
        batch: Any = Batch(tokens_BT, targets_BT.to(head))
        loss, _ = next_token_loss(self, batch)
        loss.backward()
        return float(loss.detach())

    def clip_gradients(self, max_norm: float) -> float:
        return float(nn.utils.clip_grad_norm_(self.model.parameters(), max_norm))

    def end_step(self, fraction: float = 0.0) -> None:
        begin_step(self.model, fraction)
        end_step(self.model)

    def named_parameters(self, *args: Any, **options: Any) -> Any:
        return self.model.named_parameters(*args, **options)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self.model.state_dict(*args, **options)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        return self.model.load_state_dict(*args, **options)


def _view(model: Any, device: torch.device) -> Any:
    """`model` as one stage sees it: what belongs to no stage (rotary tables) copied to `device`."""
    view = copy.copy(model)
    view._modules = dict(model._modules)
    for name, module in model._modules.items():
        if name != "blocks" and name not in model.before + model.after:
            view._modules[name] = copy.deepcopy(module).to(device)
    return view


@contextlib.contextmanager
def _weighted(stage: Stage, share: float) -> Iterator[None]:
    """Balance and z losses are means over tokens: of a part of the batch, its share counts."""
    found = [(router, router.balance_weight, router.z_weight) for router in routers(stage)]
    for router, balance, z in found:
        router.balance_weight, router.z_weight = balance * share, z * share
    yield
    for router, balance, z in found:
        router.balance_weight, router.z_weight = balance, z


class RankPipeline(nn.Module):
    """This rank's stage of `model`, with the interface of `DevicePipeline`."""

    def __init__(self, model: Any, num_stages: int, chunks: int, schedule: str) -> None:
        super().__init__()
        config = ParallelConfig(pipeline=num_stages)
        sizes = resolve_sizes(config, runtime.launch().world)
        self.layout = Layout(enter(config, sizes, runtime.pick_device()), model.spec, 0, schedule)
        self.chunks, self.model = chunks, self.layout.model
        whole = model.state_dict()
        with torch.no_grad():
            for piece in self.layout.pieces(self.model.state_dict().items()):
                piece.rows.copy_(whole[piece.name])

    def forward(self, tokens_BT: Tensor) -> Tensor | None:
        """Logits without gradients, on the rank of the last stage; None on the others."""
        with torch.no_grad():
            return self.layout.forward(tokens_BT.to(self.layout.mesh.device))

    def train_batch(self, tokens_BT: Tensor, targets_BT: Tensor) -> float:
        """Every rank gives the whole batch; replicas of the pipeline take their rows of it."""
        rows, device = self.layout.rows(len(tokens_BT)), self.layout.mesh.device
        own = [part[rows].to(device).tensor_split(self.chunks) for part in (tokens_BT, targets_BT)]
        run = self.layout.forward_backward(_no_accumulation)
        loss, count = run(self.model, [Batch(*parts) for parts in zip(*own, strict=True)],
                          next_token_loss)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= count
        return loss

    def clip_gradients(self, max_norm: float) -> float:
        norm = self.layout.gradient_norm(self.model)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= min(1.0, max_norm / (norm + 1e-6))
        return norm

    def end_step(self, fraction: float = 0.0) -> None:
        begin_step(self.model, fraction)
        self.layout.end_step()

    named_parameters = DevicePipeline.named_parameters
    state_dict = DevicePipeline.state_dict
    load_state_dict = DevicePipeline.load_state_dict


def _no_accumulation(*_: Any) -> tuple[float, int]:
    raise AssertionError("a pipeline runs its own schedule")
