"""Every layout trains as one process does: losses, gradient norms, routing, final weights.

The gradient of a step is that of the weighted mean over the global batch, however it is cut.
"""
import functools
import math
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from fira.data.batches import Batch
from fira.loss.head import IGNORED, next_token_loss
from fira.model import build_meta
from fira.model.adapter import attach
from fira.model.initialize import initialize
from fira.model.spec import FIRA2Spec, FIRASpec
from fira.parallel.layout import Layout
from fira.train.optim import OptimConfig, make_optimizer, set_rates, update
from tests.parallel.ranks import mesh_of, on_ranks

SHAPE = {"vocab_size": 60, "d_model": 16, "n_head": 2, "num_layers": 4, "d_ff": 24,
         "num_experts": 4, "top_k": 2, "context": 8, "balance_weight": 0.02}
FIRA2 = FIRA2Spec(**SHAPE, n_kv_head=1, head_dim=8)
SPECS = {"fira": FIRASpec(**SHAPE, dropout=0.0), "fira2": FIRA2, "adapted": FIRA2,
         "quantile": FIRA2.model_copy(update={"balance": "quantile"}),
         "untied": FIRA2.model_copy(update={"tied": False, "look_back": True})}
BATCH = 8
LAYOUTS = {
    "data2": {"data": 2}, "shard2": {"shard": 2}, "expert2": {"expert": 2},
    "gpipe2": {"pipeline": 2}, "1f1b2": {"pipeline": 2},
    "data2-expert2": {"data": 2, "expert": 2}, "data2-pipeline2": {"data": 2, "pipeline": 2},
    "expert2-pipeline2": {"expert": 2, "pipeline": 2},
    "data2-shard2": {"data": 2, "shard": 2}, "expert2-shard2": {"expert": 2, "shard": 2},
}


def adapt(model):
    """Adapters, token rows too, on a model of which some norms are trained."""
    attach(model, 6, tokens=(3, 5))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "moe_norm" in name)
    return model


def batch(step):
    ids = torch.randint(0, 60, (BATCH, 9), generator=torch.Generator().manual_seed(step))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def cut(whole, rows, count=2):
    """Micro-batches of `count` rows, of a rank's rows of the whole batch."""
    return [Batch(*(part[i:i + count] for part in whole))
            for i in range(rows.start, rows.stop, count)]


def train(rank, arch, layout, rule, steps, starve):
    """Train as the loop does; every step's loss, norm and loads, and this rank's final weights."""
    model = build_meta(SPECS[arch])
    layout = Layout(mesh_of(rank, LAYOUTS.get(layout, {})),
                    adapt(model) if arch == "adapted" else model, seed=5,
                    schedule="gpipe" if layout == "gpipe2" else "1f1b")
    initialize(model, 5, layout.slices(model.named_parameters()))  # frozen ones too
    if starve:  # every row to experts 0 and 1: the second half gets none, nor a rank that has it
        for part in layout.slices(model.named_parameters()):
            if part.name.endswith("router.weight"):
                part.rows.zero_()
            elif part.name.endswith("router.bias"):
                preferred = torch.tensor([2.0, 1.0, -1.0, -2.0])
                part.rows.copy_(preferred[part.start:part.start + len(part.rows)])
    follows = 0.25 if rule == "muon" else 0.0  # those jobs have no pipeline
    optimizer = make_optimizer(model, OptimConfig(lr=2e-3, rule=rule, expert_interval=2,
                                                  head_follows=follows))
    record = []
    model.train()
    for step in range(steps):
        loss, _ = layout.forward_backward(cut(batch(step), layout.rows(BATCH)), next_token_loss)
        set_rates(optimizer, step, 1.0)
        norm = layout.gradient_norm()
        assert update(optimizer, loss, norm, max_norm=0.5)
        found = layout.end_step()
        record.append((loss, norm, found and found["load"], found and found["entropy"]))
    weights = [(p.name, p.start, p.rows.clone())
               for p in layout.slices(model.state_dict().items())]
    return record, weights


def train_all(rank, jobs):
    return {name: train(rank, *job) for name, job in jobs.items()}


def jobs_of(world):
    """Name -> arguments of `train` for everything that is compared on so many ranks."""
    jobs = {}
    for layout in LAYOUTS:
        if 2 ** len(layout.split("-")) == world:
            for arch in SPECS if world == 2 else ("fira", "fira2", "adapted"):
                steps = 8 if arch in ("fira", "fira2") else 3
                jobs[f"{arch} {layout}"] = (arch, layout, "adamw", steps, False)
            if "pipeline" not in LAYOUTS[layout]:
                jobs[f"muon {layout}"] = ("untied", layout, "muon", 4, False)
            if "expert" in LAYOUTS[layout]:
                jobs[f"starved {layout}"] = ("fira", layout, "adamw", 3, True)
    return jobs


