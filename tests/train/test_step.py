"""One optimizer step: accumulation over weighted micro-batches, clipping, skipping, rates, and a
warning when routing collapses."""
import math

import pytest
import torch

from fira.data.batches import Batch, PackedBatch
from fira.loss.head import next_token_loss
from fira.model import build, build_meta
from fira.model.spec import FIRA2Spec, FIRASpec
from fira.parallel.layout import Layout
from fira.parallel.mesh import Mesh
from fira.runlog import read_rows
from fira.train import loop, optim
from fira.train.optim import OptimConfig, ScheduleConfig, make_optimizer, update
from fira.train.validate import validate

SPECS = [
    FIRASpec(vocab_size=40, d_model=16, n_head=2, num_layers=2, d_ff=24, num_experts=3, top_k=2,
             context=8, dropout=0.0),
    FIRA2Spec(vocab_size=40, d_model=16, n_head=2, n_kv_head=1, head_dim=8, num_layers=2, d_ff=24,
              num_experts=3, top_k=2, context=8),
]


def random_batch(rows, seed=0):
    ids = torch.randint(0, 40, (rows, 9), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def cut(batch, size):
    return [Batch(*(part[i:i + size] for part in batch)) for i in range(0, len(batch[0]), size)]


def masked(batch, scored):
    """The batch with only the first scored[row] targets of each row scored."""
    targets_BT = batch.targets_BT.clone()
    for row, count in enumerate(scored):
        targets_BT[row, count:] = -100
    return Batch(batch.tokens_BT, targets_BT)


def layout_of(spec, seed=3):
    layout = Layout(Mesh(), build_meta(spec), seed=seed)
    layout.model.train()
    return layout


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("scored", [(8, 8, 8, 8), (1, 8, 3, 0), (0, 0, 8, 8), (2, 0, 0, 0)])
@pytest.mark.parametrize("spec", SPECS, ids=["fira", "fira2"])
def test_targets_weigh_the_same_however_the_batch_is_cut(spec, scored):
    batch, results = masked(random_batch(4), scored), []
    for size in (4, 2, 1):
        layout = layout_of(spec)
        loss, _ = layout.forward_backward(cut(batch, size), next_token_loss)
        results.append((loss, flat_gradient(layout.model)))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, results[0][1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=["fira", "fira2"])
def test_documents_in_one_row_train_and_validate_as_rows_of_their_own(spec):
    whole, sizes, results = random_batch(2), (5, 1, 2), []
    packed = PackedBatch(*whole, torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1]] * 2))
    apart = [Batch(*parts) for parts in zip(*(field.split(sizes, 1) for field in whole),
                                            strict=True)]
    for batches in ([packed], apart, [whole]):
        layout = layout_of(spec.model_copy(update={"balance": "none"}))
        loss, _ = layout.forward_backward(batches, next_token_loss)
        found = validate(layout, batches, torch.ones(40, dtype=torch.long))
        results.append((torch.tensor([loss, found["loss"]]), flat_gradient(layout.model)))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    assert (results[0][1] - results[2][1]).abs().max() > 1e-4


def test_a_batch_in_which_nothing_is_scored_is_skipped():
    layout = layout_of(SPECS[1])
    optimizer = make_optimizer(layout.model, OptimConfig())
    loss, _ = layout.forward_backward(cut(masked(random_batch(2), (0, 0)), 1), next_token_loss)
    assert math.isnan(loss) and not update(optimizer, loss, layout.gradient_norm())
    assert not optimizer.state


