"""The whole path of the quickstart ends in a model that converses, and is not done twice."""
from __future__ import annotations

import shutil

from fira.model.files import find_model, knows_chat
from fira.stages.quickstart import QUESTIONS


def test_the_quickstart_ends_in_a_model_that_converses_and_repeats_nothing(
        fira, data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fira.stages.quickstart.CHAT", (
        "train.steps=3", "train.sequence_length=128", "train.validation_tokens=2048"))
    out, small = tmp_path / "quick", ("train.steps=4", "model.num_layers=2", "model.context=128",
                                      "train.validation_tokens=2048")
    shutil.copytree(data_folder, out / "data")
    answer = fira("quickstart", "--chat", "--out", out, *small)
    assert answer.code == 0, answer.err
    said = answer.out + answer.err
    places = [said.index(line) for line in ("using the tokenizer and data", "conversations: ",
                                            *QUESTIONS, f"fira chat {out / 'chat'}")]
    assert places == sorted(places)
    assert knows_chat(find_model(out / "chat")) and not knows_chat(find_model(out / "run"))
    again = fira("quickstart", "--chat", "--out", out, *small)
    assert again.code == 0 and again.err.count("the run is done after step") == 2, again.err
