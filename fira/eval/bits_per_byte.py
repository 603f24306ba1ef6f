"""Bits per byte of any text: the model's negative log-likelihood, comparable across tokenizers.

Every byte is scored exactly once, under one stated rule. Each document stands alone and begins
after the end-of-text token, which gives context but is not scored. The model reads windows of
`context` tokens that advance by half: the first scores all its tokens, every later one only the
new half, so that each token beyond the first window has at least half a window before it.
"""
from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fira.data.sources import inputs, total_bytes
from fira.data.text import Item, items
from fira.eval.score import Window
from fira.eval.score import score as score_windows
from fira.infer.load import load
from fira.model.generate import window_length
from fira.runlog import ProgressLine

SORTED = 1024  # windows that are sorted by length together, so that batches need little padding


def evaluate(run: str | Path, sources: list[str], context: int | None = None, device: str = "auto",
             screen: Console | None = None, adapter: Path | None = None) -> dict[str, Any]:
    """Score the text of `sources` with a run's newest step (or a step folder); see `score`, and
    for `adapter` `load`.

    Raises ValueError, one line, on a folder without a model, bad text, or a context out of range.
    """
    given = inputs(sources)
    loaded = load(run, device, adapter)
    total, start = total_bytes(given), time.monotonic()
    with ProgressLine("eval", screen or Console(quiet=True)) as line:
        def show(item: Item, size: int) -> None:
            line.update(item.done / total if total else 0.0, f"{size / 1e6:.1f} MB",
                        time.monotonic() - start)
        result = score(loaded.model, loaded.tokenizer, items(given), context, progress=show)
    return {"model": str(loaded.folder), "text": sources, **result}


def score(model: Any, tokenizer: Any, texts: Iterable[Item], context: int | None = None,
          batch_tokens: int | None = None,
          progress: Callable[[Item, int], None] | None = None) -> dict[str, Any]:
    """Bits per byte, nats per token, perplexity and the counts they rest on.

    `texts` are documents or consecutive parts of them; `context` is the length the model was
    trained on, unless given. Raises ValueError when there is no text, the context does not fit, or
    the tokenizer loses bytes.
    """
    context = window_length(model) if context is None else context
    if not 1 <= context <= model.spec.context:
        raise ValueError(f"context={context} must be from 1 to the model's {model.spec.context} "
                         "tokens; leave it out to use the length it was trained on")
    totals = _Totals(tokenizer)
    nats = 0.0
    was_training = model.training
    model.eval()
    try:
        stream = windows(totals.count(texts), context, tokenizer.end_of_text)
        while group := list(itertools.islice(stream, SORTED)):
            nats += sum(float(costs_P2[:, 0].sum()) for (costs_P2,) in score_windows(
                model, [[window] for window in group], batch_tokens))
            if progress and totals.item:
                progress(totals.item, totals.bytes)
    finally:
        model.train(was_training)
    if not totals.tokens:
        raise ValueError("the text is empty, nothing to score; give a file with text in it")
    loss = nats / totals.tokens
    return {"bits_per_byte": bits_per_byte(nats, totals.bytes), "loss_per_token": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bytes": totals.bytes, "tokens": totals.tokens, "documents": totals.documents,
            "context": context,
            "context_rule": f"documents apart, each after end-of-text (not scored); windows of "
                            f"{context} tokens advance by {stride(context)}; every token once"}


def bits_per_byte(nats: float, size: int) -> float:
    """Bits per byte of a text of `size` bytes whose negative log-likelihood is `nats`."""
    return nats / math.log(2) / size


def windows(parts: Iterable[tuple[list[int], bool]], context: int,
            end_of_text: int) -> Iterator[Window]:
    """Cut documents into windows that together predict every token once.

    `parts` are (ids, whether the document ends here). A window holds up to context + 1 tokens: the
    model reads all but the last and predicts all but the first.
    """
    tokens, known = [end_of_text], 0
    for ids, ends in parts:
        tokens += ids
        first = 0
        while len(tokens) - first > context:
            yield Window(tokens[first:first + context + 1], known)
            first, known = first + stride(context), context - stride(context)
        tokens = tokens[first:]
        if ends:
            if len(tokens) - 1 > known:
                yield Window(tokens, known)
            tokens, known = [end_of_text], 0


def stride(context: int) -> int:
    """How far windows advance: half of what the model reads."""
    return max(1, context // 2)


class _Totals:
    """Counts of what was scored, taken while the text passes by."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.sizes = np.array([len(text) for text in tokenizer.token_bytes()])
        self.item: Item | None = None
        self.bytes = self.tokens = self.documents = 0

    def count(self, texts: Iterable[Item]) -> Iterator[tuple[list[int], bool]]:
        """Tokenize and count; ids must stand for all bytes, or bits per byte would be wrong."""
        for item in texts:
            ids = self.tokenizer.encode(item.text)
            size, covered = len(item.text.encode("utf-8")), int(self.sizes[ids].sum()) if ids else 0
            if covered != size:
                raise ValueError(f"the tokenizer keeps {covered} of {size} bytes of document "
                                 f"{self.documents + 1}, so its bits per byte would be wrong; "
                                 "use a byte-level tokenizer without normalization")
            self.item = item
            self.bytes, self.tokens = self.bytes + size, self.tokens + len(ids)
            self.documents += item.ends
            yield ids, item.ends
