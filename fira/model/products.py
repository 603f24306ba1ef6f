"""Many small matrix products in one call: MKL's `cblas_sgemm_batch`, which torch's x86 wheels hold.

torch itself offers batches of equal products only. One call for all experts keeps every core on
products of its own, where a product at a time makes the cores share each (docs/log.md).
"""
from __future__ import annotations

import ctypes
from functools import cache
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


@cache
def _sgemm_batch() -> Any:
    """MKL's function, or None where torch was built without it or keeps it to itself."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not torch.backends.mkl.is_available() or not library.exists():
        return None
    function = getattr(ctypes.CDLL(str(library)), "cblas_sgemm_batch", None)
    if function is not None:
        function.restype = None
    return function


def can_batch() -> bool:
    return _sgemm_batch() is not None


def multiply_all(left: Matrices, right: Matrices, out: Matrices) -> None:
    """out[g] = left[g] @ right[g] for every g, on torch's threads. Callers keep the tensors."""
    groups = len(out.addresses)

    def each(value: Any, dtype: type = np.int32) -> Any:
        return np.ascontiguousarray(np.broadcast_to(value, groups), dtype=dtype).ctypes

    ones, zeros = each(1, np.float32), each(0, np.float32)
    kind = [each(TRANSPOSED if side.transposed else AS_IT_IS) for side in (left, right)]
    sizes = [each(size) for size in (*out.shape, left.shape[1])]
    places = [(each(side.addresses, np.int64), each(side.columns)) for side in (left, right, out)]
    arrays = [*kind, *sizes, ones, *places[0], *places[1], zeros, *places[2]]
    _sgemm_batch()(ROW_MAJOR, *(array.data_as(ctypes.c_void_p) for array in arrays),
                   ctypes.c_int(groups), each(1).data_as(ctypes.c_void_p))
