"""torch.compile takes a model, or each of its blocks, as one graph and changes only its speed."""
from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from fira.loss.head import head_loss
from fira.model.router import end_step, health, routers, set_loss_share, set_progress
from tests.models import build, tiny_spec

WIDE = dict(d_model=32, n_head=4, num_layers=1)
SPECS = [tiny_spec("fira", **WIDE), tiny_spec("fira2", **WIDE, n_kv_head=2),
         # so many experts and rows that eager mode multiplies in MKL's batches
         tiny_spec("fira2", **WIDE, num_experts=16, context=300, balance="handover")]
COMPILED = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)


def loss_of_model(model, wrap, tokens_BT):
    return F.cross_entropy(wrap(model)(tokens_BT).flatten(0, 1), tokens_BT.flatten())


def loss_of_blocks(model, wrap, tokens_BT):
    x_BTD = model.norm(model.through(map(wrap, model.blocks), model.embed(tokens_BT)))
    return head_loss(x_BTD, *model.head_weights(), tokens_BT)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("compute_loss", [loss_of_model, loss_of_blocks])
def test_compiled_training_equals_plain_in_loss_gradients_and_counts(spec, compute_loss):
    tokens_BT = torch.randint(31, (2, spec.context), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    results, loads = [], []
    for wrap in (lambda module: module, COMPILED):
        model = build(spec, seed=0, std=0.2).train()
        loss = compute_loss(model, wrap, tokens_BT)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        loads.append(health(routers(model))["load"])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    assert loads[0] == loads[1]


def test_all_blocks_are_one_graph_and_changing_balance_makes_no_new_one():
    spec = SPECS[-1].model_copy(update={"num_layers": 3})
    model = build(spec, seed=0, std=0.2).train()
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    model.blocks = torch.nn.ModuleList(
        torch.compile(block, backend=graphs, fullgraph=True) for block in model.blocks)
    tokens_BT = torch.ones(2, 300, dtype=torch.long)
    for fraction in (0.0, 0.8, 0.9):
        set_progress(model, fraction)
        set_loss_share(model, 1 - fraction / 2)
        loss_of_blocks(model, lambda block: block, tokens_BT).backward()
        end_step(model)
    assert graphs.frame_count == 1
