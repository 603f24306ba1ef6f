"""The founding document's usage: its training script, its imports and its calls work as written."""
import contextlib
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

import training_with_MoE
from Fira import FIRA
from fira.cli.command import run_command
from fira.data.text import texts
from fira.data.tokenizer import Tokenizer, train_tokenizer
from fira.stages.founding import find_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"vocab_size": 640, "d_model": 32, "n_head": 2, "num_layers": 2, "d_ff": 64}
MICRO = [*(f"model.{key}={value}" for key, value in SHAPE.items()), "model.context=64",
         "train.sequence_length=32", "train.batch_tokens=256", "train.steps=6",
         "train.save_every=3", "train.validation_tokens=512"]
FINEWEB_EDU = {"id": "a", "dump": "CC-MAIN-2024-10", "url": "https://example.org",
               "file_path": "s3", "language": "en", "language_score": 0.97,
               "token_count": 7, "score": 3.1, "int_score": 3}


def write_parquet(path, documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, **FINEWEB_EDU} for text in documents]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def documents(corpus):
    return [text[start:start + 3000] for text in texts([str(corpus)])
            for start in range(0, len(text), 3000)]


@pytest.fixture(scope="module")
def kaggle(documents, tmp_path_factory):
    """A folder as Kaggle mounts it: two data sets, side by side with files that are no text."""
    folder = tmp_path_factory.mktemp("kaggle") / "input"
    half = len(documents) // 2
    write_parquet(folder / "fineweb-edu" / "000_00000.parquet", documents[:half])
    write_parquet(folder / "fineweb-edu" / "001_00000.parquet", documents[half:])
    (folder / "fineweb-edu" / "README.md").write_text("no training text")
    train_tokenizer(documents, 600).save(folder / "my-tokenizer" / "v1")
    (folder / "my-tokenizer" / "v1" / "merges.txt").write_text("no training text")
    return folder


def script(search, folder, *words, code=0):
    """What `python training_with_MoE.py WORDS` says, run in `folder` with another search folder."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.chdir(folder)
        patch.setattr(training_with_MoE, "SEARCH", search)
        patch.setattr(sys, "argv", ["training_with_MoE.py", *words])
        with pytest.raises(SystemExit) as ended:
            run_command(training_with_MoE.train, "training_with_MoE.py")
    assert ended.value.code == code, said.getvalue()
    return said.getvalue()


def script_in_a_process(search, folder, *words):
    """The same as a program of its own, with what it says."""
    start = (f"import sys; from pathlib import Path; sys.path.insert(0, {str(ROOT)!r}); "
             f"import training_with_MoE as door; door.SEARCH = Path({str(search)!r}); "
             "door.run_command(door.train, 'training_with_MoE.py')")
    done = subprocess.run([sys.executable, "-c", start, *words], cwd=folder, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def trained(kaggle, tmp_path_factory):
    """The folder in which the script ran, and what it said."""
    folder = tmp_path_factory.mktemp("working")
    return folder, script_in_a_process(kaggle, folder, *MICRO)


@pytest.fixture
def working(trained, kaggle, monkeypatch):
    """In that folder, with the door's state fresh."""
    monkeypatch.chdir(trained[0])
    monkeypatch.setattr(training_with_MoE, "SEARCH", kaggle)
    monkeypatch.setattr(training_with_MoE, "_tokenizer", None)
    return trained[0] / "out" / "fira-334m"


