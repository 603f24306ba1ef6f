"""An adapter in another form: merged into the weights of its base, or as PEFT's files.

    W + SCALE * B A          of every adapted matrix; of a token's row, W + delta

Merged weights are rounded once, to float32. Text that the model itself writes shows whether that,
or a mistake, changed what the model computes.

PEFT (0.21) adapts a stack of experts as one parameter, and transformers keeps gate and up
of a layer in one. So that parameter's A is both As below each other, and its B has both Bs on its
diagonal, at twice the rank. Queries, keys and values share A.
"""
from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from fira.convert import qwen3
from fira.convert.files import Loaded, load_run, number_of, write_run
from fira.convert.hf import check_router
from fira.convert.quantize import dequantized, load_model
from fira.files import check_new, new_target, write_json
from fira.model.adapter import SCALE, TokenRows, adapters, merge
from fira.model.files import ADAPTER, CONFIG, read_config

LIMIT = 1e-5  # largest difference of two logits that rounding the merged weights may make
TOKENS = 64  # of the model's own text


def load_adapted(run: Path) -> Loaded:
    """A run whose adapter stands beside its base. Raises ValueError, one line, if it has none."""
    loaded = load_run(run, partial(load_model, merged=False))
    if not adapters(loaded.model):
        raise ValueError(f"{loaded.folder} holds a whole model and no adapter; use it as it is")
    return loaded


def merge_run(run: Path, folder: Path, screen: Console) -> None:
    """Write the adapted model of `run` as the new run `folder`, whole and in float32.

    Raises ValueError, one line, and writes nothing, if there is no adapter or if a logit of the
    merged model differs by more than LIMIT from the adapted model's.
    """
    check_new(folder)
    adapted, tokenizer, step = load_adapted(run)
    merged = merge(copy.deepcopy(dequantized(adapted)).float())
    difference = compare(adapted, merged)
    if not difference <= LIMIT:  # also refuses NaN
        raise ValueError(f"a logit of the merged model differs by {difference:.2g} from that of "
                         f"{step}, more than {LIMIT:g}; use the adapter as it is, unmerged: fira "
                         f"chat {run}")
    base = read_config(step / CONFIG)[1]["base"]["path"]
    write_run(folder, merged, tokenizer, number_of(step),
              {"stage": "export", "preset": "merge", "from": base, "merged_from": str(step)})
    screen.print(f"wrote {folder}; logits differ by at most {difference:.1e} from the adapted "
                 "model's", soft_wrap=True)


@torch.inference_mode()
def compare(adapted: Any, merged: Any) -> float:
    """The largest difference of two logits on text that `adapted` writes: in float64, in which
    only the weights differ, not the roundings of two orders of computing."""
    tokens_BT = adapted.generate([[adapted.end_of_text]], TOKENS, seed=0, end_of_text=-1)
    tokens_BT = tokens_BT[:, -adapted.spec.context:]
    before, after = (copy.deepcopy(model).double()(tokens_BT) for model in (adapted, merged))
    return (before - after).abs().max().item()


