"""Rows of a table, and the gradient of the table: `y[...] = weight[ids[...]]`.

`embedding(ids, weight, padding_idx=-1) -> y`

- ids: [...], int64 or int32; weight: [V, H], float32, bfloat16 or float16. y: [..., H], weight's dtype.
- The row `padding_idx`, if that is not negative, gets no gradient. An id outside [0, V) is an error, as in eager.
- dweight: [V, H] in weight's dtype, each row summed in float32, always in the same order, and rounded once. Nothing
  else of this size is made. It can be differentiated again.

The lookup itself is PyTorch's, so that a compiler fuses it with what follows. For the gradient, tokens are sorted, and
the rows that occur are written once; PyTorch's under Inductor adds to a float32 table, atomically, and converts that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import Launcher, define, define_composite, shows_plain


def _fake(dy: Tensor, ids: Tensor, classes: int, padding_idx: int) -> Tensor:
    return dy.new_empty((classes, dy.shape[-1]))


def _counted(ids: Tensor, classes: int, padding_idx: int) -> Tensor:
    return (ids >= 0) & (ids < classes) & (ids != padding_idx)


def _reference(dy: Tensor, ids: Tensor, classes: int, padding_idx: int) -> Tensor:
    counted = _counted(ids, classes, padding_idx)
    rows, place = ids[counted].unique(return_inverse=True)
    wide = torch.promote_types(torch.float32, dy.dtype)
    sums = dy.new_zeros((rows.shape[0], dy.shape[-1]), dtype=wide).index_add_(0, place, dy[counted].to(wide))
    dweight = dy.new_zeros((classes, dy.shape[-1]))
    dweight[rows] = sums.to(dy.dtype)
    return dweight


def _cuda(dy: Tensor, ids: Tensor, classes: int, padding_idx: int) -> Tensor:
    ids = torch.where(_counted(ids, classes, padding_idx), ids, -1).reshape(-1)
    token, order = ids.to(torch.int32).sort(stable=True)
    dy = dy.reshape(-1, dy.shape[-1])
    dweight = dy.new_zeros((classes, dy.shape[-1]))
    Launcher("embedding", "backward")(dy if dy.stride(1) == 1 else dy.contiguous(), token, order, dweight)
    return dweight


embedding_backward = define(
    "embedding_backward(Tensor dy, Tensor ids, int classes, int padding_idx) -> Tensor", _reference, _fake, _cuda
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids, _, ctx.padding_idx = inputs
    ctx.save_for_backward(ids)


def _lookup(ctx: Any, d: Tensor) -> tuple[Any, ...]:
    (ids,) = ctx.saved_tensors
    return F.embedding(ids, d).masked_fill((ids == ctx.padding_idx).unsqueeze(-1), 0), None, None, None


torch.library.register_autograd(embedding_backward.name(), _lookup, setup_context=_setup)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
        ctx.classes, ctx.padding_idx = weight.shape[0], padding_idx
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        return None, embedding_backward(dy, ids, ctx.classes, ctx.padding_idx), None


def _embedding(ids: Tensor, weight: Tensor, padding_idx: int = -1) -> Tensor:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"embedding: weight is {weight.dtype}{list(weight.shape)}, needs [V, H] of a float dtype")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"embedding: ids are {ids.dtype}, need int64 or int32")
    if padding_idx >= weight.shape[0]:
        raise ValueError(f"embedding: padding_idx {padding_idx} is not a row of weight [{weight.shape[0]}, ...]")
    if shows_plain(weight) or not torch.is_grad_enabled():
        return F.embedding(ids, weight, None if padding_idx < 0 else padding_idx)
    return _Embedding.apply(ids, weight, padding_idx)


embedding = define_composite("embedding(Tensor ids, Tensor weight, int padding_idx=-1) -> Tensor", _embedding)
