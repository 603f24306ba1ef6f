"""The gradient of a step is that of the weighted mean over the global batch, however it is cut."""
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from fira.data.batches import Batch
from fira.loss.head import IGNORED, head_loss, next_token_loss
from fira.model.files import build_meta
from fira.model.spec import FIRA2Spec
from fira.parallel.layout import Layout
from fira.parallel.mesh import AXES, Mesh, make_mesh
from tests.parallel.ranks import on_ranks
from tests.parallel.test_parity import SHAPE, cut

SPEC = FIRA2Spec(**(SHAPE | {"context": 64}), n_kv_head=1, head_dim=8)
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
    x_BTD = model.features(batch.tokens_BT)
    loss = head_loss(x_BTD, *model.head_weights(), batch.targets_BT)
    scored = batch.targets_BT != IGNORED
    with torch.no_grad():
        likely = model.logits(x_BTD).log_softmax(-1).amax(-1)[scored].mean()
    return loss, {"likely": likely} | ({"rare": 5.0} if batch.weight > 10 else {})


def token_losses(model, batch):
    logits = F.linear(model.features(batch.tokens_BT), *model.head_weights())
    return F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="none")


def make(rank, sizes, seed=5):
    mesh = make_mesh(dict.fromkeys(AXES, 1) | sizes, rank, torch.device("cpu")) if sizes else Mesh()
    return Layout(mesh, build_meta(SPEC), seed=seed)


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


def step_each(rank, layouts):
    """Per layout: loss, metrics and gradients; what happens without a scored token; scores."""
    results = []
    for sizes in layouts:
        layout = make(rank, sizes)
        rows = layout.rows(ROWS)
        loss, metrics = layout.forward_backward(cut(masked(), rows, 1), measured_loss)
        found, norm = gradients(layout), layout.gradient_norm()
        layout.model.zero_grad()
        nothing = layout.forward_backward(cut(masked((0,) * ROWS), rows, 1), measured_loss)
        left = layout.gradient_norm()
        scores = layout.score(token_losses, Batch(*(part[rows] for part in masked())))
        with torch.no_grad():  # scoring must leave nothing gathered of the weights before this
            for part in layout.slices(layout.model.named_parameters()):
                part.rows.mul_(1.01)
        layout.forward_backward(cut(masked(), rows, 1), measured_loss)
        results.append((loss, metrics, found, norm, nothing, left, scores, gradients(layout)))
    return results


@pytest.fixture(scope="module")
def uncut():
    """One process, one micro-batch."""
    layout = make(0, {})
    loss, metrics = layout.forward_backward([masked()], measured_loss)
    return (loss, metrics, gradients(layout), layout.gradient_norm(),
            layout.score(token_losses, masked()))


@pytest.fixture(scope="module")
def results():
    return on_ranks(2, step_each, LAYOUTS)


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[next(iter(one)) for one in LAYOUTS])
def test_a_cut_batch_has_the_gradient_of_the_uncut_one(number, uncut, results):
    alone = step_each(0, [{}])[0]
    for rank, ranks in enumerate([[alone] * len(LAYOUTS), *results], start=-1):
        loss, metrics, found, norm, nothing, left, scores, again = ranks[number]
        assert loss == pytest.approx(uncut[0], rel=1e-6)
        assert metrics == pytest.approx(uncut[1], rel=1e-6)
        assert metrics["rare"] == 5.0
        assert_equal_gradients(found, uncut[2])
        assert norm == pytest.approx(uncut[3], rel=1e-6)
        assert nothing[0] != nothing[0] and nothing[1] == {} and left == 0
        if rank == -1 or LAYOUTS[number].keys() == {"pipeline"}:
            expected = uncut[4] if rank else None
        else:
            expected = uncut[4].view(2, -1)[rank]
        assert (scores is None) == (expected is None)
        if scores is not None:
            torch.testing.assert_close(scores, expected)
        assert_equal_gradients(again, alone[7])


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


def test_a_check_that_raises_leaves_nothing_half_done(uncut):
    for left, counted, found in [stopped(0, {}), *on_ranks(2, stopped, {"data": 2})]:
        assert not left and not counted
        assert_equal_gradients(found, uncut[2])


def taught(rank, layouts):
    """A frozen teacher of another seed is divided on the same mesh; gradients of the student."""
    results = []
    for sizes in layouts:
        student = make(rank, sizes)
        with mock.patch("torch.distributed.new_group", side_effect=AssertionError("a new group")):
            teacher = Layout(student.mesh, build_meta(SPEC).requires_grad_(False), seed=9)

        def loss_fn(model, batch, teacher=teacher.model):
            with torch.no_grad():
                target_BTD = teacher.features(batch.tokens_BT)
            return F.mse_loss(model.features(batch.tokens_BT), target_BTD), {}

        whole = masked((64,) * ROWS)
        student.forward_backward(cut(whole, student.rows(ROWS), 2), loss_fn)
        results.append((gradients(student), any(p.grad is not None
                                                for p in teacher.model.parameters())))
    return results


def test_a_teacher_lies_beside_the_student():
    layouts = [{"data": 2}, {"expert": 2}, {"shard": 2}]
    expected = taught(0, [{}])[0][0]
    for rank in on_ranks(2, taught, layouts):
        for found, of_teacher in rank:
            assert not of_teacher
            assert_equal_gradients(found, expected)
