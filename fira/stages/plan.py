"""Print what training a preset on many devices would take, layout by layout."""
from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from fira.config import ConfigError, load_preset
from fira.model.count import count_parameters
from fira.parallel import plan as planning
from fira.parallel.mesh import describe_sizes
from fira.stages.pretrain import configure

SHOWN = 8  # layouts


def plan(preset: str, settings: Iterable[str], gpus: int, device_name: str, tokens: float | None,
         price: float | None) -> None:
    """Print the table. Raises ConfigError for an unknown device or where nothing fits."""
    if device_name not in planning.DEVICES:
        raise ConfigError(f"device {device_name!r} is unknown; choose one of "
                          f"{', '.join(planning.DEVICES)}")
    device, config = planning.DEVICES[device_name], configure(load_preset(preset), settings)
    train, count = config.train, count_parameters(config.model, config.train.sequence_length)
    found = planning.plan(planning.Work(
        config.model, train.batch_size, train.micro_batch, train.sequence_length,
        config.optim.rule, train.recompute), gpus, device)
    if not found:
        raise ConfigError(f"no layout of {preset} fits {gpus} x {device_name}; use more --gpus, a "
                          "smaller train.micro_batch or train.sequence_length, or another "
                          "train.batch_tokens (ranks divide its sequences evenly)")
    tokens = tokens or (train.steps or 0) * train.batch_tokens
    table = Table(title=f"{preset} on {gpus} x {device_name}: {count.total / 1e9:.2f}B parameters, "
                        f"{count.active / 1e9:.2f}B active; {tokens / 1e9:,.0f}B tokens")
    for heading in ("layout", *found[0].memory, "all GB", "sent GB/step", "tokens/s", "days",
                    "dollars"):
        table.add_column(heading, justify="left" if heading == "layout" else "right")
    for one in found[:SHOWN]:
        parts, hours = [*one.memory.values()], tokens / one.tokens_per_second / 3600
        cost = hours * gpus * (device.price if price is None else price)
        table.add_row(describe_sizes(one.sizes) or "one device",
                      *(f"{size / 1e9:.1f}" for size in (*parts, sum(parts),
                                                         sum(one.sent.values()))),
                      f"{one.tokens_per_second:,.0f}", f"{hours / 24:.1f}", f"{cost:,.0f}")
    screen = Console(highlight=False, width=140)
    screen.print(table)
    screen.print(f"{len(found)} layouts fit; memory of one GPU in GB; speeds are estimates at "
                 f"{planning.UTILIZATION:.0%} of the sheet's rate, balanced loads", soft_wrap=True)
