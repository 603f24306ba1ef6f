"""The share of a gain that is kept, with an interval over seeds that covers it."""
from __future__ import annotations

import distil
import numpy as np
import pytest


def test_the_interval_of_the_share_covers_it():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        gains = 0.05 + rng.normal(0, 0.002, 3)
        kept = 0.5 * gains + rng.normal(0, 0.002, 3)
        value, half = distil.ratio(kept.tolist(), gains.tolist())
        covered += abs(value - 0.5) <= half
    assert 370 <= covered <= 395, covered


def test_one_seed_has_a_share_and_no_interval():
    assert distil.ratio([0.01], [0.04]) == (pytest.approx(0.25), 0.0)
