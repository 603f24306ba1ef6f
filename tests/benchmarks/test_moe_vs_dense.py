"""MoE against dense: the arms are as wide as their names say, and curves are compared correctly."""
from __future__ import annotations

from pathlib import Path

import pytest
from moe_vs_dense import (
    DENSE,
    LARGE,
    MOE,
    find_crossing,
    largest_deficit,
    make_arms,
    median_seconds_to,
    shorter,
    wider,
)

from fira.report.read import Run


def curve(*values: float) -> Run:
    rows = [{"step": n, "bits_per_byte": value, "seconds": 10.0 * n, "tokens": 100 * n}
            for n, value in enumerate(values, 1)]
    return Run(Path("."), {}, [], rows, [], [], [])


def test_dense_arms_are_as_wide_as_their_names_say():
    arms = make_arms("small", ["data.folder=data"], [1.5], [2])
    spec = arms[MOE].config().model
    widths = {name: arms[name].config().model.d_ff for name in (DENSE, LARGE, wider(2))}
    assert widths == {DENSE: spec.top_k * spec.d_ff, LARGE: spec.num_experts * spec.d_ff,
                      wider(2): 2 * spec.top_k * spec.d_ff}
    assert {arms[name].config().model.num_experts for name in widths} == {1}
    assert arms[shorter(1.5)].config() == arms[MOE].config()


def test_a_crossing_is_interpolated_and_moved_by_the_difference_of_rules():
    run = curve(3.0, 2.0, 1.0)
    assert find_crossing(run, 1.5, "tokens") == pytest.approx(250)
    assert find_crossing(run, 3.5, "tokens") == 100
    assert median_seconds_to([run], 1.5, [0.0]) == pytest.approx(25.0)
    assert median_seconds_to([run], 1.5, [0.5]) == pytest.approx(20.0)
    assert median_seconds_to([run], 0.5, [0.0]) is None


def test_a_run_that_never_reaches_the_goal_counts_as_infinity():
    slow, fast = curve(3.0, 2.5), curve(2.0, 1.0)
    assert median_seconds_to([slow, fast, fast], 1.5, [0.0] * 3) == pytest.approx(15.0)
    assert median_seconds_to([slow, slow, fast], 1.5, [0.0] * 3) is None


def test_the_largest_deficit_is_the_worst_of_all_seeds():
    dense = curve(3.0, 2.0, 1.5)
    deficit, last = largest_deficit([curve(3.4, 2.0, 1.3)], [dense])
    assert deficit == pytest.approx(0.4) and last == pytest.approx(20.0, abs=0.2)
    deficit, last = largest_deficit([curve(2.9, 1.8, 1.3)], [dense])
    assert deficit == pytest.approx(-0.1) and last is None
    moes = [curve(2.9, 1.8, 1.3), curve(3.4, 2.0, 1.3)]
    assert largest_deficit(moes, [dense, dense])[0] > 0.3
