"""Every mistake a user can make with text, runs and folders: one clear line, and nothing lost."""
import json
import os
import shutil

import pyarrow
import pyarrow.parquet
import pytest

from fira.data.text import texts


@pytest.fixture
def step(run, tmp_path):
    """A copy of its newest step, to damage."""
    newest = sorted(run.glob("step-*"))[-1]
    return shutil.copytree(newest, tmp_path / "copy" / newest.name)


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


def broken_sources(folder):
    """Name -> (file, words of the line)."""
    (folder / "empty.txt").write_text("")
    (folder / "latin1.txt").write_bytes("café au lait".encode("latin1"))
    (folder / "dangling.txt").symlink_to(folder / "gone.txt")
    (folder / "table.csv").write_text("a,b\n1,2\n")
    (folder / "notes.doc").write_text("a")
    (folder / "keys.jsonl").write_text('{"text": "fine"}\n{"body": "x"}\n')
    (folder / "cut.jsonl").write_text('{"text": "fine"}\n{"text": "x\n')
    (folder / "none").mkdir()
    (folder / "fake.parquet").write_bytes(b"not a parquet file at all")
    table = pyarrow.table({"content": ["x"], "id": ["1"]})
    pyarrow.parquet.write_table(table, folder / "columns.parquet")
    return {
        "empty.txt": ["0 documents with text", "give files with more text"],
        "latin1.txt": ["latin1.txt:1", "not UTF-8", "0xe9", "character 4", "iconv"],
        "missing.txt": ["does not exist", "give an existing file"],
        "dangling.txt": ["does not exist"],
        "table.csv": ["table.csv:2", "no string under the key text (keys: a, b)", "--text-key"],
        "notes.doc": ["unsupported kind", ".parquet"],
        "keys.jsonl": ["keys.jsonl:2", "no string under the key text", "body", "rename"],
        "cut.jsonl": ["cut.jsonl:2", "not valid JSON"],
        "none": ["holds no text", ".jsonl"],
        "fake.parquet": ["cannot be read to its end as .parquet"],
        "columns.parquet": ["no string under the key text", "content, id", "rename"],
    }


def test_bad_text_is_one_line_in_every_verb_that_reads_text(run, data_folder, refused, tmp_path):
    before = content(run)
    for name, words in broken_sources(tmp_path).items():
        source = tmp_path / name
        for verb in (("data", source, "--tokenizer", data_folder, "--out", tmp_path / f"d-{name}"),
                     ("tokenizer", "train", source, "--out", tmp_path / f"t-{name}"),
                     ("eval", run, "--text", source)):
            line = refused(*verb)
            expected = words if name != "empty.txt" else ["text", "give"]
            assert all(word in line for word in expected), (verb, line)
    assert content(run) == before
    assert not list(tmp_path.glob("d-*/manifest.json")) and not list(tmp_path.glob("t-*/*"))


def test_mended_text_goes_into_the_folder_that_was_begun(data_folder, corpus, fira, refused,
                                                         tmp_path):
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    bad = text / "zz.txt"
    bad.write_bytes(b"\xff")
    words = ("data", text, "--tokenizer", data_folder, "--out", tmp_path / "data",
             "--validation-every", 4)
    assert "not UTF-8" in refused(*words)
    bad.write_text("mended")
    assert fira(*words).code == 0


def test_an_unreadable_file_is_one_line(data_folder, text_file, refused, tmp_path, monkeypatch):
    words = ("data", text_file, "--tokenizer", data_folder, "--out", tmp_path / "data")
    access = os.access
    with monkeypatch.context() as patch:  # root may read everything, so permission is faked
        patch.setattr(os, "access", lambda path, mode: path != str(text_file)
                      and access(path, mode))
        assert f"chmod +r {text_file}" in refused(*words)
    with monkeypatch.context() as patch:
        patch.setattr("fira.data.text.open", _broken_disk, raising=False)
        assert "Input/output error" in refused(*words)


def _broken_disk(*_, **__):
    raise OSError(5, "Input/output error")


