"""A whole training step, each side as its user runs it: FIRA, its dense twins, transformers.

    python benchmarks/train_step.py --small
    python benchmarks/train_step.py --group "mixtral top-1" --json docs/results/train_step.jsonl

Every side is a process of its own and takes its step in turn on the same random batch. FIRA: its
loss, its AdamW, keep_large_blocks. transformers: model(input_ids, labels=...).loss, fused AdamW,
the allocator as it is. Utilisation is the FLOPs of the active parameters per second over the
machine's measured matrix product (fp32 on a CPU, bf16 on CUDA). Memory is each process's peak.
"""
from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from record import append, machine, peak_memory, reset_peak

from fira.model.files import build_meta
from fira.model.spec import FIRA2Spec, FIRASpec
from fira.model.transformer import count_parameters
from fira.runtime import autocast, keep_large_blocks, pick_device

SMALL = {"num_layers": 2, "vocab_size": 8192}
FOUNDING = {"dropout": 0.1, "context": 3072}
MIXTRAL = {"n_head": 12, "n_kv_head": 12, "d_ff": 3072, "num_experts": 4, "context": 1024}
QWEN = {"n_head": 12, "n_kv_head": 4, "d_ff": 256, "num_experts": 64, "top_k": 8, "context": 1024}
Side = tuple[str, str, Any]  # name, who runs it (fira or a class of transformers), its shape


def mixtral(small: dict[str, int], top_k: int) -> list[Side]:
    spec = FIRA2Spec(top_k=top_k, **MIXTRAL | small)
    twin = spec.model_copy(update={"num_experts": 1, "top_k": 1, "d_ff": top_k * spec.d_ff})
    return [("transformers Mixtral", "Mixtral", spec), ("FIRA2 dense twin", "fira", twin),
            ("FIRA2", "fira", spec)]


GROUPS: dict[str, Callable[[dict[str, int]], list[Side]]] = {
    "gpt2": lambda small: [
        ("transformers GPT-2", "GPT2", FIRASpec(num_experts=1, **FOUNDING | small)),
        ("FIRA dense twin", "fira", FIRASpec(num_experts=1, **FOUNDING | small)),
        ("FIRA", "fira", FIRASpec(**FOUNDING | small))],
    "mixtral top-1": lambda small: mixtral(small, 1),
    "mixtral top-2": lambda small: mixtral(small, 2),
    "qwen3-moe": lambda small: [
        ("transformers Qwen3-MoE", "Qwen3Moe", FIRA2Spec(**QWEN | small)),
        ("FIRA2 dense twin", "fira", FIRA2Spec(**QWEN | small | {
            "num_experts": 1, "top_k": 1, "d_ff": 2048})),
        ("FIRA2", "fira", FIRA2Spec(**QWEN | small))],
}


def fira_step(spec: Any, device: torch.device, cuts: int) -> Callable[[torch.Tensor], None]:
    from fira.data.batches import Batch
    from fira.loss.next_token import next_token_loss
    from fira.model.balance import end_step
    from fira.model.files import build
    from fira.train.compiled import compiled
    from fira.train.optim import OptimConfig, make_optimizer
    from fira.train.step import accumulate, finish_step

    model = build(spec, seed=0, device=device).train()
    optimizer = make_optimizer(model, OptimConfig(lr=1e-4))
    forward = compiled(model) if device.type == "cuda" else model

    def step(ids_BT: torch.Tensor) -> None:
        batches = [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous())
                   for part in ids_BT.chunk(cuts)]
        loss, count = accumulate(forward, batches, next_token_loss)
        finish_step(model, optimizer, loss, count, math.inf)  # clipping would be one side's luck
        end_step(model)
    return step


