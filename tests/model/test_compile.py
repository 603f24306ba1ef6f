"""torch.compile takes a model as one graph and changes nothing but speed."""
from __future__ import annotations

import functools

import pytest
import torch
from fira.train.compiled import compiled
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from fira.loss import head
from fira.loss.head import head_loss
from fira.model.files import build
from fira.model.moe import end_step, fade, routing_health
from fira.model.spec import FIRA2Spec, FIRASpec

TINY = dict(vocab_size=31, d_model=32, n_head=4, num_layers=1, d_ff=24, num_experts=4, top_k=2,
            context=12, init_std=0.2)

MANY = {"num_experts": 16, "context": 300}  # where eager mode leaves torch for NumPy and MKL
SPECS = [FIRASpec(**TINY, dropout=0.0), FIRA2Spec(**TINY, n_kv_head=2, head_dim=8),
         FIRA2Spec(**TINY | MANY, n_kv_head=2, head_dim=8, balance="handover")]
COMPILED = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("spec", SPECS)
def test_compiled_training_equals_plain_in_values_gradients_and_counts(spec):
    tokens_BT = torch.randint(31, (2, spec.context), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    results = []
    for wrap in (lambda model: model, lambda model: COMPILED(model)):
        model = build(spec, seed=0).train()
        logits_BTV = wrap(model)(tokens_BT)
        F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten()).backward()
        results.append((logits_BTV, [p.grad for p in model.parameters()], routing_health(model)))
    (plain, plain_grads, plain_health), (compiled, grads, health) = results
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert health["load"] == plain_health["load"]


@pytest.mark.parametrize("spec", SPECS)
def test_a_compiled_model_applies_the_head_loss_as_a_plain_one_does(spec):
    tokens_BT = torch.randint(31, (2, spec.context), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    results = []
    for wrap in (lambda model: model, COMPILED, functools.partial(compiled, backend="aot_eager")):
        model = build(spec, seed=0).train()
        loss = wrap(model)(tokens_BT, targets_BT=tokens_BT, loss=head_loss)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for each in results[1:]:
        torch.testing.assert_close(results[0], each, rtol=1e-4, atol=1e-6)


def test_all_blocks_are_one_graph_and_a_fading_balance_makes_no_new_one():
    model = build(FIRA2Spec(**TINY | MANY | {"num_layers": 3}, n_kv_head=2, head_dim=8,
                            balance="handover"), seed=0).train()
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    forward, tokens_BT = compiled(model, graphs), torch.ones(2, 300, dtype=torch.long)
    for fraction in (0.0, 0.8, 0.9):
        fade(model, fraction)
        forward(tokens_BT, targets_BT=tokens_BT, loss=head_loss).backward()
        end_step(model)
    assert graphs.frame_count == 2  # a block, and a block of the head's rows


def test_no_graph_of_a_compiled_model_has_more_than_one_block_of_logits(monkeypatch):
    """Inductor would put off what frees a block until it has all of them (docs/log.md)."""
    monkeypatch.setitem(head.BLOCK, "cpu", 31 * 4)  # four rows
    blocks, spec = [], SPECS[0]

    def backend(graph, _):
        nodes = [node for module in graph.modules() if isinstance(module, torch.fx.GraphModule)
                 for node in module.graph.nodes]
        blocks.append(sum("log_softmax" in str(node.target) for node in nodes))
        return graph

    model, tokens_BT = build(spec, seed=0).train(), torch.ones(2, spec.context, dtype=torch.long)
    torch._dynamo.reset()
    compiled(model, backend)(tokens_BT, targets_BT=tokens_BT, loss=head_loss).backward()
    assert sorted(blocks) == [0, 1]
