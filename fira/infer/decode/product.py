"""A matrix times several tokens in compiled code, in blocks of up to four rows and four tokens.

A block of two rows and four tokens reads six vectors from the cache for eight multiplications,
where a row and a token alone need two for each. Every sum has LANES partial sums, which are added
in one order in every block, so that a token's result does not depend on what else is in its block.
Compilers choose that order anew for every loop, hence instructions instead of loops.
"""
from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

FLOAT32, INT8, INT4 = 0, 1, 2  # a matrix's precision
HALF = 16  # an int4 group is 32 weights in 16 bytes, with one scale (fira.convert.quantize)
LANES, TOKENS, MOST_ROWS = 16, 4, 4
SHAPES = ((1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (3, 2), (4, 2))  # tokens and rows of a block
# A processor does not foresee reads that go on in several rows at once. Without fetching early, one
# token of int8 weights in memory took 2.5 times as long as row after row.
AHEAD = 8192  # bytes; 4096 was 5% slower
FUSED = ("contract",)  # a product and its addition may be one instruction; the order is kept
INTEGER, FLOAT, BYTE, SHORT = ir.IntType(64), ir.FloatType(), ir.IntType(8), ir.IntType(32)
VECTOR, ADDRESS = ir.VectorType(FLOAT, LANES), BYTE.as_pointer()
# Sums may be reordered and fused; infinities and NaN keep their meaning.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy",
                           "fastmath": {"reassoc", "contract", "nsz", "arcp"}}
compiled = njit(**OPTIONS)


def instruction(result: Any, given: Any, build: Any) -> Any:
    """A function of one number for compiled code; build(builder, number) makes its instructions."""
    def describe(context: Any, number: Any) -> Any:
        return result(given), lambda _, builder, signature, numbers: build(builder, numbers[0])
    return intrinsic(describe)


pointer = instruction(types.voidptr, types.int64, lambda builder, address: builder.inttoptr(
    address, ADDRESS))


@intrinsic
def stack_memory(context: Any) -> Any:
    """Memory of HALF floats, which the compiler can keep in a register."""
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = cgutils.alloca_once(builder, ir.ArrayType(FLOAT, HALF))
        return builder.bitcast(memory, ADDRESS)
    return types.voidptr(), build


def block_product(element: Any, size: int) -> Any:
    """block(rows, count, sums, weights, width, x, tokens) for compiled code; all are integers.

    The float32 sums[t, r], [TOKENS, MOST_ROWS] at the address `sums`, become the sums of products
    of row r of weights [rows, width], of `size` bytes each, with row tokens[t] of the float32
    x [:, width]; `tokens` are `count` int64. (count, rows) is one of SHAPES.
    """
    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        rows, count, sums, *operands = given
        for tokens, height in SHAPES:
            fits = builder.and_(builder.icmp_signed("==", rows, INTEGER(height)),
                                builder.icmp_signed("==", count, INTEGER(tokens)))
            with builder.if_then(fits):
                for index, total in enumerate(sum_products(builder, element, size, tokens, height,
                                                           *operands)):
                    place = 4 * (index // height * MOST_ROWS + index % height)
                    builder.store(add_lanes(builder, total), builder.inttoptr(
                        builder.add(sums, INTEGER(place)), FLOAT.as_pointer()))
        return context.get_dummy_value()

    def describe(context: Any, rows: Any, count: Any, sums: Any, weights: Any, width: Any, x: Any,
                 tokens: Any) -> Any:
        return types.void(*[types.int64] * 7), build
    return intrinsic(describe)


def sum_products(builder: Any, element: Any, size: int, count: int, rows: int, weights: Any,
                 width: Any, x: Any, tokens: Any) -> list[Any]:
    """Vectors of partial sums, of every token one after the other."""
    def at(base: Any, offset: Any, scale: int) -> Any:
        return builder.add(base, builder.mul(offset, INTEGER(scale)))

    def read(address: Any, kind: Any, align: int) -> Any:
        return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)

    fetch = cgutils.get_or_insert_function(builder.module, ir.FunctionType(
        ir.VoidType(), [ADDRESS, SHORT, SHORT, SHORT]), "llvm.prefetch.p0")
    own = [at(x, builder.mul(width, read(at(tokens, INTEGER(t), 8), INTEGER, 8)), 4)
           for t in range(count)]
    totals = [cgutils.alloca_once(builder, VECTOR) for _ in range(count * rows)]
    for total in totals:
        builder.store(ir.Constant(VECTOR, [FLOAT(0.0)] * LANES), total)
    with cgutils.for_range(builder, builder.udiv(width, INTEGER(LANES))) as loop:
        factors = []
        for r in range(rows):
            place = at(at(weights, width, r * size), loop.index, LANES * size)
            factor = read(place, ir.VectorType(element, LANES), size)
            factors.append(factor if element is FLOAT else builder.sitofp(factor, VECTOR))
            early = at(weights, loop.index, rows * LANES * size)  # in the order of the memory
            early = builder.add(early, INTEGER(AHEAD + r * LANES * size))
            builder.call(fetch, [builder.inttoptr(early, ADDRESS), *map(SHORT, (0, 3, 1))])
        values = [read(at(start, loop.index, 4 * LANES), VECTOR, 4) for start in own]
        pairs = [(value, factor) for value in values for factor in factors]
        for (value, factor), total in zip(pairs, totals, strict=True):
            more = builder.fmul(factor, value, flags=FUSED)
            builder.store(builder.fadd(builder.load(total), more, flags=FUSED), total)
    return [builder.load(total) for total in totals]


