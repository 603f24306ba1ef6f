"""Every reader on files with one mutation: it loads them or raises ValueError, one line.

python -m tests.fuzz --cases 100000 --seed 1; add --first N to begin with case N.
"""
from __future__ import annotations

import argparse
import faulthandler
import json
import random
import resource
import sys
import tempfile
import traceback
from pathlib import Path

from fira.convert import hf
from fira.data.tokenizer import train_tokenizer
from fira.files import MANIFEST, find_damage, write_manifest
from fira.infer.load import load
from fira.infer.request import SamplingParams
from fira.infer.text import complete
from fira.model.files import INDEX, WEIGHTS, save_weights
from fira.report.plot import summary
from fira.report.read import read_run
from fira.report.routing import routing_view
from fira.runlog import METRICS, RunLog
from tests.models import build, tiny_spec

SECONDS, BYTES = 10, 6 << 30  # for one case; of address space, most of which torch takes at import
DEEP = "[" * 100_000
VALUES = [None, True, -1, 0, 1, 10**6, 10**9, 10**19, 1e300, float("nan"), "", "x", "\x1b[2J",
          "../x", "/dev/zero", [], {}, [[]], [1], {"a": 1}, "a*b", "(a|a)*b", "a" * 10_000]


def make(root: Path) -> dict:
    """Small good files under `root`: a reader, the folder that it reads and names in it."""
    tokenizer = train_tokenizer(["The state of the Union is 1 and 22. " * 9], 290)
    model, run = build(tiny_spec("fira2", vocab_size=290), seed=1), root / "run"
    model.end_of_text, model.trained_length, model.chat, model.stage = 258, 8, False, "pretrain"
    save_weights(model, run / "step-000001")
    tokenizer.save(run / "step-000001")
    write_manifest(run / "step-000001")
    (run / "config.json").write_text("{}")
    log, fours = RunLog(run), {name: [0, 1] for name in ("cv", "max_mean", "entropy", "dead")}
    log.write("step", 1, loss=2.0, lr=0.1, tokens=9, tokens_per_second=3, seconds=2.5, dead=0)
    log.write("validation", 1, tokens=9, seconds=2.5, score="loss", lower_is_better=True, loss=1.0)
    log.write("routing", 1, load=[[0.5, 0.5]] * 2, **fours)
    log.close()
    hf.write_model(model, tokenizer, root / "hf")
    (root / "hf" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"x": WEIGHTS}}))
    files = ["config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS, MANIFEST]
    return {read_step: (run / "step-000001", files), hf.read_model: (root / "hf", [*files, INDEX]),
            read_record: (run, [METRICS])}


def read_step(step: Path) -> None:
    find_damage(step)
    loaded = load(step, "cpu")
    "".join(complete(loaded.model, loaded.tokenizer, "We  ", SamplingParams(2, temperature=0)))


def read_record(folder: Path) -> None:
    run = read_run(folder)
    summary(run), routing_view(run)


def mutate(old: bytes, dice: random.Random) -> bytes:
    """`old` with one mutation: of some bytes, or of one value of its JSON, wherever that stands."""
    if dice.random() < 0.3 or not old:
        at, end = sorted(dice.choices(range(len(old) + 1), k=2))
        new = dice.choice([b"", bytes([dice.randrange(256)]), b"9", b"null", DEEP.encode()])
        return old[:at] + new + old[dice.choice([at, at + 1, end]):]
    if old[8:9] == b"{" and old[:1] != b"{":  # safetensors: length of the header, header, numbers
        end = 8 + int.from_bytes(old[:8], "little")
        header = mutate(old[8:end], dice)
        return len(header).to_bytes(8, "little") + header + old[end:]
    if old.count(b"\n{") > 1:  # one JSON object a line
        rows = old.splitlines(keepends=True)
        at = dice.randrange(len(rows))
        return b"".join([*rows[:at], mutate(rows[at].strip(), dice) + b"\n", *rows[at + 1:]])
    place = value = json.loads(old)
    while inner := [one for one in (place.values() if isinstance(place, dict) else place)
                    if isinstance(one, dict | list) and one and dice.random() < 0.7]:
        place = dice.choice(inner)
    key = dice.choice(list(place) if isinstance(place, dict) else range(len(place)))
    before, how = place[key], dice.randrange(4)
    if how == 0:
        del place[key]
    elif how == 1 and isinstance(place, dict):
        place[dice.choice([f"{key}x", *place])] = place.pop(key)
    elif how == 2 and isinstance(before, int | float):
        place[key] = dice.choice([-before, before + 1, before * 10**9, float(before), str(before)])
    else:
        place[key] = dice.choice(VALUES)
    return json.dumps(value).encode()


def fault(good: dict, dice: random.Random) -> str:
    """Mutate one file, read its folder and put the file back; returns what went wrong, or ""."""
    reader, (folder, names) = dice.choice(list(good.items()))
    path, manifest = folder / dice.choice(names), folder / MANIFEST
    saved = {one: one.read_bytes() for one in (path, manifest) if one.is_file()}
    path.write_bytes(new := mutate(saved[path], dice))
    if path != manifest and dice.random() < 0.7:  # then no checksum protects it
        manifest.unlink(missing_ok=True)
    try:
        reader(folder)
    except ValueError as error:
        return f"{path.name}: several lines: {error}" if "\n" in str(error) else ""
    except BaseException:
        return f"{path.name}: {new[-300:]!r}\n{traceback.format_exc()}"
    finally:
        for one, content in saved.items():
            one.write_bytes(content)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("cases", 1000), ("seed", 0), ("first", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    with tempfile.TemporaryDirectory() as root:
        good, faults = make(Path(root)), 0
        for reader, (folder, _) in good.items():
            reader(folder)
        for number in range(options.first, options.first + options.cases):
            print(f"\rcase {number} ", end="", file=sys.stderr, flush=True)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            if text := fault(good, random.Random(f"{options.seed}/{number}")):
                faults += 1
                print(f"case {number}: {text}")
    sys.exit(f"{faults} faults in {options.cases} cases" if faults else 0)


if __name__ == "__main__":
    main()
