"""FIRA for transformers 4 and 5: learned positions, LayerNorm, GELU experts, untied head.

This file travels with the weights and needs only torch and transformers:
AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast


class FIRAConfig(PretrainedConfig):
    """The settings in config.json, each an attribute; they have no defaults."""

    model_type = "fira"


class Attention(nn.Module):
    """Causal multi-head self-attention without biases."""

    def __init__(self, config: FIRAConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head = layer, config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, mask_B1TS: Tensor, cache: Cache | None) -> Tensor:
        B, T, D = x_BTD.shape
        qkv_BTHC = self.qkv(x_BTD).view(B, T, 3 * self.n_head, D // self.n_head)
        q_BHTC, k_BHSC, v_BHSC = qkv_BTHC.transpose(1, 2).chunk(3, dim=1)
        if cache is not None:
            k_BHSC, v_BHSC = cache.update(k_BHSC, v_BHSC, self.layer)
        y_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHSC, v_BHSC, attn_mask=mask_B1TS)
        return self.output(y_BHTC.transpose(1, 2).reshape(B, T, D))


class ExpertLinear(nn.Module):
    """One linear of each expert, stacked."""

    def __init__(self, num_experts: int, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width_out, width_in))
        self.bias = nn.Parameter(torch.empty(num_experts, width_out))

    def forward(self, rows_Ri: Tensor, expert: int) -> Tensor:
        return F.linear(rows_Ri, self.weight[expert], self.bias[expert])


class MoE(nn.Module):
    """Sum, over the experts that the router chooses for a token, of weight * expert(token).

    An expert is a linear, GELU in its tanh form and a linear. With one expert there is no router.
    """

    def __init__(self, config: FIRAConfig) -> None:
        super().__init__()
        experts, width, hidden = config.num_experts, config.hidden_size, config.intermediate_size
        self.top_k = config.num_experts_per_tok
        self.experts = nn.ModuleDict({"up": ExpertLinear(experts, width, hidden),
                                      "down": ExpertLinear(experts, hidden, width)})
        if experts > 1:
            self.router = nn.Linear(width, experts)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        if not hasattr(self, "router"):
            return self.apply_expert(x_ND, 0).view_as(x_BTD)
        logits_NE = F.linear(x_ND.float(), self.router.weight.float(), self.router.bias.float())
        weights_NK, experts_NK = logits_NE.softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.top_k > 1:  # one expert alone is multiplied by its raw probability
            weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
        y_ND = torch.zeros_like(x_ND)
        for expert in range(self.router.out_features):
            rows_R, choice_R = (experts_NK == expert).nonzero(as_tuple=True)
            if len(rows_R):
                out_RD = self.apply_expert(x_ND[rows_R], expert)
                weights_R1 = weights_NK[rows_R, choice_R, None].to(out_RD.dtype)
                y_ND.index_add_(0, rows_R, out_RD * weights_R1)
        return y_ND.view_as(x_BTD)

    def apply_expert(self, rows_RD: Tensor, expert: int) -> Tensor:
        hidden_RF = F.gelu(self.experts["up"](rows_RD, expert), approximate="tanh")
        return self.experts["down"](hidden_RF, expert)


class Block(nn.Module):
    def __init__(self, config: FIRAConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config, layer)
        self.moe_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.moe = MoE(config)

    def forward(self, x_BTD: Tensor, mask_B1TS: Tensor, cache: Cache | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), mask_B1TS, cache)
        return x_BTD + self.moe(self.moe_norm(x_BTD))


class FIRAForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = FIRAConfig
    _supports_sdpa = True
    _no_split_modules = ["Block"]

    def __init__(self, config: FIRAConfig) -> None:
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: Cache | None = None,
                labels: Tensor | None = None, use_cache: bool | None = True,
                logits_to_keep: int = 0, **_: Any) -> CausalLMOutputWithPast:
        """Logits [B, T, V]; only of the last `logits_to_keep` positions if that is not 0."""
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        B, T = input_ids.shape
        if start + T > self.config.max_position_embeddings:
            raise ValueError(f"sequence of {start + T} tokens is longer than the model's "
                             f"{self.config.max_position_embeddings} positions; shorten it")
        if attention_mask is None:
            attention_mask = input_ids.new_ones(B, start + T)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, start:]
        x_BTD = self.token_embedding(input_ids) + self.position_embedding(position_ids)
        mask_B1TS = _mask(attention_mask, T)
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_B1TS, past_key_values)
        logits_BTV = self.head(self.norm(x_BTD[:, -logits_to_keep:]))
        loss = None if labels is None else self.loss_function(
            logits_BTV, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=past_key_values)


def _mask(attention_mask: Tensor, T: int) -> Tensor:
    """True where one of the last T positions attends to one of all S, [B, 1, T, S].

    Padding attends to itself, so that no row of the softmax is empty.
    """
    S = attention_mask.shape[1]
    causal_TS = torch.ones(T, S, dtype=torch.bool, device=attention_mask.device).tril(S - T)
    own_TS = torch.ones_like(causal_TS).triu(S - T) & causal_TS
    return (causal_TS & attention_mask.bool()[:, None, None, :]) | own_TS
