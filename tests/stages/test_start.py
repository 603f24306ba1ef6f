"""A run can begin with another's weights: its own kind's, or a checkpoint that came from elsewhere.
"""
from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fira.data.batches import Shards, permute
from fira.model import load_pretrained
from fira.model.files import INDEX
from fira.runlog import read_rows

transformers = pytest.importorskip("transformers")

SHAPE = dict(vocab_size=608, hidden_size=48, num_hidden_layers=3, num_attention_heads=3,
             num_key_value_heads=1, head_dim=16, moe_intermediate_size=24, num_experts=6,
             num_experts_per_tok=2, norm_topk_prob=True, tie_word_embeddings=True,
             max_position_embeddings=128, decoder_sparse_step=1, router_aux_loss_coef=0.0)


@pytest.fixture(scope="module")
def foreign(data_folder, tmp_path_factory):
    """A Qwen3-MoE of transformers' own making, in several bfloat16 files."""
    folder = tmp_path_factory.mktemp("foreign") / "qwen"
    torch.manual_seed(0)
    theirs = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SHAPE)).bfloat16()
    theirs.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / INDEX).is_file()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data_folder / name, folder)
    return folder


@pytest.fixture
def words(preset, data_folder, tmp_path):
    """The command that trains in the folder `run`."""
    return ("train", preset, f"data.folder={data_folder}", "--device", "cpu", "--run",
            tmp_path / "run")


def losses(run):
    return [row["loss"] for row in read_rows(run) if row["kind"] == "step"]


def test_an_imported_checkpoint_is_tuned_and_goes_back(foreign, preset, corpus, fira, refused,
                                                       tmp_path):
    imported, data, run = tmp_path / "imported", tmp_path / "data", tmp_path / "run"
    answer = fira("import", "hf", foreign, imported)
    assert f"--from {imported} data.folder=DATA" in " ".join(answer.err.split())
    assert fira("data", corpus, "--tokenizer", imported / "step-000000", "--out", data,
                "--validation-every", 4).code == 0
    words = "train", preset, f"data.folder={data}", "train.steps=5", "--device", "cpu", "--run"
    line = refused(*words, imported, "--resume", code=2)
    assert "no training to resume" in line and f"--from {imported}" in line
    answer = fira(*words, run, "--from", imported)
    assert answer.code == 0 and "starting from the weights in" in answer.err, answer.err
    found = losses(run)
    assert len(found) == 5 and found[-1] < found[0] - 0.2
    assert fira("export", "hf", run, tmp_path / "hf").code == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ours, tokens_BT = load_pretrained(run), torch.arange(24)[None]
    assert type(theirs).__name__ == "Qwen3MoeForCausalLM" and ours.spec.num_experts == 6
    assert ours.trained_length is None  # it still reads the context that it came with
    with torch.no_grad():
        assert (theirs(tokens_BT).logits - ours(tokens_BT)).abs().max() < 1e-4


def test_the_first_step_sees_the_weights_of_the_start_but_may_balance_otherwise(
        trained_run, words, data_folder, fira, refused, tmp_path):
    words = *words, "train.steps=1", "--from", trained_run
    line = refused(*words, "model.top_k=1", code=2)
    assert "model.top_k=1 does not go with --from" in line and "top_k=2" in line
    assert not (tmp_path / "run").exists()
    assert fira(*words, "model.balance=bias").code == 0
    assert load_pretrained(tmp_path / "run").spec.balance == "bias"
    tokens = Shards(data_folder)
    starts = 32 * permute(np.arange(8), (len(tokens) - 1) // 32, 1, 0)
    ids_BT = torch.tensor(np.stack([tokens[start:start + 33] for start in starts]).astype(int))
    with torch.no_grad():
        logits_BTV = load_pretrained(trained_run)(ids_BT[:, :-1])
    expected = F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
    assert losses(tmp_path / "run")[0] == pytest.approx(expected.item(), abs=1e-4)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["from"].startswith(str(trained_run.resolve()))


def test_a_tuned_run_resumes_from_its_own_steps(trained_run, words, fira, refused, tmp_path):
    source, run = shutil.copytree(trained_run, tmp_path / "source"), tmp_path / "run"
    short = ("train.sequence_length=16", "train.micro_batch=8", "train.steps=2")
    assert fira(*words, *short, "--from", source).code == 0
    assert load_pretrained(run).trained_length == load_pretrained(trained_run).trained_length == 32
    line = refused(*words, "train.steps=4", "--resume", "--from", trained_run, code=2)
    assert "was started from" in line and "leave --from out" in line
    shutil.rmtree(source)
    assert fira(*words, "train.steps=4", "--resume").code == 0
    assert len(losses(run)) == 4


def test_what_cannot_be_a_start_is_one_line(trained_run, words, fira, refused, tmp_path):
    assert fira("export", "int8", trained_run, tmp_path / "int8").code == 0
    line = refused(*words, "--from", tmp_path / "int8")
    assert "holds int8 weights, which cannot be trained" in line
    assert "is not a folder" in refused(*words, "--from", tmp_path / "gone")
    assert not list((tmp_path / "run").glob("*"))
