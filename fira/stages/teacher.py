"""The answers of a teacher, which a student may learn as conversations (sequence distillation)."""
from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fira.config import ConfigError
from fira.data.chat import prompt_ids
from fira.data.conversations import FAULTS, read_conversation
from fira.data.records import records
from fira.data.sources import RECORDS, inputs
from fira.data.tokenizer import THINK_END, Tokenizer
from fira.eval.task import make_row
from fira.infer.load import load
from fira.infer.request import SamplingParams
from fira.model.generate import window_length
from fira.runlog import ProgressLine
from fira.runtime import launch
from fira.stages.rollouts import SLOTS, Rollout, draw_seed, write_answers

ANSWERS = "answers.jsonl"  # in the run folder of the student


def write_teacher_answers(teacher: Path, sources: Sequence[str], path: Path, params: SamplingParams,
                          keep_right: bool, device: str, screen: Console) -> None:
    """Write the teacher's answer to the prompt of every conversation of `sources` that it can read
    into the file `path`, as conversations, or continue there.

    A prompt is what stands before the last answer. An answer that is empty or did not end, or, with
    `keep_right`, one that the row's checker finds wrong, is marked as not to be trained on. Raises
    ValueError, one line, for a teacher without chat, and for a file with other answers.
    """
    model, tokenizer, folder = load(teacher, device)
    if not model.chat:
        raise ValueError(f"{folder} was not trained on chat turns, so it answers no question; "
                         "distil on text with --text, or tune it first with fira tune --chat")
    rows, prompts = _read_prompts(sources, tokenizer, window_length(model) - params.max_new_tokens,
                                  keep_right, screen)
    written_by = {"teacher": str(folder.resolve()), "temperature": params.temperature}
    rows = [written_by | row for row in rows]
    done, begun = _written(path, rows), time.monotonic()
    if done < len(rows) and launch().world > 1:
        raise ConfigError("the teacher's answers are written by one process; give the same command "
                          "without a launcher, and later --resume on many ranks")
    with open(path, "ab") as file, ProgressLine("answers", screen) as shown:
        for first in range(done, len(rows), SLOTS):
            some = slice(first, first + SLOTS)
            found = write_answers(model, tokenizer, prompts[some], [
                draw_seed(number) for number in range(len(rows))[some]], params)
            file.writelines(map(_line, rows[some], found))
            file.flush()
            shown.update((first + len(found)) / len(rows), f"{first + len(found):,} answers",
                         time.monotonic() - begun)


def _read_prompts(sources: Sequence[str], tokenizer: Tokenizer, room: int, keep_right: bool,
                  screen: Console) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The conversations before their last answers, as records and as ids, if these are at most
    `room`; how many have more is said."""
    rows, prompts, longer = list[dict[str, Any]](), list[list[int]](), 0
    for where, record in records(inputs(sources, RECORDS)):
        try:
            messages, tools = read_conversation(record)
        except FAULTS as error:
            raise ValueError(f"{where}: {error}; correct this row, or leave it out") from error
        before = [{**one, "train": False} for one in (
            messages[:-1] if messages[-1]["role"] == "assistant" else messages)]
        ids = prompt_ids(tokenizer, before, True, tools)
        longer += len(ids) > room
        if len(ids) <= room:
            prompts.append(ids)
            rows.append({"where": where, "messages": before, "tools": tools, **(
                {"answer": record["answer"], "checker": record.get("checker", "exact")}
                if keep_right and "answer" in record else {})})
    told = (f"{longer:,} of {longer + len(rows):,} prompts are left out: they have more than the "
            f"{room} tokens that leave room for an answer")
    if not rows:
        raise ValueError(f"{told}; give a smaller --max-new, or other prompts")
    if longer:
        screen.print(told, soft_wrap=True)
    return rows, prompts


def _written(path: Path, rows: Sequence[dict[str, Any]]) -> int:
    """How many of `rows` have their answers in the file already; half of a line is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for line, row in zip(lines, rows, strict=False):
        old = json.loads(line) | {"where": row["where"]}  # by whatever path the file was given
        if {**old, "messages": old["messages"][:-1]} != row:
            raise ValueError(f"{path} holds answers to other prompts, or of another teacher; "
                             "delete it, or choose another --run folder")
    with open(path, "ab") as file:
        file.truncate(sum(len(line) + 1 for line in lines))
    return len(lines)


def _line(row: dict[str, Any], answer: Rollout) -> bytes:
    """The conversation as a line of JSON."""
    said = answer.text.rpartition(THINK_END)[2].strip()
    right = bool(said) and not answer.truncated and (
        "answer" not in row or make_row(row, row["where"]).score(said) == 1)
    message = {"role": "assistant", "content": answer.text if said else "-", "train": right}
    return (json.dumps({**row, "messages": [*row["messages"], message]}) + "\n").encode()
