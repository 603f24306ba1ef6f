"""The command line, as a newcomer meets it: help, usage, and the whole path from text to report."""
import json
import subprocess
import sys
from io import BytesIO, StringIO, TextIOWrapper

import pytest

from fira import cli
from fira.stages.reason import TASKS


def test_help_answers_without_torch():
    script = ("import sys, fira.cli; sys.argv = ['fira', '--help']\n"
              "try: fira.cli.main()\nexcept SystemExit: pass\n"
              "print([name for name in ('torch', 'numpy', 'pyarrow', 'pydantic', 'rich')"
              " if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]" and "quickstart" in done.stdout


@pytest.mark.parametrize("width", [80, 100])
def test_help_lists_every_verb_once_under_its_heading(fira, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = fira("--help").out.splitlines()
    listed = lines[lines.index("Prepare:"):]
    assert [line.split()[0].rstrip(":") for line in listed if line] == [
        name for heading, verbs in cli.VERBS.items()
        for name in (heading, *(verb.name for verb in verbs))]
    assert max(map(len, lines)) <= width and "..." not in "".join(listed)


def test_dry_run_prints_what_differs_and_makes_nothing(fira, tmp_path):
    answer = fira("train", "tiny", "optim.lr=0.001", "--dry-run", "--run", tmp_path / "run")
    assert answer.code == 0 and "optim.lr = 0.001   # preset: 0.01" in answer.out
    assert answer.out.count("# preset:") == 1 and not (tmp_path / "run").exists()


def test_debug_shows_the_traceback_wherever_it_stands(tmp_path):
    for words in (["--debug", "report", "nowhere"], ["report", "nowhere", "--debug"]):
        done = subprocess.run([sys.executable, "-m", "fira", *words], capture_output=True,
                              text=True, cwd=tmp_path)
        assert done.returncode == 1 and "Traceback" in done.stderr
        assert "ValueError: nowhere" in done.stderr


def test_text_becomes_tokenizer_data_and_a_run(corpus, preset, fira, tmp_path):
    tokenizer, data = tmp_path / "tokenizer", tmp_path / "data"
    assert fira("tokenizer", "train", corpus, "--vocab-size", 600, "--out", tokenizer).code == 0
    assert fira("data", corpus, "--tokenizer", tokenizer, "--out", data,
                "--validation-every", 4).code == 0
    answer = fira("train", preset, f"data.folder={data}", "train.steps=2", "--run",
                  tmp_path / "run")
    assert answer.code == 0, answer.err
    assert {"training_log.csv", "training_progress.png", "metrics.jsonl", "config.json",
            "step-000002", ".lock"} == {path.name for path in (tmp_path / "run").iterdir()}


def test_generate_starts_with_the_prompt_and_repeats_if_seeded_or_greedy(run, fira):
    words = ("generate", run, "The state", "--max-new-tokens", 20)
    first, again, other = (fira(*words, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again != other and first.startswith("The state")
    assert fira(*words, "--temperature", 0).out == fira(*words, "--temperature", 0).out


def test_generate_reads_its_prompt_from_any_place_and_ends_at_a_stop_text(
        run, fira, monkeypatch, tmp_path):
    (tmp_path / "prompt.txt").write_text("The state\n")
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"The state\r\n")))
    words = ("--max-new-tokens", 8, "--temperature", 0, "--json")
    first, *others = (json.loads(fira("generate", run, *prompt, *words).out) for prompt in (
        ["The state"], ["-"], ["--file", tmp_path / "prompt.txt"]))
    assert others == [first, first]
    assert (first["finish_reason"], first["completion_tokens"]) == ("length", 8)
    stop = first["text"][3:5]
    cut = json.loads(fira("generate", run, "The state", *words, "--stop", "~", "--stop", stop).out)
    assert cut["finish_reason"] == "stop" and cut["text"] == first["text"].partition(stop)[0]


def test_chat_answers_each_line_of_a_pipe(run, fira, monkeypatch):
    monkeypatch.setattr(sys, "stdin", StringIO("Fellow citizens,\n/reset\nOur army\n/exit\nno\n"))
    answer = fira("chat", run, "--seed", 1, "--max-new-tokens", 8)
    assert answer.code == 0 and answer.out.strip()
    assert "starts anew" in answer.err and "not tuned for chat" in answer.err


def test_eval_prints_one_json_object(run, text_file, fira):
    answer = fira("eval", run, "--text", text_file, "--json")
    result = json.loads(answer.out)
    assert answer.code == 0 and result["bytes"] == text_file.stat().st_size
    assert 0 < result["bits_per_byte"] < 9
    plain = fira("eval", run, "--text", text_file).out
    assert f"bits per byte: {result['bits_per_byte']}" in plain


def test_report_and_show_read_the_run(run, fira):
    answer = fira("report", run)
    assert answer.code == 0
    for name in ("training_progress.png", "routing.png", "report.html"):
        assert str(run / name) in answer.out and (run / name).stat().st_size > 0
    shown = fira("show", run)
    assert shown.code == 0 and "active" in shown.out and "Routing at step 10" in shown.out
    assert "334,740,144" in fira("show", "fira-334m").out


def test_resume_of_a_finished_run_changes_nothing(run, preset, fira):
    def content():
        return {path: path.read_bytes() for path in sorted(run.glob("step-*"))[-1].iterdir()}
    before = content()
    answer = fira("train", preset, "--run", run, "--resume")
    assert answer.code == 0, answer.err
    assert content() == before


@pytest.mark.parametrize("verb", ["tune", "distill", "rl"])
def test_a_run_resumes_with_a_setting_in_the_place_of_the_model(verb, refused, tmp_path):
    assert "holds no run to resume" in refused(
        verb, "train.steps=3", "--resume", "--run", tmp_path / "run", code=2)


def test_help_of_reason_names_its_tasks(fira):
    assert ",".join(TASKS) in "".join(fira("reason", "--help").out.split())


@pytest.mark.parametrize("verb", ["train", "show"])
def test_a_wrong_setting_is_one_line_and_exit_code_2(verb, refused):
    line = refused(verb, "fira-334m", "optim.learning_rate=1", code=2)
    assert "unknown key optim.learning_rate; did you mean optim.lr?" in line


@pytest.mark.parametrize("words, expected", [
    (["trian"], ["No such command 'trian'", "Did you mean", "fira --help"]),
    (["train"], ["Missing argument 'PRESET'", "fira train --help"]),
    (["train", "tinny"], ["unknown preset 'tinny'", "did you mean tiny", "fira-334m"]),
    (["train", "nowhere.toml"], ["nowhere.toml does not exist", "tiny"]),
    (["generate", "run", "hi", "--top-k", "0"], ["'--top-k'", "x>=1"]),
    (["generate", "run", "hi", "--top-p", "1.5"], ["'--top-p'", "0<x<=1"]),
    (["generate", "run"], ["give the prompt as PROMPT or by --file FILE"]),
    (["eval", "run"], ["give --text, or --suite", "fira eval --help"]),
    (["eval", "run", "--text", "a.txt", "--task", "b.jsonl"], ["give --text, or --suite"]),
    (["data", "sotu", "--out", "x"], ["Missing option '--tokenizer'"]),
])
def test_wrong_usage_is_one_line_and_exit_code_2(words, expected, refused):
    line = refused(*words, code=2)
    assert all(word in line for word in expected), line


def test_a_preset_file_that_is_no_toml_is_one_line(refused, tmp_path):
    path = tmp_path / "wrong.toml"
    for wrong in (b"\xff\xfe", b"[model"):
        path.write_bytes(wrong)
        assert f"{path} is not valid TOML" in refused("train", path, code=2)
