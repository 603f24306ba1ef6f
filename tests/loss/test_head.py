"""The blockwise head loss against whole logits: values, gradients, what it may be wrapped in."""
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from fira.loss import head
from fira.loss.head import IGNORED, head_loss, next_token_loss, next_token_loss_plain, token_losses
from fira.model.spec import FIRA2Spec, FIRASpec
from tests.models import build

SHAPE = dict(vocab_size=57, d_model=16, n_head=2, num_layers=1, d_ff=8, num_experts=2, context=8)
SPECS = [FIRASpec(**SHAPE, dropout=0.0), FIRA2Spec(**SHAPE, n_kv_head=1, head_dim=8)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Five rows a block, which divides none of the sizes below."""
    monkeypatch.setitem(head.BLOCK, "cpu", 5 * 57)


def tensors(bias, ignored=0.0, rows=23):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, generator=generator, requires_grad=True)
    weight = torch.randn(57, 6, generator=generator).requires_grad_()
    offset = torch.randn(57, generator=generator).requires_grad_() if bias else None
    targets = torch.randint(57, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = IGNORED
    return x, weight, offset, targets


def batch(rows=3):
    ids = torch.randint(57, (rows, 9), generator=torch.Generator().manual_seed(4))
    return SimpleNamespace(tokens_BT=ids[:, :-1], targets_BT=ids[:, 1:])


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_values_and_gradients_equal_whole_logits(bias, ignored):
    x, weight, offset, targets = tensors(bias, ignored)
    wanted = [x, weight] + ([offset] if bias else [])
    ours = head_loss(x, weight, offset, targets)
    plain = F.cross_entropy(F.linear(x, weight, offset), targets)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(3 * ours, wanted),
                               torch.autograd.grad(3 * plain, wanted), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("spec", SPECS, ids=["untied with bias", "tied"])
def test_models_learn_the_same_from_both_forms(spec):
    results = []
    for loss_fn in (next_token_loss, next_token_loss_plain):
        model = build(spec, seed=0).train()
        loss, _ = loss_fn(model, batch())
        loss.backward()
        results.append([loss.detach(), *gradients(model)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_a_frozen_head_or_frozen_features_cost_no_gradient():
    x, weight, offset, targets = tensors(bias=True)
    weight, offset = weight.detach(), offset.detach()
    head_loss(x, weight, offset, targets).backward()
    plain = torch.autograd.grad(F.cross_entropy(F.linear(x, weight, offset), targets), x)
    torch.testing.assert_close(x.grad, plain[0])
    x, weight, offset, targets = tensors(bias=True)
    head_loss(x.detach(), weight, offset, targets).backward()
    assert x.grad is None and weight.grad is not None and offset.grad is not None


def test_losses_far_below_the_smallest_probability_stay_exact():
    x, weight = torch.full((1, 1), 400.0), torch.tensor([[1.0], [0.0]])
    assert float(token_losses(x, weight, None, torch.tensor([1]))) == 400.0


def test_without_gradient_mode_the_loss_is_the_mean_of_scored_tokens():
    x, weight, offset, targets = tensors(bias=True, ignored=0.4)
    losses = token_losses(x, weight, offset, targets)
    plain = F.cross_entropy(F.linear(x, weight, offset), targets, reduction="none")
    torch.testing.assert_close(losses, plain)
    with torch.no_grad():
        mean = head_loss(x, weight, offset, targets)
    assert not mean.requires_grad
    torch.testing.assert_close(mean, F.cross_entropy(F.linear(x, weight, offset), targets))


def test_a_batch_without_any_target_costs_nothing_and_has_no_gradient():
    x, weight, offset, targets = tensors(bias=True)
    loss = head_loss(x, weight, offset, torch.full_like(targets, IGNORED))
    loss.backward()
    assert loss.item() == 0 and not x.grad.any() and not weight.grad.any()


def test_weighted_targets_equal_the_weighted_mean_of_whole_logits():
    x, weight, offset, targets = tensors(bias=True, ignored=0.3)
    weights = torch.rand(len(targets), generator=torch.Generator().manual_seed(2))
    ours = head_loss(x, weight, offset, targets, weights)
    each = F.cross_entropy(F.linear(x, weight, offset), targets, reduction="none")
    scored = weights * (targets != IGNORED)
    plain = (scored * each).sum() / scored.sum()
    torch.testing.assert_close(ours, plain)
    wanted = [x, weight, offset]
    torch.testing.assert_close(torch.autograd.grad(ours, wanted),
                               torch.autograd.grad(plain, wanted), rtol=1e-5, atol=1e-7)


def test_the_loss_of_each_token_has_a_gradient():
    x, weight, offset, targets = tensors(bias=True, ignored=0.3)
    advantages = torch.randn(len(targets), generator=torch.Generator().manual_seed(2))
    ours = (advantages * token_losses(x, weight, offset, targets)).sum()
    plain = (advantages * F.cross_entropy(F.linear(x, weight, offset), targets,
                                          reduction="none")).sum()
    torch.testing.assert_close(ours, plain)
    wanted = [x, weight, offset]
    torch.testing.assert_close(torch.autograd.grad(ours, wanted),
                               torch.autograd.grad(plain, wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=["untied with bias", "tied"])
def test_it_multiplies_in_bf16_under_autocast_as_the_plain_form_does(spec):
    results = []
    for loss_fn in (next_token_loss, next_token_loss_plain):
        model = build(spec, seed=0).train()
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = loss_fn(model, batch())
        loss.backward()
        assert loss.dtype == torch.float32
        results.append([loss.detach(), *gradients(model)])
    torch.testing.assert_close(results[0], results[1], rtol=0.05, atol=0.01)


def test_whole_logits_are_never_held():
    """No tensor that autograd keeps, or that the loss makes, has a row of logits per token."""
    seen = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen.extend(part.numel() for part in (out if isinstance(out, tuple) else (out,))
                        if isinstance(part, torch.Tensor))
            return out

    x, weight, offset, targets = tensors(bias=True)
    with Sizes():
        head_loss(x, weight, offset, targets).backward()
    assert max(seen) < len(x) * len(weight)
