"""From text to a tokenizer, and from both to shards, with progress shown."""
from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from fira.data.prepare import prepare
from fira.data.sources import inputs
from fira.data.text import items, total_bytes
from fira.data.tokenizer import Tokenizer, train_tokenizer
from fira.runlog import ProgressLine


def learn_tokenizer(sources: list[str], out: Path, vocab_size: int, max_bytes: int,
                    screen: Console) -> Tokenizer:
    """Learn a vocabulary from `sources` and save it in `out`.

    Raises ValueError before the long work if `out` cannot be written.
    """
    given, began = inputs(sources), time.perf_counter()
    _check_writable(out)
    total = total_bytes(given)
    with ProgressLine("tokenizer", screen) as line:
        def texts() -> Iterator[str]:
            size = 0
            for item in items(given):
                size += len(item.text.encode())
                line.update(item.done / total if total else 0.0, f"{size / 1e6:.1f} MB read",
                            time.perf_counter() - began)
                yield item.text
        learned = train_tokenizer(texts(), vocab_size, max_bytes)
    learned.save(out)
    screen.print(f"tokenizer of {learned.vocab_size:,} tokens in {out} "
                 f"({time.perf_counter() - began:.1f} s)")
    return learned


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror or error}); give a folder "
                         "that you may write to") from None


def prepare_data(sources: list[str], out: Path, tokenizer: Path | Tokenizer, validation_every: int,
                 validation: list[str], workers: int | None, screen: Console) -> None:
    """Tokenize `sources` into the data folder `out`; continues one that was interrupted."""
    learned = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    if learned.fast_reason:
        screen.print(f"tokenizing with the slower reference encoder: {learned.fast_reason}")
    began = time.perf_counter()
    with ProgressLine("data", screen) as line:
        def show(done: int, total: int | None) -> None:
            line.update(done / total if total else 0.0, f"{done / 1e6:.1f} MB",
                        time.perf_counter() - began)
        manifest = prepare(sources, out, learned, validation_every=validation_every,
                           validation_sources=validation or None, workers=workers, progress=show)
    for split, facts in manifest["splits"].items():
        screen.print(f"{split}: {facts['documents']:,} documents, {facts['bytes'] / 1e6:.1f} MB, "
                     f"{facts['tokens']:,} tokens")
