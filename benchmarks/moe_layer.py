"""Time and memory of one MoE layer, divided by those of a dense layer of equal active FLOPs.

    python benchmarks/moe_layer.py
    python benchmarks/moe_layer.py --shape fine --json docs/results/moe_layer.jsonl

Forward and backward on random data, with the real router and SwiGLU experts on every side, and
transformers' Qwen3-MoE block with each of its experts implementations as the peer. The sides
alternate; a row has the medians over the repeats. Memory is the peak of one pass without the layer
and its input, on a CPU in a process of its own. `decode` is one token without gradients, compared
with the matrix products of K experts that need not be chosen. On CUDA everything is bf16 by
autocast, our layers are measured compiled too, and ratios are to the compiled dense layer; one
measurement is ten passes, because a step has twelve layers and the GPU should not wait for the CPU.
"""
from __future__ import annotations

import functools
import multiprocessing
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from record import append, machine, new_parser, peak_memory, reset_peak, time_in_turns
from torch import nn
from torch.nn import functional as F

from fira.model.initialize import initialize
from fira.model.moe import Dense, MoE, SwiGLUExperts
from fira.model.router import METHODS, Router
from fira.parallel.pipeline import autocast
from fira.runtime import keep_large_blocks, pick_device

OURS = {"cpu": ("dense", "fira"),
        "cuda": ("dense", "dense compiled", "fira", "fira compiled")}
PEERS = ("eager", "grouped_mm", "batched_mm")


class Shape(NamedTuple):
    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int


SHAPES = {
    "cpu": {"coarse top-1": Shape(8192, 768, 3072, 4, 1),
            "coarse top-2": Shape(8192, 768, 3072, 4, 2),
            "fine": Shape(4096, 256, 256, 32, 4), "decode": Shape(1, 768, 256, 64, 8)},
    "cuda": {f"{experts} experts": Shape(32768, 768, 6144 // top_k, experts, top_k)
             for experts, top_k in ((4, 2), (8, 2), (32, 4), (64, 8))}
    | {"decode": Shape(1, 768, 256, 64, 8)},
}


def layer(side: str, shape: Shape, device: torch.device) -> nn.Module:
    """The layer of a side: `dense`, `fira`, each also with ` compiled`, or `transformers NAME`."""
    name, _, manner = side.partition(" ")
    if name == "transformers":
        return peer(manner, shape).to(device)
    if name == "dense":
        module: nn.Module = Dense(SwiGLUExperts(1, shape.width, shape.top_k * shape.hidden))
    else:
        module = MoE(Router(shape.width, shape.experts, shape.top_k, bias=False,
                            method=METHODS["loss"], balance_weight=0.01),
                     SwiGLUExperts(shape.experts, shape.width, shape.hidden))
    initialize(nn.ModuleDict({"moe": module}), seed=0)
    return torch.compile(module.to(device)) if manner == "compiled" else module.to(device)


def peer(implementation: str, shape: Shape) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(hidden_size=shape.width, moe_intermediate_size=shape.hidden,
                            num_experts=shape.experts, num_experts_per_tok=shape.top_k,
                            norm_topk_prob=True)
    config._experts_implementation = implementation
    block = Qwen3MoeSparseMoeBlock(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    return block


def work(side: str, shape: Shape, device: torch.device) -> Callable[[], None]:
    """One pass of a side: forward and backward, or one decoded token if the shape has one token."""
    if shape.tokens == 1 and side == "dense":
        return products(shape, device)
    module = layer(side, shape, device)
    x = torch.randn(1, shape.tokens, shape.width, device=device)
    if shape.tokens == 1:
        module.eval()

        def decode() -> None:
            with torch.inference_mode(), autocast():
                module(x)
        return decode
    module.train()
    x.requires_grad_()
    upstream = torch.randn_like(x)

    def step() -> None:
        with autocast():
            out = module(x)
        out.backward(upstream.to(out.dtype))
        x.grad = None
        module.zero_grad(set_to_none=True)
    return step


def products(shape: Shape, device: torch.device) -> Callable[[], None]:
    """The matrix products of K experts on one token, without a router."""
    F_, D = shape.hidden, shape.width
    stacks = [torch.randn(shape.experts, *size, device=device) * 0.02
              for size in ((F_, D), (F_, D), (D, F_))]
    picks = torch.randint(shape.experts, (1000, shape.top_k),
                          generator=torch.Generator().manual_seed(0)).tolist()
    x, choices = torch.randn(1, D, device=device), iter(picks * 1000)

    def decode() -> None:
        with torch.inference_mode(), autocast():
            for e in next(choices):
                gate, up, down = (stack[e] for stack in stacks)
                F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return decode


def peak(one: Callable[[], None], device: torch.device) -> int:
    """Bytes at the peak of one pass, less those in use before it."""
    reset_peak(device)
    before = peak_memory(device)
    one()
    return peak_memory(device) - before


def peak_in_child(pipe: Any, side: str, shape: Shape) -> None:
    device = torch.device("cpu")
    pipe.send(peak(work(side, shape, device), device))


def peak_apart(side: str, shape: Shape) -> int:
    """The peak in a new process, because on a CPU a process keeps the memory that it once used."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=peak_in_child, args=(theirs, side, shape))
    process.start()
    result = ours.recv()
    process.join()
    return result


def compare(passes: dict[str, Callable[[], None]], shape: Shape, device: torch.device,
            repeats: int) -> dict[str, dict]:
    base = "dense compiled" if "dense compiled" in passes else "dense"
    timed = 50 if shape.tokens == 1 else 10 if device.type == "cuda" else 1

    def repeat(one: Callable[[], None]) -> None:
        for _ in range(timed):
            one()
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds = time_in_turns({side: functools.partial(repeat, one) for side, one in passes.items()},
                            repeats)
    return {side: {"seconds": statistics.median(times) / timed, "ratio": statistics.median(
        mine / dense for mine, dense in zip(times, seconds[base], strict=True))}
        for side, times in seconds.items()}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shape", action="append", help="part of a shape's name")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--no-memory", action="store_true")
    options = parser.parse_args()
    keep_large_blocks()
    device = pick_device(options.device)
    print(machine())
    for name, shape in SHAPES[device.type].items():
        if options.shape and not any(word in name for word in options.shape):
            continue
        print(f"\n{name}: {shape}\n{'':26}{'ms':>10}{'ratio':>8}{'peak MB':>10}")
        ours = OURS[device.type if shape.tokens > 1 else "cpu"]
        sides = [*ours, *(f"transformers {kind}" for kind in options.peers
                          if kind != "batched_mm" or shape.tokens == 1)]
        passes = {side: work(side, shape, device) for side in sides}
        rows = compare(passes, shape, device, options.repeats)
        for side, row in rows.items():
            if not options.no_memory and shape.tokens > 1:
                row["peak_bytes"] = (peak(passes[side], device) if device.type == "cuda"
                                     else peak_apart(side, shape))
            print(f"{side:26}{1e3 * row['seconds']:10.3f}{row['ratio']:8.2f}"
                  f"{row.get('peak_bytes', 0) / 1e6:10.1f}", flush=True)
        append(options.json, {"benchmark": "moe_layer", "device": str(device), "sides": rows,
                              "shape": {"name": name, **shape._asdict()}})


if __name__ == "__main__":
    main()
