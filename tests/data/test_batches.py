"""Every target once an epoch, in an order that depends on the text, a seed and numbers alone."""
from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fira.data.batches import GROUP, IGNORED, Batch, Source, TextBatches, permute, sequential
from fira.train.config import TrainConfig
from fira.train.loop import LoopState


def open_text(*lengths, shares=(1.0,), rows=slice, **train):
    """Batches of texts in which each token is its own position, plus 1,000,000 for each text."""
    sources = [Source("", f"text{n}", f"key{n}", share, np.arange(length) + n * 1_000_000, [])
               for n, (length, share) in enumerate(zip(lengths, shares, strict=True))]
    return TextBatches(sources, TrainConfig(steps=1, **train), rows)


def draw(batches, state, fraction=0.0):
    """The rows of the next batch, as one; `state` advances as in the loop, through a file."""
    parts, position, _ = batches.batch(state, fraction)
    state.tokens += sum(part.tokens_BT.numel() for part in parts)
    state.position = json.loads(json.dumps(position))
    return Batch(torch.cat([part.tokens_BT for part in parts]),
                 torch.cat([part.targets_BT for part in parts]))


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


SIZES = [dict(sequence_length=length, micro_batch=rows, batch_tokens=tokens, first_length=first)
         for length, rows, tokens, first in ((32, 2, 64, 8), (16, 4, 64, None), (32, 3, 192, None),
                                             (64, 1, 128, 16), (48, 2, 96, None))]


@pytest.mark.parametrize("length", [65, 1000, 32 * GROUP + 1, 48 * GROUP + 77])
def test_each_target_comes_once_an_epoch_however_batches_and_sequences_change(length):
    state, counts, number = LoopState(), np.zeros(length, int), 0
    while not state.position or state.position["key0"][0] < 3:
        batches = open_text(length, seed=5, **SIZES[number // 3 % len(SIZES)])
        batch = draw(batches, state, number % 10 / 10)
        kept = batch.targets_BT != IGNORED
        assert torch.equal(batch.targets_BT[kept], batch.tokens_BT[kept] + 1)
        counts += np.bincount(batch.targets_BT[kept], minlength=length)
        number += 1
        epoch = state.position["key0"][0]
        assert set(counts[1:]) <= {epoch, epoch + 1}, (number, state.position)
    assert counts[0] == 0


def test_a_run_that_did_not_record_its_position_continues_in_the_order_of_old():
    """Whole sequences by the permutation, as many as the run has read tokens of."""
    batches = open_text(10 * 12 + 1, sequence_length=10, micro_batch=4, batch_tokens=40, seed=3)
    state = LoopState(step=4, tokens=160)  # 120 an epoch
    drawn = torch.cat([draw(batches, state).tokens_BT for _ in range(2)])
    assert (drawn[:, 0] // 10).tolist() == permute(np.arange(4, 12), 12, 3, 1).tolist()
    assert (drawn == drawn[:, :1] + torch.arange(10)).all()


def test_short_sequences_come_from_many_places():
    short = open_text(64 * 300, sequence_length=64, first_length=8, batch_tokens=512, micro_batch=8)
    assert len((draw(short, LoopState()).tokens_BT[:, 0] // 64).unique()) == 64


def test_ranks_read_the_rows_of_one_batch_and_texts_their_shares():
    shares, state, counts = (0.7, 0.2, 0.1), LoopState(), np.zeros(3)
    whole, *ranks = (open_text(5000, 900, 700, shares=shares, rows=rows, sequence_length=16,
                               micro_batch=2, batch_tokens=192)
                     for rows in (slice, lambda n: slice(0, 4), lambda n: slice(4, 12)))
    for number in range(1, 41):
        parts = [draw(rank, LoopState(tokens=state.tokens, position=state.position))
                 for rank in ranks]
        batch = draw(whole, state)
        assert torch.equal(torch.cat([part.targets_BT for part in parts]), batch.targets_BT)
        counts += np.bincount(batch.tokens_BT[:, 0] // 1_000_000, minlength=3)
        assert abs(counts - 12 * number * np.array(shares)).max() < 3
    *_, epochs = whole.batch(state, 0.0)
    assert epochs["epochs/text2"] == pytest.approx(0.1 * 41 * 192 / 704, abs=0.05)
    assert "text1: 20.0% of the tokens" in whole.describe(state)


def test_positions_restart_at_an_end_of_text_and_where_a_row_joins_pieces():
    text, train = np.array([5, 0, 6, 7, 0, 0, 8, 9, 3]), TrainConfig(
        steps=1, sequence_length=8, micro_batch=1, batch_tokens=8)
    batches = TextBatches([Source("", "text", "key", 1.0, text, text)], train, end_of_text=-1)
    (batch,), *_ = batches.batch(LoopState(position={"key": [0, 4, 4, 4]}), 0.0)
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    parts = list(sequential(text, 6, 1, 0))
    assert [part.positions_BT[0].tolist() for part in parts] == [[0, 0, 1, 2, 0, 0], [0, 1]]


def test_weight_counts_the_scored_targets():
    tokens = torch.arange(12).view(3, 4)
    assert Batch(tokens, tokens + 1).weight == 12
    masked = torch.where(tokens % 3 == 0, tokens, IGNORED)
    assert Batch(tokens, masked).weight == 4
    assert Batch(tokens, torch.full_like(tokens, IGNORED)).weight == 0


@pytest.mark.parametrize("length", [2, 30, 31, 32, 61, 64])
def test_sequential_batches_hold_each_target_once_in_order(length):
    parts = list(sequential(np.arange(length), 10, 2))
    targets = torch.cat([part.targets_BT.flatten() for part in parts])
    assert targets.tolist() == list(range(1, length))
    assert all(torch.equal(part.targets_BT, part.tokens_BT + 1) for part in parts)


def test_too_few_tokens_are_one_line():
    with pytest.raises(ValueError, match="100 tokens are too few for one sequence of 100"):
        open_text(100, sequence_length=100, batch_tokens=400)
    batches = open_text(101, sequence_length=100, batch_tokens=400)
    assert draw(batches, LoopState()).tokens_BT.shape == (4, 100)
    with pytest.raises(ValueError, match="1 tokens are too few"):
        next(sequential(np.arange(1), 10, 2))
