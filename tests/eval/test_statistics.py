"""Intervals equal those of scipy where it has them, and cover the truth where it has none."""
import numpy as np
import pytest
from scipy import stats

from fira.eval.statistics import Z, average, difference, student, wilson


@pytest.mark.parametrize("correct, count", [(0, 7), (7, 7), (3, 10), (499, 1000)])
def test_the_interval_of_a_rate_is_wilsons(correct, count):
    expected = stats.binomtest(correct, count).proportion_ci(method="wilson")
    scores = [1.0] * correct + [0.0] * (count - correct) + [None]
    assert wilson(scores) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("count, won, tied, tie", [(5, 0.5, 0.1, 1 / 2), (10, 0.4, 0.3, 1 / 3),
                                                   (60, 0.1, 0.8, 1 / 2)])
def test_with_ties_the_interval_covers_the_rate_and_is_shorter(count, won, tied, tie):
    rng = np.random.default_rng(0)
    samples = rng.choice([1, tie, 0], (2000, count), p=[won, tied, 1 - won - tied])
    low, high = np.transpose([wilson(sample) for sample in samples])
    assert np.mean((low <= won + tied * tie) & (won + tied * tie <= high)) > 0.93
    assert np.ptp(wilson([0.5] * 50)) < np.ptp(wilson([1, 0] * 25)) < np.ptp(wilson([0.5]))


@pytest.mark.parametrize("count", [2, 3, 8, 9, 10, 11, 40, 4000])
def test_the_difference_of_independent_items_is_that_of_a_paired_t_test(count):
    first, second = np.random.default_rng(0).normal(size=(2, count))
    found = difference([*first, None], [*second, 1.0], bounded=False)
    expected = stats.ttest_rel(first, second).confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-4)
    assert found.items == count
    assert student(count) == pytest.approx(stats.t.ppf(0.975, count), abs=2e-5)


def simulated(rng, passages, questions):
    """Scores of two models whose difference on a question depends on the passage."""
    lead = rng.normal(0.2, 0.5, passages).repeat(questions)
    noise = rng.normal(0, 0.3, (2, len(lead)))
    return (noise[0] + lead > 0).astype(float), (noise[1] > 0).astype(float)


def test_few_passages_have_wide_intervals_that_cover_the_truth():
    rng, covered, normal = np.random.default_rng(4), 0, 0
    truth = np.subtract(*simulated(rng, 200_000, 2)).mean()
    for _ in range(400):
        found = difference(*simulated(rng, 4, 8), np.arange(4).repeat(8).tolist(), bounded=False)
        covered += found.low <= truth <= found.high
        normal += abs(found.mean - truth) <= Z * found.error
    assert covered >= 360 > 345 > normal, (covered, normal)


@pytest.mark.parametrize("bounded", [True, False])
def test_groups_keep_the_coverage_that_independent_items_lose(bounded):
    rng = np.random.default_rng(1)
    truth = np.subtract(*simulated(rng, 200_000, 2)).mean()
    groups, covered = np.arange(30).repeat(8).tolist(), {"passages": 0, "items": 0}
    for _ in range(400):
        pair = simulated(rng, 30, 8)
        for name, labels in (("passages", groups), ("items", None)):
            found = difference(*pair, labels, bounded)
            covered[name] += found.low <= truth <= found.high
    assert covered["passages"] >= 370 > 330 > covered["items"], covered


def test_a_single_passage_and_full_agreement_prove_nothing():
    assert difference([1.0] * 9, [0.0] * 9, ["passage"] * 9, bounded=False) is None
    same = difference([1.0] * 20, [1.0] * 20)
    assert same.mean == 0 and same.low < -0.05 and same.high > 0.05


def test_the_items_needed_show_a_point_in_four_of_five_samples():
    rng = np.random.default_rng(2)

    def sample(count, won, lost):
        winner = rng.choice([1, 2, 0], count, p=[won, lost, 1 - won - lost])
        return difference((winner == 1).astype(float), (winner == 2).astype(float))
    needed = sample(20_000, 0.025, 0.025).needed
    assert 0.72 < np.mean([sample(needed, 0.03, 0.02).low > 0 for _ in range(200)]) < 0.88


def test_a_suite_counts_every_task_once():
    tasks = [difference([1, 0, 1, 1], [0, 0, 1, 0]), difference([0.0] * 400, [1.0] * 400)]
    suite, half = average(tasks), [(one.high - one.low) / 2 for one in tasks]
    assert (suite.mean, suite.items) == (pytest.approx((0.5 - 1) / 2), 404)
    assert suite.high - suite.mean == pytest.approx(np.hypot(*half) / 2)
    assert suite.error == pytest.approx(np.hypot(*(one.error for one in tasks)) / 2)
