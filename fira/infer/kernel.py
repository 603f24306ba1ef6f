"""One token step of a whole model as a single compiled function, on a crew of threads.

Everything the step reads is found by address, so packing shares the memory of torch's parameters.
What a model lacks has address 0: no bias, no rotation, no gate, no router. Each rank of the crew
owns a part of the rows of every matrix and meets the others at a barrier between the phases; small
work (norms, routing) is done by every rank for itself, which is cheaper than a barrier.

A weight row is read from memory once and meets all S tokens of the step while it is in the cache.
All compiled functions stand in this file because numba's cache on disk only notices changes in the
file of the function it was asked for.
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

FLOAT32, INT8, INT4 = 0, 1, 2
GROUP = 32  # int4 weights that share a scale
YIELD_AFTER = 2000  # looks at the barrier before the processor is offered to others
YIELD = types.ExternalFunction("sched_yield", types.int32())
# Sums may be reordered and fused; infinities and NaN keep their meaning.
MATH = {"reassoc", "contract", "nsz", "arcp"}

MATRIX = np.dtype([(name, np.int64) for name in ("weight", "scale", "bias")])
NORM = np.dtype([(name, np.int64) for name in ("weight", "bias")])
LAYER = np.dtype([
    ("attention_norm", NORM), ("qkv", MATRIX), ("query_norm", np.int64), ("key_norm", np.int64),
    ("output", MATRIX), ("moe_norm", NORM), ("router", MATRIX), ("gate", MATRIX), ("up", MATRIX),
    ("down", MATRIX), ("keys", np.int64), ("values", np.int64)])
SHAPE = np.dtype([(name, np.int64) for name in (
    "width", "heads", "kv_heads", "head_width", "hidden", "experts", "top_k", "vocabulary",
    "context", "precision", "embedding", "positions", "cosines", "sines", "slot_stride",
    "group_stride")] + [("norm", NORM), ("head", MATRIX), ("epsilon", np.float64)])
WORK = np.dtype([(name, np.int64) for name in (
    "x", "qkv", "mixed", "hidden",  # shared by the crew
    "normed", "scores", "probs", "weights", "chosen", "order",  # each rank's own
    "counter")])


def compiled(function: Any) -> Any:
    """Compile on first use and keep the result on disk, where any place on disk can be written."""
    options = {"nogil": True, "fastmath": MATH, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no folder for its cache: it compiles in every process
        return njit(**options)(function)


@intrinsic
def _pointer(context: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
    return types.voidptr(types.int64), build


@intrinsic
def _arrive(context: Any, counter: Any) -> Any:
    """Add one to the counter; what this thread wrote before is seen by those who read it."""
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "acq_rel")
    return types.int64(types.int64), build


@intrinsic
def _look(context: Any, counter: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(place, "acquire", 8)
    return types.int64(types.int64), build


@compiled
def meet(counter, target):
    """Wait until the counter has reached `target`, which is returned: a barrier."""
    _arrive(counter)
    looks = 0
    while _look(counter) < target:
        looks += 1
        if looks > YIELD_AFTER:
            YIELD()
    return target


@compiled
def floats(address, size):
    return carray(_pointer(address), size, np.float32)


@compiled
def integers(address, size):
    return carray(_pointer(address), size, np.int64)


@compiled
def matrix(address, rows, columns):
    return carray(_pointer(address), (rows, columns), np.float32)


@compiled
def dot_float32(weight, row, x):
    total = np.float32(0)
    w = floats(weight + 4 * row * len(x), len(x))
    for i in range(len(x)):
        total += w[i] * x[i]
    return total


@compiled
def dot_int8(weight, row, x):
    total = np.float32(0)
    w = carray(_pointer(weight + row * len(x)), len(x), np.int8)
    for i in range(len(x)):
        total += np.float32(w[i]) * x[i]
    return total


@compiled
def dot_int4(weight, scale, row, x):
    """Byte i of a group holds elements i (low half) and i + 16 (high half), each plus 8."""
    total = np.float32(0)
    groups, half = len(x) // GROUP, GROUP // 2
    scales = floats(scale + 4 * row * groups, groups)
    w = carray(_pointer(weight + row * groups * half), groups * half, np.uint8)
    for group in range(groups):
        part = np.float32(0)
        for i in range(half):
            byte = np.int32(w[group * half + i])
            part += np.float32((byte & 15) - 8) * x[group * GROUP + i]
            part += np.float32((byte >> 4) - 8) * x[group * GROUP + half + i]
        total += scales[group] * part
    return total


@compiled
def dot(precision, linear, row, x):
    """One row of a matrix times x, plus the row's bias."""
    if precision == FLOAT32:
        total = dot_float32(linear.weight, row, x)
    elif precision == INT8:
        total = dot_int8(linear.weight, row, x) * floats(linear.scale, row + 1)[row]
    else:
        total = dot_int4(linear.weight, linear.scale, row, x)
    if linear.bias:
        total += floats(linear.bias, row + 1)[row]
    return total


