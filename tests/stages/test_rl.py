"""Reinforcement on the model's own answers: it learns, resumes exactly, is the same on two ranks,
and refuses."""
import json
import multiprocessing
import os
import signal
from functools import partial

import pytest
import torch
from rich.console import Console

from fira.files import sha256
from fira.model import load_pretrained
from fira.runlog import read_rows
from fira.stages.rl import rl
from fira.stages.start import tune
from fira.train.loop import Loop
from tests.parallel.ranks import on_ranks

WORDS = "war peace law work land".split()
SETTINGS = "train.sequence_length=64", "train.batch_tokens=512", "train.micro_batch=4"
MORE = {"kl": 0.1, "replay": True}


def write(path, count, start=0, wrong=False, **changes):
    """Rows whose answer is the word asked for; if `wrong`, half of them have the next word."""
    path.write_text("".join(json.dumps({
        "messages": [{"role": "user", "content": f"Say {n} {WORDS[n % 5]}"},
                     {"role": "assistant", "content": WORDS[(n + wrong * (n // 5 % 2)) % 5]}],
        "answer": WORDS[n % 5]} | changes) + "\n" for n in range(start, start + count)))
    return path


def rl_run(rank, start, files, run, *settings, resume=False, options=()):
    sections = {"tune": {"method": "full"},
                "rl": {"prompts": 8, "group": 8, "max_new": 6} | dict(options),
                "data": {"tasks": [str(files[0])], "held_out": [str(files[1])], "reward": None}}
    own = () if resume else (*SETTINGS, "train.steps=20", "train.save_every=4", "optim.lr=1.5e-3")
    rl(None if resume else start, sections, [*own, *settings], run, "cpu", resume,
       Console(quiet=True))


@pytest.fixture(scope="module")
def made(trained_run, tmp_path_factory):
    """A chat model that is right about half of the time, files of tasks, and a run."""
    folder = tmp_path_factory.mktemp("rl")
    tune(trained_run, {"tune": {"method": "full"}, "data": {
        "chat": [str(write(folder / "chat.jsonl", 600, wrong=True))]}}, 1.0, [
            *SETTINGS, "train.steps=150", "train.save_every=150", "optim.lr=1e-2"],
        folder / "chat", "cpu", False, Console(quiet=True))
    files = (write(folder / "train.jsonl", 60, start=600),
             write(folder / "held_out.jsonl", 15, start=900))
    rl_run(0, folder / "chat", files, folder / "run")
    return folder / "chat", files, folder / "run"


def rows(run, kind):
    return [{name: value for name, value in row.items() if "second" not in name}
            for row in read_rows(run) if row["kind"] == kind]


def test_rewards_rise_in_a_few_steps(made):
    steps = rows(made[2], "step")
    first, end = (sum(row["reward"] for row in some) / 3 for some in (steps[:3], steps[-3:]))
    assert first < 0.7 and end > first + 0.25
    assert max(row["gap_max"] for row in steps) < 1e-4


def die(start, files, run):
    step = Loop._step
    Loop._step = lambda loop, line: (os.kill(os.getpid(), signal.SIGKILL) if loop.state.step == 6
                                     else step(loop, line))
    rl_run(0, start, files, run)


def test_a_run_killed_after_a_rollout_ends_as_if_it_had_not_been(made, tmp_path):
    (start, files, calm), run = made, tmp_path / "run"
    process = multiprocessing.get_context("fork").Process(target=die, args=(start, files, run))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and (run / "step-000004").is_dir()
    config = (run / "config.json").read_text()
    other = write(tmp_path / "other.jsonl", 12, start=80), files[1]
    (run / "config.json").write_text(config.replace(str(files[0]), str(other[0])))
    with pytest.raises(ValueError, match="begun with other tasks"):
        rl_run(0, start, other, run, resume=True)
    (run / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"was begun with --tasks .*train.jsonl; leave --tasks"):
        rl_run(0, start, other, run, resume=True)
    rl_run(0, start, files, run, resume=True)
    for kind in ("step", "validation"):
        assert rows(run, kind) == rows(calm, kind)
    for name in ("model", "optimizer"):
        assert sha256(run / f"step-000020/{name}.safetensors") == sha256(
            calm / f"step-000020/{name}.safetensors")


def test_two_ranks_equal_one_in_samples_rewards_and_weights(made, tmp_path):
    (start, files, _), runs = made, (tmp_path / "one", tmp_path / "two")
    rl_run(0, start, files, runs[0], "train.steps=2", options=MORE)
    on_ranks(2, partial(rl_run, options=MORE), start, files, runs[1], "train.steps=2",
             "train.micro_batch=2", join=False)
    for one, two in zip(*(rows(run, "step") for run in runs), strict=True):
        for name in ("reward", "signal", "answer_tokens", "entropy", "loss", "grad_norm", "kl"):
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-5), name
    torch.testing.assert_close(*(load_pretrained(run).state_dict() for run in runs), rtol=1e-3,
                               atol=1e-4)


REWARDS = """
def half(prompts, completions, answer, **columns):
    return [0.5 * (one == right) for one, right in zip(completions, answer, strict=True)]

def any_text(prompts, completions, **columns):
    assert [message["role"] for message in prompts[0]] == ["user"], prompts
    return [float(bool(one)) for one in completions]

def short(completions, **columns):
    return [1.0]

def nan(completions, answer, **columns):
    return [float("nan") if one not in ("", *answer) else bool(one) for one in completions]

def fails(completions, answer, **columns):
    return [{"": 0.0, right: 1.0}[one] for one, right in zip(completions, answer, strict=True)]

def number(completions, **columns):
    return 1.0
"""


@pytest.mark.parametrize("changes, given, code, words", [
    ({}, "half", 1, "tasks.jsonl:2: the answer 'peace' gets the reward 0.5 and not 1"),
    ({}, "any_text", 1, "and pass@16 100.0%: these tasks are solved; give harder"),
    ({}, "short", 1, "rewards.py:short returned [1.0] for 2 completions of"),
    ({}, "number", 1, "rewards.py:number returned 1.0 for 2 completions of"),
    ({}, "nan", 1, "rewards.py:nan returned nan for"),
    ({}, "fails", 1, "rewards.py:fails failed on"),
    ({}, "missing", 1, "rewards.py has no function 'missing'; define it there"),
    ({}, "broken.py:one", 1, "broken.py cannot be imported: ModuleNotFoundError"),
    ({}, "rewards.py", 1, "rewards.py is not FILE.py:FUNCTION with a file that exists"),
    ({"answer": "never so"}, None, 1, "pass@1 is 0.0% and pass@16 0.0%: the model hardly ever"),
    ({"answer": ""}, None, 1, "tasks.jsonl:2: the answer '' gets the reward 1 and not 0, which"),
    ({}, "--max-new=60", 2, "tokens and 5 fit beside an answer of rl.max_new=60; give a smaller"),
    ({}, "--tasks=none.jsonl", 1, "none.jsonl does not exist"),
    ({}, "--tasks=runsum", 1, "task 'runsum' is none of runsum, swap"),
    ({}, "--tasks=runsm:2", 1, "with a depth; try runsum:4"),
    ({}, "parallel.shard=2", 2, "parallel.shard")])
def test_what_cannot_be_learned_from_is_refused_with_one_line(changes, given, code, words, made,
                                                              refused, tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    tasks = write(tmp_path / "tasks.jsonl", 40, **changes)
    given = [] if given is None else [given] if "=" in given else [
        "--reward", tmp_path / (given if "." in given else f"rewards.py:{given}")]
    assert words in refused("rl", made[0], "--tasks", tasks, "--max-new", 6, "--run",
                            tmp_path / "run", *SETTINGS, *given, code=code)
    assert not list(tmp_path.glob("run/step-*"))
