"""The recipes of docs/recipes.md in full: tune a run on a domain, and score it beside its floors.

    python benchmarks/recipes.py medical --base out/small --data DATA -- --method full

DATA holds chat/, domains/ and eval/ with files NAME.train.jsonl.xz and NAME.dev.jsonl.xz of
conversations, each with its `task` or `source`. Answers to held-out prompts are generated greedily,
by the base (before) and by the tuned run (after). A label is right or wrong; other answers get
ROUGE-L. Floors, for the same prompts: the commonest answer of the training rows, the prompt itself
(copy), and the answer of the training row whose prompt is the most alike (nearest; cosine of TF-IDF
over words).
"""
from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from record import append, new_parser, shorten

from fira.cli import fira
from fira.data.records import records
from fira.data.sources import inputs
from fira.eval.measure import measure
from fira.eval.task import Row, make_row
from fira.files import read_json
from fira.runlog import TUNING, console

HELD_OUT = 2000  # rows at most, evenly spread over the tasks
Record = dict[str, Any]


class Recipe(NamedTuple):
    """Files below the data folder, the key that names a row's task, and each task's checker."""

    files: tuple[str, ...]
    key: str
    tasks: dict[str, str]


RECIPES = {
    "chat": Recipe(("chat/chitchat", "chat/instruct", "chat/taskdialog"), "source", {
        "chitchat": "rouge", "wordnet": "rouge", "wiki_offline": "rouge", "recipes": "rouge",
        "sgd": "rouge"}),
    "medical": Recipe(("domains/medical/messages",), "task", {
        "abstract_qa": "exact", "conclusion": "rouge", "dialogue_to_section": "rouge",
        "medical_qa": "rouge"}),
    "contracts": Recipe(("domains/legal/messages",), "task", {
        "clause_category": "exact", "clause_yes_no": "exact", "statute_heading": "rouge"}),
    "support": Recipe(("domains/technical/messages",), "task", {
        "command": "rouge", "command_purpose": "rouge", "api_question": "rouge",
        "explain_command": "rouge"}),
    "tutor": Recipe(("eval/gsm8k",), "task", {"steps": "number"}),
}


def tutoring(record: Record) -> Record:
    """A lesson on a word problem: the first step is a hint, then the pupil asks for the rest."""
    steps = re.sub(r"<<.*?>>", "", record["answer"]).split("\n")
    return {"task": "steps", "messages": [
        {"role": "user", "content": record["question"]},
        {"role": "assistant", "content": f"A hint: {steps[0]}"},
        {"role": "user", "content": "Please go on."},
        {"role": "assistant", "content": "\n".join(steps[1:])}]}


def read_rows(data: Path, recipe: Recipe, split: str) -> Iterator[Record]:
    """The conversations of a split that are of the recipe's tasks."""
    for name in recipe.files:
        if name == "eval/gsm8k":  # every twentieth row of the training part is held out
            given = records(inputs([str(data / f"{name}.train.jsonl")]))
            for number, (_, record) in enumerate(given):
                if (number % 20 == 0) == (split == "dev"):
                    yield tutoring(record)
            continue
        for _, record in records(inputs([str(data / f"{name}.{split}.jsonl.xz")])):
            record.setdefault(recipe.key, name.rpartition("/")[2])
            if record[recipe.key] in recipe.tasks:
                yield record


