"""The loss of packed pairs is DPO (Rafailov et al. 2023) as written: whole logits, one row for
each answer."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fira.data.conversations import Row
from fira.data.packs import Packs, in_order
from fira.loss.preference import PairBatch, log_probabilities, preference_loss
from fira.model import build_meta
from fira.parallel.layout import Layout, read
from fira.parallel.mesh import Mesh
from fira.stages.prefer import Referenced
from tests.models import build, tiny_spec

SPECS = {"fira2": tiny_spec("fira2"), "fira": tiny_spec("fira"),
         "dense": tiny_spec("fira2", num_experts=1, top_k=1)}
# Ids of a chosen and a rejected row, and how many of each are an answer. Packed into sequences of
# 12, some have two pairs, some one, and some places are empty.
SIZES = [((3, 2), (5, 1)), ((7, 3), (4, 2)), ((4, 1), (4, 3)), ((2, 1), (3, 1)), ((6, 5), (6, 2))]
GENERATOR = np.random.default_rng(3)
ROWS = [Row(GENERATOR.integers(0, 31, size).astype(np.int32), np.arange(size) >= size - answer)
        for pair in SIZES for size, answer in pair]


def plain_margins(model, reference, beta, normalized):
    """beta * (d_chosen - d_rejected) of every pair, [P]."""
    changes = []
    for row in ROWS:
        ids = torch.from_numpy(row.ids).long()[None]
        policy, before = (one(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None]).flatten()
                          for one in (model, reference))
        change = (policy - before.detach())[torch.from_numpy(row.trained[1:])]
        changes.append(change.mean() if normalized else change.sum())
    chosen_P, rejected_P = torch.stack(changes).view(-1, 2).unbind(1)
    return beta * (chosen_P - rejected_P)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_loss_gradients_and_metrics_equal_plain_dpo_over_micro_batches(spec, normalized):
    model, reference = (build(spec, seed).eval() for seed in (1, 2))
    pairs = Referenced(Packs(ROWS, 12, together=2))
    for number, batch in enumerate(in_order(pairs, 1, kind=PairBatch)):
        with torch.no_grad():
            pairs.reference[number] = log_probabilities(read(reference, batch), batch)
    batches = list(in_order(pairs, 1, kind=PairBatch))
    assert len({batch.weight for batch in batches}) > 1
    assert any((batch.positions_BT[:, -2:] == 0).all() for batch in batches)  # empty places
    layout = Layout(Mesh(), build_meta(spec))
    layout.model.eval().load_state_dict(model.state_dict())  # without the routers' own losses
    loss, metrics = layout.forward_backward(batches, preference_loss(0.7, normalized))
    margins_P = plain_margins(model, reference, 0.7, normalized)
    plain = -F.logsigmoid(margins_P).mean()
    plain.backward()
    assert loss == pytest.approx(plain.item(), rel=1e-5)
    assert metrics["margin"] == pytest.approx(margins_P.mean().item(), rel=1e-4)
    assert metrics["accuracy"] == pytest.approx((margins_P > 0).float().mean().item())
    assert metrics["chosen_tokens"] == pytest.approx(np.mean([one[0][1] for one in SIZES]))
    for (name, ours), theirs in zip(layout.model.named_parameters(), model.parameters(),
                                    strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)
