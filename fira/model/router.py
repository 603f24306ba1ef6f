"""The router: which experts a token is sent to, with what weights, and how their load stays even.

    probs_ne = softmax(router x_n)_e
    experts_n = the K largest of probs_n + selection_bias
    weights_nk = probs[n, experts_nk] / sum_k probs[n, experts_nk]

Token-choice top-k routing (Shazeer et al. 2017), always in fp32. For K = 1 the division would make
every weight the constant 1 and leave the router without a gradient from the language model's loss,
so K = 1 keeps the raw probability (Switch, Fedus et al. 2021), and so does every K without
`renormalize`. In Qwen3-MoE these are `norm_topk_prob` true and false.

METHODS keep the experts evenly loaded:

loss      a loss on the router's probabilities (Switch, Fedus et al. 2021), with the loads of the
          whole previous step (decision 0002), which makes it global over micro-batches and ranks
          (Qiu et al. 2025, 2501.11873)
bias      a bias per expert that only selects, moved by a fixed amount towards an even load, so that
          no balance gradient disturbs the language model (Wang et al. 2024, 2408.15664)
quantile  the same bias, set to the score quantile at which an expert gets its even share: one round
          of solving the balanced assignment problem, without a coefficient
handover  quantile for most of the run; over its last part the bias fades to exactly zero and the
          loss takes its place, so that the finished model needs no bias

A training step calls `set_progress` once, `set_loss_share` before each micro-batch, and `end_step`
after the optimizer; `health` reads the counters before `end_step` empties them.
"""
from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

import fira.model.fast as fast

ESTIMATE_TOKENS = 2048  # tokens per micro-batch for the bias estimate; more are slower, not better
# The last part of the run in which `handover` hands over. At its end the load's imbalance is 0.14
# where with 0.2 it is 0.48, at equal bits per byte (decision 0007).
HANDOVER = 0.4
RATE = 1e-3  # change of a bias per step, in probability (2408.15664); bf16 would lose it


class Method(NamedTuple):
    """What a router asks of the method that keeps its load even.

    loss_coefficients(load_share_E): what a method's loss multiplies each expert's mean probability
    with. estimate_bias(probs_NE, threshold_N, top_k): the selection bias by one micro-batch.
    update_bias(bias_LE, load_share_LE, mean_estimate_LE): the biases of all layers after a step; a
    method that has it has a selection bias. hands_over: the bias fades and the loss replaces it.
    """

    loss_coefficients: Callable[[Tensor], Tensor] | None = None
    estimate_bias: Callable[[Tensor, Tensor, int], Tensor] | None = None
    update_bias: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    hands_over: bool = False


def switch_coefficients(share_E: Tensor) -> Tensor:
    """The loss is E * sum_e share_e * mean probability_e, 1 when even (Switch, equation 4)."""
    return len(share_E) * share_E


def move_bias(bias_LE: Tensor, share_LE: Tensor) -> Tensor:
    """The biases after one step in which expert e of layer l had share_le of the rows."""
    moved_LE = bias_LE + RATE * torch.sign(share_LE.mean(dim=-1, keepdim=True) - share_LE)
    return moved_LE - moved_LE.mean(dim=-1, keepdim=True)


