"""A model's weights as the table of addresses that the compiled step reads.

Nothing is copied: the table points into torch's own memory, whether it is of fp32 weights or of a
quantized model's numbers and scales (`fira.convert.quantize`); each matrix says which. Asked for
int8 or int4, fp32 matrices are quantized as copies; the head, tied or not, is int8 in both.
Activations stay fp32.
"""
from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fira.convert.quantize import Quantized, quantize_int4, quantize_int8

FLOAT32, INT8, INT4 = 0, 1, 2

# numba's cache on disk sees changes in the file of the function it compiled but not in the others
# that it was built from. A field named after their content makes it another function.
SOURCES = "sources_" + str(zlib.crc32(b"".join(
    (Path(__file__).parent / name).read_bytes() for name in ("dots.py", "kernel.py"))))

MATRIX = np.dtype([(name, np.int64) for name in ("weight", "scale", "bias", "precision")])
NORM = np.dtype([(name, np.int64) for name in ("weight", "bias")])
LAYER = np.dtype([
    ("attention_norm", NORM), ("qkv", MATRIX), ("query_norm", np.int64), ("key_norm", np.int64),
    ("output", MATRIX), ("moe_norm", NORM), ("router", MATRIX), ("selection", np.int64),
    ("gate", MATRIX), ("up", MATRIX), ("down", MATRIX), ("keys", np.int64), ("values", np.int64)])
SHAPE = np.dtype([(name, np.int64) for name in (
    "width", "heads", "kv_heads", "head_width", "hidden", "experts", "top_k", "vocabulary",
    "context", "positions", "cosines", "sines", "slot_stride", "group_stride")] + [
    ("embedding", MATRIX), ("norm", NORM), ("head", MATRIX), ("epsilon", np.float64)])
WORK = np.dtype([(name, np.int64) for name in (
    "x", "qkv", "mixed", "hidden",  # shared by the crew
    "normed", "scores", "probs", "weights", "chosen", "order",  # each rank's own
    "counter", SOURCES)])

PRECISIONS = {"float32": FLOAT32, "int8": INT8, "int4": INT4}


class Packed:
    """The records `shape` and `layers` of a model, and `held`, the memory that they point into."""

    def __init__(self, model: Any, precision: str = "float32") -> None:
        self.precision = precision
        self.held: list[Tensor] = []
        spec = model.spec
        self.shape = np.zeros(1, SHAPE)
        self.layers = np.zeros(spec.num_layers, LAYER)
        self._fill_shape(model)
        for record, block in zip(self.layers, model.blocks, strict=True):
            self._fill_layer(record, block)

    @property
    def bytes(self) -> int:
        """Memory that is held beside the model's own parameters and with them."""
        return sum(tensor.nbytes for tensor in self.held)

    def _fill_shape(self, model: Any) -> None:
        spec, record = model.spec, self.shape[0]
        kv_heads = getattr(spec, "n_kv_head", spec.n_head)
        sizes = {"width": spec.d_model, "heads": spec.n_head, "kv_heads": kv_heads,
                 "head_width": spec.head_dim, "hidden": spec.d_ff, "experts": spec.num_experts,
                 "top_k": spec.top_k, "vocabulary": spec.vocab_size, "context": spec.context,
                 "epsilon": model.norm.eps}
        for name, size in sizes.items():
            record[name] = size
        record["embedding"] = self._stored(model.token_embedding)
        if hasattr(model, "position_embedding"):
            record["positions"] = self._hold(model.position_embedding.weight)
        if hasattr(model, "rotary"):
            record["cosines"] = self._hold(model.rotary.cos)
            record["sines"] = self._hold(model.rotary.sin)
        record["norm"] = self._norm(model.norm)
        coarsest = "float32" if self.precision == "float32" else "int8"  # as `fira export` has it
        record["head"] = self._matrix(getattr(model, "head", model.token_embedding), coarsest)

    def _fill_layer(self, record: Any, block: Any) -> None:
        attention, experts = block.attention, block.moe.experts
        record["attention_norm"] = self._norm(block.attention_norm)
        record["moe_norm"] = self._norm(block.moe_norm)
        record["qkv"] = self._matrix(attention.qkv)
        record["output"] = self._matrix(attention.output)
        if hasattr(attention, "query_norm"):
            record["query_norm"] = self._hold(attention.query_norm.weight)
            record["key_norm"] = self._hold(attention.key_norm.weight)
        if hasattr(block.moe, "router"):
            router = block.moe.router
            record["router"] = self._stored(router)
            if router.selection_bias_E is not None:
                record["selection"] = self._hold(router.selection_bias_E)
        if hasattr(experts, "gate"):
            record["gate"] = self._matrix(experts.gate)
        record["up"] = self._matrix(experts.up)
        record["down"] = self._matrix(experts.down)

    def _hold(self, tensor: Tensor) -> int:
        """The address of a tensor that will live as long as this table."""
        tensor = tensor.detach()
        assert tensor.is_contiguous(), tensor.shape
        self.held.append(tensor)
        return tensor.data_ptr()

    def _bias(self, module: Any) -> int:
        bias = getattr(module, "bias", None)
        return 0 if bias is None else self._hold(bias)

    def _norm(self, norm: Any) -> tuple[int, int]:
        return self._hold(norm.weight), self._bias(norm)

    def _stored(self, module: Any) -> tuple[int, int, int, int]:
        """Weight, scale, bias and precision of a matrix [..., out, in], as the model has them."""
        if isinstance(module, Quantized):
            return (self._hold(module.numbers), self._hold(module.scale), self._bias(module),
                    PRECISIONS[module.kind])
        return self._hold(module.weight), 0, self._bias(module), FLOAT32

    def _matrix(self, module: Any, precision: str | None = None) -> tuple[int, int, int, int]:
        """The same in `precision`, or else in the one that was asked for."""
        precision = precision or self.precision
        if precision == "float32" or isinstance(module, Quantized):
            return self._stored(module)
        quantize = quantize_int8 if precision == "int8" else quantize_int4
        numbers, scale = quantize(module.weight.detach())
        return (self._hold(numbers), self._hold(scale), self._bias(module), PRECISIONS[precision])
