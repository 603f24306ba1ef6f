"""Attention, rotary positions and the cache against their written-out definitions."""
from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from fira.model.fira2 import Rotary, rotate
from fira.model.transformer import KeyValueCache, LayerCache, attention, attention_plain
from tests.models import assert_equal_with_gradients


def random_qkv(H: int, G: int, T: int = 7, C: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(H + G)
    return [torch.randn(2, heads, T, C, dtype=torch.float64, requires_grad=True)
            for heads in (H, G, G)]


@pytest.mark.parametrize("H, G", [(4, 4), (4, 2), (6, 1)])
def test_fused_attention_equals_plain_in_values_and_gradients(H, G):
    qkv = random_qkv(H, G)
    assert_equal_with_gradients(attention(*qkv), attention_plain(*qkv), qkv)


@pytest.mark.parametrize("attend", [attention, attention_plain])
@pytest.mark.parametrize("pieces", [[1] * 7, [3, 1, 3], [4, 3]])
def test_attention_in_pieces_through_a_cache_equals_one_pass(attend, pieces):
    q, k, v = (x.detach() for x in random_qkv(4, 2))
    cache = LayerCache(torch.full_like(k, torch.nan), torch.full_like(v, torch.nan))
    parts = [attend(*x, cache) for x in zip(*(y.split(pieces, dim=2) for y in (q, k, v)),
                                                strict=True)]
    torch.testing.assert_close(torch.cat(parts, dim=2), attention_plain(q, k, v))


def test_rotary_equals_transformers():
    torch.manual_seed(0)
    rotary = Rotary(context=32, head_dim=16, theta=10000.0)
    rotary.reset_buffers()
    x = torch.randn(2, 9, 3, 16)
    cos, sin = rotary(torch.arange(5, 14))
    theirs, _ = apply_rotary_pos_emb(x, x, cos.repeat(1, 2)[None], sin.repeat(1, 2)[None],
                                     unsqueeze_dim=2)
    torch.testing.assert_close(rotate(x, cos, sin), theirs)


def test_cache_layers_are_separate_and_reset_together():
    cache = KeyValueCache(2, 1, 1, 5, 4, like=torch.zeros(()))
    ones = torch.ones(1, 1, 3, 4)
    for factor, layer in enumerate(cache.layers):
        layer.extend(factor * ones, factor * ones)
    assert cache.length == 3
    assert [float(layer.keys_BGSC.sum()) for layer in cache.layers] == [0, 12]
    cache.reset()
    assert cache.length == 0
