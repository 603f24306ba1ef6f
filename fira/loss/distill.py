"""The divergence of a student from its teacher, over the whole vocabulary (Hinton et al. 2015)."""
from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fira.loss.head import IGNORED, mean_cost


def distillation_loss(student: Any, teacher_x_BTD: Tensor, teacher_head: tuple[Tensor, Any],
                      tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean KL(teacher || student), in nats, over the scored places; the teacher has no gradient.

    The teacher's logits are made block by block from its features and its head (weight, bias).
    """
    weight_VD, bias_V = teacher_head

    def divergence(logs_RV: Tensor, y_RD: Tensor) -> tuple[Tensor, Tensor]:
        """sum_v p_v (log p_v - log q_v) with teacher p and student q; d/dlogits = q - p."""
        teacher_RV = F.linear(y_RD, weight_VD, bias_V).float().log_softmax(dim=-1)
        p_RV = teacher_RV.exp()
        return (p_RV * (teacher_RV - logs_RV)).sum(dim=1), logs_RV.exp() - p_RV

    x_BTD = student.features(tokens_BT)
    head_VD, offset_V = student.head_weights()
    weights_N = (targets_BT != IGNORED).flatten().float()
    return mean_cost(divergence, x_BTD, head_VD, offset_V, weights_N,
                     teacher_x_BTD.flatten(0, -2).detach())