def test_one_enormous_line_is_a_document_like_any_other(corpus, data_folder, fira, tmp_path):
    line = " ".join(" ".join(texts([str(corpus)])).split())
    line = (line * (1 + 5_000_000 // len(line)))[:5_000_000]
    (tmp_path / "line.txt").write_text(line, encoding="utf-8")
    (tmp_path / "line.jsonl").write_text(json.dumps({"text": line}), encoding="utf-8")
    for name in ("line.txt", "line.jsonl"):
        out = tmp_path / f"out-{name}"
        answer = fira("data", tmp_path / name, "--tokenizer", data_folder, "--out", out,
                      "--validation", corpus)
        assert answer.code == 0, answer.err
        train = json.loads((out / "manifest.json").read_text())["splits"]["train"]
        assert train["documents"] == 1 and train["bytes"] == len(line.encode())
    shards = [path.read_bytes() for path in sorted(tmp_path.glob("out-*/train-*.bin"))]
    assert len(shards) == 2 and shards[0] == shards[1]


def test_a_folder_that_is_no_run_is_one_line_everywhere(refused, text_file, tmp_path):
    for folder, words in ((tmp_path, "is not a run folder"), (tmp_path / "gone", "gone")):
        for verb in (("generate", folder, "hi"), ("eval", folder, "--text", text_file),
                     ("chat", folder), ("report", folder)):
            assert words in refused(*verb)
    assert "is not a run folder" in refused("show", tmp_path)
    assert "unknown preset" in refused("show", tmp_path / "gone", code=2)


def test_data_that_is_no_data_folder_is_one_line(preset, refused, tmp_path):
    line = refused("train", preset, f"data.folder={tmp_path}", "--run", tmp_path / "run")
    assert "is not a data folder" in line and "fira data SOURCE" in line
    line = refused("train", preset, "--run", tmp_path / "run", code=2)
    assert "data.folder is not set" in line and "fira data SOURCE" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, damage, words", [
    ("model.safetensors", lambda old: old[:-100], "is damaged"),
    ("model.safetensors", lambda old: b"nonsense", "is damaged"),
    ("model.safetensors", lambda old: b"", "is damaged"),
    ("config.json", lambda old: old.replace(b'"fira2"', b'"llama"'), "architecture 'llama'"),
    ("config.json", lambda old: old.replace(b'"d_ff": 32', b'"d_ff": 64'), "config.json says"),
    ("config.json", lambda old: b"{", "not valid JSON"),
    ("tokenizer.json", lambda old: b"{}", "is not a tokenizer.json"),
])
def test_a_damaged_checkpoint_is_one_line(name, damage, words, step, refused):
    file = step / name
    file.write_bytes(damage(file.read_bytes()))
    assert f"{step} is damaged: {name} " in refused("generate", step, "hi")
    (step / "manifest.json").unlink()
    line = refused("generate", step, "hi")
    assert words in line and str(step) in line


FOREIGN = {
    "is a Hugging Face model (llama); a qwen3 or qwen3_moe comes in with fira import hf":
        lambda step: (step / "config.json").write_text('{"model_type": "llama"}'),
    "is a Hugging Face model in several files; bring it in with fira import hf":
        lambda step: (step / "model.safetensors").rename(step / "model.safetensors.index.json"),
    "has its weights in pytorch_model.bin, a pickle, which FIRA never reads":
        lambda step: (step / "model.safetensors").rename(step / "pytorch_model.bin"),
    "has no model.safetensors; copy it back":
        lambda step: (step / "model.safetensors").unlink(),
    "has no tokenizer.json": lambda step: (step / "tokenizer.json").unlink(),
    "tokenizer_config.json is not valid JSON":
        lambda step: (step / "tokenizer_config.json").write_text("{"),
    "config.json is missing": lambda step: (step / "config.json").unlink(),
    "is damaged (Error while deserializing header": lambda step: (
        step / "model.safetensors").write_bytes(b"\x80\x02}q\x00X\x01\x00\x00\x00"),
}


@pytest.mark.parametrize("words", FOREIGN)
def test_a_model_folder_with_a_missing_or_foreign_file_is_one_line_in_every_verb(
        words, step, preset, data_folder, text_file, refused, tmp_path):
    (step / "manifest.json").unlink()
    FOREIGN[words](step)
    before = content(step)
    for verb in (("generate", step, "hi"), ("chat", step), ("serve", step, "--port", 0),
                 ("eval", step, "--text", text_file), ("export", "hf", step, tmp_path / "x"),
                 ("export", "int8", step, tmp_path / "x"),
                 ("train", preset, f"data.folder={data_folder}", "--run", tmp_path / "x", "--from",
                  step)):
        line = refused(*verb)
        assert words in line and str(step) in line, (verb, line)
        assert not (tmp_path / "x").exists() or not any((tmp_path / "x").glob("[!.]*"))
    assert content(step) == before


def test_a_file_in_the_place_of_a_run_is_one_line(refused, tmp_path, text_file):
    for name in ("model.bin", "model.safetensors", "model.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
        for verb in (("generate", tmp_path / name, "hi"), ("chat", tmp_path / name),
                     ("eval", tmp_path / name, "--text", text_file), ("serve", tmp_path / name),
                     ("export", "hf", tmp_path / name, tmp_path / "x")):
            line = refused(*verb)
            words = ("llama-server -m", "Ollama") if name[-4:] == "gguf" else ("is not a folder",)
            assert all(word in line for word in words)
        assert "config.json is missing" in refused("import", "hf", tmp_path / name, tmp_path / "x")


def test_the_other_architectures_class_refuses_the_checkpoint(run):
    from fira import FIRA

    with pytest.raises(ValueError, match=r"holds a FIRA2, not a FIRA; use FIRA2\.from_pretrained"):
        FIRA.from_pretrained(run)


def test_an_unusable_prompt_context_or_device_is_one_line(run, text_file, refused):
    assert "the prompt is empty; give the text to continue" in refused("generate", run, "")
    line = refused("eval", run, "--text", text_file, "--context", 65)
    assert "context=65 must be from 1 to the model's 64" in line
    assert "choose auto, cpu" in refused("generate", run, "hi", "--device", "tpu")


def test_a_folder_that_cannot_be_written_is_one_line_before_the_work(
        preset, data_folder, corpus, text_file, refused):
    below_a_file = text_file / "out"  # also root cannot make a folder there
    before = text_file.read_bytes()
    for verb in (("tokenizer", "train", corpus, "--vocab-size", 600, "--out", below_a_file),
                 ("data", corpus, "--tokenizer", data_folder, "--out", below_a_file),
                 ("train", preset, f"data.folder={data_folder}", "--run", below_a_file)):
        line = refused(*verb)
        assert str(text_file) in line and "Not a directory" in line, line
        assert "folder" in line or "permissions" in line
    assert text_file.read_bytes() == before
