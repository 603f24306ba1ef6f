"""The output head and its cross-entropy in one, so that the whole logits never exist.

At 50,304 tokens the logits, their log-softmax and its gradient are the largest tensors of a
training step. Here a block of rows at a time gets its logits, its loss and at once its gradients,
as in Liger's and Apple's fused losses; only the gradients of the features and of the head are kept.
`next_token.next_token_loss_plain` is the plain twin. The loop over blocks stays out of compiled
code, which would put off what frees a block until all have had their turn; a block may be compiled.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # a target that is not scored, as in torch's cross_entropy
# Logits held at a time: 128 MiB in fp32 on a CPU (half of it is 8% slower); a GPU wants larger
# products.
BLOCK = {"cpu": 1 << 25}
BLOCK_ELSEWHERE = 1 << 28


def block_gradients(x_RD: Tensor, matrix_VD: Tensor, bias_V: Tensor | None, targets_R: Tensor,
                    scale_R: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of a block of rows the losses, scale times the gradient of its logits, and that of the bias.

    The gradient of the logits comes in the numbers that will multiply it.
    """
    logs_RV, losses_R = _log_probabilities(x_RD, matrix_VD, bias_V, targets_R)
    scale_R1, targets_R1 = scale_R.unsqueeze(1), targets_R.clamp(min=0).unsqueeze(1)
    if torch.compiler.is_compiling():  # one kernel, if it scatters nothing
        hits_RV = torch.arange(len(matrix_VD), device=x_RD.device) == targets_R1
        grad_RV = (logs_RV.exp() - hits_RV.to(logs_RV.dtype)) * scale_R1
    else:
        grad_RV = logs_RV.exp_().mul_(scale_R1).scatter_add_(1, targets_R1, -scale_R1)
    grad_RV = grad_RV.to(matrix_VD.dtype)
    grad_V = None if bias_V is None else grad_RV.sum(dim=0, dtype=bias_V.dtype)
    return losses_R, grad_RV, grad_V


def head_loss(x_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_BT: Tensor,
              block: Callable[..., Any] = block_gradients) -> Tensor:
    """Mean cross-entropy in nats of x @ weight.T + bias over the targets that are not IGNORED."""
    x_ND, targets_N = x_BTD.flatten(0, -2), targets_BT.flatten()
    if torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad):
        return HeadLoss.apply(x_ND, weight_VD, bias_V, targets_N, block)
    losses_N = head_token_losses(x_ND, weight_VD, bias_V, targets_N)
    return losses_N.sum() / (targets_N != IGNORED).sum()


@torch.no_grad()
def head_token_losses(x_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None,
                      targets_BT: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, fp32 [B, T], 0 where IGNORED; no gradient."""
    x_ND, targets_N = x_BTD.flatten(0, -2), targets_BT.flatten()
    matrix_VD = weight_VD.to(_product_dtype(x_ND))
    losses = [_log_probabilities(x_ND[rows], matrix_VD, bias_V, targets_N[rows])[1]
              for rows in _blocks(x_ND, weight_VD)]
    return torch.cat(losses).view_as(targets_BT)


class HeadLoss(torch.autograd.Function):
    """`head_loss` whose forward pass leaves the gradients ready; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None,
                targets_N: Tensor, block: Callable[..., Any]) -> Tensor:
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad_x = torch.empty_like(x_ND) if need_x else None
        grad_weight = torch.zeros_like(weight_VD) if need_weight else None
        grad_bias = torch.zeros_like(bias_V) if bias_V is not None and need_bias else None
        matrix_VD = weight_VD.to(_product_dtype(x_ND))
        scored_N = targets_N != IGNORED
        scale_N = scored_N / scored_N.sum().clamp(min=1)
        losses = []
        for rows in _blocks(x_ND, weight_VD):
            x_RD = x_ND[rows].to(matrix_VD.dtype)
            losses_R, grad_RV, grad_V = block(x_RD, matrix_VD, bias_V, targets_N[rows],
                                              scale_N[rows])
            losses.append(losses_R)
            if grad_bias is not None:
                grad_bias += grad_V
            if grad_x is not None:
                grad_x[rows] = grad_RV @ matrix_VD
            if grad_weight is not None:
                _add_product(grad_weight, grad_RV.t(), x_RD)
            del grad_RV  # or the next block's logits would be held beside them
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        return torch.cat(losses).sum() / scored_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if saved is None else saved * grad for saved in ctx.saved_tensors), None, None


def _log_probabilities(x_RD: Tensor, matrix_VD: Tensor, bias_V: Tensor | None,
                       targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 log-probabilities of a block of rows, and the loss of each."""
    bias = None if bias_V is None else bias_V.to(matrix_VD.dtype)
    logits_RV = torch.nn.functional.linear(x_RD.to(matrix_VD.dtype), matrix_VD, bias).float()
    logs_RV = logits_RV.log_softmax(dim=-1)
    losses_R = -logs_RV.gather(1, targets_R.clamp(min=0).unsqueeze(1)).squeeze(1)
    return logs_RV, losses_R.masked_fill(targets_R == IGNORED, 0.0)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _product_dtype(x: Tensor) -> torch.dtype:
    """What autocast would multiply in here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _blocks(x_ND: Tensor, weight_VD: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK.get(x_ND.device.type, BLOCK_ELSEWHERE) // len(weight_VD))
    for first in range(0, len(x_ND), rows):
        yield slice(first, first + rows)
