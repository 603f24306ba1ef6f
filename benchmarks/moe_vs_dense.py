"""A mixture of experts against its dense twins: the same text, machine and wall clock.

    python benchmarks/moe_vs_dense.py tiny --data out/quickstart/data --minutes 5 --seeds 3

Three arms, one after the other: the preset; its dense twin of equal active FLOPs (same class, one
expert as wide as the chosen ones together); a dense twin of equal total parameters. Each arm first
finds its own learning rate among --factors of the preset's, in shorter runs. Every finished run
is kept in --out and not run again, so the same command goes on where it stopped; --report only
draws what is there. With --nanogpt its CPU recipe joins on the same text, scored on the same
held-out documents by `fira eval`'s rule of counting every byte once.
"""
from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from arms import DONE, Arm, best_rate, final, spread, train_arm
from nanogpt import run_nanogpt
from record import append, machine

from fira.config import load_preset
from fira.data.shards import Shards
from fira.data.tokenizer import Tokenizer
from fira.eval.bits_per_byte import score
from fira.infer.load import load
from fira.report.read import Run, Validation, read_run
from fira.stages.pretrain import configure

DENSE = "dense, equal active"
COLORS = {"MoE": "#d9541e", DENSE: "#3b6fb6", "dense, equal total": "#7a8791"}
AXES: dict[str, Callable[[Validation, int], float]] = {
    "tokens": lambda row, flops: row.tokens,
    "training FLOPs": lambda row, flops: row.tokens * flops,
    "seconds": lambda row, flops: row.seconds,
}


def make_arms(preset: str, settings: list[str]) -> dict[str, Arm]:
    spec = configure(load_preset(preset), settings).model
    one = ("model.num_experts=1", "model.top_k=1")
    return {"MoE": Arm("moe", preset, tuple(settings)),
            DENSE: Arm("dense-active", preset,
                       (*settings, *one, f"model.d_ff={spec.top_k * spec.d_ff}")),
            "dense, equal total": Arm("dense-total", preset,
                                      (*settings, *one,
                                       f"model.d_ff={spec.num_experts * spec.d_ff}"))}


def reach(run: Run, goal: float, flops: int) -> dict[str, float | None]:
    """Where the run's validation first falls to `goal`, by each axis; None if it never does."""
    rows = run.validations
    for before, after in zip([None, *rows], rows, strict=False):
        if after.bits_per_byte > goal:
            continue
        found = {}
        for name, axis in AXES.items():
            end = axis(after, flops)
            if before is None:
                found[name] = end
                continue
            start = axis(before, flops)
            part = (before.bits_per_byte - goal) / (before.bits_per_byte - after.bits_per_byte)
            found[name] = start + part * (end - start)
        return found
    return dict.fromkeys(AXES)


def decode_speed(folder: Path, tokens: int = 128) -> float:
    """Greedy tokens/s of one sequence, the best of three."""
    model, tokenizer, _ = load(folder, "cpu")
    tokens = min(tokens, model.spec.context - 1)
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        model.generate([tokenizer.end_of_text], max_new_tokens=tokens, temperature=0.0)
        best = max(best, tokens / (time.perf_counter() - began))
    return best


