"""Does attention copy? A passage read twice in a row costs less the second time.

A model without induction heads (Olsson et al. 2022) gains little from having read the same words
before; with good ones it predicts them almost surely.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fira.data.sources import inputs
from fira.data.text import items
from fira.infer.load import load
from fira.loss.head import head_token_losses
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
                         "a passage twice; leave out --copying")
    passages = [ids for ids, _ in zip(_passages(tokenizer, sources, length), range(PASSAGES),
                                      strict=False)]
    if not passages:
        raise ValueError(f"no document has {length} tokens, half of what {folder} reads; give "
                         "longer text, or leave out --copying")
    first = again = 0.0
    for rows in torch.tensor(passages).split(ROWS):
        ids = torch.cat([rows, rows], dim=1).to(where)
        losses_BT = model(ids[:, :-1], targets_BT=ids[:, 1:].contiguous(), loss=head_token_losses)
        losses_BT = losses_BT.double()  # of the token after place t at t
        first += float(losses_BT[:, length // 4:length - 1].mean(1).sum())
        again += float(losses_BT[:, length + length // 4:].mean(1).sum())
    return {"passages": len(passages), "passage_tokens": length,
            "nats_per_token_first": first / len(passages),
            "nats_per_token_again": again / len(passages)}


def _passages(tokenizer: Any, sources: list[str], length: int) -> Iterator[list[int]]:
    """Pieces of `length` tokens, each of one document."""
    ids: list[int] = []
    for item in items(inputs(sources)):
        ids += tokenizer.encode(item.text)
        while len(ids) >= length:
            yield ids[:length]
            ids = ids[length:]
        if item.ends:
            ids = []
