"""Files from strangers: each is read in bounded time and memory, or refused in one line."""
import json
import os
import shutil
import subprocess
import sys

import pytest

from fira.data import encoder
from fira.data.bounds import is_linear
from fira.data.tokenizer import Tokenizer
from fira.files import check_files
from fira.runlog import console

CASED = [r"[^\r\n\p{L}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+", r"[^\r\n\p{L}]?[\p{Lu}\p{M}]+[\p{Ll}\p{M}]*"]
LINEAR = [*encoder.PATTERNS, "|".join(CASED), r"\p{N}{1,3}", r"[一-龥぀-ゟ]+", r" ?[^(\s|[.,!?…])]+",
          r"(?i:'s|'t)?[\p{Lu}&&[^\p{Han}]]+[\r\n/]*", r"\s*[\r\n]+|\s+\z|\s+(?!\S)|\s+"]
SLOW = [r"(a|a)*\p{N}", r"a*\p{N}", r"a*a*\p{N}", r"\s+$", r"\s*[\r\n]+|\s|\s+", CASED[0],
        "a?a?a?a?a?b", "(?:a|b)+", "[^]a]*b", "a{1,1000}", "a+(?!b)", "(?x)a*b", ".*b", "(a*b)",
        "|".join("a" * 99)]
STEPS = {
    "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}] * 30},
    "decoder": {"type": "Replace", "pattern": {"Regex": "(a|a)*b"}, "content": ""},
    "post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                       "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 99}}


@pytest.mark.parametrize("regex, linear", [*((one, True) for one in LINEAR),
                                           *((one, False) for one in SLOW)])
def test_a_pattern_is_accepted_if_its_form_bounds_its_time(regex, linear):
    assert is_linear(regex) == linear


@pytest.mark.parametrize("part", STEPS)
def test_steps_whose_work_grows_faster_than_the_text_are_refused(part, data_folder, tmp_path):
    description = json.loads((data_folder / "tokenizer.json").read_text()) | {part: STEPS[part]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=f"its {part} has .*use another one"):
        Tokenizer.load(tmp_path)


def test_links_and_pipes_are_followed_as_far_as_a_hub_cache_needs(run, fira, refused, tmp_path):
    step, cache = max(run.glob("step-*")), tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "1f").mkdir(parents=True)
    for number, path in enumerate(step.iterdir()):
        shutil.copy(path, cache / "blobs" / str(number))
        (cache / "snapshots" / "1f" / path.name).symlink_to(f"../../blobs/{number}")
    assert fira("generate", cache / "snapshots" / "1f", "a", "--max-new-tokens", 1).code == 0
    outside = shutil.copytree(cache / "snapshots" / "1f", tmp_path / "x", symlinks=True)
    for path in outside.iterdir():
        path.unlink()
        path.symlink_to(step / path.name)
    (outside / "manifest.json").unlink()
    assert f"leads out of {outside}" in refused("generate", outside, "a")
    (outside / "config.json").unlink()
    os.mkfifo(outside / "config.json")
    assert "is not a regular file" in refused("generate", outside, "a")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_differs_from_its_manifest_is_not_used(name, run, fira, refused, tmp_path):
    assert fira("export", "hf", run, tmp_path / "hf").code == 0
    step = shutil.copytree(max(run.glob("step-*")), tmp_path / "step-000010")
    for folder, verb in ((step, ("generate", step, "a")),
                         (tmp_path / "hf", ("import", "hf", tmp_path / "hf", tmp_path / "again"))):
        content = bytearray((folder / name).read_bytes())
        content[content.rindex(b"2" if name == "config.json" else content[-9:-8])] ^= 1
        (folder / name).write_bytes(content)
        assert {file: why for file, ok, why in check_files(folder) if not ok} == {
            name: "was altered"}
        assert f"{folder} is damaged: {name} was altered" in refused(*verb)


def test_a_terminal_shows_escape_sequences_and_a_pipe_gets_them(capsys):
    for terminal, shown in ((True, "a\\x1b[2J\\x9b[b]\n"), (False, "a\x1b[2J\x9b[b]\n")):
        console(force_terminal=terminal, stderr=False).print("a\x1b[2J\x9b[b]")
        assert capsys.readouterr().out == shown


def test_readers_load_mutated_files_or_raise_one_line():
    """A thousand cases; a longer run is the same program with another number."""
    ended = subprocess.run([sys.executable, "-m", "tests.fuzz"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
