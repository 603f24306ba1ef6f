"""transformers computes what FIRA computes, and a model comes back as it left."""
from __future__ import annotations

import json
import os
import re
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fira.convert.hf import check_router
from fira.data.chat import render
from fira.files import MANIFEST, write_manifest
from fira.infer.load import load
from fira.model import build, load_pretrained
from fira.model.files import CONFIG, INDEX, WEIGHTS, knows_chat
from fira.model.router import routers
from fira.model.spec import FIRA2Spec
from tests.convert.conftest import HARD

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(run, fira, tmp_path):
    assert fira("export", "hf", run, tmp_path / "hf").code == 0
    (tmp_path / "hf" / MANIFEST).unlink()  # as if another program had written it
    return tmp_path / "hf"


def peer(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def prompt(loaded):
    text = "The state of the Union is a matter of the people. " * 4
    return torch.tensor([[loaded.tokenizer.end_of_text, *loaded.tokenizer.encode(text)][:48]])


@pytest.mark.parametrize("which", ["run", "dense_run", "untied_run", "top1_run", "raw_run",
                                   "founding_run"])
def test_transformers_computes_the_same_and_import_gives_the_same_bits(which, request, fira,
                                                                       tmp_path):
    source = request.getfixturevalue(which)
    assert fira("export", "hf", source, tmp_path / "hf").code == 0
    loaded = load(source, "cpu")
    theirs = peer(tmp_path / "hf", trust_remote_code=which == "founding_run")
    ids_BT = prompt(loaded)
    with torch.no_grad():
        ours, found = loaded.model(ids_BT), theirs(ids_BT).logits
    assert (found.log_softmax(-1) - ours.log_softmax(-1)).abs().max() < 1e-4
    greedy = theirs.generate(ids_BT[:, :8], attention_mask=torch.ones_like(ids_BT[:, :8]),
                             max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert torch.equal(greedy, loaded.model.generate(ids_BT[:, :8], 24, 0, end_of_text=-1))
    head = {"lm_head.weight", "head.weight"} & load_file(tmp_path / "hf" / WEIGHTS).keys()
    assert bool(head) == (which != "dense_run")  # SGLang's Qwen3-MoE knows no tied head
    if which != "founding_run":
        assert fira("import", "hf", tmp_path / "hf", tmp_path / "again").code == 0
        again = load(tmp_path / "again", "cpu")
        assert again.model.spec == loaded.model.spec
        assert again.tokenizer.hash == loaded.tokenizer.hash
        assert again.model.trained_length == loaded.model.trained_length
        for name, tensor in loaded.model.named_parameters():
            assert torch.equal(tensor, again.model.get_parameter(name)), name


def test_hard_texts_have_the_same_ids(folder, loaded):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in HARD:
        assert theirs(text, split_special_tokens=True)["input_ids"] == loaded.tokenizer.encode(text)
        allowed = loaded.tokenizer.encode(text, allow_special=True)
        assert theirs(text)["input_ids"] == allowed
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("which, text", [
    ("run", "<|endoftext|>Größe?"),
    ("chat_run", "<|im_start|>user\nGröße?<|im_end|>\n<|im_start|>assistant\n")])
def test_the_template_is_of_what_the_model_was_tuned_for(which, text, request, fira, tmp_path):
    assert fira("export", "hf", request.getfixturevalue(which), tmp_path / "hf").code == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert text == theirs.apply_chat_template([{"role": "user", "content": "Größe?"}],
                                              tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("template, option, chat, words", [
    (None, (), False, "no chat template with <|im_start|>; if that is wrong, import it again with "
     "--chat yes"),
    ("<|im_start|>{{ messages }}", (), True, "has a chat template with <|im_start|>; if that"),
    ("[INST]{{ messages }}", (), False, "no chat template with <|im_start|>"),
    ("[INST]{{ messages }}", ("--chat", "yes"), True, "tuned for chat, as --chat says"),
    ("<|im_start|>{{ messages }}", ("--chat", "no"), False, "not tuned for chat, as --chat says"),
])
def test_the_template_beside_the_tokenizer_or_the_option_decides_about_chat(
        folder, fira, tmp_path, template, option, chat, words):
    if template:
        (folder / "chat_template.jinja").write_text(template)
    answer = fira("import", "hf", folder, tmp_path / "again", *option)
    assert words in " ".join(answer.err.split())
    again = load(tmp_path / "again", "cpu")
    assert knows_chat(again.folder) == chat
    assert template in (None, again.tokenizer.settings["chat_template"])
    assert fira("export", "hf", tmp_path / "again", tmp_path / "out").code == 0
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert ("<|im_start|>" in settings["chat_template"]) == chat


def test_a_model_that_thinks_says_so_by_its_template_here_and_elsewhere(chat_run, fira, tmp_path):
    run = shutil.copytree(chat_run, tmp_path / "run")
    for path in run.glob("step-*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"think": True}))
        write_manifest(path.parent)
    old = json.dumps("{% if tools %}<|im_start|>system\n of an older version")
    for path in run.glob("step-*/tokenizer_config.json"):
        path.write_text(re.sub(r'"chat_template": ".*"', lambda _: f'"chat_template": {old}',
                               path.read_text()))
        write_manifest(path.parent)
    assert fira("export", "hf", run, tmp_path / "hf").code == 0
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ask = [{"role": "user", "content": "Größe?"}]
    assert auto.apply_chat_template(ask, add_generation_prompt=True, enable_thinking=False,
                                    return_dict=True)["input_ids"] == render(
        load(run, "cpu").tokenizer, ask, direct=True)
    answer = fira("import", "hf", tmp_path / "hf", tmp_path / "again")
    assert "and thinks, because that has enable_thinking" in " ".join(answer.err.split())
    assert load(tmp_path / "again", "cpu").model.think is True


def test_exported_and_imported_files_have_the_permissions_that_the_umask_leaves(run, fira,
                                                                                tmp_path):
    before = os.umask(0o027)
    try:
        assert fira("export", "hf", run, tmp_path / "hf").code == 0
        assert fira("import", "hf", tmp_path / "hf", tmp_path / "again").code == 0
        assert fira("export", "int8", run, tmp_path / "int8").code == 0
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 12 and {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_a_step_folder_alone_knows_whether_its_model_was_tuned_for_chat(run, chat_run, fira,
                                                                        tmp_path):
    for source, chat in ((run, False), (chat_run, True)):
        made = tmp_path / source.name
        assert fira("export", "hf", source, made / "hf").code == 0
        assert fira("import", "hf", made / "hf", made / "again").code == 0
        assert fira("export", "int8", source, made / "int8").code == 0
        for written in (made / "again", made / "int8"):
            step = shutil.copytree(load(written, "cpu").folder, made / f"{written.name}-step")
            assert knows_chat(step) == chat
        assert fira("export", "int4", made / "again-step", made / "int4").code == 0
        assert knows_chat(load(made / "int4", "cpu").folder) == chat


def test_an_export_of_an_older_version_comes_in_and_the_other_verbs_read_it(folder, fira, loaded,
                                                                            text_file, tmp_path):
    ours, run = json.loads((folder / CONFIG).read_text())["fira"], tmp_path / "again"
    edit_config(folder, fira=ours | {"z_weight": 0.001, "init_std": 0.02})
    assert fira("import", "hf", folder, run).code == 0
    assert load(run, "cpu").model.spec == loaded.model.spec
    assert fira("generate", run, "The", "--max-new-tokens", 4).code == 0
    assert fira("eval", run, "--text", text_file).code == 0
    assert "active" in fira("show", run).out


@pytest.mark.parametrize("which, size", [("run", "2MB"), ("untied_run", "100KB")])
def test_what_transformers_saves_comes_in_also_in_several_files(which, size, request, fira,
                                                                tmp_path):
    folder, source = tmp_path / "hf", request.getfixturevalue(which)
    assert fira("export", "hf", source, folder).code == 0
    loaded = load(source, "cpu")
    peer(folder).save_pretrained(tmp_path / "theirs", max_shard_size=size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "theirs")
    assert (tmp_path / "theirs" / INDEX).is_file()
    assert fira("import", "hf", tmp_path / "theirs", tmp_path / "run").code == 0
    ids_BT = prompt(loaded)
    again = load_pretrained(tmp_path / "run")
    assert torch.equal(again(ids_BT), loaded.model(ids_BT))


def test_stacked_experts_come_in(folder, loaded, fira, tmp_path):
    tensors = load_file(folder / WEIGHTS)
    for layer in range(loaded.model.spec.num_layers):
        at = f"model.layers.{layer}.mlp.experts."
        parts = {part: torch.stack([tensors.pop(f"{at}{e}.{part}_proj.weight") for e in range(4)])
                 for part in ("gate", "up", "down")}
        tensors[f"{at}gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        tensors[f"{at}down_proj"] = parts["down"]
    save_file(tensors, folder / WEIGHTS)
    assert fira("import", "hf", folder, tmp_path / "run").code == 0
    ids_BT = prompt(loaded)
    assert torch.equal(load_pretrained(tmp_path / "run")(ids_BT), loaded.model(ids_BT))


@torch.no_grad()
def test_weights_of_16_bits_are_the_same_model_there(run, fira, loaded, tmp_path):
    assert fira("export", "hf", run, tmp_path / "hf", "--dtype", "float16").code == 0
    assert json.loads((tmp_path / "hf" / CONFIG).read_text())["torch_dtype"] == "float16"
    assert {one.dtype for one in load_file(tmp_path / "hf" / WEIGHTS).values()} == {torch.float16}
    assert fira("import", "hf", tmp_path / "hf", tmp_path / "again").code == 0
    ids_BT = prompt(loaded)
    logp_TV = load_pretrained(tmp_path / "again").float()(ids_BT).log_softmax(-1)[0]
    exact = peer(tmp_path / "hf", dtype=torch.float32)(ids_BT, output_router_logits=True)
    top_LTK = torch.stack(exact.router_logits).topk(3).values
    clear_T = (top_LTK[..., 1] - top_LTK[..., 2] > 1e-3).all(0)  # rounding changes no choice there
    assert clear_T.sum() > 40
    compared = clear_T[:, None] & (logp_TV > -13.8)  # one in a million
    half = peer(tmp_path / "hf", dtype=torch.float16)(ids_BT)
    for theirs, limit in ((exact, 1e-4), (half, 1e-2)):
        difference = theirs.logits[0].float().log_softmax(-1) - logp_TV
        assert difference[compared].abs().max() < limit


def edit_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


MISTAKES = {
    "model_type='llama' is not one that FIRA2 can hold":
        lambda folder: edit_config(folder, model_type="llama"),
    "hidden_act=gelu": lambda folder: edit_config(folder, hidden_act="gelu"),
    "norm_topk_prob=True": lambda folder: edit_config(folder, num_experts_per_tok=1),
    "norm_eps=0: should be greater than 0": lambda folder: edit_config(folder, rms_norm_eps=0),
    "rope_type=yarn": lambda folder: edit_config(
        folder, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
    "num_hidden_layers is missing": lambda folder: edit_config(folder, num_hidden_layers=None),
    "has shape [256, 256], but config.json says [128, 256]":
        lambda folder: edit_config(folder, moe_intermediate_size=128),
    "tensor model.norm.weight is missing": lambda folder: edit_weights(
        folder, lambda tensors: tensors.pop("model.norm.weight")),
    "tensor extra.weight is unknown": lambda folder: edit_weights(
        folder, lambda tensors: tensors.update({"extra.weight": torch.ones(1)})),
    "lm_head.weight differs": lambda folder: edit_weights(
        folder, lambda tensors: tensors["lm_head.weight"].add_(1)),
    "is torch.int8": lambda folder: edit_weights(
        folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(
            256, dtype=torch.int8)})),
    "config.json is missing": lambda folder: (folder / CONFIG).unlink(),
    "has no tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "hidden_size='wide' is not a whole number":
        lambda folder: edit_config(folder, hidden_size="wide"),
    "weight_map=['x'] is not a JSON object":
        lambda folder: (folder / INDEX).write_text('{"weight_map": ["x"]}'),
    "model-2.safetensors cannot be read": lambda folder: (folder / INDEX).write_text(
        '{"weight_map": {"model.embed_tokens.weight": "model-2.safetensors"}}'),
    "FIRA reads safetensors, never pickles": lambda folder: (folder / WEIGHTS).rename(
        folder / "pytorch_model.bin"),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_what_fira2_cannot_hold_is_one_line_and_leaves_nothing(words, folder, refused, tmp_path):
    MISTAKES[words](folder)
    line = refused("import", "hf", folder, tmp_path / "run")
    assert words in line and str(folder) in line and "; " in line
    assert not list(tmp_path.glob("*run*"))


def test_a_bias_that_only_selects_has_no_place_elsewhere_until_it_has_faded():
    model = build(FIRA2Spec(vocab_size=32, d_model=16, n_head=2, n_kv_head=1, head_dim=8,
                            num_layers=2, d_ff=8, num_experts=4, top_k=2, context=12,
                            balance="handover"), seed=1)
    check_router(model)
    routers(model)[-1].selection_bias_E[0] = 1e-3
    with pytest.raises(ValueError, match="adds a bias to select experts.*finished run"):
        check_router(model)


def test_a_bad_target_or_source_is_one_line(run, folder, refused, text_file, tmp_path):
    assert "exists already" in refused("export", "hf", run, folder)
    assert "exists already" in refused("import", "hf", folder, folder)
    for known in (run, load(run, "cpu").folder):
        assert "is a FIRA run already" in refused("import", "hf", known, tmp_path / "x")
    assert "not a run folder" in refused("export", "hf", folder.parent, tmp_path / "x")
    assert "cannot be written" in refused("export", "hf", run, text_file / "x")
    assert "--dtype" in refused("export", "hf", run, tmp_path / "x", "--dtype", "int8", code=2)


def test_a_full_disk_is_one_line_and_leaves_nothing(run, refused, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for words in (("hf", run, tmp_path / "x"), ("int8", run, tmp_path / "x")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            line = refused("export", *words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert f"cannot write {tmp_path / 'x'}: " in line and "room enough" in line
    assert not list(tmp_path.iterdir())
