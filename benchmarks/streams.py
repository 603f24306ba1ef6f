"""Many clients at once: `fira serve` beside llama.cpp's server, with the same weights.

    python benchmarks/streams.py --json docs/results/streams.jsonl
    python benchmarks/streams.py out/quickstart/run --prompts 128 --json docs/results/streams.jsonl

For each number of clients and length of prompt, one server and then the other is started with a
place for every client, two threads, and a cache of 16 bits. Every client sends `requests` requests
one after the other, with a prompt of its own and `new` greedy tokens to stream. Rows: tokens read
and written a second, and per processor second of the server; the median time to the first token;
the 99th percentile of the time between two chunks of an answer, and of /health; peak memory in MB.
Without a run the model is decode.py's fira2-135m with random weights. llama.cpp is xllamacpp's.
"""
from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from decode import SHAPES, small_tokenizer
from record import append, machine, new_parser

from fira.convert import gguf
from fira.files import write_manifest
from fira.model import build
from fira.model.files import save_weights
from fira.runlog import console

LLAMA = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_parallel, slots = sys.argv[1], int(sys.argv[2]), int(sys.argv[2])
params.n_ctx, params.kv_unified, params.ui = slots * int(sys.argv[3]), False, False
params.hostnames, params.port, params.verbosity = ["127.0.0.1"], int(sys.argv[4]), 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
server = xllamacpp.Server(params)
time.sleep(1e6)
"""


def make_run(folder: Path) -> Path:
    model = build(SHAPES["fira2-135m"]().model_copy(update={"context": 4096}), seed=0)
    tokenizer = small_tokenizer()
    shown = [number for number, text in enumerate(tokenizer.token_bytes()) if text.isascii()]
    with torch.no_grad():  # every token that is chosen is text, so that it is streamed at once
        head = model.head_weights()[0]
        head[[number for number in range(len(head)) if number not in set(shown)]] *= 0.01
    save_weights(model, folder / "step-000001")
    tokenizer.save(folder / "step-000001")
    write_manifest(folder / "step-000001")
    return folder


@contextlib.contextmanager
def serving(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "2"})
    try:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            if process.poll() is not None:
                raise RuntimeError(f"{command} exited with {process.returncode}")
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


async def stream(http: httpx.AsyncClient, prompt: list[int], new: int,
                 seen: dict[str, list[float]]) -> None:
    stamps = [time.monotonic()]
    async with http.stream("POST", "/v1/completions", json={
            "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True}}) as response:
        if response.status_code != 200:
            raise RuntimeError(await response.aread())
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if event.get("choices"):
                    stamps.append(time.monotonic())
                if event.get("usage"):
                    seen["tokens"].append(event["usage"]["total_tokens"])
    seen["first"].append(stamps[1] - stamps[0])
    seen["gaps"] += [late - early for early, late in zip(stamps[1:], stamps[2:], strict=False)]


async def run_clients(port: int, clients: int, length: int, requests: int, new: int,
                      process: subprocess.Popen[bytes]) -> dict[str, float]:
    seen: dict[str, list[float]] = {"tokens": [], "first": [], "gaps": [], "health": []}
    draw = torch.Generator().manual_seed(0)

    def prompt(size: int = length) -> list[int]:
        return torch.randint(10, 900, (size,), generator=draw).tolist()

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None,
                                 limits=httpx.Limits(max_keepalive_connections=0)) as http:
        await stream(http, prompt(64), 8, {name: [] for name in seen})  # what is compiled

        async def client(prompts: list[list[int]]) -> None:
            for one in prompts:
                await stream(http, one, new, seen)

        async def watch() -> None:
            while True:
                began = time.monotonic()
                await http.get("/health")
                seen["health"].append(time.monotonic() - began)
                await asyncio.sleep(0.05)

        used, began = processor_seconds(process), time.monotonic()
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client([prompt() for _ in range(requests)])
                               for _ in range(clients)))
        took, used = time.monotonic() - began, processor_seconds(process) - used
        watching.cancel()
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    tokens = sum(seen["tokens"])
    assert tokens == clients * requests * (length + new), tokens
    return {"tokens_per_s": tokens / took, "tokens_per_cpu_s": tokens / used,
            "first_s": statistics.median(seen["first"]), "gap_p99_ms": 1e3 * p99(seen["gaps"]),
            "health_p99_ms": 1e3 * p99(seen["health"]),
            "mb": next(int(line.split()[1]) / 1e3 for line in status if "VmHWM" in line)}


def processor_seconds(process: subprocess.Popen[bytes]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().split()
    return sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))] if values else 0.0


def compare(run: Path, file: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for clients in arguments.clients:
        for length in arguments.prompts:
            for side in ("fira", "llama.cpp"):
                port, room = arguments.port + len(rows), length + arguments.new + 8
                words = ([sys.executable, "-m", "fira", "serve", str(run), "--port", str(port),
                          "--slots", str(clients), "--queue", "1000", "--context", str(room),
                          "--cache", "float16"] if side == "fira" else
                         [sys.executable, "-c", LLAMA, str(file), str(clients), str(room),
                          str(port)])
                with serving(words, port) as process:
                    row = asyncio.run(run_clients(port, clients, length, arguments.requests,
                                                  arguments.new, process))
                rows.append({"clients": clients, "prompt": length, "side": side, **row})
                print(f"{clients:>3} clients {length:>5} tokens  {side:10}" + "".join(
                    f"  {name} {value:,.2f}" for name, value in row.items()), flush=True)
    return rows


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="a float32 run; default: fira2-135m")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--port", type=int, default=18200, help="the first of the ports to use")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = arguments.run or make_run(Path(scratch) / "fira2-135m")
        gguf.export_run(run, Path(scratch) / "model.gguf", "f32", console())
        print(machine())
        rows = compare(run, Path(scratch) / "model.gguf", arguments)
    append(arguments.json, {"benchmark": "streams", "run": run.name, "rows": rows})


if __name__ == "__main__":
    main()