def export_peft(run: Path, folder: Path, screen: Console) -> None:
    """Write the adapter of `run` as the new folder `folder` that PEFT loads onto the base, which
    `fira export hf` writes. Raises ValueError, one line, for what PEFT cannot hold."""
    check_new(folder)
    model, tokenizer, step = load_adapted(run)
    _check_peft(model, step, run)
    found = dict(peft_tensors(model))
    with new_target(folder) as partial_folder:
        tokenizer.save(partial_folder)
        save_file({f"base_model.model.{name}": tensor.detach().contiguous()
                   for name, tensor in found.items()},
                  partial_folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(partial_folder / "adapter_config.json", _peft_config(model, list(found)))
    base = read_config(step / CONFIG)[1]["base"]["path"]
    screen.print(f'wrote {folder}; after fira export hf {base} HF load it with PeftModel.'
                 f'from_pretrained(AutoModelForCausalLM.from_pretrained("HF"), "{folder}")',
                 soft_wrap=True)


def _check_peft(model: Any, step: Path, run: Path) -> None:
    remedy = f"write a whole model with fira merge {run} OUT, then fira export hf OUT FOLDER"
    if model.spec.architecture != "fira2":
        raise ValueError(f"{step} adapts a FIRA, whose code in transformers PEFT does not know; "
                         f"{remedy}")
    if model.quantization:
        raise ValueError(f"{step} adapts {model.quantization} weights, which transformers does not "
                         f"read; {remedy}")
    check_router(model)
    parameters = dict(model.named_parameters())
    with safe_open(step / ADAPTER, framework="pt") as file:
        if others := [name for name in sorted(file.keys())
                      if name in parameters and ".lora." not in name]:
            raise ValueError(f"{step} holds {others[0]}, which was trained as a whole, but a LoRA "
                             f"of PEFT adapts matrices only; {remedy}")


def peft_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the adapter under its name in PEFT, without the prefix of all."""
    spec = model.spec
    stacked = qwen3.kind(spec) == qwen3.MOE
    for path, module in adapters(model).items():
        lora, key = module.lora, f"{path}.weight"
        if stacked and qwen3.EXPERTS in path:
            continue
        names = [name.removesuffix(".weight") for name in qwen3.names(spec, key)]
        if isinstance(lora, TokenRows):  # PEFT keeps the rows themselves
            yield (f"{names[0]}.token_adapter.trainable_tokens_delta",
                   module.weight[lora.tokens] + lora.delta)
            continue
        for name, b in zip(names, qwen3.separate(spec, key, lora.b), strict=True):
            yield f"{name}.lora_A.weight", lora.a.reshape(-1, lora.a.shape[-1]).clone()
            yield f"{name}.lora_B.weight", b
    for layer, block in enumerate(model.blocks if stacked else ()):
        experts, start = block.moe.experts, f"model.layers.{layer}.mlp.experts"
        if hasattr(experts.up, "lora"):
            (gate_a, gate_b), (up_a, up_b), (down_a, down_b) = (
                part.lora.of_all(spec.num_experts) for part in (
                    experts.gate, experts.up, experts.down))
            rank = gate_a.shape[1]
            both_b = torch.cat([F.pad(gate_b, (0, rank)), F.pad(up_b, (rank, 0))], dim=1)
            yield from _stack(f"{start}.base_layer", torch.cat([gate_a, up_a], dim=1), both_b)
            yield from _stack(start, down_a, down_b)


def _stack(name: str, a_Eri: Tensor, b_Eor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """PEFT's two matrices of a stack: [E r, in], and [out, r E] with the experts side by side."""
    yield f"{name}.lora_A.weight", a_Eri.flatten(0, 1)
    yield f"{name}.lora_B.weight", b_Eor.permute(1, 2, 0).flatten(1)


def _peft_config(model: Any, names: list[str]) -> dict[str, Any]:
    parts = [name.split(".") for name in names]
    first = {path.rpartition(".")[2]: module.lora for path, module in adapters(model).items()}
    stacks = [".".join(part[:-3]) for part in parts if part[-3] == "base_layer"]
    rank = first["qkv"].a.shape[0] if "qkv" in first else first["up"].a.shape[1]
    ranks = {"experts.gate_up_proj": 2 * first["up"].a.shape[1],
             "experts.down_proj": first["down"].a.shape[1]} if stacks else {}
    rows = {part[-3]: model.token_embedding.lora.tokens.tolist() for part in parts
            if part[-2] == "token_adapter"}
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None,
            "r": rank, "lora_alpha": SCALE * rank, "lora_dropout": 0.0, "bias": "none",
            "fan_in_fan_out": False, "inference_mode": True,
            "target_modules": sorted({part[-3] for part in parts if part[-3].endswith("_proj")}),
            "target_parameters": [f"{stack}.{part}" for stack in stacks
                                  for part in ("gate_up_proj", "down_proj")] or None,
            "rank_pattern": ranks, "alpha_pattern": {key: SCALE * r for key, r in ranks.items()},
            "trainable_token_indices": rows or None}
