"""Which experts a tuning gives adapters: those that its data uses most (as ESFT, 2407.01906, does),
or random ones as a control. And whether its routers train."""
from __future__ import annotations

from typing import Any

import torch
from rich.console import Console

from fira.config import ConfigError
from fira.data.packs import Sequences, in_order
from fira.infer.load import load
from fira.model.router import METHODS
from fira.model.usage import read_use

PLACES = 1 << 16  # of the data that are read to choose


def choose_experts(config: Any, data: Sequences, device: str, screen: Console) -> list[list[int]]:
    """The chosen experts of each layer, ascending: those whose gates have the largest sum over the
    tokens of the data by which the model, untuned, predicts a target."""
    num_experts, most = config.model.num_experts, max(1, PLACES // data.length)
    random, size = parse_experts(config)
    screen.print(f"reading {min(most, len(data)) * data.length:,} of {len(data) * data.length:,} "
                 f"places of the data: {size} of the {num_experts} experts of each layer are "
                 f"trained, {'chosen at random' if random else 'those used most'}", soft_wrap=True)
    use = read_use(load(config.data.start, device).model,
                   in_order(data, config.train.micro_batch, most))
    gates_LE = use.total(use.gates_LNK, num_experts)
    scores_LE = gates_LE if not random else torch.rand(
        gates_LE.shape, generator=torch.Generator().manual_seed(config.train.seed))
    chosen = [sorted(row) for row in scores_LE.topk(size, dim=1).indices.tolist()]
    for layer, experts in enumerate(chosen):
        share = gates_LE[layer, experts].sum() / gates_LE[layer].sum()
        screen.print(f"layer {layer}: {share:.1%} of the gates, experts "
                     f"{' '.join(map(str, experts))}", soft_wrap=True)
    return chosen


def parse_experts(config: Any) -> tuple[bool, int]:
    """Whether tune.experts (SHARE, `random` or `random:SHARE`) means random ones, and how many of a
    layer's. Raises ConfigError where none can be chosen."""
    text, count = config.tune.experts, config.model.num_experts
    if count == 1:
        raise ConfigError("the model is dense and has no experts to choose; use --method lora")
    random = text.startswith("random")
    try:
        share = float(text.removeprefix("random").lstrip(":") or 0.25)
    except ValueError:
        share = 0.0
    if not (0 < share <= 1 and round(share * count)):
        raise ConfigError(f"--experts {text} must be the share of a layer's {count} experts that "
                          f"is trained, from {1 / count:.3g} (one expert) to 1; for example "
                          "--experts 0.25, or random:0.25 for a control")
    return random, round(share * count)


def prepare_router(router: Any, train: bool) -> None:
    """Frozen, it goes on choosing as it does: without losses of its own, which would move what it
    reads, and with its selection bias. Trained, one that hands over has done so: the loss balances
    and a bias that was left stays."""
    router.requires_grad_(train)
    if not train:
        router.method, router.z_weight = METHODS["none"], 0.0
    elif router.method.hands_over:
        router.method = METHODS["loss"]
