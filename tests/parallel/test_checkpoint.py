"""Step folders of adapters: the trained tensors, and the checksum of the weights under them."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fira.checkpoint import ADAPTER, OPTIMIZER, Checkpoints, read_weights, restore
from fira.files import find_damage
from fira.loss.head import next_token_loss
from fira.model.files import WEIGHTS, build, build_meta, save_weights
from fira.parallel.layout import Layout
from fira.parallel.mesh import AXES, Mesh, make_mesh
from fira.train.optim import OptimConfig, make_optimizer, update
from tests.parallel.ranks import on_ranks
from tests.parallel.test_parity import SPECS, adapt, batch, cut


def make(rank, sizes):
    mesh = make_mesh(dict.fromkeys(AXES, 1) | sizes, rank, torch.device("cpu")) if sizes else Mesh()
    layout = Layout(mesh, adapt(build_meta(SPECS["fira2"])), seed=1)
    return layout, make_optimizer(layout.model, OptimConfig(lr=1e-2))


def train(layout, optimizer, steps):
    losses = []
    for step in steps:
        loss, _ = layout.forward_backward(cut(batch(step), layout.rows(8)), next_token_loss)
        update(optimizer, loss, layout.gradient_norm())
        layout.end_step()
        losses.append(loss)
    return losses


def tune(rank, base, run, sizes):
    """Two steps from the base's weights, a save, two more; their losses."""
    layout, optimizer = make(rank, sizes)
    read_weights(base, layout)
    checkpoints = Checkpoints(run, base, layout.mesh, base=base)
    losses = train(layout, optimizer, range(2))
    checkpoints.save(2, layout, optimizer, {"step": 2})
    checkpoints.wait()
    return losses + train(layout, optimizer, range(2, 4))


def resume(rank, folder, sizes):
    layout, optimizer = make(rank, sizes)
    assert restore(folder, layout, optimizer) == {"step": 2}
    return train(layout, optimizer, range(2, 4))


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    save_weights(build(SPECS["fira2"], seed=4), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def tuned(base, tmp_path):
    losses = tune(0, base, tmp_path / "run", {})
    return tmp_path / "run" / "step-000002", losses


def test_an_adapter_is_saved_without_its_base(base, tuned):
    folder, _ = tuned
    saved, whole = load_file(folder / ADAPTER), load_file(base / WEIGHTS)
    assert not (folder / WEIGHTS).exists() and find_damage(folder) is None
    trained = {name for name in saved if "lora" in name or "moe_norm" in name}
    assert trained and set(saved) - trained == {name for name in whole if "load_share" in name}
    state = {key.rpartition("/")[0] for key in load_file(folder / OPTIMIZER)}
    assert state == trained


@pytest.mark.parametrize("sizes", [{"expert": 2}, {"shard": 2}, {"pipeline": 2}])
def test_an_adapter_resumes_on_any_layout(sizes, base, tuned, tmp_path):
    folder, losses = tuned
    assert resume(0, folder, {}) == losses[2:]
    for found in on_ranks(2, tune, base, tmp_path / "other", sizes):
        assert found == pytest.approx(losses, rel=1e-5)
    for found in on_ranks(2, resume, tmp_path / "other" / "step-000002", sizes):
        assert found == pytest.approx(losses[2:], rel=1e-5)
    ours, theirs = (load_file(one / ADAPTER) for one in (tmp_path / "other/step-000002", folder))
    assert ours.keys() == theirs.keys()


def refused(rank, folder, sizes):
    layout, _ = make(rank, sizes)
    with pytest.raises(ValueError) as error:
        read_weights(folder, layout)
    return str(error.value)


@pytest.mark.parametrize("sizes", [{}, {"data": 2}])
def test_a_base_that_changed_or_is_gone_is_one_line(sizes, base, tuned):
    folder, _ = tuned
    expected = json.loads((folder / "config.json").read_text())["base"]["sha256"][:12]
    save_weights(build(SPECS["fira2"], seed=5), base)
    changed = on_ranks(2, refused, folder, sizes) if sizes else [refused(0, folder, sizes)]
    (base / WEIGHTS).unlink()
    gone = refused(0, folder, {})
    for line in (*changed, gone):
        assert f"was trained on {expected}; put those weights back" in line and "\n" not in line
    assert "has checksum no file" in gone
    with pytest.raises(ValueError, match="holds no model.safetensors"):
        Checkpoints(folder.parent, base, base=base)


def test_a_missing_tensor_is_not_passed_over(base):
    layout, _ = make(0, {})
    whole = load_file(base / WEIGHTS)
    save_file({name: whole[name] for name in whole if name != "norm.weight"}, base / WEIGHTS)
    with pytest.raises(AssertionError, match="norm.weight"):
        read_weights(base, layout)
