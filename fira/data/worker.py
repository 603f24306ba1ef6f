"""Tokenizes batches of texts, in processes that import nothing else."""
from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from fira.data.tokenizer import Tokenizer

Encoded = list[tuple[np.ndarray, int]]  # ids and number of UTF-8 bytes of each text of a batch


def dtype_for(vocab_size: int) -> str:
    """The smaller of the two unsigned types that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def encode_batch(tokenizer: Tokenizer, batch: Sequence[tuple[Any, ...]]) -> Encoded:
    """Ids of texts, with end-of-text where a document ends, and the UTF-8 bytes of each."""
    dtype, end = dtype_for(tokenizer.vocab_size), np.uint32(tokenizer.end_of_text)
    found = []
    for text, ends, *_ in batch:
        ids = tokenizer.encode_array(text)
        ids = np.append(ids, end) if ends else ids
        found.append((ids.astype(dtype), len(text.encode("utf-8"))))
    return found


_tokenizer: Tokenizer  # in a worker process: set once, when it starts


def start_worker(folder: str) -> None:
    """Load the tokenizer of `folder`, once; end when the parent has ended."""
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    _tokenizer = Tokenizer.load(folder)


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, even if the parent was killed."""
    multiprocessing.connection.wait([parent])
    os._exit(1)


def work(batch: list[tuple[str, bool]]) -> Encoded:
    """`encode_batch` in a worker."""
    return encode_batch(_tokenizer, batch)
