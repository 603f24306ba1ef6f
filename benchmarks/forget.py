"""What a tuning forgets, over the share of general text that is mixed in, and what a trim costs.

    python benchmarks/forget.py out/moe-1 out/dense-1 --chat FILE --held-out FILE --general FOLDER

Every run is tuned whole with each share of replay, for as many steps, or with --longer until it has
read as many conversations (for 0.5 twice the steps). The goal is general bits per byte that rise at
most 0.01 at 90% of the gain on the target that the tuning without replay reaches: at an earlier
step, or as a mean of the tuned run and its base (fira merge --share). Bits per byte between two
evaluations are interpolated. Then half of the experts of the tuned run are dropped (fira trim), for
a goal of 1% on the target.
"""
from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

from record import append, machine, new_parser

from fira.cli import fira
from fira.convert.average import average, load_whole
from fira.data.batches import Shards
from fira.data.conversations import Reader, Row
from fira.data.packs import Windows
from fira.data.sources import inputs
from fira.eval.tuning import bits_per_byte, held_out_rows
from fira.files import read_json
from fira.infer.load import load
from fira.model.generate import window_length
from fira.runlog import read_rows

PART = 0.9  # of the gain
SHARES = (0.7, 0.8, 0.9)  # of what a tuning changed


class Point(NamedTuple):
    """An evaluation: bits per byte of held-out rows and of held-out general text."""

    place: float  # the step, or the share of what the tuning changed
    target: float
    general: float


def tune(base: Path, run: Path, options: list[str]) -> list[Point]:
    """The evaluations of a tuning, which is made or finished unless it is there."""
    fira(["tune", str(base), "--method", "full", "--no-card", "--run", str(run),
          *(["--resume"] if run.exists() else options)], standalone_mode=False)
    return [Point(row["step"], row["bits_per_byte"], row["bits_per_byte/general"])
            for row in read_rows(run) if row["kind"] == "validation"]


def untouched(base: Path, run: Path, options: list[str]) -> Point:
    """The evaluation after one step whose rates are as good as 0."""
    optim = read_json(base / "config.json", "give a run")["config"]["optim"]
    rates = [f"optim.{key}=1e-12" for key in optim if key.endswith("lr") and optim[key]]
    return tune(base, run, [*options, "train.steps=1", *rates])[0]._replace(place=0)


def rise_at(points: list[Point], target: float) -> float | None:
    """How much the general text rises until the target is first reached; None if it never is."""
    for last, now in itertools.pairwise(points):
        if now.target <= target:
            part = (last.target - target) / (last.target - now.target)
            return last.general + part * (now.general - last.general) - points[0].general
    return None


def trimmed(run: Path, out: Path, chat: str, held_out: str) -> float | None:
    """Bits per byte of the held-out target after half of the experts are dropped, as a ratio."""
    if read_json(run / "config.json", "give a run")["config"]["model"]["num_experts"] == 1:
        return None
    if not out.exists():
        fira(["trim", str(run), str(out), "--keep", "0.5", "--chat", chat], standalone_mode=False)
    whole, half = (measure_bits(one, held_out) for one in (run, out))
    return half / whole


def measure_bits(run: Path, chat: str) -> float:
    model, tokenizer, _ = load(run)
    return bits_per_byte(model, tokenizer, read(tokenizer, window_length(model), chat))


def read(tokenizer: Any, length: int, chat: str) -> list[Row]:
    return Reader(tokenizer, length).chat(inputs([chat]))


def averages(base: Path, run: Path, held_out: str, general: str) -> list[Point]:
    """Evaluations of the base, of means of both by SHARES, and of the tuned run."""
    source, tokenizer, _ = load_whole(base)
    length = window_length(source)
    texts = [read(tokenizer, length, held_out),
             held_out_rows(Windows(Shards(general, "validation"), length, ""))]
    models = ((share, average(load_whole(run).model, source, share, tokenizer))
              for share in (0, *SHARES, 1))
    return [Point(share, *(bits_per_byte(model, tokenizer, rows) for rows in texts))
            for share, model in models]


def format_rise(rise: float | None) -> str:
    return "never" if rise is None else f"{rise:.4f}"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("bases", nargs="+", type=Path, help="runs that are tuned")
    parser.add_argument("--chat", required=True, help="conversations to tune on")
    parser.add_argument("--held-out", required=True, help="conversations to evaluate on")
    parser.add_argument("--general", required=True, help="prepared general text")
    parser.add_argument("--replay", type=float, nargs="+", default=[0, 0.01, 0.05, 0.2])
    parser.add_argument("--steps", type=int, default=120, help="of a tuning without replay")
    parser.add_argument("--longer", action="store_true", help="read as many conversations")
    parser.add_argument("--keep", type=Path, default=Path("out/forget"), help="where runs are kept")
    parser.add_argument("--settings", nargs="*", default=[], help="more of fira tune")
    a = parser.parse_args()
    print(f"{'base':12}{'replay':>8}{'target':>9}{'gain':>8}{'general':>9}{'rise':>8}"
          f"{f'rise at {PART:.0%}':>13}{'averaged':>10}{'trimmed':>9}")
    for base in a.bases:
        options = ["--chat", a.chat, "--held-out", a.held_out, "--general", a.general, *a.settings]
        before, goal = untouched(base, a.keep / f"{base.name}-before", options), None
        found, mean_goal = list[dict[str, Any]](), None
        for replay in a.replay:
            more = a.longer and replay > 0
            run = a.keep / f"{base.name}-{replay:g}{'-longer' * more}"
            steps = round(a.steps / (1 - replay)) if more else a.steps
            points = [before, *tune(base, run, [
                *options, "--replay", str(replay), f"train.steps={steps}"])]
            goal = goal or before.target - PART * (before.target - points[-1].target)
            last, rise = points[-1], rise_at(points, goal)
            means = averages(base, run, a.held_out, a.general)
            mean_goal = mean_goal or means[0].target - PART * (means[0].target - means[-1].target)
            averaged = rise_at(means, mean_goal)
            half = trimmed(run, run.with_name(f"{run.name}-half"), a.chat, a.held_out)
            found.append({"replay": replay, "steps": steps, "points": points, "rise": rise,
                          "averages": means, "rise_averaged": averaged, "trimmed": half})
            print(f"{base.name:12}{replay:8.0%}{last.target:9.4f}{before.target - last.target:8.4f}"
                  f"{last.general:9.4f}{last.general - before.general:8.4f}"
                  f"{format_rise(rise):>13}{format_rise(averaged):>10}"
                  f"{'' if half is None else f'{half - 1:+.1%}':>9}", flush=True)
        append(a.json, {"base": base.name, "tunings": found, "machine": machine()})


if __name__ == "__main__":
    main()
