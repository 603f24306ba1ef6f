"""Which form of an operation runs on which device: the only file of `model` that asks.

Each form equals a plain definition in values and gradients (tests/model: test_experts, test_moe).
It is kept because it wins at least 5% of a whole training step on some preset, or of a sampled
token, or because a GPU needs it to train deterministically without waiting for single rows.
"""
from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Multiplications per expert, below which dividing one product between the cores costs more than
# it gains: with two threads the batched form is then 5 to 6% of a training step of `tiny` faster.
SMALL_PRODUCT = 2**26
ROW_MAJOR, AS_IT_IS, TRANSPOSED = 101, 111, 112  # constants of CBLAS


def linear_fp32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer in float32, also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


def cast_for_product(x: Tensor) -> Tensor:
    """x in the dtype that autocast, where it is on, multiplies in."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def expert_linear(rows_Ri: Tensor, counts_E: Tensor, weight: Tensor,
                  bias: Tensor | None) -> Tensor:
    """`moe.expert_linear_plain` in this device's fastest form."""
    rows_Ri, weight = cast_for_product(rows_Ri), cast_for_product(weight)
    bias = None if bias is None else bias.to(rows_Ri.dtype)
    if len(weight) == 1:
        return F.linear(rows_Ri, weight.squeeze(0), None if bias is None else bias.squeeze(0))
    grouped = (rows_Ri.is_cuda and rows_Ri.dtype == torch.bfloat16
               and not grouping_obstacle(weight.shape[1:], rows_Ri.device))
    multiply = grouped_linear if grouped else SortedLinear.apply
    out_Ro = multiply(rows_Ri, counts_E, weight)
    return out_Ro if bias is None else add_bias(out_Ro, counts_E, bias)


