"""Each balance method evens a skewed router, and a bias selects without weighing."""
from unittest import mock

import pytest
import torch

from fira.model import build, load_pretrained
from fira.model.balance import METHODS, end_step, even_bias, routing_health, set_progress
from fira.model.files import save_weights
from fira.model.initialize import initialize
from fira.model.moe import MoE, SwiGLUExperts
from fira.model.router import Router, routers
from fira.model.spec import FIRA2Spec


def skewed(balance, top_k=2, num_experts=8) -> MoE:
    """A layer whose router prefers its first experts."""
    router = Router(8, num_experts, top_k, bias=True, method=METHODS[balance], balance_weight=1.0)
    router.z_weight = 0.0
    moe = MoE(router, SwiGLUExperts(num_experts, 8, 4))
    with mock.patch("fira.model.initialize.STD", 0.3):
        initialize(torch.nn.ModuleDict({"moe": moe}), seed=1)
    with torch.no_grad():
        router.bias.copy_(torch.linspace(1, -1, num_experts))
    return moe.train()


def imbalances(moe, steps, rows=512):
    """Train with nothing but what balances, on random data in two micro-batches a step."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([moe.router.weight, moe.router.bias], lr=0.02)
    found = []
    for _ in range(steps):
        for _ in range(2):
            (0.0 * moe(torch.randn(1, rows, 8, generator=generator)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(routing_health(moe)["cv"][0])
        end_step(moe)
    return found


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("balance, steps", [("loss", 100), ("bias", 300), ("quantile", 15),
                                             ("handover", 15)])
def test_each_method_evens_a_skewed_router(balance, steps, top_k):
    found = imbalances(skewed(balance, top_k), steps)
    assert found[-1] < 0.3 * found[0]


def test_without_a_method_the_skew_stays():
    found = imbalances(skewed("none"), 50)
    assert found[-1] > 0.7 * found[0]


def test_a_handover_ends_without_a_bias_and_with_the_loss_in_its_place():
    found = {}
    for balance, fraction in (("quantile", 1.0), ("handover", 0.5), ("handover", 0.8),
                              ("handover", 1.0)):
        moe = skewed(balance)
        moe(torch.randn(1, 512, 8, generator=torch.Generator().manual_seed(0)))
        set_progress(moe, fraction)
        end_step(moe)
        moe.router.load_share_E.copy_(torch.linspace(0.2, 0.05, 8))
        moe(torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0))).sum().backward()
        found[balance, fraction] = (moe.router.selection_bias_E.clone(), moe.router.bias.grad)
    whole, gradient = found["quantile", 1.0]
    assert torch.equal(found["handover", 0.5][0], whole)
    torch.testing.assert_close(found["handover", 0.8][0], 0.5 * whole)
    assert not found["handover", 1.0][0].any()
    assert torch.equal(found["handover", 0.5][1], gradient)  # its loss weighs nothing yet


def test_a_handover_pays_the_whole_loss_at_its_end():
    gradients = {}
    for balance in ("loss", "handover"):
        moe = skewed(balance)
        set_progress(moe, 1.0)
        moe.router.load_share_E.copy_(torch.linspace(0.2, 0.05, 8))
        moe(torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0))).sum().backward()
        gradients[balance] = moe.router.bias.grad
    torch.testing.assert_close(gradients["handover"], gradients["loss"])


@pytest.mark.parametrize("balance", ["bias", "quantile"])
def test_the_bias_selects_and_raw_probabilities_weigh_and_learn(balance):
    moe = skewed(balance)
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))
    before = moe.router(x)[1]
    bias = torch.linspace(-0.5, 0.5, 8)
    moe.router.selection_bias_E.copy_(bias)
    weights, experts = moe.router(x)
    assert not torch.equal(before, experts)
    probs = torch.nn.functional.linear(x, moe.router.weight, moe.router.bias).softmax(-1)
    assert torch.equal(experts, (probs + bias).topk(2).indices)
    gates = probs.gather(-1, experts)
    plain = gates / gates.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, plain)
    upstream = torch.randn(40, 2, generator=torch.Generator().manual_seed(4))
    for ours, theirs in zip(torch.autograd.grad(moe.router(x)[0], moe.router.weight, upstream),
                            torch.autograd.grad(plain, moe.router.weight, upstream), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_bias_is_zero_mean_fp32_and_updated_in_place():
    moe = skewed("bias")
    buffer = moe.router.selection_bias_E
    imbalances(moe, 5)
    assert moe.router.selection_bias_E is buffer and buffer.dtype == torch.float32
    assert buffer.abs().max() > 1e-3 and abs(float(buffer.mean())) < 1e-7
    kept = buffer.clone()
    end_step(moe)  # a step in which nothing was counted
    assert torch.equal(buffer, kept)


def test_the_quantile_is_exact_where_thresholds_do_not_move():
    probs = torch.rand(600, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    bias = torch.zeros(6)
    probs[:, 0] += 0.1
    for _ in range(50):
        threshold = (probs + bias).topk(3).values[:, -2:].mean(dim=1)
        bias = even_bias(probs, threshold, 2)
    counts = torch.bincount((probs + bias).topk(2).indices.flatten(), minlength=6)
    assert counts.tolist() == pytest.approx([200] * 6, abs=6)


@pytest.mark.parametrize("balance", METHODS)
def test_a_selection_bias_survives_files_and_others_have_none(balance, tmp_path):
    spec = FIRA2Spec(vocab_size=31, d_model=16, n_head=2, n_kv_head=1, head_dim=8, num_layers=2,
                     d_ff=8, num_experts=4, top_k=2, context=12, balance=balance)
    model = build(spec, seed=0)
    for layer, router in enumerate(routers(model)):
        if router.selection_bias_E is not None:
            router.selection_bias_E.copy_(torch.tensor([0.3, -0.1, -0.1, -0.1]) * (1 - 2 * layer))
    save_weights(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert again.spec.balance == balance
    tokens = torch.arange(12)[None]
    assert torch.equal(again(tokens), model.eval()(tokens))
    found = [router.selection_bias_E is not None for router in routers(again)]
    assert found == [balance in ("bias", "quantile", "handover")] * 2


@pytest.mark.parametrize("balance", METHODS)
def test_layers_that_end_a_step_at_once_end_it_as_each_alone_does(balance):
    """Three layers with loads and bias scales of their own, one of which counted nothing."""
    def layers():
        found = torch.nn.ModuleList(skewed(balance) for _ in range(3))
        generator = torch.Generator().manual_seed(0)
        for number, moe in enumerate(found[:2]):
            for _ in range(number + 1):
                moe((number + 1) * torch.randn(1, 64, 8, generator=generator))
            moe.router.bias_scale.fill_(0.9 - 0.4 * number)
        return found

    together, alone = layers(), layers()
    end_step(together)
    for moe in alone:
        end_step(moe)
    for ours, theirs in zip(together.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.equal(together[0].router.load_share_E, together[1].router.load_share_E)
    assert torch.equal(together[2].router.load_share_E, torch.full((8,), 1 / 8))
