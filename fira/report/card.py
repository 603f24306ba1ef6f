"""The model card: README.md in the form that the Hugging Face hub reads, from a run's own records.

A fact that no record holds is said to be missing. Paths of this machine are not published.
"""
from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fira.files import MANIFEST, read_json, write_text
from fira.report.read import CONFIG, Run, read_run
from fira.report.results import AGAIN, newest_step, read_results
from fira.report.tuning import CAPTION, HEAD, read_tuning, tuning_rows
from fira.runlog import METRICS

CARD, MARK = "README.md", "Written by `fira card` from the records of the run."
# How a record names the model that this one was made from: what the hub calls the relation.
RELATIONS = {"from": "finetune", "quantized_from": "quantized", "trimmed_from": "finetune",
             "imported_from": None}
FACTS = {  # where a fact stands in `_records`: its name
    "model/architecture": "architecture", "run/parameters/total": "parameters",
    "run/parameters/active": "parameters active per token",
    "model/num_experts": "experts per layer", "model/top_k": "experts per token (top-k)",
    "model/trained_length": "longest text read in training, tokens", "origin": "made from",
    "files/model.safetensors/sha256": "SHA-256 of the run's weights",
    "files/tokenizer.json/sha256": "SHA-256 of tokenizer.json",
    "run/data/sources": "sources of text", "run/data/licenses": "licenses of the sources",
    "run/data/tokens": "tokens of training text", "run/data/sha256": "SHA-256 of its manifest",
    "step/tokens": "tokens read in training", "step/seconds": "training time, seconds",
    "run/started": "begun", "run/machine": "machine", "run/commit": "commit of FIRA",
    "run/config/train/seed": "seed", "validation/bits_per_byte": "bits per byte, held-out text",
    "interval": "its 95% interval"}
LIMITS = ("For research and learning.", "Statements of a model of this size are often false.",
          "The model was not tested for bias, for safety or for harmful output.")


def make_card(folder: Path, license: str | None = None, library: str = "transformers") -> str:
    """The card of a run's newest step, or of a step folder; `license` None keeps that of the run's
    present card. Raises ValueError, one line, if there is no model or a record is damaged."""
    records = _records(folder)
    model, results = records["model"], [
        ((suite, protocol), name, task) for _, suite, protocol, content in records["results"]
        for name, task in content["tasks"].items()]
    front = {"license": license or records["license"], "library_name": library,
             "pipeline_tag": "text-generation", **records["base"], **_front(records, results)}
    dense = "The model is dense." if model["num_experts"] == 1 else "Not recorded."
    limits = (*LIMITS, "It was tuned on chat turns." if model.get("chat") else
              "It continues text; it was not tuned to follow instructions or to chat.")
    return "\n".join([
        "---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}"  # JSON is also YAML
                 for key, value in front.items() if value), "---",
        f"\n# {records['name']}\n\n{MARK}\n\n## Facts\n",
        *_table("fact, value", ((name, _find(records, keys)) for keys, name in FACTS.items())),
        "\n## Results on tasks\n",
        *_table("suite, protocol (SHA-256), task, items, bits per byte, accuracy, 95% interval", (
            (*suite, name, row["n"], row["bits_per_byte"], row["accuracy"], "{:.3f} to {:.3f}{}"
             .format(*row["interval"], ", at chance" * row["at_chance"]))
            for suite, name, row in results)),
        "\n## Expert load at the end of training\n",
        *_table("layer, least used, most used, CV, max/mean, entropy, dead", (
            (layer, f"{min(load):.1%}", f"{max(load):.1%}", *(records["routing"][key][layer] for key
             in ("cv", "max_mean", "entropy", "dead")))
            for layer, load in enumerate(records["routing"].get("load", ()))), dense),
        *(["\n## What the tuning changed\n", *_table(", ".join(HEAD), rows), "", CAPTION]
          if (rows := [*tuning_rows(read_tuning(records["folder"]))]) else ()),
        "\n## Intended use and limits\n", *(f"- {limit}" for limit in limits), ""])


