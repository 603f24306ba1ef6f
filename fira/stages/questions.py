"""The prompts of a run of reinforcement learning: rows of files, or made by a spec."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fira.config import ConfigError
from fira.data.chat import prompt_ids
from fira.data.records import records
from fira.data.sources import RECORDS, inputs
from fira.data.tokenizer import Tokenizer
from fira.eval.task import make_row
from fira.eval.tasks.generate import FAMILIES, is_spec, open_tasks
from fira.infer.thought import limit_thought
from fira.model.files import CONFIG, read_config
from fira.stages.reward import Question

MADE = 2000  # questions of a spec to train on


def is_made(name: str) -> bool:
    """Whether a name is a spec and not a file."""
    return (is_spec(name) or name in FAMILIES) and not Path(name).exists()


def _records(name: str, split: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file, or of a spec: MADE to train on, a tenth of them to evaluate on."""
    if not is_made(name):
        yield from records(inputs([name], RECORDS))
        return
    test = split == "test"
    for task in open_tasks(name, MADE // 10 if test else MADE, split, 0 if test else 1):
        for row in task.rows:
            yield str(row.group), {"messages": list(row.messages), "answer": row.answers[0],
                                   "checker": row.checker, "group": row.group}


def read_questions(config: Any, names: Iterable[str], split: str) -> list[Question]:
    """Those of files or specs. Raises ValueError, one line, for a row that is no prompt, or that
    leaves no room for an answer in the sequences of the run's `config`."""
    tokenizer, found = Tokenizer.load(config.data.start), list[Question]()
    rl = config.rl
    room = config.train.sequence_length + 1 - rl.max_new
    direct, _ = limit_thought(SimpleNamespace(**read_config(Path(config.data.start) / CONFIG)[1]),
                              rl.think, rl.max_thinking_tokens, rl.max_new)
    for where, record in (one for name in names for one in _records(name, split)):
        row = make_row(record, where)
        if not row.messages:
            raise ValueError(f"{where}: a prompt for rl is a list of chat messages; write the row "
                             'as {"messages": [...], "answer": ...}')
        ids = prompt_ids(tokenizer, row.messages, tuned=True, direct=direct)
        if len(ids) > room:
            raise ConfigError(
                f"{where}: the prompt has {len(ids)} tokens and {room} fit beside an answer of "
                f"rl.max_new={rl.max_new}; give a smaller --max-new, or a larger "
                f"train.sequence_length, up to model.context={config.model.context}")
        found.append(Question(row, ids, record, where))
    return found
