"""llama.cpp computes what FIRA computes, from the file alone."""
from __future__ import annotations

import copy
import math
import sys
from io import StringIO

import pytest
import torch
from rich.console import Console

from fira.data.chat import render
from fira.data.conversations import read_conversation
from fira.data.tokenizer import CHAT_TEMPLATE
from fira.infer.load import load
from fira.model import build
from fira.model.spec import FIRA2Spec
from tests.convert.conftest import HARD, KINDS

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
from fira.cli.move import GGUF_TYPES as TYPES  # noqa: E402
from fira.convert.gguf import export_run, write_model  # noqa: E402
from fira.convert.hf import chat_template  # noqa: E402
from tests.llama import Llama  # noqa: E402


@pytest.fixture(scope="module")
def files(run, dense_run, untied_run, chat_run, tmp_path_factory):
    """A file of each type, and one of each other kind of model."""
    folder = tmp_path_factory.mktemp("gguf")
    for name in TYPES:
        export_run(run, folder / f"{name}.gguf", name, Console(quiet=True))
    for name, other in {"dense": dense_run, "untied": untied_run, "chat": chat_run}.items():
        export_run(other, folder / f"{name}.gguf", "f32", Console(quiet=True))
    model, tokenizer, _ = load(chat_run, "cpu")
    model.think = True
    write_model(model, tokenizer, folder / "thinks.gguf", "f32")
    return folder


@pytest.fixture(scope="module")
def f16(files):
    return Llama(files / "f16.gguf", exact=True)


def prompt(loaded):
    """Short enough that 16 tokens more fit the 32 that the model was trained on."""
    return [loaded.tokenizer.end_of_text, *loaded.tokenizer.encode("The state of the Union")][:16]


@torch.no_grad()
def worst(model, ids, llama, count=16):
    """Largest difference of log-probability over `count` greedy steps, above one in a million."""
    rows = llama.complete(ids, count, logprobs=600)
    ours = model.generate([ids], count, 0, end_of_text=-1)[0, len(ids):].tolist()
    logp_TV = model(torch.tensor([ids + ours])).log_softmax(-1)[0, len(ids) - 1:]
    found = [abs(logp_TV[step, one["id"]].item() - one["logprob"]) for step, row in enumerate(rows)
             for one in row["top_logprobs"] if one["logprob"] > math.log(1e-6)]
    assert len(found) > 20 * count
    return ours == [row["id"] for row in rows], max(found)


def rounded(model):
    """The model of the numbers that an f16 file holds: matrices are rounded, routers are not."""
    model = copy.deepcopy(model)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "router" not in name:
            weight.data = weight.data.half().float()
    return model


@pytest.mark.parametrize("which, name", [("run", "f32"), ("dense_run", "dense"),
                                         ("untied_run", "untied")])
def test_greedy_text_and_log_probabilities_equal_those_of_llamacpp(files, which, name, request):
    other = load(request.getfixturevalue(which), "cpu")
    llama = Llama(files / f"{name}.gguf", exact=True)
    same, difference = worst(other.model, prompt(other), llama)
    assert same and difference < 1e-4


def test_an_f16_file_holds_the_rounded_weights_and_llamacpp_rounds_activations_too(files, f16,
                                                                                   loaded):
    ids, file = prompt(loaded), rounded(loaded.model)
    for llama in (f16, Llama(files / "f16.gguf")):  # keys and values of 16 bits cost no more
        same, difference = worst(file, ids, llama)
        assert same and difference < 2e-3
    assert worst(loaded.model, ids, f16)[1] < 5e-3  # both roundings


def test_a_bf16_file_is_close(files, loaded):
    same, difference = worst(loaded.model, prompt(loaded), Llama(files / "bf16.gguf", exact=True))
    assert same and difference < 2e-2


@pytest.mark.parametrize("name", [name for name in TYPES if name[0] == "q"])
def test_a_quantized_file_is_smaller_and_close(files, loaded, name):
    file = files / f"{name}.gguf"
    assert file.stat().st_size < 0.4 * (files / "f32.gguf").stat().st_size
    rows = Llama(file, exact=True).complete(prompt(loaded), 1, logprobs=600)
    logp_V = loaded.model(torch.tensor([prompt(loaded)])).log_softmax(-1)[0, -1]
    theirs = {one["id"]: one["logprob"] for one in rows[0]["top_logprobs"]}
    divergence = sum(math.exp(logp_V[id].item()) * (logp_V[id].item() - logprob)
                     for id, logprob in theirs.items())
    assert abs(divergence) < 0.05


