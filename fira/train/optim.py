"""The optimizer: which parameter gets which rule and learning rate, and when a step is skipped.

AdamW, or Muon for matrices: momentum whose matrices are replaced by their nearest orthogonal ones
(Jordan et al. 2024). A stack of expert weights [E, out, in] is E matrices, orthogonalized in one
batched product. Of sharded weights the local rows are updated; a matrix is gathered whole to be
orthogonalized. Orthogonalizing costs the same however few tokens an expert saw, so a group may
update each expert of a stack only every `interval`-th step, with `interval` times the learning
rate: momentum hardly changes in between, and `small` learns the same from a quarter of the work.

Time is the fraction of the run that is done, 0 to 1, so that one schedule serves a run whose length
is given in steps and one whose length is given in minutes.
"""
from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fira.config import Config
from fira.model.router import routers
from fira.parallel.layout import first_row, local, whole_matrices

BETAS = 0.9, 0.95  # decay of the averages of gradients and of their squares, as in GPT-3
WEIGHT_DECAY = 0.1  # decoupled, of matrices only; GPT-3's, and the same in every preset
MAX_NORM = 1.0  # gradients of a larger global norm are scaled down to it; GPT-3's
# Odd polynomials a x + b x^3 + c x^5 whose composition takes singular values in 0.005..1 to
# 0.5..1.5: each is the minimax quintic for the range the one before it leaves (Polar Express,
# Amsel et al. 2025, 2505.16932). Three of them do what five of the original post's do.
QUINTICS = ((8.2987, -24.4305, 18.0903), (3.9152, -2.9211, 0.5592), (3.1746, -2.3804, 0.4978))
RMS = 0.2  # of an update's entries, as AdamW's typical one (Liu et al. 2025, 2502.16982)


class OptimConfig(Config):
    rule: Literal["adamw", "muon"] = Field(
        "adamw", description="optimizer of matrices; all other parameters use AdamW")
    lr: float = Field(6e-4, gt=0, description="peak learning rate")
    router_lr: float | None = Field(
        None, gt=0, description="peak learning rate of routers; null takes lr")
    embedding_lr: float | None = Field(
        None, gt=0, description="peak learning rate of embeddings; null takes lr")
    head_follows: float = Field(
        0.0, ge=0, description="an untied head also moves by this factor times the embedding's "
        "update, rotated by a quarter turn; copying is then learned early (docs/decisions/0009)")
    average: float | None = Field(
        None, gt=0, lt=1, description="also keep an exponential average of the weights with this "
        "decay per step, over about 1/(1 - decay) steps; evaluated and written at the end")
    expert_interval: int = Field(
        1, ge=1, description="Muon updates each expert only every N-th step, with N times the "
        "learning rate: the same progress for an N-th of the optimizer's time")


class ScheduleConfig(Config):
    """The learning rate as a factor of its peak."""

    kind: Literal["cosine", "constant"] = Field(
        "cosine", description="cosine: annealed all the way; constant: held, then decayed linearly")
    warmup: float = Field(0.02, ge=0, lt=1, description="fraction of the run that warms up")
    decay: float = Field(0.3, gt=0, le=1, description="constant: fraction of the run that decays")
    floor: float = Field(0.1, ge=0, le=1, description="final factor of the peak")


def parameter_groups(model: nn.Module, config: OptimConfig,
                     weight_decay: float = WEIGHT_DECAY) -> list[dict[str, Any]]:
    """The trainable parameters by rule. Matrices decay, embeddings and head too; norms, biases and
    routers do not."""
    interval = config.expert_interval if routers(model) else 1  # a dense model has one expert
    rules: dict[str, dict[str, Any]] = {
        "matrix": {"rule": config.rule, "lr": config.lr, "weight_decay": weight_decay,
                   "interval": interval},
        "embedding": {"rule": "adamw", "lr": config.embedding_lr or config.lr,
                      "weight_decay": weight_decay},
        "head": {"rule": "adamw", "lr": config.lr, "weight_decay": weight_decay},
        "vector": {"rule": "adamw", "lr": config.lr, "weight_decay": 0.0},
        "router": {"rule": "adamw", "lr": config.router_lr or config.lr, "weight_decay": 0.0},
    }
    members: dict[str, list[nn.Parameter]] = {kind: [] for kind in rules}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_kind(name, parameter)].append(parameter)
    return [{"params": members[kind], "kind": kind, "peak_lr": rule["lr"], **rule}
            for kind, rule in rules.items() if members[kind]]


