"""Tuning on preferences: of two answers to a prompt, the chosen one is to become likelier.

The reference is the tuned run itself before its first step. Its log-probabilities are computed
once, and kept in the run folder.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from safetensors.numpy import load_file, save_file

from fira.config import Config
from fira.data.conversations import pairs
from fira.data.packs import PackedBatches, Packs, Part, in_order
from fira.data.tokenizer import Tokenizer
from fira.files import replacing
from fira.loss.preference import PairBatch, log_probabilities, preference_loss
from fira.parallel.layout import Layout
from fira.stages.config import Opened, RunConfig, Stage
from fira.stages.tune import HELD_OUT, Files, TuneOptions, adapt, learn_turns
from fira.train.loop import Recipe, Score

REFERENCE = "reference.safetensors"
# Nats per token by which the chosen answers may become less likely. DPO only compares: it can lower
# both answers, as long as the rejected one falls more.
MOST_LOST = 0.5


class PreferData(Config):
    start: str = Field(description="step folder of the model that is tuned")
    chat: Files = Field(description="files or folders of pairs: prompt, chosen, rejected")
    held_out: Files = Field([], description="pairs to evaluate on; without them a twentieth")


class PreferOptions(Config):
    beta: float = Field(0.1, gt=0, description="how strongly the reference holds the model")
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
    counts: dict[str, int]


def open_data(config: PreferConfig) -> Opened:
    """Read and pack the pairs. Raises ValueError, one line with the place, for what is wrong."""
    data, length = config.data, config.train.sequence_length
    tokenizer, counts = Tokenizer.load(data.start), {"rows": 0, "rows left out": 0}
    rows = list(pairs(tokenizer, data.chat, length + 1, counts))
    if data.held_out:
        held_out = list(pairs(tokenizer, data.held_out, length + 1, {**counts}))
    else:
        number = [index // 2 % HELD_OUT for index in range(len(rows))]
        held_out = [row for row, index in zip(rows, number, strict=True) if index == 0]
        rows = [row for row, index in zip(rows, number, strict=True) if index]
    train, other = (Referenced(Packs(found, length, together=2)) for found in (rows, held_out))
    about = {"sources": [Path(name).name for name in data.chat], **counts, "sha256": [train.key]}
    return Opened(Path(data.start), Data(train, other, counts), about)


def recipe(config: PreferConfig, data: Data, tokenizer: Tokenizer, layout: Layout) -> Recipe:
    """Packed pairs, the loss of DPO, and the same on held-out pairs."""
    loss_fn = preference_loss(config.prefer.beta, config.prefer.normalized)
    batches = PackedBatches([Part("pairs", data.train, 1.0)], config.train, layout.rows, PairBatch)

    def begin(run: Path, fresh: bool) -> None:
        if fresh:
            learn_turns(config, layout.model, tokenizer)
        _know_reference(run / REFERENCE, fresh, layout, config.train.micro_batch, data)

    def probe() -> tuple[dict[str, float], Score]:
        row = _evaluate(layout, loss_fn, in_order(data.held_out, config.train.micro_batch,
                                                  kind=PairBatch))
        if row["chosen"] < -MOST_LOST:
            raise ValueError(
                f"the chosen answers became less likely by {-row['chosen']:.2f} nats per token, "
                f"more than {MOST_LOST}; tune again with a lower optim.lr or a larger --beta (the "
                "checkpoints until here are kept)")
        return row, Score("loss", row["loss"])

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
    names = sorted(layout.mesh.gather(list(sums))[0] if layout.mesh.size > 1 else sums)
    totals = layout.sum(torch.tensor([sums.get(name, 0.0) for name in names], dtype=torch.float64))
    row = dict(zip(names, totals.tolist(), strict=True))
    pairs_scored = row.pop("pairs")
    return {name: value / pairs_scored for name, value in row.items()}


PREFER = Stage("prefer", PreferConfig, open_data, recipe, adapt, {"optim": {}, "train": {}}, 0.0)
