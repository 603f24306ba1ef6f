"""What each choice is worth: rows of settings, several seeds, at equal tokens and equal wall clock.

    python benchmarks/ablate.py --data out/quickstart/data --steps 500 --minutes 2 --seeds 3
    python benchmarks/ablate.py --data ... --group balance --group optimizer

Every group changes one thing of its base. A finished run is kept in --out and not run again, so
the same command goes on where it stopped. The table is written anew into --table after each row.
There is no row for a shared expert: it would leave Qwen3-MoE's mathematics, which FIRA2 keeps.
"""
from __future__ import annotations

import argparse
from pathlib import Path

from arms import Arm, final, spread, train_arm
from record import machine

from fira.report.read import Run

FIRA = ("model={\"architecture\": \"fira\", \"vocab_size\": 4096, \"d_model\": 256, \"n_head\": 4, "
        "\"num_layers\": 4, \"d_ff\": 1024, \"num_experts\": 4, \"top_k\": 1, \"context\": 512, "
        "\"dropout\": 0.0}")
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "FIRA, chosen of 4": {"top-1": (FIRA,), "top-2": (FIRA, "model.top_k=2"),
                          "top-2, half as wide": (FIRA, "model.top_k=2", "model.d_ff=512")},
    "FIRA2, experts of equal work": {
        f"{experts} of {width}, top-{k}": (f"model.num_experts={experts}", f"model.d_ff={width}",
                                           f"model.top_k={k}")
        for experts, width, k in ((4, 512, 1), (8, 256, 2), (16, 128, 4), (32, 64, 8), (32, 128, 4),
                                  (64, 128, 4))},
    "balance": {name: (f"model.balance={name}",) for name in ("loss", "bias", "quantile", "none")},
    "optimizer": {"Muon, lr 1e-2": (), "AdamW, lr 3e-3": ("optim.rule=adamw", "optim.lr=3e-3"),
                  "AdamW, lr 6e-3": ("optim.rule=adamw", "optim.lr=6e-3")},
    "router's learning rate": {f"{rate:g}": (f"optim.router_lr={rate}",)
                               for rate in (5e-4, 1e-3, 5e-3, 2e-2)},
}


def imbalance(run: Run) -> float:
    """Mean CV of the loads over the run's last tenth."""
    rows = [step.imbalance for step in run.steps[-max(1, len(run.steps) // 10):]]
    return sum(value or 0.0 for value in rows) / len(rows)


def table(results: dict[str, dict[str, dict[str, list[Run]]]], options: argparse.Namespace) -> str:
    lines = ["# Ablations", "", f"`{options.preset}` unless a row says otherwise, {machine()}. "
             "Bits per byte on held-out text, mean ± deviation over seeds (number in brackets): "
             f"after {options.steps} steps, and after {options.minutes:g} minutes. Made by "
             "`python benchmarks/ablate.py`.", ""]
    for group, rows in results.items():
        lines += [f"## {group}", "", "| | equal tokens | equal wall clock | imbalance at the end "
                  "| tokens/s |", "|---|---|---|---|---|"]
        for name, runs in rows.items():
            cells = [f"{spread(list(map(final, runs[kind])))} ({len(runs[kind])})"
                     if runs[kind] else "" for kind in ("tokens", "clock")]
            every = runs["tokens"] + runs["clock"]
            speed = sum(run.validations[-1].tokens / run.validations[-1].seconds for run in every)
            uneven = sum(map(imbalance, every)) / len(every)
            lines.append(f"| {name} | {' | '.join(cells)} | {uneven:.2f} | "
                         f"{speed / len(every):,.0f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that `fira data` wrote")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--group", action="append", choices=GROUPS, help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500, help="of the equal tokens; 0: skip them")
    parser.add_argument("--minutes", type=float, default=2.0, help="0: skip the equal clock")
    parser.add_argument("--out", type=Path, default=Path("out/ablate"))
    parser.add_argument("--table", type=Path, default=Path("docs/results/ablations.md"))
    parser.add_argument("settings", nargs="*", help="section.key=value, for every row")
    options = parser.parse_intermixed_args()
    horizons = {"tokens": f"train.steps={options.steps}" if options.steps else None,
                "clock": f"train.minutes={options.minutes}" if options.minutes else None}
    results: dict[str, dict[str, dict[str, list[Run]]]] = {}
    for group in options.group or GROUPS:
        for name, settings in GROUPS[group].items():
            row = results.setdefault(group, {}).setdefault(name, {"tokens": [], "clock": []})
            arm = Arm(name, options.preset,
                      (*settings, *options.settings, f"data.folder={options.data}"))
            for seed in range(1, options.seeds + 1):
                for kind, horizon in horizons.items():
                    if horizon:
                        place = "".join(c if c.isalnum() else "-" for c in f"{group}-{name}")
                        row[kind].append(train_arm(arm.with_settings(horizon), options.out /
                                                   f"{place}-{kind}-seed{seed}", seed))
            options.table.parent.mkdir(parents=True, exist_ok=True)
            options.table.write_text(table(results, options), encoding="utf-8")
    print(table(results, options))


if __name__ == "__main__":
    main()
