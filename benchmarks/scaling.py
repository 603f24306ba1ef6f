"""Speed of training with several processes: tokens/s per layout, and time spent waiting.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --json docs/results/scaling.jsonl
    OMP_NUM_THREADS=1 python benchmarks/scaling.py --experts

Every layout is compared with one process: with as many threads as there are processes and the same
global batch (strong scaling), and with one thread and half of the batch (weak scaling). `waiting`
is the share of a step in which the rank waits for collectives. --experts compares seconds of
forward and backward with 4 to 64 experts of equal active size in one process.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import queue as queues
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from record import append

from fira.loss.next_token import next_token_loss
from fira.model.spec import FIRA2Spec
from fira.parallel.layout import Layout
from fira.parallel.mesh import AXES, Mesh, make_mesh
from fira.runtime import keep_large_blocks
from fira.train.optim import OptimConfig, make_optimizer
from fira.train.step import accumulate, finish_step

SHAPE = {"vocab_size": 4096, "d_model": 256, "n_head": 4, "n_kv_head": 2, "head_dim": 64,
         "num_layers": 4, "d_ff": 256, "num_experts": 8, "top_k": 2, "context": 256}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data 2": {"data": 2}, "shard 2": {"shard": 2}, "expert 2": {"expert": 2},
    "pipeline 2, 1f1b": {"pipeline": 2, "schedule": "1f1b"}}


class Batch(NamedTuple):
    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor


def time_steps(layout: Layout, sequences: int, steps: int) -> dict[str, float]:
    """Median seconds of a step on `sequences` of 256 tokens, and the share spent waiting."""
    optimizer = make_optimizer(layout.model, OptimConfig())
    run = layout.forward_backward(accumulate)
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
            loss, count = run(layout.model, cut, next_token_loss)
            finish_step(layout.model, optimizer, loss, count, 1.0, layout.gradient_norm)
            layout.end_step()
            seconds = time.perf_counter() - start
        if step >= 2:
            times.append(seconds)
            waits.append(spent[0])
    return {"seconds": statistics.median(times), "waiting": sum(waits) / sum(times)}


@contextlib.contextmanager
def timed_waits(spent: list[float]) -> Iterator[None]:
    """Add the time in which this rank waits for a collective to spent[0]."""
    wait = dist.Work.wait

    def timed(work: Any, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return wait(work, *arguments, **options)
        finally:
            spent[0] += time.perf_counter() - start

    dist.Work.wait = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]


def run_layouts(rank: int, sequences: int, steps: int) -> dict[str, dict[str, float]]:
    """The times of every layout of two processes, on one of them."""
    found = {}
    for name, layout in LAYOUTS.items():
        sizes = {axis: size for axis, size in layout.items() if axis != "schedule"}
        mesh = make_mesh(dict.fromkeys(AXES, 1) | sizes, rank, torch.device("cpu"))
        found[name] = time_steps(make_layout(mesh, schedule=layout.get("schedule", "1f1b")),
                                 sequences, steps)
    return found


def make_layout(mesh: Mesh, schedule: str = "1f1b", **shape: int) -> Layout:
    return Layout(mesh, FIRA2Spec(**SHAPE | shape), 0, schedule)


def time_one_process(threads: int, sequences: int, steps: int) -> float:
    torch.set_num_threads(threads)
    return time_steps(make_layout(Mesh()), sequences, steps)["seconds"]


def compare_layouts(arguments: argparse.Namespace) -> None:
    batch, steps = arguments.sequences, arguments.steps
    strong, weak = time_one_process(2, batch, steps), time_one_process(1, batch // 2, steps)
    found = on_ranks(2, run_layouts, batch, steps)[0]
    print(f"one process: 2 threads {strong:.3f} s, 1 thread on half the batch {weak:.3f} s")
    print(f"{'layout':24} {'s/step':>7} {'tokens/s':>9} {'strong':>7} {'weak':>6} {'waiting':>8}")
    for name, row in found.items():
        row |= {"strong": strong / row["seconds"], "weak": weak / row["seconds"],
                "tokens_per_second": batch * 256 / row["seconds"]}
        print(f"{name:24} {row['seconds']:7.3f} {row['tokens_per_second']:9,.0f} "
              f"{row['strong']:7.2f} {row['weak']:6.2f} {row['waiting']:8.1%}", flush=True)
    if arguments.json:
        append(Path(arguments.json), {"one_process": strong, "half_batch": weak, "layouts": found,
                                      "sequences": batch})


def compare_experts(arguments: argparse.Namespace) -> None:
    """Steps alternate, so that a change of the machine's speed affects all alike."""
    torch.set_num_threads(arguments.threads)
    runs = {experts: make_layout(Mesh(), num_experts=experts) for experts in (4, 8, 16, 32, 64)}
    times: dict[int, list[float]] = {experts: [] for experts in runs}
    for step in range(arguments.steps + 1):
        ids = torch.randint(0, 4096, (arguments.sequences, 257))
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        for experts, layout in runs.items():
            start = time.perf_counter()
            accumulate(layout.model.train(), [batch], next_token_loss)
            if step:
                times[experts].append(time.perf_counter() - start)
            layout.model.zero_grad()
    seconds = {experts: statistics.median(each) for experts, each in times.items()}
    for experts, each in seconds.items():
        print(f"{experts:3} experts {each:.3f} s  {each / seconds[4]:.2f} of 4 experts")
    if arguments.json:
        append(Path(arguments.json), {"experts": seconds, "sequences": arguments.sequences})


def on_ranks(world: int, work: Callable[..., Any], *arguments: Any,
             seconds: float = 600) -> list[Any]:
    """[work(rank, *arguments) for every rank]; each rank is a process with one thread."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_enter, args=(rank, world, port, queue, work, arguments))
                 for rank in range(world)]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < world:
            rank, result = queue.get(timeout=seconds)
            found[rank] = result
    except queues.Empty:
        codes = [process.exitcode for process in processes]
        raise RuntimeError(f"no result from {world - len(found)} of {world} ranks within "
                           f"{seconds:g} s; exit codes {codes}") from None
    finally:
        for process in processes:
            process.join(30)
            process.kill()
    return [found[rank] for rank in range(world)]


def _enter(rank: int, world: int, port: int, queue: Any, work: Callable[..., Any],
           arguments: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    keep_large_blocks()
    dist.init_process_group("gloo", rank=rank, world_size=world)
    queue.put((rank, work(rank, *arguments)))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, default=16, help="of 256 tokens, in a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="with --experts")
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    keep_large_blocks()
    (compare_experts if arguments.experts else compare_layouts)(arguments)


if __name__ == "__main__":
    main()