def write(path: Path, rows: list[Record], checker: str | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    more = {"checker": checker} if checker else {}
    path.write_text("".join(json.dumps({"messages": row["messages"], **more}) + "\n"
                            for row in rows), encoding="utf-8")
    return str(path)


class Nearest:
    """The training row whose prompt is the most like a given one."""

    def __init__(self, rows: list[Record]) -> None:
        prompts = [_words(row) for row in rows]
        found = Counter(word for words in prompts for word in set(words))
        self.weight = {word: math.log(len(rows) / count) for word, count in found.items()}
        self.rows, self.places = rows, defaultdict(list)
        for number, words in enumerate(prompts):
            for word, value in self._vector(words).items():
                self.places[word].append((number, value))

    def _vector(self, words: list[str]) -> dict[str, float]:
        values = {word: count * self.weight.get(word, 0.0)
                  for word, count in Counter(words).items()}
        norm = math.sqrt(sum(value * value for value in values.values())) or 1.0
        return {word: value / norm for word, value in values.items() if value}

    def answer(self, row: Record) -> str:
        scores: dict[int, float] = defaultdict(float)
        for word, value in self._vector(_words(row)).items():
            for number, other in self.places[word]:
                scores[number] += value * other
        best = max(scores, key=lambda number: scores[number], default=0)
        return str(self.rows[best]["messages"][-1]["content"])


def _words(row: Record) -> list[str]:
    return re.findall(r"\w+", " ".join(one["content"] for one in row["messages"][:-1]).lower())


def floors(train: list[Record], rows: list[Record], checker: str) -> dict[str, float]:
    """The mean score of each floor over `rows`."""
    commonest = Counter(row["messages"][-1]["content"] for row in train).most_common(1)[0][0]
    nearest = Nearest(train)
    scores: dict[str, list[float]] = {"majority": [], "copy": [], "nearest": []}
    for record in rows:
        row: Row = make_row({"messages": record["messages"], "checker": checker}, "row")
        for name, answer in (("majority", commonest), ("copy", record["messages"][-2]["content"]),
                             ("nearest", nearest.answer(record))):
            scores[name].append(row.score(answer))
    return {name: statistics.mean(found) for name, found in scores.items()}


def run_recipe(name: str, base: Path, data: Path, folder: Path, limit: int,
               options: Sequence[str] = ()) -> dict[str, Any]:
    """Tune `base` into folder/run, unless that is there, and score it on `limit` held-out rows of
    each task. Raises ValueError for a task without rows."""
    recipe = RECIPES[name]
    train, dev = (list(read_rows(data, recipe, split)) for split in ("train", "dev"))
    tasks = {task: [[row for row in rows if row[recipe.key] == task] for rows in (train, dev)]
             for task in recipe.tasks}
    for task, both in tasks.items():
        if not all(both):
            raise ValueError(f"{data} has no rows of the task {task} to train on or to hold out; "
                             f"look at {recipe.key} in {', '.join(recipe.files)}")
    files = {task: write(folder / f"{task}.jsonl", rows[:limit], recipe.tasks[task])
             for task, (_, rows) in tasks.items()}
    run, seconds, begun = folder / "run", None, time.monotonic()
    if not run.exists():
        fira(["tune", str(base), "--chat", write(folder / "train.jsonl", train), "--held-out",
              write(folder / "dev.jsonl", dev[::-(-len(dev) // HELD_OUT)]), "--run", str(run),
              *options], standalone_mode=False)
        seconds = time.monotonic() - begun
    before, after = (measure(one, [], list(files.values()), screen=console(), as_chat=True)[
        "suites"]["own"]["tasks"] for one in (base, run))
    scores = {}
    for task, file in files.items():
        old, new = (found[Path(file).name] for found in (before, after))
        own, rows = tasks[task][0], [row for number, row in enumerate(tasks[task][1][:limit])
                                     if number not in new["left_out"]]
        scores[task] = {"rows": new["n"], "before": old["accuracy"], "after": new["accuracy"],
                        "interval": new["interval"], **(
                            floors(own, rows, recipe.tasks[task]) if rows else {})}
    return {"recipe": name, "base": base.name, "rows": len(train), "seconds": seconds,
            "options": [shorten(one) for one in options], "tasks": scores,
            "tuning": read_json(run / TUNING, "tune again into another folder")["measures"]}


def show(found: dict[str, Any]) -> None:
    checkers = RECIPES[found["recipe"]].tasks
    print(f"\n{'task':22}{'checker':>8}{'rows':>6}{'before':>8}{'after':>8}{'95%':>15}"
          f"{'majority':>10}{'copy':>7}{'nearest':>9}")
    for task, row in found["tasks"].items():
        if not row["rows"]:
            print(f"{task:22} every prompt is longer than the model reads")
            continue
        low, high = row["interval"]
        before = "-" if row["before"] is None else f"{row['before']:.3f}"
        print(f"{task:22}{checkers[task]:>8}{row['rows']:6}{before:>8}{row['after']:8.3f}"
              f"{f'{low:.3f} - {high:.3f}':>15}{row['majority']:10.3f}{row['copy']:7.3f}"
              f"{row['nearest']:9.3f}")


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("recipe", choices=list(RECIPES))
    parser.add_argument("--base", type=Path, required=True, help="the run that is tuned")
    parser.add_argument("--data", type=Path, required=True, help="folder of the conversations")
    parser.add_argument("--rows", type=int, default=100, help="held-out rows of each task")
    parser.add_argument("--out", type=Path, default=Path("out/recipes"))
    parser.add_argument("options", nargs="*", help="more of fira tune, after --")
    a = parser.parse_intermixed_args()
    found = run_recipe(a.recipe, a.base, a.data, a.out / a.recipe, a.rows, a.options)
    show(found)
    append(a.json, found)


if __name__ == "__main__":
    main()