def even_bias(probs_NE: Tensor, threshold_N: Tensor, top_k: int) -> Tensor:
    """The bias that gives every expert N*K/E of these tokens if their thresholds stay.

    A token's threshold lies between its K-th and next biased score. An expert takes the tokens
    whose probability plus its bias exceeds their threshold, so minus its bias must be the
    (N - N*K/E)-th smallest of probability - threshold. Alternating between biases and thresholds
    descends on the dual of the balanced assignment problem.
    """
    N, E = probs_NE.shape
    margins_EN = (probs_NE - threshold_N.unsqueeze(1)).t().contiguous()
    rank = max(1, N - max(1, N * top_k // E))
    bias_E = -margins_EN.kthvalue(rank, dim=1).values
    return bias_E - bias_E.mean()


QUANTILE = Method(estimate_bias=even_bias,
                  update_bias=lambda bias_LE, share_LE, estimate_LE: estimate_LE)
METHODS = {
    "loss": Method(loss_coefficients=switch_coefficients),
    "bias": Method(update_bias=lambda bias_LE, share_LE, _: move_bias(bias_LE, share_LE)),
    "quantile": QUANTILE,
    "handover": QUANTILE._replace(loss_coefficients=switch_coefficients, hands_over=True),
    "none": Method(),
}


class AddLoss(torch.autograd.Function):
    """Return the weights unchanged and add `loss` to the training loss, times `share`.

    Backward passes the weights' gradient through and gives the loss the gradient `share`, whatever
    the training loss is multiplied with. The value of `share` in the first forward counts, so it is
    not a saved tensor, which activation checkpointing would compute again.
    """

    @staticmethod
    def forward(ctx: Any, weights_NK: Tensor, loss: Tensor, share: Tensor) -> Tensor:
        ctx.share = share.clone()
        return weights_NK.view_as(weights_NK)

    @staticmethod
    def backward(ctx: Any, grad_NK: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_NK, ctx.share, None


class Router(nn.Module):
    """x_ND -> weights_NK (fp32), experts_NK.

    In training its own losses join the graph: the balance method's, and the z-loss z_weight *
    mean(logsumexp(logits)^2) (Zoph et al. 2022). Buffers, set between steps:

    load_share_E      each expert's share of the rows of the whole previous step; saved
    selection_bias_E  added to the probabilities to choose experts, not to weigh them; saved
    loss_share        weight of the router's own losses in the coming micro-batch
    bias_scale        the fraction of the selection bias that is left, for methods that hand over

    Counted since the last step: load_count_E (rows of each expert), entropy_sum (of the tokens'
    probabilities), bias_sum_E and num_estimates (of the micro-batches' bias estimates).
    """

    z_weight = 0.001  # of the router z-loss, as in ST-MoE (Zoph et al. 2022)

    load_share_E: Tensor
    selection_bias_E: Tensor | None
    loss_share: Tensor
    bias_scale: Tensor
    load_count_E: Tensor
    entropy_sum: Tensor
    bias_sum_E: Tensor
    num_estimates: Tensor

    def __init__(self, d_model: int, num_experts: int, top_k: int, bias: bool,
                 method: Method = METHODS["none"], balance_weight: float = 0.0,
                 renormalize: bool = True) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.renormalize = renormalize and top_k > 1
        self.method, self.balance_weight = method, balance_weight
        self.replay_NK: Tensor | None = None
        self.counted = True
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))  # [E, D]
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None  # [E]
        self.register_buffer("load_share_E", torch.empty(num_experts))
        self.register_buffer("selection_bias_E",
                             torch.empty(num_experts) if method.update_bias else None)
        for name in ("loss_share", "bias_scale", "entropy_sum", "num_estimates"):
            self.register_buffer(name, torch.empty(()), persistent=False)
        self.register_buffer("bias_sum_E", torch.empty(num_experts), persistent=False)
        self.register_buffer("load_count_E", torch.empty(num_experts, dtype=torch.int64),
                             persistent=False)

    def reset_buffers(self) -> None:
        """Even shares, no bias, empty counters; needed after construction on the meta device."""
        self.load_share_E.fill_(1 / self.num_experts)
        if self.selection_bias_E is not None:
            self.selection_bias_E.zero_()
        self.loss_share.fill_(1)
        self.bias_scale.fill_(1)
        torch._foreach_zero_(self.counters)

    @property
    def counters(self) -> tuple[Tensor, ...]:
        """What is counted during a step; many ranks sum it before the step ends."""
        return self.load_count_E, self.entropy_sum, self.bias_sum_E, self.num_estimates

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        logits_NE = fast.linear_fp32(x_ND, self.weight, self.bias)
        probs_NE = logits_NE.softmax(dim=-1)
        experts_NK, threshold_N = self._choose(probs_NE.detach())
        if (given_NK := self.replay_NK) is not None:
            experts_NK, threshold_N = torch.where(given_NK < 0, experts_NK, given_NK), None
        weights_NK = probs_NE.gather(1, experts_NK)
        if self.renormalize:
            weights_NK = weights_NK / weights_NK.sum(dim=1, keepdim=True)
        if self.training:
            logsumexp_N = logits_NE.logsumexp(dim=1)
            loss = self._own_losses(probs_NE, logsumexp_N)
            weights_NK = AddLoss.apply(weights_NK, loss, self.loss_share)
            if self.counted:
                self._count(logits_NE, probs_NE, logsumexp_N, experts_NK)
                self._estimate_bias(probs_NE, threshold_N)
        return weights_NK, experts_NK

    def _choose(self, probs_NE: Tensor) -> tuple[Tensor, Tensor | None]:
        """Experts by probability plus bias, and each token's threshold between chosen and others,
        halfway between the K-th and the next score; there is none for K = E."""
        if self.selection_bias_E is not None:
            probs_NE = probs_NE + self.selection_bias_E.float()
        if self.top_k == self.num_experts:
            experts_E = torch.arange(self.num_experts, device=probs_NE.device)
            return experts_E.expand_as(probs_NE), None
        scores_NK1, experts_NK1 = probs_NE.topk(self.top_k + 1, dim=1)
        return experts_NK1[:, :-1], scores_NK1[:, -2:].mean(dim=1)

    def _own_losses(self, probs_NE: Tensor, logsumexp_N: Tensor) -> Tensor:
        loss = self.z_weight * logsumexp_N.square().mean()
        if self.method.loss_coefficients is None:
            return loss
        weight = self.balance_weight * (1 - self.bias_scale if self.method.hands_over else 1)
        coefficients_E = weight * self.method.loss_coefficients(self.load_share_E)
        return loss + (probs_NE.mean(dim=0) * coefficients_E).sum()

    @torch.no_grad()
    def _count(self, logits_NE: Tensor, probs_NE: Tensor, logsumexp_N: Tensor,
               experts_NK: Tensor) -> None:
        """Count load and entropy in place; the entropy of a token is logsumexp - probs . logits."""
        self.load_count_E += fast.count_rows(experts_NK.flatten(), self.num_experts)
        self.entropy_sum += logsumexp_N.sum() - torch.dot(probs_NE.flatten(), logits_NE.flatten())

    @torch.no_grad()
    def _estimate_bias(self, probs_NE: Tensor, threshold_N: Tensor | None) -> None:
        if self.method.estimate_bias is not None and threshold_N is not None:
            every = max(1, len(threshold_N) // ESTIMATE_TOKENS)
            self.bias_sum_E += self.method.estimate_bias(probs_NE[::every], threshold_N[::every],
                                                         self.top_k)
            self.num_estimates += 1


def routers(module: nn.Module) -> list[Router]:
    """The routers of a model or of a part of it, in layer order; none for a dense one."""
    return [part for part in module.modules() if isinstance(part, Router)]


def set_progress(model: nn.Module, fraction: float) -> None:
    """Before a step: `fraction` (0..1) of the run is done, which decides how far a bias fades."""
    scale = min(1.0, max(0.0, (1 - fraction) / HANDOVER))
    _fill([router.bias_scale for router in routers(model)], scale)


def set_loss_share(model: nn.Module, share: float) -> None:
    """Before a micro-batch: `share` (0..1) of the global batch's tokens are in it.

    The routers' own losses are means over the micro-batch's tokens, so they enter the gradient with
    this weight. It is 1 until set. Filled in place, so that compiled graphs stay the same.
    """
    _fill([router.loss_share for router in routers(model)], share)


def _fill(buffers: list[Tensor], value: float) -> None:
    """Fill all buffers with few launches on a GPU."""
    if buffers:
        torch._foreach_zero_(buffers)
        torch._foreach_add_(buffers, value)


@torch.no_grad()
def end_step(model: nn.Module) -> None:
    """After the optimizer's step: the step's loads decide what balances the next one.

    All layers, which are on one device, at once: few launches. One that counted nothing stays.
    """
    if not (layers := routers(model)):
        return
    counts_LE, shares_LE, bias_sums_LE, estimates_L = (
        torch.stack([router.get_buffer(name) for router in layers])
        for name in ("load_count_E", "load_share_E", "bias_sum_E", "num_estimates"))
    total_L1 = counts_LE.sum(dim=1, keepdim=True)
    share_LE = torch.where(total_L1 > 0, counts_LE / total_L1.clamp(min=1), shares_LE)
    torch._foreach_copy_([router.load_share_E for router in layers], list(share_LE.unbind()))
    method = layers[0].method
    if method.update_bias is not None:
        biases = [router.get_buffer("selection_bias_E") for router in layers]
        old_LE = torch.stack(biases)
        estimate_LE = bias_sums_LE / estimates_L.clamp(min=1).unsqueeze(1)
        new_LE = method.update_bias(old_LE, share_LE, estimate_LE)
        if method.hands_over:
            new_LE = new_LE * torch.stack([router.bias_scale for router in layers]).unsqueeze(1)
        torch._foreach_copy_(biases, list(torch.where(total_L1 > 0, new_LE, old_LE).unbind()))
    for counters in zip(*(router.counters for router in layers), strict=True):
        torch._foreach_zero_(counters)


def health(layers: Sequence[Router]) -> dict[str, Any] | None:
    """Load per expert and what it implies, per layer, counted since the last `end_step`.

    load: share of routed rows per expert; cv: standard deviation over mean of the load; max_mean:
    largest load over the mean; entropy: of the router, 0..1 of log E; dead: experts without a row.
    None for a dense model or before anything was counted.
    """
    if not layers:
        return None
    home = layers[0].load_count_E.device  # gathered there first: each copy to the CPU is a wait
    counts_LE = torch.stack([router.load_count_E.to(home) for router in layers]).cpu()
    entropy_L = torch.stack([router.entropy_sum.to(home) for router in layers]).cpu()
    used_L = counts_LE.any(dim=1)
    if not used_L.any():
        return None
    counts, entropies = counts_LE[used_L].double(), entropy_L[used_L].double()
    relative = counts / counts.mean(dim=1, keepdim=True)
    tokens = counts.sum(dim=1) / layers[0].top_k
    return {
        "load": (counts / counts.sum(dim=1, keepdim=True)).tolist(),
        "cv": relative.std(dim=1, correction=0).tolist(),
        "max_mean": relative.max(dim=1).values.tolist(),
        "entropy": (entropies / (tokens * math.log(counts.shape[1]))).tolist(),
        "dead": (counts == 0).sum(dim=1).tolist(),
    }


class Watch(contextlib.AbstractContextManager["Watch"]):
    """What the routers of `module` chose: `experts[l]` is experts_NK and `gates[l]` weights_NK of
    layer l's latest forward, None before the first. Open from construction to `close` or the end of
    `with`. Eager mode only.
    """

    def __init__(self, module: nn.Module) -> None:
        found = routers(module)
        self.experts, self.gates = ([cast("Tensor | None", None)] * len(found) for _ in range(2))
        self._hooks = [router.register_forward_hook(functools.partial(self._note, layer))
                       for layer, router in enumerate(found)]

    def _note(self, layer: int, router: Router, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self.gates[layer], self.experts[layer] = output

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def __exit__(self, *_: Any) -> None:
        self.close()


@contextlib.contextmanager
def replay(module: nn.Module, experts_per_layer: Sequence[Tensor | None],
           counted: bool = False) -> Iterator[None]:
    """Let the routers of `module` take these choices, or their own where one is negative; nothing
    is counted meanwhile, unless asked. The weights are those of the given experts, with their
    gradients. The sequence is read when the block is entered: it may be that of a new `Watch`.
    """
    found = routers(module)
    before = [(router.replay_NK, router.counted) for router in found]
    for router, experts_NK in zip(found, experts_per_layer, strict=True):
        router.replay_NK, router.counted = experts_NK, counted
    try:
        yield
    finally:
        for router, state in zip(found, before, strict=True):
            router.replay_NK, router.counted = state
