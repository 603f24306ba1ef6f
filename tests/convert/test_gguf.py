"""llama.cpp computes what FIRA computes, from the file alone."""
from __future__ import annotations

import copy
import json
import math
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from io import StringIO
from pathlib import Path

import pytest
import torch
from torch import nn

from fira.infer.load import load
from fira.model.moe import ExpertLinear
from tests.convert.conftest import HARD

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
from fira.cli_exchange import TYPES  # noqa: E402
from fira.convert.gguf import MIXES  # noqa: E402
from fira.infer.edge import Edge  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def files(run, dense_run, untied_run, tmp_path_factory):
    """A file of each type."""
    from rich.console import Console

    from fira.stages.exchange import export_gguf

    folder = tmp_path_factory.mktemp("gguf")
    for name in MIXES:
        export_gguf(run, folder / f"{name}.gguf", name, Console(quiet=True))
    export_gguf(dense_run, folder / "dense.gguf", "f32", Console(quiet=True))
    export_gguf(untied_run, folder / "untied.gguf", "f32", Console(quiet=True))
    return folder


def prompt(loaded):
    """Short enough that 16 tokens more fit the 32 that the model was trained on."""
    return [loaded.tokenizer.end_of_text, *loaded.tokenizer.encode("The state of the Union")][:16]


def scores(edge, ids, count):
    """Greedy ids that llama.cpp gives, and for each the log-probabilities of all tokens."""
    answer = edge.server.handle_completions({
        "prompt": ids, "temperature": 0, "max_tokens": count, "logprobs": 600,
        "samplers": ["temperature"], "cache_prompt": False})
    rows = answer["choices"][0]["logprobs"]["content"]
    return [row["id"] for row in rows], [
        {one["id"]: one["logprob"] for one in row["top_logprobs"]} for row in rows]


@torch.no_grad()
def worst(model, ids, edge, count=16):
    """Largest difference of log-probability over `count` greedy steps, above one in a million."""
    theirs, rows = scores(edge, ids, count)
    ours = model.generate([ids], count, 0, end_of_text=-1)[0, len(ids):].tolist()
    logp_TV = model(torch.tensor([ids + ours])).log_softmax(-1)[0, len(ids) - 1:]
    found = [abs(logp_TV[step, token].item() - logprob) for step, row in enumerate(rows)
             for token, logprob in row.items() if logprob > math.log(1e-6)]
    assert len(found) > 20 * count
    return theirs == ours, max(found)


def rounded(model):
    """The model of the numbers that an f16 file holds: matrices are rounded, routers are not."""
    model = copy.deepcopy(model)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "router" not in name:
            weight.data = weight.data.half().float()
    return model