def test_the_script_trains_on_what_it_finds_and_says_where_the_results_are(trained, documents):
    folder, words = trained
    run = folder / "out" / "fira-334m"
    with open(run / "training_log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == list("123456")
    assert float(rows[-1]["val_bits_per_byte"]) > 0
    assert (run / "training_progress.png").read_bytes().startswith(b"\x89PNG")
    assert f"training_log.csv: {run / 'training_log.csv'}" in words
    assert f"training_progress.png: {run / 'training_progress.png'}" in words
    assert 'FIRA.from_pretrained("out/fira-334m")' in words
    splits = json.loads((run / "data" / "manifest.json").read_text())["splits"]
    assert sum(split["documents"] for split in splits.values()) == len(documents)


def test_the_founding_calls_work_on_that_run(working, documents):
    from training_with_MoE import decode, encode

    prompt = "The state of the Union is"
    assert isinstance(encode(prompt), list) and decode(encode(prompt)) == prompt
    model = FIRA.from_pretrained(working)
    ids = model.generate(encode(prompt), max_new_tokens=32, temperature=1.0, top_k=50)
    assert decode(ids[0].tolist()).startswith(prompt)


def test_weights_load_in_the_plain_way_and_give_the_same_model(working):
    plain = FIRA(**SHAPE, num_experts=4, context=64)
    step = sorted(working.glob("step-*"))[-1]
    plain.load_state_dict(load_file(step / "model.safetensors"))
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(plain.eval()(tokens), FIRA.from_pretrained(working)(tokens))


def test_a_second_start_asks_for_resume_and_resuming_continues(trained, kaggle, tmp_path):
    folder = trained[0]
    words = script(kaggle, folder, *MICRO, code=1)
    assert "already holds a run; --resume continues it" in words.splitlines()[-1]
    words = script(kaggle, folder, "--resume", "--out", str(tmp_path / "run"), *MICRO)
    assert "nothing to resume" in words
    words = script(kaggle, folder, "--resume", "--out", str(tmp_path / "run"), "train.steps=8")
    assert "resuming after step 6" in words


def test_the_founding_model_at_its_full_size(working):
    from training_with_MoE import decode, encode

    model = FIRA(vocab_size=50304, d_model=768, n_head=12, num_layers=12, d_ff=3072, num_experts=4)
    assert sum(parameter.numel() for parameter in model.parameters()) == 334_740_144
    prompt = "Fellow citizens"
    text = decode(model.generate(encode(prompt), max_new_tokens=32, temperature=1.0,
                                 top_k=50)[0].tolist())
    assert text.startswith(prompt)


def test_without_data_the_script_says_what_it_looked_for_and_what_to_run(tmp_path):
    line = one_line(script(tmp_path / "nothing", tmp_path, code=1))
    assert f"no data in {tmp_path / 'nothing'} (there is no such folder)" in line
    assert ".parquet" in line and "--data FILE_OR_FOLDER" in line
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_setting_is_refused_before_any_work(kaggle, tmp_path):
    line = one_line(script(kaggle, tmp_path, "model.num_expert=4", code=2))
    assert "did you mean model.num_experts" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asked", [640, 20_000])
def test_without_a_tokenizer_one_is_learned_of_the_size_that_the_text_supports(documents, tmp_path,
                                                                              asked):
    write_parquet(tmp_path / "input" / "text.parquet", documents)
    words = script(tmp_path / "input", tmp_path, *MICRO, f"model.vocab_size={asked}")
    assert "learning one from the data" in words
    learned = Tokenizer.load(tmp_path / "out" / "fira-334m" / "data").vocab_size
    assert learned == 640 if asked == 640 else 640 < learned < asked


def test_prepared_data_is_taken_as_it_is_and_only_with_its_own_tokenizer(
        data_folder, kaggle, tmp_path):
    words = script(tmp_path, tmp_path, "--data", str(data_folder), *MICRO)
    assert f"data: {data_folder}" in words and not (tmp_path / "out/fira-334m/data").exists()
    other = kaggle / "my-tokenizer" / "v1"
    words = script(tmp_path, tmp_path, "--data", str(data_folder), "--tokenizer", str(other),
                   "--out", "out/other", *MICRO, code=1)
    assert "was made with tokenizer" in words.splitlines()[-1]


def test_a_tokenizer_larger_than_the_model_is_refused_before_the_text_is_read(kaggle, tmp_path):
    words = script(kaggle, tmp_path, *MICRO, "model.vocab_size=512", code=2)
    assert "model.vocab_size=512 is smaller than the tokenizer's 600" in words.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_encode_says_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training_with_MoE, "SEARCH", tmp_path / "input")
    monkeypatch.setattr(training_with_MoE, "_tokenizer", None)
    with pytest.raises(ValueError) as error:
        training_with_MoE.encode("text")
    for word in (str(tmp_path), "out/fira-334m", str(tmp_path / "input"), "use_tokenizer(PATH)",
                 "fira tokenizer train"):
        assert word in str(error.value)


def test_use_tokenizer_decides_and_the_current_folder_goes_before_the_rest(working, monkeypatch,
                                                                          tmp_path, documents):
    assert find_tokenizer(training_with_MoE.SEARCH, working).parent.name == "step-000006"
    small = train_tokenizer(documents, 300)
    small.save(tmp_path)
    training_with_MoE.use_tokenizer(tmp_path / "tokenizer.json")
    assert training_with_MoE.encode("States") == small.encode("States")
    monkeypatch.chdir(tmp_path)
    assert find_tokenizer(training_with_MoE.SEARCH, working) == Path("tokenizer.json")


def test_different_tokenizers_are_not_guessed_among(documents, tmp_path):
    for size in (300, 310):
        train_tokenizer(documents, size).save(tmp_path / str(size))
    with pytest.raises(ValueError, match="different tokenizers.*--tokenizer"):
        find_tokenizer(tmp_path, tmp_path / "run")


def one_line(words):
    assert words.count("\n") == 1, words
    return words
