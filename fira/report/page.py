"""`fira report RUN`: a run on one page, report.html.

The page carries its pictures inside and loads nothing from a server, so that it can be mailed,
archived beside the weights, or opened years later.
"""
from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fira.report.plot import PICTURE as PROGRESS
from fira.report.plot import draw_progress, save, summary, write
from fira.report.read import Run, differences, read_run
from fira.report.routing import PICTURE as ROUTING
from fira.report.routing import draw_routing, routing_view

PAGE = "report.html"
EVENTS_SHOWN, SAMPLES_SHOWN = 200, 12  # the newest; metrics.jsonl has all of them
STYLE = """
body{margin:0 auto;max-width:70rem;padding:2.5rem 1.25rem 5rem;background:#fff;color:#1c2024;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.9rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.75rem 0 .75rem}
.quiet,th,dt,summary{color:#626b77;font-weight:400}
.note{border-left:3px solid #d9541e;padding-left:.8rem}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:.75rem}
.facts div{background:#f6f7f9;border-radius:.5rem;padding:.75rem 1rem}
dt{font-size:.82rem}dd{margin:0;font-size:1.1rem;font-weight:600;overflow-wrap:anywhere}
.scroll{overflow-x:auto}img{width:100%;min-width:42rem;display:block}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid #e5e7eb;text-align:left;vertical-align:top}
td,pre{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
td,pre{font-size:.86rem;overflow-wrap:anywhere}
pre{white-space:pre-wrap;background:#f6f7f9;border-radius:.5rem;padding:.8rem 1rem}
summary{cursor:pointer;margin:.75rem 0}
"""


def report(folder: str | Path) -> list[Path]:
    """Draw a run's pictures and page. Returns the written paths, the page first.

    Raises ValueError, one line, for a folder that is not a run or cannot be written to.
    """
    run = read_run(folder)
    pictures = [save(draw_progress(run), run.path / PROGRESS)]
    if run.routings:
        pictures.append(save(draw_routing(run), run.path / ROUTING))
    return [write(run.path / PAGE, make_page(run, *pictures).encode(errors="replace")), *pictures]


def print_summary(folder: str | Path, console: Console) -> None:
    """Show a run on a terminal: its figures, changed settings, routing and newest sample."""
    run = read_run(folder)
    changed = ", ".join(f"{key}={value}" for key, _, value in differences(run))
    console.print(Text(run.name, style="bold"))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    for label, value in [*summary(run), *([("differs from the preset", changed)] * bool(changed))]:
        table.add_row(label, Text(value))
    console.print(table)
    for note in run.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    console.print()
    console.print(routing_view(run))
    for sample in run.samples[-1:]:
        console.print(Text(f"\nsample at step {sample['step']:,}", style="dim"))
        console.print(Text.assemble((sample["prompt"], "bold"), sample["text"]))


def make_page(run: Run, progress: Path, routing: Path | None = None) -> str:
    """The report as one HTML document with the pictures inside."""
    sections = {
        "Training": _picture(progress, "training progress"),
        "Routing": (_picture(routing, "expert load") if routing else "") + _routing(run),
        "Samples": "".join(f'<p class="quiet">step {row["step"]:,}</p><pre><b>'
                           f'{escape(row["prompt"])}</b>{escape(row["text"])}</pre>'
                           for row in reversed(run.samples[-SAMPLES_SHOWN:])),
        "Settings": _settings(run),
        "Events": _table(("step", "event"), [(f"{row['step']:,}", row["text"])
                                             for row in run.events[-EVENTS_SHOWN:]]),
        "Origin": _origin(run)}
    facts = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"
                    for label, value in summary(run))
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in run.notes)
    body = "".join(f"<section><h2>{title}</h2>{content}</section>\n"
                   for title, content in sections.items() if content)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{escape(run.name)} · FIRA</title><style>{STYLE}</style></head>\n"
            f'<body><h1>{escape(run.name)}</h1>{notes}<dl class="facts">{facts}</dl>\n'
            f"{body}</body></html>\n")


def _picture(path: Path, description: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return (f'<div class="scroll"><img alt="{description}" '
            f'src="data:image/png;base64,{content}"></div>')


def _routing(run: Run) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(routing_view(run))
    return f"<pre>{escape(console.export_text())}</pre>"


def _settings(run: Run) -> str:
    changed = [(key, "default" if old is None else str(old), str(new))
               for key, old, new in differences(run)]
    everything = _table(("setting", "value"), [(key, str(value))
                                               for key, value in run.settings.items()])
    return ((_table(("setting", "preset", "this run"), changed)
             or '<p class="quiet">No setting differs from the preset.</p>')
            + f"<details><summary>All settings</summary>{everything}</details>")


def _origin(run: Run) -> str:
    rows = {"command": " ".join(map(str, run.about.get("argv") or [])),
            "commit": run.about.get("commit"), **(run.about.get("versions") or {})}
    return _table(("", ""), [(name, str(value)) for name, value in rows.items() if value])


def _table(head: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return (f'<div class="scroll"><table><tr>{"".join(f"<th>{title}</th>" for title in head)}</tr>'
            f"{''.join(f'<tr>{row}</tr>' for row in cells)}</table></div>")
