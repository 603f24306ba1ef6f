"""Comparison with other programs: scored by one rule, kept, and timed without favor."""
import json
from collections import namedtuple
from pathlib import Path

import card
import nanochat_recipe
import pytest
import rivals
import torch

from fira.eval.bits_per_byte import windows
from fira.report.read import Run, Validation

Tokens = namedtuple("Tokens", "vocab_size")


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 12, 13, 31])
def test_nanochat_is_cut_into_the_windows_of_fira_eval(length):
    ids = list(range(1, length + 1))
    theirs = nanochat_recipe.windows(ids, 0, 8)
    assert theirs == [(one.tokens, one.known) for one in windows([(ids, True)], 8, 0)]


def test_nanochat_scores_every_token_once_whatever_the_batch():
    documents = [list(range(1, n)) for n in (2, 3, 9, 40, 5)]

    def model(tokens, targets, loss_reduction):
        assert tokens.shape == targets.shape and tokens.shape[1] > 1 and loss_reduction == "none"
        return torch.where(targets < 0, 0, targets).float().view(-1)

    for batch in (1, 3):
        assert nanochat_recipe.score(model, 0, documents, 8, batch) == sum(map(sum, documents))


def test_nanochat_settings_go_over_its_recipe():
    assert nanochat_recipe.parse("") == nanochat_recipe.RECIPE
    found = nanochat_recipe.parse("depth=4,matrix-lr=0.01")
    assert (found["depth"], found["matrix-lr"], found["head-dim"]) == ("4", "0.01", "64")
    with pytest.raises(ValueError, match="'depth' must be name=value"):
        nanochat_recipe.parse("depth")


def test_step_times_are_read_from_what_nanochat_prints():
    printed = ("Step 00001 | Validation bpb: 1.0\n"
               "step 00000/00018 (0.00%) | loss: 8.3 | lrm: 0.20 | dt: 1234.50ms | tok/sec: 1 | x\n"
               "step 00001/00018 (5.56%) | loss: 8.2 | lrm: 0.40 | dt: 56.00ms | tok/sec: 9 | x\n")
    assert nanochat_recipe.step_seconds(printed) == [1.2345, 0.056]


def test_a_kept_result_is_not_made_again_and_not_mistaken(tmp_path):
    path = tmp_path / "nanochat-seed1.json"
    made = rivals.kept(path, {"seed": 1}, lambda: {"bits_per_byte": 2.0})
    assert rivals.kept(path, {"seed": 1}, lambda: pytest.fail("made again")) == made
    assert rivals.finished(tmp_path) == {"nanochat": [made]}
    assert json.loads(path.read_text()) == made
    with pytest.raises(ValueError, match="choose another --out"):
        rivals.kept(path, {"seed": 2}, dict)


def test_nanochat_takes_the_best_of_short_runs_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    trained = []

    def run_nanochat(place, settings, seconds, seed, pace):
        trained.append((settings["depth"], seconds, seed))
        return {"bits_per_byte": {"2": 3.0, "4": 2.0, "6": 4.0}[settings["depth"]] + seed / 100}

    monkeypatch.setattr(nanochat_recipe, "run_nanochat", run_nanochat)
    for step in ("prepare", "pace", "shuffle"):
        monkeypatch.setattr(nanochat_recipe, step, lambda *_: None)
    monkeypatch.setattr(rivals, "documents", lambda *_: ["text"])
    monkeypatch.setattr(rivals.Tokenizer, "load", lambda _: Tokens(600))
    text = rivals.Text(tmp_path, 64)

    def compare(seeds):
        rivals.run_nanochat(tmp_path, text, tmp_path, 1.0, seeds, ["depth=2", "depth=4", ""], 0.25)

    compare(1)
    assert trained == [("2", 15, 0), ("4", 15, 0), ("6", 15, 0), ("4", 60, 1)]
    compare(2)
    assert trained[4:] == [("4", 60, 2)]
    found = rivals.finished(tmp_path)["nanochat"]
    assert [(one["asked"]["seed"], one["bits_per_byte"]) for one in found] == [(1, 2.01), (2, 2.02)]


def curve(*values):
    return Run(Path("."), {}, validations=[Validation(n, 0.0, value, 10.0 * n, 100 * n)
                                           for n, value in enumerate(values, 1)])


def test_seconds_to_a_goal_are_interpolated_and_moved_by_the_difference_of_rules():
    run = curve(3.0, 2.0, 1.0)
    assert card.seconds_to([run], 1.5, [0.0]) == pytest.approx(25.0)
    assert card.seconds_to([run], 1.5, [0.5]) == pytest.approx(20.0)
    assert card.seconds_to([run], 0.5, [0.0]) is None


def test_a_run_that_never_gets_there_counts_as_endless():
    slow, fast = curve(3.0, 2.5), curve(2.0, 1.0)
    assert card.seconds_to([slow, fast, fast], 1.5, [0.0] * 3) == pytest.approx(15.0)
    assert card.seconds_to([slow, slow, fast], 1.5, [0.0] * 3) is None


def test_how_long_a_mixture_is_behind_its_twin():
    dense = curve(3.0, 2.0, 1.5)
    lag, last = card.behind([curve(3.4, 2.0, 1.3)], [dense])
    assert lag == pytest.approx(0.4) and last == pytest.approx(20.0, abs=0.2)
    lag, last = card.behind([curve(2.9, 1.8, 1.3)], [dense])
    assert lag == pytest.approx(-0.1) and last is None
    assert card.behind([curve(2.9, 1.8, 1.3), curve(3.4, 2.0, 1.3)], [dense, dense])[0] > 0.3
