"""Runs and adapters stop on one layout and continue on another as if nothing had happened."""
import json
import shutil
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fira.checkpoint import ADAPTER, OPTIMIZER, Checkpoints, read_weights, restore
from fira.files import find_damage
from fira.loss.head import next_token_loss
from fira.model import build, build_meta
from fira.model.files import WEIGHTS, save_weights
from fira.model.initialize import initialize
from fira.parallel.layout import Layout
from fira.runlog import read_rows
from fira.stages.pretrain import pretrain
from fira.train.loop import Loop, Stopped
from fira.train.optim import OptimConfig, make_optimizer, update
from tests.parallel.ranks import mesh_of, on_ranks
from tests.parallel.test_parity import SPECS, adapt, batch, cut

SETTINGS = ["optim.lr=2e-3", "train.micro_batch=1", "train.sequence_length=16", "train.steps=15",
            "train.batch_tokens=128", "model.num_layers=4", "train.validation_tokens=600",
            "optim.average=0.8"]
LAYOUTS = {"data2": ["parallel.data=2"], "shard2": ["parallel.shard=2", "optim.rule=muon"],
           "expert2": ["parallel.expert=2"], "pipeline2": ["parallel.pipeline=2"],
           "expert2-pipeline2": ["parallel.expert=2", "parallel.pipeline=2"]}


def run_on(rank, preset, data, run, settings=(), resume=True):
    pretrain(str(preset), [f"data.folder={data}", *SETTINGS, *settings], run, "cpu", resume,
             Console(quiet=True))


def stop_on(rank, *arguments):
    """Continue a run; only rank 1 gets SIGTERM, in step 13. The step that is newest then."""
    step = Loop._step

    def hear(loop, line):
        if loop.state.step == 12 and rank == 1:
            loop.stop_signal = signal.SIGTERM
        step(loop, line)

    Loop._step = hear
    with pytest.raises(Stopped, match="SIGTERM"):
        run_on(rank, *arguments)
    return Checkpoints(arguments[2], arguments[2]).steps()[-1].name


def assert_close_runs(run, other):
    for kind, keys in (("step", ("loss", "grad_norm", "imbalance", "tokens")),
                       ("validation", ("bits_per_byte", "loss"))):
        ours, theirs = ({row["step"]: row for row in read_rows(one) if row["kind"] == kind}
                        for one in (run, other))
        assert ours.keys() == theirs.keys()
        for step in ours:
            for key in keys:
                rel = 1e-4 if key == "grad_norm" else 1e-5
                assert ours[step][key] == pytest.approx(theirs[step][key], rel=rel), (step, key)
    for name in (f"step-000015/{WEIGHTS}", f"step-000015/{OPTIMIZER}", f"average/{WEIGHTS}"):
        ours, theirs = (load_file(one / name) for one in (run, other))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def undisturbed(preset, data_folder, tmp_path_factory):
    """rule -> the run of one process."""
    made = {rule: tmp_path_factory.mktemp(rule) / "run" for rule in ("adamw", "muon")}
    for rule, run in made.items():
        run_on(0, preset, data_folder, run, [f"optim.rule={rule}"], resume=False)
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_moves_to_another_layout_and_back(layout, preset, data_folder, undisturbed, tmp_path):
    """One process saves step 10, the layout continues and is stopped, one process ends it."""
    settings, run = LAYOUTS[layout], tmp_path / "run"
    expected = undisturbed["muon" if "optim.rule=muon" in settings else "adamw"]
    shutil.copytree(expected, run)
    shutil.rmtree(run / "step-000015")
    names = on_ranks(2 ** len(layout.split("-")), stop_on, preset, data_folder, run, settings,
                     join=False)
    assert set(names) == {"step-000013"} and find_damage(run / "step-000013") is None
    run_on(0, preset, data_folder, run)
    assert_close_runs(run, expected)


