"""Adapters on the shape of Qwen3-30B-A3B with random weights: memory and speed on one GPU.

    python benchmarks/tune_gpu.py --json docs/results/tune_gpu.jsonl

A step reads one row of 2,048 random tokens and recomputes its blocks. The sides, each in a process
of its own: FIRA with its base in bfloat16 and in int4, and transformers with PEFT in bfloat16; a
side that fails says so in its row. `predicted` is the memory that `fira tune --dry-run` counts.
Utilization is of the device's measured product, at 4 operations per active weight and token: of the
forward pass, and of the gradients of inputs, as frozen weights have none.
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from record import append, new_parser, peak_memory, reset_peak
from train_step import peak_flops, training_step

from fira.config import load_preset
from fira.convert.quantize import quantize
from fira.model import build_meta
from fira.model.adapter import attach
from fira.model.transformer import count_parameters
from fira.parallel.layout import Layout
from fira.parallel.mesh import Mesh
from fira.runtime import pick_device
from fira.stages.config import configure
from fira.stages.dryrun import memory_needed
from fira.stages.pretrain import PRETRAIN
from fira.train.optim import OptimConfig
from fira.train.recompute import recompute_blocks

SIDES = "fira bfloat16", "fira int4", "peft bfloat16"
Step = Callable[[torch.Tensor], object]


def fira_side(config: Any, kind: str, rank: int, device: torch.device) -> tuple[Step, float]:
    """A step on ids [1, T + 1], and the bytes that it is predicted to need."""
    model = build_meta(config.model)
    if kind != "bfloat16":
        quantize(model, kind)
    attach(model, rank)
    layout = Layout(Mesh(device=device), model, seed=0)
    for name, tensor in model.state_dict().items():  # what a base would have been read into
        if name.endswith(".numbers"):
            tensor.random_()
        elif name.endswith(("weight", ".scale")):
            tensor.normal_(0, 0.02 if name.endswith("weight") else 1e-3)
    recompute_blocks(model)
    step = training_step(layout, OptimConfig(lr=1e-4))
    needed = memory_needed(config, (), model, device.type)
    return lambda ids_BT: step([ids_BT]), sum(needed.values()) - needed["libraries"]


def peft_side(config: Any, rank: int, device: torch.device) -> tuple[Step, float]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    spec = config.model
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(
            vocab_size=spec.vocab_size, hidden_size=spec.d_model, num_hidden_layers=spec.num_layers,
            num_attention_heads=spec.n_head, num_key_value_heads=spec.n_kv_head,
            head_dim=spec.head_dim, moe_intermediate_size=spec.d_ff, num_experts=spec.num_experts,
            num_experts_per_tok=spec.top_k, norm_topk_prob=True, use_cache=False,
            max_position_embeddings=spec.context), dtype=torch.bfloat16)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    experts = max(1, rank // spec.top_k)
    model = get_peft_model(model, LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"mlp.experts": experts}, alpha_pattern={"mlp.experts": 2 * experts}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()

    def step(ids_BT: torch.Tensor) -> None:
        ids_BT = ids_BT[:, :-1].to(device)
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step, float("nan")


def measure(side: str, a: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second, the median of the steps after the first two; peak and predicted bytes."""
    device, (who, kind) = pick_device(a.device), side.split()
    config = configure(PRETRAIN, load_preset(a.preset), [
        "train.recompute=true", f"train.sequence_length={a.length}", "train.micro_batch=1",
        f"train.first_length={a.length}",
        f"train.batch_tokens={a.length}", "data.folder=none", "optim.rule=adamw"])
    product = peak_flops(device)
    reset_peak(device)
    step, predicted = (fira_side(config, kind, a.rank, device) if who == "fira" else
                       peft_side(config, a.rank, device))
    seconds = []
    for number in range(a.steps + 2):
        ids_BT = torch.randint(config.model.vocab_size, (1, a.length + 1),
                               generator=torch.Generator().manual_seed(number))
        began = time.perf_counter()
        step(ids_BT)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    speed = a.length / statistics.median(seconds[2:])
    active = count_parameters(build_meta(config.model)).active
    return {"tokens_per_second": speed, "utilization": 4 * active * speed / product,
            "peak": peak_memory(device), "predicted": predicted, "product_flops": product}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--preset", default="fira2-30b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.side:
        print(json.dumps(measure(a.side, a)))
        return
    rows: dict[str, dict[str, Any]] = {}
    for side in SIDES:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side],
                              capture_output=True, text=True)
        last = SimpleNamespace(out=done.stdout.strip().split("\n")[-1],
                               error=(done.stderr.strip() or "no output").split("\n")[-1])
        rows[side] = json.loads(last.out) if done.returncode == 0 else {"failed": last.error}
        print(side, *(f"{key} {value:,.4g}" if isinstance(value, float | int) else value
                      for key, value in rows[side].items()), sep="  ", flush=True)
    append(a.json, {"preset": a.preset, "length": a.length, "rank": a.rank, "sides": rows})


if __name__ == "__main__":
    main()
