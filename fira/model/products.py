"""Many small matrix products in one call: MKL's `cblas_sgemm_batch`, which torch's x86 wheels hold.

torch itself offers batches of equal products only. One call for all experts keeps every core on
products of its own, where a product at a time makes the cores share each (docs/log.md).
"""
from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROW_MAJOR, AS_IT_IS, TRANSPOSED = 101, 111, 112  # of CBLAS


class Matrices(NamedTuple):
    """Row-major float32 matrices: where each begins, its rows; columns are the same for all."""

    addresses: NDArray[np.int64]
    rows: NDArray[np.int32]
    columns: int
    transposed: bool = False

    @property
    def t(self) -> Matrices:
        return self._replace(transposed=not self.transposed)

    @property
    def shape(self) -> tuple[Any, Any]:
        """Rows and columns as the product sees them, either a number or one for each matrix."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)


def row_blocks(rows_Ri: Tensor, starts: NDArray[np.int64], counts: NDArray[np.int32]) -> Matrices:
    """The blocks of `rows_Ri` that begin at `starts`; it must be contiguous."""
    assert rows_Ri.is_contiguous() and rows_Ri.dtype == torch.float32
    stride = rows_Ri.shape[1] * rows_Ri.element_size()
    return Matrices(rows_Ri.data_ptr() + starts * stride, counts, rows_Ri.shape[1])


def stacked(weight_Eoi: Tensor, experts: NDArray[np.int64]) -> Matrices:
    """The matrices of a contiguous stack that belong to `experts`."""
    height = np.full(len(experts), weight_Eoi.shape[1], dtype=np.int32)
    return row_blocks(weight_Eoi.view(-1, weight_Eoi.shape[2]), experts * weight_Eoi.shape[1],
                      height)


def _find_batch() -> Any:
    """MKL's function, or None where torch was built without it or keeps it to itself."""
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
    """out[g] = left[g] @ right[g] for every g, added to what is there if `add`."""

    left: Matrices
    right: Matrices
    out: Matrices
    add: bool = False


def multiply_all(*products: Product) -> None:
    """Every product, of equally many matrices, in no certain order, on torch's threads.

    Those of one g stand together, so that what they share is in cache. Callers keep the tensors.
    """
    groups = len(products[0].out.addresses)

    def each(values: Iterable[Any], dtype: type = np.int32) -> Any:
        table: NDArray[Any] = np.empty((groups, len(products)), dtype=dtype)
        for column, value in enumerate(values):
            table[:, column] = value
        return table.ctypes

    lefts, rights, outs, adds = zip(*products, strict=True)
    kinds = [each(TRANSPOSED if one.transposed else AS_IT_IS for one in side)
             for side in (lefts, rights)]
    sizes = [each(one.shape[0] for one in outs), each(one.shape[1] for one in outs),
             each(one.shape[1] for one in lefts)]
    left, right, out = ((each((one.addresses for one in side), np.int64),
                         each(one.columns for one in side)) for side in (lefts, rights, outs))
    scales = each([1] * len(products), np.float32), each(adds, np.float32)
    arrays = [*kinds, *sizes, scales[0], *left, *right, scales[1], *out]
    _sgemm_batch(ROW_MAJOR, *(array.data_as(ctypes.c_void_p) for array in arrays),
                   ctypes.c_int(groups * len(products)),
                   each([1] * len(products)).data_as(ctypes.c_void_p))
