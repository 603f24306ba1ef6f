"""An adapter in another form: merged into the weights of its base.

    W + SCALE * B A          of every adapted matrix; of a token's row, W + delta

Merged weights are rounded once, to float32. Text that the model itself writes shows whether that,
or a mistake, changed what the model computes.
"""
from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fira.convert.files import Loaded, load_run, number_of, write_run
from fira.convert.quantize import dequantized, load_model
from fira.files import check_new
from fira.model.adapter import adapters, merge
from fira.model.files import CONFIG, read_config

LIMIT = 1e-5  # largest difference of two logits that rounding the merged weights may make
TOKENS = 64  # of the model's own text


def load_adapted(run: Path) -> Loaded:
    """A run whose adapter stands beside its base. Raises ValueError, one line, if it has none."""
    loaded = load_run(run, partial(load_model, merged=False))
    if not adapters(loaded.model):
        raise ValueError(f"{loaded.folder} holds a whole model and no adapter; use it as it is")
    return loaded


def merge_run(run: Path, folder: Path, screen: Console) -> None:
    """Write the adapted model of `run` as the new run `folder`, whole and in float32.

    Raises ValueError, one line, and writes nothing, if there is no adapter or if a logit of the
    merged model differs by more than LIMIT from the adapted model's.
    """
    check_new(folder)
    adapted, tokenizer, step = load_adapted(run)
    merged = merge(copy.deepcopy(dequantized(adapted)).float())
    difference = compare(adapted, merged)
    if not difference <= LIMIT:  # also refuses NaN
        raise ValueError(f"a logit of the merged model differs by {difference:.2g} from that of "
                         f"{step}, more than {LIMIT:g}; use the adapter as it is, unmerged: fira "
                         f"chat {run}")
    base = read_config(step / CONFIG)[1]["base"]["path"]
    write_run(folder, merged, tokenizer, number_of(step),
              {"stage": "export", "preset": "merge", "from": base, "merged_from": str(step)})
    screen.print(f"wrote {folder}; logits differ by at most {difference:.1e} from the adapted "
                 "model's", soft_wrap=True)


@torch.inference_mode()
def compare(adapted: Any, merged: Any) -> float:
    """The largest difference of two logits on text that `adapted` writes: in float64, in which
    only the weights differ, not the roundings of two orders of computing."""
    tokens_BT = adapted.generate([[adapted.end_of_text]], TOKENS, seed=0, end_of_text=-1)
    tokens_BT = tokens_BT[:, -adapted.spec.context:]
    before, after = (copy.deepcopy(model).double()(tokens_BT) for model in (adapted, merged))
    return (before - after).abs().max().item()
