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
    model_type = "fira"

    def __init__(self, vocab_size: int = 50304, hidden_size: int = 768, num_hidden_layers: int = 12,
                 num_attention_heads: int = 12, intermediate_size: int = 3072, num_experts: int = 4,
                 num_experts_per_tok: int = 1, max_position_embeddings: int = 3072,
                 layer_norm_eps: float = 1e-5, tie_word_embeddings: bool = False,
                 use_cache: bool = True, **rest: Any) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.intermediate_size, self.num_experts = intermediate_size, num_experts
        self.num_experts_per_tok, self.layer_norm_eps = num_experts_per_tok, layer_norm_eps
        self.max_position_embeddings, self.use_cache = max_position_embeddings, use_cache
        rest["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**rest)


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
    """The linears of all experts, stacked."""

    def __init__(self, num_experts: int, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width_out, width_in))
        self.bias = nn.Parameter(torch.empty(num_experts, width_out))

    def forward(self, rows_Ri: Tensor, expert: int) -> Tensor:
        return F.linear(rows_Ri, self.weight[expert], self.bias[expert])


class Experts(nn.Module):
    """Per expert: linear, GELU in its tanh form, linear."""

    def __init__(self, config: FIRAConfig) -> None:
        super().__init__()
        size, hidden = config.hidden_size, config.intermediate_size
        self.up = ExpertLinear(config.num_experts, size, hidden)
        self.down = ExpertLinear(config.num_experts, hidden, size)

    def forward(self, rows_RD: Tensor, expert: int) -> Tensor:
        return self.down(F.gelu(self.up(rows_RD, expert), approximate="tanh"), expert)


class MoE(nn.Module):
    """Sum, over the experts that the router chooses for a token, of weight * expert(token).

    With one expert there is no router.
    """

    def __init__(self, config: FIRAConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.experts = Experts(config)
        if config.num_experts > 1:
            self.router = nn.Linear(config.hidden_size, config.num_experts)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        if not hasattr(self, "router"):
            return self.experts(x_ND, 0).view_as(x_BTD)
        logits_NE = F.linear(x_ND.float(), self.router.weight.float(), self.router.bias.float())
        weights_NK, experts_NK = logits_NE.softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.top_k > 1:  # one expert alone is multiplied by its raw probability
            weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
        y_ND = torch.zeros_like(x_ND)
        for expert in range(self.router.out_features):
            rows_R, choice_R = (experts_NK == expert).nonzero(as_tuple=True)
            if len(rows_R):
                out_RD = self.experts(x_ND[rows_R], expert)
                weights_R1 = weights_NK[rows_R, choice_R, None].to(out_RD.dtype)
                y_ND.index_add_(0, rows_R, out_RD * weights_R1)
        return y_ND.view_as(x_BTD)


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
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["Block"]

    def __init__(self, config: FIRAConfig) -> None:
        super().__init__(config)
        self.token_embedding: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer)
                                    for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing, because the weights come from the file."""

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.token_embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.head = new_embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: Cache | None = None,
                labels: Tensor | None = None, use_cache: bool | None = None,
                logits_to_keep: int = 0, **_: Any) -> CausalLMOutputWithPast:
        """Logits [B, T, V]; only of the last `logits_to_keep` positions if that is not 0."""
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
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
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(),
                                   labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV,
                                      past_key_values=past_key_values)


def _mask(attention_mask: Tensor, T: int) -> Tensor:
    """True where one of the last T positions attends to one of all S, [B, 1, T, S].

    Padding attends to itself, so that no row of the softmax is empty.
    """
    S = attention_mask.shape[1]
    causal_TS = torch.ones(T, S, dtype=torch.bool, device=attention_mask.device).tril(S - T)
    own_TS = torch.ones_like(causal_TS).triu(S - T) & causal_TS
    return (causal_TS & attention_mask.bool()[:, None, None, :]) | own_TS
