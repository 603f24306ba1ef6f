"""Time and memory of the head and its loss: block by block, against whole logits.

    python benchmarks/head_loss.py
    python benchmarks/head_loss.py --tokens 32768 --json docs/results/head_loss.jsonl

Forward and backward of random features of 768 numbers over 50,304 tokens, each form in a process
of its own, taking turns; memory is the peak of one pass over features and head. On CUDA in bf16 by
autocast, where a block stands there compiled too, as training has it.
"""
from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from record import append, machine, peak_memory, reset_peak
from torch import Tensor
from torch.nn import functional as F

from fira.loss.head import block_gradients, head_loss
from fira.runtime import autocast, keep_large_blocks, pick_device

WIDTH, VOCABULARY = 768, 50304


def whole(x_ND: Tensor, weight_VD: Tensor, _: None, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x_ND, weight_VD).float(), targets_N)


def forms(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {"whole logits": whole, "by blocks": head_loss}
    if device.type == "cuda":
        found["whole logits, compiled"] = torch.compile(whole)
        found["by compiled blocks"] = functools.partial(head_loss,
                                                        block=torch.compile(block_gradients))
    return found


def serve(pipe: Connection, name: str, tokens: int, on: str) -> None:
    """Answers every message with seconds and the bytes at the peak of one pass."""
    keep_large_blocks()
    device = pick_device(on)
    loss_fn, generator = forms(device)[name], torch.Generator(device).manual_seed(0)

    def random(*shape: int, std: float) -> Tensor:
        return (std * torch.randn(shape, device=device, generator=generator)).requires_grad_()

    x_ND, weight_VD = random(tokens, WIDTH, std=1.0), random(VOCABULARY, WIDTH, std=0.02)
    targets_N = torch.randint(VOCABULARY, (tokens,), device=device, generator=generator)
    while pipe.recv():
        x_ND.grad = weight_VD.grad = None
        reset_peak(device)
        before, began = peak_memory(device), time.perf_counter()
        with autocast(device):
            loss = loss_fn(x_ND, weight_VD, None, targets_N)
        loss.backward()
        loss.item()  # a GPU has finished by then
        pipe.send((time.perf_counter() - began, peak_memory(device) - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name in forms(pick_device(options.device)):
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, name, options.tokens, options.device),
                        daemon=True).start()
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    peaks = dict.fromkeys(pipes, 0)  # of the first pass on a CPU, which keeps what it freed
    for turn in range(options.turns + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            took, held = pipe.recv()
            peaks[name] = max(peaks[name], held)
            if turn:
                seconds[name].append(took)
    for pipe in pipes.values():
        pipe.send(False)
    base = statistics.median(seconds["whole logits"])
    print(f"{machine()}; {options.tokens} tokens\n{'':26}{'ms':>10}{'ratio':>8}{'peak MB':>10}")
    rows = {}
    for name, times in seconds.items():
        middle = statistics.median(times)
        rows[name] = {"seconds": middle, "ratio": middle / base, "peak_bytes": peaks[name]}
        print(f"{name:26}{1e3 * middle:10.1f}{middle / base:8.2f}{peaks[name] / 1e6:10.1f}")
    if options.json:
        append(options.json, {"benchmark": "head_loss", "tokens": options.tokens, "forms": rows})


if __name__ == "__main__":
    main()
