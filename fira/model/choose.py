"""The K best experts of every token.

`torch.topk` sorts row after row on a CPU. NumPy partitions rows with vector instructions, which for
many experts takes a third of the time (docs/log.md).
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fira.model.eager import on_cpu

MANY_EXPERTS, MANY_TOKENS = 16, 256  # from which on partitioning wins


def choose(scores_NE: Tensor, top_k: int) -> tuple[Tensor, Tensor | None]:
    """experts_NK of the largest scores, and threshold_N between them and the next (None if K = E).

    The K of a token come in no certain order, the same for the same row.
    """
    N, E = scores_NE.shape
    if top_k == E:
        return torch.arange(E, device=scores_NE.device).expand(N, E), None
    if on_cpu(scores_NE) and E >= MANY_EXPERTS and N >= MANY_TOKENS:
        order = np.argpartition(scores_NE.numpy(), E - top_k - 1, axis=1)[:, E - top_k - 1:]
        best_NL = torch.from_numpy(order)
        next_N1, experts_NK = best_NL.split([1, top_k], dim=1)
    else:
        experts_NK, next_N1 = scores_NE.topk(top_k + 1, dim=1).indices.split([top_k, 1], dim=1)
    last_N = scores_NE.gather(1, experts_NK).amin(dim=1)
    return experts_NK, (last_N + scores_NE.gather(1, next_N1).squeeze(1)) / 2


def rank_smallest(values_EN: Tensor, rank: int) -> Tensor:
    """The `rank`-th smallest value of every row, counted from 1 (`torch.kthvalue`)."""
    if on_cpu(values_EN):
        parted = np.partition(values_EN.numpy(), rank - 1, axis=1)
        return torch.from_numpy(parted[:, rank - 1].copy())
    return values_EN.kthvalue(rank, dim=1).values