def make(rank, sizes):
    layout = Layout(mesh_of(rank, sizes), adapt(build_meta(SPECS["fira2"])), seed=1)
    initialize(layout.model, 1, layout.slices(layout.model.named_parameters()))  # frozen ones too
    return layout, make_optimizer(layout.model, OptimConfig(lr=1e-2))


def train(layout, optimizer, steps):
    losses = []
    for step in steps:
        loss, _ = layout.forward_backward(cut(batch(step), layout.rows(8)), next_token_loss)
        update(optimizer, loss, layout.gradient_norm())
        layout.end_step()
        losses.append(loss)
    return losses


def tune(rank, base, run, layouts):
    """Per layout: two steps of an adapter, a save, two more steps, these again from the save."""
    results = []
    for sizes in layouts:
        folder = run / "-".join(["run", *sizes])
        layout, optimizer = make(rank, sizes)
        read_weights(base, layout)
        checkpoints = Checkpoints(folder, base, layout.mesh, base=base)
        losses = train(layout, optimizer, range(2))
        checkpoints.save(2, layout, optimizer, {"step": 2})
        checkpoints.wait()
        layout.mesh.agree(0.0)
        losses += train(layout, optimizer, range(2, 4))
        again = make(rank, sizes)
        assert restore(folder / "step-000002", *again) == {"step": 2}
        results.append((losses, train(*again, range(2, 4))))
    return results


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    save_weights(build(SPECS["fira2"], seed=4), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def tuned(base, tmp_path):
    (losses, again), = tune(0, base, tmp_path, [{}])
    assert losses[2:] == again
    return tmp_path / "run" / "step-000002", losses


def test_an_adapter_is_saved_without_its_base_and_resumes_on_any_layout(base, tuned, tmp_path):
    folder, losses = tuned
    saved, whole = load_file(folder / ADAPTER), load_file(base / WEIGHTS)
    assert not (folder / WEIGHTS).exists() and find_damage(folder) is None
    trained = {name for name in saved if name.endswith((".a", ".b", ".delta", "moe_norm.weight"))}
    assert trained and set(saved) - trained == {
        "token_embedding.lora.tokens", *(name for name in whole if "load_share" in name)}
    assert {key.rpartition("/")[0] for key in load_file(folder / OPTIMIZER)} == trained
    layouts = [{"expert": 2}, {"shard": 2}, {"pipeline": 2}]
    for rank in on_ranks(2, tune, base, tmp_path, layouts):
        for found, again in rank:
            assert found == pytest.approx(losses, rel=1e-5)
            assert again == pytest.approx(losses[2:], rel=1e-5)
    for axis in ("expert", "shard", "pipeline"):
        assert load_file(tmp_path / f"run-{axis}/step-000002" / ADAPTER).keys() == saved.keys()


def refused(rank, folder, sizes):
    with pytest.raises(ValueError) as error:
        read_weights(folder, make(rank, sizes)[0])
    return str(error.value)


def test_a_base_that_changed_or_is_gone_is_one_line(base, tuned):
    folder, _ = tuned
    expected = json.loads((folder / "config.json").read_text())["base"]["sha256"][:12]
    save_weights(build(SPECS["fira2"], seed=5), base)
    lines = [refused(0, folder, {}), *on_ranks(2, refused, folder, {"data": 2})]
    (base / WEIGHTS).unlink()
    lines.append(refused(0, folder, {}))
    for line in lines:
        assert f"was trained on {expected}; put those weights back" in line and "\n" not in line
    assert "has checksum no file" in lines[-1]
    with pytest.raises(ValueError, match="holds no model.safetensors"):
        Checkpoints(folder.parent, base, base=base)


def test_a_missing_tensor_is_not_passed_over(base):
    whole = load_file(base / WEIGHTS)
    save_file({name: whole[name] for name in whole if name != "norm.weight"}, base / WEIGHTS)
    with pytest.raises(AssertionError, match="norm.weight"):
        read_weights(base, make(0, {})[0])
