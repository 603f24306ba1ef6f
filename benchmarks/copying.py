"""In-context copying: how much less a passage costs when it is read a second time.

A model without induction heads (Olsson et al. 2022) gains little from having read the same words
before; with good ones it predicts them almost surely.

    python benchmarks/copying.py out/small --text held_out.txt
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from record import append

from fira.data.sources import inputs
from fira.data.text import items
from fira.infer.load import load
from fira.loss.head import token_losses
from fira.model.generate import window_length

PASSAGES = 64  # of the text's beginning
ROWS = 8       # passages at a time


@torch.inference_mode()
def copying(run: str, sources: list[str], device: str = "auto") -> dict[str, Any]:
    """Nats per token of passages when first read and when read again, of a run's newest step.

    A passage is half as long as the model reads; the first quarter of it is not counted, either
    time. Raises ValueError if no document is as long as a passage, or a passage has no two tokens.
    """
    model, tokenizer, folder = load(run, device)
    length, where = window_length(model) // 2, next(model.parameters()).device
    if length < 2:
        raise ValueError(f"{folder} reads {window_length(model)} tokens at a time, too few to hold "
                         "a passage twice; use a model that reads 4 or more")
    passages = [ids for ids, _ in zip(_passages(tokenizer, sources, length), range(PASSAGES),
                                      strict=False)]
    if not passages:
        raise ValueError(f"no document has {length} tokens, half of what {folder} reads; give "
                         "longer text")
    first = again = 0.0
    for rows in torch.tensor(passages).split(ROWS):
        ids_BT = torch.cat([rows, rows], dim=1).to(where)
        losses_BT = token_losses(model.features(ids_BT[:, :-1]), *model.head_weights(),
                                 ids_BT[:, 1:]).double()  # of the token after place t at t
        first += float(losses_BT[:, length // 4:length - 1].mean(1).sum())
        again += float(losses_BT[:, length + length // 4:].mean(1).sum())
    return {"passages": len(passages), "passage_tokens": length,
            "nats_per_token_first": first / len(passages),
            "nats_per_token_again": again / len(passages)}


def _passages(tokenizer: Any, sources: list[str], length: int) -> Iterator[list[int]]:
    """`length` tokens that follow each other in one document."""
    ids: list[int] = []
    for item in items(inputs(sources)):
        ids += tokenizer.encode(item.text)
        while len(ids) >= length:
            yield ids[:length]
            ids = ids[length:]
        if item.ends:
            ids = []


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--text", action="append", required=True, help="held-out text")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, default=Path("docs/results/copying.jsonl"))
    options = parser.parse_args()
    print(f"{'run':30}{'passages':>10}{'first':>10}{'again':>10}  nats per token")
    for run in options.runs:
        found = copying(run, options.text, options.device)
        print(f"{run:30}{found['passages']:10}{found['nats_per_token_first']:10.3f}"
              f"{found['nats_per_token_again']:10.3f}")
        append(options.json, {"run": run, "text": options.text, **found})


if __name__ == "__main__":
    main()
