"""In-context copying (Olsson et al. 2022), the speed of tasks against lm-eval's own backend, and
two kinds of model on suites, for example MoE and dense, each trained with several seeds.

    python benchmarks/run_scores.py out/small --text held_out.txt
    python benchmarks/run_scores.py out/small --task sets/arc_easy.test.jsonl
    python benchmarks/run_scores.py moe-1 moe-2 --against dense-1 dense-2 --suite commonsense \
        --data sets --keep results

The last prints a table in Markdown. Runs of one place in both lists have the same seed. The results
of each run are kept in --keep, so that the same command goes on where it stopped. The square of an
interval's width is that of the mean over items, or passages, plus that of the mean over seeds (Zou
and Donner 2008).
"""
from __future__ import annotations

import argparse
import math
import statistics
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
from fira.eval.measure import mean, measure
from fira.eval.score import encode_rows, score
from fira.eval.statistics import difference, student
from fira.eval.suites import open_task
from fira.infer.load import load
from fira.loss.head import token_losses
from fira.model.generate import window_length
from fira.runtime import keep_large_blocks

PASSAGES = 64  # of the text's beginning
ROWS = 8       # passages at a time
TASK_ROWS, REPEATS = 400, 3
CELLS = {"item_bits": (1, 4), "correct": (100, 1)}  # result: factor and digits to print


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
    keep_large_blocks()
    peer = HFLM(pretrained=str(scratch / "hf"), device="cpu", batch_size=16, dtype="float32")
    rows = open_task("task", file, TASK_ROWS).rows
    requests = [Instance("loglikelihood", {}, ("<|endoftext|>" * bool(context) + context, end), n)
                for row in rows for n, (context, end) in enumerate(row.options)]
    found: dict[str, Any] = {}
    seconds = time_in_turns({
        "fira": lambda: found.update(ours=score(model, encode_rows(
            tokenizer, rows, model.spec.context).rows)),
        "lm-eval": lambda: found.update(theirs=peer.loglikelihood(requests, disable_tqdm=True))},
                            repeats=REPEATS)
    ours = [-cost_P2[:, 0].sum() for costs in found["ours"] for cost_P2 in costs]
    return {"requests": len(requests), "threads": torch.get_num_threads(), "seconds": seconds,
            "times_as_fast": min(seconds["lm-eval"]) / min(seconds["fira"]), "difference": max(
                abs(mine - other) for mine, (other, _) in zip(ours, found["theirs"], strict=True))}


def measure_all(runs: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The suites of the results of each run."""
    targets = [options.keep / f"{Path(run).resolve().name}.json" for run in runs]
    options.keep.mkdir(parents=True, exist_ok=True)
    return [measure(run, options.suite, [], options.data, target, options.limit, target.is_file(),
                    screen=Console(stderr=True))["suites"]
            for run, target in zip(runs, targets, strict=True)]


def difference_over_seeds(first: list[dict[str, Any]], second: list[dict[str, Any]],
                          key: str) -> dict[str, float] | None:
    """Means of both kinds over the seeds of a task, and their difference with its 95% interval."""
    ours, theirs = ([value for task in tasks for value in task[key]] for tasks in (first, second))
    labels = [group or f"item {number}" for task in first
              for number, group in enumerate(task["groups"])]
    items = difference(ours, theirs, labels, bounded=key == "correct")
    if items is None:
        return None
    seeds = [mean(one[key]) - mean(other[key]) for one, other in zip(first, second, strict=True)]
    spread = len(seeds) > 1 and student(len(seeds) - 1) * statistics.stdev(seeds) / math.sqrt(
        len(seeds))
    return {"first": mean(ours), "second": mean(theirs), "difference": items.mean,
            "half": math.hypot(items.half, spread), "parts": [items.half, float(spread)]}


def suite_rows(first: list[dict[str, Any]], second: list[dict[str, Any]],
               suite: str) -> dict[str, Any]:
    """For each task of a suite, and for their mean, what `difference_over_seeds` finds, and of how
    many runs of each kind the accuracy is at chance. Tasks share seeds but no items."""
    rows: dict[str, Any] = {}
    for name in first[0][suite]["tasks"]:
        kinds = [[run[suite]["tasks"][name] for run in runs] for runs in (first, second)]
        rows[name] = {"n": kinds[0][0]["n"], "at_chance": [
            sum(task["at_chance"] for task in tasks) for tasks in kinds],
            **{key: difference_over_seeds(*kinds, key) for key in CELLS}}
    whole: dict[str, Any] = {"n": sum(row["n"] for row in rows.values()), "at_chance": None}
    for key in CELLS:
        found = [row[key] for row in rows.values() if row[key]]
        if found:
            # Items of tasks are independent; tasks share the seeds, whose errors may add up.
            items, seeds = ([one["parts"][place] / len(found) for one in found] for place in (0, 1))
            whole[key] = {"half": math.hypot(*items, sum(seeds))} | {
                side: sum(one[side] for one in found) / len(found)
                for side in ("first", "second", "difference")}
    return {**rows, f"mean of {suite}": whole}


def print_table(rows: dict[str, Any], seeds: int) -> None:
    print("| task | n | bits per byte | against | difference | right | against | difference | at "
          f"chance, of {seeds} and {seeds} |\n|{'---|' * 9}")
    for name, row in rows.items():
        cells = []
        for key, (factor, digits) in CELLS.items():
            one = row.get(key)
            cells += [f"{factor * one[side]:.{digits}f}" for side in ("first", "second")] + [
                f"{factor * one['difference']:+.{digits}f} ± {factor * one['half']:.{digits}f}"
                ] if one else ["-"] * 3
        chance = ", ".join(map(str, row["at_chance"])) if row["at_chance"] else ""
        print(f"| {name} | {row['n']:,} | {' | '.join(cells)} | {chance} |")


def compare_kinds(options: argparse.Namespace) -> None:
    """Print and record the table of every suite."""
    if len(options.runs) != len(options.against):
        raise ValueError(f"{len(options.runs)} runs and {len(options.against)} after --against; "
                         "give one of each kind for every seed")
    first, second = (measure_all(runs, options) for runs in (options.runs, options.against))
    tables = {suite: suite_rows(first, second, suite) for suite in options.suite}
    for rows in tables.values():
        print_table(rows, len(first))
    append(options.json, {"runs": options.runs, "against": options.against, "tables": tables})


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--text", action="append", default=[], help="held-out text")
    parser.add_argument("--task", help="file of a published set, to score beside lm-eval")
    parser.add_argument("--against", nargs="+", default=[], help="runs of the other kind")
    parser.add_argument("--suite", action="append", default=[], help="suite of standard sets")
    parser.add_argument("--data", default=".", help="folder with the files of the suites")
    parser.add_argument("--limit", type=int, help="rows of each task")
    parser.add_argument("--keep", type=Path, default=Path("out/scores"), help="results of each run")
    options = parser.parse_args()
    if options.against:
        compare_kinds(options)
        return
    for run in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            found = compare(run, options.task, Path(folder)) if options.task else copying(
                run, options.text)
        print(run, *(f"{name}: {value}" for name, value in found.items()), sep="\n  ")
        append(options.json, {"run": run, "text": options.text, "task": options.task, **found})


if __name__ == "__main__":
    main()
