"""In-context copying (Olsson et al. 2022), and the speed of tasks against lm-eval's own backend.

    python benchmarks/run_scores.py out/small --text held_out.txt
    python benchmarks/run_scores.py out/small --task sets/arc_easy.test.jsonl
"""
from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from record import append, new_parser, time_in_turns
from rich.console import Console

from fira.convert.hf import export_run
from fira.data.sources import inputs
from fira.data.text import items
from fira.eval.score import encode_rows, score
from fira.eval.suites import open_task
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


def compare(run: str, file: str, scratch: Path) -> dict[str, Any]:
    """Seconds of both sides, and the largest difference of a log-probability."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    model, tokenizer, _ = load(run, "cpu")
    export_run(Path(run), scratch / "hf", None, Console(quiet=True))
    peer = HFLM(pretrained=str(scratch / "hf"), device="cpu", batch_size=16, dtype="float32")
    rows = open_task("task", file, 200).rows
    requests = [Instance("loglikelihood", {}, ("<|endoftext|>" * bool(context) + context, end), n)
                for row in rows for n, (context, end) in enumerate(row.options)]
    found: dict[str, Any] = {}
    seconds = time_in_turns({
        "fira": lambda: found.update(ours=score(model, encode_rows(
            tokenizer, rows, model.spec.context).rows)),
        "lm-eval": lambda: found.update(theirs=peer.loglikelihood(requests, disable_tqdm=True))},
                            repeats=1, warm_up=0)
    ours = [-cost_P2[:, 0].sum() for costs in found["ours"] for cost_P2 in costs]
    return {"requests": len(requests), "seconds": seconds, "difference": max(
        abs(mine - other) for mine, (other, _) in zip(ours, found["theirs"], strict=True))}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--text", action="append", default=[], help="held-out text")
    parser.add_argument("--task", help="file of a published set, to score beside lm-eval")
    options = parser.parse_args()
    for run in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            found = compare(run, options.task, Path(folder)) if options.task else copying(
                run, options.text)
        print(run, *(f"{name}: {value}" for name, value in found.items()), sep="\n  ")
        append(options.json, {"run": run, "text": options.text, "task": options.task, **found})


if __name__ == "__main__":
    main()
