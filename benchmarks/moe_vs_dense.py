"""A mixture of experts against its dense twins: the same text, machine and wall clock.

    python benchmarks/moe_vs_dense.py tiny --data out/quickstart/data --minutes 5 --seeds 3

Three arms in turns: the preset; its dense twin of equal active FLOPs (same class, one expert as
wide as the chosen ones together); a dense twin of equal total parameters. Each arm first finds its
own learning rates among --factors of the preset's, in shorter runs of equal steps. Every finished
run is kept in --out and not run again, so the same command goes on where it stopped; --report only
draws what is there. --sooner 1.5 1.3 also trains the MoE for 1/1.5 and 1/1.3 of the minutes with
schedules of their own: does it end where others end after all of them? --wider 2 also trains a
dense model twice as wide as the chosen experts: a narrow twin is no dense model that one would
choose. --only names the arms to train now. With --nanogpt and --nanochat their own recipes join on
the same text, with --peer-seeds each; of several --nanochat-settings the best of shorter runs is
taken, for example

    --nanochat PATH --nanochat-settings depth=6 --nanochat-settings \\
        depth=4,device-batch-size=4,total-batch-size=2048
"""
from __future__ import annotations

import argparse
from pathlib import Path

from arms import DONE, Arm, best_factor, train_arm
from card import DENSE, LARGE, MOE, report, sooner, wider
from rivals import Text, finished, run_nanochat, run_nanogpt, score_runs

from fira.config import load_preset
from fira.report.read import Run, read_run
from fira.stages.pretrain import configure


def make_arms(preset: str, settings: list[str], factors: list[float],
              widths: list[int]) -> dict[str, Arm]:
    """By what the card calls them; one more of the MoE for each of `factors`, and of the dense twin
    for each of `widths`."""
    spec = configure(load_preset(preset), settings).model
    active = spec.top_k * spec.d_ff

    def dense(key: str, d_ff: int) -> Arm:
        return Arm(key, preset, (*settings, "model.num_experts=1", "model.top_k=1",
                                 f"model.d_ff={d_ff}"))

    return {MOE: Arm("moe", preset, tuple(settings)),
            DENSE: dense("dense-active", active),
            LARGE: dense("dense-total", spec.num_experts * spec.d_ff),
            **{wider(width): dense(f"dense-wider-{width}", width * active) for width in widths},
            **{sooner(factor): Arm(f"moe-sooner-{factor:g}", preset, tuple(settings))
               for factor in factors}}


def collect(arms: dict[str, Arm], out: Path) -> dict[str, list[Run]]:
    """The finished runs of every arm."""
    return {name: [read_run(done.parent) for done in sorted(out.glob(f"{arm.key}-seed*/{DONE}"))]
            for name, arm in arms.items()}


def train_arms(arms: dict[str, Arm], options: argparse.Namespace) -> None:
    """Rates first, then seed by seed, so that a machine's good and bad hours fall on all arms."""
    faster = {sooner(factor): factor for factor in options.sooner}
    factors = {}
    for name, arm in arms.items():
        factors[name] = factors[MOE] if name in faster else 1.0
        if options.factors and name not in faster and (name == MOE or arm.key in options.only):
            factors[name] = best_factor(arm, options.out, options.factors, options.rate_minutes,
                                        options.ranks)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name, arm in arms.items():
            if arm.key in options.only:
                minutes = f"train.minutes={options.minutes / faster.get(name, 1):g}"
                train_arm(arm.at_rates(factors[name]).with_settings(minutes),
                          options.out / f"{arm.key}-seed{seed}", seed, ranks=options.ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("preset")
    parser.add_argument("settings", nargs="*", help="section.key=value, for every arm")
    parser.add_argument("--data", required=True, help="folder that `fira data` wrote")
    parser.add_argument("--minutes", type=float, default=5.0, help="of every run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=1, help="of --seeds that follow on")
    parser.add_argument("--sooner", type=float, nargs="*", default=[], metavar="FACTOR",
                        help="also train the MoE for 1/FACTOR of --minutes")
    parser.add_argument("--wider", type=int, nargs="*", default=[], metavar="FACTOR",
                        help="also train a dense model so many times as wide as its twin")
    parser.add_argument("--only", nargs="*", metavar="ARM", help="train only these: moe, "
                        "dense-active, dense-total, dense-wider-FACTOR, moe-sooner-FACTOR")
    parser.add_argument("--ranks", type=int, default=1, help="processes that each arm is trained "
                        "by, one thread each [default: one process with torch's threads]")
    parser.add_argument("--factors", type=float, nargs="*", default=[0.5, 1.0, 2.0],
                        help="learning rates to try, over the preset's; none: the preset's")
    parser.add_argument("--rate-minutes", type=float, help="of a run that tries a rate "
                        "[default: half of --minutes; shorter ones mislead]")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--nanochat", type=Path, help="a checkout of nanochat")
    parser.add_argument("--nanochat-settings", action="append", metavar="NAME=VALUE,...",
                        help="of its base training, over its CPU recipe; the best of several")
    parser.add_argument("--peer-seeds", type=int, default=3, help="of nanoGPT and nanochat")
    parser.add_argument("--out", type=Path, help="[default: out/moe-vs-dense-PRESET]")
    parser.add_argument("--report", action="store_true", help="only draw what is there")
    options = parser.parse_intermixed_args()
    options.out = options.out or Path("out") / f"moe-vs-dense-{Path(options.preset).stem}"
    options.out.mkdir(parents=True, exist_ok=True)
    options.settings.append(f"data.folder={options.data}")
    options.rate_minutes = options.rate_minutes or options.minutes / 2
    arms = make_arms(options.preset, options.settings, options.sooner, options.wider)
    keys = [arm.key for arm in arms.values()]
    if unknown := set(options.only or ()) - set(keys):
        raise SystemExit(f"--only {unknown.pop()!r} is not one of {', '.join(keys)}")
    options.only = options.only or keys
    text = Text(Path(options.data), arms[MOE].config().train.validation_tokens)
    if not options.report:
        train_arms(arms, options)
        if options.nanogpt:
            run_nanogpt(options.nanogpt, text, options.out, options.minutes, options.peer_seeds)
        if options.nanochat:
            run_nanochat(options.nanochat, text, options.out, options.minutes, options.peer_seeds,
                         options.nanochat_settings or [""], options.rate_minutes)
    runs, rivals = collect(arms, options.out), finished(options.out)
    if not (runs[MOE] and runs[DENSE]):
        print("no run of the MoE and its dense twin is finished yet: nothing to compare")
        return
    scores = {name: score_runs(found, text) for name, found in runs.items()}
    report(arms, runs, options.out, rivals, scores)


if __name__ == "__main__":
    main()
