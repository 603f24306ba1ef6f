"""Triton kernels of SwiGLU experts: what lies around the products is done inside them.

Rows are sorted by expert; row r is a copy of token order[r] // K. A program computes one tile of a
result, those of the same rows one after the other, so that the rows and one expert's weights stay
in the cache. `owner` and `first` say whose a tile of rows is and where it begins, `ends` where each
expert's rows end. Products add up in float32. Layouts: x [N, D], gate and up [E, F, D], down
[E, D, F], what is of a row [R, F], what is of a (token, choice) pair [N * K, D].
"""
# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def tile_rows(owner, first, ends, ROWS: tl.constexpr):
    """The expert of this program's tile, its rows, and which of them are there."""
    tile = tl.program_id(1)
    expert = tl.load(owner + tile).to(tl.int64)
    rows = tl.load(first + tile) + tl.arange(0, ROWS).to(tl.int64)
    return expert, rows, rows < tl.load(ends + expert)


@triton.jit
def load_tile(pointer, down, across, step_down, step_across, there_down, there_across):
    """The numbers at down x across, zero where there are none."""
    at = down[:, None] * step_down + across[None, :] * step_across
    return tl.load(pointer + at, mask=there_down[:, None] & there_across[None, :], other=0.0)


@triton.jit
def add_product(total, a, rows, live, weight, columns, wide, step_in, step_out, SUMMED,
                INNER: tl.constexpr):
    """total + a[rows] weight[:, columns], both SUMMED long."""
    for start in range(0, SUMMED, INNER):
        inner = start + tl.arange(0, INNER)
        some = load_tile(a, rows, inner, SUMMED, 1, live, inner < SUMMED)
        one = load_tile(weight, inner, columns, step_in, step_out, inner < SUMMED, wide)
        total = tl.dot(some, one, total, input_precision="ieee")
    return total


@triton.jit
def hidden_kernel(x, order, gate, up, owner, first, ends, gates, ups, hidden, D, F,
                  E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                  INNER: tl.constexpr):
    """Gathers tokens; gates = x gate^T, ups = x up^T, hidden = silu(gates) * ups."""
    if tl.load(owner + tl.program_id(1)) < E:
        expert, rows, live = tile_rows(owner, first, ends, ROWS)
        tokens = tl.load(order + rows, mask=live, other=0) // K
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        gate += expert * F * D
        up += expert * F * D
        gate_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
        up_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, D, INNER):
            inner = start + tl.arange(0, INNER)
            some = load_tile(x, tokens, inner, D, 1, live, inner < D)
            one = load_tile(gate, inner, columns, 1, D, inner < D, columns < F)
            gate_sum = tl.dot(some, one, gate_sum, input_precision="ieee")
            one = load_tile(up, inner, columns, 1, D, inner < D, columns < F)
            up_sum = tl.dot(some, one, up_sum, input_precision="ieee")
        at = rows[:, None] * F + columns[None, :]
        mask = live[:, None] & (columns < F)[None, :]
        tl.store(gates + at, gate_sum, mask=mask)
        tl.store(ups + at, up_sum, mask=mask)
        tl.store(hidden + at, gate_sum * tl.sigmoid(gate_sum) * up_sum, mask=mask)


@triton.jit
def pair_kernel(a, weight, b, weight_b, order, weights, owner, first, ends, out, D, F, step_in,
                step_out, E: tl.constexpr, TWO: tl.constexpr, WEIGHTED: tl.constexpr,
                ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """Scatters to pairs: out[order[r]] = a weight (+ b weight_b with TWO), times the pair's weight
    if WEIGHTED. step_in and step_out lead along a weight's F and D."""
    if tl.load(owner + tl.program_id(1)) < E:
        expert, rows, live = tile_rows(owner, first, ends, ROWS)
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        total = add_product(total, a, rows, live, weight + expert * F * D, columns, columns < D,
                            step_in, step_out, F, INNER)
        if TWO:
            total = add_product(total, b, rows, live, weight_b + expert * F * D, columns,
                                columns < D, step_in, step_out, F, INNER)
        pairs = tl.load(order + rows, mask=live, other=0)
        if WEIGHTED:
            total *= tl.load(weights + pairs, mask=live, other=0.0)[:, None]
        at = pairs[:, None] * D + columns[None, :]
        tl.store(out + at, total, mask=live[:, None] & (columns < D)[None, :])


@triton.jit
def hidden_gradient_kernel(grad, order, weights, down, owner, first, ends, gates, ups, grad_gates,
                           grad_ups, hidden, dots, D, F, E: tl.constexpr, K: tl.constexpr,
                           ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """Gathers the tokens' gradients; makes those of gates and ups, hidden times the pair's weight,
    and each pair's part, by this tile, of the gradient of its weight: dots [N * K, tiles of F]."""
    if tl.load(owner + tl.program_id(1)) < E:
        expert, rows, live = tile_rows(owner, first, ends, ROWS)
        pairs = tl.load(order + rows, mask=live, other=0)
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        total = add_product(total, grad, pairs // K, live, down + expert * F * D, columns,
                            columns < F, F, 1, D, INNER)
        at = rows[:, None] * F + columns[None, :]
        mask = live[:, None] & (columns < F)[None, :]
        gate = tl.load(gates + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(ups + at, mask=mask, other=0.0).to(tl.float32)
        open_ = tl.sigmoid(gate)
        value = gate * open_ * up
        tl.store(dots + pairs * tl.num_programs(0) + tl.program_id(0),
                 tl.sum(total * value, axis=1), mask=live)
        weight = tl.load(weights + pairs, mask=live, other=0.0)[:, None]
        total *= weight
        tl.store(hidden + at, value * weight, mask=mask)
        tl.store(grad_ups + at, total * gate * open_, mask=mask)
        tl.store(grad_gates + at, total * up * open_ * (1 + gate * (1 - open_)), mask=mask)


@triton.jit
def weight_gradient_kernel(a, b, order, ends, out, HEIGHT, WIDTH, K: tl.constexpr,
                           GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, ROWS: tl.constexpr,
                           COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """out[e] = a^T b over the expert's rows, a [., HEIGHT], b [., WIDTH]; what is gathered is of
    tokens. An expert without rows gets zeros."""
    expert = tl.program_id(2).to(tl.int64)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    high = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    wide = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(begin, end, INNER):
        rows = start + tl.arange(0, INNER).to(tl.int64)
        live = rows < end
        tokens = tl.load(order + rows, mask=live, other=0) // K
        rows_a = tokens if GATHER_A else rows
        rows_b = tokens if GATHER_B else rows
        some = load_tile(a, high, rows_a, 1, HEIGHT, high < HEIGHT, live)
        one = load_tile(b, rows_b, wide, WIDTH, 1, live, wide < WIDTH)
        total = tl.dot(some, one, total, input_precision="ieee")
    at = high[:, None] * WIDTH + wide[None, :]
    tl.store(out + expert * HEIGHT * WIDTH + at, total,
             mask=(high < HEIGHT)[:, None] & (wide < WIDTH)[None, :])
