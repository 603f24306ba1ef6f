"""Speed and memory of a whole training step: FIRA, its dense baselines and transformers.

    python benchmarks/train_step.py --small
    python benchmarks/train_step.py --group "mixtral top-1" --json docs/results/train_step.jsonl

Each side is a process of its own and makes its step in turn on the same random batch, as its user
would run it. FIRA: its loss, its AdamW, and on a CPU glibc's freed memory kept (the group
`allocation` measures what that gains). transformers: model(input_ids, labels=...).loss, fused
AdamW, the default allocation. Utilization is the FLOPs of the active parameters per second over the
measured rate of one large matrix product (fp32 on a CPU, bf16 on CUDA). Memory is each process's
peak. The group `save` saves in place of a step; its peer is torch.save with fsync.
"""
from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from record import append, machine, new_parser, peak_memory, reset_peak

from fira.checkpoint import Checkpoints
from fira.data.batches import Batch
from fira.files import replacing
from fira.loss.head import next_token_loss
from fira.model import build_meta
from fira.model.spec import FIRA2Spec, FIRASpec
from fira.model.transformer import count_parameters
from fira.parallel.layout import Layout
from fira.parallel.mesh import Mesh
from fira.parallel.pipeline import autocast
from fira.runtime import keep_large_blocks, pick_device
from fira.train.optim import MAX_NORM, OptimConfig, make_optimizer, set_rates, update

SMALL = {"num_layers": 2, "vocab_size": 8192}
FOUNDING = {"dropout": 0.1, "context": 3072}
MIXTRAL = {"n_head": 12, "n_kv_head": 12, "d_ff": 3072, "num_experts": 4, "context": 1024}
QWEN = {"n_head": 12, "n_kv_head": 4, "d_ff": 256, "num_experts": 64, "top_k": 8, "context": 1024}
Step = Callable[[Sequence[torch.Tensor]], None]
Side = tuple[str, str, Any]  # name, program (fira, or a class of transformers), shape


def mixtral(small: dict[str, int], top_k: int) -> list[Side]:
    spec = FIRA2Spec(top_k=top_k, **MIXTRAL | small)
    dense = spec.model_copy(update={"num_experts": 1, "top_k": 1, "d_ff": top_k * spec.d_ff})
    return [("transformers Mixtral", "Mixtral", spec), ("FIRA2, dense baseline", "fira", dense),
            ("FIRA2", "fira", spec)]


GROUPS: dict[str, Callable[[dict[str, int]], list[Side]]] = {
    "gpt2": lambda small: [
        ("transformers GPT-2", "GPT2", FIRASpec(num_experts=1, **FOUNDING | small)),
        ("FIRA, dense baseline", "fira", FIRASpec(num_experts=1, **FOUNDING | small)),
        ("FIRA", "fira", FIRASpec(**FOUNDING | small))],
    "mixtral top-1": lambda small: mixtral(small, 1),
    "mixtral top-2": lambda small: mixtral(small, 2),
    "qwen3-moe": lambda small: [
        ("transformers Qwen3-MoE", "Qwen3Moe", FIRA2Spec(**QWEN | small)),
        ("FIRA2, dense baseline", "fira", FIRA2Spec(**QWEN | small | {
            "num_experts": 1, "top_k": 1, "d_ff": 2048})),
        ("FIRA2", "fira", FIRA2Spec(**QWEN | small))],
    "allocation": lambda small: [
        ("FIRA, glibc's default", "fira, default allocation", FIRASpec(**FOUNDING | small)),
        ("FIRA, freed memory kept", "fira", FIRASpec(**FOUNDING | small))],
    "save": lambda small: [("torch.save, fsync", "save torch", FIRASpec(**FOUNDING | small)),
                           ("FIRA", "save fira", FIRASpec(**FOUNDING | small))],
}


