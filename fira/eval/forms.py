"""Records of published sets as rows, by the names of their fields."""
from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fira.eval.task import Row, make_row

UNCONDITIONAL = 1_000_000  # request files number the requests without a question from here on
AFTER = "continuation_delimiter"
LABELS = 50  # conversations are a choice if their task has at most so many different answers
Record = dict[str, Any]


def choice(context: str, texts: Iterable[str], gold: Any) -> Record:
    """A choice among texts that follow a space."""
    return {"context": context, "continuations": [f" {text.strip()}" for text in texts],
            "gold": int(gold)}


def ask(question: str, texts: Iterable[str], gold: Any, before: str = "") -> Record:
    return choice(f"{before}Question: {question}\nAnswer:", texts, gold)


def _key(record: Record) -> tuple[list[str], int]:
    choices = record["choices"]
    return choices["text"], choices["label"].index(record["answerKey"].strip())


def _winogrande(record: Record) -> Record:
    before, _, after = record["sentence"].partition("_")
    return {"context": [before + record["option1"], before + record["option2"]],
            "continuations": [f" {after.strip()}"] * 2, "gold": int(record["answer"]) - 1}


def _hellaswag(record: Record) -> Record:
    def clean(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).replace("  ", " ").strip()

    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return choice(clean(context), map(clean, record["endings"]), record["label"])


def _copa(record: Record) -> Record:
    word = {"cause": "because", "effect": "therefore"}[record["question"]]
    ends = (text[:1].lower() + text[1:] for text in (record["choice1"], record["choice2"]))
    return choice(f"{record['premise'].strip()[:-1]} {word}", ends, record["label"])


FORMS: dict[str, Callable[[Record], Record]] = {
    "sentence_good sentence_bad": lambda r: {"good": r["sentence_good"], "bad": r["sentence_bad"]},
    "question_stem choices answerKey": lambda r: choice(r["question_stem"], *_key(r)),
    "question choices answerKey": lambda r: ask(r["question"], *_key(r)),
    "question choices answer": lambda r: ask(r["question"], r["choices"], r["answer"]),
    "activity_label ctx_a ctx_b endings label": _hellaswag,
    "goal sol1 sol2 label": lambda r: ask(r["goal"], (r["sol1"], r["sol2"]), r["label"]),
    "sentence option1 option2 answer": _winogrande,
    "passage question answer": lambda r: {**ask(
        f"{r['question']}?", ("no", "yes"), r["answer"], f"{r['passage']}\n"),
        "group": hashlib.sha256(r["passage"].encode()).hexdigest()[:8]},
    "premise choice1 choice2 question label": _copa,
    "context question answerA answerB answerC label": lambda r: choice(
        f"Q: {r['context']} {r['question']}\nA:", (r[f"answer{letter}"] for letter in "ABC"),
        int(r["label"]) - 1),
    "support question correct_answer distractor1": lambda r: ask(
        r["question"], [*(r[f"distractor{n}"] for n in (1, 2, 3)), r["correct_answer"]], 3,
        f"{r['support'].lstrip()}\n"),
    "question context final_decision": lambda r: ask(
        r["question"], ("yes", "no", "maybe"), ("yes", "no", "maybe").index(r["final_decision"]),
        f"Abstract: {r['context']}\n"),
    "question opa opb opc opd cop": lambda r: ask(
        r["question"], (r[f"op{letter}"] for letter in "abcd"), r["cop"]),
    "question options answer_idx": lambda r: ask(
        r["question"], r["options"].values(), list(r["options"]).index(r["answer_idx"])),
    "input target_scores": lambda r: choice(
        r["input"].rstrip(), r["target_scores"],
        list(r["target_scores"].values()).index(max(r["target_scores"].values()))),
    # the files of DCLM and nanochat; AFTER is what stands between question and answer
    "query choices gold": lambda r: {
        "context": r["query"] + r.get(AFTER, ""), "gold": r["gold"],
        "continuations": [" " + text for text in r["choices"]]},
    "context_options continuation gold": lambda r: {
        "context": r["context_options"], "gold": r["gold"],
        "continuations": [" " + r["continuation"]] * len(r["context_options"])},
    "context continuation": lambda r: {"context": r["context"].strip() + r.get(AFTER, ""),
                                       "answer": " " + r["continuation"]},
    "question answer": lambda r: {"messages": [{"role": "user", "content": r["question"]}],
                                  "answer": str(r["answer"]), "checker": "number"},
    "text": lambda r: {"context": r["text"].rpartition(" ")[0],
                       "answer": " " + r["text"].rpartition(" ")[2]},
}


def read_rows(records: Iterable[tuple[str, Any]], letters: bool = False) -> Iterator[Row]:
    """Rows of records with their places: a published set's, requests, conversations, our own.

    With `letters` a choice is between the letters of its options, which its context lists.
    Raises ValueError, one line with the place, for a record that is none of them.
    """
    for where, record, published in _gathered(records):
        form = next((form for fields, form in FORMS.items()
                     if record.keys() >= set(fields.split())), None)
        try:
            record = form(record) if form else record
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise ValueError(f"{where}: a field is not as in the published set ({error}); download "
                             "the file again") from None
        if letters and isinstance(record.get("context"), str) and "continuations" in record:
            record = _as_letters(record)
        yield make_row(record, where, published or form is not None)


def _as_letters(record: Record) -> Record:
    ends = record["continuations"]
    names = [chr(ord("A") + number) for number in range(len(ends))]
    listed = "".join(f"\n {name}.{end}" for name, end in zip(names, ends, strict=True))
    return {**record, "context": f"{record['context'].removesuffix('Answer:').rstrip()}{listed}"
            "\nAnswer:", "continuations": [f" {name}" for name in names]}


def _gathered(records: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Record, bool]]:
    """Records, and whether they are a published set's. The requests of a document become a choice,
    and conversations a choice among the last messages of their task."""
    requests: dict[int, tuple[str, Record]] = {}
    tasks: dict[str, list[tuple[str, str, str]]] = {}
    for where, record in records:
        if not isinstance(record, dict):
            make_row(record, where)  # raises
        elif "request" in record and "doc_id" in record:
            if record["doc_id"] < UNCONDITIONAL:
                _, row = requests.setdefault(record["doc_id"], (where, {
                    "context": [], "continuations": [], "gold": record.get("label") or 0}))
                row["context"].append(record["request"]["context"])
                row["continuations"].append(record["request"]["continuation"])
        elif "messages" in record and not record.keys() & {"answer", "checker"}:
            *asked, last = (message["content"] for message in record["messages"])
            tasks.setdefault(record.get("task", ""), []).append((where, "\n".join(asked), last))
        else:
            yield where, record, False
    for where, whole in requests.values():
        first, *others = whole["context"]
        yield where, whole if set(others) - {first} else {**whole, "context": first}, True
    for talks in tasks.values():
        labels = sorted({answer for _, _, answer in talks})
        if 2 <= len(labels) <= LABELS:
            for where, question, answer in talks:
                yield where, choice(f"{question}\nAnswer:", labels, labels.index(answer)), True
