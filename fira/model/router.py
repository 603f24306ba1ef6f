"""The router: which experts a token goes to, with what weight, and the two losses that keep it fit.

Token-choice top-k (Shazeer et al. 2017). Logits, softmax and weights are fp32, also under autocast.

For k > 1 the chosen probabilities are renormalized, as in Qwen3-MoE with `norm_topk_prob=true`. For
k = 1 that would make every weight the constant 1 and leave the router without a gradient from the
language-model loss; so k = 1 keeps the raw probability (Switch, Fedus et al. 2021), which is
Qwen3-MoE with `norm_topk_prob=false`: an export of a k = 1 model must write that.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AddLoss(torch.autograd.Function):
    """Returns `x` unchanged and adds the scalar `loss` to whatever x is later differentiated for.

    The model keeps one output, so plain, compiled and pipelined models share one signature.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


class Router(nn.Module):
    """tokens_ND -> weights_NK (fp32), experts_NK.

    Balance loss, per layer: balance_weight * E * sum_e share_e * mean_probability_e (Switch, its
    equation 4). `share` is each expert's share of the routed rows of the whole previous optimizer
    step, so it is global over micro-batches and ranks (Qiu et al. 2025, 2501.11873), and the
    gradients of micro-batches simply average. z-loss: z_weight * mean(logsumexp(logits)^2) (Zoph
    et al. 2022).
    """

    load_share_E: Tensor
    load_count_E: Tensor
    entropy_sum: Tensor

    def __init__(self, d_model: int, num_experts: int, top_k: int, bias: bool,
                 balance_weight: float, z_weight: float) -> None:
        super().__init__()
        self.top_k = top_k
        self.balance_weight = balance_weight
        self.z_weight = z_weight
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))  # [E, D]
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None  # [E]
        self.register_buffer("load_share_E", torch.empty(num_experts))
        self.register_buffer("load_count_E", torch.empty(num_experts, dtype=torch.int64),
                             persistent=False)
        self.register_buffer("entropy_sum", torch.empty(()), persistent=False)

    def reset_buffers(self) -> None:
        """Even shares and empty counters; needed after construction on the meta device."""
        self.load_share_E.fill_(1 / len(self.load_share_E))
        self.clear_counts()

    def clear_counts(self) -> None:
        self.load_count_E.zero_()
        self.entropy_sum.zero_()

    @property
    def num_tokens(self) -> int:
        """Tokens counted since the counters were cleared."""
        return int(self.load_count_E.sum()) // self.top_k

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x_ND.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            logits_NE = F.linear(x_ND.float(), self.weight.float(), bias)
            probs_NE = logits_NE.softmax(dim=-1)
            weights_NK, experts_NK = probs_NE.topk(self.top_k, dim=-1)
            if self.top_k > 1:
                weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
            if self.training:
                logsumexp_N = logits_NE.logsumexp(dim=-1)
                weights_NK = AddLoss.apply(weights_NK, self._loss(probs_NE, logsumexp_N))
                self._count(logits_NE, probs_NE, logsumexp_N, experts_NK)
        return weights_NK, experts_NK

    def _loss(self, probs_NE: Tensor, logsumexp_N: Tensor) -> Tensor:
        E = len(self.load_share_E)
        balance = E * torch.dot(probs_NE.mean(dim=0), self.load_share_E)
        return self.balance_weight * balance + self.z_weight * logsumexp_N.square().mean()

    @torch.no_grad()
    def _count(self, logits_NE: Tensor, probs_NE: Tensor, logsumexp_N: Tensor,
               experts_NK: Tensor) -> None:
        """Routing health, counted in place so that the buffers stay the same tensors."""
        self.load_count_E += torch.bincount(experts_NK.flatten(), minlength=len(self.load_count_E))
        self.entropy_sum += logsumexp_N.sum() - torch.dot(probs_NE.flatten(), logits_NE.flatten())

    def entropy(self) -> float:
        """Mean entropy of the router's distribution since the last clearing, 0..1 of log E."""
        scale = self.num_tokens * math.log(len(self.load_count_E))
        return float(self.entropy_sum) / scale if scale else 0.0
