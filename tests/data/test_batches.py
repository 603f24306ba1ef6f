"""Every window once an epoch, in an order that depends on seed, epoch and number alone."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from fira.data.batches import IGNORED, Batch, Batches, permute, sequential


def windows_of(batches: Batches, first: int, count: int) -> list[int]:
    """Which windows were drawn, when each token is its own position."""
    T = batches.sequence_length
    drawn = [batches.batch(index).tokens_BT[:, 0] // T for index in range(first, first + count)]
    return torch.cat(drawn).tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_order_is_a_permutation(size):
    for epoch in range(3):
        assert sorted(permute(np.arange(size), size, 7, epoch)) == list(range(size))


def test_order_looks_random():
    order = permute(np.arange(10_000), 10_000, 1, 0)
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.03
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.03
    assert np.mean(np.abs(np.diff(order))) > 3000  # a third of the range, if uniform
    assert abs(int((np.diff(order) > 0).sum()) - 5000) < 150


def test_order_never_changes():
    """A resumed run must see the data in the order in which it began."""
    assert permute(np.arange(12), 12, 3, 1).tolist() == [9, 7, 1, 6, 11, 2, 0, 4, 10, 5, 8, 3]
    size = 10**10  # one place is computed alone, whatever the size
    found = permute(np.array([0, 5, size - 1]), size, 3, 2)
    assert len(set(found.tolist())) == 3 and (found < size).all() and (found >= 0).all()
    assert permute(np.array([5]), size, 3, 2)[0] == found[1]


def test_each_window_comes_once_an_epoch_in_an_order_of_its_own():
    batches = Batches(np.arange(10 * 12 + 1), 10, 4, seed=3)
    first, second = windows_of(batches, 0, 3), windows_of(batches, 3, 3)
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert first != windows_of(Batches(np.arange(121), 10, 4, seed=4), 0, 3)
    drawn = windows_of(Batches(np.arange(7 * 5 + 1), 5, 3), 0, 7)  # 7 windows in batches of 3
    assert [sorted(drawn[start:start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3


def test_targets_are_the_tokens_that_follow_and_no_position_is_one_twice():
    batches = Batches(np.arange(103, dtype=np.uint16), 10, 2)
    parts = [batches.batch(index) for index in range(5)]
    for part in parts:
        assert part.tokens_BT.shape == part.targets_BT.shape == (2, 10)
        assert part.tokens_BT.dtype == part.targets_BT.dtype == torch.int64
        assert torch.equal(part.targets_BT, part.tokens_BT + 1)
    targets = torch.cat([part.targets_BT.flatten() for part in parts])
    assert sorted(targets.tolist()) == list(range(1, 101))


def test_weight_counts_the_scored_targets():
    tokens = torch.arange(12).view(3, 4)
    assert Batch(tokens, tokens + 1).weight == 12
    masked = torch.where(tokens % 3 == 0, tokens, IGNORED)
    assert Batch(tokens, masked).weight == 4
    assert Batch(tokens, torch.full_like(tokens, IGNORED)).weight == 0


def test_any_batch_and_any_rows_are_computed_alone_and_in_one_order_for_every_batch_size():
    one, other = (Batches(np.arange(5000), 16, 6, seed=9) for _ in range(2))
    for index in (70, 3, 12_345):
        whole = one.batch(index)
        ranks = [other.batch(index, rows=slice(start, start + 2)) for start in (0, 2, 4)]
        assert torch.equal(torch.cat([rank.targets_BT for rank in ranks]), whole.targets_BT)
    small, large = (Batches(np.arange(500), 10, size, seed=2) for size in (4, 6))
    drawn = torch.cat([small.batch(index).tokens_BT for index in range(45)])  # several epochs
    assert torch.equal(torch.cat([large.batch(index).tokens_BT for index in range(30)]), drawn)


@pytest.mark.parametrize("length", [2, 30, 31, 32, 61, 64])
def test_sequential_batches_hold_each_target_once_in_order(length):
    parts = list(sequential(np.arange(length), 10, 2))
    targets = torch.cat([part.targets_BT.flatten() for part in parts])
    assert targets.tolist() == list(range(1, length))
    assert all(torch.equal(part.targets_BT, part.tokens_BT + 1) for part in parts)


def test_too_few_tokens_are_one_line():
    with pytest.raises(ValueError, match="100 tokens are too few for one sequence of 100"):
        Batches(np.arange(100), 100, 2)
    assert Batches(np.arange(101), 100, 2).batch(3).tokens_BT.shape == (2, 100)
    with pytest.raises(ValueError, match="1 tokens are too few"):
        next(sequential(np.arange(1), 10, 2))
