"""How sure a score is: 95% intervals of a rate and of a difference of two models, in closed form.

Scores of items lie in 0..1; a tie is a share, 1/2 of two options. An item not scored is None.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Z, POWER = 1.959964, 0.841621  # of a normal variable 95% lie within +-Z, and 80% below POWER
STUDENT = (12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600)
EXPANSION = ((4, (1, 1)), (96, (3, 16, 5)), (384, (-15, 17, 19, 3)),
             (92160, (-945, -1920, 1482, 776, 79)))  # divisor, factors of the odd powers of Z
Values = Sequence[float | None]


class Difference(NamedTuple):
    """First model minus second on the same items, with its interval; `needed` items would show a
    true difference of one point (0.01) in four of five samples."""

    mean: float
    low: float
    high: float
    items: int
    needed: int
    error: float  # standard error

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def student(freedom: int) -> float:
    """The value between which and its negative lie 95% of Student's t distribution.

    From 9 degrees of freedom on an expansion in their inverse (Abramowitz and Stegun 1964, 26.7.5),
    right to 2e-5; below, the table.
    """
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    return Z + sum(
        sum(factor * Z ** (2 * power + 1) for power, factor in enumerate(factors))
        / (scale * freedom ** order) for order, (scale, factors) in enumerate(EXPANSION, start=1))


def mean(values: Values) -> float | None:
    """Of the values that are not None; None if all are."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def wilson(scores: Values) -> tuple[float, float]:
    """The interval of a rate that inverts the score test (Wilson 1927); 0 to 1 without items.

    The variance of a score x of mean p is p(1-p) - mean(x(1-x)). The second term, that of ties, is
    taken at the lower end of the interval of their share: a few ties prove nothing.
    """
    values = np.array([score for score in scores if score is not None], float)
    if not len(values):
        return 0.0, 1.0
    ties = float(np.mean((values > 0) & (values < 1)))
    certain = _inverted(ties, 0.0, len(values))[0] / ties if ties else 0.0
    return _inverted(float(values.mean()), certain * float((values * (1 - values)).mean()),
                     len(values))


def _inverted(mean: float, ties: float, count: int) -> tuple[float, float]:
    """The rates p with (mean - p)^2 <= Z^2/count (p(1-p) - ties)."""
    c = Z * Z / count
    half = math.sqrt(c * c + 4 * c * mean * (1 - mean) - 4 * c * (1 + c) * ties)
    low, high = ((2 * mean + c + side * half) / (2 + 2 * c) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)


def difference(first: Values, second: Values, groups: Sequence[Any] | None = None,
               bounded: bool = True) -> Difference | None:
    """The mean over the items that both models scored; None if they are of less than two groups.

    Items of one group, such as the questions on a passage, are not independent: the variance is
    that of the groups' sums (Miller 2024, arXiv 2411.00640). An item of group None stands alone.
    To `bounded` scores one item won and one lost are added, each a group (Bonett and Price 2012):
    two models that agree on all of a few items are not proved equal.
    """
    rows = [(one - other, f"item {number}" if group is None else repr(group))
            for number, (one, other, group) in enumerate(zip(
                first, second, groups or [None] * len(first), strict=True))
            if one is not None and other is not None]
    added = [(1.0, "won"), (-1.0, "lost")] if bounded and rows else []
    values = np.array([value for value, _ in rows + added], float)
    labels, group = np.unique([label for _, label in rows + added], return_inverse=True)
    if len(labels) < 2:
        return None
    sums = np.bincount(group, values - values.mean())
    error = math.sqrt((sums @ sums) * len(labels) / (len(labels) - 1)) / len(values)
    return _with_interval(float(values.sum() / len(rows)), float(values.mean()), error,
                          student(len(labels) - 1) * error, len(rows))


def average(differences: Sequence[Difference]) -> Difference:
    """The mean over tasks, which are independent samples and count once each. The square of its
    interval's width is the mean square of theirs over their number (Zou and Donner 2008)."""
    mean, error, half = (sum(one.mean for one in differences) / len(differences), *(
        math.hypot(*each) / len(differences) for each in (
            [one.error for one in differences], [one.half for one in differences])))
    return _with_interval(mean, mean, error, half, sum(one.items for one in differences))


def _with_interval(mean: float, center: float, error: float, half: float,
                   items: int) -> Difference:
    return Difference(mean, center - half, center + half, items,
                      math.ceil(items * (error * (Z + POWER) / 0.01) ** 2), error)
