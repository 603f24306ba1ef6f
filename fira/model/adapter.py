"""Low-rank adapters (LoRA, Hu et al. 2021, 2106.09685) on linears and on stacks of experts.

    y = W x + SCALE * B (A x)          A [r, in], B [out, r]; one of each for every adapted expert

An adapter is a module `lora` inside the module that it adapts, so all weights keep their names and
its tensors are named after them: blocks.0.attention.qkv.lora.a. The names and shapes say all there
is to know of an adapter: its rank, and which experts have one.

A token passes through K experts, so each expert gets 1/K of the rank of the other linears: the
adapted part of what a token reads is then the same share everywhere.

Tokens that a base model was never trained on (those that begin and end chat turns) get rows of
their own, added to their rows of the embedding and of the head.
"""
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fira.model.fast as fast
from fira.model.moe import ExpertLinear

SCALE = 2.0  # alpha / r in the paper's terms, for every rank


class LowRank(nn.Module):
    """x -> SCALE * B (A x); with an expert axis for rows sorted by expert.

    `experts`: the experts of a stack that have an adapter, ascending; None means all.
    """

    experts: Tensor | None

    def __init__(self, shape: Sequence[int], rank: int,
                 experts: Sequence[int] | None = None) -> None:
        super().__init__()
        *stack, width_out, width_in = shape
        if rank > (widest := min(width_out, width_in)):
            raise ValueError(f"rank={rank} is above {widest}, the smaller width of a matrix of "
                             f"{width_out} x {width_in}; give a rank of {widest} or less")
        if experts and not set(experts) <= set(range(*stack)):
            raise ValueError(f"experts {list(experts)} are not all among the {stack[0]} of a stack")
        stack = stack if experts is None else [len(experts)]
        self.a = nn.Parameter(torch.empty(*stack, rank, width_in))
        self.b = nn.Parameter(torch.empty(*stack, width_out, rank))
        self.chosen = experts
        self.register_buffer("experts", None if experts is None else torch.empty(
            len(experts), dtype=torch.int64))

    def reset_buffers(self) -> None:
        if self.experts is not None:
            self.experts.copy_(torch.tensor(self.chosen))

    def initial_std(self, leaf: str) -> float:
        """A keeps the size of its input, B is zero: an untrained adapter changes nothing.

        PEFT and mlx-lm draw A uniformly, 0.58 times as large. AdamW's steps of B do not depend on
        that, so it is as if their learning rate of B were 0.58 times ours.
        """
        return self.a.shape[-1] ** -0.5 if leaf == "a" else 0.0

    def forward(self, x: Tensor, counts_E: Tensor | None = None) -> Tensor:
        if counts_E is None:
            return F.linear(SCALE * F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        a, b = (part.to(x.dtype) for part in self.of_all(len(counts_E)))
        inner_Rr = SCALE * fast.expert_linear(x, counts_E, a, None)  # the smallest tensor to scale
        return fast.expert_linear(inner_Rr, counts_E, b, None)

    def of_all(self, num_experts: int) -> tuple[Tensor, Tensor]:
        """A and B of every expert of a stack, zero for those without: so no shape depends on how
        many rows the others have, and a compiled block needs none."""
        if self.experts is None:
            return self.a, self.b
        a, b = (part.new_zeros(num_experts, *part.shape[1:]).index_copy(0, self.experts, part)
                for part in (self.a, self.b))
        return a, b

    @torch.no_grad()
    def add_to(self, weight: Tensor) -> None:
        where = slice(None) if self.experts is None else self.experts
        weight[where] += (SCALE * (self.b.double() @ self.a.double())).to(weight.dtype)


class TokenRows(nn.Module):
    """What is added to the rows `tokens` of an embedding or a head: delta [S, D]."""

    tokens: Tensor

    def __init__(self, tokens: Sequence[int], width: int) -> None:
        super().__init__()
        self.chosen = tokens
        self.delta = nn.Parameter(torch.empty(len(tokens), width))
        self.register_buffer("tokens", torch.empty(len(tokens), dtype=torch.int64))

    def reset_buffers(self) -> None:
        self.tokens.copy_(torch.tensor(self.chosen))

    def initial_std(self, leaf: str) -> float:
        return 0.0

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """What to add to the embeddings of tokens_BT."""
        return (tokens_BT.unsqueeze(-1) == self.tokens).to(self.delta.dtype) @ self.delta

    def added_to(self, weight_VD: Tensor) -> Tensor:
        """The head's weight; its `trained_rows` tell a loss which rows need a gradient."""
        whole_VD: Any = weight_VD.index_add(0, self.tokens, self.delta.to(weight_VD.dtype))
        whole_VD.trained_rows = self.tokens
        return whole_VD

    @torch.no_grad()
    def add_to(self, weight_VD: Tensor) -> None:
        weight_VD.index_add_(0, self.tokens, self.delta.to(weight_VD.dtype))


class Adapted:
    """What a module with an adapter does: its own work, and the adapter's added to it."""

    lora: nn.Module

    def forward(self, *inputs: Any) -> Tensor:
        return super().forward(*inputs) + self.lora(*inputs)  # type: ignore[misc]


@functools.cache
def _adapted(kind: Any) -> Any:
    return type(f"Adapted{kind.__name__}", (Adapted, kind), {})


def _put(module: Any, lora: nn.Module) -> None:
    """Make `module` an adapted one: its class becomes `Adapted` before the class that it had."""
    kind: Any = type(module)
    module.lora = lora
    module.__class__ = _adapted(kind)


def attach(model: Any, rank: int, experts: Sequence[Sequence[int]] | None = None,
           tokens: Sequence[int] = ()) -> None:
    """Freeze `model` and give it adapters, without values, where its weights are.

    `rank`: of every linear outside of experts. `experts`: those of each layer that get an adapter
    (None: all). `tokens`: those whose rows of embedding and head train too.
    """
    model.requires_grad_(False)
    for layer, block in enumerate(model.blocks):
        chosen = None if experts is None else tuple(experts[layer])
        for module in list(block.modules()):
            kind = _kind(module)
            if issubclass(kind, nn.Linear):
                _put(module, LowRank(module.weight.shape, rank))
            elif issubclass(kind, ExpertLinear) and chosen != ():
                _put(module, LowRank(module.weight.shape, max(1, rank // model.spec.top_k), chosen))
    if tokens:
        for name in {"token_embedding", model.after[-1]}:
            _put(getattr(model, name), TokenRows(tokens, model.spec.d_model))


def hold_frozen(model: Any, dtype: torch.dtype) -> None:
    """Hold the frozen matrices of the blocks in the dtype to which a device casts them anyway: all
    products stay the same, and no step casts a matrix."""
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear | ExpertLinear) and not module.weight.requires_grad:
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)


def _kind(module: Any) -> type:
    """The class of a module, or of the one whose weight it holds in small integers."""
    return getattr(module, "stands_for", type(module))


def adapters(model: nn.Module) -> dict[str, Any]:
    """The adapted modules of a model by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora")}


def attach_like(model: Any, tensors: dict[str, Tensor]) -> None:
    """Give `model` the adapters that `tensors` are of, without their values."""
    for name in tensors:
        owner, _, leaf = name.rpartition(".lora.")
        module = model.get_submodule(owner)
        if leaf == "a" and issubclass(_kind(module), (nn.Linear, ExpertLinear)):
            chosen = tensors.get(f"{owner}.lora.experts")
            _put(module, LowRank(module.weight.shape, tensors[name].shape[-2],
                                 None if chosen is None else tuple(chosen.tolist())))
        elif leaf == "delta" and owner in ("token_embedding", model.after[-1]):
            _put(module, TokenRows(tuple(tensors[f"{owner}.lora.tokens"].tolist()),
                                   tensors[name].shape[-1]))


@torch.no_grad()
def merge(model: Any) -> Any:
    """Add every adapter to the weights under it and take it off, in place; returns the model."""
    for module in adapters(model).values():
        module.lora.add_to(module.weight)
        del module.lora
        module.__class__ = type(module).__mro__[2]
    return model
