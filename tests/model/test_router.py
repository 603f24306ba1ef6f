"""What routers choose can be watched and replayed, also in recomputed activations."""
from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fira.model import build
from fira.model.router import Watch, health, replay, routers, set_loss_share, set_progress
from tests.models import NAMES, tiny_spec

SPECS = {name: tiny_spec(name) for name in NAMES}
SPECS["fira2"] = tiny_spec("fira2", balance="handover")
TOKENS = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SPECS)
def test_a_replayed_pass_equals_the_watched_one_in_values_and_gradients(name):
    model = build(SPECS[name], seed=0).train()
    parameters = list(model.parameters())
    with Watch(model) as watch:
        logits = model(TOKENS)
    chosen = watch.experts
    assert [experts.shape for experts in chosen] == [(24, 2)] * 2
    counted = health(routers(model))
    gradients = torch.autograd.grad(logits.sum(), parameters)
    with replay(model, chosen):
        again = model(TOKENS)
        assert torch.equal(again, logits)
        torch.testing.assert_close(torch.autograd.grad(again.sum(), parameters), gradients,
                                   rtol=0, atol=0)
    assert health(routers(model)) == counted  # nothing was counted


def test_replayed_experts_get_their_own_probabilities_as_weights():
    model = build(SPECS["fira2"], seed=0).eval()
    router = routers(model)[0]
    x_ND = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    experts_NK = (router(x_ND)[1] + 1) % 4
    with replay(router, [experts_NK]):
        weights_NK, replayed_NK = router(x_ND)
    assert torch.equal(replayed_NK, experts_NK)
    gates_NK = (x_ND @ router.weight.T).softmax(-1).gather(1, experts_NK)
    torch.testing.assert_close(weights_NK, gates_NK / gates_NK.sum(1, keepdim=True))


def test_watches_and_replays_nest_and_leave_no_trace():
    model = build(SPECS["fira2"], seed=0).eval()
    plain = model(TOKENS)
    with Watch(model) as outer:
        model(TOKENS)
        first = list(outer.experts)
        shifted = [(experts + 1) % 4 for experts in first]
        with replay(model, first), Watch(model.blocks[1]) as inner:
            with replay(model, shifted):
                assert not torch.equal(model(TOKENS), plain)
                assert torch.equal(inner.experts[0], shifted[1])
            assert torch.equal(model(TOKENS), plain)
        assert all(map(torch.equal, outer.experts, first))
        model(TOKENS[:1])
        assert len(outer.experts[0]) == 12 and len(inner.experts[0]) == 24  # inner is closed
    assert all(router.replay_NK is None and not router._forward_hooks for router in routers(model))


@pytest.mark.parametrize("name", SPECS)
def test_recomputed_blocks_replay_choices_and_keep_the_loss_share_of_their_forward(name):
    """Between forward and backward the router and the share change, as in a pipeline."""
    def contexts(block):
        watch = Watch(block)
        return watch, replay(block, watch.experts)

    gradients = []
    for recompute in (False, True):
        model = build(SPECS[name], seed=0).train()
        set_progress(model, 0.9)
        set_loss_share(model, 0.25)
        if recompute:
            for block in model.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False,
                                        context_fn=partial(contexts, block))
        loss = model(TOKENS).square().mean()
        set_loss_share(model, 1.0)
        for router in routers(model):
            if router.selection_bias_E is not None:
                router.selection_bias_E.copy_(torch.tensor([9.0, 0, 0, -9]))
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        assert routers(model)[0].load_count_E.sum() == TOKENS.numel() * 2  # counted once
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_threshold_divides_chosen_experts_from_others(top_k):
    router = routers(build(SPECS["fira2"].model_copy(update={"top_k": top_k}), seed=0))[0]
    scores_NE = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    experts_NK, threshold_N = router._choose(scores_NE)
    assert ((scores_NE > threshold_N.unsqueeze(1)).sum(1) == top_k).all()
    assert (scores_NE.gather(1, experts_NK) > threshold_N.unsqueeze(1)).all()
