"""Adapters on the shape of Qwen3-30B-A3B with random weights: memory and speed on one GPU.

    python benchmarks/tune_gpu.py --json docs/results/tune_gpu.jsonl

A step reads one row of 2,048 random tokens and recomputes its blocks. The sides, each in a process
of its own: FIRA with its base in bfloat16 and in int4, and transformers with PEFT in bfloat16; a
side that fails says so in its row. What `fira tune --dry-run` counts for a GPU is printed first, on
any machine. On a CPU the base stays in float32, and the peak holds the program, too. Utilization
is of the device's measured product, at 4 operations per active weight and token: of the forward
pass, and of the gradients of inputs, as frozen weights have none.
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from record import append, new_parser, peak_memory, reset_peak
from train_step import peak_flops, training_step

from fira.config import load_preset
from fira.convert.quantize import quantize
from fira.model import build_meta
from fira.model.adapter import attach, hold_frozen
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


def shape(config: Any, kind: str, rank: int) -> Any:
    """FIRA's model with adapters, on the meta device."""
    model = build_meta(config.model)
    attach(quantize(model, kind) if kind != "bfloat16" else model, rank)
    return model


def fira_side(config: Any, kind: str, rank: int, device: torch.device) -> Step:
    """A step on ids [1, T + 1]."""
    layout = Layout(Mesh(device=device), model := shape(config, kind, rank), seed=0)
    for name, tensor in model.state_dict().items():  # what a base would have been read into
        if name.endswith(".numbers"):
            tensor.random_()
        elif name.endswith(("weight", ".scale")):
            tensor.normal_(0, 0.02 if name.endswith("weight") else 1e-3)
    recompute_blocks(model)
    step = training_step(layout, OptimConfig(lr=1e-4))
    return lambda ids_BT: step([ids_BT])


def peft_side(config: Any, rank: int, device: torch.device) -> Step:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    spec = config.model
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(
            vocab_size=spec.vocab_size, hidden_size=spec.d_model, num_hidden_layers=spec.num_layers,
            num_attention_heads=spec.n_head, num_key_value_heads=spec.n_kv_head,
            head_dim=spec.head_dim, moe_intermediate_size=spec.d_ff, num_experts=spec.num_experts,
            num_experts_per_tok=spec.top_k, use_cache=False), dtype=torch.bfloat16)
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
        model(input_ids=(rows := ids_BT[:, :-1].to(device)), labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def measure(side: str, config: Any, a: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second, the median of the steps after the first two, and the peak in bytes."""
    device, (who, kind) = pick_device(a.device), side.split()
    product = peak_flops(device)
    reset_peak(device)
    step = (fira_side(config, kind, a.rank, device) if who == "fira" else
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
            "peak": peak_memory(device), "product_flops": product}


def main() -> None:
    parser = new_parser(__doc__)
    for name, default in (("preset", "fira2-30b"), ("device", "cuda"), ("rank", 16),
                          ("length", 2048), ("steps", 8)):
        parser.add_argument(f"--{name}", default=default, type=type(default))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    a = parser.parse_args()
    config = configure(PRETRAIN, load_preset(a.preset), [
        f"train.{name}={a.length}" for name in ("sequence_length", "first_length", "batch_tokens")
        ] + ["train.recompute=true", "train.micro_batch=1", "data.folder=-", "optim.rule=adamw"])
    if a.side:
        print(json.dumps(measure(a.side, config, a)))
        return
    predicted, rows = dict[str, float](), dict[str, Any]()
    for kind in ("bfloat16", "int8", "int4"):
        hold_frozen(model := shape(config, kind, a.rank), torch.bfloat16)
        predicted[kind] = sum(memory_needed(config, (), model, "cuda").values())
    print("predicted, GB:", *(f"{kind} {size / 1e9:.1f}" for kind, size in predicted.items()))
    for side in SIDES:
        call = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        done = subprocess.run(call, capture_output=True, text=True)
        rows[side] = (json.loads(done.stdout.strip().split("\n")[-1]) if done.returncode == 0 else
                      {"failed": (done.stderr.strip() or "no output").split("\n")[-1]})
        print(side, *(f"{key} {value:,.4g}" if key != "failed" else f"failed: {value}"
                      for key, value in rows[side].items()), sep="  ", flush=True)
    append(a.json, {"predicted": predicted, "sides": rows})  # the command has the options


if __name__ == "__main__":
    main()
