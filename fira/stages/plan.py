"""Print what training a preset on many devices would take, layout by layout."""
from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from fira.config import ConfigError, load_preset
from fira.model.files import build_meta
from fira.model.transformer import count_parameters
from fira.parallel import plan as planning
from fira.parallel.footprint import Work
from fira.stages.pretrain import configure

SHOWN = 8  # layouts
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "working")


def plan(preset: str, settings: Iterable[str], gpus: int, device_name: str, tokens: float | None,
         price: float | None) -> None:
    """Print the table. Raises ConfigError for an unknown device or where nothing fits."""
    if device_name not in planning.DEVICES:
        raise ConfigError(f"device {device_name!r} is unknown; choose one of "
                          f"{', '.join(planning.DEVICES)}")
    device, config = planning.DEVICES[device_name], configure(load_preset(preset), settings)
    train = config.train
    work = Work(config.model, train.batch_size, train.micro_batch, train.sequence_length,
                config.optim.rule, train.recompute)
    found = planning.plan(work, gpus, device)
    count = count_parameters(build_meta(config.model), train.sequence_length)
    if not found:
        raise ConfigError(f"no layout of {preset} fits {gpus} x {device_name}; use more --gpus, a "
                          "smaller train.micro_batch or train.sequence_length, or another "
                          "train.batch_tokens (sequences are dealt out evenly)")
    tokens = tokens or (train.steps or 0) * train.batch_tokens or None
    table = Table(title=f"{preset} on {gpus} x {device_name}: {count.total / 1e9:.2f}B parameters, "
                        f"{count.active / 1e9:.2f}B active", title_justify="left")
    for heading in ("layout", "schedule", *PARTS, "all GB", "sent GB/step", "tokens/s"):
        table.add_column(heading, justify="left" if heading in ("layout", "schedule") else "right")
    if tokens:
        table.add_column("days", justify="right")
        table.add_column("dollars", justify="right")
    for one in found[:SHOWN]:
        row = [one.name, one.schedule if one.sizes["pipeline"] > 1 else "",
               *(f"{one.memory[part] / 1e9:.1f}" for part in PARTS),
               f"{one.total_memory / 1e9:.1f}", f"{sum(one.sent.values()) / 1e9:.1f}",
               f"{one.tokens_per_second:,.0f}"]
        if tokens:
            hours = tokens / one.tokens_per_second / 3600
            cost = hours * gpus * (device.price if price is None else price)
            row += [f"{hours / 24:.1f}", f"{cost:,.0f}"]
        table.add_row(*row)
    screen = Console(highlight=False, width=140)
    screen.print(table)
    more = f"{len(found) - SHOWN} more layouts fit; " if len(found) > SHOWN else ""
    trained = f"{tokens / 1e9:,.0f}B tokens; " if tokens else ""
    screen.print(f"{more}{trained}memory of one GPU in GB; speeds are estimates at "
                 f"{planning.UTILIZATION:.0%} of the sheet's rate, balanced loads", soft_wrap=True)
