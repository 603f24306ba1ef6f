"""The reasoning card: by a solver whose answer is what stands last in its thought."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fira.data.tokenizer import THINK, THINK_END, train_tokenizer
from fira.eval import reasoning
from fira.eval.reasoning import Reply, expert_load, judge, measure_task
from fira.eval.tasks.generate import make_again, open_tasks
from fira.infer.request import End, Token
from tests.models import build, tiny_spec

TOKENIZER = train_tokenizer(["Sum mod 10: " * 50], 300)


@pytest.fixture
def solver(monkeypatch):
    """Thinks the steps of the questions `asked`; after a thought it answers the thought's last
    digit, and 0 after none."""
    asked = []

    def generate(model, tokenizer, prompts, params, progress):
        for row, ids in zip(asked, prompts, strict=False):  # all prompts, or none
            thought = tokenizer.decode(ids).rpartition(THINK)[2] if THINK in tokenizer.decode(
                ids) else "\n".join(make_again(row.group).steps)
            own = [] if THINK in tokenizer.decode(ids) else [
                Token(tokenizer.added[THINK], "", thought=True),
                *(Token(one, tokenizer.decode([one]), thought=True)
                  for one in tokenizer.encode(thought)),
                Token(tokenizer.added[THINK_END], "", thought=True)]
            said = (thought.replace(THINK_END, "").strip() or "0")[-1]
            yield [*own, Token(tokenizer.encode(said)[0], said), End("stop")]

    monkeypatch.setattr(reasoning, "generate_answers",
                        lambda *given: (list(generate(*given)), None))
    monkeypatch.setattr(reasoning, "window_length", lambda model: 200)
    monkeypatch.setattr(reasoning, "answer", lambda loaded, rows, asking, progress: (
        {"correct": [row.score("0") for row in rows]}, None))
    return asked


def test_a_thought_decides_the_answer_and_that_of_another_question_is_right_by_chance(solver):
    (task,) = open_tasks("runsum:4", 40)
    solver += task.rows
    found, replies = measure_task(SimpleNamespace(model=None, tokenizer=TOKENIZER), task, 99,
                                  whole=True)
    think, answers = found["think"], [row.answers[0] for row in task.rows]
    assert think["accuracy"] == think["steps_right"] == 1 and think["cut"] == 0
    assert found["swapped"]["right"] == [
        float(one == other) for one, other in zip(answers, answers[1:] + answers[:1], strict=True)]
    assert found["direct"]["accuracy"] == answers.count("0") / 40
    assert think["tokens"][1] == 1 and think["tokens"][0] > 4
    assert think["interval"][0] > 0.9
    assert replies[0].thought == "\n".join(make_again(task.rows[0].group).steps)


def test_what_the_model_cannot_read_at_once_is_wrong_and_cut(solver, monkeypatch):
    (task,) = open_tasks("runsum:4", 3)
    solver += task.rows
    loaded = SimpleNamespace(model=None, tokenizer=TOKENIZER)
    longest = max(len(one.ids[0]) for one in reasoning.write_replies(loaded, task.rows, 99))
    monkeypatch.setattr(reasoning, "window_length", lambda model: longest)
    found, _ = measure_task(loaded, task, 99, whole=True)
    assert found["think"]["accuracy"] == 1 and found["swapped"]["right"] == [0.0] * 3
    monkeypatch.setattr(reasoning, "window_length", lambda model: 3)
    found, replies = measure_task(loaded, task, 99)
    assert found["think"]["accuracy"] == 0 and found["think"]["cut"] == 1
    assert [one.answer for one in replies] == [""] * 3


def test_the_load_of_experts_is_of_the_tokens_of_thoughts_and_of_answers():
    loaded = SimpleNamespace(model=build(tiny_spec("fira2", vocab_size=31), 0))
    thought, said = [3, 4, 5, 6], [7, 8]
    replies = [Reply("", "", ([1, 2], thought, said), False)] * 3
    load = expert_load(loaded, replies)
    with torch.no_grad():  # the tokens that predict them stand one place before
        watch = reasoning.read_use(loaded.model, reasoning.in_order(reasoning.Packs([
            reasoning.Ids(torch.tensor([1, 2, *thought, *said]).numpy(),
                          torch.arange(8).ge(6).numpy())], 8), 1))
    for part, tokens in (("thoughts", 4), ("answers", 2)):
        assert [sum(layer) for layer in load[part]] == pytest.approx([1.0, 1.0])
        assert all(3 * tokens * 2 * share == pytest.approx(round(3 * tokens * 2 * share))
                   for layer in load[part] for share in layer)
    counts_LE = watch.total(torch.ones_like(watch.gates_LNK), 4)
    torch.testing.assert_close(torch.tensor(load["answers"]).double(), counts_LE / 4)
    dense = SimpleNamespace(model=build(tiny_spec("fira2", num_experts=1, top_k=1), 0))
    assert expert_load(dense, replies) is None
    assert expert_load(loaded, [Reply("", "", ([1, 2], thought, []), True)]) is None


def model(accuracy, direct=0.1, chance=0.1, n=100):
    """A model that is right so often, at depth 1 of three tasks."""
    right = lambda share: [1.0] * round(n * share) + [0.0] * round(n * (1 - share))  # noqa: E731
    return {"tasks": {f"{task}:1": {
        "floors": {"majority": chance}, "direct": {"right": right(direct)},
        "think": {"accuracy": accuracy, "right": right(accuracy)}} for task in "abc"}}


def test_where_nothing_is_at_the_edge_the_card_says_that_there_is_no_gain():
    *_, last = judge({"tasks": ["a"], "depth": 1, "edge": [], "models": {"think": model(1.0)}})
    assert not last["met"] and last["result"] == "no gain: no task has an edge to learn at"


@pytest.mark.parametrize("models, met, results", [
    ({"think": model(0.9)}, [True], ["a +80%"]),
    ({"think": model(0.3)}, [False], ["a +20%"]),
    ({"think": model(0.42)}, [False], ["a +32%"]),
    ({"think": model(0.9), "student": model(0.88), "gold-student": model(0.4)},
     [True, True, True], ["", "97.5%", "+48%"]),
    ({"think": model(0.9), "student": model(0.5), "gold-student": model(0.5)},
     [True, False, False], ["", "50.0%", "+0%"]),
    ({"think": model(0.1), "student": model(0.1), "gold-student": model(0.1)},
     [False, False, False], ["", "the teacher has none", ""]),
    ({"think": model(0.9), "rl": model(0.95), "more": model(0.6)}, [True, True], ["", "a +35%"]),
    ({"think": model(0.9), "rl": model(0.9), "more": model(0.9)}, [True, False], ["", "no gain"]),
], ids=["thinks", "thinks little", "thinks hardly enough", "a good student", "a poor one",
        "nothing learned", "RL gains", "RL gains nothing"])
def test_a_goal_is_met_only_beyond_its_interval(models, met, results):
    goals = judge({"tasks": ["a", "b", "c"], "depth": 1, "edge": ["a:1"], "models": models})
    assert [one["met"] for one in goals] == met
    assert all(text in one["result"] for text, one in zip(results, goals, strict=True))
