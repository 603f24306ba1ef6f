"""What keeping freed memory gains a CPU training step: glibc's default against `keep_large_blocks`.

Two processes, one with each setting, take steps in turn; a step is forward, backward and AdamW.

    python benchmarks/allocator.py --preset fira-334m --sequences 2
"""
from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

from record import append, machine


def worker(pipe: Connection, keep: bool, preset: str, settings: list[str], sequences: int) -> None:
    """Answer every message with (seconds, page faults) of one training step."""
    from fira import runtime
    from fira.config import load_preset

    if keep:
        assert runtime.keep_large_blocks(), "no glibc here"
    import torch

    from fira.data.batches import Batch
    from fira.loss.next_token import next_token_loss
    from fira.model.files import build
    from fira.stages.pretrain import configure
    from fira.train.optim import make_optimizer
    from fira.train.step import accumulate, finish_step

    config = configure(load_preset(preset), settings)
    model = build(config.model, seed=0)
    optimizer = make_optimizer(model, config.optim)
    generator = torch.Generator().manual_seed(0)
    while pipe.recv():
        ids = torch.randint(config.model.vocab_size, (sequences, config.train.sequence_length + 1),
                            generator=generator)
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        began = time.perf_counter()
        loss, count = accumulate(model, [batch], next_token_loss)
        finish_step(model, optimizer, loss, count, config.optim.clip)
        seconds = time.perf_counter() - began
        pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="fira-334m")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("docs/results/allocator.jsonl"))
    parser.add_argument("settings", nargs="*", help="section.key=value")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    sides = {}
    for name, keep in (("default", False), ("keep_large_blocks", True)):
        ours, theirs = context.Pipe()
        context.Process(target=worker, daemon=True, args=(
            theirs, keep, options.preset, options.settings, options.sequences)).start()
        sides[name] = ours
    rows: dict[str, list[tuple[float, int]]] = {name: [] for name in sides}
    for turn in range(options.steps + 2):
        for name, pipe in sides.items():
            pipe.send(True)
            measured = pipe.recv()
            if turn >= 2:
                rows[name].append(measured)
    for pipe in sides.values():
        pipe.send(False)
    print(f"{options.preset}, {options.sequences} sequences a step, {machine()}")
    summary = {}
    for name, measured in rows.items():
        seconds, faults = (statistics.median(column) for column in zip(*measured, strict=True))
        summary[name] = {"seconds": seconds, "page_faults": faults}
        print(f"{name:18} {seconds:8.3f} s per step  {faults:10,.0f} page faults")
    speedup = statistics.median(a[0] / b[0] for a, b in zip(*rows.values(), strict=True))
    print(f"speed-up           {speedup:8.2f} (median of pairs)")
    append(options.json, {"preset": options.preset, "sequences": options.sequences,
                          "sides": summary, "speedup": speedup})


if __name__ == "__main__":
    main()
