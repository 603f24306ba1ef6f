"""Products of two rows of a matrix with up to four tokens, as vector instructions.

A block reads every weight once for four tokens and every activation once for two rows: six reads
from the cache for eight multiplications, where a row and a token alone need two for each. Every sum
has LANES partial sums, which are added in one order in every block, so that a token's result does
not depend on what else is in its block. Compilers choose that order anew for every loop, hence
instructions instead of loops.
"""
from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES, TOKENS, ROWS = 16, 4, 2
# A processor does not foresee reads that go on in two rows at once. Without this, one token took
# 1.3 times as long as reading row after row in float32, and 2.5 times in int8.
AHEAD = 8192  # bytes by which weights are fetched early
FUSED = ("contract",)  # a product and its addition may be one instruction; the order is kept
INTEGER, FLOAT, BYTE, SHORT = ir.IntType(64), ir.FloatType(), ir.IntType(8), ir.IntType(32)
VECTOR = ir.VectorType(FLOAT, LANES)
ZERO = ir.Constant(VECTOR, [FLOAT(0.0)] * LANES)


def block_product(element: Any, size: int) -> Any:
    """block(weights, stride, width, x, pitch, tokens, count, sums) for compiled code.

    All are integers. The float32 sums[t, r], at the address `sums`, become the sums of the products
    of row r, `width` elements of `size` bytes at weights + r * stride, with the float32 numbers at
    x + tokens[t] * pitch; `count` int64 are at `tokens`. A rest of less than LANES is left out.
    """
    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        *operands, count, sums = given
        for number in range(1, TOKENS + 1):
            with builder.if_then(builder.icmp_signed("==", count, INTEGER(number))):
                for index, total in enumerate(sum_products(builder, element, size, number,
                                                           *operands)):
                    place = builder.add(sums, INTEGER(4 * index))
                    builder.store(add_lanes(builder, total),
                                  builder.inttoptr(place, FLOAT.as_pointer()))
        return context.get_dummy_value()

    def describe(context: Any, weights: Any, stride: Any, width: Any, x: Any, pitch: Any,
                 tokens: Any, count: Any, sums: Any) -> Any:
        return types.void(*[types.int64] * 8), build
    return intrinsic(describe)


def sum_products(builder: Any, element: Any, size: int, number: int, weights: Any, stride: Any,
                 width: Any, x: Any, pitch: Any, tokens: Any) -> list[Any]:
    """Vectors of partial sums for `number` tokens, those of one token after the other."""
    def read(address: Any, kind: Any, align: int) -> Any:
        return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)

    pointer = BYTE.as_pointer()
    fetch = cgutils.get_or_insert_function(builder.module, ir.FunctionType(
        ir.VoidType(), [pointer, SHORT, SHORT, SHORT]), "llvm.prefetch.p0")
    starts = [builder.add(x, builder.mul(pitch, read(builder.add(tokens, INTEGER(8 * t)), INTEGER,
                                                     8))) for t in range(number)]
    totals = [cgutils.alloca_once(builder, VECTOR) for _ in range(number * ROWS)]
    for total in totals:
        builder.store(ZERO, total)
    with cgutils.for_range(builder, builder.udiv(width, INTEGER(LANES))) as loop:
        rows = []
        for r in range(ROWS):
            place = builder.add(weights, builder.add(
                builder.mul(stride, INTEGER(r)), builder.mul(loop.index, INTEGER(LANES * size))))
            row = read(place, ir.VectorType(element, LANES), size)
            rows.append(row if element is FLOAT else builder.sitofp(row, VECTOR))
            early = builder.inttoptr(builder.add(place, INTEGER(AHEAD)), pointer)
            builder.call(fetch, [early, SHORT(0), SHORT(3), SHORT(1)])  # to read, to keep, data
        for t, start in enumerate(starts):
            values = read(builder.add(start, builder.mul(loop.index, INTEGER(4 * LANES))), VECTOR, 4)
            for row, total in zip(rows, totals[ROWS * t:ROWS * (t + 1)], strict=True):
                more = builder.fmul(row, values, flags=FUSED)
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


block_float32 = block_product(FLOAT, 4)
block_int8 = block_product(BYTE, 1)
