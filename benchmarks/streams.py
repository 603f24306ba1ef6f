"""Many clients at once: `fira serve` beside llama.cpp's server, with the same weights.

    python benchmarks/streams.py --requests 1 --json docs/results/streams.jsonl
    python benchmarks/streams.py out/quickstart/run --prompts 60 --new 60 --requests 24

For each number of clients and length of prompt, one server and then the other is started with a
place for every client, all cores (leave OMP_NUM_THREADS unset), and a cache of 16 bits. Every
client sends `requests` requests one after the other, with a prompt of its own and `new` greedy
tokens to stream. Rows: tokens read and written a second, and per processor second of the server;
the median time to the first token; the 99th percentile of the time between two chunks of an answer,
and of /health; peak memory in MB.
Without a run the model is decode.py's fira2-135m with random weights. llama.cpp is xllamacpp's.
"""
from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from decode import SHAPES, small_tokenizer
from record import append, machine, new_parser
from serve import Server, fira_serve

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
params.hostnames, params.port, params.verbosity = ["127.0.0.1"], int(sys.argv[5]), 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[4])
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


async def run_clients(server: Server, clients: int, length: int, requests: int, new: int
                      ) -> dict[str, float]:
    seen: dict[str, list[float]] = {"tokens": [], "first": [], "gaps": [], "health": []}
    draw, done = torch.Generator().manual_seed(0), asyncio.Event()

    def prompt(size: int = length) -> list[int]:
        return torch.randint(10, 900, (size,), generator=draw).tolist()

    async with httpx.AsyncClient(base_url=server.address, timeout=None,
                                 limits=httpx.Limits(max_keepalive_connections=0)) as http:
        await stream(http, prompt(64), 8, {name: [] for name in seen})  # what is compiled

        async def client(prompts: list[list[int]]) -> None:
            for one in prompts:
                await stream(http, one, new, seen)

        async def watch() -> None:
            while not done.is_set():
                began = time.monotonic()
                await http.get("/health")
                seen["health"].append(time.monotonic() - began)
                await asyncio.sleep(0.05)

        used, began = server.seconds(), time.monotonic()
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client([prompt() for _ in range(requests)])
                               for _ in range(clients)))
        took, used = time.monotonic() - began, server.seconds() - used
        done.set()
        await watching
    status = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    tokens = sum(seen["tokens"])
    assert tokens == clients * requests * (length + new), tokens
    return {"tokens_per_s": tokens / took, "tokens_per_cpu_s": tokens / used,
            "first_s": statistics.median(seen["first"]), "gap_p99_ms": 1e3 * p99(seen["gaps"]),
            "health_p99_ms": 1e3 * p99(seen["health"]),
            "mb": next(int(line.split()[1]) / 1e3 for line in status if "VmHWM" in line)}


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


def compare(run: Path, file: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for clients, length, side in itertools.product(arguments.clients, arguments.prompts,
                                                   ("fira", "llama.cpp")):
        room = length + arguments.new + 8
        server = (fira_serve(run, clients, "--context", room, "--cache", "float16")
                  if side == "fira" else Server("-c", LLAMA, file, clients, room, os.cpu_count()))
        try:
            row = asyncio.run(run_clients(server, clients, length, arguments.requests,
                                          arguments.new))
        finally:
            server.process.kill()
            server.process.wait()
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
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = arguments.run or make_run(Path(scratch) / "fira2-135m")
        gguf.export_run(run, Path(scratch) / "model.gguf", "f32", console())
        print(machine())
        rows = compare(run, Path(scratch) / "model.gguf", arguments)
    append(arguments.json, {"benchmark": "streams", "run": run.name, "rows": rows})


if __name__ == "__main__":
    main()
