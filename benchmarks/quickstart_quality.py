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
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nanogpt
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
            other = nanogpt.prepare(options.nanogpt, Path(work) / "nanoGPT", train, held_out)
            rows["nanoGPT"] = nanogpt.run_nanogpt(other, rows["fira tiny"]["seconds"], 1,
                                                  nanogpt.pace(other.place))
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
