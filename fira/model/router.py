"""The router: which experts a token goes to, with what weight, and what keeps it fit.

Token-choice top-k (Shazeer et al. 2017). Logits, softmax and weights are fp32, also under autocast.

For k > 1 the chosen probabilities are renormalized, as in Qwen3-MoE with `norm_topk_prob=true`. For
k = 1 that would make every weight the constant 1 and leave the router without a gradient from the
language-model loss; so k = 1 keeps the raw probability (Switch, Fedus et al. 2021), which is
Qwen3-MoE with `norm_topk_prob=false`: an export of a k = 1 model must write that.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fira.model.balance import METHODS
from fira.model.choose import choose
from fira.model.rows import count_each

VOTERS = 2048  # tokens of a micro-batch that vote on the bias; more cost time and even no better


class Weigh(torch.autograd.Function):
    """Weights of the chosen experts, from their logits; in backward the router's own losses join.

    The losses are dot(mean of probs_NE, price_E) and z_weight * mean(logsumexp_N^2). Joined here,
    they leave plain, compiled and pipelined models one signature.
    """

    @staticmethod
    def forward(ctx: Any, logits_NE: Tensor, probs_NE: Tensor, experts_NK: Tensor,
                price_E: Tensor | None, logsumexp_N: Tensor, z_weight: float) -> Tensor:
        weights_NK = probs_NE.gather(1, experts_NK)
        if weights_NK.shape[1] > 1:
            weights_NK = weights_NK / weights_NK.sum(dim=1, keepdim=True)
        ctx.z_weight = z_weight
        ctx.save_for_backward(probs_NE, experts_NK, weights_NK, price_E, logsumexp_N)
        return weights_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: Tensor) -> tuple[Tensor | None, ...]:
        probs_NE, experts_NK, weights_NK, price_E, logsumexp_N = ctx.saved_tensors
        pulls_NK = grad_NK * weights_NK
        total_N1 = pulls_NK.sum(dim=1, keepdim=True)
        shared_N1 = (2 * ctx.z_weight / len(probs_NE)) * logsumexp_N.unsqueeze(1)
        if weights_NK.shape[1] > 1:  # the weights are a softmax of the chosen logits alone
            pulls_NK = pulls_NK - weights_NK * total_N1
        else:
            shared_N1 = shared_N1 - total_N1
        if price_E is not None:
            price_E = price_E / len(probs_NE)
            shared_N1 = price_E + (shared_N1 - torch.mv(probs_NE, price_E).unsqueeze(1))
        return (probs_NE * shared_N1).scatter_add_(1, experts_NK, pulls_NK), *[None] * 5


class Router(nn.Module):
    """tokens_ND -> weights_NK (fp32), experts_NK.

    `balance` names a row of balance.METHODS. Its loss, weighed by balance_weight, sees each
    expert's share of the routed rows of the whole previous optimizer step, so it is global over
    micro-batches and ranks (Qiu et al. 2025, 2501.11873), and the gradients of micro-batches simply
    average. Its bias, where it has one, is added to the probabilities to select experts and not to
    weigh them; it is saved with the weights. z-loss: z_weight * mean(logsumexp(logits)^2) (Zoph et
    al. 2022).

    `record` is shown the experts of every pass; `replay_NK`, when set, are the experts of a pass
    that is being run again to recompute activations, and nothing is counted. `strength` (0..1) is
    what is left of a bias that fades; a tensor, so that compiled code need not know it.
    """

    strength: Tensor
    load_share_E: Tensor
    selection_bias_E: Tensor | None
    vote_sum_E: Tensor
    votes: Tensor
    load_count_E: Tensor
    entropy_sum: Tensor

    def __init__(self, d_model: int, num_experts: int, top_k: int, bias: bool,
                 balance_weight: float, z_weight: float, balance: str = "loss") -> None:
        super().__init__()
        self.method = METHODS[balance]
        self.record: Callable[[Tensor], None] | None = None
        self.replay_NK: Tensor | None = None
        self.loss_share = 1.0
        self.top_k = top_k
        self.balance_weight = balance_weight
        self.z_weight = z_weight
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))  # [E, D]
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None  # [E]
        self.register_buffer("strength", torch.empty(()), persistent=False)
        self.register_buffer("load_share_E", torch.empty(num_experts))
        biased = self.method.update is not None
        self.register_buffer("selection_bias_E", torch.empty(num_experts) if biased else None)
        self.register_buffer("vote_sum_E", torch.empty(num_experts), persistent=False)
        self.register_buffer("votes", torch.empty(()), persistent=False)
        self.register_buffer("load_count_E", torch.empty(num_experts, dtype=torch.int64),
                             persistent=False)
        self.register_buffer("entropy_sum", torch.empty(()), persistent=False)

    def reset_buffers(self) -> None:
        """Even shares, no bias, empty counters; needed after construction on the meta device."""
        self.strength.fill_(1)
        self.load_share_E.fill_(1 / len(self.load_share_E))
        if self.selection_bias_E is not None:
            self.selection_bias_E.zero_()
        for counter in self.counters:
            counter.zero_()

    @property
    def counters(self) -> tuple[Tensor, ...]:
        """What is counted during a step; many ranks sum it before the step ends."""
        return self.load_count_E, self.entropy_sum, self.vote_sum_E, self.votes

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x_ND.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            logits_NE = F.linear(x_ND.float(), self.weight.float(), bias)
            with torch.no_grad():
                probs_NE = logits_NE.softmax(dim=-1)
                logsumexp_N = logits_NE.amax(dim=1) - probs_NE.amax(dim=1).log()
                experts_NK, threshold_N = self._choose(probs_NE)
            weights_NK = Weigh.apply(logits_NE, probs_NE, experts_NK, self._price(), logsumexp_N,
                                     self.loss_share * self.z_weight if self.training else 0.0)
            if self.training and self.replay_NK is None:
                self._count(logits_NE, probs_NE, logsumexp_N, experts_NK)
                self._vote(probs_NE, threshold_N)
        return weights_NK, experts_NK

    def _choose(self, probs_NE: Tensor) -> tuple[Tensor, Tensor | None]:
        """Experts by probability plus bias, and each token's threshold to the others."""
        if self.replay_NK is not None:
            return self.replay_NK, None
        if self.selection_bias_E is not None:
            probs_NE = probs_NE + self.selection_bias_E.float()
        experts_NK, threshold_N = choose(probs_NE, self.top_k)
        if self.record is not None:
            self.record(experts_NK)
        return experts_NK, threshold_N

    def _price(self) -> Tensor | None:
        if not self.training or self.method.price is None:
            return None
        weight = self.balance_weight * (1 - self.strength if self.method.fades else 1)
        return self.loss_share * weight * self.method.price(self.load_share_E)

    @torch.no_grad()
    def _count(self, logits_NE: Tensor, probs_NE: Tensor, logsumexp_N: Tensor,
               experts_NK: Tensor) -> None:
        """Routing health, counted in place so that the buffers stay the same tensors."""
        experts_R = experts_NK.flatten()
        if experts_R.is_cuda:
            self.load_count_E += count_each(experts_R, len(self.load_count_E))
        else:
            self.load_count_E.index_add_(0, experts_R, torch.ones_like(experts_R))
        self.entropy_sum += logsumexp_N.sum() - torch.dot(probs_NE.flatten(), logits_NE.flatten())

    @torch.no_grad()
    def _vote(self, probs_NE: Tensor, threshold_N: Tensor | None) -> None:
        if self.method.vote is not None and threshold_N is not None:
            every = max(1, len(threshold_N) // VOTERS)
            self.vote_sum_E += self.method.vote(probs_NE[::every], threshold_N[::every], self.top_k)
            self.votes += 1


@torch.no_grad()
def end_steps(layers: list[Router]) -> None:
    """Shares and biases of the next step from the counts of this one, in place.

    Of all layers of a device at once: a GPU waits for few launches, not for some of each layer.
    """
    counts_LE, shares_LE, votes_LE, votes_L = (
        torch.stack([getattr(router, name) for router in layers])
        for name in ("load_count_E", "load_share_E", "vote_sum_E", "votes"))
    total_L1 = counts_LE.sum(dim=1, keepdim=True)
    share_LE = torch.where(total_L1 > 0, counts_LE / total_L1.clamp(min=1), shares_LE)
    torch._foreach_copy_([router.load_share_E for router in layers], list(share_LE.unbind()))
    method = layers[0].method
    if method.update is not None:
        biases = [router.get_buffer("selection_bias_E") for router in layers]
        old_LE = torch.stack(biases)
        new_LE = method.update(old_LE, share_LE, votes_LE / votes_L.clamp(min=1).unsqueeze(1))
        if method.fades:
            new_LE = new_LE * torch.stack([router.strength for router in layers]).unsqueeze(1)
        torch._foreach_copy_(biases, list(torch.where(total_L1 > 0, new_LE, old_LE).unbind()))
    for counters in zip(*(router.counters for router in layers), strict=True):
        torch._foreach_zero_(counters)
