"""An adapter is trained, killed and resumed on one rank and on many as on one without a stop."""
import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fira.convert.quantize import export_run
from fira.model.files import ADAPTER
from fira.stages.start import tune
from tests.parallel.ranks import on_ranks

LAST = "step-000004"


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} it is."}]
    }) + "\n" for n in range(40)), encoding="utf-8")
    return path


def tune_on(rank, source, chat, run, settings=(), resume=False, method="lora"):
    sections = {"tune": {"method": method, "rank": 4, "router": "freeze"},
                "data": {"chat": [str(chat)]}}
    tune(None if resume else source, sections, 1.0,
         ["train.sequence_length=32", "train.batch_tokens=128", "train.micro_batch=1",
          "train.steps=4", "train.save_every=2", "train.validation_tokens=64", *settings],
         run, "cpu", resume, Console(quiet=True))


@pytest.fixture(scope="module", params=["float32", "int8"])
def undisturbed(request, trained_run, chat, tmp_path_factory):
    """A base, and a tuning of it by one process without a stop."""
    folder, base = tmp_path_factory.mktemp("tune"), trained_run
    if request.param != "float32":
        base = folder / "base"
        export_run(trained_run, base, request.param, Console(quiet=True))
    tune_on(0, base, chat, folder / "run")
    return base, folder / "run"


def stopped(undisturbed, folder):
    """A copy of the run as it was after two steps."""
    shutil.copytree(undisturbed[1], folder)
    shutil.rmtree(folder / LAST)
    return folder


def test_a_killed_tuning_continues_to_the_bit(undisturbed, chat, tmp_path):
    run = stopped(undisturbed, tmp_path / "run")
    tune_on(0, None, chat, run, resume=True)
    for name in (ADAPTER, "optimizer.safetensors"):
        assert (run / LAST / name).read_bytes() == (undisturbed[1] / LAST / name).read_bytes()


@pytest.mark.parametrize("axis", ["data", "expert", "shard"])
def test_two_ranks_begin_and_continue_a_tuning_as_one_does(axis, undisturbed, chat, tmp_path):
    base, expected = undisturbed
    on_ranks(2, tune_on, base, chat, tmp_path / "new", [f"parallel.{axis}=2"], join=False)
    run = stopped(undisturbed, tmp_path / "run")
    on_ranks(2, tune_on, None, chat, run, [f"parallel.{axis}=2"], True, join=False)
    wanted = load_file(expected / LAST / ADAPTER)
    for one in (tmp_path / "new", run):
        found = load_file(one / LAST / ADAPTER)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def refusal_on(rank, *arguments):
    with pytest.raises(ValueError) as error:
        tune_on(rank, *arguments)
    return str(error.value)


@pytest.mark.parametrize("ranks, settings, method, line", [
    (2, ["parallel.pipeline=2"], "lora", "parallel.pipeline=2 cannot mask rows from each other"),
    (2, ["parallel.expert=2"], "experts", "parallel.expert=2 divides all experts, not those of"),
    (1, ["tune.rank=33"], "lora", "rank=33 is above 32, the smaller width of a matrix"),
    (1, ["tune.rank=0"], "lora", "tune.rank=0"),
    (1, [], "full", "--method full cannot change int8 weights; use --method lora")])
def test_what_cannot_be_tuned_is_refused_before_anything_is_written(
        ranks, settings, method, line, trained_run, chat, tmp_path):
    base = trained_run
    if method == "full":
        export_run(base, tmp_path / "base", "int8", Console(quiet=True))
        base = tmp_path / "base"
    lines = on_ranks(ranks, refusal_on, base, chat, tmp_path / "run", settings, False, method,
                     join=False)
    assert all(line in one for one in lines) and not (tmp_path / "run").exists(), lines


def test_an_adapter_is_not_a_start(undisturbed, chat, refused, preset, tmp_path):
    for words in (["tune", undisturbed[1], "--chat", chat], ["train", preset, "--from",
                                                            undisturbed[1]]):
        line = refused(*words, "--run", tmp_path / "run")
        assert "holds an adapter" in line and f"with fira merge {undisturbed[1]} OUT" in line
    assert not (tmp_path / "run").exists()
