"""Attention where only some keys are seen, by PyTorch's FlexAttention.

`masked_attention(query, key, value, attn_mask=None, seen="", tensors=None, scale=None) -> out`::

    out[b, h, q] = sum_k p_k value[b, h // groups, k],  p = softmax over the k that are seen of
                   scale * query[b, h, q] . key[b, h // groups, k]

- query [B, H, Q, D], key [B, G, K, D], value [B, G, K, E], H a multiple of G, groups = H / G; out [B, H, Q, E] in
  query's dtype. A query that sees no key gives zeros, and gradients of zero.
- attn_mask: bool, as `scaled_dot_product_attention` takes it: [B, H, Q, K], or a shape that broadcasts to it. Or None,
  and what it would say as `seen`, an expression of b, h, q, k and x0, x1, ..., the `tensors`; see `mask_code.py`.
- scale: 1 / sqrt(D) if None.
- On CUDA, compiled by Inductor, this is one fused kernel that skips blocks of 128 x 128 scores of which none is seen;
  uncompiled it holds all scores. On other devices it is `scaled_dot_product_attention` with the mask.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from .. import _torch
from ..mask_code import function
from ._library import define_composite

BLOCK = 128


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of blocks: how many are set, and all columns, those of set blocks first.

    By counting: a sort of so few bits would be a kernel that takes minutes to compile.
    """
    upto = torch.cumsum(blocks, -1, dtype=torch.int64)
    counts = upto[..., -1:]
    columns = torch.arange(blocks.shape[-1], device=blocks.device)
    place = torch.where(blocks, upto - 1, counts + columns - upto)
    columns = columns.to(torch.int32).expand(blocks.shape)
    ordered = columns.new_empty(blocks.shape).scatter(-1, place, columns)
    return counts.squeeze(-1).to(torch.int32), ordered


def _mask(seen: str, tensors: Sequence[Tensor], query: Tensor, key: Tensor) -> Tensor:
    """The mask itself, bool [B, H, Q, K]; B and H are 1 where it does not ask for them."""
    extents = _extents(seen, query, key)
    return function(seen, len(tensors))(*_positions(extents, query.device), *tensors).expand(extents)


def _extents(seen: str, query: Tensor, key: Tensor) -> list[int]:
    b, h = (n if _reads(seen, name) else 1 for name, n in zip("bh", query.shape[:2], strict=True))
    return [b, h, query.shape[2], key.shape[2]]


def _positions(extents: Sequence[int], device: torch.device) -> list[Tensor]:
    """One for each dimension, which broadcast to all of them."""
    return [
        torch.arange(n, device=device).view([-1 if j == i else 1 for j in range(len(extents))])
        for i, n in enumerate(extents)
    ]


def _reads(seen: str, position: str) -> bool:
    return re.search(rf"\b{position}\b", seen) is not None


def _block_mask(seen: str, tensors: Sequence[Tensor], query: Tensor, key: Tensor) -> BlockMask:
    """Which blocks of scores are seen in part, and which whole."""
    b, h, q, k = _extents(seen, query, key)
    rows, columns = -(-q // BLOCK), -(-k // BLOCK)
    of_b, of_h, of_q, of_k = _positions((b, h, rows * BLOCK, columns * BLOCK), query.device)
    mask = function(seen, len(tensors))(of_b, of_h, of_q.clamp(max=q - 1), of_k.clamp(max=k - 1), *tensors)
    mask = mask & (of_q < q) & (of_k < k)
    counts = mask.view(*mask.shape[:2], rows, BLOCK, columns, BLOCK).sum((3, 5), dtype=torch.int32)
    whole = counts == BLOCK * BLOCK
    part = (counts > 0) & ~whole
    named = {}
    for prefix, blocks in (("", part), ("full_", whole)):
        named[f"{prefix}kv_num_blocks"], named[f"{prefix}kv_indices"] = _ordered(blocks)
        named[f"{prefix}q_num_blocks"], named[f"{prefix}q_indices"] = _ordered(blocks.transpose(-1, -2))
    mask_mod = function(seen, len(tensors))
    return BlockMask(seq_lengths=(q, k), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod, **named)


def _composite(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    seen: str = "",
    tensors: Sequence[Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    if (attn_mask is None) == (not seen):
        raise ValueError("masked_attention: give attn_mask, or what it says as `seen`, and not both")
    if attn_mask is not None:
        if attn_mask.dtype is not torch.bool or not 2 <= attn_mask.ndim <= 4:
            raise ValueError(
                f"masked_attention: attn_mask is {attn_mask.dtype}{tuple(attn_mask.shape)}, needs bool[B, H, Q, K]"
            )
        seen, tensors = _lookup(attn_mask), [attn_mask]
    tensors = tuple(tensors or ())
    if not _has_kernel(query):
        mask = _mask(seen, tensors, query, key)
        return scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    return _flex(query, key, value, seen, tensors, scale)


def _has_kernel(query: Tensor) -> bool:
    return query.is_cuda


def _flex(
    query: Tensor, key: Tensor, value: Tensor, seen: str, tensors: tuple[Tensor, ...], scale: float | None
) -> Tensor:
    blocks = _block_mask(seen, tensors, query, key)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    return _torch.flex_attention(query, key, value, blocks, tensors, scale)


def _lookup(mask: Tensor) -> str:
    """The expression that reads a mask's own elements."""
    names = "bhqk"[4 - mask.ndim :]
    return f"x0[{', '.join('0' if n == 1 else name for name, n in zip(names, mask.shape, strict=True))}]"


masked_attention = define_composite(
    "masked_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, str seen='',"
    " Tensor[]? tensors=None, float? scale=None) -> Tensor",
    _composite,
    as_given=False,
)
