"""The noun Task: rows that a model reads, and the score of an answer, from 0 to 1.

An evaluation compares a row's options or generates an answer to its prompt. A reward and a probe do
the latter: `row.prompt` is what to read, `row.score(answer)` what the answer is worth.
"""
from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fira.eval.tasks import gym

EXAMPLES = ('{"context": "2 + 2 =", "continuations": [" 4", " 5"], "gold": 0}',
            '{"context": "The sky is", "answer": " blue"}',
            '{"good": "She sings.", "bad": "She sing."}',
            '{"messages": [{"role": "user", "content": "2 + 2?"}], "answer": "4", '
            '"checker": "number"}')


class Row(NamedTuple):
    """One item. `options` are pairs of context and continuation, of which number `gold` is right; a
    gold text is alone. A row of chat messages has none. Rows with one passage share a `group`."""

    options: tuple[tuple[str, str], ...]
    gold: int
    answers: tuple[str, ...]  # any of them is right
    messages: tuple[dict[str, str], ...] = ()
    checker: str = "exact"
    group: str | None = None

    @property
    def prompt(self) -> str | tuple[dict[str, str], ...]:
        """What a model reads before it answers: text, or chat messages."""
        return self.messages or self.options[self.gold][0]

    def score(self, answer: str) -> float:
        """What the row's checker gives for the generated `answer`, 0 to 1."""
        return max(float(CHECKERS[self.checker](answer, gold)) for gold in self.answers)


class Task(NamedTuple):
    """Rows, with where they come from and how their prompts were made."""

    name: str
    rows: Sequence[Row]
    protocol: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Hex digest of the exact rows."""
        return hashlib.sha256(json.dumps(self.rows, ensure_ascii=False).encode()).hexdigest()


def find_number(text: str) -> float | None:
    """The last number of a text, or the last after "####"; None if there is none."""
    found = re.findall(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", text.rpartition("####")[2])
    return float(found[-1].replace(",", "")) if found else None


def find_letter(text: str) -> str | None:
    """The letter that a text calls its answer or begins with: "the answer is (B)", "b) ..."."""
    found = (re.search(r"(?i:answer)\W+(?:(?i:is)\W+)?([A-Z])\b", text)
             or re.match(r"\s*\(?([A-Za-z])(?:[).:]|\s*$)", text))
    return found[1].upper() if found else None


def rouge(answer: str, gold: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, by the package
    rouge-score. Raises ValueError if it is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ValueError("the checker rouge needs the package rouge-score: pip install "
                         "'fira-moe[eval]'") from None
    return float(RougeScorer(["rougeL"]).score(gold, answer)["rougeL"].fmeasure)


CHECKERS: dict[str, Callable[[str, str], float]] = {  # (answer, gold) -> 0 to 1
    "exact": lambda answer, gold: answer.split() == gold.split(),
    "number": lambda answer, gold: find_number(answer) == find_number(gold) is not None,
    "regex": lambda answer, gold: re.search(gold, answer) is not None,
    "letter": lambda answer, gold: find_letter(answer) == gold.strip().upper(),
    "rouge": rouge,
    "gym": gym.score,  # gold is the key of a question of reasoning-gym
}


def make_row(record: Any, where: str, published: bool = False) -> Row:
    """The row in an object of one of the forms in EXAMPLES; `context` may be one for each option.

    Raises ValueError, one line that begins with `where`, for anything else. Only in a published set
    may two options be the same.
    """
    try:
        row = _row(record)
        row.score("")  # a regular expression that cannot be read raises
        for rule, holds in {
            "every continuation is text": all(isinstance(context, str) and end.strip()
                                              for context, end in row.options),
            "no continuation stands there twice": published or (
                len(set(row.options)) == len(row.options)),
            "every message has text": all(isinstance(message["content"], str)
                                          for message in row.messages),
            "the checker accepts the answer": row.checker == "regex" or row.score(row.answers[0]),
        }.items():
            if not holds:
                raise ValueError(f"the rule that {rule} does not hold")
    except (TypeError, AttributeError, LookupError, ValueError, re.error) as error:
        reason = f"field {error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{where}: {reason}; write a row like one of {' or '.join(EXAMPLES)}"
                         ) from None
    return row


def _row(record: dict[str, Any]) -> Row:
    group = record.get("group")
    if "messages" in record:
        *before, last = record["messages"]
        if "answer" not in record or last["role"] == "assistant":  # the answer to the others
            record = {"answer": last["content"], **record, "messages": before}
        answers, checker = record["answer"], record.get("checker", "exact")
        if checker not in CHECKERS:
            raise ValueError(f"checker {checker!r} is not one of {', '.join(CHECKERS)}")
        return Row((), 0, (answers,) if isinstance(answers, str) else tuple(answers),
                   tuple(record["messages"]), checker, group)
    if "good" in record:
        record = {"context": "", "continuations": [record["good"], record["bad"]], "gold": 0}
    ends = record["continuations"] if "continuations" in record else [record["answer"]]
    gold = record["gold"] if len(ends) > 1 else 0
    if type(gold) is not int or not 0 <= gold < len(ends):
        raise ValueError(f"gold={gold!r} is not from 0 to {len(ends) - 1}")
    context = record["context"]
    contexts = [context] * len(ends) if isinstance(context, str) else context
    return Row(tuple(zip(contexts, ends, strict=True)), gold, (ends[gold].strip(),), group=group)
