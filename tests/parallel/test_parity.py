"""Every layout trains as one process does: losses, gradient norms, routing, final weights."""
from typing import NamedTuple

import pytest
import torch

from fira.loss.next_token import next_token_loss
from fira.model.spec import FIRA2Spec, FIRASpec
from fira.parallel.layout import Layout
from fira.parallel.mesh import AXES, Mesh, make_mesh
from fira.train.optim import OptimConfig, make_optimizer, set_step
from fira.train.step import accumulate, finish_step
from tests.parallel.ranks import on_ranks

SHAPE = {"vocab_size": 60, "d_model": 16, "n_head": 2, "num_layers": 4, "d_ff": 24,
         "num_experts": 4, "top_k": 2, "context": 8, "balance_weight": 0.02}
SPECS = {"fira": FIRASpec(**SHAPE, dropout=0.0),
         "fira2": FIRA2Spec(**SHAPE, n_kv_head=1, head_dim=8)}
OTHERS = {"quantile": FIRA2Spec(**SHAPE, n_kv_head=1, head_dim=8, balance="quantile"),
          "untied": FIRA2Spec(**SHAPE, n_kv_head=1, head_dim=8, tied=False, look_back=True)}
BATCH, STEPS = 8, 20
LAYOUTS = {
    "data2": {"data": 2}, "shard2": {"shard": 2}, "expert2": {"expert": 2},
    "gpipe2": {"pipeline": 2, "schedule": "gpipe"}, "1f1b2": {"pipeline": 2},
    "interleaved2": {"pipeline": 2, "schedule": "interleaved"},
    "zero_bubble2": {"pipeline": 2, "schedule": "zero_bubble"},
    "data2-expert2": {"data": 2, "expert": 2}, "data2-pipeline2": {"data": 2, "pipeline": 2},
    "expert2-pipeline2": {"expert": 2, "pipeline": 2},
    "data2-shard2": {"data": 2, "shard": 2}, "expert2-shard2": {"expert": 2, "shard": 2},
}
LONG = [name for name in LAYOUTS if name.count("-") == 0] + ["data2-expert2", "data2-pipeline2"]


class Batch(NamedTuple):
    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor


def batch(step):
    ids = torch.randint(0, 60, (BATCH, 9), generator=torch.Generator().manual_seed(step))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def train(layout, rule, steps=STEPS, starve=False):
    """Train as the loop does; every step's loss, norm and loads, and this rank's final weights."""
    model = layout.model
    if starve:  # every row to experts 0 and 1: the second half gets none, nor a rank that has it
        for piece in layout.pieces(model.named_parameters()):
            if piece.name.endswith("router.weight"):
                piece.rows.zero_()
            elif piece.name.endswith("router.bias"):
                preferred = torch.tensor([2.0, 1.0, -1.0, -2.0])
                piece.rows.copy_(preferred[piece.start:piece.start + len(piece.rows)])
    follows = 0.25 if rule == "muon" else 0.0  # those jobs have no pipeline
    optimizer = make_optimizer(model, OptimConfig(lr=2e-3, rule=rule, turns=2, clip=0.5,
                                                  head_follows=follows), layout.each)
    forward_backward, record = layout.forward_backward(accumulate), []
    model.train()
    for step in range(steps):
        own = Batch(*(part[layout.rows(BATCH)] for part in batch(step)))
        cut = [Batch(*(part[i:i + 2] for part in own)) for i in range(0, len(own[0]), 2)]
        loss, count = forward_backward(model, cut, next_token_loss)
        set_step(optimizer, step, 1.0)
        norm, updated = finish_step(model, optimizer, loss, count, 0.5, layout.gradient_norm)
        assert updated
        found = layout.end_step()
        record.append((float(loss), norm, found and found["load"], found and found["entropy"]))
    weights = [(p.name, p.start, p.rows.clone())
               for p in layout.pieces(model.state_dict().items())]
    return record, weights


def make_layout(rank, spec, sizes):
    sizes = dict(sizes)
    schedule = sizes.pop("schedule", "1f1b")
    mesh = make_mesh(dict.fromkeys(AXES, 1) | sizes, rank, torch.device("cpu")) if sizes else Mesh()
    return Layout(mesh, spec, seed=5, schedule=schedule)


def train_all(rank, jobs):
    specs = SPECS | OTHERS
    return {name: train(make_layout(rank, specs[arch], LAYOUTS[layout]), rule, steps, starve)
            for name, (arch, layout, rule, steps, starve) in jobs.items()}


def jobs_of(world):
    jobs = {}
    for layout, sizes in LAYOUTS.items():
        ranks = 1
        for axis in AXES:
            ranks *= sizes.get(axis, 1)
        if ranks == world:
            for arch in SPECS:
                steps = STEPS if layout in LONG else 5
                jobs[f"{arch} {layout}"] = (arch, layout, "adamw", steps, False)
            for other in OTHERS:
                jobs[f"{other} {layout}"] = (other, layout, "adamw", 5, False)
            if "pipeline" not in sizes:
                jobs[f"muon {layout}"] = ("untied", layout, "muon", 5, False)
            if "expert" in sizes:
                jobs[f"starved {layout}"] = ("fira", layout, "adamw", 3, True)
    return jobs


JOBS = {2: jobs_of(2), 4: jobs_of(4)}


@pytest.fixture(scope="module")
def alone():
    """The one-process run of a job, made once."""
    made = {}

    def run(arch, rule, steps, starve):
        key = arch, rule, steps, starve
        if key not in made:
            made[key] = train(make_layout(0, (SPECS | OTHERS)[arch], {}), rule, steps, starve)
        return made[key]
    return run


@pytest.fixture(scope="module")
def results():
    """world -> what each rank did in every job, in one set of processes."""
    return {world: on_ranks(world, train_all, jobs) for world, jobs in JOBS.items()}


@pytest.mark.parametrize("world,name", [(world, name) for world in JOBS for name in JOBS[world]])
def test_a_layout_equals_one_process(world, name, alone, results):
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
