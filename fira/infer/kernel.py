"""One token step of a whole model as a single compiled function, run by every rank of a crew.

Everything the step reads is found by address in the records of `fira.infer.pack`. What a model
lacks has address 0: no bias, no rotation, no gate, no router. Each rank owns a part of the rows of
every matrix and meets the others at a barrier between the phases; small work (norms, routing) is
done by every rank for itself, which is cheaper than a barrier.

A weight row is read from memory once and meets all S tokens of the step while it is in the cache.
"""
from __future__ import annotations

import math

import numpy as np

from fira.infer.dots import compiled, copy_row, dot, dot_float32, floats, integers, matrix, meet


@compiled
def multiply(rank, ranks, linear, x, out, add):
    """This rank's rows of out = linear x, or of out += linear x, for every token."""
    rows = out.shape[1]
    for row in range(rows * rank // ranks, rows * (rank + 1) // ranks):
        for s in range(len(x)):
            y = dot(linear, row, x[s])
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
    bias = floats(layer.selection, E)
    for s in range(len(x)):
        soften(shape, layer, x[s], probs)
        kept = np.float32(0)
        for k in range(K):
            best, highest = 0, np.float32(-np.inf)
            for e in range(E):
                score = probs[e] + bias[e] if layer.selection else probs[e]
                if probs[e] >= 0 and score > highest:  # a chosen one is marked below 0
                    best, highest = e, score
            chosen[s * K + k], weights[s * K + k] = best, probs[best]
            kept += probs[best]
            probs[best] = np.float32(-1)
        for k in range(K):
            weights[s * K + k] /= kept if K > 1 else np.float32(1)
    n = 0
    for e in range(E):
        for pair in range(len(x) * K):
            if chosen[pair] == e:
                order[n] = pair
                n += 1


@compiled
def soften(shape, layer, x, probs):
    """The router's probabilities of one token; 1 for the only expert of a dense model."""
    E = shape.experts
    largest, total = np.float32(-np.inf), np.float32(0)
    for e in range(E):
        probs[e] = dot(layer.router, e, x) if layer.router.weight else np.float32(0)
        largest = max(largest, probs[e])
    for e in range(E):
        probs[e] = math.exp(probs[e] - largest)
        total += probs[e]
    for e in range(E):
        probs[e] /= total


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
                up = dot(layer.up, expert * F + f, x[pair // K])
                if layer.gate.weight:
                    gate = dot(layer.gate, expert * F + f, x[pair // K])
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
                y = dot(layer.down, expert * D + d, hidden[pair])
                x[pair // K, d] += weights[pair] * y
        first = end


@compiled
def embed(rank, ranks, shape, tokens, positions, x):
    """This rank's columns of the token's row, plus the position's where positions are learned."""
    D = shape.width
    for s in range(len(x)):
        copy_row(shape.embedding, tokens[s], D * rank // ranks, D * (rank + 1) // ranks, x[s])
        if shape.positions:
            place = floats(shape.positions + 4 * positions[s] * D, D)
            for i in range(D * rank // ranks, D * (rank + 1) // ranks):
                x[s, i] += place[i]


@compiled
def step(rank, ranks, shapes, layers, works, tokens, positions, slots, logits, experts, base):
    """Logits of the token after each of `tokens`, which enter the cache at their positions.

    `experts` [layer, pair] gets what the routers chose. Every rank calls this with the same
    arguments; `base` is where the counter stands before.
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
        multiply(rank, ranks, layer.qkv, normed, qkv, False)
        target = meet(work.counter, target + ranks)
        remember(rank, ranks, shape, layer, positions, slots, qkv)
        target = meet(work.counter, target + ranks)
        attend(rank, ranks, shape, layer, positions, slots, qkv, scores, mixed)
        target = meet(work.counter, target + ranks)
        multiply(rank, ranks, layer.output, mixed, x, True)
        target = meet(work.counter, target + ranks)
        normalize(x, layer.moe_norm, shape.epsilon, normed)
        route(shape, layer, normed, probs, weights, chosen, order)
        if rank == 0:
            experts[index] = chosen
        think(rank, ranks, shape, layer, normed, chosen, order, hidden)
        target = meet(work.counter, target + ranks)
        answer(rank, ranks, shape, layer, weights, chosen, order, hidden, x)
        target = meet(work.counter, target + ranks)
    normalize(x, shape.norm, shape.epsilon, normed)
    multiply(rank, ranks, shape.head, normed, logits, False)
    meet(work.counter, target + ranks)
