"""Sources become a data folder: streamed, on all cores, resumable, the same bytes every time.

Documents keep their order however many workers tokenize them. Every few seconds what was written
is synced and a journal names how far it goes and which item comes next; a run that finds a
journal cuts the shards back to it and goes on. The manifest, written last, makes the folder whole.
"""
from __future__ import annotations

import collections
import contextlib
import errno
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from fira import runtime
from fira.data.shards import MANIFEST, SPLITS, dtype_for, read_manifest
from fira.data.sources import Input, inputs
from fira.data.text import Item, Progress, items, total_bytes
from fira.data.tokenizer import Tokenizer
from fira.data.writer import Writer, write_json

JOURNAL = "journal.json"
BATCH_CHARS = 1 << 20    # text that travels to a worker at once
WORKER_BYTES = 16 << 20  # input below this is tokenized sooner than a second process starts
COMMIT_SECONDS = 5.0


def prepare(sources: list[str], folder: str | Path, tokenizer: Tokenizer, *,
            validation_every: int = 20, validation_sources: list[str] | None = None,
            shard_tokens: int = 1 << 27, workers: int | None = None,
            progress: Progress | None = None) -> dict[str, Any]:
    """Tokenize `sources` into `folder` and return its manifest; at once if that is done already.

    Every `validation_every`-th document is held out (0: none), or, with `validation_sources`,
    exactly their documents. Raises ValueError, one line, for bad sources, a folder that holds
    other data, or one that cannot be written.
    """
    given = inputs(sources)
    held_out = inputs(validation_sources) if validation_sources else []
    if held_out:
        given, validation_every = inputs([*sources, *(validation_sources or [])]), 0
    recipe = _recipe(given, len(given) - len(held_out), validation_every, shard_tokens, tokenizer)
    folder = Path(folder)
    with _one_line_errors(folder):
        if (folder / MANIFEST).exists():
            return _finished(folder, recipe)
        _check_ours(folder, tokenizer)
        with runtime.claim(folder):
            job = _Job(folder, recipe, given, tokenizer)
            job.run(_workers(workers, given), progress)
        return read_manifest(folder)


