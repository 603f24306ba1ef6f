"""The plan's numbers are those of the code: memory kept, bytes sent, parameters held."""
from unittest import mock

import pytest
import torch

from fira.config import load_preset
from fira.data.batches import Batch
from fira.loss.head import next_token_loss
from fira.model import build, build_meta
from fira.model.spec import FIRA2Spec, FIRASpec
from fira.parallel.layout import Layout
from fira.parallel.mesh import AXES, make_mesh
from fira.parallel.plan import (
    DEVICES,
    Work,
    activations_per_token,
    count_elements,
    memory_of,
    sent_by,
)
from fira.stages.pretrain import PRETRAIN
from fira.stages.run import configure
from fira.train.optim import OptimConfig, make_optimizer, update
from tests.parallel.ranks import on_ranks
from tests.parallel.test_parity import cut
from tests.parallel.traffic import Traffic

WIDE = {"vocab_size": 1000, "d_model": 130, "n_head": 5, "num_layers": 3, "d_ff": 70,
        "num_experts": 6, "top_k": 6, "context": 32}  # all experts: loads are balanced exactly
SPECS = [FIRASpec(**WIDE), FIRASpec(**WIDE, dropout=0.0),
         FIRA2Spec(**WIDE, n_kv_head=1, head_dim=24), FIRA2Spec(**(WIDE | {"top_k": 2}),
                                                               n_kv_head=5, head_dim=24),
         FIRA2Spec(**WIDE, n_kv_head=1, head_dim=24, tied=False)]
IDS = torch.randint(0, 1000, (16, 33), generator=torch.Generator().manual_seed(0))
TOKENS, TARGETS = IDS[:, :-1].contiguous(), IDS[:, 1:].contiguous()


@pytest.fixture(scope="module", autouse=True)
def plain_experts():
    """A plan is for any device, with the experts that any device can have."""
    with mock.patch("fira.model.fast.HAS_BATCH", False):
        yield


def kept_bytes(model, tokens, targets):
    """Bytes of what autograd keeps for a batch, parameters and buffers apart."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        next_token_loss(model, Batch(tokens, targets))
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize("spec", SPECS)
def test_a_layer_keeps_what_the_plan_says(spec):
    two, three = (kept_bytes(build(spec.model_copy(update={"num_layers": layers}), seed=0).train(),
                             TOKENS, TARGETS) for layers in (2, 3))
    assert activations_per_token(spec) * 4 * TOKENS.numel() == pytest.approx(three - two, rel=0.03)


LAYOUTS = {
    2: [{"data": 2}, {"expert": 2}, {"shard": 2}, {"pipeline": 2}],
    4: [{"data": 2, "expert": 2}, {"data": 2, "shard": 2}, {"expert": 2, "shard": 2},
        {"data": 2, "pipeline": 2}, {"expert": 2, "pipeline": 2}, {"pipeline": 4}]}


def measured(rank, spec, rule, layouts):
    """Per layout: this rank's place; bytes of weights, gradients, optimizer, kept activations; all
    bytes sent in a step."""
    found = []
    for sizes in layouts:
        mesh = make_mesh(dict.fromkeys(AXES, 1) | sizes, rank, torch.device("cpu"))
        layout = Layout(mesh, build_meta(spec), seed=0)
        model = layout.model.train()
        optimizer = make_optimizer(model, OptimConfig(rule=rule))
        batches = cut(Batch(TOKENS, TARGETS), layout.rows(16))
        for _ in range(2):  # a pipeline's first step also makes its connections
            with Traffic() as traffic:
                loss, _ = layout.forward_backward(batches, next_token_loss)
                gradients = sum(getattr(p.grad, "_local_tensor", p.grad).nbytes
                                for p in model.parameters())
                update(optimizer, loss, layout.gradient_norm())
                layout.end_step()
        weights = sum(part.rows.nbytes for part in layout.slices(model.named_parameters()))
        state = sum(tensor.nbytes for each in optimizer.state.values() for tensor in each.values())
        plain = mesh.sizes["shard"] == mesh.sizes["pipeline"] == 1
        kept = kept_bytes(model, *batches[0]) if plain else 0
        found.append((mesh.place["pipeline"], weights, gradients, state, kept,
                      sum(traffic.sent.values())))
    return found


@pytest.mark.parametrize("world,rule", [(2, "adamw"), (2, "muon"), (4, "adamw")])
def test_memory_and_bytes_sent_are_as_planned(world, rule):
    even = {"num_layers": 4, "num_experts": 4, "top_k": 4}  # all ranks hold as much
    spec = SPECS[2].model_copy(update=even)
    work, layouts = Work(spec, 16, 2, 32, rule), LAYOUTS[world]
    if rule == "muon":
        layouts = [sizes for sizes in layouts if "shard" not in sizes]  # it gathers matrices, too
    results = on_ranks(world, measured, spec, rule, layouts)
    for number, sizes in enumerate(layouts):
        grid = tuple(sizes.get(axis, 1) for axis in AXES)
        for place, weights, gradients, state, kept, sent in (r[number] for r in results):
            parts = memory_of(work, grid, place)
            assert weights == pytest.approx(parts["gradients"], rel=0.01)  # as many floats
            assert gradients == pytest.approx(parts["gradients"], rel=0.01)
            assert state == pytest.approx(parts["optimizer"], rel=0.01)
            if kept:  # of the logits the head's gradient
                planned = parts["activations"] + 4 * spec.vocab_size * spec.d_model
                assert kept == pytest.approx(planned, rel=0.03)
            planned = sum(sent_by(work, grid, place).values())
            assert sent == pytest.approx(planned, rel=1e-6), sizes


@pytest.mark.parametrize("preset,total,active", [("fira2-7b", 7e9, 1e9), ("fira2-30b", 30e9, 3e9)])
def test_the_large_presets_fit_64_gpus(preset, total, active, fira):
    answer = fira("plan", preset, "--gpus", 64, "--tokens", 1e12)
    assert answer.code == 0 and "days" in answer.out and "data" in answer.out
    spec = configure(PRETRAIN, load_preset(preset), ()).model
    found = count_elements(spec, (1, 1, 1, 1), 0)
    assert found["all"] >= total
    idle = found["experts"] * (1 - spec.top_k / spec.num_experts)
    assert found["all"] - idle >= active


def test_what_cannot_be_planned_is_one_line(refused):
    assert "no layout of fira2-30b fits 1 x" in refused("plan", "fira2-30b", "--gpus", 1, code=2)
    assert "device 'h1000' is unknown" in refused("plan", "tiny", "--device", "h1000", code=2)
    assert "h100-80g" in DEVICES
