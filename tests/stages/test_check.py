"""`fira check` finds what was altered in any folder that FIRA writes."""
import shutil

import pytest

from fira.convert.gguf import export_run as export_gguf
from fira.convert.hf import export_run as export_hf
from fira.runlog import console

LATE, EARLY = -7, 40  # bytes that are altered, from the end or from the beginning


@pytest.fixture(scope="module")
def places(run, data_folder, tmp_path_factory):
    """Kind -> what `fira check` is given."""
    folder = tmp_path_factory.mktemp("places")
    tokenizer = folder / "tok"
    tokenizer.mkdir()
    shutil.copyfile(data_folder / "tokenizer.json", tokenizer / "tokenizer.json")
    export_hf(run, folder / "hf", None, console())
    export_gguf(run, folder / "x.gguf", "f16", console())
    return {"run": run, "step": run / "step-000010", "data": data_folder, "tok": tokenizer,
            "hf": folder / "hf", "gguf": folder / "x.gguf"}


@pytest.mark.parametrize("kind,name,place", [
    ("run", "step-000010/model.safetensors", LATE),
    ("run", "metrics.jsonl", 0),
    ("run", "config.json", 0),
    ("step", "optimizer.safetensors", LATE),
    ("step", "tokenizer.json", LATE),
    ("data", "train-00000.bin", LATE),
    ("data", "manifest.json", EARLY),
    ("tok", "tokenizer.json", EARLY),
    ("hf", "model.safetensors", LATE),
    ("gguf", ".", 0),
])
def test_an_altered_byte_is_found(kind, name, place, places, tmp_path, fira):
    path = tmp_path / places[kind].name
    copy = shutil.copytree if places[kind].is_dir() else shutil.copyfile
    copy(places[kind], path)
    whole = fira("check", path)
    assert whole.code == 0 and all(line.endswith(" ok") for line in whole.out.splitlines())
    file = path / name
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    found = fira("check", path)
    faults = [line for line in found.out.splitlines() if not line.endswith(" ok")]
    assert found.code == 1 and faults
    assert all(name.strip(".") in line or "opens" in line for line in faults)
    assert f"checks of {path} failed" in found.line


def test_what_cannot_be_checked_is_one_line(tmp_path, refused):
    assert "holds nothing to check" in refused("check", tmp_path)
    assert "holds nothing to check" in refused("check", tmp_path / "none")
