"""A run with fewer experts: those that contribute least to a given text are left out.

What an expert contributes to a text is the sum of gate times norm of its output over the text. REAP
(Lasby et al. 2025, 2510.13999) takes the mean over the tokens routed to the expert, which keeps
experts that are hardly used: with half of the experts a text lost 3.9% and 20% where with the sum
it lost 2.1% and 15% (64 experts, top-2; 32, top-4). The router loses the rows of the experts that
go, so its softmax renormalizes the gates of those that stay.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fira.config import ConfigError
from fira.convert.files import load_run, number_of, write_run
from fira.data.conversations import Reader, Row
from fira.data.packs import Packs, in_order
from fira.data.sources import inputs
from fira.data.tokenizer import Tokenizer
from fira.files import check_new
from fira.model import build_meta
from fira.model.files import NOTES, assemble
from fira.model.generate import window_length
from fira.model.moe import ExpertLinear
from fira.model.usage import Use, read_use

PLACES = 1 << 17  # of the text that are read to choose
Measure = Callable[[Any, Tokenizer, list[Row]], float]


def trim_run(run: Path, folder: Path, keep: float, text: Sequence[str], chat: Sequence[str],
             general: Sequence[str], measure: Measure, screen: Console,
             skip_bad: bool = False) -> None:
    """Write the newest step of `run` as the new run `folder` with the share `keep` of each layer's
    experts: those that contribute most to the files of text and of conversations. Print bits per
    byte of these, and of general text, before and after, by `measure`.

    Raises ValueError, one line, for a share that keeps no expert or all, and for bad files.
    """
    check_new(folder)
    model, tokenizer, step = load_run(run)
    total, length = model.spec.num_experts, window_length(model)
    if total == 1:
        raise ConfigError(f"{run} is dense: its layers have one expert, which stays; trim another")
    count = round(keep * total) if 0 < keep < 1 else 0
    if not 0 < count < total:
        raise ConfigError(f"--keep {keep:g} must be the share of a layer's {total} experts that "
                          f"stay, from {1 / total:.3g} (one) to {1 - 1 / total:.3g} (all but one)")
    reader = Reader(tokenizer, length + 1, skip_bad)
    texts = {"target": [*(reader.text(inputs(list(text))) if text else ()),
                        *(reader.chat(inputs(list(chat))) if chat else ())]}
    if general:
        texts["general"] = reader.text(inputs(list(general)))
    screen.print(*reader.lines, sep="\n", soft_wrap=True)
    if not texts["target"]:
        raise ValueError(f"no conversation has a first answer that ends within the {length} tokens "
                         f"that {run} reads; give others with --chat, or --text FILES")
    use = read_use(model, in_order(Packs(texts["target"], length), 4, max(1, PLACES // length)),
                   context=True)
    kept = find_salient(use, total, count)
    small = trim(model, kept)
    table = Table("bits per byte", "before", "after", "change", box=None, title_justify="left",
                  title=f"{count} of {total} experts are kept in each layer")
    for name, rows in texts.items():
        old, new = (measure(one, tokenizer, rows) for one in (model, small))
        table.add_row(name, f"{old:.4f}", f"{new:.4f}", f"{new - old:+.4f} ({new / old - 1:+.1%})")
    write_run(folder, small, tokenizer, number_of(step),
              {"stage": "trim", "preset": "trim", "trimmed_from": str(step), "kept": kept})
    screen.print(table)
    screen.print(f"wrote {folder}; every verb reads it as any other run", soft_wrap=True)


def find_salient(use: Use, num_experts: int, count: int) -> list[list[int]]:
    """The `count` experts of each layer that contribute most, ascending."""
    outputs_LE = use.total(use.gates_LNK * use.norms_LNK, num_experts)
    return [sorted(row) for row in outputs_LE.topk(count, dim=1).indices.tolist()]


def trim(model: Any, kept: Sequence[Sequence[int]]) -> Any:
    """A copy with only the experts `kept` of each layer, of which there are as many in every layer.
    Tokens go to at most as many experts as are left; one expert makes a dense model."""
    count, tensors = len(kept[0]), dict[str, torch.Tensor]()
    small = build_meta(model.spec.model_copy(update={
        "num_experts": count, "top_k": min(model.spec.top_k, count)}))
    for name in small.state_dict():
        tensor, owner = model.state_dict()[name], model.get_submodule(name.rpartition(".")[0])
        stacked = isinstance(owner, ExpertLinear) or ".router." in name
        tensors[name] = tensor[kept[int(name.split(".")[1])]] if stacked else tensor.clone()
        if name.endswith("load_share_E"):
            tensors[name] /= tensors[name].sum().clamp(min=1e-9)
    return assemble(small, tensors, {note: getattr(model, note, None) for note in NOTES})
