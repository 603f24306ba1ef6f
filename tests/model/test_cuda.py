"""A GPU computes what a CPU does, eager and compiled: fp32 closely, bfloat16 to its precision."""
from __future__ import annotations

import contextlib

import pytest
import torch
from fira.train.compiled import compiled

from fira.loss.head import head_loss
from fira.model.files import build
from fira.model.moe import routers, routing_health
from fira.model.spec import FIRA2Spec, FIRASpec
from fira.runtime import autocast

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPE = dict(vocab_size=96, d_model=64, num_layers=2, d_ff=48, context=64, init_std=0.1)
HEADS = dict(n_head=4, n_kv_head=2, head_dim=16)
SPECS = {
    "FIRA": FIRASpec(**SHAPE, n_head=4, num_experts=4, top_k=1, dropout=0.0),
    "FIRA2": FIRA2Spec(**SHAPE, **HEADS, num_experts=16, top_k=4),
    "twin": FIRA2Spec(**SHAPE, **HEADS, num_experts=1, top_k=1),
}


def train_once(spec, device, wrap=lambda model: model, bf16=False, replay=None):
    """One pass from the same weights: loss and gradients, routing, and every layer's choices.

    With `replay`, every layer takes those choices: bfloat16 would settle a close race otherwise.
    """
    torch._dynamo.reset()
    device, choices = torch.device(device), []
    model = build(spec, seed=0).to(device).train()
    for layer, router in enumerate(routers(model)):
        router.record = None if wrap is compiled else choices.append
        router.replay_NK = None if replay is None else replay[layer].to(device)
    ids_BT = torch.randint(96, (4, 65), generator=torch.Generator().manual_seed(0)).to(device)
    with autocast(device) if bf16 else contextlib.nullcontext():
        loss = wrap(model)(ids_BT[:, :-1], targets_BT=ids_BT[:, 1:].contiguous(), loss=head_loss)
    loss.backward()
    values = [loss.detach().cpu(), *(p.grad.float().cpu() for p in model.parameters())]
    return values, routing_health(model), choices


@pytest.mark.parametrize("wrap", [lambda model: model, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", SPECS)
def test_fp32_on_a_gpu_equals_a_cpu_in_loss_gradients_and_loads(name, wrap):
    (ours, health, _), (theirs, cpu_health, _) = (
        train_once(SPECS[name], "cuda", wrap), train_once(SPECS[name], "cpu"))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert (health and health["load"]) == (cpu_health and cpu_health["load"])


@pytest.mark.parametrize("wrap", [lambda model: model, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", SPECS)
def test_bfloat16_on_a_gpu_is_within_its_precision_of_a_cpu(name, wrap):
    theirs, _, choices = train_once(SPECS[name], "cpu")
    ours, _, _ = train_once(SPECS[name], "cuda", wrap, bf16=True, replay=choices or None)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= 0.03 * other.norm()
