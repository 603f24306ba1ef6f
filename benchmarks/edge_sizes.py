"""What a model of each size takes on this CPU: file, memory and tokens per second, by precision.

    python benchmarks/edge_sizes.py --json docs/results/edge_sizes.jsonl --page docs/export.md

float32, int8 and int4 are runs, opened as `fira generate` opens them, with the compiled step; f16,
q8_0 and q4_0 are GGUF files, opened as `fira chat FILE` opens them, by llama.cpp. Weights are
random. Every row is a process of its own, alone on the machine: it loads, writes one greedy answer
at batch 1 after 16 tokens, then `--repeats` that count. Tokens per second are the median, first
tokens left out; memory is what is resident afterwards and the most that was at any time, in both
cases with Python and its libraries, which `none` shows alone. A form that a model cannot have is
named with the reason. `--page` writes the newest record of each shape as tables between the marks
in that file. Linux only, by /proc.
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from decode import SHAPES
from peers import rate
from pydantic import TypeAdapter
from record import append, machine, peak_memory

from fira.config import load_preset
from fira.convert.target import write_run
from fira.data.text import texts
from fira.data.tokenizer import train_tokenizer
from fira.infer.decode import find_obstacle, open_step
from fira.infer.edge import Edge
from fira.infer.load import load
from fira.model.count import count_parameters
from fira.model.files import build
from fira.model.generate import stream
from fira.model.spec import ModelSpec
from fira.runtime import workers

MODELS = ("tiny", "fira2-130m", "fira-334m", "fira2-500m", "fira2-1b")
FORMS = ("float32", "int8", "int4", "f16", "q8_0", "q4_0")
GGUF = FORMS[3:]
PROMPT = list(range(5, 21))
MARKS = ("<!-- edge_sizes.py writes here -->", "<!-- to here -->")


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child[0]](*arguments.child[1:], arguments)))
        return
    for name in arguments.models:
        result = measure(name, arguments)
        show(result)
        if arguments.json:
            append(Path(arguments.json), result)
    if arguments.page:
        fill(Path(arguments.page), tables(newest(Path(arguments.json))))


def spec_of(name: str) -> Any:
    return SHAPES[name]() if name in SHAPES else TypeAdapter(ModelSpec).validate_python(
        load_preset(name)["model"])


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All forms of one model, each written and measured before the next."""
    counted = count_parameters(spec_of(name))
    rows: dict[str, Any] = {"none": ask("none", arguments=arguments)}
    left_out = {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        run = Path(scratch) / "run"
        ask("write", name, run, arguments=arguments)
        for form in arguments.forms:
            try:
                path = written(form, run)
                rows[form] = ask("gguf" if form in GGUF else "run", path, arguments=arguments)
            except ValueError as error:
                left_out[form] = str(error)
    return {"benchmark": "edge_sizes", "model": name, "parameters": counted.total,
            "active": counted.active, "threads": workers(), "new": arguments.new,
            "repeats": arguments.repeats, "rows": rows, "left_out": left_out}


def ask(*words: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own measures. Raises ValueError with its last line if it fails."""
    options = ["--new", arguments.new, "--repeats", arguments.repeats, "--child", *words]
    return json.loads(called(__file__, *options))


def written(form: str, run: Path) -> Path:
    """The run itself, or `fira export` of it. Raises ValueError with the line that refuses it."""
    if form == "float32":
        return run
    path = run.with_name(f"{form}.gguf" if form in GGUF else form)
    called("-m", "fira", "export", *(["gguf", run, path, "--type", form] if form in GGUF else
                                     [form, run, path]))
    return path


def called(*words: Any) -> str:
    answer = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    if answer.returncode:
        raise ValueError(answer.stderr.strip().splitlines()[-1])
    return answer.stdout


def write(name: str, run: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """In a child: random weights, and a small tokenizer so that every form can be written."""
    write_run(Path(run), build(spec_of(name), seed=0), train_tokenizer(texts(["sotu"]), 1000), 0, {
        "preset": name})
    return {}


def of_nothing(arguments: argparse.Namespace) -> dict[str, Any]:
    """In a child: the memory of this file's imports."""
    return memory()


def of_run(run: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """In a child: one of our runs, decoded by the compiled step."""
    loaded = load(run, "cpu")
    obstacle = find_obstacle(loaded.model)
    if obstacle:
        raise ValueError(f"the compiled step cannot run it: {obstacle}")
    step = open_step(loaded.model, "float32", lambda line: print(line, file=sys.stderr))

    def answer() -> float:
        stamps = []
        for _ in stream(loaded.model, [PROMPT], arguments.new, 0, end_of_text=-1, step=step):
            stamps.append(time.perf_counter())
        return rate(stamps)

    return measured(answer, loaded.folder / "model.safetensors", arguments)


def of_gguf(file: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """In a child: a GGUF file, timed by llama.cpp itself."""
    edge = Edge(file, context=512)

    def answer() -> float:
        reply = edge.server.handle_completions({
            "prompt": PROMPT, "n_predict": arguments.new, "temperature": 0, "ignore_eos": True,
            "cache_prompt": False})
        return 1e3 * (arguments.new - 1) / reply["timings"]["predicted_ms"]  # as in peers.py

    return measured(answer, Path(file), arguments)


def measured(answer: Any, file: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    answer()
    rates = [answer() for _ in range(arguments.repeats)]
    return {"file": file.stat().st_size, **memory(), "tokens_per_second": statistics.median(rates)}


def memory() -> dict[str, int]:
    """Bytes resident in this process now, and the most that were."""
    status = Path("/proc/self/status").read_text().splitlines()
    resident = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
    return {"resident": resident, "peak": peak_memory(torch.device("cpu"))}


CHILDREN = {"write": write, "none": of_nothing, "run": of_run, "gguf": of_gguf}


def show(result: dict[str, Any]) -> None:
    print(f"{result['model']}: {result['parameters'] / 1e6:.1f}M parameters, "
          f"{result['active'] / 1e6:.1f}M active; {machine()}")
    print(f"{'':10}{'file MB':>10}{'resident MB':>13}{'peak MB':>10}{'tokens/s':>10}")
    for form, row in result["rows"].items():
        print(f"{form:10}{row.get('file', 0) / 1e6:10,.0f}{row['resident'] / 1e6:13,.0f}"
              f"{row['peak'] / 1e6:10,.0f}{row.get('tokens_per_second', 0):10.1f}")
    for form, reason in result["left_out"].items():
        print(f"left out: {form}: {reason}", flush=True)


def newest(file: Path) -> dict[str, dict[str, Any]]:
    """The last record of every model, in the order of MODELS."""
    found = {record["model"]: record for record in map(json.loads, file.open(encoding="utf-8"))}
    return {name: found[name] for name in MODELS if name in found}


def tables(records: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown: where and when, then one table a measure; a dash where there is no such file."""
    last = list(records.values())[-1]
    lines = [f"{last['machine']}, {last['date']}, commit {last['commit']}; Python and its "
             f"libraries alone take {last['rows']['none']['resident'] / 1e6:,.0f} MB."]
    for title, key, unit in (("file, MB", "file", 1e6), ("resident, MB", "resident", 1e6),
                             ("most while loading, MB", "peak", 1e6),
                             ("tokens/s", "tokens_per_second", 1)):
        lines += ["", f"| {title} | parameters (active) | {' | '.join(FORMS)} |",
                  f"|---|---|{'---:|' * len(FORMS)}"]
        for name, record in records.items():
            size = f"{record['parameters'] / 1e6:,.0f}M ({record['active'] / 1e6:,.0f}M)"
            cells = [f"{record['rows'][form][key] / unit:,.0f}" if form in record["rows"] else "-"
                     for form in FORMS]
            lines.append(f"| `{name}` | {size} | {' | '.join(cells)} |")
    return lines


def fill(page: Path, lines: list[str]) -> None:
    """Put `lines` between the marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    page.write_text("\n".join([before + MARKS[0], *lines, MARKS[1] + after]), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", choices=MODELS, nargs="*", default=list(MODELS))
    parser.add_argument("--forms", choices=FORMS, nargs="+", default=list(FORMS))
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=5, help="counted answers")
    parser.add_argument("--scratch", help="folder with room for all forms of a model")
    parser.add_argument("--json", help="append one line of JSON per model to this file")
    parser.add_argument("--page", help="write the tables from --json into this page")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
