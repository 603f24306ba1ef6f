"""Costs of the output head, a block of rows at a time, so that the whole logits never exist.

At 50,304 tokens the logits, their log-softmax and its gradient are the largest tensors of a
training step. Here one loop over blocks of rows makes a block's logits, what they cost, and the
gradient of that cost, and keeps only the gradients of the features and of the head (as Liger's and
Apple's fused losses do). What a row costs is a function given to the loop:

    cost(logs_RV, *inputs) -> (cost_R, gradient_RV)

It gets the fp32 log-probabilities of R rows and the rows' own inputs (targets, say), and returns
each row's cost and the derivative of that cost with respect to the row's logits. `next_token` is
the cost of language modelling; fira/loss/distill.py holds the divergence from a teacher. A cost may
have columns, [R, C]: the derivative is that of the first, and the others are only reported.

Two functions use the loop. `mean_cost` knows the weight of every row in advance, so its forward
pass leaves the gradients ready. `row_costs` returns the cost of every row to a caller that will
weigh them as it likes; its backward pass makes each block's logits again.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED = -100  # a target that is not scored, as in torch's cross_entropy
# Logits held at a time: 128 MiB in fp32 on a CPU (half as many make a step of fira-334m 8% slower);
# a GPU needs larger products to be busy.
BLOCK = {"cpu": 1 << 25}
BLOCK_ELSEWHERE = 1 << 28

Cost = Callable[..., "tuple[Tensor, Tensor]"]


def next_token_loss(model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of pre-training: mean cross-entropy, in nats, over the scored targets_BT."""
    x_BTD = model.features(batch.tokens_BT)
    weight_VD, bias_V = model.head_weights()
    return head_loss(x_BTD, weight_VD, bias_V, batch.targets_BT), {}


