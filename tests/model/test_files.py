"""Weights on disk: what is saved loads to the same model, and damage is named."""
from __future__ import annotations

import json

import pytest
import torch

from fira.files import write_manifest
from fira.model import build, load_pretrained
from fira.model.files import knows_chat, newest_step, read_config, save_weights
from fira.model.fira import FIRA
from fira.model.fira2 import FIRA2
from fira.model.router import routers
from fira.model.spec import FIRASpec
from tests.models import tiny_spec

SPECS = {FIRA: tiny_spec("fira", top_k=1), FIRA2: tiny_spec("fira2")}


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_models_load_to_the_same_model(tmp_path, kind, dtype):
    model = build(SPECS[kind], seed=1).to(dtype).eval()
    model.end_of_text, model.trained_length = 7, 8
    for router in routers(model):
        router.load_share_E.copy_(torch.tensor([0.5, 0.25, 0.25, 0]))
    save_weights(model, tmp_path / "new")
    tokens_BT = torch.randint(31, (2, 12))
    for loaded in (kind.from_pretrained(tmp_path / "new"), load_pretrained(tmp_path / "new")):
        assert type(loaded) is kind
        assert loaded.spec == model.spec
        assert (loaded.end_of_text, loaded.trained_length) == (7, 8)
        assert not loaded.training
        assert torch.equal(loaded(tokens_BT), model(tokens_BT))
        assert all(router.load_share_E.tolist() == [0.5, 0.25, 0.25, 0]
                   for router in routers(loaded))


def test_a_loaded_model_trains_and_survives_its_file_being_overwritten(tmp_path):
    save_weights(build(SPECS[FIRA2], seed=1), tmp_path)
    model = load_pretrained(tmp_path).train()
    save_weights(build(SPECS[FIRA2], seed=2), tmp_path)
    model(torch.zeros(1, 5, dtype=torch.long)).sum().backward()
    assert torch.equal(model.token_embedding.weight,
                       build(SPECS[FIRA2], seed=1).token_embedding.weight)


@pytest.mark.parametrize("kind", SPECS)
def test_equal_seeds_build_equal_models_whatever_the_global_state(kind):
    torch.manual_seed(0)
    first = build(SPECS[kind], seed=3).state_dict()
    state = torch.random.get_rng_state()
    second = build(SPECS[kind], seed=3).state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build(SPECS[kind], seed=4).state_dict()
    assert not torch.equal(first["token_embedding.weight"], other["token_embedding.weight"])


def test_initial_weights_have_their_scales():
    spec = FIRASpec(vocab_size=500, d_model=128, n_head=4, num_layers=8, d_ff=256)
    model = build(spec, seed=0)
    for name, parameter in model.named_parameters():
        if "norm.weight" in name:
            assert parameter.eq(1).all()
        elif name.endswith("bias"):
            assert parameter.eq(0).all()
        elif "router" not in name:
            residual = "output" in name or "down" in name
            assert parameter.std().item() == pytest.approx(0.02 / (4 if residual else 1), rel=0.05)


def test_building_after_meta_construction_leaves_no_buffer_unset():
    model = build(SPECS[FIRA2], seed=0)
    fresh = FIRA2(**SPECS[FIRA2].model_dump())
    built = dict(model.named_buffers())
    assert built.keys() == dict(fresh.named_buffers()).keys()
    for name, buffer in fresh.named_buffers():
        assert torch.equal(built[name], buffer), name


def test_the_tied_embedding_is_stored_once(tmp_path):
    model = build(SPECS[FIRA2], seed=0)
    save_weights(model, tmp_path)
    stored = (tmp_path / "model.safetensors").stat().st_size
    numbers = sum(p.numel() for p in model.parameters()) + 2 * 4
    assert 4 * numbers < stored < 4 * numbers + 8192


def test_a_run_folder_loads_its_newest_complete_step(tmp_path):
    for step, complete in ((2, True), (10, True), (11, False)):
        folder = tmp_path / f"step-{step:06d}"
        save_weights(build(SPECS[FIRA], seed=step), folder)
        if complete:
            write_manifest(folder)
    (tmp_path / "step-000099.partial").mkdir()
    assert newest_step(tmp_path).name == "step-000010"
    assert torch.equal(FIRA.from_pretrained(tmp_path).head.weight,
                       build(SPECS[FIRA], seed=10).head.weight)


def spoil_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "is not a folder": lambda folder: None,
    "no step-NNNNNN in it": lambda folder: folder.mkdir(),
    "has no complete step": lambda folder: (folder / "step-000001").mkdir(parents=True),
    "model.safetensors is damaged": truncate,
    "config.json is missing": lambda folder: (folder / "config.json").unlink(),
    "architecture 'llama', not one of": lambda folder: spoil_config(folder, architecture="llama"),
    "architecture None, not one of": lambda folder: (folder / "config.json").write_text("{}"),
    "disagree on tensor blocks.2": lambda folder: spoil_config(folder, num_layers=3),
    "num_layers=1000000: should be less": lambda folder: spoil_config(folder, num_layers=10**6),
    "has shape .* but config.json says": lambda folder: spoil_config(folder, d_ff=25),
    "top_k=9 is above": lambda folder: spoil_config(folder, top_k=9),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_what_cannot_be_loaded_is_named_in_one_line(tmp_path, words):
    folder = tmp_path / "model"
    if "folder" not in words and "step" not in words:
        save_weights(build(SPECS[FIRA], seed=0), folder)
    DAMAGE[words](folder)
    with pytest.raises(ValueError, match=words) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


def test_settings_that_became_constants_are_dropped_from_older_files(tmp_path):
    save_weights(build(SPECS[FIRA2], seed=0), tmp_path)
    spoil_config(tmp_path, z_weight=0.002, init_std=0.1)
    assert read_config(tmp_path / "config.json")[0] == SPECS[FIRA2]
    assert load_pretrained(tmp_path).spec == SPECS[FIRA2]


@pytest.mark.parametrize("notes, run, chat", [
    ({"stage": "tune", "chat": True}, {"stage": "pretrain"}, True),
    ({"stage": "pretrain"}, None, False), ({"chat": False}, {"stage": "tune"}, False),
    ({}, {"stage": "tune"}, True), ({}, {"stage": "pretrain"}, False), ({}, None, False)])
def test_a_step_folder_says_whether_its_model_knows_chat(tmp_path, notes, run, chat):
    """An older one has only the stage in its run's config.json."""
    model = build(SPECS[FIRA2], seed=0)
    for name, value in notes.items():
        setattr(model, name, value)
    save_weights(model, tmp_path / "step-000001")
    if run is not None:
        (tmp_path / "config.json").write_text(json.dumps(run))
    assert knows_chat(tmp_path / "step-000001") == chat
    loaded = load_pretrained(tmp_path / "step-000001")
    assert (loaded.stage, loaded.chat) == (notes.get("stage"), notes.get("chat"))


def test_another_architecture_is_refused(tmp_path):
    save_weights(build(SPECS[FIRA2], seed=0), tmp_path)
    with pytest.raises(ValueError, match="holds a FIRA2, not a FIRA; use FIRA2"):
        FIRA.from_pretrained(tmp_path)
