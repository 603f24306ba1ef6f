"""A run is claimed before it is touched, and never begun again over existing work."""
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from fira import runtime
from fira.runlog import read_rows
from tests.parallel.ranks import free_port
from tests.test_bad_input import content


@pytest.fixture
def finished(trained_run, tmp_path):
    """A run of 10 steps, saved after 5 and 10, to write into."""
    return shutil.copytree(trained_run, tmp_path / "run")


def start(ranks, *words):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                str(free_port())] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *launcher, "-m", "fira", *map(str, words)], text=True,
                            stderr=subprocess.PIPE)


@pytest.mark.parametrize("ranks, starts", [(1, 2), (2, 1)])
def test_a_second_start_leaves_the_first_alone(ranks, starts, preset, data_folder, tmp_path):
    run = tmp_path / "run"
    words = ("train", preset, f"data.folder={data_folder}", "train.save_every=1", "--run-folder",
             run, "train.micro_batch=2", "train.steps=100000", "--device", "cpu", "--resume")
    first = start(ranks, *words)
    while not (run / "step-000003").exists():
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.01)
    for _ in range(starts):
        second = start(ranks, *words)
        said = second.communicate(timeout=120)[1]
        holder = rf"^fira: another process is writing to {run} \(process \d+ on .+\); wait until"
        assert second.returncode == 1 and len(re.findall(holder, said, re.M)) == ranks, said
    first.send_signal(signal.SIGTERM)
    assert "everything is saved" in first.communicate(timeout=120)[1]
    steps = [row["step"] for row in read_rows(run) if row["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1)) and not [*run.glob(".step-*")]


def test_readers_leave_a_save_under_way_alone(finished, fira, text_file, tmp_path):
    (finished / ".step-000015.partial").mkdir()
    (finished / ".step-000015.partial" / "model.safetensors").write_bytes(b"a part")
    before = content(finished)
    with runtime.claim(finished):
        for words in (["generate", finished, "hi"], ["eval", finished, "--text", text_file],
                      ["show", finished], ["export", "hf", finished, tmp_path / "hf"]):
            assert fira(*words).code == 0
        assert fira("train", "--run", finished, "--resume").code == 1
        assert content(finished) == before
        assert fira("report", finished).code == 0  # which writes pictures into the run
    after = content(finished)
    assert all(after[name] == before[name] for name in before if not str(name).endswith(".png"))


def swap(old, new):
    return lambda path: path.write_text(re.sub(old, new, path.read_text(), count=1))


zero = partial(Path.write_bytes, data=b"\0" * 100)
REFUSED = [  # the words of the line, what is changed, how, a setting
    (r"step-000010: optimizer\S+ is missing.*--from", "step-*/optimizer*", Path.unlink, ""),
    (r"step-000010: manifest.json is missing.*--from", "step-*/[mos]*[ert].json", Path.unlink, ""),
    (r"model.safetensors has 100 bytes.*\); put the files back", "step-*/model*", zero, ""),
    ("damaged: set aside.* --from", "step-*", lambda step: step.rename(f"{step}.damaged"), ""),
    (r"no whole checkpoint to resume \(no step folder\); put", "step-*", shutil.rmtree, ""),
    (r"holds metrics.jsonl but no config.json", "config.json", Path.unlink, ""),
    (r"run/config.json is not valid JSON .*; restore.* --from", "config.json", zero, ""),
    (r"run/config.json is not the record", "config.json", swap("preset", "preseu"), ""),
    (r"run/config.json: unknown key optin.* --from", "config.json", swap("optim", "optin"), ""),
    *((words, "none", zero, setting) for words, setting in (
        (r"optim.rule=muon cannot change .* adamw", "optim.rule=muon"),
        (r"model.d_ff=64 cannot change .* 32", "model.d_ff=64"),
        (r"train.seed=2 cannot change .* 1;", "train.seed=2"),
        (r"2\.5 times the length given now; give a longer one", "train.steps=4"),
        (r"gone is not .* give data.folder=DIR, where it is now", "data.folder=gone"),
        (r"was started from preset .*, not tiny; leave the preset out", "tiny")))]


@pytest.mark.parametrize("words, pattern, change, setting", REFUSED)
def test_what_cannot_be_resumed_is_refused_with_nothing_touched(
        words, pattern, change, setting, finished, preset, data_folder, fira, tmp_path):
    for path in [*finished.glob(pattern)]:
        change(path)
    before = content(finished)
    answer = fira("train", setting or "train.steps=12", "--resume", "--run", finished)
    assert answer.code in (1, 2) and re.search(words, answer.line), answer.err
    assert content(finished) == before
    if advised := re.search(r"weights with --from (\S+)$", answer.line):
        assert fira("train", preset, f"data.folder={data_folder}", "train.steps=1", "--run",
                    tmp_path / "new", "--from", advised[1]).code == 0


LISTED = r'"optimizer\S+ \{[^}]*\},'
MENDED = [  # the words that are said, what is changed, how
    (r"damaged \(manifest.json is missing or unreadable\); it is now step-000010.damaged, and step-"
     "000005 is used", "step-*10/manifest.json", swap("bytes", "bytds")),
    ("model.safetensors has 100 bytes, not", "step-*10/model*", zero),
    ("does not list optimizer.safetensors", "step-*10/manifest.json", swap(LISTED, "")),
    ("resuming after step 10: 83%", "n", lambda run: (run / ".step-12").symlink_to(run.parent)),
    ("line 2 is damaged .* as it was is now", METRICS := "metrics.jsonl", swap("\n{", "\n{{")),
    (r"line \d+ is damaged", METRICS, lambda path: path.write_bytes(path.read_bytes() + b"\0\0")),
    (r"line 1 is damaged", METRICS, zero)]


@pytest.mark.parametrize("words, pattern, change", MENDED)
def test_damage_beside_a_whole_checkpoint_is_set_aside(words, pattern, change, finished, fira):
    change(next(finished.glob(pattern), finished))
    record = (finished / METRICS).read_bytes()
    answer = fira("train", "train.steps=12", "--resume", "--run", finished)
    assert answer.code == 0 and re.search(words, answer.err), answer.err
    steps = [row["step"] for row in read_rows(finished) if row["kind"] == "step"]
    assert steps[-2:] == [11, 12] and (finished / "step-000012").is_dir()
    if pattern == METRICS:
        assert (finished / "metrics.jsonl.damaged").read_bytes() == record


@pytest.mark.parametrize("name, text", [
    ("training_log.csv", "step,mine\n"), ("step-000100/notes.txt", "mine"),
    ("model.safetensors", "theirs"), ("config.json", '{"model_type": "qwen3_moe"}')])
def test_a_folder_that_others_use_is_refused(name, text, preset, data_folder, refused, tmp_path):
    file, run = tmp_path / "run" / name, tmp_path / "run"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    for resume in ([], ["--resume"]):
        line = refused("train", preset, f"data.folder={data_folder}", "--run", run, *resume)
        assert name.partition("/")[0] in line and "choose another --run folder" in line
    assert content(run) == {file: text.encode()}


def test_a_moved_run_is_resumed(preset, data_folder, fira, refused, tmp_path, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(data_folder, home / "data")
    shutil.copy(preset, home / "own.toml")
    monkeypatch.chdir(home)
    assert fira("train", "own.toml", "data.folder=data", "train.steps=2", "--run", "r").code == 0
    shutil.move("r", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    words = ("train", "--resume", "--run", "moved", "train.steps=3")
    assert fira(*words).code == 0
    assert "the run is done after step 3" in fira(*words).err
    shutil.move(home / "data", "elsewhere")
    assert f"{home / 'data'} is not a data folder" in refused(*words)
    assert fira("train", home / "own.toml", "data.folder=elsewhere", *words[1:]).code == 0
    assert "holds no run to resume" in refused("train", "--resume", "--run", "gone", code=2)
