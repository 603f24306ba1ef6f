"""A step folder with an adapter opens as the model that was trained, over its base's weights."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fira.checkpoint import Checkpoints, read_weights
from fira.convert.files import load_run
from fira.files import write_manifest
from fira.infer.load import load
from fira.model import build_meta, load_pretrained
from fira.model.files import ADAPTER, WEIGHTS, save_weights
from fira.parallel.layout import Layout
from fira.parallel.mesh import Mesh


@pytest.fixture
def adapted(tmp_path: Path, model, step_folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The step folder of a run that trained the norms only, and its model's weights."""
    layout = Layout(Mesh(), build_meta(model.spec), seed=3)
    read_weights(step_folder, layout)
    for name, parameter in layout.model.named_parameters():
        parameter.requires_grad = name.endswith("norm.weight")
        parameter.data += 0.25 * parameter.requires_grad
    optimizer = torch.optim.SGD(layout.model.parameters())
    checkpoints = Checkpoints(tmp_path / "adapted", step_folder, base=step_folder)
    folder = checkpoints.save(20, layout, optimizer, {})
    checkpoints.wait()
    return folder, layout.model.state_dict()


def test_an_adapter_is_opened_over_the_weights_of_its_base(adapted, tmp_path: Path) -> None:
    folder, weights = adapted
    assert not (folder / WEIGHTS).exists() and "head.weight" not in load_file(folder / ADAPTER)
    for loaded in (load(folder.parent, "cpu").model, load_run(folder).model,
                   load_pretrained(folder.parent)):
        found = loaded.state_dict()
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)
    save_weights(loaded, tmp_path / "whole")  # whole again: it needs no base
    assert torch.equal(load_pretrained(tmp_path / "whole").norm.weight, weights["norm.weight"])


def test_a_base_that_is_gone_or_changed_is_one_line(adapted, step_folder: Path) -> None:
    weights, whole = step_folder / WEIGHTS, load_file(step_folder / WEIGHTS)
    line = re.escape(str(weights)) + " has checksum {}, but the adapter .*; put those weights back"
    save_file({**whole, "norm.weight": whole["norm.weight"] + 1}, weights)
    with pytest.raises(ValueError, match=line.format("[0-9a-f]{12}")):
        load(adapted[0], "cpu")
    weights.unlink()
    with pytest.raises(ValueError, match=line.format("no file")):
        load(adapted[0], "cpu")


def test_damage_and_modules_that_this_version_lacks_are_one_line(adapted) -> None:
    folder, _ = adapted
    save_file({**load_file(folder / ADAPTER), "blocks.0.lora.weight": torch.ones(2, 2)},
              folder / ADAPTER)
    with pytest.raises(ValueError, match="is damaged: adapter.safetensors .*use another step"):
        load(folder, "cpu")
    write_manifest(folder)
    with pytest.raises(ValueError, match="made with an adapter that this version cannot apply: the "
                                         "model has no tensor blocks.0.lora.weight; use the"):
        load(folder, "cpu")
