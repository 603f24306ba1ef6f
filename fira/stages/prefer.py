"""Tuning on preferences: of two answers to a prompt, the chosen one is to become likelier.

The reference is the tuned run itself before its first step. Its log-probabilities are computed
once, and kept in the run folder.
"""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from safetensors.numpy import load_file, save_file

from fira.config import Config, ConfigError
from fira.data.conversations import Row, pairs
from fira.data.packs import PackedBatches, Packs, Part, in_order
from fira.data.tokenizer import Tokenizer
from fira.files import replacing
from fira.loss.preference import PairBatch, log_probabilities, preference_loss
from fira.parallel.layout import Layout
from fira.stages.config import Opened, RunConfig, Stage
from fira.stages.tune import HELD_OUT, Files, TuneOptions, adapt, count_thoughts, learn_turns
from fira.train.loop import Recipe, Score

REFERENCE = "reference.safetensors"
# Nats per token by which the chosen answers may become less likely, which DPO can do: it compares,
# so both answers may fall, as long as the rejected one falls more (Pal et al. 2024, 2402.13228).
MOST_LOST = 0.5
PATIENCE = 2  # evaluations in a row that are worse, or lose more, end the run


class PreferData(Config):
    start: str = Field(description="step folder of the model that is tuned")
    chat: Files = Field(description="files or folders of pairs: prompt, chosen, rejected")
    held_out: Files = Field([], description="pairs to evaluate on; without them a twentieth")
    skip_bad: bool = Field(False, description="leave out pairs at fault, and count them")


class PreferOptions(Config):
    beta: float | None = Field(None, gt=0, description="how strongly the reference holds the "
                               "model; null is 0.1, or 5 if normalized")
    normalized: bool = Field(False, description="compare log-probabilities per token")


class PreferConfig(RunConfig):
    """Everything that decides a tuning on preferences."""

    data: PreferData
    tune: TuneOptions = TuneOptions()
    prefer: PreferOptions = PreferOptions()


class Referenced:
    """Packed pairs with the reference's log-probabilities [sequences, T], once they are known."""

    def __init__(self, packs: Packs) -> None:
        self.packs, self.key, self.length = packs, packs.key, packs.length
        self.rows = packs.rows
        self.reference = np.zeros((len(packs), packs.length), np.float32)

    def __len__(self) -> int:
        return len(self.packs)

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, ...]:
        return *self.packs.read(numbers), self.reference[numbers]


class Data(NamedTuple):
    train: Referenced
    held_out: Referenced


def open_data(config: PreferConfig) -> Opened:
    """Read and pack the pairs. Raises ValueError, one line with the place, for what is wrong."""
    data = config.data
    train, counts = _read(config, data.chat)
    if data.held_out:
        held_out, others = _read(config, data.held_out)
        counts = {why: count + others[why] for why, count in counts.items()}
    else:
        held_out = train[::HELD_OUT]
        del train[::HELD_OUT]
    if not train:
        raise ConfigError("there is one pair, which is held out; give more, or --held-out FILES")
    found = Data(*(Referenced(Packs([row for pair in part for row in pair],
                                    config.train.sequence_length, together=2))
                   for part in (train, held_out)))
    line = f"{len(train):,} pairs to train on, {len(held_out):,} held out" + _left_out(counts)
    about = {"sources": [Path(name).name for name in data.chat], "pairs": len(train),
             "pairs held out": len(held_out), **counts, "sha256": [found.train.key],
             "rows with thoughts": count_thoughts(found.train.rows, Tokenizer.load(data.start))}
    return Opened(Path(data.start), found, about, [line])


def _read(config: PreferConfig, sources: Files) -> tuple[list[tuple[Row, Row]], dict[str, int]]:
    """The pairs that fit into a sequence, and how many do not or are at fault. Raises ConfigError
    if none is left."""
    length, context = config.train.sequence_length, config.model.context
    found, longer, at_fault = list[tuple[Row, Row]](), list[int](), 0
    for pair in pairs(Tokenizer.load(config.data.start), sources, config.data.skip_bad):
        size = sum(len(row.ids) - 1 for row in pair or ())
        if pair is None:
            at_fault += 1
        elif size > length:
            longer.append(size)
        else:
            found.append(pair)
    counts = {f"too long for train.sequence_length={length}, which holds both answers": len(longer),
              "at fault": at_fault}
    if not found:
        shortest = min(longer, default=1)
        remedy = ("give rows with prompt, chosen and rejected" if not longer else
                  f"the model reads {context} tokens, the shortest pair has {shortest}: shorten it"
                  if shortest > context else "set train.sequence_length="
                  f"{min(context, 1 << (shortest - 1).bit_length())}")
        raise ConfigError(f"no pair of {', '.join(map(os.path.basename, sources))} is left"
                          f"{_left_out(counts)}; {remedy}")
    return found, counts