def _recipe(given: list[Input], train_inputs: int, validation_every: int, shard_tokens: int,
            tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides the bytes of the shards."""
    if validation_every < 0 or validation_every == 1:
        raise ValueError(f"validation_every={validation_every} must be 0 (hold out nothing) or at "
                         "least 2; the default is 20")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens} must be positive; the default is {1 << 27}")
    return {"format": 1, "inputs": [one.fingerprint() for one in given],
            "train_inputs": train_inputs, "validation_every": validation_every,
            "shard_tokens": shard_tokens, "dtype": dtype_for(tokenizer.vocab_size),
            "vocab_size": tokenizer.vocab_size, "tokenizer_hash": tokenizer.hash,
            "end_of_text": tokenizer.end_of_text}


def _finished(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    manifest = read_manifest(folder)
    _check_same(folder, {key: manifest.get(key) for key in recipe}, recipe)
    (folder / JOURNAL).unlink(missing_ok=True)  # a kill came between the last two steps
    return manifest


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
    """Make the folder, or take an empty one or one begun before; never one with other content."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    if JOURNAL in found or found <= {JOURNAL + ".partial"}:
        return
    ours = "tokenizer.json" in found and found <= {"tokenizer.json", "tokenizer_config.json"}
    if not ours or Tokenizer.load(folder).hash != tokenizer.hash:
        raise ValueError(f"{folder} holds other files ({', '.join(sorted(found)[:3])}); give a new "
                         "or empty folder")


def _workers(workers: int | None, given: list[Input]) -> int:
    if workers is not None:
        if workers < 1:
            raise ValueError(f"workers={workers} must be at least 1; the default is all cores")
        return workers
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux: those this process may use
        cores = len(os.sched_getaffinity(0))
    size = total_bytes(given)
    return cores if size is None else max(1, min(cores, size // WORKER_BYTES))


class _Job:
    """One preparation under way: what is written, and how far it goes."""

    def __init__(self, folder: Path, recipe: dict[str, Any], given: list[Input],
                 tokenizer: Tokenizer):
        self.folder, self.recipe, self.given, self.tokenizer = folder, recipe, given, tokenizer
        journal = self._journal()
        self.place: list[int] = journal.get("place", [0, 0])  # input, items of it that are done
        self.seen: int = journal.get("documents", 0)          # documents so far, both splits
        self.opened: bool = journal.get("open", False)        # inside a document of several parts
        states = journal.get("splits", {})
        if self.place == [0, 0]:
            states = {}
            write_json(folder / JOURNAL, {"recipe": recipe})  # from here on the folder is ours
            tokenizer.save(folder)
        self.writers = {split: Writer(folder, split, recipe["dtype"], recipe["shard_tokens"],
                                      states.get(split)) for split in SPLITS}

    def run(self, workers: int, progress: Progress | None) -> None:
        saved = time.monotonic()
        total = total_bytes(self.given)
        read = items(self.given, *self.place)
        batches = self._batches(read)
        with contextlib.closing(_tokenized(batches, self.folder, self.tokenizer, workers)) as done:
            for batch, results in done:
                self._write(batch, results)
                if time.monotonic() - saved > COMMIT_SECONDS:
                    self._commit()
                    saved = time.monotonic()
                if progress:
                    progress(batch[-1][1].done, total)
        self._finish()

    def _batches(self, read: Iterable[Item]) -> Iterator[list[tuple[str, Item]]]:
        """Items with their split, about BATCH_CHARS of text at a time; empty documents fall out."""
        batch: list[tuple[str, Item]] = []
        size, seen, opened = 0, self.seen, self.opened
        for item in read:
            if not item.text and item.ends and not opened:
                continue
            batch.append((self._split(item, seen), item))
            opened = not item.ends
            seen += item.ends
            size += len(item.text)
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _split(self, item: Item, seen: int) -> str:
        every = self.recipe["validation_every"]
        if item.file >= self.recipe["train_inputs"] or (every and seen % every == every - 1):
            return "validation"
        return "train"

    def _write(self, batch: list[tuple[str, Item]], results: list[tuple[np.ndarray, int]]) -> None:
        for (split, item), (ids, size) in zip(batch, results, strict=True):
            self.writers[split].add(ids, size, item.ends)
            self.seen += item.ends
        last = batch[-1][1]
        self.place, self.opened = [last.file, last.number + 1], not last.ends

    def _commit(self) -> None:
        states = {split: writer.sync() for split, writer in self.writers.items()}
        write_json(self.folder / JOURNAL, {"recipe": self.recipe, "place": self.place,
                                           "documents": self.seen, "open": self.opened,
                                           "splits": states})

    def _journal(self) -> dict[str, Any]:
        file = self.folder / JOURNAL
        if not file.exists():
            return {}
        journal = json.loads(file.read_text(encoding="utf-8"))
        file_number, number = journal.get("place", (0, 0))
        if not file_number and not number:
            return {}
        before = file_number + (number > 0)  # inputs not yet reached may have been mended since
        found, now = ({**recipe, "inputs": recipe["inputs"][:before]}
                      for recipe in (journal["recipe"], self.recipe))
        _check_same(self.folder, found, now)
        return journal

    def _finish(self) -> None:
        every = self.recipe["validation_every"]
        if not self.seen:
            raise ValueError("the sources hold no text (no documents, or only empty ones); give "
                             "files with text")
        if self.seen < every:
            raise ValueError(f"the sources hold only {self.seen} document{'s' * (self.seen > 1)} "
                             f"and every {every}th is held out for validation, so none would be; "
                             "give a smaller --validation-every, or text with --validation")
        splits = {split: writer.finish() for split, writer in self.writers.items()}
        write_json(self.folder / MANIFEST, {**self.recipe, "splits": splits})
        os.remove(self.folder / JOURNAL)


_worker: Tokenizer  # in a worker process: set once, when it starts


def _start_worker(folder: str) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to act on
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()
    _worker = Tokenizer.load(folder)


def _follow(parent: int) -> None:
    """End this process when its parent is gone, also when that was killed."""
    multiprocessing.connection.wait([parent])
    os._exit(1)


def _work(texts: list[tuple[str, bool]]) -> list[tuple[np.ndarray, int]]:
    return _encode(_worker, texts)


def _encode(tokenizer: Tokenizer, texts: list[tuple[str, bool]]) -> list[tuple[np.ndarray, int]]:
    """Ids (end-of-text after a document's end) and UTF-8 bytes of each text."""
    dtype, end = dtype_for(tokenizer.vocab_size), tokenizer.end_of_text
    found = []
    for text, ends in texts:
        ids = tokenizer.encode_array(text)
        found.append((np.append(ids, end).astype(dtype) if ends else ids.astype(dtype),
                      len(text.encode("utf-8"))))
    return found


def _tokenized(batches: Iterator[list[tuple[str, Item]]], folder: Path, tokenizer: Tokenizer,
               workers: int) -> Generator[tuple[list, list], None, None]:
    """Batches with their results, in order; with several workers a few batches are under way."""
    def texts(batch: list[tuple[str, Item]]) -> list[tuple[str, bool]]:
        return [(item.text, item.ends) for _, item in batch]

    if workers == 1:
        for batch in batches:
            yield batch, _encode(tokenizer, texts(batch))
        return
    context = multiprocessing.get_context("spawn")  # fork is unsafe beside threads
    waiting: collections.deque[tuple[list, Future]] = collections.deque()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (str(folder),))
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_work, texts(batch))))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _one_line_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise ValueError("a tokenizing process was killed, probably for want of memory; run the "
                         "command again with fewer workers; it goes on where it stopped") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ValueError(f"no space left to write {folder}; free some and run the same "
                             "command again, and it goes on where it stopped") from None
        raise ValueError(f"{folder} cannot be written ({error.strerror or error}); give a folder "
                         "that you may write to") from None
