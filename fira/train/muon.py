"""Muon: momentum whose matrices are replaced by their nearest orthogonal ones (Jordan et al. 2024).

One optimizer holds both rules: groups with rule "muon" are orthogonalized, the others get AdamW.
A stack of expert weights [E, out, in] is E matrices, orthogonalized in one batched product. Of
sharded weights the local rows are updated; a matrix is gathered whole to be orthogonalized.

Orthogonalizing costs the same however few tokens an expert saw. So a group may update each expert
of a stack only every `interval`-th step, with `interval` times the learning rate: momentum hardly
changes in between, and `small` learns the same from a quarter of the work.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fira.parallel.layout import first_row, local, whole_matrices
from fira.runtime import product_dtype

# Odd polynomials a x + b x^3 + c x^5 whose composition takes singular values in 0.005..1 to
# 0.5..1.5: each is the minimax quintic for the range the one before it leaves (Polar Express,
# Amsel et al. 2025, 2505.16932). Three of them do what five of the original post's do.
QUINTICS = ((8.2987, -24.4305, 18.0903), (3.9152, -2.9211, 0.5592), (3.1746, -2.3804, 0.4978))
RMS = 0.2  # of an update's entries, as AdamW's typical one (Liu et al. 2025, 2502.16982)


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
