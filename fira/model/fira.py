"""FIRA, the founding model: learned positions, LayerNorm, GELU experts with biases, untied head.

With one expert it is GPT-2 (Radford et al. 2019) without biases in the attention projections.
Dropout follows the embeddings, the attention and the experts; attention probabilities are not
dropped, so that every device keeps its fused attention.
"""
from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fira.config import parse
from fira.model.initialize import initialize
from fira.model.moe import GELUExperts, make_layer
from fira.model.spec import FIRASpec
from fira.model.transformer import (
    Block,
    KeyValueCache,
    LayerCache,
    Transformer,
    attention,
    embedding,
    find_positions,
)


class FIRA(Transformer):
    """tokens_BT -> logits_BTV. Takes the fields of `FIRASpec`; raises ConfigError on bad ones."""

    architecture = "fira"
    before = ("token_embedding", "position_embedding")

    def __init__(self, **fields: Any) -> None:
        spec = parse(FIRASpec, fields)
        super().__init__(spec)
        self.token_embedding = embedding(spec.vocab_size, spec.d_model)
        self.position_embedding = embedding(spec.context, spec.d_model)
        self.blocks = nn.ModuleList(Block(
            nn.LayerNorm(spec.d_model), Attention(spec), nn.LayerNorm(spec.d_model),
            make_layer(spec, GELUExperts(spec.num_experts, spec.d_model, spec.d_ff),
                       router_bias=True), spec.dropout) for _ in range(spec.num_layers))
        self.norm = nn.LayerNorm(spec.d_model)
        self.head = nn.Linear(spec.d_model, spec.vocab_size)
        initialize(self)

    def embed(self, tokens_BT: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        positions_T = find_positions(tokens_BT, cache, self.spec.context)
        x_BTD = self.token_embedding(tokens_BT) + self.position_embedding(positions_T)
        return F.dropout(x_BTD, self.spec.dropout, self.training)


class Attention(nn.Module):
    """Causal multi-head self-attention without biases."""

    def __init__(self, spec: FIRASpec) -> None:
        super().__init__()
        self.n_head = spec.n_head
        self.qkv = nn.Linear(spec.d_model, 3 * spec.d_model, bias=False)
        self.output = nn.Linear(spec.d_model, spec.d_model, bias=False)

    def forward(self, x_BTD: Tensor, tables: None, cache: LayerCache | None) -> Tensor:
        B, T, D = x_BTD.shape
        qkv_BTHC = self.qkv(x_BTD).view(B, T, 3 * self.n_head, D // self.n_head)
        q_BHTC, k_BHTC, v_BHTC = qkv_BTHC.transpose(1, 2).chunk(3, dim=1)
        y_BHTC = attention(q_BHTC, k_BHTC, v_BHTC, cache)
        return self.output(y_BHTC.transpose(1, 2).reshape(B, T, D))
