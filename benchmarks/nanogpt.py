"""nanoGPT's own CPU recipe on given documents, scored in bits per byte. Needs a checkout of it."""
from __future__ import annotations

import math
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

EVERY = 250  # iterations from one of its checkpoints to the next


class Pace(NamedTuple):
    starting: float  # seconds before the first step
    seconds: float   # of an iteration


class Prepared(NamedTuple):
    """A copy of the checkout with the documents in its own form: a number for each character."""

    place: Path
    numbers: np.ndarray  # of every code point
    vocab_size: int
    held_out: list[str]

    def encode(self, text: str) -> np.ndarray:
        return self.numbers[code_points(text)]


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def prepare(checkout: Path, place: Path, train: list[str], held_out: list[str]) -> Prepared:
    """Make `place` anew, with a vocabulary of all characters that occur."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(checkout, place, ignore=shutil.ignore_patterns(".git"))
    texts = {"train": "\n".join(train), "val": "\n".join(held_out)}
    occurs = np.zeros(sys.maxunicode + 1, bool)
    for text in (*texts.values(), "\n"):
        occurs[code_points(text)] = True
    vocab_size = int(occurs.sum())
    assert vocab_size <= 1 << 16, vocab_size
    prepared = Prepared(place, (occurs.cumsum() - 1).astype(np.uint16), vocab_size, held_out)
    data = place / "data" / "text_char"
    data.mkdir()
    for name, text in texts.items():
        prepared.encode(text).tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))  # its own format
    return prepared


def train_for(place: Path, iterations: int, seed: int) -> float:
    """Train by its CPU command; the seconds it took."""
    began = time.perf_counter()
    subprocess.run([
        sys.executable, str(Path(__file__).resolve().with_name("seeded.py")), str(seed), "train.py",
        "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20",
        "--log_interval=500", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4",
        "--n_embd=128", "--dropout=0.0", "--dataset=text_char", "--out_dir=out",
        f"--max_iters={iterations}", f"--lr_decay_iters={iterations}"],
        cwd=place, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def pace(place: Path) -> Pace:
    short, long = train_for(place, 200, 0), train_for(place, 450, 0)  # its warm-up takes 100
    seconds = (long - short) / 250
    return Pace(short - 200 * seconds, seconds)


def run_nanogpt(prepared: Prepared, seconds: float, seed: int, measured: Pace) -> dict:
    """One training of `seconds` and its score."""
    rounds = (seconds - measured.starting) / measured.seconds / EVERY
    iterations = EVERY * max(1, round(rounds))  # more would not be in its last checkpoint
    spent = train_for(prepared.place, iterations, seed)
    bits, size, parameters = score_nanogpt(prepared)
    return {"bits_per_byte": bits, "bytes": size, "seconds": spent, "iterations": iterations,
            "tokens": iterations * 12 * 64, "parameters": parameters,
            "vocab_size": prepared.vocab_size}


def score_nanogpt(prepared: Prepared) -> tuple[float, int, int]:
    """Bits per byte: windows of its block advance by half, each character scored once."""
    import torch

    sys.path.insert(0, str(prepared.place))
    from model import GPT, GPTConfig

    sys.path.pop(0)
    saved = torch.load(prepared.place / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    block, nats = saved["model_args"]["block_size"], 0.0
    for text in prepared.held_out:
        line = torch.from_numpy(prepared.encode("\n" + text).astype(np.int64))
        for start in range(0, max(1, len(line) - 1 - block // 2), block // 2):
            window = line[start:start + block + 1]
            with torch.inference_mode():
                logits, _ = model(window[None, :-1], targets=window[None, 1:])
                losses = torch.nn.functional.cross_entropy(logits[0], window[1:], reduction="none")
            nats += float(losses[block // 2 if start else 0:].double().sum())
    size = sum(len(text.encode()) for text in prepared.held_out)
    return nats / math.log(2) / size, size, sum(one.numel() for one in model.parameters())
