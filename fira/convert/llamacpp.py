"""llama.cpp's own quantizer, for the types that the package `gguf` cannot make.

xllamacpp is llama.cpp built for Python. It shows no quantizer there, but its library exports the
one C function that is needed: ggml_quantize_chunk(type, source, target, start, rows, width, none).
"""
from __future__ import annotations

import ctypes
import functools
from typing import Any

import gguf
import numpy as np

INSTALL = "pip install 'fira-moe[edge]'"


@functools.cache
def _quantize_chunk() -> Any:
    try:
        from xllamacpp import xllamacpp as library
    except ImportError:
        raise ValueError(f"this type is made by llama.cpp, which is not installed; {INSTALL}, or "
                         "choose f32, f16, bf16, q8_0, q5_0 or q4_0") from None
    try:
        function = ctypes.CDLL(library.__file__).ggml_quantize_chunk
    except (OSError, AttributeError):
        raise ValueError("this type is made by llama.cpp, and the installed xllamacpp hides its "
                         "quantizer; choose f32, f16, bf16, q8_0, q5_0 or q4_0") from None
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64,
                         ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    return function


def quantize(numbers: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Float32 `numbers` as rows of bytes of `kind`. Raises ValueError if llama.cpp is missing."""
    source = np.ascontiguousarray(numbers, np.float32)
    shape = gguf.quant_shape_to_byte_shape(source.shape, kind)
    target = np.empty(shape, np.uint8)
    rows = source.size // source.shape[-1]
    written = _quantize_chunk()(int(kind), source.ctypes.data, target.ctypes.data, 0, rows,
                                source.shape[-1], None)
    assert written == target.nbytes, (written, target.nbytes, kind)
    return target
