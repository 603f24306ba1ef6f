"""A distillation on many ranks, its teacher divided as the student is, equals that on one."""
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fira.convert.quantize import export_run
from fira.stages.distill import distill
from tests.parallel.ranks import on_ranks

SETTINGS = ["train.steps=3", "train.batch_tokens=256", "train.micro_batch=2"]


def distill_on(rank, teacher, preset, data, run, settings=()):
    distill(teacher, str(preset), {"folder": str(data)}, [*SETTINGS, *settings], run, "cpu", False,
            Console(quiet=True))


@pytest.fixture(scope="module", params=["float32", "int8"])
def teacher(request, trained_run, tmp_path_factory):
    if request.param == "float32":
        return trained_run
    folder = tmp_path_factory.mktemp("teacher") / "run"
    export_run(trained_run, folder, "int8", Console(quiet=True))
    return folder


@pytest.fixture(scope="module")
def alone(teacher, preset, data_folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    distill_on(0, teacher, preset, data_folder, run)
    return load_file(run / "step-000003" / "model.safetensors")


@pytest.mark.parametrize("axis", ["data", "expert", "shard"])
def test_two_ranks_distill_as_one_does(axis, teacher, alone, preset, data_folder, tmp_path):
    on_ranks(2, distill_on, teacher, preset, data_folder, tmp_path / "run",
             [f"parallel.{axis}=2"], join=False)
    found = load_file(tmp_path / "run" / "step-000003" / "model.safetensors")
    torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-3)
