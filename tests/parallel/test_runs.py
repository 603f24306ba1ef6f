"""Whole runs on many ranks: they equal one process's, and continue on any other layout."""
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fira.checkpoint import Checkpoints
from fira.config import ConfigError
from fira.files import find_damage
from fira.model.spec import FIRA2Spec
from fira.parallel.mesh import ParallelConfig, check_fit, resolve_sizes
from fira.runlog import read_rows
from fira.stages.pretrain import pretrain
from tests.parallel.ranks import on_ranks

QUIET = Console(quiet=True)
SETTINGS = ["optim.lr=2e-3", "train.micro_batch=1", "train.sequence_length=16",
            "train.batch_tokens=128", "model.num_layers=4", "train.validation_tokens=600"]
LAYOUTS = {"data2": ["parallel.data=2"], "shard2": ["parallel.shard=2", "optim.rule=muon"],
           "expert2": ["parallel.expert=2"], "pipeline2": ["parallel.pipeline=2"],
           "expert2-pipeline2": ["parallel.expert=2", "parallel.pipeline=2"]}


def run_one(rank, preset, data, run, settings, resume):
    pretrain(str(preset), [f"data.folder={data}", *SETTINGS, *settings], run, "cpu", resume, QUIET)


def run_on(world, preset, data, run, *settings, resume=False):
    if world == 1:
        run_one(0, preset, data, run, settings, resume)
    else:
        on_ranks(world, run_one, preset, data, run, settings, resume, join=False)


def rows_of(run, kind):
    return {row["step"]: row for row in read_rows(run) if row["kind"] == kind}


def last_step(run):
    return Checkpoints(run, run).steps()[-1]


def assert_close_runs(run, other):
    for kind, keys in (("step", ("loss", "grad_norm", "imbalance", "tokens")),
                       ("validation", ("bits_per_byte", "loss"))):
        ours, theirs = rows_of(run, kind), rows_of(other, kind)
        assert ours.keys() == theirs.keys()
        for step in ours:
            for key in keys:
                rel = 1e-4 if key == "grad_norm" else 1e-5
                assert ours[step][key] == pytest.approx(theirs[step][key], rel=rel), (step, key)
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(last_step(each) / name) for each in (run, other))
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-4, rtol=1e-3, msg=key)


@pytest.fixture(scope="module")
def undisturbed(preset, data_folder, tmp_path_factory):
    """rule -> the run of one process."""
    made = {}
    for rule in ("adamw", "muon"):
        made[rule] = tmp_path_factory.mktemp(rule) / "run"
        run_on(1, preset, data_folder, made[rule], "train.steps=10", f"optim.rule={rule}")
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_work_moves_between_layouts(layout, preset, data_folder, undisturbed, tmp_path):
    """Alone, then on the layout; on the layout, then alone: both are the undisturbed run."""
    settings, world = LAYOUTS[layout], 4 if "-" in layout else 2
    expected = undisturbed["muon" if "optim.rule=muon" in settings else "adamw"]
    there, back = tmp_path / "there", tmp_path / "back"
    shutil.copytree(expected, there)
    shutil.rmtree(there / "step-000010")
    run_on(world, preset, data_folder, there, *settings, resume=True)
    assert_close_runs(there, expected)
    assert find_damage(last_step(there)) is None
    run_on(world, preset, data_folder, back, *settings, "train.steps=10")
    assert_close_runs(back, expected)
    shutil.rmtree(back / "step-000010")
    run_on(1, preset, data_folder, back, resume=True)
    assert_close_runs(back, expected)


@pytest.mark.parametrize("sizes,rows,words", [
    ({"expert": 4}, 16, "parallel.expert=4 must divide model.num_experts=6; try parallel.expert=3"),
    ({"pipeline": 4}, 16, "parallel.pipeline=4 is more than model.num_layers=3; try "),
    ({"shard": 2, "pipeline": 2}, 16, "shard=2 cannot be combined with parallel.pipeline=2"),
    ({"data": 4}, 12, "train.batch_tokens=192 are 12 sequences.*try train.batch_tokens=256"),
    ({"data": 3}, 12, "parallel pipeline=1 x data=3 x expert=1 x shard=1 needs 3 ranks, but 4"),
])
def test_what_does_not_fit_is_one_line(sizes, rows, words):
    spec = FIRA2Spec(d_model=16, n_head=2, n_kv_head=1, num_layers=3, num_experts=6)
    with pytest.raises(ConfigError, match=words) as refused:
        check_fit(resolve_sizes(ParallelConfig(**sizes), 4), spec, rows, 2, 16)
    assert "\n" not in str(refused.value)
