"""Tuning: a trained or imported model learns from conversations and text.

Every weight is trained (full), or a low-rank adapter of each linear (lora), or adapters of those
experts only that the data uses most (experts). A share of general text may be mixed in (replay), so
that the model forgets less.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import AfterValidator, Field

from fira.config import Config, ConfigError
from fira.convert.quantize import quantize
from fira.data.batches import Folder, Shards
from fira.data.conversations import Reader, Row, without
from fira.data.packs import PackedBatches, Packs, Part, Sequences, Windows, in_order
from fira.data.shards import MANIFEST
from fira.data.sources import RECORDS, TEXT, find, inputs, listed
from fira.data.tokenizer import END_OF_TEXT, PAD, SPECIAL, THINK, THINK_END, TURN_END, Tokenizer
from fira.files import sha256
from fira.loss.head import next_token_loss
from fira.model.adapter import attach
from fira.model.files import CONFIG, knows_chat, read_config
from fira.model.router import routers
from fira.parallel.layout import Layout, first_row, gathered, local
from fira.stages.choice import prepare_router
from fira.stages.config import Opened, RunConfig, Stage
from fira.train.loop import Recipe, Score
from fira.train.validate import validate

HELD_OUT = 20  # every HELD_OUT-th row is held out where no file is
# A file, so that a run resumes from anywhere, or another source by its name.
Files = list[Annotated[str, AfterValidator(
    lambda name: os.path.abspath(name) if os.path.exists(name) else name)]]


class TuneData(Config):
    start: Folder = Field(description="step folder of the model that is tuned")
    chat: Files = Field([], description="files or folders of conversations")
    text: Files = Field([], description="files or folders of text")
    held_out: Files = Field([], description="conversations or text to evaluate on; without "
                                   "them a twentieth of the rows")
    general: Files = Field([], description="general text, prepared by `fira data` or files: "
                                  "for replay, and to see what is forgotten")
    skip_bad: bool = Field(False, description="leave out rows at fault, and count them")
    direct: bool = Field(False, description="give conversations with thoughts a second time, with "
                                            "empty ones: the model learns to answer at once, too")
    replay: float = Field(0.0, ge=0, lt=1, description="share of general text in what is read")


class TuneOptions(Config):
    method: Literal["full", "lora", "experts"] = Field("lora", description="what is trained")
    rank: int = Field(16, ge=1, description="rank of adapters; of an expert's divided by top_k")
    router: Literal["freeze", "train"] = Field("freeze", description="whether routers are trained")
    experts: str = Field("0.25", description="method experts: the share of each layer's experts "
                         "that get adapters, or random:SHARE")
    chosen: list[list[int]] | None = Field(None, description="these experts, of each layer")
    thoughts: bool = Field(False, description="whether the data has thoughts, as it was found")


class TuneConfig(RunConfig):
    """Everything that decides a tuning."""

    data: TuneData
    tune: TuneOptions = TuneOptions()


class Data(NamedTuple):
    """What a tuning reads, as sequences: to train on, to evaluate on, general text likewise."""

    train: Packs
    held_out: Sequences
    general: Sequences | None
    general_held_out: Sequences | None


def open_data(config: TuneConfig) -> Opened:
    """Read and pack everything. Raises ValueError, one line with the place, for what is wrong."""
    data, length = config.data, config.train.sequence_length
    tokenizer, rows, held_out = Tokenizer.load(data.start), list[Row](), list[Row]()
    reader = Reader(tokenizer, length + 1, data.skip_bad, data.direct)
    given = data.held_out
    lines = reader.lines
    for read, sources, kinds in ((reader.chat, data.chat, RECORDS), (reader.text, data.text, TEXT)):
        if sources:
            train, validation, passed_over = find(sources, given, kinds)
            rows += read(train)
            held_out += read(validation)
            lines += [f"passed over: {listed(passed_over)}"] if passed_over else []
            given = []  # what is given to evaluate on is of the first kind
    if split := not held_out:
        held_out, rows = ([row for row in rows if bool(row.group % HELD_OUT) == kept]
                          for kept in (False, True))
    kept = without(rows, held_out)
    if not kept:
        raise ValueError(_nothing_left(
            reader, len(rows), split and bool(held_out), config))
    lines += [f"of these: {listed(reader.tally)}"] if reader.tally else []
    if len(rows) > len(kept):
        lines.append(f"{len(rows) - len(kept):,} rows are equal to held-out rows and left out")
    counts = {"rows": len(kept), "rows equal to held-out rows": len(rows) - len(kept),
              "tokens": sum(len(row.ids) for row in kept),
              "tokens trained on": sum(int(row.trained.sum()) for row in kept),
              "rows with thoughts": count_thoughts(kept, tokenizer),
              **{f"rows {why}": entry["count"] for why, entry in reader.tally.items()}}
    general = _general(tokenizer, data.general, length)
    found = Data(Packs(kept, length), Packs(held_out, length), *general)
    about = {"sources": [Path(name).name for name in (*data.chat, *data.text)], **counts,
             "sha256": [found.train.key]}
    return Opened(Path(data.start), found, about, lines)


def _nothing_left(reader: Reader, rows: int, split: bool, config: TuneConfig) -> str:
    """Why there is nothing to train on, and what to do; `split`: the first row was held out."""
    context, needed = config.model.context, reader.needed
    remedy = ("all others are equal to held-out rows; give other rows" if rows else
              "the only row is held out; give more, or --held-out FILES" if split else
              "give rows with an answer" if not needed else
              f"set train.sequence_length={needed - 1}" if needed <= context else
              f"shorten them: the model reads {context} tokens, the shortest needs {needed}")
    return f"no row is left to train on: {listed(reader.tally) or 'none'}; {remedy}"


def _general(tokenizer: Tokenizer, sources: Sequence[str],
             length: int) -> tuple[Sequences | None, Sequences | None]:
    """General text to train on and to evaluate on."""
    if not sources:
        return None, None
    if (Path(sources[0]) / MANIFEST).is_file():
        train, held_out = (Windows(tokens, length, key) for tokens, key in (
            (Shards(sources[0], split), sha256(Path(sources[0]) / MANIFEST)[:15] + split[0])
            for split in ("train", "validation")))
        return train, held_out
    rows = Reader(tokenizer, length + 1).text(inputs(sources))
    apart = Packs(rows[::HELD_OUT], length)
    del rows[::HELD_OUT]
    return Packs(rows, length), apart


def adapt(config: TuneConfig, model: Any, tokenizer: Tokenizer) -> None:
    """Freeze what is not trained, and add adapters. Raises ConfigError if that cannot be."""
    kind = read_config(Path(config.data.start) / CONFIG)[1]["quantization"]
    parallel = config.parallel
    if parallel.pipeline > 1:
        raise ConfigError(f"parallel.pipeline={parallel.pipeline} cannot mask rows from each "
                          "other; set it to 1, and parallel.shard or parallel.expert instead")
    if parallel.expert > 1 and config.tune.method == "experts":
        raise ConfigError(f"parallel.expert={parallel.expert} divides all experts, not those of "
                          "--method experts; set it to 1, and parallel.data or parallel.shard")
    if kind:
        quantize(model, kind)
    if kind and config.tune.method == "full":
        raise ConfigError(f"--method full cannot change {kind} weights; use --method lora, or tune "
                          "the run that they were made from")
    if config.tune.method != "full":
        attach(model, config.tune.rank, config.tune.chosen,
               _new_tokens(config, tokenizer, config.tune.thoughts))
    for router in routers(model):
        prepare_router(router, config.tune.router == "train")


def count_thoughts(rows: Sequence[Row], tokenizer: Tokenizer) -> int:
    """How many rows have a thought, which may be empty."""
    return sum(tokenizer.added.get(THINK) in row.ids for row in rows)


def learn_turns(config: Any, model: Any, tokenizer: Tokenizer, read: Sequence[Row]) -> None:
    """Give tokens that were never trained the embedding and head of the end of text: it too stands
    where something ends and something else begins. The model notes what the rows `read` teach."""
    thoughts = bool(count_thoughts(read, tokenizer))
    model.chat, model.think = True, bool(model.think or thoughts)
    tokens = list(_new_tokens(config, tokenizer, thoughts))
    for name in {"token_embedding", model.after[-1]} if tokens else ():
        part = getattr(model, name)
        weight, changed = gathered(part.weight.detach()).clone(), part.weight
        rows = weight[[tokenizer.end_of_text] * len(tokens)]
        if hasattr(part, "lora"):
            changed, weight = part.lora.delta, rows - weight[tokens]
        else:
            weight[tokens] = rows
        own = local(changed.detach())
        own.copy_(weight[first_row(changed):][:len(own)])


def _new_tokens(config: Any, tokenizer: Tokenizer, thoughts: bool) -> tuple[int, ...]:
    """The special tokens of conversations, if the model was never trained on any, or those around
    thoughts, if it never was on these."""
    if not config.data.chat:
        return ()
    tokenizer.special(TURN_END)
    names = set(SPECIAL) - {END_OF_TEXT, PAD}
    if knows_chat(config.data.start):
        thinks = read_config(Path(config.data.start) / CONFIG)[1]["think"]
        names = {THINK, THINK_END} if thoughts and not thinks else set()
    return tuple(sorted(tokenizer.added[name] for name in tokenizer.added.keys() & names))


def recipe(config: TuneConfig, data: Data, tokenizer: Tokenizer, layout: Layout) -> Recipe:
    """Packed rows, cross-entropy of what is trained on, bits per byte of held-out rows."""
    parts = [Part("target", data.train, 1 - config.data.replay)]
    if config.data.replay and data.general is not None:
        parts.append(Part("general", data.general, config.data.replay))
    token_bytes_V = torch.zeros(config.model.vocab_size, dtype=torch.long)
    sizes = torch.tensor([len(text) for text in tokenizer.token_bytes()])
    token_bytes_V[:len(sizes)] = sizes
    micro, most = config.train.micro_batch, config.train.validation_tokens

    def probe() -> tuple[dict[str, float], Score]:
        row = dict[str, float]()
        for text, suffix in ((data.held_out, ""), (data.general_held_out, "/general")):
            if text is not None:
                found = validate(layout, in_order(text, micro, max(1, most // text.length)),
                                 token_bytes_V)
                row |= {name + suffix: value for name, value in found.items()}
        return row, Score("bits_per_byte", row["bits_per_byte"])

    def begin(run: Path, fresh: bool) -> None:
        if fresh and config.data.chat:
            learn_turns(config, layout.model, tokenizer, data.train.rows)

    return Recipe(PackedBatches(parts, config.train, layout.rows), next_token_loss, probe, begin)


TUNE = Stage("tune", TuneConfig, open_data, recipe, adapt,
             {"optim": {}, "train": {"steps": 1}}, 0.0, quantized=True)
