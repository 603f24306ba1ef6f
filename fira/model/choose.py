"""The K best experts of every token.

`torch.topk` sorts row after row on a CPU. NumPy partitions rows with vector instructions, which for
many experts takes a third of the time. On a GPU `topk` is two kernels of its own; taking the best
K times becomes part of the kernel that made the scores (docs/log.md).
"""
from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fira.model.eager import on_cpu

MANY_EXPERTS, MANY_TOKENS = 16, 256  # from which on partitioning wins
SPARE_BITS = 2**29 - 1  # of a float64 that was a float32


def choose(scores_NE: Tensor, top_k: int) -> tuple[Tensor, Tensor | None]:
    """experts_NK of the largest scores, and threshold_N between them and the next (None if K = E).

    The K of a token come in no certain order, the same for the same row.
    """
    N, E = scores_NE.shape
    if top_k == E:
        return torch.arange(E, device=scores_NE.device).expand(N, E), None
    if on_cpu(scores_NE) and E >= MANY_EXPERTS and N >= MANY_TOKENS:
        best_NL = torch.from_numpy(partition_indices(scores_NE.numpy(), top_k + 1))
        next_N1, experts_NK = best_NL.split([1, top_k], dim=1)
    elif scores_NE.is_cuda and torch.compiler.is_compiling():
        return choose_in_rounds(scores_NE, top_k)
    else:
        experts_NK, next_N1 = scores_NE.topk(top_k + 1, dim=1).indices.split([top_k, 1], dim=1)
    last_N = scores_NE.gather(1, experts_NK).amin(dim=1)
    return experts_NK, (last_N + scores_NE.gather(1, next_N1).squeeze(1)) / 2


def partition_indices(scores_NE: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest of every row, the smallest of them first.

    As float64 a score leaves room for its index in the last bits: NumPy partitions numbers in less
    than half the time of indices. Equal scores are told apart by their index.
    """
    keys_NE = scores_NE.astype(np.float64)
    bits_NE = keys_NE.view(np.int64)
    bits_NE |= np.arange(scores_NE.shape[1])
    first = scores_NE.shape[1] - count
    keys_NE.partition(first, axis=1)
    return bits_NE[:, first:] & SPARE_BITS


def choose_in_rounds(scores_NE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`choose` for K < E: the best of those that are left, once for each choice and once more."""
    experts_E = torch.arange(scores_NE.shape[1], device=scores_NE.device)
    picks, values = [], []
    for _ in range(top_k + 1):
        picks.append(scores_NE.argmax(dim=1))
        values.append(scores_NE.amax(dim=1))
        scores_NE = scores_NE.masked_fill(experts_E == picks[-1].unsqueeze(1), -torch.inf)
    return torch.stack(picks[:top_k], dim=1), (values[-2] + values[-1]) / 2


def rank_smallest(values_EN: Tensor, rank: int) -> Tensor:
    """The `rank`-th smallest value of every row, counted from 1 (`torch.kthvalue`)."""
    if on_cpu(values_EN):
        parted = np.partition(values_EN.numpy(), rank - 1, axis=1)
        return torch.from_numpy(parted[:, rank - 1].copy())
    return values_EN.kthvalue(rank, dim=1).values
