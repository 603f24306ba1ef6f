"""Log-probabilities of continuations, each given its context.

Context and continuation are encoded together, after the end-of-text token, and divided at their
border; a token across it counts as the continuation's. The options of a row share their first
tokens, which are read once: a row is a tree, in which each option's own tokens follow the shared
ones. A batch is one flat row of all trees' tokens, without padding; only attention distinguishes
them, so a score does not depend on what is beside it.

On a CPU each thread reads batches of its own, with operations of one thread. OpenMP's threads that
share an operation spin while they wait for each other, which on a busy machine takes most time.
"""
from __future__ import annotations

import bisect
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fira.eval.task import Row
from fira.loss.head import row_costs
from fira.model.router import Watch

BATCH_TOKENS = {"cpu": 4096}  # read together; does not change a result
TOKENS_ELSEWHERE = 1 << 16


class Window(NamedTuple):
    """Tokens to read and predict; the first `known` predictions are not scored."""

    tokens: list[int]
    known: int


class Encoded(NamedTuple):
    """The options of each row, none for those left out; the others are numbers of rows."""

    rows: list[list[Window]]
    cut: list[int]  # whose contexts lost their beginning, equally
    left_out: list[int]  # which have a continuation longer than the model reads
    unsplit: list[int]  # which have a token across a border


class Tree(NamedTuple):
    """The tokens of a row; what is predicted at its `places`; `options` number the predictions."""

    tokens: list[int]
    positions: list[int]
    branches: list[int]  # 0 for shared tokens, else the option, from 1, that a token belongs to
    places: list[int]
    targets: list[int]
    options: list[list[int]]


