"""Is `fira plan`'s memory that of real processes? Predicted and resident bytes, part by part.

    python benchmarks/plan_memory.py --json docs/results/plan_memory.jsonl

Resident memory is that of a process which has trained three steps, over what it had before the
model was made. Tensors are mapped one by one, so that it is theirs and not the allocator's; `kept`
is the peak as training runs on a CPU, where freed blocks are kept (runtime.keep_large_blocks).
"""
from __future__ import annotations

import ctypes
from math import prod
from pathlib import Path
from typing import Any

import click
import torch
from ranks import on_ranks
from record import append, peak_memory, reset_peak

from fira.loss.next_token import Batch, next_token_loss
from fira.model.files import build_meta
from fira.model.spec import FIRA2Spec
from fira.parallel.layout import Layout
from fira.parallel.mesh import AXES, Mesh, make_mesh
from fira.parallel.plan import Work, memory_of
from fira.train.optim import OptimConfig, make_optimizer
from fira.train.recompute import recompute_blocks
from fira.train.step import finish_step

CPU = torch.device("cpu")
SHAPE = {"n_head": 8, "n_kv_head": 4, "head_dim": 64, "num_layers": 4, "num_experts": 8, "top_k": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {}, "data 2": {"data": 2}, "shard 2": {"shard": 2}, "expert 2": {"expert": 2},
    "pipeline 2": {"pipeline": 2}}
PARTS = {"weights": ("weights",), "gradients": ("gradients",), "optimizer": ("optimizer",),
         "the rest": ("activations", "working")}
M_MMAP_MAX, M_MMAP_THRESHOLD = -4, -3  # glibc's malloc.h


def resident() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def map_every_tensor() -> None:
    """Undo keep_large_blocks: what is freed leaves the process at once."""
    mallopt = ctypes.CDLL(None).mallopt
    assert mallopt(M_MMAP_MAX, 1 << 20) and mallopt(M_MMAP_THRESHOLD, 1 << 16)


def train(mesh: Mesh, work: Work, steps: int) -> dict[str, int]:
    """Resident bytes when the model is made, with gradients, after the step, at most."""
    spec = work.spec
    layout = Layout(mesh, build_meta(spec), 0)
    model = layout.model.train()
    if work.recompute:
        recompute_blocks(model)
    optimizer, seen = make_optimizer(model, OptimConfig(rule=work.rule)), {"made": resident()}
    each = work.micro_batch
    for step in range(steps):
        ids = torch.randint(0, spec.vocab_size, (work.batch_size, work.sequence_length + 1),
                            generator=torch.Generator().manual_seed(step))
        ids = ids[layout.rows(len(ids))]
        cut = [Batch(ids[i:i + each, :-1].contiguous(), ids[i:i + each, 1:].contiguous())
               for i in range(0, len(ids), each)]
        loss, _ = layout.forward_backward(cut, next_token_loss)
        seen["backward"] = resident()
        finish_step(model, optimizer, loss, 1.0, layout.gradient_norm())
        layout.end_step()
    return seen | {"stepped": resident(), "most": peak_memory(CPU)}


def measure(rank: int, work: Work, sizes: dict[str, int], mapped: bool) -> dict[str, int]:
    """Bytes by part, as the process's growth; a very small model goes before, for what stays."""
    if mapped:
        map_every_tensor()
    mesh = make_mesh(sizes, rank, CPU) if prod(sizes.values()) > 1 else Mesh()
    small = work.spec.model_copy(update={"vocab_size": 64, "d_model": 16, "d_ff": 16})
    train(mesh, Work(small, work.batch_size, work.micro_batch, 8, work.rule), 2)
    reset_peak(CPU)
    before = resident()
    seen = train(mesh, work, 3)
    return {"weights": seen["made"] - before, "optimizer": seen["stepped"] - seen["made"],
            "gradients": seen["backward"] - seen["stepped"],
            "the rest": seen["most"] - seen["backward"], "all": seen["most"] - before}


def compare(name: str, work: Work, kept: bool) -> dict[str, Any]:
    """Of every pipeline rank, or the first: predicted over resident, by part."""
    sizes = dict.fromkeys(AXES, 1) | LAYOUTS[name]
    world = prod(sizes.values())
    result: dict[str, Any] = {"layout": name, "ranks": []}
    measured = on_ranks(world, measure, work, sizes, True)
    over = on_ranks(world, measure, work, sizes, False) if kept else [None] * world
    for rank in range(sizes["pipeline"]):
        parts = memory_of(work, tuple(sizes[axis] for axis in AXES), rank)
        planned = {part: sum(parts[one] for one in ones) for part, ones in PARTS.items()}
        planned["all"] = sum(parts.values())
        row = {part: {"planned": round(planned[part]), "resident": measured[rank][part]}
               for part in planned}
        if over[rank]:
            row["all"]["kept"] = over[rank]["all"]
        result["ranks"].append(row)
    return result


def show(result: dict[str, Any]) -> None:
    for rank, row in enumerate(result["ranks"]):
        words = [f"{result['layout']:24} {rank}"]
        words += [f"{part} {each['planned'] / 1e6:.0f}/{each['resident'] / 1e6:.0f}"
                  for part, each in row.items()]
        whole = row["all"]
        words.append(f"= {whole['planned'] / whole['resident']:.3f}")
        if "kept" in whole:
            words.append(f"kept {whole['kept'] / 1e6:.0f}")
        click.echo("  ".join(words))


@click.command()
@click.option("--layout", "names", multiple=True, type=click.Choice(list(LAYOUTS)))
@click.option("--rule", type=click.Choice(["adamw", "muon"]), default="adamw", show_default=True)
@click.option("--width", default=768, show_default=True, help="Of the model and of its experts.")
@click.option("--vocab", default=16384, show_default=True)
@click.option("--length", default=512, show_default=True, help="Tokens of a sequence.")
@click.option("--recompute", is_flag=True, help="Keep each block's input only.")
@click.option("--kept/--no-kept", default=True, help="Measure with kept blocks, too.")
@click.option("--json", "record", type=click.Path(path_type=Path), help="File to append to.")
def main(names: tuple[str, ...], rule: str, width: int, vocab: int, length: int, recompute: bool,
         kept: bool, record: Path | None) -> None:
    """Planned MB / resident MB."""
    spec = FIRA2Spec(**SHAPE, vocab_size=vocab, d_model=width, d_ff=width, context=length)
    for name in names or LAYOUTS:
        ranks = 1 if "pipeline" in name or name == "one process" else 2
        work = Work(spec, 8 * ranks, 2, length, rule, recompute)
        result = compare(name, work, kept)
        show(result)
        if record:
            append(record, result | {"rule": rule, "width": width, "vocabulary": vocab,
                                     "length": length, "recompute": recompute})


if __name__ == "__main__":
    main()
