"""Sources become a tokenizer and a data folder: streamed, on all cores, resumable, deterministic.

Documents keep their order however many workers tokenize them. Every few seconds the shards are
synced, and a journal records how far they go and which item comes next. A process that finds a
journal cuts the shards back to it and continues. The manifest is written last; it makes the folder
complete.
"""
from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fira import runtime
from fira.data.shards import SPLITS, ShardWriter, read_manifest
from fira.data.sources import DEFAULT, Input, Reading, Tally, find, listed, note, total_bytes
from fira.data.text import Item, group, read
from fira.data.tokenizer import BYTES_PER_MERGE, Tokenizer, train_tokenizer
from fira.data.worker import Encoded, dtype_for, encode_batch, start_worker, work
from fira.files import MANIFEST, read_json, remove, write_json
from fira.runlog import ProgressLine

JOURNAL = "journal.json"
BATCH_CHARS = 1 << 20    # characters of text sent to a worker at once
WORKER_BYTES = 16 << 20  # less input than this is tokenized before a second process has started
COMMIT_SECONDS = 5.0     # time between two journal entries


def learn_tokenizer(sources: Sequence[str], folder: Path, vocab_size: int, max_bytes: int,
                    screen: Console, reading: Reading = DEFAULT) -> Tokenizer:
    """Learn a vocabulary from the first `max_bytes` of `sources` and save it in `folder`.

    Raises ValueError, before the long work, for bad sources or a folder that cannot be written.
    """
    train, _, passed_over = find(sources)
    _say("not read for training", passed_over, screen)
    with _one_line_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    items = _shown("tokenizer", train, read(train, reading), screen)
    tokenizer = train_tokenizer((item.text for item in items), vocab_size, max_bytes)
    tokenizer.save(folder)
    screen.print(f"tokenizer of {tokenizer.vocab_size:,} tokens in {folder}")
    if tokenizer.vocab_size < vocab_size:
        screen.print(f"{vocab_size:,} tokens were asked for; this text is enough for "
                     f"{tokenizer.vocab_size:,} (a merge for every {BYTES_PER_MERGE} bytes)")
    return tokenizer


def prepare(sources: Sequence[str], folder: str | Path, tokenizer: Tokenizer, *,
            validation_every: int = 20, validation_sources: Sequence[str] = (),
            shard_tokens: int = 1 << 27, workers: int | None = None,
            reading: Reading = DEFAULT, screen: Console | None = None) -> dict[str, Any]:
    """Tokenize `sources` into `folder` and return its manifest; at once if that is done already.

    Every `validation_every`-th document is used for validation (0: none), or, if there are too few,
    the end of the text; with `validation_sources`, or files that are named so (`sources.find`),
    exactly their documents. Progress is shown on `screen`. Raises ValueError, one line, for bad
    sources, a folder that holds other data, or one that cannot be written.
    """
    train, held_out, passed_over = find(sources, validation_sources)
    given = train + held_out
    recipe = _recipe(given, len(train), 0 if held_out else validation_every, shard_tokens,
                     tokenizer, reading)
    folder, screen = Path(folder), screen or Console(quiet=True)
    _say("not read for training", passed_over, screen)
    with _one_line_errors(folder):
        if (folder / MANIFEST).exists():
            _check_same(folder, read_manifest(folder), recipe)
            remove(folder / JOURNAL)  # still there if a kill came between the last two steps
        else:
            _check_ours(folder, tokenizer)
            if tokenizer.slow_reason:
                screen.print("tokenizing with the slower reference encoder: "
                             f"{tokenizer.slow_reason}")
            if tokenizer.rewrites:
                screen.print(f"the tokenizer rewrites text ({tokenizer.rewrites}): the model learns"
                             " the new text, and fira eval refuses documents whose number of bytes "
                             "that changes", soft_wrap=True)
            with runtime.claim(folder):
                recipe["held_out_from"] = _held_out_from(
                    train, recipe["validation_every"], reading, screen)
                if held_out:
                    _held_out_from(held_out, 0, reading, screen)
                job = _Job(folder, recipe, given, tokenizer).run(_workers(workers, given))
                collections.deque(_shown("data", given, job, screen), maxlen=0)
    manifest = read_manifest(folder)
    for split, facts in manifest["splits"].items():
        screen.print(f"{split}: {facts['documents']:,} documents, {facts['bytes'] / 1e6:.1f} MB, "
                     f"{facts['tokens']:,} tokens")
    _say("left out", manifest["left_out"], screen)
    return manifest