JOBS = {2: jobs_of(2), 4: jobs_of(4)}


@functools.cache
def alone(arch, rule, steps, starve):
    """The one-process run of a job."""
    return train(0, arch, "one process", rule, steps, starve)


@pytest.fixture(scope="module")
def results():
    """world -> what each rank did in every job, in one set of processes."""
    return {world: on_ranks(world, train_all, jobs) for world, jobs in JOBS.items()}


@pytest.mark.parametrize("world,name", [(world, name) for world in JOBS for name in JOBS[world]])
def test_a_layout_equals_one_process(world, name, results):
    arch, _, rule, steps, starve = JOBS[world][name]
    expected, weights = alone(arch, rule, steps, starve)
    if starve:
        assert all(loads == [0.5, 0.5, 0, 0] for row in expected for loads in row[2])
    whole = {key: rows for key, _, rows in weights}
    seen = dict.fromkeys(whole, 0)
    for rank in results[world]:
        record, parts = rank[name]
        for ours, theirs in zip(record, expected, strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
            assert ours[1] == pytest.approx(theirs[1], rel=1e-4)
            assert ours[2] == theirs[2]
            assert ours[3] == pytest.approx(theirs[3], abs=1e-5)
        for key, start, rows in parts:
            torch.testing.assert_close(rows, whole[key][start:start + len(rows)] if rows.dim()
                                       else whole[key], atol=1e-4, rtol=0)
            seen[key] += rows.numel()
    assert all(seen[key] >= whole[key].numel() for key in whole)


LONG = FIRA2.model_copy(update={"context": 64})
ROWS = 4
AXIS_LAYOUTS = [{"data": 2}, {"expert": 2}, {"shard": 2}, {"pipeline": 2}]


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
    return Layout(mesh_of(rank, sizes), build_meta(LONG), seed=5)


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
        if rank == layout.mesh.size - 1:
            grad = next(p.grad for n, p in layout.model.named_parameters() if "experts" in n)
            getattr(grad, "_local_tensor", grad).fill_(float("nan"))
        assert not math.isfinite(layout.gradient_norm())  # all ranks skip a step that one cannot do
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
    found = [step_each(0, [{}])[0], *(one for rank in on_ranks(2, step_each, AXIS_LAYOUTS)
                                      for one in rank)]
    for number, (loss, metrics, first, norm, nothing, left, scores, again) in enumerate(found):
        assert loss == pytest.approx(uncut[0], rel=1e-6)
        assert metrics == pytest.approx(uncut[1], rel=1e-6) and metrics["rare"] == 5.0
        assert norm == pytest.approx(uncut[3], rel=1e-6)
        assert nothing[0] != nothing[0] and nothing[1] == {} and left == 0
        assert_equal_gradients(first, uncut[2])
        assert_equal_gradients(again, uncut[7])
        rank, layout = divmod(number - 1, len(AXIS_LAYOUTS)) if number else (None, None)
        if layout == AXIS_LAYOUTS.index({"pipeline": 2}) and rank == 0:
            assert scores is None
        else:
            whole = number == 0 or "pipeline" in AXIS_LAYOUTS[layout]
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
        layout = Layout(student.mesh, build_meta(LONG).requires_grad_(False))
    initialize(teacher := layout.model, 9, layout.slices(teacher.named_parameters()))

    def loss_fn(model, batch):
        with torch.no_grad():
            target_BTD = teacher.features(batch.tokens_BT)
        return F.mse_loss(model.features(batch.tokens_BT), target_BTD), {}

    student.forward_backward(cut(masked((64,) * ROWS), student.rows(ROWS)), loss_fn)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    return gradients(student)


def stopped_and_taught(rank):
    return stopped(rank, {"data": 2}), [taught(rank, sizes) for sizes in AXIS_LAYOUTS[:3]]


def test_a_check_that_raises_leaves_nothing_and_a_teacher_lies_beside_the_student():
    alone, lesson = stopped(0, {}), taught(0, {})
    uncut = step_each(0, [{}], count=ROWS)[0][2]
    for stop, lessons in [(alone, []), *on_ranks(2, stopped_and_taught)]:
        left, counted, found = stop
        assert not left and not counted
        assert_equal_gradients(found, uncut)
        for one in lessons:
            assert_equal_gradients(one, lesson)
