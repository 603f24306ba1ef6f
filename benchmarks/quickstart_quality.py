"""Quality of `fira quickstart` against nanoGPT's CPU recipe after equal wall-clock time.

    python benchmarks/quickstart_quality.py --nanogpt PATH/TO/nanoGPT --minutes 5

Both get the same text and the same minutes on the same cores, one after the other. FIRA's time
includes learning its tokenizer, tokenizing, evaluating and sampling. nanoGPT runs the command that
its README gives for a CPU (train_shakespeare_char, 4 layers of 128, blocks of 64), with as many
iterations as fill the time. Both are scored in bits per byte on the same held-out speeches, every
20th, every byte once. Without --nanogpt, a checkout of nanoGPT, only FIRA's side runs.
"""
from __future__ import annotations

import functools
import math
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from record import append, machine, new_parser
from torch import Tensor
from training_peers import Result, Text, keep_result, run_seeded, score_run, sum_losses

from fira.report.read import read_run

NANOGPT_SAVES = 250  # iterations between its checkpoints
NANOGPT = ("train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False",
           "--eval_iters=20", "--log_interval=500", "--block_size=64", "--batch_size=12",
           "--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0", "--dataset=text_char",
           "--out_dir=out")


def run_fira(minutes: float, folder: Path, settings: list[str]) -> Result:
    """Time the whole quickstart process, then score its run."""
    overhead = 0.2  # minutes for tokenizer, data, evaluation, samples and pictures
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fira", "quickstart", "--out", str(folder),
                    f"train.minutes={minutes - overhead}", *settings], check=True)
    seconds = time.perf_counter() - began
    return {**score_run(read_run(folder / "run"), Text(folder / "data")), "seconds": seconds}


def run_nanogpt(checkout: Path, text: Text, out: Path, minutes: float, seeds: int) -> None:
    """Train and score nanoGPT with each seed that has no result in `out` yet."""
    @functools.cache
    def prepared() -> NanoGPT:
        return NanoGPT(checkout, out / "nanogpt", text.train(), text.held_out())

    for seed in range(1, seeds + 1):
        keep_result(out / f"nanogpt-seed{seed}.json", {"minutes": minutes, "seed": seed},
                    functools.partial(lambda seed: prepared().run(60 * minutes, seed), seed))


class NanoGPT:
    """A copy of nanoGPT's checkout in `place`, with the documents as its data, one number for each
    character that occurs."""

    def __init__(self, checkout: Path, place: Path, train: list[str], held_out: list[str]) -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(checkout, place, ignore=shutil.ignore_patterns(".git"))
        texts = {"train": "\n".join(train), "val": "\n".join(held_out)}
        letters = sorted(set("\n").union(*texts.values()))
        assert len(letters) <= 1 << 16, len(letters)
        self.place, self.held_out = place, held_out
        self.numbers = np.zeros(sys.maxunicode + 1, np.uint16)
        self.numbers[[ord(letter) for letter in letters]] = range(len(letters))
        self.vocab_size = len(letters)
        data = place / "data" / "text_char"
        data.mkdir()
        for name, text in texts.items():
            self.encode(text).tofile(data / f"{name}.bin")
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": self.vocab_size}))  # its format
        short, long = self.train(200, 0), self.train(450, 0)  # its learning rate warms up for 100
        self.seconds = (long - short) / 250  # per iteration
        self.starting = short - 200 * self.seconds

    def encode(self, text: str) -> np.ndarray:
        return self.numbers[np.frombuffer(text.encode("utf-32-le"), np.uint32)]

    def train(self, iterations: int, seed: int) -> float:
        """Seconds that training takes."""
        began = time.perf_counter()
        run_seeded(self.place, seed, *NANOGPT, f"--max_iters={iterations}",
                   f"--lr_decay_iters={iterations}")
        return time.perf_counter() - began

    def run(self, seconds: float, seed: int) -> Result:
        """Train for about `seconds`, to an iteration at which it saves, and score."""
        rounds = (seconds - self.starting) / self.seconds / NANOGPT_SAVES
        iterations = NANOGPT_SAVES * max(1, round(rounds))
        spent = self.train(iterations, seed)
        bits, size, parameters = self.score()
        return {"bits_per_byte": bits, "bytes": size, "seconds": spent, "iterations": iterations,
                "tokens": iterations * 12 * 64, "parameters": parameters,
                "vocab_size": self.vocab_size}

    def score(self) -> tuple[float, int, int]:
        """Bits per byte, bytes, parameters of the newest checkpoint."""
        sys.path.insert(0, str(self.place))
        from model import GPT, GPTConfig

        sys.path.pop(0)
        saved = torch.load(self.place / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
        model = GPT(GPTConfig(**saved["model_args"]))
        model.load_state_dict(saved["model"])
        model.eval()

        def losses(tokens: Tensor, targets: Tensor) -> Tensor:
            logits = model(tokens, targets)[0]  # without targets it gives the last logits only
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                                                     ignore_index=-1, reduction="none")

        start, *_ = self.encode("\n").tolist()
        nats = sum_losses(losses, start, [self.encode(text).tolist() for text in self.held_out],
                          saved["model_args"]["block_size"])
        size = sum(len(text.encode()) for text in self.held_out)
        return nats / math.log(2) / size, size, sum(one.numel() for one in model.parameters())


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("settings", nargs="*", help="section.key=value of FIRA's run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = {"fira tiny": run_fira(options.minutes, work / "fira", options.settings)}
        text = Text(work / "fira" / "data")
        if options.nanogpt:
            peer = NanoGPT(options.nanogpt, work / "nanoGPT", text.train(), text.held_out())
            rows["nanoGPT"] = peer.run(rows["fira tiny"]["seconds"], seed=1)
        print(f"\n{len(text.held_out())} held-out speeches, {machine()}")
    for name, row in rows.items():
        assert row["bytes"] == rows["fira tiny"]["bytes"], rows
        print(f"{name:10} {row['bits_per_byte']:.4f} bits per byte in {row['seconds']:.0f} s")
    ratio = None
    if options.nanogpt:
        ratio = rows["fira tiny"]["bits_per_byte"] / rows["nanoGPT"]["bits_per_byte"]
        print(f"ratio      {ratio:.3f} (goal: at most 0.80)")
    append(options.json, {"rows": rows, "ratio": ratio, "minutes": options.minutes},
           {"nanoGPT": options.nanogpt})


if __name__ == "__main__":
    main()
