"""One optimizer step: accumulation, clipping, skipping, the learning rate's course."""
import math
from typing import NamedTuple

import pytest
import torch

from fira.loss.next_token import next_token_loss
from fira.model.files import build
from fira.model.spec import FIRA2Spec, FIRASpec
from fira.train.optim import OptimConfig, make_optimizer, parameter_groups
from fira.train.schedule import ScheduleConfig, factor
from fira.train.step import accumulate, finish_step

SPECS = [
    FIRASpec(vocab_size=40, d_model=16, n_head=2, num_layers=2, d_ff=24, num_experts=3, top_k=2,
             context=8, dropout=0.0),
    FIRA2Spec(vocab_size=40, d_model=16, n_head=2, n_kv_head=1, head_dim=8, num_layers=2, d_ff=24,
              num_experts=3, top_k=2, context=8),
]


class Batch(NamedTuple):
    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor


def random_batch(rows, seed=0):
    ids = torch.randint(0, 40, (rows, 9), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def cut(batch, size):
    return [Batch(*(part[i:i + size] for part in batch)) for i in range(0, len(batch[0]), size)]


@pytest.mark.parametrize("spec", SPECS, ids=["fira", "fira2"])
def test_accumulated_micro_batches_equal_one_batch(spec):
    weights = []
    for size in (8, 2):
        model = build(spec, seed=3)
        optimizer = make_optimizer(model, OptimConfig(lr=0.01, clip=0.1))
        for seed in range(3):
            loss, count = accumulate(model, cut(random_batch(8, seed), size), next_token_loss)
            finish_step(model, optimizer, loss, count, clip=0.1)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=2e-4, rtol=0)


def test_clipping_bounds_the_mean_gradient():
    model = build(SPECS[1], seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    loss, count = accumulate(model, cut(random_batch(8), 2), next_token_loss)
    norm, updated = finish_step(model, optimizer, loss, count, clip=0.01)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert updated and norm > 0.01
    assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_gradient_changes_nothing(poison):
    model = build(SPECS[1], seed=3)
    optimizer = make_optimizer(model, OptimConfig())
    before = [p.detach().clone() for p in model.parameters()]
    loss, count = accumulate(model, cut(random_batch(4), 2), next_token_loss)
    next(iter(model.parameters())).grad[0, 0] = poison
    _, updated = finish_step(model, optimizer, loss, count, clip=1.0)
    assert not updated and not optimizer.state
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("spec", SPECS, ids=["fira", "fira2"])
def test_every_parameter_has_one_group_and_only_matrices_decay(spec):
    model = build(spec, seed=0)
    groups = {g["kind"]: g for g in parameter_groups(model, OptimConfig(router_lr=0.5))}
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))
    assert groups["router"]["lr"] == 0.5 and groups["vector"]["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in groups["matrix"]["params"]}
    assert not any("bias" in name or "norm" in name or "router" in name for name in decayed)
    assert any("experts" in name for name in decayed)


@pytest.mark.parametrize("spec", SPECS, ids=["fira", "fira2"])
def test_embeddings_may_have_a_rate_of_their_own_and_the_head_keeps_the_common_one(spec):
    model = build(spec, seed=0)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["peak_lr"]
             for group in parameter_groups(model, OptimConfig(lr=0.1, embedding_lr=0.3))
             for p in group["params"]}
    assert {name for name, rate in rates.items() if rate == 0.3} == {
        name for name in rates if name.endswith("embedding.weight")}
    assert set(rates.values()) == {0.1, 0.3}


def test_cosine_warms_up_peaks_and_ends_at_its_floor():
    config = ScheduleConfig(kind="cosine", warmup=0.1, floor=0.2)
    values = [factor(config, i / 1000) for i in range(1001)]
    assert 0 < values[0] < 0.02 and max(values) == pytest.approx(1.0)
    assert values[100] == pytest.approx(1.0) and values[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(values[100:], values[101:], strict=False))


def test_constant_holds_then_decays():
    config = ScheduleConfig(kind="constant", warmup=0.0, decay=0.25, floor=0.0)
    assert factor(config, 0.0) == factor(config, 0.75) == 1.0
    assert factor(config, 0.875) == pytest.approx(0.5) and factor(config, 1.0) == 0.0
