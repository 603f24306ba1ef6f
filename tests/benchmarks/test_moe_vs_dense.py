"""MoE against dense: arms are as wide as named, rates are searched, curves are compared."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import arms
import moe_vs_dense as compare
import pytest

from fira.report.read import Run


def curve(*values: float) -> Run:
    rows = [{"step": n, "bits_per_byte": value, "seconds": 10.0 * n, "tokens": 100 * n}
            for n, value in enumerate(values, 1)]
    return Run(Path("."), {}, [], rows, [], [], [])


def test_dense_arms_are_as_wide_as_their_names_say():
    made = compare.make_arms("small", ["data.folder=data"], [1.5], [2])
    configs = {name: arm.config() for name, arm in made.items()}
    spec, wider = configs[compare.MOE].model, compare.wider(2)
    dense = {name: configs[name].model for name in (compare.DENSE, compare.LARGE, wider)}
    assert [(model.d_ff, model.num_experts) for model in dense.values()] == [
        (width * spec.d_ff, 1) for width in (spec.top_k, spec.num_experts, 2 * spec.top_k)]
    assert configs[compare.shorter(1.5)] == configs[compare.MOE]


def test_the_best_factor_of_every_rate_is_found_over_equal_steps(monkeypatch, tmp_path, capsys):
    asked = []

    def train(arm, folder, seed, ranks):
        config = arm.config()
        asked.append((folder.name, config.train.minutes, config.train.steps))
        return SimpleNamespace(
            steps=[{"step": 70}], score="bits_per_byte",
            validations=[{"bits_per_byte": abs(config.optim.lr - 0.01)}])

    monkeypatch.setattr(arms, "train_arm", train)
    arm = arms.Arm("moe", "small", ("optim.lr=0.005", "optim.embedding_lr=0.04"))
    twice = arm.with_rates(2).config().optim
    assert (twice.lr, twice.embedding_lr) == (0.01, 0.08)
    assert arms.find_best_rate(arm, tmp_path, [0.5, 1, 2, 4], minutes=3) == 2
    assert [name for name, *_ in asked] == [f"rate-moe-{each}" for each in ("0.5", "1", "2", "4")]
    assert asked[0][1] == 3 and {steps for *_, steps in asked[1:]} == {70}
    assert not capsys.readouterr().err
    arms.find_best_rate(arm, tmp_path, [0.5, 1, 2], minutes=3)
    assert "edge" in capsys.readouterr().err


def test_a_crossing_is_interpolated_and_a_run_that_has_none_counts_as_infinity():
    slow, run = curve(3.0, 2.5), curve(3.0, 2.0, 1.0)
    assert compare.find_crossing(run, 1.5, "tokens") == pytest.approx(250)
    assert compare.find_crossing(run, 3.5, "tokens") == 100
    assert compare.median_seconds_to([slow, run, run], 1.5, [0.0] * 3) == pytest.approx(25.0)
    assert compare.median_seconds_to([run], 1.5, [0.5]) == pytest.approx(20.0)  # moved
    assert compare.median_seconds_to([slow, slow, run], 1.5, [0.0] * 3) is None


def test_the_largest_deficit_is_the_worst_of_all_seeds():
    dense, worse, better = curve(3.0, 2.0, 1.5), curve(3.4, 2.0, 1.3), curve(2.9, 1.8, 1.3)
    deficit, last = compare.largest_deficit([worse], [dense])
    assert deficit == pytest.approx(0.4) and last == pytest.approx(20.0, abs=0.2)
    deficit, last = compare.largest_deficit([better], [dense])
    assert deficit == pytest.approx(-0.1) and last is None
    assert compare.largest_deficit([better, worse], [dense, dense])[0] > 0.3