def next_token_loss_plain(model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from whole logits: the definition."""
    logits_BTV = model(batch.tokens_BT)
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), batch.targets_BT.flatten()), {}


def next_token(logs_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each target in nats; d/dlogits = softmax - one-hot. Overwrites `logs_RV`.

    A row whose target is IGNORED costs 0; callers give it no weight.
    """
    places_R1 = targets_R.clamp(min=0).unsqueeze(1)
    cost_R = -logs_RV.gather(1, places_R1).squeeze(1).masked_fill(targets_R == IGNORED, 0.0)
    if torch.compiler.is_compiling():  # a comparison fuses with the rest; a scatter would not
        hits_RV = torch.arange(logs_RV.shape[1], device=logs_RV.device) == places_R1
        return cost_R, logs_RV.exp() - hits_RV.to(logs_RV.dtype)
    return cost_R, logs_RV.exp_().scatter_add_(1, places_R1, torch.full_like(
        places_R1, -1.0, dtype=logs_RV.dtype))


def head_loss(x_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_BT: Tensor,
              weights_BT: Tensor | None = None) -> Tensor:
    """Mean cross-entropy, in nats, of logits x @ weight.T + bias over the scored targets.

    Targets that are IGNORED are not scored. `weights_BT` weighs the others (1 each if None). A
    batch in which nothing is scored costs 0 and has no gradient.
    """
    scored_N = (targets_BT != IGNORED).flatten()
    weights_N = scored_N.float() if weights_BT is None else scored_N * weights_BT.flatten().float()
    return mean_cost(next_token, x_BTD, weight_VD, bias_V, weights_N, targets_BT.flatten())


def token_losses(x_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None,
                 targets_BT: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, fp32 [B, T], 0 where IGNORED.

    It has a gradient: minus it is the log-probability of each token that a policy needs.
    """
    losses_N = row_costs(next_token, x_BTD, weight_VD, bias_V, targets_BT.flatten())
    return losses_N.view_as(targets_BT).masked_fill(targets_BT == IGNORED, 0.0)


def mean_cost(cost: Cost, x_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None,
              weights_N: Tensor, *inputs_N: Tensor) -> Tensor:
    """sum(weights * costs) / sum(weights) over rows, of each column; 0 if all weights are.

    `inputs_N` are the tensors that `cost` gets a block of, all with one entry a row.
    """
    x_ND = x_BTD.flatten(0, -2)
    total = weights_N.sum()
    scale_N = weights_N / torch.where(total > 0, total, 1.0)
    if torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad):
        return MeanCost.apply(cost, x_ND, weight_VD, bias_V, scale_N, *inputs_N)
    return _weigh(scale_N, row_costs(cost, x_ND, weight_VD, bias_V, *inputs_N))


def row_costs(cost: Cost, x_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None,
              *inputs_N: Tensor) -> Tensor:
    """The cost of every row, fp32 [N], with a gradient."""
    return RowCosts.apply(cost, x_BTD.flatten(0, -2), weight_VD, bias_V, *inputs_N)


class MeanCost(torch.autograd.Function):
    """scale @ costs, whose forward pass leaves the gradients ready; backward scales them."""

    @staticmethod
    def forward(ctx: Any, cost: Cost, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None,
                scale_N: Tensor, *inputs_N: Tensor) -> Tensor:
        costs_N, *gradients = _gradients(cost, x_ND, weight_VD, bias_V, scale_N, inputs_N,
                                         ctx.needs_input_grad[1:4], trained_rows(weight_VD))
        ctx.save_for_backward(*gradients)
        ctx.others = 1 + len(inputs_N)
        return _weigh(scale_N, costs_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first = grad.flatten()[0]
        scaled = (None if saved is None else saved * first for saved in ctx.saved_tensors)
        return None, *scaled, *[None] * ctx.others


class RowCosts(torch.autograd.Function):
    """Costs [N]; the backward pass makes the logits again, now that it knows the rows' scales."""

    @staticmethod
    def forward(ctx: Any, cost: Cost, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None,
                *inputs_N: Tensor) -> Tensor:
        ctx.cost, ctx.product_dtype = cost, _product_dtype(x_ND)
        ctx.rows = trained_rows(weight_VD)
        ctx.save_for_backward(x_ND, weight_VD, bias_V, *inputs_N)
        matrix_VD = weight_VD.to(ctx.product_dtype)
        costs = [cost(_log_probabilities(x_ND[rows], matrix_VD, bias_V),
                      *(each[rows] for each in inputs_N))[0]
                 for rows in _blocks(x_ND, weight_VD)]
        return torch.cat(costs) if costs else x_ND.new_zeros(0, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_VD, bias_V, *inputs_N = ctx.saved_tensors
        with torch.autocast(x_ND.device.type, ctx.product_dtype,
                            enabled=ctx.product_dtype != x_ND.dtype):
            _, *gradients = _gradients(ctx.cost, x_ND, weight_VD, bias_V, grad_N, tuple(inputs_N),
                                       ctx.needs_input_grad[1:4], ctx.rows)
        return None, *gradients, *[None] * len(inputs_N)


def trained_rows(weight_VD: Any) -> Tensor | slice:
    """The rows of a head whose gradient is wanted: all, unless it is frozen but for some."""
    return getattr(weight_VD, "trained_rows", slice(None))


def _gradients(cost: Cost, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scale_N: Tensor,
               inputs_N: tuple[Tensor, ...], needs: tuple[bool, ...], trained: Tensor | slice,
               ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Every row's cost, and the gradients of dot(scale, costs) by features, head and bias.

    With logits z = x W^T + b and g = scale * dcost/dz: dx = g W, dW = g^T x, db = sum of g. Rows
    of dW that are not `trained` are 0.
    """
    need_x, need_weight, need_bias = needs
    grad_x = torch.empty_like(x_ND) if need_x else None
    grad_weight = torch.zeros_like(weight_VD) if need_weight else None
    grad_bias = torch.zeros_like(bias_V) if bias_V is not None and need_bias else None
    matrix_VD = weight_VD.to(_product_dtype(x_ND))
    block = _compiled_next_token() if x_ND.is_cuda and cost is next_token else (
        functools.partial(_block, cost))
    costs = []
    for rows in _blocks(x_ND, weight_VD):
        x_RD = x_ND[rows].to(matrix_VD.dtype)
        costs_R, grad_RV = block(x_RD, matrix_VD, bias_V, scale_N[rows],
                                 *(each[rows] for each in inputs_N))
        costs.append(costs_R)
        if grad_bias is not None:
            grad_bias += grad_RV.sum(dim=0, dtype=grad_bias.dtype)
        if grad_x is not None:
            grad_x[rows] = grad_RV @ matrix_VD
        if grad_weight is not None:
            if isinstance(trained, slice) and grad_weight.dtype == x_RD.dtype:
                grad_weight.addmm_(grad_RV.t(), x_RD)
            else:  # summed in the weight's precision
                grad_weight[trained] += grad_RV[:, trained].t() @ x_RD
        del grad_RV  # otherwise it would be held while the next block's logits are made
    return torch.cat(costs), grad_x, grad_weight, grad_bias


def _block(cost: Cost, x_RD: Tensor, matrix_VD: Tensor, bias_V: Tensor | None, scale_R: Tensor,
           *inputs_R: Tensor) -> tuple[Tensor, Tensor]:
    """The costs of a block of rows, and scale times their gradient, in the products' dtype."""
    cost_R, grad_RV = cost(_log_probabilities(x_RD, matrix_VD, bias_V), *inputs_R)
    return cost_R, (grad_RV * scale_R.unsqueeze(1) if torch.compiler.is_compiling()
                    else grad_RV.mul_(scale_R.unsqueeze(1))).to(matrix_VD.dtype)


@functools.cache
def _compiled_next_token() -> Callable[..., tuple[Tensor, Tensor]]:
    """`_block` as one graph. The loop stays outside: a graph of it would free no block early."""
    return torch.compile(functools.partial(_block, next_token), fullgraph=True)


def _log_probabilities(x_RD: Tensor, matrix_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    bias = None if bias_V is None else bias_V.to(matrix_VD.dtype)
    return F.linear(x_RD.to(matrix_VD.dtype), matrix_VD, bias).float().log_softmax(dim=-1)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast, where it is on, multiplies here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _weigh(scale_N: Tensor, costs: Tensor) -> Tensor:
    """scale @ costs, which are [N] or [N, C], in fp32 under autocast too."""
    return (costs.movedim(0, -1) * scale_N).sum(dim=-1)


def _blocks(x_ND: Tensor, weight_VD: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK.get(x_ND.device.type, BLOCK_ELSEWHERE) // len(weight_VD))
    for first in range(0, len(x_ND), rows):
        yield slice(first, first + rows)