def write_card(folder: Path, license: str | None) -> Path:
    """Write the card into a run. Raises ValueError if another README.md is there."""
    path, text = folder / CARD, make_card(folder, license, "fira")
    if path.is_file() and MARK not in path.read_text(encoding="utf-8"):
        raise ValueError(f"{path} was not written by fira card; move it away, and try again")
    write_text(path, text)
    return path


def _front(records: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """Tags, data sets and scores, as the hub reads them."""
    sources: list[str] = _find(records, "run/data/sources") or []
    model = records["model"]
    scores = [("held-out text", records["validation"]), *((name, row) for _, name, row in results)]
    index: list[dict[str, Any]] = [
        {"task": {"type": "text-generation"}, "dataset": {"type": "text", "name": name},
         "metrics": [{"type": key, "value": round(row[key], 4)} for key in
                     ("bits_per_byte", "accuracy") if row.get(key) is not None]}
        for name, row in scores if row]
    return {"tags": ["fira", model["architecture"],
                     "dense" if model["num_experts"] == 1 else "mixture-of-experts"],
            "datasets": [name[4:].split(":")[0] for name in sources if name.startswith("hub:")],
            "metrics": sorted({one["type"] for result in index for one in result["metrics"]}),
            "model-index": [{"name": records["name"], "results": index}] if index else None}


def _records(folder: Path) -> dict[str, Any]:
    """All that is recorded of a step: of its run, its model and files, and the rows of the step."""
    step = newest_step(folder)
    model = read_json(step / CONFIG, "give a run folder, such as out/tiny, or a step folder in it")
    if "architecture" not in model:
        raise ValueError(f"{folder} has no complete step; give a run folder such as out/tiny")
    above = step.parent if (step.parent / CONFIG).is_file() else step
    run = (read_run(above) if (above / METRICS).is_file() else
           Run(above, read_json(above / CONFIG, AGAIN), [], [], [], [], []))
    rows = {kind: next((row for row in found if step.name == f"step-{row['step']:06d}"), {})
            for kind, found in (("step", run.steps), ("validation", run.validations),
                                ("routing", run.routings))}
    bits, error = map(rows["validation"].get, ("bits_per_byte", "bits_per_byte_error"))
    manifest, card, base = step / MANIFEST, above / CARD, _base(run.about)
    license = re.search(r'^license: "(.+)"$', card.read_text("utf-8") if card.is_file() else "",
                        re.MULTILINE)
    return {"name": run.name, "run": run.about, "model": model, **rows, "base": base,
            "folder": above,
            "origin": base.get("base_model", "new weights" if run.steps else None),
            "interval": f"{bits - 1.96 * error:.4f} to {bits + 1.96 * error:.4f}" if error else "",
            "files": read_json(manifest, AGAIN).get("files") if manifest.is_file() else None,
            "results": read_results(above, step)[0],
            "license": license[1] if license else "unknown"}


def _find(records: Any, keys: str) -> Any:
    """What `keys` (a/b/c) lead to; None if nothing is there."""
    for key in keys.split("/"):
        records = (records or {}).get(key)
    return records


def _base(about: dict[str, Any]) -> dict[str, str]:
    """The model that this one was made from, by its name on the hub if it is in the hub's cache."""
    for record, relation in RELATIONS.items():
        if path := about.get(record):
            hub = re.search(r"models--([^/]+)--([^/]+)", path)
            own = Path(path).parent if Path(path).name.startswith("step-") else Path(path)
            name = {"base_model": "/".join(hub.groups()) if hub else own.name}
            return name | ({"base_model_relation": relation} if relation else {})
    return {}


def _table(head: str, rows: Iterable[tuple[Any, ...]], empty: str = "Not recorded.") -> list[str]:
    """A table in Markdown, whose columns are in `head`."""
    names = head.split(", ")
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in (names, ["---"] * len(names), *rows)]
    return lines if len(lines) > 2 else [empty]


def _cell(value: Any) -> str:
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    text = "; ".join(value) if isinstance(value, list) else str(value or "not recorded")
    return text.replace("|", "\\|")