def should_batch(rows_RD: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether `BatchedSwiGLU` is the fastest form.

    It always computes the gradients of all weights, so frozen ones take the other form.
    """
    frozen = torch.is_grad_enabled() and not all(weight.requires_grad for weight in weights)
    return (not frozen and len(weights[0]) > 1 and not torch.is_autocast_enabled("cpu")
            and _are_small(rows_RD, weights[0]))


def _are_small(rows_Ri: Tensor, stack: Tensor) -> bool:
    """Whether one call computes the products of all experts: float32 on a CPU, and products so
    small that dividing each between the cores costs more than it gains."""
    return (HAS_BATCH and type(rows_Ri) is Tensor and rows_Ri.device.type == "cpu"
            and rows_Ri.dtype == stack.dtype == torch.float32
            and len(rows_Ri) * stack[0].numel() < SMALL_PRODUCT * len(stack))


def grouping_obstacle(widths: Iterable[int], device: torch.device) -> str | None:
    """Why CUDA cannot multiply all experts of a layer at once, in bfloat16; None if it can."""
    if device.type != "cuda":
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "grouped_mm needs compute capability 8.0 or newer"
    uneven = [width for width in widths if width % 8]  # row strides of whole 16 bytes
    return f"grouped_mm needs widths that divide by 8, not {uneven[0]}" if uneven else None


def count_rows(experts_R: Tensor, num_experts: int) -> Tensor:
    """The number of rows of each expert, int64 [E]."""
    if experts_R.is_cuda:  # atomic additions would make threads wait for each other
        experts_E = torch.arange(num_experts, device=experts_R.device)
        return (experts_R.unsqueeze(1) == experts_E).sum(dim=0)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=experts_R.device)
    return counts_E.index_add_(0, experts_R, torch.ones_like(experts_R))


def sum_rows(rows_RD: Tensor, index_NK: Tensor, weights_NK: Tensor | None = None) -> Tensor:
    """The (weighted) sum of each token's K rows."""
    if index_NK.is_cuda and torch.compiler.is_compiling():
        return sum_rows_by_choice(rows_RD, index_NK, weights_NK)
    return F.embedding_bag(index_NK, rows_RD, mode="sum", per_sample_weights=weights_NK)


def sum_rows_by_choice(rows_RD: Tensor, index_NK: Tensor,
                       weights_NK: Tensor | None = None) -> Tensor:
    """`sum_rows` as K additions, which a GPU's graph fuses into one pass.

    A sum over an axis of 8 is compiled as a reduction, three times as slow on an H100.
    """
    parts = [rows_RD[index_N] for index_N in index_NK.unbind(dim=1)]
    if weights_NK is not None:
        parts = [part * weight_N.unsqueeze(1)
                 for part, weight_N in zip(parts, weights_NK.unbind(dim=1), strict=True)]
    return functools.reduce(torch.add, parts)


def sort_values(x: Tensor) -> Tensor:
    """x in rising order along its last axis, without indices.

    On a CPU numpy sorts 50,304 numbers in 0.09 ms by vector instructions, and torch in 3.1 ms.
    """
    if x.device.type == "cpu":
        return torch.from_numpy(np.sort(x.detach().numpy()))
    return x.sort(dim=-1).values


def opaque(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function of tensors one node of a compiled graph; `fake` gives its results' shapes.

    A graph cannot hold loops over the number of rows of an expert, nor addresses for MKL. The
    results must be new tensors. Eager mode calls the function itself, which costs less.
    """
    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        node = torch.library.custom_op(f"fira::{function.__name__}", function, mutates_args=())
        node.register_fake(fake)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return (node if torch.compiler.is_compiling() else function)(*args)
        return call
    return wrap


def grouped_linear(rows_Ri: Tensor, counts_E: Tensor, weight: Tensor) -> Tensor:
    """One grouped matrix product on CUDA, without waiting for the device."""
    ends_E = counts_E.cumsum(0).to(torch.int32)
    return F.grouped_mm(rows_Ri, weight.transpose(1, 2), offs=ends_E)


def add_bias(out_Ro: Tensor, counts_E: Tensor, bias_Eo: Tensor) -> Tensor:
    """Add each row's expert's bias, as a product with the rows' owners (1 or 0).

    So the gradient is a product too; that of a gather would add the rows one by one.
    """
    rows_R1 = torch.arange(len(out_Ro), device=out_Ro.device).unsqueeze(1)
    ends_E = counts_E.cumsum(0)
    owners_RE = (rows_R1 < ends_E) & (rows_R1 >= ends_E - counts_E)
    return torch.addmm(out_Ro, owners_RE.to(out_Ro.dtype), bias_Eo)


class SortedLinear(torch.autograd.Function):
    """One matrix product per expert, each written into its slice of one preallocated result.

    out_r = W_e x_r for the rows r of expert e, so dx_r = W_e^T dout_r, dW_e = sum_r dout_r x_r^T.
    Indexing the stacked weight per expert would make autograd allocate a full-size zero gradient
    for each; here each is written once.
    """

    @staticmethod
    def forward(ctx: Any, rows_Ri: Tensor, counts_E: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows_Ri, counts_E, weight)
        return sorted_products(rows_Ri, counts_E, weight, True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Ro: Tensor) -> tuple[Tensor | None, ...]:
        rows_Ri, counts_E, weight = ctx.saved_tensors
        need_rows, _, need_weight = ctx.needs_input_grad
        return (sorted_products(grad_Ro, counts_E, weight, False) if need_rows else None,
                None, sorted_weight_gradient(grad_Ro, rows_Ri, counts_E) if need_weight else None)


@opaque(lambda rows_Ri, counts_E, weight, transpose: rows_Ri.new_empty(
    len(rows_Ri), weight.shape[1 if transpose else 2]))
def sorted_products(rows_Ri: Tensor, counts_E: Tensor, weight: Tensor, transpose: bool) -> Tensor:
    """rows times W_e, or W_e transposed, of their expert e."""
    out_Ro = rows_Ri.new_empty(len(rows_Ri), weight.shape[1 if transpose else 2])
    if _are_small(rows_Ri, weight):
        multiply_all(counts_E, Product(rows_Ri.contiguous(), weight.contiguous(), out_Ro,
                                       transpose_right=transpose))
        return out_Ro
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            rows = slice(start, start + count)
            torch.mm(rows_Ri[rows], weight[expert].t() if transpose else weight[expert],
                     out=out_Ro[rows])
        start += count
    return out_Ro


@opaque(lambda grad_Ro, rows_Ri, counts_E: rows_Ri.new_empty(
    len(counts_E), grad_Ro.shape[1], rows_Ri.shape[1]))
def sorted_weight_gradient(grad_Ro: Tensor, rows_Ri: Tensor, counts_E: Tensor) -> Tensor:
    grad_Eoi = rows_Ri.new_empty(len(counts_E), grad_Ro.shape[1], rows_Ri.shape[1])
    if _are_small(rows_Ri, grad_Eoi):
        grad_Eoi[counts_E == 0] = 0
        multiply_all(counts_E, Product(grad_Ro.contiguous(), rows_Ri.contiguous(), grad_Eoi,
                                       transpose_left=True))
        return grad_Eoi
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        rows = slice(start, start + count)
        if count:
            torch.mm(grad_Ro[rows].t(), rows_Ri[rows], out=grad_Eoi[expert])
        else:
            grad_Eoi[expert].zero_()
        start += count
    return grad_Eoi


class BatchedSwiGLU(torch.autograd.Function):
    """out = down(h), h = silu(g) * u, g = gate x, u = up x: rows_RD sorted by expert -> rows_RD.

    With dh = down^T dout the gradients are du = silu(g) dh, dg = silu'(g) u dh,
    dx = gate^T dg + up^T du, and per expert dgate = dg^T x, dup = du^T x, ddown = dout^T h.
    """

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, counts_E: Tensor, gate_EFD: Tensor, up_EFD: Tensor,
                down_EDF: Tensor) -> Tensor:
        out_RD, gates_RF, ups_RF = batched_swiglu(rows_RD, counts_E, gate_EFD, up_EFD, down_EDF)
        ctx.save_for_backward(rows_RD, counts_E, gate_EFD, up_EFD, down_EDF, gates_RF, ups_RF)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, *grads = batched_swiglu_gradients(grad_RD.contiguous(), *ctx.saved_tensors)
        return grad_rows, None, *grads


def _hidden_like(rows_RD: Tensor, gate_EFD: Tensor) -> Tensor:
    return rows_RD.new_empty(len(rows_RD), gate_EFD.shape[1])


@opaque(lambda rows_RD, counts_E, gate_EFD, up_EFD, down_EDF: (
    torch.empty_like(rows_RD), _hidden_like(rows_RD, gate_EFD), _hidden_like(rows_RD, gate_EFD)))
def batched_swiglu(rows_RD: Tensor, counts_E: Tensor, gate_EFD: Tensor, up_EFD: Tensor,
                   down_EDF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out, g and u of `BatchedSwiGLU`."""
    out_RD = torch.empty_like(rows_RD)
    gates_RF, ups_RF = _hidden_like(rows_RD, gate_EFD), _hidden_like(rows_RD, gate_EFD)
    multiply_all(counts_E, Product(rows_RD, gate_EFD, gates_RF, transpose_right=True),
                 Product(rows_RD, up_EFD, ups_RF, transpose_right=True))
    hidden_RF = F.silu(gates_RF).mul_(ups_RF)
    multiply_all(counts_E, Product(hidden_RF, down_EDF, out_RD, transpose_right=True))
    return out_RD, gates_RF, ups_RF


@opaque(lambda grad_RD, rows_RD, counts_E, gate_EFD, up_EFD, down_EDF, gates_RF, ups_RF: tuple(
    torch.empty_like(x) for x in (rows_RD, gate_EFD, up_EFD, down_EDF)))
def batched_swiglu_gradients(
        grad_RD: Tensor, rows_RD: Tensor, counts_E: Tensor, gate_EFD: Tensor, up_EFD: Tensor,
        down_EDF: Tensor, gates_RF: Tensor, ups_RF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, gate, up and down; those of experts without rows are zero."""
    grad_rows_RD, grad_hidden_RF = torch.empty_like(rows_RD), torch.empty_like(gates_RF)
    new = torch.empty_like if counts_E.all() else torch.zeros_like
    grad_gate_EFD, grad_up_EFD, grad_down_EDF = new(gate_EFD), new(up_EFD), new(down_EDF)
    multiply_all(counts_E, Product(grad_RD, down_EDF, grad_hidden_RF))
    silu_RF = F.silu(gates_RF)
    hidden_RF, grad_ups_RF = silu_RF * ups_RF, silu_RF.mul_(grad_hidden_RF)
    grad_gates_RF = torch.ops.aten.silu_backward(grad_hidden_RF.mul_(ups_RF), gates_RF)
    multiply_all(counts_E, Product(grad_RD, hidden_RF, grad_down_EDF, transpose_left=True),
                 Product(grad_gates_RF, gate_EFD, grad_rows_RD),
                 Product(grad_gates_RF, rows_RD, grad_gate_EFD, transpose_left=True))
    multiply_all(counts_E, Product(grad_ups_RF, up_EFD, grad_rows_RD, add=True),
                 Product(grad_ups_RF, rows_RD, grad_up_EFD, transpose_left=True))
    return grad_rows_RD, grad_gate_EFD, grad_up_EFD, grad_down_EDF


def _find_batch() -> Any:
    """MKL's `cblas_sgemm_batch`, which torch's x86 wheels hold; None where there is none.

    torch offers batches of equal products only; one product at a time makes the cores share each.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not torch.backends.mkl.is_available() or not library.exists():
        return None
    function = getattr(ctypes.CDLL(str(library)), "cblas_sgemm_batch", None)
    if function is not None:
        function.restype = None
    return function


_sgemm_batch = _find_batch()
HAS_BATCH = _sgemm_batch is not None


class Product(NamedTuple):
    """out[e] = left[e] @ right[e] for every expert e, added to what is there if `add`.

    A tensor with two axes holds rows sorted by expert, one with three a matrix per expert.
    """

    left: Tensor
    right: Tensor
    out: Tensor
    transpose_left: bool = False
    transpose_right: bool = False
    add: bool = False


def multiply_all(counts_E: Tensor, *products: Product) -> None:
    """Compute the products for every expert that has rows, in no certain order, on torch's threads.

    The products of one expert stand together in the call, so that what they share is in cache.
    """
    counts = counts_E.numpy()
    busy = np.flatnonzero(counts)
    starts = (counts.cumsum() - counts)[busy]
    for tensor in (x for product in products for x in product[:3]):
        assert tensor.is_contiguous() and tensor.dtype == torch.float32, tensor.dtype

    def address(x: Tensor) -> Any:
        return x.data_ptr() + 4 * (starts * x.shape[1] if x.dim() == 2 else busy * x[0].numel())

    def height(x: Tensor) -> Any:
        return counts[busy] if x.dim() == 2 else x.shape[1]

    def per_product(value: Callable[[Product], Any], dtype: type = np.int32) -> Any:
        table: NDArray[Any] = np.empty((len(busy), len(products)), dtype=dtype)
        for column, product in enumerate(products):
            table[:, column] = value(product)
        return table

    arrays = [
        per_product(lambda p: TRANSPOSED if p.transpose_left else AS_IT_IS),
        per_product(lambda p: TRANSPOSED if p.transpose_right else AS_IT_IS),
        per_product(lambda p: height(p.out)), per_product(lambda p: p.out.shape[-1]),
        per_product(lambda p: height(p.left) if p.transpose_left else p.left.shape[-1]),
        per_product(lambda p: 1, np.float32),
        per_product(lambda p: address(p.left), np.int64), per_product(lambda p: p.left.shape[-1]),
        per_product(lambda p: address(p.right), np.int64), per_product(lambda p: p.right.shape[-1]),
        per_product(lambda p: p.add, np.float32),
        per_product(lambda p: address(p.out), np.int64), per_product(lambda p: p.out.shape[-1])]
    sizes = per_product(lambda p: 1)  # each product is a group of its own
    _sgemm_batch(ROW_MAJOR, *(array.ctypes.data_as(ctypes.c_void_p) for array in arrays),
                 ctypes.c_int(sizes.size), sizes.ctypes.data_as(ctypes.c_void_p))
