r"""Distilling language: how much of a MoE's gain a dense student keeps, what a smaller MoE loses,
and what the models cost on a small device. Reads finished runs, one of each kind for every seed:

    python benchmarks/distil.py --moe moe-1 moe-2 --dense dense-1 dense-2 --student s-1 s-2
    python benchmarks/distil.py --moe moe-1 moe-2 --trimmed half-1 half-2
    python benchmarks/distil.py --edge moe-1 dense-1 s-1 half-1
    python benchmarks/distil.py --step moe-1 --student s-1

`fira data` prepares the text; then for each seed S, one after the other on an idle machine:

    fira train small data.folder=DATA train.seed=S --run moe-S
    DENSE="model.num_experts=1 model.top_k=1 model.d_ff=128 train.seed=S"
    fira train small data.folder=DATA $DENSE --run dense-S
    fira train small data.folder=DATA $DENSE train.minutes=40 --run dense-long-S
    fira distill moe-S --student small --data DATA --ce 0 $DENSE --run s-S
    fira trim moe-S trim-S --keep 0.5 --text TRAINING_TEXT
    fira distill moe-S --student trim-S --data DATA --ce 0 train.minutes=5 optim.lr=0.0025 \
        optim.router_lr=0.0025 optim.embedding_lr=0.02 schedule.decay=1.0 --run half-S

A student begun with the teacher's weights is one of `fira trim --keep 0.03125`. Twenty minutes of
the student hold the teacher's forward passes. With dense-S, student and baseline have equal
wall-clock time; with dense-long-S, equal compute in total, as the teacher's training counts too.
What is kept is (dense - student) / (dense - MoE) of the final bits per byte, the ratio of means
over seeds; its 95% interval is by linearization. --step times a training step with and without a
teacher, in turns.
"""
from __future__ import annotations

import argparse
import copy
import functools
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import decode
import torch
from arms import final_score, mean_and_deviation
from record import append, new_parser, time_in_turns

from fira.convert import gguf
from fira.convert.quantize import quantize
from fira.data.batches import Batch
from fira.eval.statistics import student as quantile
from fira.files import read_json
from fira.infer.load import load
from fira.loss.distill import distillation_loss
from fira.loss.head import next_token_loss
from fira.parallel.mesh import Mesh
from fira.report.read import read_run
from fira.runtime import keep_large_blocks
from fira.stages.distill import open_teacher

SIDES = {"engine, torch step": lambda model, *rest: decode.engine_side(model),
         "fp32": decode.fused_side, "int8": decode.int8_side,
         "llama.cpp": functools.partial(decode.llama_side, kind="q8_0")}


def ratio(tops: Sequence[float], bottoms: Sequence[float]) -> tuple[float, float]:
    """mean(tops) / mean(bottoms) over seeds, and half of its 95% interval (0 for one seed)."""
    count, found = len(tops), statistics.mean(tops) / statistics.mean(bottoms)
    if count == 1:
        return found, 0.0
    spread = statistics.stdev(top - found * bottom
                              for top, bottom in zip(tops, bottoms, strict=True))
    return found, abs(quantile(count - 1) * spread / math.sqrt(count) / statistics.mean(bottoms))


