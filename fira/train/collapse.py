"""When is routing collapsed? Said during the run, while there is something to save."""
from __future__ import annotations

import math
from typing import Any

PATIENCE = 50    # steps in a row; a run's first steps are uneven and mend themselves (docs/log.md)
UNEVEN = 0.75    # of the imbalance with which only K experts work
DEAD = 0.25      # of a layer's experts


def collapse(health: dict[str, Any], top_k: int) -> str | None:
    """What is wrong in which layers and what to try; None while routing is well enough.

    `health` is a routing row. The largest possible imbalance (CV) is sqrt(E/K - 1).
    """
    experts = len(health["load"][0])
    worst = math.sqrt(experts / top_k - 1)
    layers = [layer for layer, (cv, dead) in enumerate(zip(health["cv"], health["dead"],
                                                           strict=True))
              if cv > UNEVEN * worst or dead > DEAD * experts]
    if not layers:
        return None
    return (f"layers {', '.join(map(str, layers))} have an imbalance (cv) of up to "
            f"{max(health['cv'][layer] for layer in layers):.2f} of at most {worst:.2f} and up to "
            f"{max(health['dead'][layer] for layer in layers)} of {experts} experts without a "
            "token; try a larger model.balance_weight, model.balance=handover or a lower "
            "optim.router_lr")