@compiled
def multiply(rank, ranks, precision, linear, x, out, add):
    """This rank's rows of out = linear x, or of out += linear x, for every token."""
    rows = out.shape[1]
    for row in range(rows * rank // ranks, rows * (rank + 1) // ranks):
        for s in range(len(x)):
            y = dot(precision, linear, row, x[s])
            out[s, row] = out[s, row] + y if add else y


@compiled
def normalize(x, norm, epsilon, out):
    """RMSNorm of every token, or LayerNorm where the norm has a bias."""
    width = x.shape[1]
    weight = floats(norm.weight, width)
    for s in range(len(x)):
        mean, square = np.float32(0), np.float32(0)
        if norm.bias:
            for i in range(width):
                mean += x[s, i]
            mean /= np.float32(width)
        for i in range(width):
            square += (x[s, i] - mean) * (x[s, i] - mean)
        scale = inverse_root(square, width, epsilon)
        for i in range(width):
            out[s, i] = (x[s, i] - mean) * scale * weight[i]
        if norm.bias:
            bias = floats(norm.bias, width)
            for i in range(width):
                out[s, i] += bias[i]


@compiled
def inverse_root(square, width, epsilon):
    return np.float32(1 / math.sqrt(square / width + epsilon))


@compiled
def turn(head, weight, shape, position):
    """Normalize one head of queries or keys and rotate it to its position, in place."""
    half = len(head) // 2
    scale = floats(weight, len(head))
    square = np.float32(0)
    for i in range(len(head)):
        square += head[i] * head[i]
    factor = inverse_root(square, len(head), shape.epsilon)
    cosines = floats(shape.cosines + 4 * position * half, half)
    sines = floats(shape.sines + 4 * position * half, half)
    for i in range(half):
        a, b = head[i] * factor * scale[i], head[half + i] * factor * scale[half + i]
        head[i] = a * cosines[i] - b * sines[i]
        head[half + i] = b * cosines[i] + a * sines[i]


@compiled
def remember(rank, ranks, shape, layer, positions, slots, qkv):
    """Turn queries and keys, if the model rotates, and put keys and values into the cache."""
    C, H, G = shape.head_width, shape.heads, shape.kv_heads
    units = H + 2 * G
    for unit in range(len(qkv) * units * rank // ranks, len(qkv) * units * (rank + 1) // ranks):
        s, part = unit // units, unit % units
        head = qkv[s, part * C:(part + 1) * C]
        if shape.cosines and part < H + G:
            turn(head, layer.query_norm if part < H else layer.key_norm, shape, positions[s])
        if part >= H:
            cache = layer.keys if part < H + G else layer.values
            place = slots[s] * shape.slot_stride + (part - H) % G * shape.group_stride
            floats(cache + 4 * (place + positions[s] * C), C)[:] = head


@compiled
def attend(rank, ranks, shape, layer, positions, slots, qkv, scores, out):
    """Attention of every token to its slot's positions so far; heads are shared out."""
    C, H = shape.head_width, shape.heads
    for unit in range(len(qkv) * H * rank // ranks, len(qkv) * H * (rank + 1) // ranks):
        s, h = unit // H, unit % H
        T = positions[s] + 1
        group = h // (H // shape.kv_heads)
        place = 4 * (slots[s] * shape.slot_stride + group * shape.group_stride)
        query, y = qkv[s, h * C:(h + 1) * C], out[s, h * C:(h + 1) * C]
        largest = np.float32(-np.inf)
        for t in range(T):
            scores[t] = dot_float32(layer.keys + place, t, query) / np.sqrt(np.float32(C))
            largest = max(largest, scores[t])
        total = np.float32(0)
        y[:] = np.float32(0)
        for t in range(T):
            p = np.float32(math.exp(scores[t] - largest))
            total += p
            value = floats(layer.values + place + 4 * t * C, C)
            for i in range(C):
                y[i] += p * value[i]
        for i in range(C):
            y[i] /= total


@compiled
def route(shape, layer, x, probs, weights, chosen, order):
    """The experts of every token, their weights, and the (token, choice) pairs by expert."""
    E, K = shape.experts, shape.top_k
    for s in range(len(x)):
        largest = np.float32(-np.inf)
        for e in range(E if layer.router.weight else 0):
            probs[e] = dot(FLOAT32, layer.router, e, x[s])
            largest = max(largest, probs[e])
        total = np.float32(0)
        for e in range(E):
            probs[e] = math.exp(probs[e] - largest) if layer.router.weight else np.float32(1)
            total += probs[e]
        kept = np.float32(0)
        for k in range(K):
            best = np.argmax(probs)
            chosen[s * K + k], weights[s * K + k] = best, probs[best]
            kept += probs[best]
            probs[best] = np.float32(-1)
        for k in range(K):
            weights[s * K + k] /= kept if K > 1 else total
    n = 0
    for e in range(E):
        for pair in range(len(x) * K):
            if chosen[pair] == e:
                order[n] = pair
                n += 1


@compiled
def think(rank, ranks, shape, layer, x, chosen, order, hidden):
    """hidden = silu(gate x) * up x, or gelu(up x), for every pair; hidden rows are shared out."""
    F, K = shape.hidden, shape.top_k
    first = 0
    while first < len(x) * K:
        expert, end = chosen[order[first]], first + 1
        while end < len(x) * K and chosen[order[end]] == expert:
            end += 1
        for f in range(F * rank // ranks, F * (rank + 1) // ranks):
            for pair in order[first:end]:
                up = dot(shape.precision, layer.up, expert * F + f, x[pair // K])
                if layer.gate.weight:
                    gate = dot(shape.precision, layer.gate, expert * F + f, x[pair // K])
                    hidden[pair, f] = up * gate / (np.float32(1) + np.float32(math.exp(-gate)))
                else:  # tanh form: x * sigmoid(2 z)
                    z = np.float32(0.7978845608) * (up + np.float32(0.044715) * up * up * up)
                    hidden[pair, f] = up / (np.float32(1) + np.float32(math.exp(-2 * z)))
        first = end


@compiled
def answer(rank, ranks, shape, layer, weights, chosen, order, hidden, x):
    """x += weight * (down hidden) over the pairs; output rows are shared out."""
    D, K = shape.width, shape.top_k
    first, pairs = 0, len(x) * K
    while first < pairs:
        expert, end = chosen[order[first]], first + 1
        while end < pairs and chosen[order[end]] == expert:
            end += 1
        for d in range(D * rank // ranks, D * (rank + 1) // ranks):
            for pair in order[first:end]:
                y = dot(shape.precision, layer.down, expert * D + d, hidden[pair])
                x[pair // K, d] += weights[pair] * y
        first = end


@compiled
def embed(rank, ranks, shape, tokens, positions, x):
    """This rank's columns of the token's row, plus the position's where positions are learned."""
    D = shape.width
    for s in range(len(x)):
        token = floats(shape.embedding + 4 * tokens[s] * D, D)
        for i in range(D * rank // ranks, D * (rank + 1) // ranks):
            x[s, i] = token[i]
        if shape.positions:
            place = floats(shape.positions + 4 * positions[s] * D, D)
            for i in range(D * rank // ranks, D * (rank + 1) // ranks):
                x[s, i] += place[i]


@compiled
def step(rank, ranks, shapes, layers, works, tokens, positions, slots, logits, base):
    """Logits of the token after each of `tokens`, which enter the cache at their positions.

    Every rank calls this with the same arguments; `base` is where the counter stands before.
    """
    shape, work, S, target = shapes[0], works[rank], len(tokens), base
    pairs = S * shape.top_k
    x, normed = matrix(work.x, S, shape.width), matrix(work.normed, S, shape.width)
    qkv = matrix(work.qkv, S, (shape.heads + 2 * shape.kv_heads) * shape.head_width)
    mixed = matrix(work.mixed, S, shape.heads * shape.head_width)
    hidden = matrix(work.hidden, pairs, shape.hidden)
    scores, probs = floats(work.scores, shape.context), floats(work.probs, shape.experts)
    weights, chosen = floats(work.weights, pairs), integers(work.chosen, pairs)
    order = integers(work.order, pairs)
    embed(rank, ranks, shape, tokens, positions, x)
    target = meet(work.counter, target + ranks)
    for index in range(len(layers)):
        layer = layers[index]
        normalize(x, layer.attention_norm, shape.epsilon, normed)
        multiply(rank, ranks, shape.precision, layer.qkv, normed, qkv, False)
        target = meet(work.counter, target + ranks)
        remember(rank, ranks, shape, layer, positions, slots, qkv)
        target = meet(work.counter, target + ranks)
        attend(rank, ranks, shape, layer, positions, slots, qkv, scores, mixed)
        target = meet(work.counter, target + ranks)
        multiply(rank, ranks, shape.precision, layer.output, mixed, x, True)
        target = meet(work.counter, target + ranks)
        normalize(x, layer.moe_norm, shape.epsilon, normed)
        route(shape, layer, normed, probs, weights, chosen, order)
        think(rank, ranks, shape, layer, normed, chosen, order, hidden)
        target = meet(work.counter, target + ranks)
        answer(rank, ranks, shape, layer, weights, chosen, order, hidden, x)
        target = meet(work.counter, target + ranks)
    normalize(x, shape.norm, shape.epsilon, normed)
    multiply(rank, ranks, shape.precision, shape.head, normed, logits, False)
    meet(work.counter, target + ranks)