def _say(what: str, tally: Tally, screen: Console) -> None:
    if tally:
        screen.print(f"{what}: {listed(tally)}", soft_wrap=True, highlight=False)


def _shown(title: str, given: list[Input], items: Iterator[Item],
           screen: Console) -> Iterator[Item]:
    """The items, with a progress line that says how much of the input was read."""
    began, total = time.perf_counter(), total_bytes(given)
    with ProgressLine(title, screen) as line:
        for item in items:
            yield item
            line.update(item.done / total if total else 0.0, f"{item.done / 1e6:.1f} MB",
                        time.perf_counter() - began)


def _held_out_from(given: list[Input], every: int, reading: Reading,
                   screen: Console) -> int | None:
    """Where validation begins, in characters, if there are fewer than `every` documents of text.

    Raises ValueError if there is too little text. Both are found before the long work.
    """
    documents = chars = 0
    for item in _shown("documents", given, read(given, reading), screen):
        documents, chars = documents + item.ends, chars + len(item.text)
        if documents >= max(1, every):
            return None
    if chars < max(1, every):
        raise ValueError(f"{given[0].name}{' ...' * (len(given) > 1)}: {documents} documents with "
                         f"text, {chars} characters; give files with more text")
    screen.print(f"validation: the last {chars // every:,} characters, because there are fewer "
                 f"documents ({documents}) than {every}", soft_wrap=True)
    return chars - chars // every


def _recipe(given: list[Input], train_inputs: int, validation_every: int, shard_tokens: int,
            tokenizer: Tokenizer, reading: Reading) -> dict[str, Any]:
    """Everything that decides the bytes of the shards."""
    if validation_every < 0 or validation_every == 1:
        raise ValueError(f"validation_every={validation_every} must be 0 (no validation documents) "
                         "or at least 2; the default is 20")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens} must be positive; the default is {1 << 27}")
    return {"format": 2, "inputs": [one.fingerprint() for one in given],
            "train_inputs": train_inputs, "validation_every": validation_every,
            "reading": dataclasses.asdict(reading),
            "shard_tokens": shard_tokens, "dtype": dtype_for(tokenizer.vocab_size),
            "vocab_size": tokenizer.vocab_size, "tokenizer_hash": tokenizer.hash,
            "end_of_text": tokenizer.end_of_text}


def _check_same(folder: Path, found: dict[str, Any], recipe: dict[str, Any]) -> None:
    differs = [key for key in recipe if found.get(key) != recipe[key]]
    if differs:
        names = {"inputs": "source (by name, size or time)", "tokenizer_hash": "tokenizer",
                 "vocab_size": "tokenizer"}
        what = names.get(differs[0], f"{differs[0]} ({found.get(differs[0])}, now "
                                     f"{recipe[differs[0]]})")
        raise ValueError(f"{folder} holds data made with another {what}; give another folder, or "
                         "delete this one")


