"""Routing: what it computes, what it learns from, what it counts."""
from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import fira.model.fast as fast
from fira.model.balance import METHODS, end_step, routing_health, set_loss_share
from fira.model.fira import FIRA
from fira.model.fira2 import FIRA2
from fira.model.initialize import initialize
from fira.model.moe import MoE, SwiGLUExperts, sort_by_expert
from fira.model.router import Router, routers

TINY = dict(vocab_size=31, d_model=16, n_head=2, num_layers=2, d_ff=24, num_experts=4, context=12)
MODELS = {"fira": lambda **f: FIRA(**TINY | {"dropout": 0.0} | f),
          "fira2": lambda **f: FIRA2(**TINY | {"n_kv_head": 1, "head_dim": 8} | f)}


@pytest.fixture(autouse=True)
def wide_weights(monkeypatch):
    """Initial weights large enough that routers prefer some experts."""
    monkeypatch.setattr("fira.model.initialize.STD", 0.3)


def layer(num_experts=4, top_k=2, balance_weight=0.01, z_weight=0.001) -> MoE:
    router = Router(8, num_experts, top_k, True, METHODS["loss"], balance_weight)
    router.z_weight = z_weight
    moe = MoE(router, SwiGLUExperts(num_experts, 8, 12))
    initialize(torch.nn.ModuleDict({"moe": moe}), seed=1)
    return moe


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
    moe = layer(top_k=top_k).eval()
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    fast, slow = moe(x), token_by_token(moe, x)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    wanted, upstream = [x, *moe.parameters()], torch.randn_like(slow)
    for ours, theirs in zip(torch.autograd.grad(fast, wanted, upstream),
                            torch.autograd.grad(slow, wanted, upstream), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_router_learns_from_the_language_model_loss(name, top_k):
    torch.manual_seed(0)
    model = MODELS[name](top_k=top_k, balance="none").train()
    for router in routers(model):
        router.z_weight = 0.0
    tokens = torch.randint(31, (2, 12))
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    for router in routers(model):
        assert router.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_routers_losses_enter_by_their_share_whatever_the_loss_is_scaled_by(top_k, scale,
                                                                                share):
    moe = layer(top_k=top_k, balance_weight=1.0, z_weight=0.1).train()
    set_loss_share(moe, share)
    moe.router.load_share_E.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    wanted = [x, *moe.router.parameters()]
    joined = torch.autograd.grad(scale * moe(x).square().sum(), wanted)
    logits = F.linear(x.flatten(0, 1), moe.router.weight, moe.router.bias)
    balance = 4 * (logits.softmax(-1).mean(0) * moe.router.load_share_E).sum()
    z_loss = logits.logsumexp(-1).square().mean()
    loss = scale * moe.eval()(x).square().sum() + share * (balance + 0.1 * z_loss)
    for ours, theirs in zip(joined, torch.autograd.grad(loss, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_of_one_batch_equal_the_mean_over_its_micro_batches(name, top_k):
    torch.manual_seed(0)
    model = MODELS[name](top_k=top_k, balance_weight=0.5).train()
    tokens = torch.randint(31, (4, 12))

    def gradients(parts):
        model.zero_grad()
        for part in parts:
            F.cross_entropy(model(part).flatten(0, 1), part.flatten()).backward()
        return {name: p.grad / len(parts) for name, p in model.named_parameters()}

    gradients([tokens])
    end_step(model)
    assert all(router.load_share_E.std() > 0.01 for router in routers(model))
    whole, whole_load = gradients([tokens]), routing_health(model)["load"]
    end_step(model)
    parts, parts_load = gradients(tokens.split(1)), routing_health(model)["load"]
    assert whole_load == parts_load
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-6)


def test_balance_loss_evens_the_load():
    moe = layer(num_experts=8, top_k=1, balance_weight=1.0).train()
    x = torch.randn(1, 512, 8, generator=torch.Generator().manual_seed(0)) + 1
    optimizer = torch.optim.Adam([moe.router.weight, moe.router.bias], lr=0.01)
    imbalance = []
    for _ in range(150):
        optimizer.zero_grad()
        (0.0 * moe(x).sum()).backward()
        optimizer.step()
        imbalance.append(routing_health(moe)["cv"][0])
        end_step(moe)
    assert imbalance[-1] < 0.5 * imbalance[0]


def test_router_stays_in_fp32_under_autocast():
    moe = layer().train()
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).flatten(0, 1)
    plain_weights, plain_experts = moe.router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, experts = moe.router(x)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, plain_weights)
    assert torch.equal(experts, plain_experts)


@pytest.mark.parametrize("name", MODELS)
def test_models_train_under_bf16_autocast(name):
    torch.manual_seed(0)
    model = MODELS[name](top_k=2).train()
    tokens = torch.randint(31, (2, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens)
    F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()
    torch.testing.assert_close(logits.float(), model(tokens), rtol=0.2, atol=0.6)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_health_reports_the_counted_load():
    moe = layer(num_experts=4, top_k=1).train()
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.bias.copy_(torch.tensor([0.0, 0.0, 5.0, -9.0]))
    moe(torch.ones(1, 10, 8))
    probs = moe.router.bias.detach().softmax(-1)
    health = routing_health(moe)
    assert health["load"] == [[0, 0, 1, 0]]
    assert health["dead"] == [3]
    assert health["max_mean"] == [4]
    assert health["cv"] == [pytest.approx(math.sqrt(3))]
    expected = float(-(probs * probs.log()).sum()) / math.log(4)
    assert health["entropy"] == [pytest.approx(expected, rel=1e-4)]
    end_step(moe)
    assert routing_health(moe) is None
    assert moe.router.load_share_E.tolist() == [0, 0, 1, 0]


def test_evaluation_is_not_counted_and_shares_outlive_an_empty_step():
    moe = layer().eval()
    moe(torch.ones(1, 10, 8))
    assert routing_health(moe) is None
    end_step(moe)
    assert moe.router.load_share_E.tolist() == [0.25] * 4


def test_a_dense_model_has_no_router_and_the_same_expert_names():
    dense = MODELS["fira2"](num_experts=1)
    names = {name for name, _ in dense.named_parameters()}
    sparse = {name for name, _ in MODELS["fira2"]().named_parameters()}
    assert routing_health(dense) is None
    assert names == {name for name in sparse if "router" not in name}


@pytest.mark.parametrize("name", MODELS)
def test_training_repeats_to_the_bit(name):
    def train() -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = MODELS[name](top_k=2).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(4):
            tokens = torch.randint(31, (4, 12))
            F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            end_step(model)
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(), train(), strict=True))


@pytest.mark.parametrize("top_k", [1, 3])
def test_scatter_and_gather_equal_their_definitions_and_fast_forms(top_k, monkeypatch):
    """In values and gradients; a sum by choices is what a GPU's graph does."""
    generator = torch.Generator().manual_seed(0)
    order = sort_by_expert(torch.rand(6, 4, generator=generator).topk(top_k).indices, 4)
    x_ND = torch.randn(6, 5, generator=generator, requires_grad=True)
    weights_NK = torch.rand(6, top_k, generator=generator, requires_grad=True)
    upstream_ND = torch.randn(6, 5, generator=generator)

    def scatter(x_ND, order):
        return fast.Scatter.apply(x_ND, order.tokens_R, order.inverse_NK)

    def gather(rows_RD, weights_NK, order):
        return fast.Gather.apply(rows_RD, weights_NK, order.order_R, order.inverse_NK)

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
