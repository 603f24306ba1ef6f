"""Each recipe of docs/recipes.md on fifty rows, from files to the table beside its floors."""
from __future__ import annotations

import json
import lzma

import pytest
import recipes

pytest.importorskip("rouge_score")
WORDS = ("peace", "war", "trade", "tax", "gold", "school", "navy", "farm", "energy", "treaty")
FORMS = {  # file, task: a prompt and its answer, made by hand, of a number and a word
    "chat/chitchat": {"chitchat": ("Hi {0}", "I like {1}.")},
    "chat/instruct": {"wordnet": ("What is {1}?", "{1} is a word."),
                      "wiki_offline": ("Tell me about {1} {0}.", "It is {1}."),
                      "recipes": ("How do I make {1} {0}?", "Mix {1}.")},
    "chat/taskdialog": {"sgd": ("Book {1} at {0}.", "Booked at {0}.")},
    "domains/medical/messages": {
        "abstract_qa": ("Does {1} {0} help?", "yes"), "conclusion": ("On {1} {0}", "{1} helps."),
        "dialogue_to_section": ("Doctor: {1}? Patient: {0} days.", "{1} for {0} days."),
        "medical_qa": ("Why {1} {0}?", "Because of {1}.")},
    "domains/legal/messages": {
        "clause_category": ("The {1} ends in year {0}.", "Term"),
        "clause_yes_no": ("Is {1} {0} free?", "Yes"),
        "statute_heading": ("Section {0}: {1}", "{1}")},
    "domains/technical/messages": {
        "command": ("List {1} {0}", "ls {1}"), "command_purpose": ("ls {1} {0}", "List {1}"),
        "api_question": ("What is {1}.{0}?", "{1}.{0}()"),
        "explain_command": ("Explain ls {1} {0}", "It lists {1}")},
    "eval/gsm8k": {"steps": ("{0} {1}s and 1 more?", "Add 1. <<{0}+1=9>>\n#### 9")},
}




def conversation(task, form, number):
    ask, answer = (text.format(number, WORDS[number % 10]) for text in form)
    if task == "steps":
        return {"question": ask, "answer": answer}
    return {"task": task, "source": task, "messages": [
        {"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Fifty rows to train on of each file's tasks, and some held out."""
    folder = tmp_path_factory.mktemp("recipes")
    for file, tasks in FORMS.items():
        rows = [conversation(task, form, number) for number in range(60 // len(tasks) + 1)
                for task, form in tasks.items()]
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        for name, some in (("train.jsonl", rows[:53]), ("train.jsonl.xz", rows[10:60]),
                           ("dev.jsonl.xz", rows[:10])):
            with (lzma.open if name.endswith("xz") else open)(folder / f"{file}.{name}", "wt") as f:
                f.write("".join(json.dumps(row) + "\n" for row in some))
    return folder


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_each_recipe_learns_from_fifty_rows_and_is_scored_beside_its_floors(
        name, data, trained_run, tmp_path, capsys):
    found = recipes.run_recipe(name, trained_run, data, tmp_path / name, 3, [
        "train.steps=12", "train.sequence_length=64", "train.validation_tokens=512"])
    assert found["rows"] == 50 * len(recipes.RECIPES[name].files) and found["seconds"] > 0
    assert list(found["tasks"]) == list(recipes.RECIPES[name].tasks)
    for row in found["tasks"].values():
        scores = [row[key] for key in ("after", "majority", "copy", "nearest")]
        assert 0 < row["rows"] <= 3 and all(0 <= score <= 1 for score in scores)
        assert 0 <= (row["before"] or 0) <= 1  # None: the base does not read prompts of that length
    bits = next(row for row in found["tuning"] if row["measure"] == "bits per byte, target")
    assert bits["change"][2] < 0  # also the upper end of its interval
    recipes.show(found)
    assert capsys.readouterr().out.count("\n") == 2 + len(found["tasks"])


def test_floors_are_those_of_the_training_rows():
    train = [conversation("x", ("Is {1} free?", answer), number)
             for number, answer in enumerate(("Yes", "Yes", "No"))]
    rows = [conversation("x", ("Free is {1}?", answer), number) for number, answer in (
        (0, "Yes"), (2, "No"), (2, "Yes"), (1, "Free is war?"))]
    assert recipes.floors(train, rows, "exact") == {"majority": 0.5, "copy": 0.25, "nearest": 0.5}


def test_a_task_without_rows_is_refused_by_name(data, tmp_path, monkeypatch):
    recipe = recipes.RECIPES["chat"]
    monkeypatch.setitem(recipes.RECIPES, "chat", recipe._replace(
        tasks=recipe.tasks | {"taskdialog": "rouge"}))
    with pytest.raises(ValueError, match="no rows of the task taskdialog .* look at source in"):
        recipes.run_recipe("chat", tmp_path, data, tmp_path, 3)
