"""A GPU computes what a CPU does, eager and compiled: fp32 closely, bfloat16 to its precision."""
from __future__ import annotations

import contextlib

import pytest
import torch

from fira.loss.head import head_loss
from fira.model.router import Watch, health, replay, routers
from fira.model.spec import FIRA2Spec, FIRASpec
from fira.parallel.pipeline import autocast
from tests.models import build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPE = dict(vocab_size=96, d_model=64, num_layers=2, d_ff=48, context=64)
HEADS = dict(n_head=4, n_kv_head=2, head_dim=16)
SPECS = {
    "FIRA": FIRASpec(**SHAPE, n_head=4, num_experts=4, top_k=1, dropout=0.0),
    "FIRA2": FIRA2Spec(**SHAPE, **HEADS, num_experts=16, top_k=4),
    "dense": FIRA2Spec(**SHAPE, **HEADS, num_experts=1, top_k=1),
}


def train_once(spec, device, compiled=False, bf16=False, choices=None):
    """One pass from the same weights: loss and gradients, routing, and every layer's choices.

    With `choices`, every layer takes those: bfloat16 would decide a close race differently.
    """
    torch._dynamo.reset()
    device = torch.device(device)
    model = build(spec, seed=0, std=0.1).to(device).train()
    blocks = [torch.compile(block, fullgraph=True) if compiled else block
              for block in model.blocks]
    ids_BT = torch.randint(96, (4, 65), generator=torch.Generator().manual_seed(0)).to(device)
    with contextlib.ExitStack() as stack:
        watch = None if compiled else stack.enter_context(Watch(model))
        if choices:
            stack.enter_context(replay(model, [one.to(device) for one in choices]))
        if bf16:
            stack.enter_context(autocast())
        x_BTD = model.norm(model.through(blocks, model.embed(ids_BT[:, :-1])))
        loss = head_loss(x_BTD, *model.head_weights(), ids_BT[:, 1:].contiguous())
        loss.backward()
    values = [loss.detach().cpu(), *(p.grad.float().cpu() for p in model.parameters())]
    return values, health(routers(model)), watch.experts if watch else None


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", SPECS)
def test_fp32_on_a_gpu_equals_a_cpu_in_loss_gradients_and_loads(name, compiled):
    (ours, health, _), (theirs, cpu_health, _) = (
        train_once(SPECS[name], "cuda", compiled), train_once(SPECS[name], "cpu"))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert (health and health["load"]) == (cpu_health and cpu_health["load"])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", SPECS)
def test_bfloat16_on_a_gpu_is_within_its_precision_of_a_cpu(name, compiled):
    theirs, _, choices = train_once(SPECS[name], "cpu")
    ours, _, _ = train_once(SPECS[name], "cuda", compiled, bf16=True, choices=choices)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= 0.03 * other.norm()
