"""A beginning for attention: heads that look at the tokens just before.

Copying takes two layers, of which the first tells each token what came before it (Olsson et al.
2022). Such a head looks at positions only, so it wants a direction that all tokens share, and the
first layer has none: there it is learned late. So every embedding begins with a component in
common, from which the first group of heads makes equal queries and keys, turned against each other
by as many positions as its head is to look back. Training is free to change all of it.
"""
from __future__ import annotations

import torch
from torch import Tensor

from fira.model.spec import FIRA2Spec

SHARES = 0.5, 0.35, 0.15  # of the fastest rotary frequencies in a score: a peak one position wide


def look_back(spec: FIRA2Spec) -> dict[str, Tensor]:
    """What is added to the first weights, by name: head h of the first group looks h + 1 back."""
    common = torch.zeros(1, spec.d_model)
    common[:, 0] = 1.0
    sizes = torch.tensor(SHARES[:spec.head_dim // 2]).sqrt()
    angles = spec.rope_theta ** (-2 / spec.head_dim * torch.arange(len(sizes)))
    qkv = torch.zeros(spec.n_head + 2 * spec.n_kv_head, 2, spec.head_dim // 2, spec.d_model)
    for head in range(spec.n_head // spec.n_kv_head):
        turn = angles * (head + 1)
        qkv[head, 0, :len(sizes), 0] = sizes * turn.cos()
        qkv[head, 1, :len(sizes), 0] = -sizes * turn.sin()
    qkv[spec.n_head, 0, :len(sizes), 0] = sizes
    return {"token_embedding.weight": common.expand(spec.vocab_size, -1),
            "blocks.0.attention.qkv.weight": qkv.flatten(0, 2)}
