"""A model's weights as a table of addresses that the compiled step reads.

Nothing is copied: the table points into torch's memory, both for float32 weights and for the
numbers and scales of a quantized model (`fira.convert.quantize`). Each matrix has its own
precision. Activations are float32. A part that a model does not have (a bias, a rotation, a gate,
a router) has address 0.
"""
from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
from torch import Tensor

from fira.convert.quantize import Quantized, quantize
from fira.infer.decode.kernel import FLOAT32, INT4, INT8

MATRIX = np.dtype([(name, np.int64) for name in ("weight", "scale", "bias", "precision")])
NORM = np.dtype([(name, np.int64) for name in ("weight", "bias")])
LAYER = np.dtype([
    ("attention_norm", NORM), ("qkv", MATRIX), ("query_norm", NORM), ("key_norm", NORM),
    ("output", MATRIX), ("moe_norm", NORM), ("router", MATRIX), ("selection_bias", np.int64),
    ("gate", MATRIX), ("up", MATRIX), ("down", MATRIX), ("keys", np.int64), ("values", np.int64)])
MODEL = np.dtype([(name, np.int64) for name in (
    "heads", "kv_heads", "head_width", "cosines", "sines", "slot_stride", "group_stride")] + [
    ("norm", NORM), ("head", MATRIX), ("epsilon", np.float64)])


class AddressTable:
    """`model`, one record of type MODEL, and `layers`, records of type LAYER.

    `tensors` are all that the table points at; holding them keeps their memory alive.
    """

    def __init__(self, model: Any, precision: str = "float32") -> None:
        """With precision int8 or int4, a float32 model's matrices are quantized as copies."""
        self.tensors: list[Tensor] = []
        self.model = np.zeros(1, MODEL)
        self.layers = np.zeros(model.spec.num_layers, LAYER)
        weights = model if precision == "float32" else _quantized_copy(model, precision)
        self._fill_model(self.model[0], weights)
        for record, block in zip(self.layers, weights.blocks, strict=True):
            self._fill_layer(record, block)

    def _fill_model(self, record: Any, model: Any) -> None:
        spec = model.spec
        record["heads"], record["kv_heads"] = spec.n_head, spec.n_kv_head
        record["head_width"], record["epsilon"] = spec.head_dim, model.norm.eps
        if hasattr(model, "rotary"):
            record["cosines"] = self._address(model.rotary.cos)
            record["sines"] = self._address(model.rotary.sin)
        record["norm"] = self._norm(model.norm)
        record["head"] = self._matrix(getattr(model, "head", model.token_embedding))

    def _fill_layer(self, record: Any, block: Any) -> None:
        attention, experts = block.attention, block.moe.experts
        record["attention_norm"] = self._norm(block.attention_norm)
        record["moe_norm"] = self._norm(block.moe_norm)
        record["qkv"] = self._matrix(attention.qkv)
        record["output"] = self._matrix(attention.output)
        if hasattr(attention, "query_norm"):
            record["query_norm"] = self._norm(attention.query_norm)
            record["key_norm"] = self._norm(attention.key_norm)
        if hasattr(block.moe, "router"):
            record["router"] = self._matrix(block.moe.router)
            record["selection_bias"] = self._address(block.moe.router.selection_bias_E)
        if hasattr(experts, "gate"):
            record["gate"] = self._matrix(experts.gate)
        record["up"] = self._matrix(experts.up)
        record["down"] = self._matrix(experts.down)

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        assert tensor.is_contiguous(), tensor.shape
        self.tensors.append(tensor.detach())
        return tensor.data_ptr()

    def _norm(self, norm: Any) -> tuple[int, int]:
        return self._address(norm.weight), self._address(getattr(norm, "bias", None))

    def _matrix(self, module: Any) -> tuple[int, int, int, int]:
        """The record MATRIX of a weight [..., out, in]."""
        bias = self._address(getattr(module, "bias", None))
        if isinstance(module, Quantized):
            return (self._address(module.numbers), self._address(module.scale), bias,
                    {"int8": INT8, "int4": INT4}[module.kind])
        return self._address(module.weight), 0, bias, FLOAT32


def _quantized_copy(model: Any, kind: str) -> Any:
    """What `fira export` would write, sharing every tensor that stays float32 with the model."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return quantize(copy.deepcopy(model, shared), kind)
