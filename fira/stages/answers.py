"""Answers to the prompts of conversations, by which a student is distilled: the teacher's, written
to a file, or the student's own, written while it is trained."""
from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fira.data.chat import prompt_ids
from fira.data.conversations import read_conversation
from fira.data.packs import Packs
from fira.data.records import records
from fira.data.sources import RECORDS, inputs
from fira.data.tokenizer import THINK_END, Tokenizer
from fira.eval.task import make_row
from fira.infer.load import load
from fira.infer.request import SamplingParams
from fira.loss.distill import UNKNOWN
from fira.loss.head import IGNORED
from fira.model.generate import window_length
from fira.runlog import ProgressLine
from fira.runtime import launch
from fira.stages.rollouts import SLOTS, Rollout, draw_seed, write_answers


class OwnAnswers:
    """The sequences of `packs`, with answers that `model` writes when they are read in place of
    each row's first answer and all that follows. An answer ends where its room does; its targets
    are UNKNOWN."""

    def __init__(self, packs: Packs, model: Any, tokenizer: Tokenizer, longest: int,
                 seed: int) -> None:
        self.packs, self.model, self.tokenizer, self.seed = packs, model, tokenizer, seed
        self.longest, self.length, self.key = longest, packs.length, f"own-{packs.key}"

    def __len__(self) -> int:
        return len(self.packs)

    def read(self, numbers: np.ndarray) -> list[np.ndarray]:
        rows = [[self.packs.rows[one] for one in self.packs.packs[number]] for number in numbers]
        prompts = [[row.ids[:row.trained.argmax()] for row in some] for some in rows]
        rooms = [(self.length + len(some) - sum(map(len, some))) // len(some) for some in prompts]
        answers = iter(write_answers(
            self.model, self.tokenizer, [ids.tolist() for some in prompts for ids in some],
            [draw_seed(self.seed, int(number), place) for number, some in zip(
                numbers, prompts, strict=True) for place in range(len(some))],
            SamplingParams(min(self.longest, max(rooms)))))
        found = [Packs([row._replace(ids=row.ids[:len(ids) + room],
                                     trained=row.trained[:len(ids) + room])
                        for ids, row in zip(some, (next(answers).row for _ in some), strict=True)],
                       self.length).read(np.zeros(1, int))
                 for some, room in zip(prompts, rooms, strict=True)]
        ids, targets, positions = map(np.concatenate, zip(*found, strict=True))
        return [ids, np.where(targets == IGNORED, IGNORED, UNKNOWN), positions]


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
    rows, prompts = list[dict[str, Any]](), list[list[int]]()
    for where, record in records(inputs(sources, RECORDS)):
        messages, tools = read_conversation(record)
        before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        ids = prompt_ids(tokenizer, before, True, tools)
        if len(ids) + params.max_new_tokens <= window_length(model):
            prompts.append(ids)
            rows.append({"teacher": str(folder), "temperature": params.temperature,
                         "kept": "right" if keep_right else "all", "where": where, "tools": tools,
                         **{key: record[key] for key in ("answer", "checker") if key in record},
                         "messages": before})
    done, begun = _written(path, rows), time.monotonic()
    with open(path, "ab") as file, ProgressLine("answers", screen) as shown:
        for first in range(done, len(rows), SLOTS):
            some = slice(first, first + SLOTS)
            found = write_answers(model, tokenizer, prompts[some], [
                draw_seed(number) for number in range(len(rows))[some]], params)
            file.writelines(_line(row, one, keep_right)
                            for row, one in zip(rows[some], found, strict=True))
            file.flush()
            shown.update((first + len(found)) / len(rows), f"{first + len(found):,} answers",
                         time.monotonic() - begun)


def _written(path: Path, rows: Sequence[dict[str, Any]]) -> int:
    """How many of `rows` have their answers in the file already; half of a line is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for line, row in zip(lines, rows, strict=False):
        if {**(old := json.loads(line)), "messages": old["messages"][:-1]} != row:
            raise ValueError(f"{path} holds answers to other prompts, or of another teacher; "
                             "delete it, or choose another --run folder")
    if len(lines) < len(rows) and launch().world > 1:
        raise ValueError("the teacher's answers are written by one process; give the same command "
                         "once without a launcher, then --resume the run on many ranks")
    with open(path, "ab") as file:
        file.truncate(sum(len(line) + 1 for line in lines))
    return len(lines)


def _line(row: dict[str, Any], answer: Rollout, keep_right: bool) -> bytes:
    """The conversation as a line of JSON."""
    said = answer.text.rpartition(THINK_END)[2].strip()
    right = bool(said) and not answer.truncated and not (
        keep_right and "answer" in row and make_row(row, row["where"]).score(said) < 1)
    message = {"role": "assistant", "content": answer.text if said else "-", "train": right}
    return (json.dumps({**row, "messages": [*row["messages"], message]}) + "\n").encode()