def documents(data: Path, split: str, limit: int | None = None) -> list[str]:
    """The text of a prepared folder, document by document."""
    tokenizer, shards = Tokenizer.load(data), Shards.open(data, split)
    ids = np.asarray(shards[:limit or len(shards)])
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    starts = [0, *(ends[:-1] + 1)] if len(ends) else []
    return [tokenizer.decode(ids[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


def collect(arms: dict[str, Arm], out: Path) -> dict[str, list[Run]]:
    """The finished runs of every arm."""
    return {name: [read_run(done.parent) for done in sorted(out.glob(f"{arm.key}-seed*/{DONE}"))]
            for name, arm in arms.items()}


def report(arms: dict[str, Arm], out: Path, peer: dict[str, Any] | None) -> None:
    """Write card.md and card.png into `out` from the runs that are finished."""
    runs = collect(arms, out)
    if not runs[DENSE]:
        print("no dense run is finished yet: nothing to compare with")
        return
    goal = statistics.mean(final(run) for run in runs[DENSE])
    lines = [f"# {out.name}: mixture of experts against dense", "", f"{machine()}. Bits per byte "
             f"on held-out text, mean ± deviation over seeds. *To reach*: where the validation "
             f"curve falls to {goal:.4f}, the end of the dense twin, median over seeds.", "",
             "| | seeds | parameters, active / total | rate | bits per byte | tokens | seconds "
             "to reach | tokens to reach | training FLOPs to reach | decode tokens/s |",
             "|---" * 10 + "|"]
    for name, found in runs.items():
        if found:
            lines.append(table_row(name, found, arms[name].flops_per_token, goal))
    if peer:
        lines += ["", f"nanoGPT's CPU recipe: {peer['bits_per_byte']:.4f} bits per byte in "
                  f"{peer['seconds']:.0f} s; the MoE, by the same rule: "
                  f"{peer['moe_bits_per_byte']:.4f}."]
    (out / "card.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(arms, runs, goal, out / "card.png")
    print("\n".join(lines))
    append(out / "card.jsonl", {"goal": goal, "nanogpt": peer, "final": {
        name: [final(run) for run in found] for name, found in runs.items()}})


def table_row(name: str, found: list[Run], flops: int, goal: float) -> str:
    reached = [reach(run, goal, flops) for run in found]
    cells = []
    for axis in ("seconds", "tokens", "training FLOPs"):
        values = [one[axis] for one in reached if one[axis] is not None]
        cells.append(f"{statistics.median(values):.3g} ({len(values)} of {len(found)})"
                     if values else "never")
    counts, last = found[0].parameters, found[0].validations[-1]
    return (f"| {name} | {len(found)} | {counts['active'] / 1e6:.1f}M / "
            f"{counts['total'] / 1e6:.1f}M | {found[0].settings['optim.lr']:g} | "
            f"{spread([final(run) for run in found])} | {last.tokens / 1e6:.2f}M | "
            f"{' | '.join(cells)} | {decode_speed(found[0].path):.0f} |")


def draw(arms: dict[str, Arm], runs: dict[str, list[Run]], goal: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), dpi=130, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for panel, (label, axis) in zip(panels, AXES.items(), strict=True):
        for name, found in runs.items():
            flops = arms[name].flops_per_token
            for number, run in enumerate(found):
                panel.plot([axis(row, flops) for row in run.validations],
                           [row.bits_per_byte for row in run.validations], color=COLORS[name],
                           linewidth=1.4, label=name if number == 0 else None)
        panel.axhline(goal, color="#999999", linewidth=0.8, linestyle=":")
        panel.set_xlabel(label)
        panel.set_ylim(top=goal * 1.6)
        panel.grid(alpha=0.2)
    panels[0].set_ylabel("bits per byte, held out")
    panels[0].legend(frameon=False)
    figure.savefig(path)


def nanogpt_side(options: argparse.Namespace, moe: Run) -> dict[str, Any]:
    """nanoGPT on the same text for the same seconds; kept in nanogpt.json."""
    kept = options.out / "nanogpt.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    data = Path(options.data)
    held_out = documents(data, "validation", configure(
        load_preset(options.preset), options.settings).train.validation_tokens)
    work = options.out / "nanogpt"
    work.mkdir(exist_ok=True)
    peer = run_nanogpt(options.nanogpt, 60 * options.minutes, documents(data, "train"), held_out,
                       work)
    model, tokenizer, _ = load(moe.path, "cpu")
    from fira.data.text import Item

    ours = score(model, tokenizer, [Item(text, True, 0) for text in held_out])
    assert ours["bytes"] == peer["bytes"], (ours, peer)
    result = {**peer, "moe_bits_per_byte": ours["bits_per_byte"]}
    kept.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("preset")
    parser.add_argument("settings", nargs="*", help="section.key=value, for every arm")
    parser.add_argument("--data", required=True, help="folder that `fira data` wrote")
    parser.add_argument("--minutes", type=float, default=5.0, help="of every run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--factors", type=float, nargs="*", default=[0.5, 1.0, 2.0],
                        help="learning rates to try, over the preset's; none: the preset's")
    parser.add_argument("--rate-minutes", type=float, help="of a run that tries a rate "
                        "[default: a quarter of --minutes]")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--out", type=Path, help="[default: out/moe-vs-dense-PRESET]")
    parser.add_argument("--report", action="store_true", help="only draw what is there")
    options = parser.parse_intermixed_args()
    options.out = options.out or Path("out") / f"moe-vs-dense-{Path(options.preset).stem}"
    options.out.mkdir(parents=True, exist_ok=True)
    options.settings.append(f"data.folder={options.data}")
    arms = make_arms(options.preset, options.settings)
    if not options.report:
        for arm in arms.values():
            rate = arm.config().optim.lr
            if options.factors:
                minutes = options.rate_minutes or options.minutes / 4
                rate = best_rate(arm, options.out, options.factors, f"train.minutes={minutes}")
            for seed in range(1, options.seeds + 1):
                train_arm(arm.with_settings(f"optim.lr={rate}", f"train.minutes={options.minutes}"),
                          options.out / f"{arm.key}-seed{seed}", seed)
    moes = collect(arms, options.out)["MoE"]
    report(arms, options.out,
           nanogpt_side(options, moes[0]) if options.nanogpt and moes else None)


if __name__ == "__main__":
    main()
