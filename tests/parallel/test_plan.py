"""The plan's numbers are those of the code: memory kept, bytes sent, parameters held."""
import pytest
import torch
import torch.distributed as dist

from fira.config import load_preset
from fira.loss.next_token import next_token_loss
from fira.model.files import build
from fira.model.spec import FIRA2Spec, FIRASpec
from fira.parallel import expert
from fira.parallel.layout import Layout
from fira.parallel.mesh import AXES, make_mesh
from fira.parallel.plan import DEVICES, Work, activations_per_token, bytes_sent, elements, memory
from fira.stages.pretrain import configure
from fira.train.optim import OptimConfig, make_optimizer
from fira.train.step import accumulate, finish_step
from tests.parallel.ranks import on_ranks
from tests.parallel.test_parity import Batch

WIDE = {"vocab_size": 1000, "d_model": 130, "n_head": 5, "num_layers": 3, "d_ff": 70,
        "num_experts": 6, "top_k": 6, "context": 32}  # all experts: loads are balanced exactly
SPECS = [FIRASpec(**WIDE), FIRASpec(**WIDE, dropout=0.0),
         FIRA2Spec(**WIDE, n_kv_head=1, head_dim=24), FIRA2Spec(**(WIDE | {"top_k": 2}),
                                                               n_kv_head=5, head_dim=24)]
IDS = torch.randint(0, 1000, (8, 33), generator=torch.Generator().manual_seed(0))
TOKENS, TARGETS = IDS[:, :-1].contiguous(), IDS[:, 1:].contiguous()


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


def measured(rank, spec, rule):
    """Per layout: bytes of weights, gradients, optimizer, kept activations; bytes sent."""
    found = []
    for sizes in ({"data": 2}, {"expert": 2}, {"shard": 2}):
        mesh = make_mesh(dict.fromkeys(AXES, 1) | sizes, rank, torch.device("cpu"))
        layout = Layout(mesh, spec, seed=0)
        model, optimizer = layout.model, make_optimizer(layout.model, OptimConfig(rule=rule))
        rows = layout.rows(8)
        cut = [Batch(TOKENS[i:i + 2], TARGETS[i:i + 2]) for i in range(rows.start, rows.stop, 2)]
        loss, count = layout.forward_backward(accumulate)(model, cut, next_token_loss)
        weights = sum(piece.rows.nbytes for piece in layout.pieces(model.named_parameters()))
        gradients = sum(getattr(p.grad, "_local_tensor", p.grad).nbytes
                        for p in model.parameters())
        finish_step(model, optimizer, loss, count, 1.0, layout.gradient_norm)
        state = sum(tensor.nbytes for each in optimizer.state.values() for tensor in each.values())
        rows_sent = sum(block.moe.dispatch.bytes_sent for block in model.blocks
                        if "expert" in sizes)
        kept = 0 if "shard" in sizes else kept_bytes(model, *cut[0])
        found.append((weights, gradients, state, kept,
                      layout.gradients.bytes_sent if layout.gradients else 0, rows_sent))
    return found


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_memory_and_bytes_sent_are_as_planned(rule):
    spec = SPECS[2]
    work = Work(spec, 8, 2, 32, rule)
    results = on_ranks(2, measured, spec, rule)
    for number, axis in enumerate(("data", "expert", "shard")):
        sizes = dict.fromkeys(AXES, 1) | {axis: 2}
        parts, sent = memory(work, sizes, "1f1b"), bytes_sent(work, sizes, "1f1b")
        for weights, gradients, state, kept, summed, rows_sent in (r[number] for r in results):
            planned = parts["gradients"]  # of as many floats as the local weights are
            assert weights == pytest.approx(planned, rel=0.1)
            assert gradients == pytest.approx(planned, rel=0.1)
            assert state == pytest.approx(parts["optimizer"], rel=0.1)
            if axis != "shard":
                half = parts["activations"] + parts["logits"] / 2  # kept; the gradient comes later
                assert kept == pytest.approx(half, rel=0.1)
                assert summed == pytest.approx(sent["gradients"], abs=64)
            assert 2 * rows_sent == sent.get("experts", 0)  # forward; the backward moves as much


@pytest.mark.parametrize("preset,total,active", [("fira2-7b", 7e9, 1e9), ("fira2-30b", 30e9, 3e9)])
def test_the_large_presets_fit_64_gpus(preset, total, active, fira):
    answer = fira("plan", preset, "--gpus", 64, "--tokens", 1e12)
    assert answer.code == 0 and "days" in answer.out and "data" in answer.out
    spec = configure(load_preset(preset), ()).model
    held = elements(spec, 0, 1, "1f1b")
    assert held.dense + held.experts >= total
    assert held.dense + held.experts * spec.top_k / spec.num_experts >= active


def test_what_cannot_be_planned_is_one_line(refused):
    assert "no layout of fira2-30b fits 1 x" in refused("plan", "fira2-30b", "--gpus", 1, code=2)
    assert "device 'h1000' is unknown" in refused("plan", "tiny", "--device", "h1000", code=2)
    assert "h100-80g" in DEVICES


@pytest.mark.parametrize("preset,sizes", [("fira2-7b", {"shard": 2, "expert": 32}),
                                          ("fira2-30b", {"shard": 8, "expert": 8})])
def test_a_rank_of_64_is_built_and_steps_without_the_whole_model(preset, sizes, monkeypatch):
    """Torch's fake process group: nothing arrives, but shapes and memory are the real ones."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    spec = configure(load_preset(preset), ["model.vocab_size=1024", "model.num_layers=2"]).model
    monkeypatch.setattr(expert, "_exchange", lambda rows, send, receive, group: rows.new_zeros(
        sum(receive), rows.shape[1]))
    dist.init_process_group("fake", rank=5, world_size=64, store=FakeStore())
    try:
        mesh = make_mesh(dict.fromkeys(AXES, 1) | sizes, 5, torch.device("cpu"))
        layout = Layout(mesh, spec, seed=0, schedule="gpipe")
        held = sum(p.rows.numel() for p in layout.pieces(layout.model.named_parameters()))
        part = elements(spec, mesh.place["pipeline"], mesh.sizes["pipeline"], "gpipe")
        assert held == pytest.approx(part.dense / mesh.sizes["shard"] + part.experts
                                     / mesh.sizes["expert"] / mesh.sizes["shard"], rel=0.01)
        assert held < 0.05 * sum(map(torch.Size.numel, map(torch.Size, layout.shapes.values())))
        optimizer = make_optimizer(layout.model, OptimConfig())
        cut = [Batch(TOKENS[i:i + 1, :8], TARGETS[i:i + 1, :8]) for i in range(2)]
        layout.forward_backward(accumulate)(layout.model, cut, next_token_loss)
        optimizer.step()
    finally:
        dist.destroy_process_group()
