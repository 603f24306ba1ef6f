"""`fira report RUN`: everything a run wrote, on one page that needs nothing else to be read.

report.html carries its pictures inside and asks no server for anything, so it can be mailed,
archived beside the weights, or opened years later.
"""
from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fira.report.plot import duration, progress_figure, save_progress, short
from fira.report.read import Routing, Run, differences, read_run
from fira.report.routing import (
    DENSE,
    NONE_YET,
    heat,
    is_dense,
    routing_figure,
    routing_view,
    save_routing,
)

PAGE = "report.html"
EVENTS_SHOWN, SAMPLES_SHOWN = 200, 12  # the newest; all of them stay in metrics.jsonl
STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c2024;--quiet:#626b77;
--line:#e5e7eb;--soft:#f6f7f9}
@media(prefers-color-scheme:dark){
:root{--paper:#15181c;--ink:#e6e8eb;--quiet:#9aa3ad;--line:#2b3038;--soft:#1c2026}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:70rem;padding:2.5rem 1.25rem 5rem;
background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.9rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.75rem 0 .75rem}
p{margin:.4rem 0;max-width:44rem}.quiet{color:var(--quiet)}
img{width:100%;min-width:42rem;height:auto;display:block}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));
gap:.75rem;margin:1.5rem 0}
.facts div{background:var(--soft);border-radius:.5rem;padding:.75rem 1rem}
.facts dt{color:var(--quiet);font-size:.82rem}.facts dd{margin:0;font-size:1.1rem;font-weight:600}
dl{margin:0}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{color:var(--quiet);font-weight:500}
table.numbers th,table.numbers td{text-align:right;white-space:nowrap}
code,pre{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
font-size:.86rem}
code{overflow-wrap:anywhere}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--soft);border-radius:.5rem;
padding:.8rem 1rem;margin:.3rem 0 1rem}
summary{cursor:pointer;color:var(--quiet);margin:.75rem 0}
.note{border-left:3px solid #d9541e;padding-left:.8rem}
"""


def report(folder: str | Path) -> list[Path]:
    """Draw a run's pictures and its page anew. Returns the written paths, the page first.

    Raises ValueError, one line, for a folder that is not a run or cannot be written to.
    """
    run = read_run(folder)
    routing = save_routing(run.path)
    pictures = [save_progress(run.path)] + ([routing] if routing else [])
    return [_write(run.path / PAGE, page(run)), *pictures]


def print_summary(folder: str | Path, console: Console) -> None:
    """Show the run on a terminal: its figures, routing, newest sample and events."""
    run = read_run(folder)
    console.print(Text(run.name, style="bold"))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    for label, value in [*summary(run), *_differences_as_facts(run)]:
        table.add_row(label, Text(value))
    console.print(table)
    for note in run.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    console.print()
    console.print(routing_view(run))
    for sample in run.samples[-1:]:
        console.print(Text(f"\nsample at step {sample.step:,}", style="dim"))
        console.print(Text.assemble((sample.prompt, "bold"), sample.text))


def summary(run: Run) -> list[tuple[str, str]]:
    """The figures that describe a run, as (label, value); what was not recorded is left out."""
    facts, counts = [], run.parameters
    if run.steps:
        last = run.steps[-1]
        speed = last.tokens / last.seconds if last.seconds > 0 else math.nan
        facts += [("training loss (nats/token)", f"{_recent_loss(run):.4f}"),
                  ("steps", f"{last.step:,}"), ("tokens", short(last.tokens)),
                  ("training time", duration(last.seconds)),
                  ("tokens per second", short(speed))]
        facts += [("skipped steps", f"{last.skipped:,}")] if last.skipped else []
    if run.best:
        facts = [("best bits per byte", f"{run.best.bits_per_byte:.4f}"),
                 ("reached at step", f"{run.best.step:,}"),
                 ("its loss (nats/token)", f"{run.best.loss:.4f}"), *facts]
    if counts.get("total"):
        facts.append(("parameters", short(counts["total"])))
        facts.append(("active per token", short(counts.get("active", counts["total"]))))
    if run.routings:
        newest = run.routings[-1]
        facts += [("expert imbalance (CV)", f"{sum(newest.cv) / len(newest.cv):.2f}"),
                  ("dead experts", str(sum(newest.dead)))]
    facts += [("preset", str(run.about["preset"]))] if run.about.get("preset") else []
    facts += [("commit", str(run.about["commit"]))] if run.about.get("commit") else []
    return facts or [("steps", "none yet")]


def page(run: Run) -> str:
    """The whole report as one HTML document."""
    sections = [
        ("Training", _picture(lambda dark: progress_figure(run, dark), "training progress")),
        ("Routing", _routing(run)),
        ("Samples", _samples(run)),
        ("Settings", _settings(run)),
        ("Events", _table(("step", "event"), [(f"{event.step:,}", event.text)
                                              for event in run.events[-EVENTS_SHOWN:]])),
        ("Where it ran", _origin(run)),
    ]
    facts = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"
                    for label, value in summary(run))
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in run.notes)
    body = "".join(f"<section><h2>{title}</h2>{content}</section>\n"
                   for title, content in sections if content)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{escape(run.name)} · FIRA</title><style>{STYLE}</style></head>\n"
            f'<body><h1>{escape(run.name)}</h1>{notes}<dl class="facts">{facts}</dl>\n'
            f"{body}</body></html>\n")


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="replace")
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror or error}); make the folder "
                         "writable and free some space") from None
    return path


def _recent_loss(run: Run) -> float:
    """Mean over the last fiftieth of the run: one batch's loss is too noisy to report."""
    losses = [row.loss for row in run.steps[-max(1, len(run.steps) // 50):]]
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan


def _picture(draw: Callable[[bool], Figure], description: str) -> str:
    """A figure inside the page, in the reader's own light or dark."""
    return (f'<div class="scroll"><picture><source media="(prefers-color-scheme: dark)" '
            f'srcset="{_embedded(draw(True))}"><img alt="{escape(description)}" '
            f'src="{_embedded(draw(False))}"></picture></div>')


def _embedded(figure: Figure) -> str:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _routing(run: Run) -> str:
    if not run.routings:
        return f'<p class="quiet">{escape(DENSE if is_dense(run) else NONE_YET)}</p>'
    return (_picture(lambda dark: routing_figure(run, dark), "load per layer and expert")
            + _routing_rows(run.routings[-1]))


def _routing_rows(routing: Routing) -> str:
    experts = len(routing.load[0])
    head = "".join(f"<th>e{expert}</th>" for expert in range(experts))
    rows = []
    for layer, load in enumerate(routing.load):
        cells = "".join(f"<td{_tint(share * experts)}>{100 * share:.1f}</td>" for share in load)
        rows.append(f"<tr><th>{layer}</th><td>{routing.cv[layer]:.2f}</td>"
                    f"<td>{routing.max_mean[layer]:.2f}</td><td>{routing.entropy[layer]:.2f}</td>"
                    f"<td>{routing.dead[layer]}</td>{cells}</tr>")
    return (f'<details{" open" if experts <= 16 else ""}><summary>Load in % of a layer&#39;s '
            f"tokens at step {routing.step:,}; an even share is {100 / experts:.3g}%</summary>"
            f'<div class="scroll"><table class="numbers"><tr><th>layer</th><th>CV</th>'
            f"<th>max/mean</th><th>entropy</th><th>dead</th>{head}</tr>{''.join(rows)}</table>"
            "</div></details>")


def _tint(ratio: float) -> str:
    """A colored cell where the load is far from even, a plain one elsewhere."""
    color = heat(ratio)
    return "" if color == heat(1.0) else f' style="background:{color}40"'


def _samples(run: Run) -> str:
    return "".join(f'<p class="quiet">step {sample.step:,}</p>'
                   f"<pre><b>{escape(sample.prompt)}</b>{escape(sample.text)}</pre>"
                   for sample in reversed(run.samples[-SAMPLES_SHOWN:]))


def _settings(run: Run) -> str:
    changed = _table(("setting", "preset", "this run"),
                     [(key, "default" if old is None else _plain(old), _plain(new))
                      for key, old, new in differences(run)])
    every = _table(("setting", "value"),
                   [(key, _plain(value)) for key, value in run.settings.items()])
    same = '<p class="quiet">As the preset has it, nothing changed.</p>'
    return (changed or same) + (f"<details><summary>All settings</summary>{every}</details>"
                                if every else "")


def _origin(run: Run) -> str:
    rows = [("command", " ".join(map(str, run.about.get("argv") or []))),
            ("commit", str(run.about.get("commit") or "not a checkout"))]
    rows += [(name, str(value)) for name, value in (run.about.get("versions") or {}).items()]
    return _table(("", ""), [row for row in rows if row[1]])


def _table(head: Iterable[str], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    top = "".join(f"<th>{escape(title)}</th>" for title in head)
    cells = ["".join(f"<td><code>{escape(cell)}</code></td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _differences_as_facts(run: Run) -> list[tuple[str, str]]:
    changed = ", ".join(f"{key}={_plain(new)}" for key, _, new in differences(run))
    return [("differs from the preset", changed)] if changed else []


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)
