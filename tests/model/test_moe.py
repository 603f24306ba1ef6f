"""Routing: what it computes, what it learns from, what it counts."""
from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import fira.model.fast as fast
from fira.model.moe import Gather, MoE, Scatter, sort_by_expert
from fira.model.router import Watch, end_step, health, replay, routers, set_loss_share
from tests.models import NAMES, assert_equal_with_gradients, build, build_moe, tiny_spec

X_BTD = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
TOKENS_BT = torch.randint(31, (4, 12), generator=torch.Generator().manual_seed(0))


def next_token_loss(model, tokens_BT=TOKENS_BT):
    return F.cross_entropy(model(tokens_BT).flatten(0, 1).float(), tokens_BT.flatten())


def token_by_token(moe: MoE, x_BTD: torch.Tensor) -> torch.Tensor:
    """The layer's definition in plain operations."""
    out = []
    for x in x_BTD.flatten(0, 1):
        probs = F.linear(x, moe.router.weight, moe.router.bias).softmax(-1)
        weights, chosen = probs.topk(moe.router.top_k)
        if moe.router.top_k > 1:
            weights = weights / weights.sum()
        gate, up, down = (moe.experts.get_parameter(f"{n}.weight") for n in ("gate", "up", "down"))
        out.append(sum(w * (down[e] @ (F.silu(gate[e] @ x) * (up[e] @ x)))
                       for w, e in zip(weights, chosen, strict=True)))
    return torch.stack(out).view_as(x_BTD)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_layer_equals_token_by_token_in_values_and_gradients(top_k):
    moe, x_BTD = build_moe(top_k=top_k).eval(), X_BTD.clone().requires_grad_()
    assert_equal_with_gradients(moe(x_BTD), token_by_token(moe, x_BTD),
                                [x_BTD, *moe.parameters()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_router_learns_from_the_language_model_loss(name, top_k):
    model = build(tiny_spec(name, top_k=top_k, balance="none"), seed=0).train()
    for router in routers(model):
        router.z_weight = 0.0
    next_token_loss(model).backward()
    assert all(router.weight.grad.abs().max() > 1e-4 for router in routers(model))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_routers_losses_enter_by_their_share_whatever_the_loss_is_scaled_by(top_k, scale,
                                                                                share):
    moe, x_BTD = build_moe(top_k=top_k, z_weight=0.1).train(), X_BTD.clone().requires_grad_()
    set_loss_share(moe, share)
    moe.router.load_share_E.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    wanted = [x_BTD, *moe.router.parameters()]
    joined = torch.autograd.grad(scale * moe(x_BTD).square().sum(), wanted)
    logits_NE = F.linear(x_BTD.flatten(0, 1), moe.router.weight, moe.router.bias)
    balance = 4 * (logits_NE.softmax(-1).mean(0) * moe.router.load_share_E).sum()
    z_loss = logits_NE.logsumexp(-1).square().mean()
    loss = scale * moe.eval()(x_BTD).square().sum() + share * (balance + 0.1 * z_loss)
    torch.testing.assert_close(joined, torch.autograd.grad(loss, wanted), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_of_one_batch_equal_the_mean_over_its_micro_batches(name, top_k):
    model = build(tiny_spec(name, top_k=top_k, balance_weight=0.5), seed=1).train()

    def run(parts):
        """The mean gradients, and the load that the routers counted."""
        model.zero_grad()
        for part in parts:
            next_token_loss(model, part).backward()
        load = health(routers(model))["load"]
        end_step(model)
        return [p.grad / len(parts) for p in model.parameters()], load

    run([TOKENS_BT])
    assert all(router.load_share_E.std() > 0.01 for router in routers(model))
    (whole, whole_load), (mean, load) = run([TOKENS_BT]), run(TOKENS_BT.split(1))
    assert whole_load == load
    torch.testing.assert_close(mean, whole, rtol=1e-4, atol=1e-6)


def test_router_stays_in_fp32_under_autocast():
    router, x_ND = build_moe().train().router, X_BTD.flatten(0, 1)
    plain = router(x_ND)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights_NK, experts_NK = router(x_ND)
    assert weights_NK.dtype == torch.float32
    assert torch.equal(weights_NK, plain[0]) and torch.equal(experts_NK, plain[1])


@pytest.mark.parametrize("name", NAMES)
def test_models_train_under_bf16_autocast(name):
    model = build(tiny_spec(name), seed=1).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BTV = model(TOKENS_BT)
    F.cross_entropy(logits_BTV.flatten(0, 1).float(), TOKENS_BT.flatten()).backward()
    torch.testing.assert_close(logits_BTV.float(), model(TOKENS_BT), rtol=0.2, atol=0.6)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_health_reports_the_load_counted_in_training_and_an_empty_step_keeps_the_shares():
    moe = build_moe(top_k=1).train()
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.bias.copy_(torch.tensor([0.0, 0.0, 5.0, -9.0]))
    moe(torch.ones(1, 10, 8))
    probs = moe.router.bias.detach().softmax(-1)
    found = health(routers(moe))
    assert found["load"] == [[0, 0, 1, 0]]
    assert found["dead"] == [3]
    assert found["max_mean"] == [4]
    assert found["cv"] == [pytest.approx(math.sqrt(3))]
    expected = float(-(probs * probs.log()).sum()) / math.log(4)
    assert found["entropy"] == [pytest.approx(expected, rel=1e-4)]
    end_step(moe)
    moe.eval()(torch.ones(1, 10, 8))
    assert health(routers(moe)) is None
    end_step(moe)
    assert moe.router.load_share_E.tolist() == [0, 0, 1, 0]


def test_a_dense_model_has_nothing_to_watch_and_the_same_expert_names():
    dense = build(tiny_spec("fira2", num_experts=1, top_k=1), seed=0)
    with Watch(dense) as watch, replay(dense, watch.experts):
        dense(TOKENS_BT)
    assert watch.experts == [] and health(routers(dense)) is None
    sparse = build(tiny_spec("fira2"), seed=0).state_dict()
    assert list(dense.state_dict()) == [name for name in sparse if "router" not in name]


@pytest.mark.parametrize("top_k", [1, 3])
def test_scatter_and_gather_equal_their_definitions_and_fast_forms(top_k, monkeypatch):
    """In values and gradients; a sum by choices is what a GPU's graph does."""
    generator = torch.Generator().manual_seed(0)
    order = sort_by_expert(torch.rand(6, 4, generator=generator).topk(top_k).indices, 4)
    x_ND = torch.randn(6, 5, generator=generator, requires_grad=True)
    weights_NK = torch.rand(6, top_k, generator=generator, requires_grad=True)
    upstream_ND = torch.randn(6, 5, generator=generator)

    def scatter(x_ND, order):
        return Scatter.apply(x_ND, order.tokens_R, order.inverse_NK)

    def gather(rows_RD, weights_NK, order):
        return Gather.apply(rows_RD, weights_NK, order.order_R, order.inverse_NK)

    def run(scatter, gather):
        out_ND = gather(scatter(x_ND, order).square(), weights_NK, order)
        return out_ND, *torch.autograd.grad(out_ND, [x_ND, weights_NK], upstream_ND)

    plain = run(lambda x_ND, order: torch.stack([x_ND[n] for n in order.tokens_R.tolist()]),
                lambda rows_RD, weights_NK, order: torch.stack([
                    sum(w * rows_RD[r] for w, r in zip(weights, rows, strict=True))
                    for weights, rows in zip(weights_NK, order.inverse_NK.tolist(), strict=True)]))
    torch.testing.assert_close(run(scatter, gather), plain)
    monkeypatch.setattr(fast, "sum_rows", fast.sum_rows_by_choice)
    torch.testing.assert_close(run(scatter, gather), plain)


def test_rows_are_sorted_by_expert_and_ties_by_token():
    order = sort_by_expert(torch.tensor([[2, 0], [0, 3], [2, 0]]), 4)
    assert order.counts_E.tolist() == [3, 0, 2, 1]
    assert order.tokens_R.tolist() == [0, 1, 2, 0, 2, 1]
    assert order.order_R[order.inverse_NK.flatten()].tolist() == list(range(6))
