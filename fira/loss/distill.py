"""The divergence of a student q from its teacher p, over the whole vocabulary.

    forward    KL(p || q) = sum p (log p - log q)                (Hinton et al. 2015, 1503.02531)
    reverse    KL(q || p)
    jsd        beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
               (generalized Jensen-Shannon divergence, Agarwal et al. 2023, 2306.13649)

Both distributions are those of logits divided by a temperature T. The divergence is multiplied by
T^2, because its gradient by the logits falls as 1 / T^2 (Hinton et al., section 2); TRL does not.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fira.loss.head import IGNORED, mean_cost, next_token

UNKNOWN = -1  # a target whose place is scored by the divergence, and not by the cross-entropy
# (log q, log p) [R, V] -> the divergence [R] and its derivative by the logits of q [R, V]
Divergence = Callable[[Tensor, Tensor], "tuple[Tensor, Tensor]"]


def forward(student_RV: Tensor, teacher_RV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q); d/dlogits = q - p."""
    p_RV = teacher_RV.exp()
    cost_R = torch.linalg.vecdot(p_RV, teacher_RV - student_RV)
    return cost_R, torch.sub(student_RV.exp(), p_RV, out=p_RV)


def reverse(student_RV: Tensor, teacher_RV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p); with r = log q - log p, d/dlogits = q (r - sum q r)."""
    q_RV, r_RV = student_RV.exp(), student_RV - teacher_RV
    cost_R = torch.linalg.vecdot(q_RV, r_RV)
    return cost_R, q_RV.mul_(r_RV.sub_(cost_R.unsqueeze(1)))


def jensen_shannon(beta: float) -> Divergence:
    """With 0 < beta < 1. The changes of m cancel: d/dlogits = (1 - beta) that of KL(q || m), as if
    m were constant."""
    def divergence(student_RV: Tensor, teacher_RV: Tensor) -> tuple[Tensor, Tensor]:
        mixed_RV = torch.logaddexp(student_RV + math.log(1 - beta), teacher_RV + math.log(beta))
        own_R, grad_RV = reverse(student_RV, mixed_RV)
        other_R = torch.linalg.vecdot(teacher_RV.exp(), teacher_RV - mixed_RV)
        return beta * other_R + (1 - beta) * own_R, grad_RV.mul_(1 - beta)
    return divergence


def distillation_loss(teach: Callable[[Any], tuple[Tensor, Tensor, Tensor | None]],
                      divergence: Divergence = forward, temperature: float = 1.0, ce: float = 0.0,
                      ) -> Callable[[Any, Any], tuple[Tensor, dict[str, Tensor]]]:
    """The loss function (1 - ce) * T^2 * divergence + ce * cross-entropy of the targets, in nats
    per scored token, and metrics: both parts, and the share of tokens of which both models find the
    same one likeliest. Where a target is UNKNOWN, the divergence alone counts.

    `teach(batch)` gives the teacher's features, and weight and bias of its head, without gradients.
    Its logits are made block by block beside the student's, and cut to the student's vocabulary.
    """
    def loss_fn(model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        y_BTD, *head = teach(batch)
        x_BTD, (weight_VD, bias_V) = model.features(batch.tokens_BT), model.head_weights()
        cost = functools.partial(_cost, divergence, temperature, ce,
                                 [None if one is None else one[:len(weight_VD)] for one in head])
        targets_N = batch.targets_BT.flatten()
        loss, *metrics = mean_cost(cost, x_BTD, weight_VD, bias_V, (targets_N != IGNORED).float(),
                                   y_BTD.flatten(0, -2), targets_N)
        return loss, dict(zip(("divergence", "ce", "agreement"), metrics, strict=True))
    return loss_fn


def _cost(divergence: Divergence, temperature: float, ce: float, head: Any, logs_RV: Tensor,
          y_RD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Of a block of rows: loss and metrics as columns, and the loss's gradient."""
    teacher_RV, student_RV = F.linear(y_RD, *head).float(), logs_RV
    best_R1 = logs_RV.argmax(dim=1, keepdim=True)
    agrees_R = (teacher_RV.gather(1, best_R1).squeeze(1) == teacher_RV.amax(dim=1)).float()
    if temperature != 1:
        student_RV = (logs_RV / temperature).log_softmax(dim=1)
        teacher_RV /= temperature
    apart_R, grad_RV = divergence(student_RV, teacher_RV.log_softmax(dim=1))
    apart_R = apart_R * temperature ** 2
    known_R = (targets_R >= 0).float()
    ce_R, other_RV = next_token(logs_RV, targets_R)  # overwrites logs_RV
    ce_R, share_R = ce_R * known_R, ce * known_R
    grad_RV.mul_(((1 - share_R) * temperature).unsqueeze(1))
    grad_RV.addcmul_(other_RV, share_R.unsqueeze(1))
    return torch.stack([torch.lerp(apart_R, ce_R, share_R), apart_R, ce_R, agrees_R], 1), grad_RV
