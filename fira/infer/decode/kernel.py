"""One decode step of a whole model as a single compiled function, `decode_step`.

Several threads (ranks) run it together. Each computes its share of the rows of every matrix and
waits for the others at a barrier between the phases; norms and routing are computed by each for
itself, which takes less time than a barrier. A weight row is read from memory once and used for
all S tokens while it is in the processor's cache (`product.py`).

Weights are found by address in the records of `step.py`.
"""
from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types

from fira.infer.decode.product import (
    OPTIONS,
    compiled,
    floats,
    inner,
    instruction,
    multiply,
    pointer,
    share,
)

YIELD_AFTER = 2000  # reads of a barrier, about 1 us, before the processor is offered to others
INTEGERS = ir.IntType(64).as_pointer()
YIELD = types.ExternalFunction("sched_yield", types.int32())


def compile_and_store(function: Any) -> Any:
    """Compile on first use and keep the result on disk if numba finds a folder to write to.

    numba looks at the name and this file's date only. With a checksum in the name it compiles again
    whenever a file of this folder changes; compiled code must be in no other folder.
    """
    files = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    function.__qualname__ += hashlib.sha256(files).hexdigest()[:8]
    try:
        return njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # there is no such folder: it compiles in every process
        return compiled(function)


# Add one and return the value before; what this thread wrote becomes visible.
count_arrival = instruction(types.int64, types.int64, lambda builder, address: builder.atomic_rmw(
    "add", builder.inttoptr(address, INTEGERS), ir.Constant(ir.IntType(64), 1), "acq_rel"))
read_arrivals = instruction(types.int64, types.int64, lambda builder, address: builder.load_atomic(
    builder.inttoptr(address, INTEGERS), "acquire", 8))
# float16, which numba knows as uint16 only, to float32 and back
widen = instruction(types.float32, types.uint16, lambda builder, bits: builder.fpext(
    builder.bitcast(bits, ir.HalfType()), ir.FloatType()))
narrow = instruction(types.uint16, types.float32, lambda builder, number: builder.bitcast(
    builder.fptrunc(number, ir.HalfType()), ir.IntType(16)))


