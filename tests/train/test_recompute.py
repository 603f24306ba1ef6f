"""Recomputed activations: the same losses, gradients and counts, from less memory."""
import pytest
import torch

from fira.loss.head import next_token_loss
from fira.model import build
from fira.model.router import health, routers
from fira.model.spec import FIRA2Spec, FIRASpec
from fira.train.loop import seed_step
from fira.train.recompute import recompute_blocks
from tests.train.test_step import cut, random_batch

SHAPE = dict(vocab_size=40, d_model=16, n_head=2, num_layers=2, d_ff=24, num_experts=4, context=8,
             top_k=2)
SPECS = [FIRASpec(**SHAPE, dropout=0.2),
         FIRA2Spec(**SHAPE, n_kv_head=1, head_dim=8, balance="quantile")]


def step(model):
    seed_step(1, 0)
    losses = []
    for batch in cut(random_batch(8), 2):
        loss, _ = next_token_loss(model, batch)
        loss.backward()
        losses.append(loss.detach())
    return losses, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("spec", SPECS, ids=["fira", "fira2"])
def test_losses_gradients_and_counts_equal_plain_training_to_the_bit(spec):
    plain, recomputing = (build(spec, seed=0).train() for _ in range(2))
    recompute_blocks(recomputing)
    torch.testing.assert_close(step(recomputing), step(plain), rtol=0, atol=0)
    assert health(routers(recomputing)) == health(routers(plain))
    for ours, theirs in zip(routers(recomputing), routers(plain), strict=True):
        assert torch.equal(ours.bias_sum_E, theirs.bias_sum_E)
        assert ours.num_estimates == theirs.num_estimates
        assert ours.replay_NK is None and not ours._forward_hooks
    tokens_BT = random_batch(2).tokens_BT
    with torch.no_grad():
        assert torch.equal(recomputing.eval()(tokens_BT), plain.eval()(tokens_BT))
    assert list(recomputing.state_dict()) == list(plain.state_dict())


def test_the_backward_pass_takes_the_way_of_the_forward_pass():
    """Weights moved in between would route anew; the recomputed pass keeps its experts."""
    model = build(SPECS[1], seed=0).train()
    recompute_blocks(model)
    loss, _ = next_token_loss(model, random_batch(4))
    seen = []
    for router in routers(model):
        router._choose = lambda probs, r=router: (seen.append(r.replay_NK)
                                                  or type(r)._choose(r, probs))
    loss.backward()
    assert len(seen) == 2 and all(experts is not None for experts in seen)


def test_less_is_kept_for_the_backward_pass():
    kept = []
    for recompute in (False, True):
        model = build(SPECS[1], seed=0).train()
        if recompute:
            recompute_blocks(model)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            next_token_loss(model, random_batch(8))
        kept.append(sum(sizes))
    assert kept[1] < 0.6 * kept[0]