def test_hard_texts_have_the_same_ids(f16, loaded):
    for text in HARD:
        if "\u0000" not in text:  # ends a string of llama.cpp's
            assert f16.tokenize(text) == loaded.tokenizer.encode(text), text
            assert f16.tokenize(text, special=True) == loaded.tokenizer.encode(text, True), text


def test_norms_and_routers_stay_float32_and_the_embedding_has_8_bits(files):
    kinds = {tensor.name: tensor.tensor_type.name
             for tensor in gguf.GGUFReader(files / "q4_0.gguf").tensors}
    assert {kind for name, kind in kinds.items() if "norm" in name or "gate_inp" in name} == {"F32"}
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["blk.0.ffn_up_exps.weight"] == "Q4_0"


def test_chat_with_a_file_says_what_chat_with_the_run_says(files, run, fira, monkeypatch):
    llama, said = Llama(files / "f32.gguf"), []
    messages = [{"role": "user", "content": "The state"}]
    said.append(llama.chat(messages, 8))
    messages += [{"role": "assistant", "content": said[0]}, {"role": "user", "content": "more"}]
    said.append(llama.chat(messages, 8))
    monkeypatch.setattr(sys, "stdin", StringIO("The state\nmore\n"))
    answer = fira("chat", run, "--temperature", 0, "--max-new-tokens", 8)
    assert answer.out == "".join(f"{one}\n" for one in said) and answer.out.strip()


def test_the_file_of_a_model_tuned_for_chat_brings_its_template(files, loaded):
    def template(name):
        return gguf.GGUFReader(files / f"{name}.gguf").get_field("tokenizer.chat_template")

    assert template("chat").contents() == CHAT_TEMPLATE
    assert template("f32").contents() == chat_template(loaded.tokenizer, chat=False)
    messages = [{"role": "user", "content": "Größe?"}]
    llama = Llama(files / "chat.gguf")
    assert llama.chat(messages, 8) == "".join(
        row["token"] for row in llama.complete(render(loaded.tokenizer, messages), 8))


@pytest.mark.parametrize("record", KINDS, ids=["tools", "thoughts"])
def test_turns_of_all_kinds_have_the_same_ids_in_llamacpp(files, loaded, record):
    messages, tools = read_conversation(record)
    llama = Llama(files / "thinks.gguf")
    for think in (True, False):
        theirs = llama.apply_template(record["messages"][:-1], tools, enable_thinking=think)
        assert llama.tokenize(theirs, special=True) == render(
            loaded.tokenizer, messages[:-1], True, tools, direct=not think)


def test_the_command_says_how_to_run_the_file_and_writes_a_modelfile(run, files, fira, tmp_path):
    answer = fira("export", "gguf", run, tmp_path / "small.gguf", "--type", "q8_0")
    said = " ".join(answer.err.split())
    assert answer.code == 0 and f"llama-server -m {tmp_path / 'small.gguf'}" in said
    assert f"ollama create small -f {tmp_path / 'small.Modelfile'}" in said
    text = (tmp_path / "small.Modelfile").read_text()
    assert text.startswith("FROM ./small.gguf\n") and "PARAMETER num_ctx 32" in text
    assert 'TEMPLATE """<|endoftext|>{{ .Prompt }}"""' in text
    assert 'PARAMETER stop "<|im_end|>"' in (files / "chat.Modelfile").read_text()


def test_what_llamacpp_cannot_hold_is_one_line(founding_run, top1_run, raw_run, run, loaded, files,
                                               refused, tmp_path):
    file = tmp_path / "x.gguf"
    assert "learned positions" in refused("export", "gguf", founding_run, file)
    assert "renormalizes" in refused("export", "gguf", top1_run, file)
    assert "renormalize=false" in refused("export", "gguf", raw_run, file)
    narrow = build(FIRA2Spec(vocab_size=600, d_model=64, n_head=2, n_kv_head=1, head_dim=32,
                             num_layers=1, d_ff=40, num_experts=2, top_k=2))
    with pytest.raises(ValueError, match="d_ff=40 does not fit q4_0.*multiple of 32.*--type f32"):
        write_model(narrow, loaded.tokenizer, file, "q4_0")
    assert "exists already" in refused("export", "gguf", run, files / "f16.gguf")
    (tmp_path / "y.Modelfile").touch()
    assert "y.Modelfile exists already" in refused("export", "gguf", run, tmp_path / "y.gguf")
    assert "--type" in refused("export", "gguf", run, file, "--type", "q4_k_m", code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["y.Modelfile"]


def test_a_missing_package_is_named(run, refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "fira.convert.gguf")
    line = refused("export", "gguf", run, tmp_path / "y.gguf")
    assert "pip install 'fira-moe[export]'" in line
