"""nanoGPT's own CPU recipe on given documents, scored in bits per byte. Needs a checkout of it."""
from __future__ import annotations

import math
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


def run_nanogpt(checkout: Path, seconds: float, train: list[str], held_out: list[str],
                work: Path) -> dict:
    """nanoGPT's CPU command on the same speeches, for the same seconds."""
    place = work / "nanoGPT"
    shutil.copytree(checkout, place, ignore=shutil.ignore_patterns(".git"))
    characters = sorted(set("".join(train + held_out)))
    ids = {character: i for i, character in enumerate(characters)}
    data = place / "data" / "text_char"
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
            "--dataset=text_char", "--out_dir=out", f"--max_iters={iterations}",
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