def test_clipping_bounds_the_gradient():
    layout = layout_of(SPECS[1])
    optimizer = torch.optim.SGD(layout.model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten() for p in layout.model.parameters()])
    loss, _ = layout.forward_backward(cut(random_batch(8), 2), next_token_loss)
    norm = layout.gradient_norm()
    assert update(optimizer, loss, norm, max_norm=0.01) and norm > 0.01
    after = torch.cat([p.detach().flatten() for p in layout.model.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_gradient_changes_nothing(poison):
    layout = layout_of(SPECS[1])
    optimizer = make_optimizer(layout.model, OptimConfig())
    before = [p.detach().clone() for p in layout.model.parameters()]
    loss, _ = layout.forward_backward(cut(random_batch(4), 2), next_token_loss)
    next(iter(layout.model.parameters())).grad[0, 0] = poison
    assert not update(optimizer, loss, layout.gradient_norm()) and not optimizer.state
    assert all(torch.equal(p, q) for p, q in zip(layout.model.parameters(), before, strict=True))


@pytest.mark.parametrize("spec", SPECS, ids=["fira", "fira2"])
def test_every_parameter_has_one_group_with_its_rate_and_only_matrices_decay(spec):
    model, config = build(spec, seed=0), OptimConfig(lr=0.1, router_lr=0.5, embedding_lr=0.3)
    groups = {g["kind"]: g for g in optim.parameter_groups(model, config)}
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    members = {kind: {names[id(p)] for p in g["params"]} for kind, g in groups.items()}
    for kind, rate in {"matrix": 0.1, "vector": 0.1, "router": 0.5, "embedding": 0.3}.items():
        assert groups[kind]["peak_lr"] == rate
        assert (groups[kind]["weight_decay"] > 0) == (kind in ("matrix", "embedding"))
    assert members["embedding"] == {name for name in names.values()
                                    if name.endswith("embedding.weight")}
    assert any("experts" in name for name in members["matrix"])
    assert not any("bias" in name or "norm" in name or "router" in name
                   for name in members["matrix"])


def test_frozen_parameters_are_in_no_group_and_a_frozen_model_is_refused():
    model = build(SPECS[1], seed=0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" in name)
    grouped = [p for g in optim.parameter_groups(model, OptimConfig()) for p in g["params"]]
    assert len(grouped) == sum(p.requires_grad for p in model.parameters())
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        make_optimizer(model, OptimConfig())


def test_cosine_warms_up_peaks_and_ends_at_its_floor():
    config = ScheduleConfig(kind="cosine", warmup=0.1, floor=0.2)
    values = [optim.rate_factor(config, i / 1000) for i in range(1001)]
    assert 0 < values[0] < 0.02 and max(values) == pytest.approx(1.0)
    assert values[100] == pytest.approx(1.0) and values[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(values[100:], values[101:], strict=False))


def test_constant_holds_then_decays():
    config = ScheduleConfig(kind="constant", warmup=0.0, decay=0.25, floor=0.0)
    assert optim.rate_factor(config, 0.0) == optim.rate_factor(config, 0.75) == 1.0
    assert optim.rate_factor(config, 0.875) == pytest.approx(0.5)
    assert optim.rate_factor(config, 1.0) == 0.0


def health(*counts):
    load = torch.tensor(counts, dtype=torch.float64)
    relative = load / load.mean(1, keepdim=True)
    return {"load": (load / load.sum(1, keepdim=True)).tolist(),
            "cv": relative.std(1, correction=0).tolist(), "dead": (load == 0).sum(1).tolist()}


@pytest.mark.parametrize("counts, top_k, layers", [
    ([[9, 8, 7, 8], [30, 20, 10, 4]], 1, None),
    ([[9, 8, 7, 8], [100, 1, 1, 1]], 1, "layers 1 "),
    ([[0, 10, 10, 10], [10, 10, 10, 10]], 1, None),
    ([[0, 0, 10, 10], [10, 0, 0, 0]], 1, "layers 0, 1 "),
    ([[5, 5, 5]], 3, None),
])
def test_dead_experts_and_near_total_imbalance_are_collapse(counts, top_k, layers):
    text = loop.describe_collapse(health(*counts), top_k)
    assert text is None if layers is None else layers in text


def test_a_run_warns_once_in_the_log_and_on_the_screen(fira, preset, data_folder, tmp_path,
                                                       monkeypatch):
    monkeypatch.setattr(loop, "COLLAPSE_STEPS", 3)
    monkeypatch.setattr(loop, "describe_collapse", lambda health, top_k: "layers 0 are bad")
    answer = fira("train", preset, f"data.folder={data_folder}", "train.steps=6", "--run",
                  tmp_path / "run", "--device", "cpu")
    events = [row for row in read_rows(tmp_path / "run") if row["kind"] == "event"]
    assert [row["step"] for row in events] == [3]
    assert "collapsed for 3 steps" in events[0]["text"]
    assert answer.err.count("layers 0 are bad") == 1
