"""Each balance method evens a skewed router, and a bias selects without weighing."""
import pytest
import torch

from fira.model import load_pretrained
from fira.model.files import save_weights
from fira.model.router import METHODS, end_step, even_bias, health, routers, set_progress
from tests.models import assert_equal_with_gradients, build, build_moe, tiny_spec


def skewed(balance, top_k=2, num_experts=8):
    """A layer whose router prefers its first experts."""
    moe = build_moe(balance, num_experts, top_k)
    with torch.no_grad():
        moe.router.bias.copy_(torch.linspace(1, -1, num_experts))
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
        found.append(health(routers(moe))["cv"][0])
        end_step(moe)
    return found


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("balance, steps", [("loss", 100), ("bias", 300), ("quantile", 15),
                                             ("handover", 15), ("none", 50)])
def test_each_method_evens_a_skewed_router_and_without_one_the_skew_stays(balance, steps, top_k):
    found = imbalances(skewed(balance, top_k), steps)
    assert found[-1] > 0.7 * found[0] if balance == "none" else found[-1] < 0.3 * found[0]


def test_a_handover_ends_without_a_bias_and_with_the_loss_in_its_place():
    found = {}
    for balance, fraction in (("quantile", 1.0), ("loss", 1.0), ("handover", 0.5),
                              ("handover", 0.8), ("handover", 1.0)):
        moe = skewed(balance)
        moe(torch.randn(1, 512, 8, generator=torch.Generator().manual_seed(0)))
        set_progress(moe, fraction)
        end_step(moe)
        moe.router.load_share_E.copy_(torch.linspace(0.2, 0.05, 8))
        moe(torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0))).sum().backward()
        found[balance, fraction] = (moe.router.selection_bias_E, moe.router.bias.grad)
    bias_E, gradient_E = found["quantile", 1.0]
    assert torch.equal(found["handover", 0.5][0], bias_E)
    torch.testing.assert_close(found["handover", 0.8][0], 0.5 * bias_E)
    assert not found["handover", 1.0][0].any()
    assert torch.equal(found["handover", 0.5][1], gradient_E)  # its loss has no weight yet
    torch.testing.assert_close(found["handover", 1.0][1], found["loss", 1.0][1])


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
    assert_equal_with_gradients(weights, plain, moe.router.weight)


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
    model = build(tiny_spec("fira2", balance=balance), seed=0)
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
    torch.testing.assert_close(list(together.buffers()), list(alone.buffers()))
    assert not torch.equal(together[0].router.load_share_E, together[1].router.load_share_E)
    assert torch.equal(together[2].router.load_share_E, torch.full((8,), 1 / 8))
