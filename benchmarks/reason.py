"""The goals of `fira reason` over several seeds.

    OMP_NUM_THREADS=2 python benchmarks/reason.py --seeds 3 --keep out/reason-seeds

Each seed is a whole showcase (about 25 minutes on two cores) with other first weights and training
questions, and the same questions on the card. What is done is not done again.
"""
from __future__ import annotations

from pathlib import Path

from record import append, machine, new_parser

from fira.cli import fira
from fira.eval.reasoning import above_chance
from fira.files import read_json


def play(run: Path, seed: int, options: list[str]) -> None:
    """A showcase, or what is missing of it."""
    begun = (run / "reason.json").exists()
    fira(["reason", "--run", str(run), *(["--resume"] if begun else [*options,
         f"train.seed={seed}"])], standalone_mode=False)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, default=Path("out/reason-seeds"), help="for the runs")
    parser.add_argument("options", nargs="*", help="more of fira reason, after --")
    a = parser.parse_args()
    lines = []
    for seed in range(1, a.seeds + 1):
        run = a.keep / f"seed-{seed}"
        play(run, seed, a.options)
        card = read_json(run / "reason.json", "run it again")
        minutes = sum(card["seconds"].values()) / 60
        lines.append(f"\nseed {seed}, {minutes:.1f} minutes")
        lines += [f"  {'met' if one['met'] else 'NOT MET':8} {one['goal']}: {one['result']}"
                  for one in card["goals"]]
        trained = [f"{task}:{depth}" for task in card["tasks"]
                   for depth in range(1, card["depth"] + 1)]
        append(a.json, {"seed": seed, "minutes": minutes, "goals": card["goals"], "above_chance": {
            name: above_chance(model, trained) for name, model in card["models"].items()},
            "size": card["size"], "machine": machine()})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