def add_lanes(builder: Any, vector: Any) -> Any:
    """The sum of a vector: its upper half is added to the lower one until one number is left."""
    size = LANES
    while size > 1:
        size //= 2
        halves = [builder.shuffle_vector(vector, vector, ir.Constant(
            ir.VectorType(SHORT, size), list(range(start, start + size)))) for start in (0, size)]
        vector = builder.fadd(*halves)
    return builder.extract_element(vector, SHORT(0))


block_float32, block_int8 = block_product(FLOAT, 4), block_product(BYTE, 1)


@compiled
def share(count, rank, ranks):
    """The range of `count` rows that this rank computes."""
    return range(count * rank // ranks, count * (rank + 1) // ranks)


@compiled
def floats(address, size):
    return carray(pointer(address), size, np.float32)


@compiled
def inner(w, x):
    """The sum of w[i] x[i]; w is float32 or int8."""
    total = np.float32(0)
    for i in range(len(x)):
        total += np.float32(w[i]) * x[i]
    return total


@compiled
def inner_int4(weight, scale, row, x):
    """`inner` of an int4 row: byte i of a group holds weights i and i + 16, each plus 8.

    The 16 sums fill one vector register. Summing group by group was 7 times as slow.
    """
    groups = len(x) // (2 * HALF)
    w = carray(pointer(weight + row * groups * HALF), (groups, HALF), np.uint8)
    halves = carray(pointer(x.ctypes.data), (groups, 2, HALF), np.float32)
    scales = floats(scale + 4 * row * groups, groups)
    sums = carray(stack_memory(), HALF, np.float32)
    sums[:] = np.float32(0)
    for g in range(groups):
        for i in range(HALF):
            low = np.float32(np.uint8(w[g, i] & 15)) - np.float32(8)
            high = np.float32(np.uint8(w[g, i] >> 4)) - np.float32(8)
            sums[i] += scales[g] * (low * halves[g, 0, i] + high * halves[g, 1, i])
    return sums.sum()


@compiled
def multiply_block(matrix, row, rows, x, tokens, sums):
    """sums[t, r] = row (row + r) of a matrix, without its scale in int8, times x[tokens[t]]."""
    width, count = x.shape[1], len(tokens)
    start = row * width
    if matrix.precision == INT4 or width % LANES:
        for r in range(rows):
            start = (row + r) * width
            for t in range(count):
                values = x[tokens[t]]
                if matrix.precision == FLOAT32:
                    sums[t, r] = inner(floats(matrix.weight + 4 * start, width), values)
                elif matrix.precision == INT8:
                    numbers = carray(pointer(matrix.weight + start), width, np.int8)
                    sums[t, r] = inner(numbers, values)
                else:
                    sums[t, r] = inner_int4(matrix.weight, matrix.scale, row + r, values)
    elif matrix.precision == FLOAT32:
        block_float32(rows, count, sums.ctypes.data, matrix.weight + 4 * start, width,
                      x.ctypes.data, tokens.ctypes.data)
    else:
        block_int8(rows, count, sums.ctypes.data, matrix.weight + start, width, x.ctypes.data,
                   tokens.ctypes.data)


@compiled
def multiply(rank, ranks, matrix, first, x, inputs, out, outputs, factors, add):
    """This rank's rows of out[outputs[n]] = factors[n] * matrix x[inputs[n]] for every n.

    Row 0 of the result is row `first` of the matrix. With `add` it is added to what is in `out`.
    """
    share_of, N = share(out.shape[1], rank, ranks), len(inputs)
    most = matrix.rows if N == 1 else 2 if N > 2 else max(2, matrix.rows)
    sums = carray(stack_memory(), (TOKENS, MOST_ROWS), np.float32)
    row = share_of.start
    while row < share_of.stop:
        rows = most if row + most <= share_of.stop else 1
        step = 1 if rows == 1 else TOKENS
        for n in range(0, N, step):
            tokens = inputs[n:n + step]
            multiply_block(matrix, first + row, rows, x, tokens, sums)
            for r in range(rows):
                at = first + row + r
                scale = floats(matrix.scale, at + 1)[at] if matrix.precision == INT8 else (
                    np.float32(1))
                bias = floats(matrix.bias, at + 1)[at] if matrix.bias else np.float32(0)
                for t in range(len(tokens)):
                    value = factors[n + t] * (sums[t, r] * scale + bias)
                    y = out[outputs[n + t]]
                    y[row + r] = y[row + r] + value if add else value
        row += rows
