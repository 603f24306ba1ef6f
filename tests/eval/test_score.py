"""Scores of continuations equal one forward pass per option, whatever is beside them."""
from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from fira.convert.quantize import quantize
from fira.eval.score import Loads, TreeBatch, Window, encode_rows, make_tree, score
from fira.eval.task import Row, make_row
from fira.model.spec import FIRA2Spec, FIRASpec
from tests.models import build

SHAPE = {"vocab_size": 320, "d_model": 32, "n_head": 2, "num_layers": 2, "d_ff": 32, "context": 64}
RECORDS = [
    {"context": "The state of the", "continuations": [" Union", " Union is", " 你好"], "gold": 0},
    {"good": "The Union is strong.", "bad": "The Union is naïve."},
    {"context": "Größe is", "answer": " text too"},
    {"context": ["The café", "The 🙂"], "continuations": [" is strong"] * 2, "gold": 1},
    {"context": "Is it?", "continuations": [" a", " b", " c", " d"], "gold": 2},
    {"context": "The state of the Union is strong and", "answer": "."},
]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [make_row(record, "row") for record in RECORDS]


def models(plain):
    yield "fira2", plain
    yield "int8", quantize(copy.deepcopy(plain), "int8")
    yield "dense", build(FIRA2Spec(**SHAPE, num_experts=1, n_kv_head=2, head_dim=16), seed=2).eval()
    yield "fira", build(FIRASpec(**SHAPE, num_experts=4, top_k=2), seed=3).eval()


@torch.inference_mode()
def one_pass(model, tokens: list[int], known: int) -> list[tuple[float, bool]]:
    """The definition: whole logits of one sequence, nats and whether it is the likeliest."""
    logs_TV = model(torch.tensor([tokens[:-1]]))[0].double().log_softmax(-1)[known:]
    return [(-float(row_V[token]), bool(row_V.argmax() == token))
            for row_V, token in zip(logs_TV, tokens[known + 1:], strict=True)]


@pytest.mark.parametrize("kind", ["fira2", "int8", "dense", "fira"])
def test_scores_equal_one_pass_per_option(model, tokenizer, rows, kind):
    chosen = dict(models(model))[kind]
    given = encode_rows(tokenizer, rows, 64)
    for options, costs in zip(given.rows, score(chosen, given.rows), strict=True):
        for option, cost_P2 in zip(options, costs, strict=True):
            nats, likeliest = zip(*one_pass(chosen, *option), strict=True)
            np.testing.assert_allclose(cost_P2[:, 0], nats, rtol=1e-5)
            assert ((cost_P2[:, 1] == 0) == likeliest).all()


@pytest.mark.parametrize("size, order, threads", [(1, 1, 1), (40, -1, 1), (10_000, 1, 2),
                                                  (33, -1, 3)])
def test_batch_size_order_neighbors_and_threads_change_nothing(model, tokenizer, rows, size,
                                                               order, threads):
    given = encode_rows(tokenizer, rows * 3, 64).rows
    alone = [score(model, [options])[0] for options in given]
    torch.set_num_threads(threads)
    try:
        found = score(model, given[::order], batch_tokens=size)[::order]
    finally:
        torch.set_num_threads(1)
    for one, other in zip(alone, found, strict=True):
        for cost_P2, other_P2 in zip(one, other, strict=True):
            np.testing.assert_allclose(cost_P2[:, 0], other_P2[:, 0], rtol=1e-6)


def test_threads_read_batches_of_their_own_with_operations_of_one_thread(model, tokenizer, rows,
                                                                         monkeypatch):
    """Threads of OpenMP that share an operation spin while they wait on a busy machine."""
    seen = []

    def costs(batch, model):
        seen.append(torch.get_num_threads())
        return np.zeros((len(batch.targets_P), 2))

    monkeypatch.setattr(TreeBatch, "costs", costs)
    torch.set_num_threads(2)
    try:
        score(model, encode_rows(tokenizer, rows, 64).rows, batch_tokens=1)
        assert seen == [1] * len(rows) and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_shared_tokens_are_read_and_predicted_once():
    tree = make_tree([Window([9, 1, 2, 3, 4], 2), Window([9, 1, 2, 5, 6, 7], 2),
                      Window([9, 1, 2, 8], 2)])
    assert tree.tokens == [9, 1, 2, 3, 5, 6] and tree.positions == [0, 1, 2, 3, 3, 4]
    assert tree.branches == [0, 0, 0, 1, 2, 2] and tree.places == [2, 3, 2, 4, 5, 2]
    letters = make_tree([Window([9, 1, letter], 1) for letter in (4, 5, 6, 7)])
    assert letters.tokens == [9, 1] and letters.targets == [4, 5, 6, 7]
    pair = make_tree([Window([9, 1, 2, 3], 0), Window([9, 1, 2, 4], 0)])
    assert len(pair.targets) == 4 and pair.options == [[0, 1, 2], [0, 1, 3]]


def test_a_token_across_the_border_is_counted_and_scored(tokenizer):
    text = "The state of the Union"
    ends = np.cumsum([len(tokenizer.decode([token])) for token in tokenizer.encode(text)])
    for cut in range(len(text)):
        row = make_row({"context": text[:cut], "answer": text[cut:]}, "row")
        found = encode_rows(tokenizer, [row], 64)
        tokens, known = found.rows[0][0]
        before = max(end for end in [0, *ends] if end <= cut)
        assert found.unsplit == ([] if cut == before else [0])
        assert tokenizer.decode(tokens[1:known + 1]) == text[:before]


def test_long_rows_are_cut_or_left_out_by_number(model, tokenizer):
    short, long = "The Union", "The state of the Union is strong. " * 9
    records = [(short, " is"), (long, " is"), (short, long), (short, " too")]
    rows = [make_row({"context": context, "answer": end}, "row") for context, end in records]
    found = encode_rows(tokenizer, rows, 16)
    assert (found.cut, found.left_out, found.rows[2]) == ([1], [2], [])
    tokens, known = found.rows[1][0]
    assert len(tokens) == 17 and tokenizer.decode(tokens[known + 1:]) == " is"
    assert [len(options) for options in score(model, found.rows)] == [1, 1, 0, 1]
    ends = {"context": long, "continuations": [" is", " the Union"], "gold": 0}
    tree = make_tree(encode_rows(tokenizer, [make_row(ends, "row")], 16).rows[0])
    assert len(tree.tokens) < 20  # both options lose as much, so that they still share the rest


def test_damaged_weights_are_named(model, tokenizer, rows):
    broken = copy.deepcopy(model)
    broken.token_embedding.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="not finite.*use another step"):
        score(broken, encode_rows(tokenizer, rows, 64).rows)


def test_loads_count_every_token_of_every_thread(model, tokenizer, rows):
    given = encode_rows(tokenizer, rows * 4, 64).rows
    torch.set_num_threads(2)
    with Loads(model) as watch:
        score(model, given, batch_tokens=50)
    torch.set_num_threads(1)
    tokens = sum(len(make_tree(options).tokens) for options in given)
    assert watch.counts_LE.sum(axis=1).tolist() == [tokens * model.spec.top_k] * 2
