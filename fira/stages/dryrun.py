"""What a tuning would read and train, and what it would need, without a step (`--dry-run`)."""
from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fira.data.conversations import Row
from fira.data.tokenizer import Tokenizer
from fira.loss.head import BLOCK, BLOCK_ELSEWHERE
from fira.model import build_meta
from fira.model.adapter import adapters, hold_frozen
from fira.parallel.plan import FLOAT, Work, memory_of
from fira.runtime import pick_device
from fira.stages.config import Opened, Stage

SHOWN = 400  # ids of the example
# Measured on a CPU as the peak of resident memory beyond imports, 4 to 84 million parameters:
ROW_BYTES = 350  # of a row's objects, besides 5 for each id
LIBRARIES = 64e6  # what they allocate when they are first used
HOLES = 1.3  # empty places per output of an adapter


def show(stage: Stage, config: Any, opened: Opened, device_name: str, screen: Console) -> None:
    """Print the rows, the length of the tuning, what trains, the memory and an example."""
    tokenizer, model = Tokenizer.load(opened.folder), build_meta(config.model)
    stage.adapt(config, model, tokenizer)
    if (device := pick_device(device_name).type) == "cuda":
        hold_frozen(model, torch.bfloat16)  # as a Layout does
    for line in opened.lines:
        screen.print(line, soft_wrap=True, markup=False)
    for name, value in facts(config, opened.data, model, device).items():
        screen.print(f"{name:13}{value}", soft_wrap=True, highlight=False)
    screen.print(trained_tensors(model))
    screen.print("An example; [[what is trained on]] stands in double brackets:", markup=False)
    screen.print(example(opened.data.train.rows[0], tokenizer), soft_wrap=True)


def facts(config: Any, data: Any, model: Any, device: str) -> dict[str, str]:
    """What there is to say of a tuning, by name."""
    train, rows, length = config.train, data.train.rows, config.train.sequence_length
    tokens, trained = (sum(map(of, rows)) for of in (
        lambda row: len(row.ids), lambda row: int(row.trained.sum())))
    size = [sum(p.numel() for p in model.parameters() if p.requires_grad or whole)
            for whole in (False, True)]
    memory = memory_needed(config, data, model, device)
    read = train.batch_size * (1 - getattr(config.data, "replay", 0.0))
    epochs = f": {train.steps * read / len(data.train):.2f} epochs" if train.steps else ""
    return {
        "rows": f"{len(rows):,} to train on, {len(data.held_out.rows):,} held out",
        "tokens": f"{tokens:,}, of which {trained:,} ({trained / tokens:.1%}) are trained on",
        "longest row": f"{max(len(row.ids) for row in rows):,} tokens; "
                       f"train.sequence_length={length} takes up to {length + 1:,}",
        "sequences": f"{len(data.train):,} of {length} tokens, "
                     f"{(tokens - len(rows)) / len(data.train) / length:.1%} full",
        "length": (f"{train.steps:,} steps" if train.steps else f"{train.minutes:g} minutes")
                  + f" of {train.batch_size} sequences{epochs}",
        "trained": f"{size[0]:,} of {size[1]:,} parameters ({size[0] / size[1]:.2%})",
        "memory": f"about {sum(memory.values()) / 1e6:,.0f} MB beside the program: " + ", ".join(
            f"{part} {count / 1e6:,.0f}" for part, count in memory.items())}


def memory_needed(config: Any, data: Any, model: Any, device: str = "cpu") -> dict[str, float]:
    """Bytes by part at the moment of a step that needs most, on one device; see `memory_of`. While
    an adapter's output is added, the base's and the sum are there too, and places of that size stay
    empty between what is kept. On CUDA only what is in use is counted, without such places."""
    train, spec = config.train, config.model
    full = memory_of(Work(spec, train.batch_size, train.micro_batch, train.sequence_length,
                          config.optim.rule, train.recompute,
                          BLOCK.get(device, BLOCK_ELSEWHERE)), (1, 1, 1, 1), 0)
    trained = FLOAT * sum(p.numel() for p in model.parameters() if p.requires_grad)
    added = sum(module.lora.b.shape[-2] * (spec.top_k if module.lora.b.dim() > 2 else 1)
                for module in adapters(model).values() if hasattr(module.lora, "b"))
    return {"weights": sum(tensor.nbytes for tensor in model.state_dict().values()),
            "gradients": trained, "optimizer": full["optimizer"] * trained / full["weights"],
            "activations": full["activations"] + (device != "cuda") * HOLES * FLOAT * added
            * train.micro_batch * train.sequence_length,
            "working": full["working"], "libraries": LIBRARIES,
            "rows": sum(5 * len(row.ids) + ROW_BYTES for part in data
                        for row in getattr(part, "rows", ()))}


def trained_tensors(model: Any) -> Table:
    """The tensors that are trained: those of all layers in one line, with their experts."""
    found: dict[str, list[Any]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[re.sub(r"\.\d+\.", ".*.", name)].append(parameter.shape)
    table = Table("trained tensors")
    for heading in ("layers", "experts", "parameters"):
        table.add_column(heading, justify="right")
    for name, shapes in found.items():
        experts = sorted({shape[0] for shape in shapes}) if ".experts." in name else []
        table.add_row(name, str(len(shapes)) if "*" in name else "", " to ".join(
            dict.fromkeys(str(count) for count in experts[:1] + experts[-1:])) + (
            f" of {model.spec.num_experts}" if experts else ""),
            f"{sum(shape.numel() for shape in shapes):,}")
    return table


def example(row: Row, tokenizer: Tokenizer) -> Text:
    """The text of a row, what is trained on in color and in double brackets."""
    text, start = Text(), 0
    ids, trained = row.ids[:SHOWN], row.trained[:SHOWN]
    for end in [*(trained[1:] != trained[:-1]).nonzero()[0] + 1, len(ids)]:
        part = tokenizer.decode(ids[start:end])
        text.append(f"[[{part}]]" if trained[start] else part,
                    "bold green" if trained[start] else "dim")
        start = end
    return text.append(" ..." if len(row.ids) > SHOWN else "")
