"""What more processes give: tokens/s per layout, weak and strong, and time spent in communication.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --json docs/results/scaling.jsonl
    OMP_NUM_THREADS=1 python benchmarks/scaling.py --experts

The base is one process with as many threads as there are processes, on the same global batch
(strong), and one process with one thread on its share of it (weak). `waiting` is the share of a
step in which a process waits for another. --experts: seconds of forward and backward at 4 to 64
experts of equal active size on one process.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from record import append, new_parser, time_in_turns
from train_step import training_step

from fira.data.batches import Batch
from fira.loss.head import next_token_loss
from fira.model import build_meta
from fira.model.spec import FIRA2Spec
from fira.parallel.layout import Layout
from fira.parallel.mesh import AXES, Mesh, make_mesh
from fira.runtime import keep_large_blocks
from fira.train.optim import OptimConfig

SHAPE = {"vocab_size": 4096, "d_model": 256, "n_head": 4, "n_kv_head": 2, "head_dim": 64,
         "num_layers": 4, "d_ff": 256, "num_experts": 8, "top_k": 2, "context": 256}
LAYOUTS = {"data 2": {"data": 2}, "shard 2": {"shard": 2}, "expert 2": {"expert": 2},
           "pipeline 2": {"pipeline": 2}}


def new_layout(mesh: Mesh, **settings: int) -> Layout:
    return Layout(mesh, build_meta(FIRA2Spec(**SHAPE | settings)), seed=0)


def steps_of(layout: Layout, sequences: int, steps: int) -> dict[str, float]:
    """Median seconds of a step on `sequences` of 256, and the share of them spent waiting."""
    step, times, waits = training_step(layout, OptimConfig()), [], []
    for number in range(steps + 2):
        ids = torch.randint(0, 4096, (sequences, 257),
                            generator=torch.Generator().manual_seed(number))
        layout.mesh.wait()
        with timed_waits() as spent:
            start = time.perf_counter()
            step(ids[layout.rows(sequences)].split(2))
            times.append(time.perf_counter() - start)
        waits.append(sum(spent))
    return {"seconds": statistics.median(times[2:]), "waiting": sum(waits[2:]) / sum(times[2:])}


@contextlib.contextmanager
def timed_waits() -> Iterator[list[float]]:
    """The seconds of every wait of this process for a collective, whatever code began it."""
    wait, spent = dist.Work.wait, []

    def timed(work: Any, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return wait(work, *arguments, **options)
        finally:
            spent.append(time.perf_counter() - start)

    dist.Work.wait = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]


def run_layouts(rank: int, world: int, folder: str, sequences: int, steps: int) -> None:
    """Measure every layout as one of `world` processes; the first one writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    found = {}
    for name, sizes in LAYOUTS.items():
        mesh = make_mesh(dict.fromkeys(AXES, 1) | sizes, rank, torch.device("cpu"))
        found[name] = steps_of(new_layout(mesh), sequences, steps)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def alone(threads: int, sequences: int, steps: int) -> float:
    torch.set_num_threads(threads)
    return steps_of(new_layout(Mesh()), sequences, steps)["seconds"]


def compare_layouts(arguments: argparse.Namespace) -> None:
    batch = arguments.sequences
    strong, weak = alone(2, batch, arguments.steps), alone(1, batch // 2, arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_layouts, (2, folder, batch, arguments.steps), nprocs=2)
        found = json.loads(Path(folder, "found.json").read_text())
    print(f"one process: 2 threads {strong:.3f} s, 1 thread on half the batch {weak:.3f} s")
    print(f"{'layout':24} {'s/step':>7} {'tokens/s':>9} {'strong':>7} {'weak':>6} {'waiting':>8}")
    for name, row in found.items():
        row |= {"strong": strong / row["seconds"], "weak": weak / row["seconds"],
                "tokens_per_second": batch * 256 / row["seconds"]}
        print(f"{name:24} {row['seconds']:7.3f} {row['tokens_per_second']:9,.0f} "
              f"{row['strong']:7.2f} {row['weak']:6.2f} {row['waiting']:8.1%}", flush=True)
    append(arguments.json, {"one_process": strong, "half_batch": weak, "layouts": found,
                            "sequences": batch})


def compare_experts(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    ids = torch.randint(0, 4096, (arguments.sequences, 257))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def forward_backward(layout: Layout) -> None:
        layout.model.train().zero_grad()
        layout.forward_backward([batch], next_token_loss)

    sides = {str(experts): functools.partial(forward_backward,
                                             new_layout(Mesh(), num_experts=experts))
             for experts in (4, 8, 16, 32, 64)}
    seconds = {experts: statistics.median(times)
               for experts, times in time_in_turns(sides, arguments.steps).items()}
    for experts, median in seconds.items():
        print(f"{experts:>3} experts {median:.3f} s  {median / seconds['4']:.2f} of 4 experts")
    append(arguments.json, {"experts": seconds, "sequences": arguments.sequences})


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--sequences", type=int, default=16,
                        help="sequences of 256 tokens in a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="with --experts")
    parser.add_argument("--experts", action="store_true")
    options = parser.parse_args()
    keep_large_blocks()
    (compare_experts if options.experts else compare_layouts)(options)


if __name__ == "__main__":
    main()