def rounding_inputs(model):
    """A copy that also rounds whatever meets such a matrix, as llama.cpp does in its products."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear | ExpertLinear):
            module.register_forward_pre_hook(lambda _, given: (given[0].half().float(), *given[1:]))
    model.norm.register_forward_hook(lambda _, given, x_BTD: x_BTD.half().float())  # to the head
    return model


def test_greedy_text_and_log_probabilities_equal_those_of_llamacpp(files, loaded):
    same, difference = worst(loaded.model, prompt(loaded), Edge(files / "f32.gguf", exact=True))
    assert same and difference < 1e-4


def test_an_f16_file_holds_the_rounded_weights_and_llamacpp_rounds_activations_too(files, loaded):
    edge, ids = Edge(files / "f16.gguf", exact=True), prompt(loaded)
    file = rounded(loaded.model)
    same, difference = worst(file, ids, edge)
    assert same and difference < 2e-3
    assert worst(loaded.model, ids, edge)[1] < 5e-3  # both roundings
    assert worst(rounding_inputs(file), ids, edge)[1] < 1e-3  # neither


def test_keys_and_values_of_16_bits_cost_no_more(files, loaded):
    same, difference = worst(rounded(loaded.model), prompt(loaded), Edge(files / "f16.gguf"))
    assert same and difference < 2e-3


def test_a_bf16_file_is_close(files, loaded):
    same, difference = worst(loaded.model, prompt(loaded), Edge(files / "bf16.gguf", exact=True))
    assert same and difference < 2e-2


@pytest.mark.parametrize("which", ["dense", "untied"])
def test_another_model_equals_its_file_too(files, which, request):
    other = load(request.getfixturevalue(f"{which}_run"), "cpu")
    edge = Edge(files / f"{which}.gguf", exact=True)
    same, difference = worst(other.model, prompt(other), edge)
    assert same and difference < 1e-4


@pytest.mark.parametrize("name", [name for name in MIXES if name[0] == "q"])
def test_a_quantized_file_is_smaller_and_close(files, loaded, name):
    file = files / f"{name}.gguf"
    assert file.stat().st_size < 0.4 * (files / "f32.gguf").stat().st_size
    edge = Edge(file, exact=True)
    _, rows = scores(edge, prompt(loaded), 1)
    logp_V = loaded.model(torch.tensor([prompt(loaded)])).log_softmax(-1)[0, -1]
    divergence = sum(math.exp(logp_V[token].item()) * (logp_V[token].item() - logprob)
                     for token, logprob in rows[0].items())
    assert abs(divergence) < 0.05


def test_hard_texts_have_the_same_ids(files, loaded):
    edge = Edge(files / "q4_0.gguf")
    for text in HARD:
        if "\u0000" not in text:  # ends a string of llama.cpp's
            assert edge.tokenize(text) == loaded.tokenizer.encode(text), text
            assert edge.tokenize(text, special=True) == loaded.tokenizer.encode(text, True), text


def test_norms_and_routers_stay_float32(files):
    kinds = {tensor.name: tensor.tensor_type.name
             for tensor in gguf.GGUFReader(files / "q4_k_m.gguf").tensors}
    for name, kind in kinds.items():
        if "norm" in name or "ffn_gate_inp" in name:
            assert kind == "F32", name
    assert kinds["token_embd.weight"] == "Q6_K" and kinds["blk.0.ffn_up_exps.weight"] == "Q4_K"


def test_the_command_offers_the_types_there_are():
    assert tuple(MIXES) == TYPES


def test_chat_with_a_file_says_what_chat_with_the_run_says(files, run, fira, monkeypatch):
    answers = []
    for model in (files / "f32.gguf", run):
        monkeypatch.setattr(sys, "stdin", StringIO("The state\n/reset\nThe state\nmore\n"))
        answers.append(fira("chat", model, "--temperature", 0, "--max-new-tokens", 8))
        assert answers[-1].code == 0 and "not tuned for chat" in answers[-1].err
    assert answers[0].out == answers[1].out and answers[0].out.strip()


def test_a_file_is_served_until_a_signal(files):
    child = subprocess.Popen(
        [sys.executable, "-m", "fira", "serve", str(files / "f16.gguf"), "--port", "0", "--slots",
         "2", "--name", "small"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    try:
        line = next(line for line in child.stderr if line.startswith("serving small by llama.cpp"))
        address = line.split()[-1]
        with urllib.request.urlopen(f"{address}/models") as answer:
            assert json.load(answer)["data"][0]["id"] == "small"
        body = {"prompt": "The state", "max_tokens": 4, "temperature": 0}
        request = urllib.request.Request(f"{address}/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=20) == 0
    finally:
        child.kill()
        child.communicate()


def test_what_serving_a_file_cannot_honour_is_one_line(files, refused, tmp_path):
    file = files / "f16.gguf"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = refused("serve", file, "--port", taken.getsockname()[1])
        assert "cannot be listened at" in line and "another --host or --port" in line
    for option in ("--keys", "--queue", "--device", "--precision"):
        value = {"--keys": tmp_path / "keys", "--queue": 4, "--device": "cpu",
                 "--precision": "int8"}[option]
        assert f"{option} {value} is for runs" in refused("serve", file, option, value)
    assert "does not exist" in refused("serve", tmp_path / "gone.gguf", "--port", 0)


def test_a_modelfile_for_ollama_stands_beside_it(files):
    text = (files / "f16.Modelfile").read_text()
    assert text.startswith("FROM ./f16.gguf\n") and "PARAMETER num_ctx 32" in text
    assert 'TEMPLATE """<|endoftext|>{{ .Prompt }}"""' in text


def test_what_llamacpp_cannot_hold_is_one_line(founding_run, top1_run, trained_run, run, files,
                                               refused, tmp_path):
    file = tmp_path / "x.gguf"
    assert "learned positions" in refused("export", "gguf", founding_run, file)
    assert "renormalizes" in refused("export", "gguf", top1_run, file)
    line = refused("export", "gguf", trained_run, file, "--type", "q4_k_m")
    assert "d_model=32" in line and "multiple of 256" in line and "q8_0" in line
    assert "exists already" in refused("export", "gguf", run, files / "f16.gguf")
    assert "--type" in refused("export", "gguf", run, file, "--type", "q9", code=2)
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(run, refused, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "xllamacpp", None)
        (tmp_path / "x.gguf").write_bytes(b"GGUF")
        assert "pip install 'fira-moe[edge]'" in refused("chat", tmp_path / "x.gguf")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        patch.delitem(sys.modules, "fira.convert.gguf")
        patch.delitem(sys.modules, "fira.convert.llamacpp")
        line = refused("export", "gguf", run, tmp_path / "y.gguf")
        assert "pip install 'fira-moe[export]'" in line


def test_a_file_that_is_none_is_one_line(refused, tmp_path, files):
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "cut.gguf").write_bytes((files / "f32.gguf").read_bytes()[:5000])
    assert "is not a GGUF file" in refused("chat", tmp_path / "text.gguf")
    assert "cannot load" in refused("chat", tmp_path / "cut.gguf")
    assert "does not exist" in refused("chat", tmp_path / "gone.gguf")


def test_a_stream_can_be_left_and_a_prompt_too_long_is_refused(files):
    edge = Edge(files / "f32.gguf", context=64)
    stream = edge.complete("The", 50, temperature=0)
    next(stream)
    stream.close()
    assert "".join(edge.complete("The", 4, temperature=0))
    with pytest.raises(ValueError, match="exceeds the available context"):
        list(edge.complete([5] * 600, 4))
