"""What a tuning changed: the figures of tuning.json, and where they are shown."""
from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fira.data.conversations import Row
from fira.data.packs import Packs, Windows, in_order
from fira.eval import tuning
from fira.model.router import routers
from tests.models import NAMES, build, tiny_spec


def rows(*sizes):
    generator = np.random.default_rng(0)
    return [Row(generator.integers(0, 31, size), generator.random(size) > 0.4) for size in sizes]


@pytest.mark.parametrize("name", NAMES)
def test_bits_are_those_of_trained_tokens_that_stand_for_text(name):
    model, given = build(tiny_spec(name), 0).eval(), rows(9, 12, 4)
    tokenizer = SimpleNamespace(token_bytes=lambda: [b"x" * (token % 3) for token in range(31)])
    for row, (bits, size) in zip(given, tuning.count_bits(model, tokenizer, given).T, strict=True):
        ids = torch.tensor(row.ids)[None]
        counted = torch.tensor(row.trained)[1:] & (ids[0, 1:] % 3 > 0)
        nats = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="none")[counted].sum()
        assert bits == pytest.approx(nats.item() / math.log(2), rel=1e-5)
        assert size == int((ids[0, 1:] % 3)[counted].sum())


def test_the_interval_of_a_ratio_is_that_of_a_mean_where_sizes_are_equal():
    values, sizes = np.random.default_rng(1).normal(2, 1, 50), np.full(50, 4.0)
    mean, half = values.mean() / 4, 1.959964 * values.std(ddof=1) / math.sqrt(50) / 4
    assert tuning.ratio(values, sizes) == pytest.approx([mean, mean - half, mean + half])
    assert tuning.ratio(2.5 * sizes, sizes) == [2.5] * 3  # equal rows leave no doubt


def test_held_out_rows_are_spread_over_all_of_a_text_or_of_packs():
    text = Windows(np.arange(41), 8, "key")
    first, *_, last = tuning.held_out_rows(text)
    assert first.ids.tolist() == list(range(9)) and last.ids.tolist() == list(range(32, 41))
    assert first.trained.tolist() == [False] + 8 * [True]
    assert tuning.held_out_rows(Packs(some := rows(5, 6, 7), 12)) == some
    assert [len(row.ids) for row in tuning.spread(rows(*range(10, 20)), 60)] == [10, 13, 16, 19]
    assert [batch.tokens_BT[:, 0].tolist() for batch in in_order(text, 2, 3)] == [[0, 8], [24]]


def test_routing_is_compared_token_by_token():
    models = [build(tiny_spec("fira2"), 0).eval() for _ in range(2)]
    same, _ = tuning.compare_routing(models, rows(9, 12, 4))
    # empty places do not count, nor does a first token that predicts no target
    assert same["kept"] == [1, 1] and 19 <= same["tokens"] <= 22
    with torch.no_grad():
        weight = routers(models[1])[0].weight
        weight.copy_(weight.roll(1, 0))  # no set of two of four experts stays
    found, measures = tuning.compare_routing(models, rows(9, 12, 4))
    (old, new), (cv, again) = found["load"], found["cv"]
    assert found["kept"][0] == 0 and new[0] == np.roll(old[0], 1).tolist() and cv[0] == again[0]
    most = measures[2]["after"] - measures[2]["before"]
    assert abs(most) == pytest.approx(np.abs(np.subtract(old, new)).max())
    longest = rows(models[0].spec.context + 1)  # its last token is only a target
    assert models[0].spec.context - tuning.compare_routing(models, longest)[0]["tokens"] in (0, 1)
    dense = build(tiny_spec("fira", num_experts=1, top_k=1), 0)
    assert tuning.compare_routing([dense, dense], []) == ({}, [])


def test_prompts_stand_before_first_answers_and_answers_have_ends_lengths_and_repetitions():
    row, whole = Row(np.arange(6), np.arange(6) // 3 == 1), Row(np.arange(6), np.arange(6) > 0)
    assert tuning.held_out_prompts([row, whole], 3) == [[0, 1, 2]]
    assert tuning.held_out_prompts([row, whole], 2) == []
    assert len(tuning.held_out_prompts([row] * 1050, 3)) == 96  # of at most 100, evenly spread
    stops, length, repeated = tuning.describe_answers(  # 1234 2341 3412 4123 1234
        [([1, 2, 3, 4, 1, 2, 3, 4], True), ([5, 6], False)]).values()
    assert (stops[0], length, repeated) == (0.5, 5, pytest.approx(1 / 5))


def test_a_tuning_ends_with_a_comparison(run, fira, refused, text_file, tmp_path):
    chats, out = tmp_path / "chats.jsonl", tmp_path / "tuned"
    chats.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"<{n}>|{n}"}) + "\n"
                             for n in range(30)))
    (tmp_path / "blimp").mkdir()
    (tmp_path / "blimp/a.jsonl").write_text("".join(json.dumps(
        {"sentence_good": f"She sings {n}.", "sentence_bad": f"She sing {n}."}) + "\n"
        for n in range(4)))
    words = ("tune", run, "--chat", chats, "--general", text_file, "--run", out, "--device", "cpu",
             "--data", tmp_path, "train.steps=2", "train.sequence_length=64",
             "train.batch_tokens=256", "--suite")
    assert "lambada" in refused(*words, "lambada") and not out.exists()  # before the training
    assert fira(*words, "blimp", "--no-card").code == 0 and not (out / "tuning.json").exists()
    answer = fira("tune", "--resume", "--run", out, "--suite", "blimp", "--data", tmp_path)
    found = json.loads((out / "tuning.json").read_text())
    values = {row["measure"]: row for row in found["measures"]}
    last = json.loads([row for row in (out / "metrics.jsonl").read_text().splitlines()
                       if "validation" in row][-1])  # of the same rows
    for name, key in (("target", "bits_per_byte"), ("general", "bits_per_byte/general")):
        after = values[f"bits per byte, {name}"]["after"]
        assert after[0] == pytest.approx(last[key], rel=1e-4)
    assert len(found["samples"]) == 5 and "blimp/a" in found["tasks"]["blimp"]
    assert len(values["blimp, accuracy"]["change"]) == 3
    assert fira("report", out).code == fira("card", out).code == 0
    for text in (answer.err, (out / "report.html").read_text(), (out / "README.md").read_text()):
        assert [measure for measure in values if measure not in text] == []