def _check_ours(folder: Path, tokenizer: Tokenizer) -> None:
    """Make the folder, or accept an empty or interrupted one; refuse one with other content."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    if not found or JOURNAL in found:
        return
    ours = "tokenizer.json" in found and found <= {"tokenizer.json", "tokenizer_config.json"}
    if not ours or Tokenizer.load(folder).hash != tokenizer.hash:
        raise ValueError(f"{folder} holds other files ({', '.join(sorted(found)[:3])}); give a new "
                         "or empty folder")


def _workers(workers: int | None, given: list[Input]) -> int:
    if workers is not None:
        return workers
    cores, size = runtime.workers(), total_bytes(given)
    return cores if size is None else max(1, min(cores, size // WORKER_BYTES))


class _Job:
    """A preparation in progress: its shards and how far they go."""

    def __init__(self, folder: Path, recipe: dict[str, Any], given: list[Input],
                 tokenizer: Tokenizer):
        self.folder, self.recipe, self.given, self.tokenizer = folder, recipe, given, tokenizer
        journal = _read_journal(folder, recipe)
        self.place: list[int] = journal["place"]   # input, number of its items that are done
        self.documents: int = journal["documents"]  # done so far, both splits
        self.left_out: Tally = journal["left_out"]
        if self.place == [0, 0]:
            write_json(folder / JOURNAL, {"recipe": recipe})  # from now on the folder is ours
            tokenizer.save(folder)
        self.writers = {split: ShardWriter(folder, split, recipe["dtype"], recipe["shard_tokens"],
                                           journal["splits"].get(split)) for split in SPLITS}

    def run(self, workers: int) -> Iterator[Item]:
        """Do the work; the last item of each batch is returned when it is written."""
        saved, (file, number) = time.monotonic(), self.place
        items = read(self.given, Reading(**self.recipe["reading"]), (file, number),
                     self.recipe["held_out_from"])
        batches = group(items, BATCH_CHARS)
        with contextlib.closing(_encoded(batches, self.folder, self.tokenizer, workers)) as done:
            for batch, encoded in done:
                self._write(batch, encoded)
                if time.monotonic() - saved > COMMIT_SECONDS:
                    self._commit()
                    saved = time.monotonic()
                yield batch[-1]
        self._finish()

    def _write(self, batch: list[Item], encoded: Encoded) -> None:
        every = self.recipe["validation_every"]
        parts: dict[str, list[tuple[np.ndarray, int, bool]]] = {split: [] for split in self.writers}
        for item, (ids, size) in zip(batch, encoded, strict=True):
            if item.left_out:
                note(self.left_out, item.left_out, item.where)
            held_out = (item.held_out or item.file >= self.recipe["train_inputs"]
                        or every and self.documents % every == every - 1)
            parts["validation" if held_out else "train"].append((ids, size, item.ends))
            self.documents += item.ends
        for split, found in parts.items():
            if found:
                rows, sizes, ends = zip(*found, strict=True)
                self.writers[split].add(np.concatenate(rows), sum(sizes), sum(ends))
        self.place = [batch[-1].file, batch[-1].number + 1]

    def _commit(self) -> None:
        states = {split: writer.sync() for split, writer in self.writers.items()}
        write_json(self.folder / JOURNAL, {"recipe": self.recipe, "place": self.place,
                                           "documents": self.documents, "splits": states,
                                           "left_out": self.left_out})

    def _finish(self) -> None:
        splits = {split: writer.finish() for split, writer in self.writers.items()}
        write_json(self.folder / MANIFEST, {**self.recipe, "splits": splits,
                                            "left_out": self.left_out})
        remove(self.folder / JOURNAL)


def _read_journal(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """How far an interrupted preparation came. Raises ValueError if it was another one."""
    file = folder / JOURNAL
    begun = read_json(file, f"delete {folder} and prepare it again") if file.exists() else {}
    journal = {"place": [0, 0], "documents": 0, "splits": {}, "left_out": {}, **begun}
    index, number = journal["place"]
    reached = index + (number > 0)  # the inputs after these may have been changed since
    if reached:
        found, now = ({**one, "inputs": one["inputs"][:reached]}
                      for one in (journal["recipe"], recipe))
        _check_same(folder, found, now)
    return journal


def _encoded(batches: Iterator[list[Item]], folder: Path, tokenizer: Tokenizer,
             workers: int) -> Generator[tuple[list[Item], Encoded], None, None]:
    """Batches with their ids, in order; several workers have a few batches in progress."""
    if workers == 1:
        for batch in batches:
            yield batch, encode_batch(tokenizer, batch)
        return
    context = multiprocessing.get_context("spawn")  # fork is unsafe in a process with threads
    waiting: collections.deque[tuple[list[Item], Future[Encoded]]] = collections.deque()
    pool = ProcessPoolExecutor(workers, context, start_worker, (str(folder),))
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(work, [item[:2] for item in batch])))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _one_line_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise ValueError("a tokenizing process was killed, probably because memory ran out; run "
                         "the command again with fewer --workers; it continues the work") from None
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror or error}); give a folder "
                         "that you may write to, or free some space; the same command then "
                         "continues the work") from None
