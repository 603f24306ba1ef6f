"""Routing: what it computes, what it learns from, what it counts."""
from __future__ import annotations

import math

import pytest
import torch
from fira.model.experts import SwiGLUExperts
from fira.model.rows import sum_rows, sum_rows_plain
from torch.nn import functional as F

from fira.model.fira import FIRA
from fira.model.fira2 import FIRA2
from fira.model.initialize import initialize
from fira.model.moe import MoE, end_step, routers, routing_health
from fira.model.router import Router

TINY = dict(vocab_size=31, d_model=16, n_head=2, num_layers=2, d_ff=24, num_experts=4, context=12,
            init_std=0.3)
MODELS = {"fira": lambda **f: FIRA(**TINY | {"dropout": 0.0} | f),
          "fira2": lambda **f: FIRA2(**TINY | {"n_kv_head": 1, "head_dim": 8} | f)}


def layer(num_experts=4, top_k=2, balance_weight=0.01, z_weight=0.001) -> MoE:
    router = Router(8, num_experts, top_k, bias=True, balance_weight=balance_weight,
                    z_weight=z_weight)
    moe = MoE(router, SwiGLUExperts(num_experts, 8, 12))
    initialize(torch.nn.ModuleDict({"moe": moe}), 1, 0.5, seed=1)
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
    model = MODELS[name](top_k=top_k, balance_weight=0.0, z_weight=0.0).train()
    tokens = torch.randint(31, (2, 12))
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    for router in routers(model):
        assert router.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_joined_losses_give_the_gradients_of_explicit_ones_whatever_comes_back(top_k, scale):
    moe = layer(top_k=top_k, balance_weight=1.0, z_weight=0.1).train()
    moe.router.load_share_E.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    wanted = [x, *moe.router.parameters()]
    joined = torch.autograd.grad(scale * moe(x).square().sum(), wanted)
    logits = F.linear(x.flatten(0, 1), moe.router.weight, moe.router.bias)
    balance = 4 * (logits.softmax(-1).mean(0) * moe.router.load_share_E).sum()
    z_loss = logits.logsumexp(-1).square().mean()
    loss = scale * moe.eval()(x).square().sum() + balance + 0.1 * z_loss
    for ours, theirs in zip(joined, torch.autograd.grad(loss, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_of_one_batch_equal_the_mean_over_its_micro_batches(name, top_k):
    torch.manual_seed(0)
    model = MODELS[name](top_k=top_k, balance_weight=0.5, z_weight=0.1).train()
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


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_added_in_one_pass_equal_the_definition_in_values_and_gradients(weighted):
    generator = torch.Generator().manual_seed(0)
    rows_RD = torch.randn(12, 5, generator=generator, requires_grad=True)
    index_NK = torch.randperm(12, generator=generator).view(4, 3)
    weights_NK = torch.rand(4, 3, generator=generator, requires_grad=True) if weighted else None
    wanted = [x for x in (rows_RD, weights_NK) if x is not None]
    fast, plain = (add(rows_RD, index_NK, weights_NK) for add in (sum_rows, sum_rows_plain))
    torch.testing.assert_close(fast, plain)
    upstream = torch.randn(4, 5, generator=generator)
    for ours, theirs in zip(torch.autograd.grad(fast, wanted, upstream),
                            torch.autograd.grad(plain, wanted, upstream), strict=True):
        torch.testing.assert_close(ours, theirs)
