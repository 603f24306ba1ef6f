"""torch.compile takes a model, or each of its blocks, as one graph and changes only its speed."""
from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from fira.loss.head import head_loss
from fira.model import build
from fira.model.balance import end_step, routing_health, set_loss_share, set_progress
from fira.model.spec import FIRA2Spec, FIRASpec

TINY = dict(vocab_size=31, d_model=32, n_head=4, num_layers=1, d_ff=24, num_experts=4, top_k=2,
            context=12)

MANY = {"num_experts": 16, "context": 300}  # where eager mode multiplies in MKL's batches
SPECS = [FIRASpec(**TINY, dropout=0.0), FIRA2Spec(**TINY, n_kv_head=2, head_dim=8),
         FIRA2Spec(**TINY | MANY, n_kv_head=2, head_dim=8, balance="handover")]
COMPILED = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)


def build_wide(spec):
    with mock.patch("fira.model.initialize.STD", 0.2):
        return build(spec, seed=0).train()


@pytest.mark.parametrize("spec", SPECS)
def test_compiled_training_equals_plain_in_values_gradients_and_counts(spec):
    tokens_BT = torch.randint(31, (2, spec.context), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    results = []
    for wrap in (lambda model: model, lambda model: COMPILED(model)):
        model = build_wide(spec)
        logits_BTV = wrap(model)(tokens_BT)
        F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten()).backward()
        results.append((logits_BTV, [p.grad for p in model.parameters()], routing_health(model)))
    (plain, plain_grads, plain_health), (compiled, grads, health) = results
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert health["load"] == plain_health["load"]


def loss_with_blocks(model, blocks, tokens_BT):
    x_BTD = model.norm(model.through(blocks, model.embed(tokens_BT)))
    return head_loss(x_BTD, *model.head_weights(), tokens_BT)


@pytest.mark.parametrize("spec", SPECS)
def test_compiled_blocks_give_the_head_loss_of_plain_ones(spec):
    tokens_BT = torch.randint(31, (2, spec.context), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    results = []
    for wrap in (lambda block: block, COMPILED):
        model = build_wide(spec)
        loss = loss_with_blocks(model, [wrap(block) for block in model.blocks], tokens_BT)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_all_blocks_are_one_graph_and_changing_balance_makes_no_new_one():
    model = build_wide(FIRA2Spec(**TINY | MANY | {"num_layers": 3}, n_kv_head=2, head_dim=8,
                                 balance="handover"))
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    blocks = [torch.compile(block, backend=graphs, fullgraph=True) for block in model.blocks]
    tokens_BT = torch.ones(2, 300, dtype=torch.long)
    for fraction in (0.0, 0.8, 0.9):
        set_progress(model, fraction)
        set_loss_share(model, 1 - fraction / 2)
        loss_with_blocks(model, blocks, tokens_BT).backward()
        end_step(model)
    assert graphs.frame_count == 1