def scores(runs: Sequence[str]) -> list[float]:
    return [final_score(read_run(run)) for run in runs]


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Print and return what is kept, and what is lost, of the bits per byte."""
    kinds = {name: scores(getattr(options, name)) for name in ("moe", "dense", "student", "trimmed")
             if getattr(options, name)}
    for name, found in kinds.items():
        print(f"{name}: {mean_and_deviation(found)} bits per byte, {len(found)} seeds")
    pairs = {}
    if {"moe", "dense", "student"} <= kinds.keys():
        bottoms = [dense - moe for dense, moe in zip(kinds["dense"], kinds["moe"], strict=True)]
        tops = [dense - own for dense, own in zip(kinds["dense"], kinds["student"], strict=True)]
        pairs["share of the gain that the student keeps (goal 0.5)"] = tops, bottoms
    if {"moe", "trimmed"} <= kinds.keys():
        lost = [own - moe for own, moe in zip(kinds["trimmed"], kinds["moe"], strict=True)]
        pairs["bits per byte that the smaller MoE loses (goal 0.02)"] = lost, [1.0] * len(lost)
    found = {name: ratio(*pair) for name, pair in pairs.items()}
    for name, (value, half) in found.items():
        print(f"{name}: {value:.4f} ± {half:.4f}")
    return {"scores": kinds, "results": found}


def time_steps(teacher: str, student: str, repeats: int = 5) -> dict[str, Any]:
    """Seconds of forward and backward passes of a micro-batch, plain and with the teacher."""
    keep_large_blocks()
    config = read_json(Path(student) / "config.json", "give a run")["config"]
    _, _, folder = load(teacher, "cpu")
    teach, train = open_teacher(folder, Mesh()), config["train"]
    model = load(student, "cpu").model.train()
    ids_BT = torch.randint(model.spec.vocab_size, (train["micro_batch"],
                                                   train["sequence_length"] + 1))
    batch = Batch(ids_BT[:, :-1], ids_BT[:, 1:].contiguous())

    def step(loss_fn: Any) -> None:
        loss_fn(model, batch)[0].backward()
        model.zero_grad(set_to_none=True)

    losses = {"plain": next_token_loss, "distil": distillation_loss(teach, ce=0.5)}
    seconds = time_in_turns({name: functools.partial(step, one) for name, one in losses.items()}
                            | {"teacher": functools.partial(teach, batch)}, repeats)
    best = {name: min(found) for name, found in seconds.items()}
    print(f"a step with the teacher takes {best['distil'] / best['plain']:.2f} times as long; its "
          f"forward pass {best['teacher'] / best['plain']:.2f} of the plain step")
    return {"seconds": seconds}


def edge(runs: Sequence[str], repeats: int) -> dict[str, Any]:
    """Print and return sizes (GGUF and llama.cpp: Q8_0), and tokens/s of one greedy stream."""
    torch.set_num_threads(1)
    print("| run | bits per byte | MB: fp32 | int8 | GGUF | tokens/s: fp32 | int8 | llama.cpp |"
          f"\n|{'---|' * 8}")
    rows = {}
    for run in runs:
        model, tokenizer, _ = load(run, "cpu")
        wanted = argparse.Namespace(threads=1, new=48, prompt=64, repeats=repeats)
        with tempfile.TemporaryDirectory() as scratch:
            gguf.write_model(model, tokenizer, Path(scratch) / "size.gguf", "q8_0")
            sizes = {"fp32": stored(model), "int8": stored(quantize(copy.deepcopy(model), "int8")),
                     "gguf": (Path(scratch) / "size.gguf").stat().st_size}
            made = {name: make(model, wanted, Path(scratch)) for name, make in SIDES.items()}
            speeds = {name: found["decode"] for name, found in decode.compare(made, wanted).items()}
        score = scores([run])[0] if (Path(run) / "metrics.jsonl").exists() else None
        rows[run] = {"bits_per_byte": score, "bytes": sizes, "tokens_per_second": speeds}
        print(f"| {run} | {'-' if score is None else f'{score:.4f}'} | ", " | ".join(
            [f"{size / 1e6:.2f}" for size in sizes.values()]
            + [f"{speeds[name]:.0f}" for name in list(SIDES)[1:]]), "|")
    return rows


def stored(model: Any) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def main() -> None:
    parser = new_parser(__doc__)
    for name in ("moe", "dense", "student", "trimmed", "edge"):
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar="RUN")
    parser.add_argument("--step", metavar="RUN", help="teacher of which a step is timed")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each side")
    options = parser.parse_args()
    found = (time_steps(options.step, options.student[0], options.repeats) if options.step else
             edge(options.edge, options.repeats) if options.edge else compare(options))
    append(options.json, found)


if __name__ == "__main__":
    main()
