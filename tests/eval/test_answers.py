"""Generated answers are scored without their thoughts, and several samples without bias."""
from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from fira.convert.files import Loaded
from fira.data.tokenizer import train_tokenizer
from fira.eval import answers
from fira.eval.answers import Asking, answer, pass_at, vote
from fira.eval.task import make_row
from fira.infer.request import End, Token
from fira.report.results import suite_view
from tests.models import build, tiny_spec


def row(gold, checker="exact"):
    ask = [{"role": "user", "content": "How many?"}]
    return make_row({"messages": ask, "answer": gold, "checker": checker}, "here")


@pytest.fixture(scope="module")
def loaded():
    tokenizer = train_tokenizer(["How many?"], vocab_size=310)
    model = build(tiny_spec("fira2", vocab_size=310, context=64), 1).eval()
    model.chat = model.think = True
    return Loaded(model, tokenizer, None)


def test_pass_at_k_is_the_share_of_all_choices_of_k_with_a_right_answer():
    for scores in itertools.product((0.0, 1.0), repeat=5):
        for k in range(1, 6):
            chosen = list(itertools.combinations(scores, k))
            assert pass_at(k, scores) == pytest.approx(sum(map(max, chosen)) / len(chosen))


@pytest.mark.parametrize("said, score", [
    (["7", "8", "7 "], 1), (["8", "7", " 8"], 0), (["7", "8"], 1 / 2), (["7", "8", "9"], 1 / 3)])
def test_the_commonest_answer_counts_and_equally_common_ones_share(said, score):
    assert vote(row("7"), said) == pytest.approx(score)


@pytest.mark.parametrize("asking, prompt, limit, temperature", [
    (Asking(), "assistant\n", 64, 0), (Asking("on", 5), "assistant\n", 5, 0),
    (Asking("off", samples=3), "</think>\n\n", None, 1), (Asking(None, 0), "</think>\n\n", None, 0),
    (Asking(samples=3, temperature=0.5), "assistant\n", 64, 0.5)])
def test_answers_are_asked_for_and_scored_without_their_thoughts(loaded, monkeypatch, asking,
                                                                 prompt, limit, temperature):
    def generate(model, tokenizer, prompts, params, progress):
        assert len(prompts) == 2 * asking.samples
        assert all(tokenizer.decode(ids).endswith(prompt) for ids in prompts)
        assert (params.max_thinking_tokens, params.temperature) == (limit, temperature)
        said = ["7", "8", "7"][:asking.samples] * 2
        return [[Token(1, "9", thought=True), Token(2, "", thought=True), Token(3, text),
                 End("length" if text == "8" else "stop", new_tokens=3, thinking_tokens=1)]
                for text in said], np.ones((2, 4))
    monkeypatch.setattr(answers, "generate_answers", generate)
    found, _ = answer(loaded, [row("7"), row("9")], asking, print)
    share = [1, 0] if asking.samples == 1 else [2 / 3, 0]
    about = found["answers"]
    assert found["correct"] == pytest.approx(share) and about["tokens"] == [1, 1]
    assert about["pass"]["1"][0] == pytest.approx(sum(share) / 2)
    assert about["pass@k"][0] == about["maj@k"][0] == 0.5 and about["pass@k"][1:] == (
        about["maj@k"][1:])
    assert about["cut off"] == pytest.approx([0 if asking.samples == 1 else 1 / 3])


def test_samples_differ_and_are_repeated(loaded):
    rows = [row(".", "regex"), row("^a", "regex")]
    asking = Asking(max_thinking_tokens=3, samples=4)
    first, second = (answer(loaded, rows, asking, lambda done: None)[0] for _ in range(2))
    assert first == second and 0 < first["answers"]["tokens"][1] <= 259


@pytest.mark.parametrize("asking, knows, words", [
    (Asking(samples=2, temperature=0.0), {}, "2 samples at temperature 0 are all equal; give"),
    (Asking("on"), {"think": None}, "not tuned to think; leave out --think on"),
    (Asking(max_thinking_tokens=9), {"think": False}, "not tuned to think"),
    (Asking(), {"chat": False}, "use a tuned model, or rows with a context")])
def test_what_cannot_be_asked_for_is_refused(loaded, asking, knows, words):
    model = SimpleNamespace(**{"spec": loaded.model.spec, "chat": True, "think": True,
                               "trained_length": None, **knows})
    with pytest.raises(ValueError, match=words):
        answer(loaded._replace(model=model), [row("7")], asking, print)


def test_the_table_has_columns_for_samples_where_answers_are_generated():
    task = {"n": 2, "rows": 2, "bits_per_byte": None, "accuracy": 0.5, "interval": [0, 1],
            "accuracy_per_byte": None, "centred": 0.5, "floors": {}, "at_chance": True,
            "experts": None}
    about = {"samples": 4, "temperature": 1.0, "pass@k": [0.75, 0.3, 0.9], "cut off": [0.25],
             "maj@k": [0.5, 0.1, 0.8], "tokens": [12.0, 3.4]}
    tables = [suite_view("own", {"tasks": {"sum": one}}).renderables for one in (
        task, task | {"answers": about})]
    titles = [[column.header for column in table[1].columns] for table in tables]
    cells = [list(column.cells)[0] for column in tables[1][1].columns][-4:]
    assert titles[1] == [*titles[0], "pass@k", "maj@k", "cut off", "tokens"]
    assert cells == ["75.0 30.0 90.0", "50.0 10.0 80.0", "25.0", "12 + 3"]
    assert "k = 4 answers to each row at temperature 1" in str(tables[1][2])