def _left_out(counts: dict[str, int]) -> str:
    return "".join(f"; {count:,} left out, {why}" for why, count in counts.items() if count)


def recipe(config: PreferConfig, data: Data, tokenizer: Tokenizer, layout: Layout) -> Recipe:
    """Packed pairs, the loss of DPO, and the same on held-out pairs."""
    normalized = config.prefer.normalized
    loss_fn = preference_loss(config.prefer.beta or (5.0 if normalized else 0.1), normalized)
    batches = PackedBatches([Part("pairs", data.train, 1.0)], config.train, layout.rows, PairBatch)

    def begin(run: Path, fresh: bool) -> None:
        if fresh:
            learn_turns(config, layout.model, tokenizer, data.train.rows)
        _know_reference(run / REFERENCE, fresh, layout, config.train.micro_batch, data)

    def probe() -> tuple[dict[str, float], Score]:
        row = _evaluate(layout, loss_fn, in_order(data.held_out, config.train.micro_batch,
                                                  kind=PairBatch))
        change = row["chosen_change"]
        return row, Score("loss", row["loss"], refused="" if change >= -MOST_LOST else (
            f"the chosen answers became less likely by {-change:.2f} nats per token, more than "
            f"{MOST_LOST}; tune again with a lower optim.lr or a larger --beta"))

    return Recipe(batches, loss_fn, probe, begin)


def _know_reference(path: Path, fresh: bool, layout: Layout, micro: int, data: Data) -> None:
    """Compute the log-probabilities of all pairs by the weights of the start, or read them again.

    Raises ValueError if they are gone, or are of other pairs."""
    layout.model.eval()
    for name, part in (("train", data.train), ("held_out", data.held_out)):
        if fresh:
            for place, (batch, mine) in enumerate(layout.take_turns(in_order(
                    part, micro, kind=PairBatch))):
                found = layout.score(log_probabilities, batch)
                if mine and found is not None:
                    first = (place * layout.mesh.batch_ranks + layout.mesh.batch_rank) * micro
                    part.reference[first:first + len(found)] = found.float().cpu()
            part.reference[:] = layout.sum(torch.from_numpy(part.reference))
        elif not path.is_file() or (saved := load_file(path)).get(f"{name}-{part.key}") is None:
            raise ValueError(f"{path} is not of these pairs; put the files back as they were, or "
                             "tune anew into another --run folder")
        else:
            part.reference[:] = saved[f"{name}-{part.key}"]
    if fresh and layout.mesh.rank == 0:
        with replacing(path) as partial:
            save_file({f"{name}-{part.key}": part.reference for name, part in
                       (("train", data.train), ("held_out", data.held_out))}, partial)


def _evaluate(layout: Layout, loss_fn: Any, batches: Any) -> dict[str, float]:
    """The loss and its metrics over held-out pairs, each pair with equal weight."""
    layout.model.eval()
    sums: dict[str, float] = {}
    for batch, mine in layout.take_turns(batches):
        found = layout.score(loss_fn, batch)
        if found is not None and mine:
            for name, value in {"pairs": 1.0, "loss": found[0], **found[1]}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * batch.weight
    names = sorted({name for found in layout.mesh.gather(list(sums)) for name in found})
    totals = layout.sum(torch.tensor([sums.get(name, 0.0) for name in names], dtype=torch.float64))
    row = dict(zip(names, totals.tolist(), strict=True))
    pairs_scored = row.pop("pairs")
    return {name: value / pairs_scored for name, value in row.items()}


PREFER = Stage("prefer", PreferConfig, open_data, recipe, adapt,
               {"optim": {}, "train": {"steps": 1, "patience": PATIENCE}}, 0.0, quantized=True)