class Loads(Watch):
    """Counts the rows routed to every expert, per layer, for any number of threads."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.lock = threading.Lock()
        self.counts_LE = np.zeros((len(self.experts), model.spec.num_experts), np.int64)

    def _note(self, layer: int, router: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        counts_E = output[1].flatten().bincount(minlength=router.num_experts).cpu().numpy()
        with self.lock:
            self.counts_LE[layer] += counts_E


def encode_rows(tokenizer: Any, rows: Sequence[Row], window: int) -> Encoded:
    """The tokens of every option, of which a model reads at most `window`."""
    sizes = np.array([len(text) for text in tokenizer.token_bytes()])
    found = Encoded([], [], [], [])
    for number, row in enumerate(rows):
        options, across = [], False
        for context, continuation in row.options:
            ids, border = tokenizer.encode(context + continuation), len(context.encode())
            ends = [0, *sizes[ids].cumsum()]
            known = bisect.bisect_right(ends, border) - 1
            across |= ends[known] != border
            options.append(Window([tokenizer.end_of_text, *ids], known))
        surplus = max(0, max(len(option.tokens) for option in options) - 1 - window)
        fits = all(option.known >= surplus for option in options)
        found.rows.append([Window(option.tokens[surplus:], option.known - surplus)
                           for option in options] if fits else [])
        for numbers, holds in ((found.cut, surplus and fits), (found.left_out, not fits),
                               (found.unsplit, across)):
            numbers += [number] * bool(holds)
    return found


def score(model: Any, rows: Sequence[Sequence[Window]], batch_tokens: int | None = None,
          progress: Callable[[float], None] = lambda done: None) -> list[list[np.ndarray]]:
    """For every option of every row [P, 2]: the nats of its P scored tokens, and how many more
    than the likeliest token's these are. Raises ValueError if one is not finite."""
    device, threads = next(model.parameters()).device.type, torch.get_num_threads()
    trees = {number: make_tree(options) for number, options in enumerate(rows) if options}
    lengths = {number: len(tree.tokens) for number, tree in trees.items()}
    groups = list(batches(lengths, batch_tokens or BATCH_TOKENS.get(device, TOKENS_ELSEWHERE)))
    found: list[list[np.ndarray]] = [[] for _ in rows]

    def read(numbers: list[int]) -> tuple[list[list[list[int]]], np.ndarray]:
        batch = TreeBatch([trees[number] for number in numbers], model)
        return batch.options, batch.costs(model)

    workers = threads if device == "cpu" else 1
    torch.set_num_threads(threads // workers)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads,
                              initargs=(threads // workers,))
    try:
        for done, (group, (places, costs_P2)) in enumerate(
                zip(groups, pool.map(read, groups), strict=True), start=1):
            if not np.isfinite(costs_P2).all():
                raise ValueError("a log-probability is not finite: the model's weights are "
                                 "damaged; use another step")
            for number, options in zip(group, places, strict=True):
                found[number] = [costs_P2[option] for option in options]
            progress(done / len(groups))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    return found


def make_tree(options: Sequence[Window]) -> Tree:
    """Token j + 1 of an option is predicted where its token j is, from j = `known` on."""
    shared = min(len(os.path.commonprefix([option.tokens for option in options])),
                 max(len(option.tokens) for option in options) - 1)
    tree = Tree(options[0].tokens[:shared], list(range(shared)), [0] * shared, [], [], [])
    numbers: dict[tuple[int, int], int] = {}
    for branch, (tokens, known) in enumerate(options, start=1):
        offset, own = len(tree.tokens) - shared, tokens[shared:-1]
        tree.tokens.extend(own)
        tree.positions.extend(range(shared, shared + len(own)))
        tree.branches.extend([branch] * len(own))
        tree.options.append([
            numbers.setdefault((j if j < shared else j + offset, tokens[j + 1]), len(numbers))
            for j in range(known, len(tokens) - 1)])
    tree.places.extend(place for place, _ in numbers)
    tree.targets.extend(target for _, target in numbers)
    return tree


def batches(lengths: dict[int, int], size: int) -> Iterator[list[int]]:
    """Numbers of trees of about equal length, the longest first, at most `size` tokens with the
    padding that attention needs."""
    batch: list[int] = []
    for number in sorted(lengths, key=lambda number: -lengths[number]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > size:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


class TreeBatch:
    """Trees as one flat row of tokens; also what a model takes as its cache to read them."""

    def __init__(self, trees: Sequence[Tree], model: Any) -> None:
        device = next(model.parameters()).device
        tokens, positions, places, targets = (list[int]() for _ in range(4))
        self.options: list[list[list[int]]] = []  # of each tree, the predictions of each option
        for tree in trees:
            places += [len(tokens) + place for place in tree.places]
            self.options.append([[len(targets) + number for number in option]
                                 for option in tree.options])
            tokens += tree.tokens
            positions += tree.positions
            targets += tree.targets
        self.tokens_N, self.positions_N, self.places_P, self.targets_P = (
            torch.tensor(each, device=device) for each in (tokens, positions, places, targets))
        branches_BT = pad_sequence([torch.tensor(tree.branches) for tree in trees],
                                   batch_first=True, padding_value=-1).to(device)
        same_BTT = branches_BT[:, :, None] == branches_BT[:, None]
        self.seen_B1TT = (same_BTT | (branches_BT[:, None] == 0)).tril()[:, None]
        self.slots_N = (branches_BT >= 0).flatten().nonzero()[:, 0]
        self.layers = [self] * model.spec.num_layers  # no layer keeps anything

    @torch.inference_mode()
    def costs(self, model: Any) -> np.ndarray:
        """[P, 2] of all predictions; see `score`."""
        x_PD = model.features(self.tokens_N[None], self)[0, self.places_P]
        return row_costs(_nats, x_PD, *model.head_weights(), self.targets_P).double().cpu().numpy()

    def end(self, T: int) -> int:
        return int(self.positions_N.max()) + 1

    def positions(self, T: int, device: torch.device) -> Tensor:
        return self.positions_N

    def attend(self, q_1HNC: Tensor, k_1GNC: Tensor, v_1GNC: Tensor) -> Tensor:
        """Attention of each token to the tokens of its branch and the shared ones before it."""
        q_BHTC, k_BGTC, v_BGTC = (self._pad(x) for x in (q_1HNC, k_1GNC, v_1GNC))
        y_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BGTC, v_BGTC, attn_mask=self.seen_B1TT,
                                                enable_gqa=q_BHTC.shape[1] != k_BGTC.shape[1])
        return y_BHTC.transpose(1, 2).flatten(0, 1)[self.slots_N].transpose(0, 1)[None]

    def _pad(self, x_1HNC: Tensor) -> Tensor:
        (B, _, T, _), (_, H, _, C) = self.seen_B1TT.shape, x_1HNC.shape
        x_SHC = x_1HNC.new_zeros(B * T, H, C)
        x_SHC[self.slots_N] = x_1HNC[0].transpose(0, 1)
        return x_SHC.view(B, T, H, C).transpose(1, 2)


def _nats(logs_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    own_R = logs_RV.gather(1, targets_R[:, None])[:, 0]
    return torch.stack([-own_R, logs_RV.amax(dim=1) - own_R], dim=1), logs_RV
