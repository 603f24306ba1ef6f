"""The gradient of a step is that of the weighted mean over the global batch, however it is cut."""
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from fira.data.batches import Batch
from fira.loss.head import IGNORED, next_token_loss
from fira.model import build_meta
from fira.parallel.layout import Layout
from tests.parallel.ranks import mesh_of, on_ranks
from tests.parallel.test_parity import FIRA2, cut

SPEC = FIRA2.model_copy(update={"context": 64})
ROWS = 4
LAYOUTS = [{"data": 2}, {"expert": 2}, {"shard": 2}, {"pipeline": 2}]


def masked(scored=(2, 64, 0, 0)):
    """A row for each number of scored tokens; the second of two ranks has none."""
    ids = torch.randint(0, 60, (ROWS, 65), generator=torch.Generator().manual_seed(3))
    targets_BT = ids[:, 1:].clone()
    for row, count in enumerate(scored):
        targets_BT[row, count:] = IGNORED
    return Batch(ids[:, :-1].contiguous(), targets_BT)


def measured_loss(model, batch):
    """Next token, with a metric of every micro-batch and one that only some of them have."""
    loss, _ = next_token_loss(model, batch)
    with torch.no_grad():
        logits_BTV = model.logits(model.features(batch.tokens_BT))
        likely = logits_BTV.log_softmax(-1).amax(-1)[batch.targets_BT != IGNORED].mean()
    return loss, {"likely": likely} | ({"rare": 5.0} if batch.weight > 10 else {})


def token_losses(model, batch):
    logits = F.linear(model.features(batch.tokens_BT), *model.head_weights())
    return F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="none")


def make(rank, sizes):
    return Layout(mesh_of(rank, sizes), build_meta(SPEC), seed=5)


def gradients(layout):
    named = layout.model.named_parameters()
    return [(p.name, p.start, p.rows.clone()) for p in
            layout.slices((name, parameter.grad) for name, parameter in named)]


def assert_equal_gradients(found, expected):
    """To 1e-6 of the norm of the whole gradient."""
    wanted = {name: rows for name, _, rows in expected}
    norm = torch.stack([rows.norm() for rows in wanted.values()]).norm()
    off = [(rows - wanted[name][start:start + len(rows)]).norm() for name, start, rows in found]
    assert torch.stack(off).norm() < 1e-6 * norm


def step_each(rank, layouts, count=1):
    """Per layout: loss, metrics and gradients; what happens without a scored token; scores."""
    results = []
    for sizes in layouts:
        layout = make(rank, sizes)
        rows = layout.rows(ROWS)
        loss, metrics = layout.forward_backward(cut(masked(), rows, count), measured_loss)
        found, norm = gradients(layout), layout.gradient_norm()
        layout.model.zero_grad()
        nothing = layout.forward_backward(cut(masked((0,) * ROWS), rows, 1), measured_loss)
        left = layout.gradient_norm()
        scores = layout.score(token_losses, Batch(*(part[rows] for part in masked())))
        with torch.no_grad():  # scoring must leave nothing gathered of the weights before this
            for part in layout.slices(layout.model.named_parameters()):
                part.rows.mul_(1.01)
        layout.forward_backward(cut(masked(), rows, count), measured_loss)
        results.append((loss, metrics, found, norm, nothing, left, scores, gradients(layout)))
    return results


def test_a_cut_batch_has_the_gradient_of_the_uncut_one():
    uncut, = step_each(0, [{}], count=ROWS)
    found = [step_each(0, [{}])[0], *(one for rank in on_ranks(2, step_each, LAYOUTS)
                                      for one in rank)]
    for number, (loss, metrics, first, norm, nothing, left, scores, again) in enumerate(found):
        assert loss == pytest.approx(uncut[0], rel=1e-6)
        assert metrics == pytest.approx(uncut[1], rel=1e-6) and metrics["rare"] == 5.0
        assert norm == pytest.approx(uncut[3], rel=1e-6)
        assert nothing[0] != nothing[0] and nothing[1] == {} and left == 0
        assert_equal_gradients(first, uncut[2])
        assert_equal_gradients(again, uncut[7])
        rank, layout = divmod(number - 1, len(LAYOUTS)) if number else (None, None)
        if layout == LAYOUTS.index({"pipeline": 2}) and rank == 0:
            assert scores is None
        else:
            whole = number == 0 or "pipeline" in LAYOUTS[layout]
            torch.testing.assert_close(scores, uncut[6] if whole else uncut[6].view(2, -1)[rank])


class Stop(Exception):
    pass


def stopped(rank, sizes):
    """`check` raises, at its second call on one rank; what is left then, and after a new step."""
    layout, calls = make(rank, sizes), []

    def check():
        calls.append(None)
        if len(calls) == (1 if sizes else 2):
            raise Stop

    with pytest.raises(Stop):
        layout.forward_backward(cut(masked(), layout.rows(ROWS), 1), next_token_loss, check)
    left = [name for name, p in layout.model.named_parameters() if p.grad is not None]
    counted = sum(int(router.load_count_E.sum()) for router in layout.routers)
    layout.forward_backward(cut(masked(), layout.rows(ROWS), 1), next_token_loss)
    return left, counted, gradients(layout)


def taught(rank, sizes):
    """Gradients of a student; its frozen teacher, of another seed, is divided on the same mesh."""
    student = make(rank, sizes)
    with mock.patch("torch.distributed.new_group", side_effect=AssertionError("a new group")):
        teacher = Layout(student.mesh, build_meta(SPEC).requires_grad_(False), seed=9).model

    def loss_fn(model, batch):
        with torch.no_grad():
            target_BTD = teacher.features(batch.tokens_BT)
        return F.mse_loss(model.features(batch.tokens_BT), target_BTD), {}

    student.forward_backward(cut(masked((64,) * ROWS), student.rows(ROWS)), loss_fn)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    return gradients(student)


def stopped_and_taught(rank):
    return stopped(rank, {"data": 2}), [taught(rank, sizes) for sizes in LAYOUTS[:3]]


def test_a_check_that_raises_leaves_nothing_and_a_teacher_lies_beside_the_student():
    alone, lesson = stopped(0, {}), taught(0, {})
    uncut = step_each(0, [{}], count=ROWS)[0][2]
    for stop, lessons in [(alone, []), *on_ranks(2, stopped_and_taught)]:
        left, counted, found = stop
        assert not left and not counted
        assert_equal_gradients(found, uncut)
        for one in lessons:
            assert_equal_gradients(one, lesson)