def _kind(name: str, parameter: nn.Parameter) -> str:
    if ".router." in name:
        return "router"
    if parameter.dim() < (3 if ".experts." in name else 2):  # expert biases are [E, out]
        return "vector"
    if name.startswith("head"):
        return "head"
    return "embedding" if "embedding" in name else "matrix"


def make_optimizer(model: nn.Module, config: OptimConfig,
                   weight_decay: float = WEIGHT_DECAY) -> torch.optim.Optimizer:
    """AdamW, fused where such a kernel exists (on a CPU 3 to 8 times as fast as the foreach form),
    or Muon. Raises ValueError if the model has no trainable parameter."""
    groups = parameter_groups(model, config, weight_decay)
    if not groups:
        raise ValueError("no parameter of the model is trainable; unfreeze some")
    sharded = any(local(p) is not p for p in model.parameters())
    optimizer: torch.optim.Optimizer
    if config.rule == "muon" or sharded:
        optimizer = MuonAdamW(groups, BETAS)
    else:
        fused = next(model.parameters()).device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, fused=fused)
    if config.head_follows:
        weights = dict(model.named_parameters())
        follow_embedding(optimizer, weights["token_embedding.weight"], weights["head.weight"],
                         config.head_follows)
    if config.average:
        keep_average(optimizer, config.average)
    return optimizer


def rate_factor(config: ScheduleConfig, fraction: float) -> float:
    """Learning rate over its peak after `fraction` (0..1) of the run."""
    fraction = min(max(fraction, 0.0), 1.0)
    if fraction < config.warmup:
        # The first step's fraction is 0: with a hundredth of the peak it learns a little.
        return max(fraction / config.warmup, 0.01)
    if config.kind == "cosine":
        angle = math.pi * (fraction - config.warmup) / (1 - config.warmup)
        return config.floor + (1 - config.floor) * (1 + math.cos(angle)) / 2
    left = min((1 - fraction) / config.decay, 1.0)
    return config.floor + (1 - config.floor) * left


def set_rates(optimizer: torch.optim.Optimizer, step: int, factor: float) -> None:
    """Give every group `factor` of its peak learning rate, for step number `step`."""
    for group in optimizer.param_groups:
        group["step"] = step
        group["lr"] = group["peak_lr"] * factor


def update(optimizer: torch.optim.Optimizer, loss: float, norm: float,
           max_norm: float = MAX_NORM) -> bool:
    """Clip the gradients, whose global norm is `norm`, and take one step; says whether it did.

    A loss or norm that is not finite skips the step: weights and optimizer state stay as they were.
    Both are global, so that all ranks skip together. The gradients are gone afterwards.
    """
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        scale = min(1.0, max_norm / (norm + 1e-6))
        if scale != 1.0:
            torch._foreach_mul_([local(p.grad) for group in optimizer.param_groups
                                 for p in group["params"] if p.grad is not None], scale)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return finite


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where this device multiplies it faster than float32, else float32."""
    native = (device.type == "cuda"
              or device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if native else torch.float32


def orthogonalize(matrices: Tensor) -> Tensor:
    """Singular values of each matrix [..., rows, columns] moved near 1, by Newton-Schulz.

    Products are bfloat16 where the device has them: where near 1 a value lands matters little.
    """
    stack = matrices.reshape(math.prod(matrices.shape[:-2]), *matrices.shape[-2:])
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    x = x.to(product_dtype(x.device))
    for a, b, c in QUINTICS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape).to(matrices.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Groups carry `rule`, `lr`, `weight_decay` and `betas`; Muon's momentum is the first beta.

    Groups of Muon also carry `interval` and `step`, the number of the current step.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"betas": betas, "interval": 1, "step": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters and group["rule"] == "muon":
                self._muon(parameters, group)
            elif parameters:
                self._adamw(parameters, group)

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            rows = _due(parameter, group["step"], group["interval"])
            ahead = self._ahead(parameter, rows, group["betas"][0])
            matrices, own = whole_matrices(ahead, parameter)
            scale = RMS * max(parameter.shape[-2:]) ** 0.5
            rate = group["lr"] * (rows.step or 1)
            weights = local(parameter)[rows]
            weights.mul_(1 - rate * group["weight_decay"])
            weights.add_(orthogonalize(matrices)[own], alpha=-rate * scale)

    def _ahead(self, parameter: Tensor, rows: slice, momentum: float) -> Tensor:
        """Nesterov's look ahead of the momentum, which takes the gradient up; of `rows` only."""
        assert parameter.grad is not None
        state, gradient = self.state[parameter], local(parameter.grad)
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient[rows].lerp(state["momentum"][rows], momentum)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(local(parameter)),
                    "exp_avg_sq": torch.zeros_like(local(parameter))}
        columns = {key: [self.state[p][key] for p in parameters]
                   for key in ("exp_avg", "exp_avg_sq", "step")}
        beta1, beta2 = group["betas"]
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        adamw([local(p) for p in parameters], gradients, columns["exp_avg"], columns["exp_avg_sq"],
              [], columns["step"], fused=parameters[0].device.type in ("cpu", "cuda"),
              amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
              weight_decay=group["weight_decay"], eps=1e-8, maximize=False)