def training_step(layout: Layout, config: OptimConfig, max_norm: float = MAX_NORM) -> Step:
    """A function that makes one optimizer step, as the training loop makes it.

    It takes this rank's micro-batches of token ids, each [B, T + 1] on the CPU.
    """
    optimizer, numbers = make_optimizer(layout.model, config), itertools.count()
    layout.model.train()

    def step(micro_batches: Sequence[torch.Tensor]) -> None:
        set_rates(optimizer, next(numbers), factor=1.0)
        batches = [Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
                   for ids in micro_batches]
        loss, _ = layout.forward_backward(batches, next_token_loss)
        update(optimizer, loss, layout.gradient_norm(), max_norm)
        layout.end_step()
    return step


def fira_step(spec: Any, device: torch.device) -> Step:
    layout = Layout(Mesh(device=device), build_meta(spec), seed=0)
    for block in layout.model.blocks if device.type == "cuda" else ():
        block.compile(fullgraph=True)
    # Whether clipping applies would depend on the random weights, so it is off.
    return training_step(layout, OptimConfig(lr=1e-4), math.inf)


def peer_step(kind: str, spec: Any, device: torch.device) -> Step:
    import transformers

    shape: dict[str, Any] = {"vocab_size": spec.vocab_size}
    if kind == "GPT2":
        shape |= {"n_embd": spec.d_model, "n_layer": spec.num_layers, "n_head": spec.n_head,
                  "n_positions": spec.context}
    else:
        shape |= {"hidden_size": spec.d_model, "num_hidden_layers": spec.num_layers,
                  "num_attention_heads": spec.n_head, "num_key_value_heads": spec.n_kv_head,
                  "head_dim": spec.head_dim, "num_experts_per_tok": spec.top_k,
                  "max_position_embeddings": spec.context, "tie_word_embeddings": True}
    if kind == "Mixtral":
        shape |= {"intermediate_size": spec.d_ff, "num_local_experts": spec.num_experts}
    if kind == "Qwen3Moe":
        shape |= {"moe_intermediate_size": spec.d_ff, "num_experts": spec.num_experts,
                  "norm_topk_prob": True}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**shape)
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, name)(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(micro_batches: Sequence[torch.Tensor]) -> None:
        for ids in micro_batches:
            ids = ids[:, :-1].to(device)
            with autocast():
                loss = model(input_ids=ids, labels=ids).loss / len(micro_batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def save_step(who: str, spec: Any, device: torch.device) -> Step:
    """A function that saves a model and its optimizer state after AdamW's first step."""
    layout, numbers = Layout(Mesh(device=device), build_meta(spec), seed=0), itertools.count()
    optimizer = make_optimizer(layout.model, OptimConfig())
    torch.stack([parameter.sum() for parameter in layout.model.parameters()]).sum().backward()
    update(optimizer, 0.0, 1.0)
    folder = Path((scratch := tempfile.TemporaryDirectory(dir=".")).name)  # /tmp may be memory
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).touch()
    checkpoints = Checkpoints(folder, folder)

    def save(_: Sequence[torch.Tensor], scratch: Any = scratch) -> None:
        if who == "save fira":
            checkpoints.save(next(numbers), layout, optimizer, {})
            checkpoints.wait()
            checkpoints.prune(None)
        else:
            with replacing(folder / "state.pt") as partial:
                torch.save([layout.model.state_dict(), optimizer.state_dict()], partial)
    return save


def worker(pipe: Connection, who: str, spec: Any, device_name: str, parts: int) -> None:
    """Reply to every batch with the seconds of a step, and to None with the peak of memory."""
    if who == "fira":
        keep_large_blocks()
    device = pick_device(device_name)
    step = (fira_step(spec, device) if who.startswith("fira") else
            save_step(who, spec, device) if who.startswith("save") else
            peer_step(who, spec, device))
    reset_peak(device)
    pipe.send("ready")
    while (ids_BT := pipe.recv()) is not None:
        micro_batches = torch.as_tensor(ids_BT).chunk(parts)
        faults, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        step(micro_batches)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults))
    del step  # and with it what it wrote
    pipe.send(peak_memory(device))


