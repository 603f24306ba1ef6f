"""Which experts a text uses, and how much they contribute."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fira.model.moe import MoE, sort_by_expert
from fira.model.router import Watch
from fira.model.transformer import Documents


class Use(NamedTuple):
    """The choices of N tokens in L layers: experts, their gates, and the norms of their outputs."""

    experts_LNK: Tensor
    gates_LNK: Tensor
    norms_LNK: Tensor

    def total(self, values_LNK: Tensor, num_experts: int) -> Tensor:
        """The sum of these values over the tokens of each expert, [L, E] in float64."""
        total_LE = torch.zeros(len(values_LNK), num_experts, dtype=torch.float64)
        return total_LE.scatter_add_(1, self.experts_LNK.flatten(1), values_LNK.flatten(1).double())


@torch.inference_mode()
def read_use(model: Any, batches: Iterable[Any], context: bool = False) -> Use:
    """What a model that is no dense one chooses for the tokens of packed batches that predict a
    target; with `context` also for the others, but for the first of each row, which looks like an
    empty place."""
    device, found, norms = next(model.parameters()).device, list[list[Tensor]](), list[Tensor]()
    hooks = [part.experts.register_forward_hook(
        lambda module, inputs, rows_RD: norms.append(rows_RD.float().norm(dim=1)))
        for part in model.modules() if isinstance(part, MoE)]
    with Watch(model) as watch:
        for batch in batches:
            norms.clear()
            positions_BT = batch.positions_BT.to(device)
            model.features(batch.tokens_BT.to(device),
                           Documents(positions_BT, model.spec.num_layers))
            counted_BT = (batch.targets_BT >= 0) | (context & (batch.positions_BT > 0))
            experts_LNK, gates_LNK = (torch.stack([one for one in kept if one is not None])
                                      for kept in (watch.experts, watch.gates))
            norms_LNK = torch.stack([norms_R[sort_by_expert(
                chosen_NK, model.spec.num_experts).inverse_NK] for chosen_NK, norms_R in
                zip(experts_LNK, norms, strict=True)])
            found.append([one.cpu()[:, counted_BT.flatten()]
                          for one in (experts_LNK, gates_LNK, norms_LNK)])
    for hook in hooks:
        hook.remove()
    return Use(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)))
