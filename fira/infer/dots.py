"""What the compiled step is made of: memory by address, a barrier, and one weight row times x.

A row of a [out, in] matrix is contiguous, so reading rows one after the other is what the memory's
prefetcher likes best: blocks of four or eight rows were slower (docs/log.md).
"""
from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from fira.convert.quantize import GROUP
from fira.infer.pack import FLOAT32, INT8

YIELD_AFTER = 2000  # looks at the barrier before the processor is offered to others
YIELD = types.ExternalFunction("sched_yield", types.int32())
# Sums may be reordered and fused; infinities and NaN keep their meaning.
MATH = {"reassoc", "contract", "nsz", "arcp"}


def compiled(function: Any) -> Any:
    """Compile on first use and keep the result on disk, where any place on disk can be written."""
    options: dict[str, Any] = {"nogil": True, "fastmath": MATH, "error_model": "numpy"}
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


@intrinsic
def _dot_int4(context: Any, weight: Any, scale: Any, x: Any, groups: Any) -> Any:
    """Sum over groups of scale * (steps . x), in vectors of half a group.

    Written in LLVM's own terms: from the plain loop it made a step 4 times as slow.
    """
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weight, scale, x, groups = arguments
        number, half = ir.FloatType(), GROUP // 2
        many = ir.VectorType(number, half)

        def load(kind: Any, base: Any, offset: Any, step: int) -> Any:
            place = builder.add(base, builder.mul(offset, offset.type(step)))
            return builder.load(builder.inttoptr(place, kind.as_pointer()), align=1)

        def spread(value: Any) -> Any:
            one = builder.insert_element(ir.Constant(many, ir.Undefined), value, _index(0))
            return builder.shuffle_vector(one, one, ir.Constant(
                ir.VectorType(ir.IntType(32), half), [0] * half))

        def steps(nibbles: Any) -> Any:
            whole = builder.zext(nibbles, ir.VectorType(ir.IntType(32), half))
            return builder.fsub(builder.sitofp(whole, many), ir.Constant(many, [8.0] * half))

        def fuse(a: Any, b: Any, c: Any) -> Any:
            return builder.fadd(builder.fmul(a, b, flags=["contract"]), c, flags=["contract"])

        total = cgutils.alloca_once_value(builder, ir.Constant(many, [0.0] * half))
        with cgutils.for_range(builder, groups) as loop:
            group = loop.index
            pairs = load(ir.VectorType(ir.IntType(8), half), weight, group, half)
            low = builder.and_(pairs, ir.Constant(pairs.type, [15] * half))
            high = builder.lshr(pairs, ir.Constant(pairs.type, [4] * half))
            first = load(many, x, group, 4 * GROUP)
            second = load(many, builder.add(x, x.type(4 * half)), group, 4 * GROUP)
            part = fuse(steps(high), second, builder.fmul(steps(low), first, flags=["contract"]))
            factor = spread(load(number, scale, group, 4))
            builder.store(fuse(factor, part, builder.load(total)), total)
        lanes = builder.load(total)
        result = ir.Constant(number, 0.0)
        for lane in range(half):
            result = builder.fadd(result, builder.extract_element(lanes, _index(lane)),
                                  flags=["reassoc"])
        return result
    return types.float32(types.int64, types.int64, types.int64, types.int64), build


def _index(lane: int) -> Any:
    return ir.Constant(ir.IntType(32), lane)


@compiled
def dot_int4(weight, scale, row, x):
    """Byte i of a group holds elements i (low half) and i + 16 (high half), each plus 8."""
    groups = len(x) // GROUP
    first = row * groups
    return _dot_int4(weight + first * (GROUP // 2), scale + 4 * first, x.ctypes.data, groups)


@compiled
def dot(linear, row, x):
    """One row of a matrix times x, plus the row's bias."""
    if linear.precision == FLOAT32:
        total = dot_float32(linear.weight, row, x)
    elif linear.precision == INT8:
        total = dot_int8(linear.weight, row, x) * floats(linear.scale, row + 1)[row]
    else:
        total = dot_int4(linear.weight, linear.scale, row, x)
    if linear.bias:
        total += floats(linear.bias, row + 1)[row]
    return total


@compiled
def copy_row(table, row, first, last, out):
    """out[first:last] = columns first to last of a row of an embedding, float32 or int8."""
    if table.precision == FLOAT32:
        out[first:last] = floats(table.weight + 4 * row * len(out), len(out))[first:last]
    else:
        steps = carray(_pointer(table.weight + row * len(out)), len(out), np.int8)
        scale = floats(table.scale, row + 1)[row]
        for i in range(first, last):
            out[i] = np.float32(steps[i]) * scale