def peak_flops(device: torch.device) -> float:
    """FLOP/s of one large matrix product, the best of five."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(6):
        began = time.perf_counter()
        product = a @ b
        float(product[0, 0])  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def compare(sides: list[Side], a: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rows by side; `ratio` is tokens/s over the first side's, the median over the steps."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name, who, spec in sides:
        pipes[name], theirs = context.Pipe()
        arguments = theirs, who, spec, a.device, a.micro_batches
        context.Process(target=worker, args=arguments, daemon=True).start()
    for pipe in pipes.values():
        pipe.recv()
    generator, cuda = torch.Generator().manual_seed(0), pick_device(a.device).type == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    faults: dict[str, list[int]] = {name: [] for name in pipes}
    for turn in range(a.warmup + a.steps):
        shape = (a.batch, a.sequence + 1)
        ids = torch.randint(sides[0][2].vocab_size, shape, generator=generator).tolist()
        at_once = cuda and turn < a.warmup  # compiling keeps the CPU busy, not the GPU
        for name in pipes if at_once else ():
            pipes[name].send(ids)
        for name in pipes if turn % 2 else reversed(pipes):
            if not at_once:
                pipes[name].send(ids)
            measured = pipes[name].recv()
            if turn >= a.warmup:
                seconds[name].append(measured[0])
                faults[name].append(measured[1])
    rows = {}
    for name, _, spec in sides:
        pipes[name].send(None)
        count = count_parameters(build_meta(spec), a.sequence)
        speed = a.batch * a.sequence / statistics.median(seconds[name])
        rows[name] = {"tokens_per_second": speed, "flops": speed * count.flops_per_token,
                      "ratio": statistics.median(first / mine for first, mine in zip(
                          seconds[sides[0][0]], seconds[name], strict=True)),
                      "peak_bytes": pipes[name].recv(), "active": count.active,
                      "total": count.total, "seconds": seconds[name],
                      "page_faults": statistics.median(faults[name])}
    return rows


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--group", action="append", choices=GROUPS, help="default: all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=1, help="parts of the batch, whose "
                        "gradients add up")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--ours", action="store_true", help="leave out transformers, whose "
                        "logits need more memory than a GPU has at large batches")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="2 layers, vocabulary 8,192")
    options = parser.parse_args()
    if options.batch % options.micro_batches:
        parser.error(f"--micro-batches {options.micro_batches} does not divide --batch "
                     f"{options.batch}; choose a divisor")
    peak = peak_flops(pick_device(options.device))
    print(f"{machine()}; matrix product {peak / 1e9:,.0f} GFLOP/s; {options.batch} x "
          f"{options.sequence} tokens per step, {options.micro_batches} micro-batches")
    for group in options.group or GROUPS:
        sides = GROUPS[group](SMALL if options.small else {})
        if options.ours:
            sides = [side for side in sides if side[1].startswith("fira")]
        rows = compare(sides, options)
        print(f"\n{group:26}{'s/step':>8}{'tokens/s':>10}{'ratio':>7}{'of peak':>9}{'peak GB':>9}"
              f"{'active M':>10}{'total M':>9}")
        for name, row in rows.items():
            print(f"{name:26}{statistics.median(row['seconds']):8.2f}"
                  f"{row['tokens_per_second']:10,.0f}{row['ratio']:7.2f}"
                  f"{row['flops'] / peak:9.0%}{row['peak_bytes'] / 1e9:9.2f}"
                  f"{row['active'] / 1e6:10.1f}{row['total'] / 1e6:9.1f}", flush=True)
        append(options.json, {"benchmark": "train_step", "group": group, "peak_flops": peak,
                              "small": options.small, "batch": options.batch,
                              "micro_batches": options.micro_batches,
                              "sequence": options.sequence, "sides": rows})


if __name__ == "__main__":
    main()
