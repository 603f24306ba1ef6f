"""`fira report RUN`: a run on one page, report.html.

The page carries its pictures inside and loads nothing from a server, so that it can be mailed,
archived beside the weights, or opened years later.
"""
from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from fira.report.plot import PICTURE as PROGRESS
from fira.report.plot import draw_progress, summary, write
from fira.report.read import Run, read_run
from fira.report.reasoning import PICTURE as REASONING
from fira.report.reasoning import card_view, draw_card, read_card
from fira.report.results import newest_step, read_results, suite_summary, suite_view
from fira.report.routing import PICTURE as ROUTING
from fira.report.routing import draw_routing, routing_view
from fira.report.tuning import read_tuning, tuning_view

PAGE = "report.html"
EVENTS_SHOWN, SAMPLES_SHOWN = 200, 12  # the newest; metrics.jsonl has all of them
LEGEND = ("Rates in percent. Floors: the best constant answer, token frequencies alone, a model of "
          "the same shape with random weights.")
STYLE = """
body{margin:0 auto;max-width:70rem;padding:2.5rem 1.25rem 5rem;background:#fff;color:#1c2024;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{margin:0 0 1rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2.75rem 0 .75rem}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:.75rem}
.facts div,pre{background:#f6f7f9;border-radius:.5rem;padding:.75rem 1rem}
dt,p{color:#626b77;font-size:.82rem}dd{margin:0;font-size:1.1rem;font-weight:600}
.scroll{overflow-x:auto}img{width:100%;min-width:42rem;display:block}
pre{font:.86rem/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
white-space:pre-wrap;overflow-wrap:anywhere}
"""


def report(folder: str | Path) -> list[Path]:
    """Draw a run's pictures and page. Returns the written paths, the page first.

    Raises ValueError, one line, for a folder that is not a run or cannot be written to.
    """
    run = read_run(folder)
    pictures = [write(run.path / PROGRESS, draw_progress(run))]
    if run.routings:
        pictures.append(write(run.path / ROUTING, draw_routing(run)))
    if card := read_card(run.path):
        pictures.append(write(run.path / REASONING, draw_card(card)))
    page = make_page(run, {path.name: path for path in pictures}, card)
    return [write(run.path / PAGE, page), *pictures]


def print_summary(folder: str | Path, console: Console) -> None:
    """Show a run on a terminal: its figures, routing, results on tasks and newest sample."""
    run = read_run(folder)
    table = Table.grid(padding=(0, 2, 0, 0))
    for label, value in summary(run):
        table.add_row(Text(label, style="dim"), Text(value))
    console.print(Text(run.name, style="bold"), table, "", routing_view(run), sep="\n")
    results, others = read_results(run.path, newest_step(run.path))
    for line in (*(suite_summary(name, suite) for _, name, _, suite in results), others):
        if line:
            console.print(Text(f"\n{line}"))
    for sample in run.samples[-1:]:
        console.print(Text(f"\nsample at step {sample['step']:,}", style="dim"))
        console.print(Text.assemble((sample["prompt"], "bold"), sample["text"]))


def make_page(run: Run, pictures: Mapping[str, Path], card: dict[str, Any]) -> str:
    """The report as one HTML document with the pictures inside."""
    results, others = read_results(run.path, newest_step(run.path))
    tables = [suite_view(f"{name} ({file}, protocol {protocol})", suite)
              for file, name, protocol, suite in results]
    sections = {
        "Reasoning": _picture(pictures.get(REASONING), "accuracy by depth")
        + _shown(card_view(card), 112) if card else "",
        "Training": _picture(pictures.get(PROGRESS), "training progress"),
        "Routing": _picture(pictures.get(ROUTING), "expert load") + _shown(routing_view(run), 80),
        "Tuning": _shown(tuning_view(tuned), 100) if (tuned := read_tuning(run.path)) else "",
        "Results on tasks": "".join(_shown(table, 120) for table in tables) + "".join(
            f"<p>{escape(text)}</p>" for text in (LEGEND * bool(tables), others) if text),
        "Samples": "".join(f"<p>step {row['step']:,}</p><pre><b>{escape(row['prompt'])}</b>"
                           f"{escape(row['text'])}</pre>"
                           for row in reversed(run.samples[-SAMPLES_SHOWN:])),
        "Events": _text("\n".join(f"step {row['step']:,}: {row['text']}"
                                  for row in run.events[-EVENTS_SHOWN:])),
        "Settings and versions": _text(json.dumps(run.about, indent=2, ensure_ascii=False))}
    facts = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"
                    for label, value in summary(run))
    body = "".join(f"<section><h2>{title}</h2>{content}</section>\n"
                   for title, content in sections.items() if content)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{escape(run.name)} · FIRA</title><style>{STYLE}</style></head>\n"
            f'<body><h1>{escape(run.name)}</h1><dl class="facts">{facts}</dl>\n'
            f"{body}</body></html>\n")


def _picture(path: Path | None, description: str) -> str:
    if path is None:
        return ""
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return (f'<div class="scroll"><img alt="{description}" '
            f'src="data:image/png;base64,{content}"></div>')


def _shown(thing: RenderableType, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(thing)
    return _text(console.export_text())


def _text(text: str) -> str:
    return f"<pre>{escape(text)}</pre>" if text else ""
