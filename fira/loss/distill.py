"""The divergence of a student q from its teacher p, over the whole vocabulary.

    forward    KL(p || q) = sum p (log p - log q)                   (Hinton et al. 2015, 1503.02531)
    reverse    KL(q || p)
    jsd        beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
                                    (generalized Jensen-Shannon, Agarwal et al. 2023, 2306.13649)

Both distributions are those of logits divided by a temperature T. The divergence is multiplied by
T^2, because its gradient by the logits falls as 1 / T^2 (Hinton et al., section 2); TRL does not.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fira.loss.head import IGNORED, mean_cost, next_token

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
    """Half of the sum of both from their mean at beta 0.5. As m contains q, what changes m cancels:
    d/dlogits = (1 - beta) times that of KL(q || m) with m held."""
    def divergence(student_RV: Tensor, teacher_RV: Tensor) -> tuple[Tensor, Tensor]:
        mixed_RV = torch.logaddexp(student_RV + math.log(1 - beta), teacher_RV + math.log(beta))
        own_R, grad_RV = reverse(student_RV, mixed_RV)
        other_R = torch.linalg.vecdot(teacher_RV.exp(), teacher_RV - mixed_RV)
        return beta * other_R + (1 - beta) * own_R, grad_RV.mul_(1 - beta)
    return divergence


def distillation_loss(teach: Callable[[Any], Any], divergence: Divergence = forward,
                      temperature: float = 1.0, ce: float = 0.0,
                      products: torch.dtype = torch.float32,
                      ) -> Callable[[Any, Any], tuple[Tensor, dict[str, Tensor]]]:
    """The loss function (1 - ce) * T^2 * divergence + ce * cross-entropy of the targets, in nats
    per scored token, and metrics: both parts, and how often both models find the same token
    likeliest.

    `teach(batch)` gives the teacher, in evaluation mode, ready to read the batch. Its logits are
    made block by block beside the student's, and cut to the student's vocabulary. It multiplies in
    the dtype `products`.
    """
    def read(batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """The teacher's features and head."""
        lower = products != torch.float32
        with torch.no_grad(), (torch.autocast(batch.tokens_BT.device.type, products) if lower
                               else contextlib.nullcontext()):
            teacher = teach(batch)
            y_BTD, (weight_VD, bias_V) = teacher.features(batch.tokens_BT), teacher.head_weights()
            return (y_BTD.flatten(0, -2).to(products), weight_VD.to(products),
                    None if bias_V is None else bias_V.to(products))

    def loss_fn(model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        y_ND, other_VD, offset_V = read(batch)
        x_BTD, (weight_VD, bias_V) = model.features(batch.tokens_BT), model.head_weights()
        other_VD = other_VD[:len(weight_VD)]
        offset_V = None if offset_V is None else offset_V[:len(weight_VD)]

        def cost(logs_RV: Tensor, y_RD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
            teacher_RV, student_RV = F.linear(y_RD, other_VD, offset_V).float(), logs_RV
            best_R1 = logs_RV.argmax(dim=1, keepdim=True)
            agrees_R = (teacher_RV.gather(1, best_R1).squeeze(1) == teacher_RV.amax(dim=1)).float()
            if temperature != 1:
                student_RV = (logs_RV / temperature).log_softmax(dim=1)
                teacher_RV /= temperature
            apart_R, grad_RV = divergence(student_RV, teacher_RV.log_softmax(dim=1))
            ce_R, other_RV = next_token(logs_RV, targets_R)
            grad_RV = grad_RV.mul_((1 - ce) * temperature).add_(other_RV, alpha=ce)
            apart_R = apart_R * temperature ** 2
            return torch.stack([torch.lerp(apart_R, ce_R, ce), apart_R, ce_R, agrees_R], 1), grad_RV

        targets_N = batch.targets_BT.flatten()
        loss, *metrics = mean_cost(cost, x_BTD, weight_VD, bias_V, (targets_N != IGNORED).float(),
                                   y_ND, targets_N)
        return loss, dict(zip(("divergence", "ce", "agreement"), metrics, strict=True))
    return loss_fn