@compiled
def barrier(counter, ranks):
    """Wait until all ranks have arrived. The counter goes on from one barrier to the next."""
    address = counter.ctypes.data
    target = (count_arrival(address) // ranks + 1) * ranks
    looks = 0
    while read_arrivals(address) < target:
        looks += 1
        if looks > YIELD_AFTER:
            YIELD()


@compiled
def view(array):
    """The same memory without a reference count: counting at every x[s] doubled a step's time."""
    return carray(pointer(array.ctypes.data), array.shape, array.dtype)


@compiled
def normalize(x, norm, epsilon, out):
    """RMSNorm of every row, or LayerNorm if the norm has a bias; `out` may be x."""
    width = x.shape[1]
    weight, bias = floats(norm.weight, width), floats(norm.bias, width)
    for s in range(len(x)):
        mean = np.float32(x[s].mean()) if norm.bias else np.float32(0)
        square = np.float32(0)
        for i in range(width):
            square += (x[s, i] - mean) * (x[s, i] - mean)
        scale = np.float32(1 / math.sqrt(square / width + epsilon))
        for i in range(width):
            out[s, i] = (x[s, i] - mean) * scale * weight[i]
        if norm.bias:  # in a loop of its own, so that both become vector instructions
            for i in range(width):
                out[s, i] += bias[i]


@compiled
def write_cache(rank, ranks, model, layer, positions, slots, qkv):
    """Normalize and rotate queries and keys (FIRA2), and write keys and values to the cache."""
    C, H, G = model.head_width, model.heads, model.kv_heads
    heads, half = H + 2 * G, C // 2  # heads of queries, keys and values
    for index in share(len(qkv) * heads, rank, ranks):
        s, h = index // heads, index % heads
        head = qkv[s, h * C:(h + 1) * C]
        if model.cosines and h < H + G:
            row = head.reshape(1, C)
            normalize(row, layer.query_norm if h < H else layer.key_norm, model.epsilon, row)
            cosines = floats(model.cosines + 4 * positions[s] * half, half)
            sines = floats(model.sines + 4 * positions[s] * half, half)
            for i in range(half):
                a, b = head[i], head[half + i]
                head[i] = a * cosines[i] - b * sines[i]
                head[half + i] = b * cosines[i] + a * sines[i]
        if h >= H:
            cache = layer.keys if h < H + G else layer.values
            place = slots[s] * model.slot_stride + (h - H) % G * model.group_stride
            place += positions[s] * C
            if not model.half_cache:
                floats(cache + 4 * place, C)[:] = head
                continue
            halves = carray(pointer(cache + 2 * place), C, np.uint16)
            for i in range(C):
                halves[i] = narrow(head[i])


@compiled
def softmax(scores):
    """In place."""
    largest, total = np.float32(-np.inf), np.float32(0)
    for i in range(len(scores)):
        largest = max(largest, scores[i])
    for i in range(len(scores)):
        scores[i] = math.exp(scores[i] - largest)
        total += scores[i]
    for i in range(len(scores)):
        scores[i] /= total


@compiled
def cached(model, rows, place, buffer):
    """A row of the cache as float32; a float16 one is converted into `buffer`."""
    if not model.half_cache:
        return floats(rows + 4 * place, len(buffer))
    halves = carray(pointer(rows + 2 * place), len(buffer), np.uint16)
    for i in range(len(buffer)):
        buffer[i] = widen(halves[i])
    return buffer


@compiled
def attend(rank, ranks, model, layer, positions, slots, qkv, scores, buffer, out):
    """Attention of this rank's heads, of every token to the positions so far of its slot."""
    C, H, G = model.head_width, model.heads, model.kv_heads
    for index in share(len(qkv) * H, rank, ranks):
        s, h = index // H, index % H
        T = positions[s] + 1
        place = slots[s] * model.slot_stride + h * G // H * model.group_stride
        query, y = qkv[s, h * C:(h + 1) * C], out[s, h * C:(h + 1) * C]
        for t in range(T):
            key = cached(model, layer.keys, place + t * C, buffer)
            scores[t] = inner(key, query) / np.sqrt(np.float32(C))
        softmax(scores[:T])
        y[:] = np.float32(0)
        for t in range(T):
            value = cached(model, layer.values, place + t * C, buffer)
            for i in range(C):
                y[i] += scores[t] * value[i]


@compiled
def choose_experts(layer, x, tokens, ones, probs_of, weights, chosen):
    """The K experts of every token, best first, and their weights, which may sum to 1."""
    K, (S, E) = len(chosen) // len(x), probs_of.shape
    bias = floats(layer.selection_bias, E)
    probs_of[:] = np.float32(0)
    if layer.router.weight:
        multiply(0, 1, layer.router, 0, x, tokens, probs_of, tokens, ones, False)
    for s in range(S):
        probs = probs_of[s]
        softmax(probs)
        total = np.float32(0)
        for pair in range(s * K, (s + 1) * K):
            best, highest = 0, np.float32(-np.inf)
            for e in range(len(probs)):
                score = probs[e] + bias[e] if layer.selection_bias else probs[e]
                if probs[e] >= 0 and score > highest:  # -1 marks a chosen expert
                    best, highest = e, score
            chosen[pair], weights[pair] = best, probs[best]
            total += probs[best]
            probs[best] = np.float32(-1)
        for pair in range(s * K, (s + 1) * K):
            weights[pair] /= total if layer.renormalize else np.float32(1)


@compiled
def sort_pairs(K, chosen, weights, order, owners, factors, starts):
    """order[starts[e]:starts[e + 1]] = the pairs of expert e; with their tokens and weights."""
    n = 0
    for e in range(len(starts) - 1):
        starts[e] = n
        for pair in range(len(chosen)):
            if chosen[pair] == e:
                order[n], owners[n], factors[n] = pair, pair // K, weights[pair]
                n += 1
    starts[-1] = n


@compiled
def up_projection(rank, ranks, layer, x, order, owners, ones, starts, hidden, gates):
    """This rank's rows of hidden = silu(gate x) * up x, or gelu(up x), for every pair."""
    F = hidden.shape[1]
    for e in range(len(starts) - 1):
        pairs, tokens = order[starts[e]:starts[e + 1]], owners[starts[e]:starts[e + 1]]
        multiply(rank, ranks, layer.up, e * F, x, tokens, hidden, pairs, ones, False)
        if layer.gate.weight:
            multiply(rank, ranks, layer.gate, e * F, x, tokens, gates, pairs, ones, False)
    for pair in range(len(hidden)):
        for f in share(F, rank, ranks):
            up, gate = hidden[pair, f], gates[pair, f]
            if layer.gate.weight:  # silu(z) = z * sigmoid(z)
                hidden[pair, f] = up * gate / (np.float32(1) + np.float32(math.exp(-gate)))
            else:  # gelu(x) = x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), GPT-2's tanh form
                z = np.float32(0.7978845608) * (up + np.float32(0.044715) * up * up * up)
                hidden[pair, f] = up / (np.float32(1) + np.float32(math.exp(-2 * z)))


@compiled
def down_projection(rank, ranks, layer, order, owners, factors, starts, hidden, x):
    """This rank's rows of x += weight * (down hidden), summed over a token's pairs."""
    for e in range(len(starts) - 1):
        own = slice(starts[e], starts[e + 1])
        multiply(rank, ranks, layer.down, e * x.shape[1], hidden, order[own], x, owners[own],
                 factors[own], True)


@compile_and_store
def decode_step(rank, ranks, models, layers, scratch, counter, positions, slots, lasts, logits,
                experts):
    """Read the S tokens whose embeddings are in scratch.x.

    Their keys and values enter the cache at their positions; `logits` [P, V] receives what follows
    the tokens `lasts`, and `experts` [L, S, K] what the routers choose. Every rank calls this with
    the same arguments.
    """
    model = models[0]
    x, qkv, mixed = view(scratch.x), view(scratch.qkv), view(scratch.mixed)
    hidden, normed = view(scratch.hidden), view(scratch.normed[rank])
    scores, probs = view(scratch.scores[rank]), view(scratch.probs[rank])
    buffer = view(scratch.buffer[rank])
    weights, chosen = view(scratch.weights[rank]), view(scratch.chosen[rank])
    order, starts = view(scratch.order[rank]), view(scratch.starts[rank])
    owners, factors = view(scratch.owners[rank]), view(scratch.factors[rank])
    gates, tokens, ones = view(scratch.gates), view(scratch.tokens), view(scratch.ones)
    for index in range(len(layers)):
        layer = layers[index]
        normalize(x, layer.attention_norm, model.epsilon, normed)
        multiply(rank, ranks, layer.qkv, 0, normed, tokens, qkv, tokens, ones, False)
        barrier(counter, ranks)
        write_cache(rank, ranks, model, layer, positions, slots, qkv)
        barrier(counter, ranks)
        attend(rank, ranks, model, layer, positions, slots, qkv, scores, buffer, mixed)
        barrier(counter, ranks)
        multiply(rank, ranks, layer.output, 0, mixed, tokens, x, tokens, ones, True)
        barrier(counter, ranks)
        normalize(x, layer.moe_norm, model.epsilon, normed)
        choose_experts(layer, normed, tokens, ones, probs, weights, chosen)
        sort_pairs(experts.shape[2], chosen, weights, order, owners, factors, starts)
        if rank == 0:
            experts[index] = chosen.reshape(experts.shape[1:])
        up_projection(rank, ranks, layer, normed, order, owners, ones, starts, hidden, gates)
        barrier(counter, ranks)
        down_projection(rank, ranks, layer, order, owners, factors, starts, hidden, x)
        barrier(counter, ranks)
    normalize(x, model.norm, model.epsilon, normed)
    multiply(rank, ranks, model.head, 0, normed, lasts, logits, tokens, ones, False)
    barrier(counter, ranks)
