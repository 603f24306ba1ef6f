"""What more processes give: tokens/s per layout, weak and strong, and time spent in communication.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --json docs/results/scaling.jsonl
    OMP_NUM_THREADS=1 python benchmarks/scaling.py --experts

The base is one process with as many threads as there are processes, on the same global batch
(strong), and one process with one thread on its share of it (weak). `waiting` is the share of a
step in which the rank waits for others. --experts: seconds of forward and
backward at 4 to 64 experts of equal active size on one process.
"""
from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fira.train.step import finish_step
from ranks import on_ranks
from record import append

from fira.loss.head import Batch, next_token_loss
from fira.model import build_meta
from fira.model.spec import FIRA2Spec
from fira.parallel.layout import Layout
from fira.parallel.mesh import AXES, Mesh, make_mesh
from fira.runtime import keep_large_blocks
from fira.train.optim import OptimConfig, make_optimizer

SHAPE = {"vocab_size": 4096, "d_model": 256, "n_head": 4, "n_kv_head": 2, "head_dim": 64,
         "num_layers": 4, "d_ff": 256, "num_experts": 8, "top_k": 2, "context": 256}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data 2": {"data": 2}, "shard 2": {"shard": 2}, "expert 2": {"expert": 2},
    "pipeline 2": {"pipeline": 2}}


def steps_of(layout: Layout, sequences: int, steps: int) -> dict[str, float]:
    """Median seconds of a step on `sequences` of 256, and of them in collectives."""
    optimizer = make_optimizer(layout.model, OptimConfig())
    spent = [0.0]
    times, waits = [], []
    layout.model.train()
    for step in range(steps + 2):
        ids = torch.randint(0, 4096, (sequences, 257),
                            generator=torch.Generator().manual_seed(step))[layout.rows(sequences)]
        cut = [Batch(ids[i:i + 2, :-1].contiguous(), ids[i:i + 2, 1:].contiguous())
               for i in range(0, len(ids), 2)]
        layout.mesh.wait()
        spent[0] = 0.0
        with timed_waits(spent):
            start = time.perf_counter()
            loss, _ = layout.forward_backward(cut, next_token_loss)
            finish_step(layout.model, optimizer, loss, 1.0, layout.gradient_norm())
            layout.end_step()
            seconds = time.perf_counter() - start
        if step >= 2:
            times.append(seconds)
            waits.append(spent[0])
    return {"seconds": statistics.median(times), "waiting": sum(waits) / sum(times)}


@contextlib.contextmanager
def timed_waits(spent: list[float]) -> Iterator[None]:
    """Adds up the time in which this rank waits for a collective, whoever began it."""
    wait = dist.Work.wait

    def timed(work: Any, *words: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return wait(work, *words, **options)
        finally:
            spent[0] += time.perf_counter() - start

    dist.Work.wait = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]


def run_jobs(rank: int, jobs: list[Any], steps: int) -> dict[str, dict[str, float]]:
    found = {}
    for name, sizes, sequences in jobs:
        mesh = make_mesh(dict.fromkeys(AXES, 1) | sizes, rank, torch.device("cpu"))
        found[name] = steps_of(Layout(mesh, build_meta(FIRA2Spec(**SHAPE)), 0), sequences, steps)
    return found


def alone(threads: int, sequences: int, steps: int) -> float:
    torch.set_num_threads(threads)
    return steps_of(Layout(Mesh(), build_meta(FIRA2Spec(**SHAPE)), 0), sequences, steps)["seconds"]


def compare_layouts(arguments: argparse.Namespace) -> None:
    batch = arguments.sequences
    strong, weak = alone(2, batch, arguments.steps), alone(1, batch // 2, arguments.steps)
    jobs = [(name, sizes, batch) for name, sizes in LAYOUTS.items()]
    found = on_ranks(2, run_jobs, jobs, arguments.steps)[0]
    print(f"one process: 2 threads {strong:.3f} s, 1 thread on half the batch {weak:.3f} s")
    print(f"{'layout':24} {'s/step':>7} {'tokens/s':>9} {'strong':>7} {'weak':>6} {'waiting':>8}")
    for name, row in found.items():
        row |= {"strong": strong / row["seconds"], "weak": weak / row["seconds"],
                "tokens_per_second": batch * 256 / row["seconds"]}
        print(f"{name:24} {row['seconds']:7.3f} {row['tokens_per_second']:9,.0f} "
              f"{row['strong']:7.2f} {row['weak']:6.2f} {row['waiting']:8.1%}", flush=True)
    if arguments.json:
        append(Path(arguments.json), {"one_process": strong, "half_batch": weak,
                                      "layouts": found, "sequences": batch})


def compare_experts(arguments: argparse.Namespace) -> None:
    """Steps take turns, so that a change of the machine's speed hits all alike."""
    torch.set_num_threads(arguments.threads)
    runs = {}
    for experts in (4, 8, 16, 32, 64):
        shape = SHAPE | {"num_experts": experts, "top_k": 2}
        runs[experts] = Layout(Mesh(), build_meta(FIRA2Spec(**shape)), 0)
    times: dict[int, list[float]] = {experts: [] for experts in runs}
    for step in range(arguments.steps + 1):
        ids = torch.randint(0, 4096, (arguments.sequences, 257))
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        for experts, layout in runs.items():
            start = time.perf_counter()
            layout.model.train()
            layout.forward_backward([batch], next_token_loss)
            if step:
                times[experts].append(time.perf_counter() - start)
            layout.model.zero_grad()
    seconds = {experts: statistics.median(each) for experts, each in times.items()}
    for experts, each in seconds.items():
        print(f"{experts:3} experts {each:.3f} s  {each / seconds[4]:.2f} of 4 experts")
    if arguments.json:
        append(Path(arguments.json), {"experts": seconds, "sequences": arguments.sequences})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=int, default=16, help="of 256 tokens, a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="with --experts")
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--json")
    given = parser.parse_args()
    keep_large_blocks()
    (compare_experts if given.experts else compare_layouts)(given)
