"""Rows packed into sequences cost and teach what they do one by one."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fira.data.batches import IGNORED, PackedBatch
from fira.data.conversations import Row
from fira.data.packs import Packs, pack
from fira.loss.head import next_token_loss
from fira.parallel.layout import read
from tests.models import NAMES, build, tiny_spec


def make_rows(count, longest, seed=0):
    generator = np.random.default_rng(seed)
    for size in generator.integers(2, longest, count):
        trained = generator.random(size) < 0.5
        trained[-1] = True
        yield Row(generator.integers(0, 31, size).astype(np.int32), trained)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 16), min_size=1, max_size=40))
def test_every_row_is_in_one_sequence_that_has_room_for_it(sizes):
    groups = pack(sizes, 16)
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in group) <= 16 for group in groups)
    assert len(groups) <= 1 + 2 * sum(sizes) // 16  # no two are at most half full


@pytest.mark.parametrize("experts", [{}, {"num_experts": 1, "top_k": 1}], ids=["moe", "dense"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_equal_separate_rows_in_loss_and_gradients(name, experts):
    rows, model = list(make_rows(9, 12)), build(tiny_spec(name, context=24, **experts), 1)
    model.eval()  # the router's own losses are means over the tokens of a batch
    wanted = [one for one in model.parameters() if one.requires_grad]
    packs = Packs(rows, 24)
    assert len(packs) < len(rows) / 2
    batch = PackedBatch(*map(torch.from_numpy, packs.read(np.arange(len(packs)))))
    packed, _ = next_token_loss(read(model, batch), batch)

    total, count = torch.zeros(()), sum(int(row.trained[1:].sum()) for row in rows)
    for row in rows:
        ids = torch.from_numpy(row.ids).long()[None]
        logits_TV = model(ids[:, :-1])[0]
        scored = torch.from_numpy(row.trained[1:])
        total = total - logits_TV.log_softmax(-1).gather(1, ids[0, 1:, None])[scored].sum()
    assert batch.weight == count == int((batch.targets_BT != IGNORED).sum())
    torch.testing.assert_close(packed, total / count, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(packed, wanted), torch.autograd.grad(total / count, wanted),
        atol=1e-5, rtol=1e-5)
