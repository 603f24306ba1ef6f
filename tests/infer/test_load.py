"""A step folder with an adapter opens as the model that was trained, over its base's weights."""
from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fira import files
from fira.checkpoint import Checkpoints, read_weights
from fira.convert.files import load_run
from fira.files import write_manifest
from fira.infer.load import load
from fira.model import build, build_meta, load_pretrained
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


def tensors_of(change):
    """Write other tensors into an adapter's folder, with their checksums."""
    def write(folder):
        tensors = load_file(folder / ADAPTER)
        change(tensors)
        save_file(tensors, folder / ADAPTER)
        write_manifest(folder)
    return write


def not_a_number(tensors):
    tensors["norm.weight"][3] = float("nan")


def low_rank(rank, **more):
    return tensors_of(lambda tensors: tensors.update({
        "blocks.0.moe.experts.up.lora.a": torch.zeros(4, rank, 32),
        "blocks.0.moe.experts.up.lora.b": torch.zeros(4, 32, rank), **more}))


BAD = [
    (tensors_of(not_a_number), "norm.weight holds numbers that are not finite; use another step"),
    (low_rank(33), "rank=33 is above 32, the smaller width"),
    (low_rank(2, **{"blocks.0.moe.experts.up.lora.experts": torch.tensor([0, 1, 2, 9])}),
     "experts [0, 1, 2, 9] are not all among the 4"),
    (tensors_of(lambda tensors: tensors.update({"norm.lora.a": torch.zeros(1, 1)})),
     "the model has no tensor norm.lora.a"),
    (tensors_of(lambda tensors: tensors.update({
        "token_embedding.lora.delta": torch.zeros(1, 32)})),
     "token_embedding.lora.tokens")]


@pytest.mark.parametrize("damage, line", BAD, ids=[line for _, line in BAD])
def test_an_adapter_at_fault_is_one_line(damage, line, adapted, step_folder, refused) -> None:
    damage(adapted[0])
    for words in ([adapted[0]], [step_folder, "--adapter", adapted[0]]):
        assert line in refused("generate", *words, "hi")


def test_an_adapter_is_applied_to_the_run_that_is_named(adapted, step_folder, text_file, fira,
                                                        refused, tmp_path) -> None:
    moved = step_folder.rename(tmp_path / "moved")
    words = ["--text", text_file, "--json"]
    own = [fira("eval", *where, *words).out for where in (
        [moved], [moved, "--adapter", adapted[0]], [moved, "--adapter", adapted[0].parent])]
    assert own[1] == own[2] != own[0]
    other = build(load_pretrained(moved).spec, seed=1)
    save_weights(other, moved)
    write_manifest(moved)
    for verb in ("generate", "chat", "serve", "eval"):
        more = {"generate": ["hi"], "eval": words, "serve": ["--port", 0]}.get(verb, [])
        line = refused(verb, moved, "--adapter", adapted[0], *more)
        assert re.search(r"moved/model.safetensors has checksum \w{12}, but the adapter", line)
    assert "whole model, not an adapter" in refused("generate", moved, "--adapter", moved, "hi")


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_weights_are_used_where_they_lie_in_the_file(kind, step_folder, fira, tmp_path) -> None:
    folder = step_folder
    if kind:
        assert fira("export", kind, step_folder.parent, tmp_path / kind).code == 0
        folder = tmp_path / kind / step_folder.name
    before, model = (folder / WEIGHTS).read_bytes(), load(folder, "cpu").model
    places = [[int(end, 16) for end in line.split()[0].split("-")]
              for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    stored = {name: one for name, one in model.state_dict().items() if one.numel()}
    assert all(any(start <= one.data_ptr() and one.data_ptr() + one.nbytes <= end
                   for start, end in places) for one in stored.values())
    with torch.inference_mode():
        for one in stored.values():
            one.add_(1)  # a page that is written to is copied
    assert (folder / WEIGHTS).read_bytes() == before


def test_a_large_file_is_hashed_again_only_if_it_was_changed_since(step_folder, monkeypatch,
                                                                  fira, refused) -> None:
    monkeypatch.setattr(files, "LARGE", 1000)
    weights, before = step_folder / WEIGHTS, (step_folder / WEIGHTS).stat()
    hashed, sha256 = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    load(step_folder, "cpu")
    assert WEIGHTS not in hashed and "config.json" in hashed
    altered = bytearray(weights.read_bytes())
    altered[-9] ^= 1
    weights.write_bytes(altered)
    assert "model.safetensors was altered" in refused("generate", step_folder, "hi")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # `fira check` reads all
    assert fira("check", step_folder).code == 1 and fira("generate", step_folder, "hi").code == 0