def _due(parameter: Tensor, step: int, interval: int) -> slice:
    """The local experts of a stack that `step` updates; all rows of a single matrix."""
    if parameter.dim() == 2:
        return slice(None)
    return slice((step - first_row(parameter)) % interval, None, interval)


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Keep an exponential average of the weights as their optimizer state "average", which is
    divided, saved and restored as other state. The first steps decay faster."""
    @torch.no_grad()
    def update_average(*_: Any) -> None:
        for group in optimizer.param_groups:
            rate = 1 - min(decay, (1 + group["step"]) / (10 + group["step"]))
            for parameter in group["params"]:
                if state := optimizer.state.get(parameter):  # none: it never had a gradient
                    weights = local(parameter)
                    state.setdefault("average", weights.clone()).lerp_(weights, rate)

    optimizer.register_step_post_hook(update_average)


@torch.no_grad()
def swap_average(optimizer: torch.optim.Optimizer) -> bool:
    """Exchange the weights and their averages in place; says whether there are averages."""
    kept = [(local(parameter), state["average"]) for parameter, state in optimizer.state.items()
            if "average" in state]
    for weights, average in kept:
        before = weights.clone()
        weights.copy_(average)
        average.copy_(before)
    return bool(kept)


def follow_embedding(optimizer: torch.optim.Optimizer, embedding: nn.Parameter,
                     head: nn.Parameter, strength: float) -> None:
    """Train head = strength * rotated(embedding) + rest, where only the sum is stored.

    To copy an earlier token, attention must carry its embedding to its row of the head. A tied head
    makes that easy, but then every token also predicts itself; with a head of its own, embedding
    and head have nothing in common, and copying (by the induction heads of Olsson et al. 2022) is
    learned very late. Rotated by a quarter turn, the part that follows is orthogonal to the token's
    own embedding. By the chain rule the embedding [V, D] receives strength * rotated^-1(dL/dhead)
    in addition to its own gradient, and each of its updates moves the head [V, D] by strength *
    rotated(update). Nothing is kept between steps; sharded weights hold the same rows of both.
    """
    before: list[Tensor] = []

    def add_gradient(*_: Any) -> None:
        assert embedding.grad is not None and head.grad is not None
        followed = rotated_back(local(head.grad)).to(embedding.device)
        local(embedding.grad).add_(followed, alpha=strength)
        before.append(local(embedding).detach().clone())

    @torch.no_grad()
    def move_head(*_: Any) -> None:
        moved = local(embedding) - before.pop()
        local(head).add_(rotated(moved).to(head.device), alpha=strength)

    optimizer.register_step_pre_hook(add_gradient)
    optimizer.register_step_post_hook(move_head)


def rotated(rows: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for the halves of every row."""
    half = rows.shape[-1] // 2
    return torch.cat([-rows[..., half:], rows[..., :half]], dim=-1)


def rotated_back(rows: Tensor) -> Tensor:
    """The inverse of `rotated`, which is also its transpose."""
    half = rows.shape[-1] - rows.shape[-1] // 2
    return torch.cat([rows[..., half:], -rows[..., :half]], dim=-1)