def peer_step(kind: str, spec: Any, device: torch.device,
              cuts: int) -> Callable[[torch.Tensor], None]:
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

    def step(ids_BT: torch.Tensor) -> None:
        for part in ids_BT[:, :-1].chunk(cuts):
            with autocast(device):
                loss = model(input_ids=part, labels=part).loss / cuts
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def worker(pipe: Connection, who: str, spec: Any, device_name: str, cuts: int) -> None:
    """Answer every batch with the seconds of a step, None with the peak of memory."""
    if who == "fira":
        keep_large_blocks()
    device = pick_device(device_name)
    step = (fira_step(spec, device, cuts) if who == "fira"
            else peer_step(who, spec, device, cuts))
    reset_peak(device)
    pipe.send("ready")
    while (ids_BT := pipe.recv()) is not None:
        ids_BT = torch.as_tensor(ids_BT, device=device)
        began = time.perf_counter()
        step(ids_BT)
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - began)
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
    """Rows by side; `ratio` is tokens/s over the first side's, the median over turns."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name, who, spec in sides:
        pipes[name], theirs = context.Pipe()
        arguments = theirs, who, spec, a.device, a.cuts
        context.Process(target=worker, args=arguments, daemon=True).start()
    for pipe in pipes.values():
        pipe.recv()
    generator, cuda = torch.Generator().manual_seed(0), pick_device(a.device).type == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for turn in range(a.warmup + a.steps):
        shape = (a.batch, a.sequence + 1)
        ids = torch.randint(sides[0][2].vocab_size, shape, generator=generator).tolist()
        at_once = cuda and turn < a.warmup  # compiling needs no device
        for name in pipes if at_once else ():
            pipes[name].send(ids)
        for name in pipes if turn % 2 else reversed(pipes):
            if not at_once:
                pipes[name].send(ids)
            took = pipes[name].recv()
            if turn >= a.warmup:
                seconds[name].append(took)
    rows = {}
    for name, _, spec in sides:
        pipes[name].send(None)
        count = count_parameters(build_meta(spec), a.sequence)
        speed = a.batch * a.sequence / statistics.median(seconds[name])
        rows[name] = {"tokens_per_second": speed, "flops": speed * count.flops_per_token,
                      "ratio": statistics.median(first / mine for first, mine in zip(
                          seconds[sides[0][0]], seconds[name], strict=True)),
                      "peak_bytes": pipes[name].recv(), "active": count.active,
                      "total": count.total, "seconds": seconds[name]}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--group", action="append", choices=GROUPS, help="default: all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--cuts", type=int, default=1, help="of the batch, whose gradients add up")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--ours", action="store_true", help="without transformers' side, whose "
                        "logits need more memory than a GPU has at large batches")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="2 layers, vocabulary 8,192")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.batch % options.cuts:
        parser.error(f"--cuts {options.cuts} does not divide --batch {options.batch}; choose a "
                     "divisor, so that all parts weigh the same")
    peak = peak_flops(pick_device(options.device))
    print(f"{machine()}; matrix product {peak / 1e9:,.0f} GFLOP/s; {options.batch} x "
          f"{options.sequence} tokens a step, in {options.cuts}")
    for group in options.group or GROUPS:
        sides = GROUPS[group](SMALL if options.small else {})
        rows = compare([side for side in sides if side[1] == "fira" or not options.ours], options)
        print(f"\n{group:26}{'tokens/s':>10}{'ratio':>7}{'of peak':>9}{'peak GB':>9}"
              f"{'active M':>10}{'total M':>9}")
        for name, row in rows.items():
            print(f"{name:26}{row['tokens_per_second']:10,.0f}{row['ratio']:7.2f}"
                  f"{row['flops'] / peak:9.0%}{row['peak_bytes'] / 1e9:9.2f}"
                  f"{row['active'] / 1e6:10.1f}{row['total'] / 1e6:9.1f}", flush=True)
        if options.json:
            append(options.json, {"benchmark": "train_step", "group": group, "peak_flops": peak,
                                  "small": options.small, "batch": options.batch,
                                  "cuts": options.cuts, "sequence": options.sequence,
                                  "sides": rows})


if __name__ == "__main__":
    main()
