"""RMS normalisation of heads, and their rotary position embedding, for graphs whose gradients are there already
(`fuse.py`); `ops/rms_norm.py` and `ops/rope.py` have the formulas, the shapes and where values are rounded.

`norm_rope(q, k, q_weight, k_weight, cos, sin, eps, offset, rounding, upcast, promote, contiguous) -> (y_q, y_k)`: the
rotations of the norms of q and, if there is one, of k; else the second result is empty.
`norm_rope_backward(dq, dk, q, k, q_weight, k_weight, cos, sin, eps, offset, rounding, upcast, need_dweight)
-> (dx_q, dx_k, dq_weight, dk_weight)`: its gradients; those that nobody needs are empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import rms_norm, rope
from ._library import Launcher, define


def _check(q_weight: Tensor | None, k: Tensor | None, k_weight: Tensor | None) -> None:
    kinds = [None if w is None else w.dtype for w in (q_weight, k_weight)]
    if k is not None and kinds[0] != kinds[1]:
        raise ValueError(f"norm_rope: the weights are {kinds[0]} and {kinds[1]}; they must be alike")


_Pair = tuple[Tensor, Tensor]
_Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def forward_with(
    norm: Any,
    rotate: Any,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    rounding: str,
    *how: bool,
) -> _Pair:
    """With a function for each of the two steps."""
    _check(q_weight, k, k_weight)
    y = rotate(norm(q, q_weight, eps, offset, rounding), cos, sin, *how)
    return y, q.new_empty(0) if k is None else rotate(norm(k, k_weight, eps, offset, rounding), cos, sin, *how)


def backward_with(
    norm_backward: Any,
    rotate_backward: Any,
    dq: Tensor,
    dk: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    rounding: str,
    upcast: bool,
    need_dweight: bool,
) -> _Gradients:
    """With a function for each of the two steps."""
    _check(q_weight, k, k_weight)

    def gradients(dy: Tensor, x: Tensor, weight: Tensor | None) -> _Pair:
        dtype = rms_norm.out_dtype(x, weight, rounding)
        dnormed = rotate_backward(dy, cos, sin, list(torch.empty_like(x, device="meta").stride()), dtype, upcast)
        return norm_backward(dnormed, x, weight, eps, offset, rounding, need_dweight)

    dx_q, dq_weight = gradients(dq, q, q_weight)
    if k is None or dk is None:
        return dx_q, q.new_empty(0), dq_weight, q.new_empty(0)
    dx_k, dk_weight = gradients(dk, k, k_weight)
    return dx_q, dx_k, dq_weight, dk_weight


def _fake(*args: Any) -> _Pair:
    return forward_with(rms_norm._fake, rope._fake, *args)


def _reference(*args: Any) -> _Pair:
    return forward_with(rms_norm._reference, rope._reference, *args)


def _backward_fake(*args: Any) -> _Gradients:
    return backward_with(rms_norm._backward_fake, rope._backward_fake, *args)


def _backward_reference(*args: Any) -> _Gradients:
    return backward_with(rms_norm._backward_reference, rope._backward_reference, *args)


norm_rope = define(
    "norm_rope(Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, float eps,"
    " float offset, str rounding, bool upcast, bool promote, bool contiguous) -> (Tensor, Tensor)",
    _reference,
    _fake,
    Launcher("norm_rope", "forward"),
)
norm_rope_backward = define(
    "norm_rope_backward(Tensor dq, Tensor? dk, Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor cos,"
    " Tensor sin, float eps, float offset, str rounding, bool upcast, bool need_dweight)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
    Launcher("norm_rope", "backward"),
)
