"""RMS normalisation of heads and their rotation: kernels and launch heuristics. See `ops/norm_rope.py`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.norm_rope import backward_with, forward_with
from ..ops.rms_norm import out_dtype
from ..ops.rope import empty, work_dtype
from . import rms_norm, rope
from .launch import launch
from .layout import alike, least, multiprocessors, unit
from .rms_norm import FACTOR, RESULT, _scale, total
from .rope import aligned

TILE = 2048
"""Elements of a half that a program has in hand: 32 heads of 128, in one go."""
STAGES = 3
"""Tokens that the backward has in hand or on their way: with a multiprocessor's programs, 80 KB or more."""


@triton.jit
def _load(x_ptr, heads, n_heads, stride, cols, n_cols):
    """[heads, cols]."""
    mask = (heads < n_heads)[:, None] & (cols < n_cols)[None, :]
    return tl.load(x_ptr + heads[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _store(y_ptr, heads, n_heads, stride, cols, n_cols, y):
    mask = (heads < n_heads)[:, None] & (cols < n_cols)[None, :]
    tl.store(y_ptr + heads[:, None] * stride + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _part(w_ptr, start, cols, n_cols, offset, ROUNDING: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """offset + weight of the components from `start` on, as `_scale` has it."""
    if HAS_WEIGHT:
        w_ptr += start
    return _scale(w_ptr, cols, n_cols, offset, ROUNDING, HAS_WEIGHT)


@triton.jit
def _normed(x, factor, scale, X: tl.constexpr, NORM: tl.constexpr, ROUNDING: tl.constexpr):
    """The norm's result, rounded as the model does, in float32."""
    y = x * factor
    if ROUNDING != RESULT:
        y = y.to(X).to(tl.float32)
    return (y * scale).to(NORM).to(tl.float32)


@triton.jit
def _forward_heads(
    x_ptr,
    w_ptr,
    y_ptr,
    x_head,
    y_head,
    heads,
    n_heads,
    half,
    width,
    eps,
    offset,
    c1,
    c2,
    s1,
    s2,
    NORM: tl.constexpr,
    WORK: tl.constexpr,
    ROUNDING: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """One token's heads: normalised, the first 2 half components rotated, all written."""
    X: tl.constexpr = x_ptr.dtype.element_ty
    i = tl.arange(0, BLOCK_HALF)
    x1 = _load(x_ptr, heads, n_heads, x_head, i, half).to(tl.float32)
    x2 = _load(x_ptr + half, heads, n_heads, x_head, i, half).to(tl.float32)
    square = tl.sum(x1 * x1 + x2 * x2, axis=1)
    if BLOCK_REST > 0:
        j = tl.arange(0, BLOCK_REST)
        x3 = _load(x_ptr + 2 * half, heads, n_heads, x_head, j, width - 2 * half).to(tl.float32)
        square += tl.sum(x3 * x3, axis=1)
    factor = tl.rsqrt(square / width + tl.cast(eps, tl.float32))[:, None]
    if ROUNDING == FACTOR:
        factor = factor.to(X).to(tl.float32)
    h1 = _normed(x1, factor, _part(w_ptr, 0, i, half, offset, ROUNDING, HAS_WEIGHT), X, NORM, ROUNDING)
    h2 = _normed(x2, factor, _part(w_ptr, half, i, half, offset, ROUNDING, HAS_WEIGHT), X, NORM, ROUNDING)
    y1 = h1 * c1 - h2 * s1
    y2 = h2 * c2 + h1 * s2
    _store(y_ptr, heads, n_heads, y_head, i, half, y1.to(WORK))
    _store(y_ptr + half, heads, n_heads, y_head, i, half, y2.to(WORK))
    if BLOCK_REST > 0:
        rest = width - 2 * half
        scale = _part(w_ptr, 2 * half, j, rest, offset, ROUNDING, HAS_WEIGHT)
        _store(y_ptr + 2 * half, heads, n_heads, y_head, j, rest, _normed(x3, factor, scale, X, NORM, ROUNDING))


@triton.jit
def _angles(cos_ptr, sin_ptr, half, BLOCK_HALF: tl.constexpr):
    """Both halves of a token's cos and sin, each [1, BLOCK_HALF] in float32."""
    i = tl.arange(0, BLOCK_HALF)
    c1 = tl.load(cos_ptr + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos_ptr + half + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin_ptr + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin_ptr + half + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
    return c1, c2, s1, s2


@triton.jit
def _norm_rope(
    q_ptr,
    k_ptr,
    wq_ptr,
    wk_ptr,
    yq_ptr,
    yk_ptr,
    cos_ptr,
    sin_ptr,
    n_t,
    half,
    width,
    q_heads,
    k_heads,
    q_b,
    q_t,
    q_h,
    yq_b,
    yq_t,
    yq_h,
    k_b,
    k_t,
    k_h,
    yk_b,
    yk_t,
    yk_h,
    cos_b,
    cos_t,
    sin_b,
    sin_t,
    eps,
    offset,
    NORM: tl.constexpr,
    WORK: tl.constexpr,
    ROUNDING: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    UNIT: tl.constexpr,
):
    """q, and k if there is one, for one token and a block of heads.

    Per element of q and k: one read, one write. A program takes one token, so that its cos and sin are read once for
    all heads; a head's halves are loaded apart, so that rotating moves nothing between threads.
    """
    half, width = aligned(half, UNIT), aligned(width, UNIT)
    q_h, k_h, yq_h, yk_h = aligned(q_h, UNIT), aligned(k_h, UNIT), aligned(yq_h, UNIT), aligned(yk_h, UNIT)
    token = tl.program_id(0).to(tl.int64)
    b, t = token // n_t, token % n_t
    c1, c2, s1, s2 = _angles(cos_ptr + b * cos_b + t * cos_t, sin_ptr + b * sin_b + t * sin_t, half, BLOCK_HALF)
    heads = tl.program_id(1).to(tl.int64) * Q_BLOCK + tl.arange(0, Q_BLOCK)
    x, y = q_ptr + b * q_b + t * q_t, yq_ptr + b * yq_b + t * yq_t
    _forward_heads(
        *(x, wq_ptr, y, q_h, yq_h, heads, q_heads, half, width, eps, offset, c1, c2, s1, s2),
        *(NORM, WORK, ROUNDING, HAS_WEIGHT, BLOCK_HALF, BLOCK_REST),
    )
    if k_ptr is not None:
        heads = tl.program_id(1).to(tl.int64) * K_BLOCK + tl.arange(0, K_BLOCK)
        x, y = k_ptr + b * k_b + t * k_t, yk_ptr + b * yk_b + t * yk_t
        _forward_heads(
            *(x, wk_ptr, y, k_h, yk_h, heads, k_heads, half, width, eps, offset, c1, c2, s1, s2),
            *(NORM, WORK, ROUNDING, HAS_WEIGHT, BLOCK_HALF, BLOCK_REST),
        )


@triton.jit
def _backward_heads(
    d_ptr,
    x_ptr,
    o_ptr,
    d_head,
    x_head,
    o_head,
    heads,
    n_heads,
    half,
    width,
    eps,
    offset,
    w_ptr,
    c1,
    c2,
    s1,
    s2,
    dw1,
    dw2,
    dw3,
    ROUNDING: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Writes one token's dx; returns what it adds to the sums of the weight's gradient, each [heads, components]."""
    X: tl.constexpr = x_ptr.dtype.element_ty
    i = tl.arange(0, BLOCK_HALF)
    rest = width - 2 * half
    x1 = _load(x_ptr, heads, n_heads, x_head, i, half).to(tl.float32)
    x2 = _load(x_ptr + half, heads, n_heads, x_head, i, half).to(tl.float32)
    dy1 = _load(d_ptr, heads, n_heads, d_head, i, half).to(tl.float32)
    dy2 = _load(d_ptr + half, heads, n_heads, d_head, i, half).to(tl.float32)
    d1, d2 = dy1 * c1 + dy2 * s2, dy2 * c2 - dy1 * s1
    n1 = d1 * _part(w_ptr, 0, i, half, offset, ROUNDING, HAS_WEIGHT)
    n2 = d2 * _part(w_ptr, half, i, half, offset, ROUNDING, HAS_WEIGHT)
    square, along = tl.sum(x1 * x1 + x2 * x2, axis=1), tl.sum(n1 * x1 + n2 * x2, axis=1)
    if BLOCK_REST > 0:
        j = tl.arange(0, BLOCK_REST)
        x3 = _load(x_ptr + 2 * half, heads, n_heads, x_head, j, rest).to(tl.float32)
        d3 = _load(d_ptr + 2 * half, heads, n_heads, d_head, j, rest).to(tl.float32)
        n3 = d3 * _part(w_ptr, 2 * half, j, rest, offset, ROUNDING, HAS_WEIGHT)
        square += tl.sum(x3 * x3, axis=1)
        along += tl.sum(n3 * x3, axis=1)
    factor = tl.rsqrt(square / width + tl.cast(eps, tl.float32))[:, None]
    mean = factor * along[:, None] / width
    x1 *= factor
    x2 *= factor
    _store(o_ptr, heads, n_heads, o_head, i, half, factor * (n1 - x1 * mean))
    _store(o_ptr + half, heads, n_heads, o_head, i, half, factor * (n2 - x2 * mean))
    if ROUNDING != RESULT:
        x1, x2 = x1.to(X).to(tl.float32), x2.to(X).to(tl.float32)
    dw1 += d1 * x1
    dw2 += d2 * x2
    if BLOCK_REST > 0:
        x3 *= factor
        _store(o_ptr + 2 * half, heads, n_heads, o_head, j, rest, factor * (n3 - x3 * mean))
        if ROUNDING != RESULT:
            x3 = x3.to(X).to(tl.float32)
        dw3 += d3 * x3
    return dw1, dw2, dw3


@triton.jit
def _store_sums(dw_ptr, row, half, width, dw1, dw2, dw3, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr):
    i = tl.arange(0, BLOCK_HALF)
    at = dw_ptr + row * width
    tl.store(at + i, tl.sum(dw1, axis=0), mask=i < half)
    tl.store(at + half + i, tl.sum(dw2, axis=0), mask=i < half)
    if BLOCK_REST > 0:
        j = tl.arange(0, BLOCK_REST)
        tl.store(at + 2 * half + j, tl.sum(dw3, axis=0), mask=j < width - 2 * half)


@triton.jit
def _norm_rope_backward(
    dq_ptr,
    dk_ptr,
    q_ptr,
    k_ptr,
    wq_ptr,
    wk_ptr,
    oq_ptr,
    ok_ptr,
    dwq_ptr,
    dwk_ptr,
    cos_ptr,
    sin_ptr,
    n_tokens,
    n_t,
    half,
    width,
    q_heads,
    k_heads,
    dq_b,
    dq_t,
    dq_h,
    q_b,
    q_t,
    q_h,
    oq_b,
    oq_t,
    oq_h,
    dk_b,
    dk_t,
    dk_h,
    k_b,
    k_t,
    k_h,
    ok_b,
    ok_t,
    ok_h,
    cos_b,
    cos_t,
    sin_b,
    sin_t,
    eps,
    offset,
    ROUNDING: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    REST: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx of q, and of k if there is one, and this program's share of their dweights [programs, width] in float32.

    Per element of q and k: dy and x read once, dx written once. Programs stay resident and walk over tokens, with some
    loaded ahead (STAGES), so that dweights are summed in registers, in a fixed order, over heads at the end. Weights
    are read again for each token, from the cache: kept in registers, they would leave room for fewer programs.
    """
    half, width = aligned(half, UNIT), aligned(width, UNIT)
    q_h, dq_h, oq_h = aligned(q_h, UNIT), aligned(dq_h, UNIT), aligned(oq_h, UNIT)
    k_h, dk_h, ok_h = aligned(k_h, UNIT), aligned(dk_h, UNIT), aligned(ok_h, UNIT)
    dwq1 = tl.zeros((Q_BLOCK, BLOCK_HALF), tl.float32)
    dwq2 = tl.zeros((Q_BLOCK, BLOCK_HALF), tl.float32)
    dwq3 = tl.zeros((Q_BLOCK, REST), tl.float32)
    dwk1 = tl.zeros((K_BLOCK, BLOCK_HALF), tl.float32)
    dwk2 = tl.zeros((K_BLOCK, BLOCK_HALF), tl.float32)
    dwk3 = tl.zeros((K_BLOCK, REST), tl.float32)
    block = tl.program_id(1).to(tl.int64)
    for at in tl.range(tl.program_id(0), n_tokens, tl.num_programs(0), num_stages=STAGES):
        token = tl.cast(at, tl.int64)
        b, t = token // n_t, token % n_t
        c1, c2, s1, s2 = _angles(cos_ptr + b * cos_b + t * cos_t, sin_ptr + b * sin_b + t * sin_t, half, BLOCK_HALF)
        d, x, o = dq_ptr + b * dq_b + t * dq_t, q_ptr + b * q_b + t * q_t, oq_ptr + b * oq_b + t * oq_t
        dwq1, dwq2, dwq3 = _backward_heads(
            *(d, x, o, dq_h, q_h, oq_h, block * Q_BLOCK + tl.arange(0, Q_BLOCK), q_heads, half, width, eps),
            *(offset, wq_ptr, c1, c2, s1, s2, dwq1, dwq2, dwq3, ROUNDING, HAS_WEIGHT, BLOCK_HALF, BLOCK_REST),
        )
        if k_ptr is not None:
            d, x, o = dk_ptr + b * dk_b + t * dk_t, k_ptr + b * k_b + t * k_t, ok_ptr + b * ok_b + t * ok_t
            dwk1, dwk2, dwk3 = _backward_heads(
                *(d, x, o, dk_h, k_h, ok_h, block * K_BLOCK + tl.arange(0, K_BLOCK), k_heads, half, width, eps),
                *(offset, wk_ptr, c1, c2, s1, s2, dwk1, dwk2, dwk3, ROUNDING, HAS_WEIGHT, BLOCK_HALF, BLOCK_REST),
            )
    if NEED_DWEIGHT:
        row = block * tl.num_programs(0) + tl.program_id(0)
        _store_sums(dwq_ptr, row, half, width, dwq1, dwq2, dwq3, BLOCK_HALF, BLOCK_REST)
        if k_ptr is not None:
            _store_sums(dwk_ptr, row, half, width, dwk1, dwk2, dwk3, BLOCK_HALF, BLOCK_REST)


_Strides = tuple[int, int, int]
NONE: _Strides = (0, 0, 0)


def _plan(groups: list[list[Tensor]], cos: Tensor, sin: Tensor) -> tuple[list[int], list[int], list[Any]] | None:
    """((batch, tokens), the heads of each group, the strides of all tensors, of cos and of sin); None if the groups
    share no tokens, or are not addressed by these three."""
    plans = []
    for tensors in groups:
        c, s = (a.expand(*tensors[0].shape[:-1], a.shape[-1]) for a in (cos, sin))
        plans.append(rope._tokens([*tensors, c, s], rope._head_dim(tensors[0], c)))
    if None in plans or not alike(*((*sizes[:2], *strides[-2][:2], *strides[-1][:2]) for sizes, strides in plans)):
        return None
    (b, t, _), angles = plans[0][0], plans[0][1][-2:]
    return [b, t], [sizes[2] for sizes, _ in plans], [s for _, strides in plans for s in strides[:-2]] + list(angles)


def _blocks(heads: list[int], half: int) -> tuple[int, list[int], int]:
    """(BLOCK_HALF, the block of heads of q and of k, blocks)."""
    block_half = triton.next_power_of_2(max(half, 1))
    most = max(TILE // block_half, 1)
    blocks = [min(triton.next_power_of_2(n), most) for n in heads]
    return block_half, [*blocks, 1][:2], max(triton.cdiv(n, b) for n, b in zip(heads, blocks, strict=True))


def _backward_warps(tile: int, block_half: int) -> tuple[int, int]:
    """(warps of a program, programs that a multiprocessor holds) of the backward.

    A thread's elements of both halves of x, dy and the weight's gradient fill its registers: 250 for 16 of each, of
    which a multiprocessor has enough for 8 warps; for 8 of each, 12 warps measured faster than 8 and 16. So did few
    warps for halves of 128 (16+8 heads of 128, 32+8, 8+4 of 256 on an H100).
    """
    warps = min(max(tile // (256 if block_half <= 64 else 512), 1), 4)
    return warps, (8 if tile >= 512 * warps else 12) // warps


def _dtype(dtype: torch.dtype) -> Any:
    return rope._TRITON_DTYPES[dtype]


def forward(
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
    promote: bool,
    contiguous: bool,
) -> tuple[Tensor, Tensor]:
    given = [(q, q_weight)] if k is None else [(q, q_weight), (k, k_weight)]
    normed = [torch.empty_like(x, dtype=out_dtype(x, w, rounding), device="meta") for x, w in given]
    like = [empty(h, cos, upcast, promote, contiguous) for h in normed]
    ys = [q.new_empty_strided(y.shape, y.stride(), dtype=y.dtype) for y in like]
    plan = None if q.numel() == 0 else _plan([[x, y] for (x, _), y in zip(given, ys, strict=True)], cos, sin)
    if plan is None:  # nothing, or layouts that share no tokens
        how = (eps, offset, rounding, upcast, promote, contiguous)
        return forward_with(rms_norm.forward, rope.forward, q, k, q_weight, k_weight, cos, sin, *how)
    (b, t), heads, strides = plan
    half, width = cos.shape[-1] // 2, q.shape[-1]
    block_half, (q_block, k_block), blocks = _blocks(heads, half)
    *strides, c_s, s_s = strides
    q_weight, k_weight = (w if w is None else w.contiguous() for w in (q_weight, k_weight))
    launch(
        _norm_rope,
        (b * t, blocks),
        q,
        k,
        q_weight,
        k_weight,
        ys[0],
        ys[-1],
        cos,
        sin,
        t,
        half,
        width,
        heads[0],
        heads[-1],
        *[n for s in [*strides, NONE, NONE][:4] for n in s],
        *c_s[:2],
        *s_s[:2],
        eps,
        offset,
        NORM=_dtype(normed[0].dtype),
        WORK=_dtype(work_dtype(normed[0].dtype, cos, upcast)),
        ROUNDING=rms_norm._ROUNDINGS[rounding],
        HAS_WEIGHT=q_weight is not None,
        Q_BLOCK=q_block,
        K_BLOCK=k_block,
        BLOCK_HALF=block_half,
        BLOCK_REST=0 if width == 2 * half else triton.next_power_of_2(width - 2 * half),
        UNIT=unit(half, width, *(s[2] for s in strides)),
        num_warps=min(max(q_block * block_half // 512, 1), 8),
    )
    return (*[*ys, q.new_empty(0)][:2],)


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = [(dq, q, q_weight)] if k is None or dk is None else [(dq, q, q_weight), (dk, k, k_weight)]
    dxs = [torch.empty_like(x) for _, x, _ in given]
    plan = None if q.numel() == 0 else _plan([[d, x, dx] for (d, x, _), dx in zip(given, dxs, strict=True)], cos, sin)
    if plan is None:  # nothing, or layouts that share no tokens
        how = (eps, offset, rounding, upcast, need_dweight)
        return backward_with(rms_norm.backward, rope.backward, dq, dk, q, k, q_weight, k_weight, cos, sin, *how)
    (b, t), heads, strides = plan
    half, width = cos.shape[-1] // 2, q.shape[-1]
    block_half, (q_block, k_block), blocks = _blocks(heads, half)
    *strides, c_s, s_s = strides
    warps, resident = _backward_warps(q_block * block_half, block_half)
    programs = least(b * t, multiprocessors(q.device) * resident)
    partial = [q.new_empty((programs * blocks, width) if need_dweight else (0,), dtype=torch.float32) for _ in given]
    weights = [w if w is None else w.contiguous() for w in (q_weight, k_weight)]
    rest = 0 if width == 2 * half else triton.next_power_of_2(width - 2 * half)
    launch(
        _norm_rope_backward,
        (programs, blocks),
        dq,
        dk,
        q,
        k,
        *weights,
        dxs[0],
        dxs[-1],
        partial[0],
        partial[-1],
        cos,
        sin,
        b * t,
        t,
        half,
        width,
        heads[0],
        heads[-1],
        *[n for s in [*strides, NONE, NONE, NONE][:6] for n in s],
        *c_s[:2],
        *s_s[:2],
        eps,
        offset,
        ROUNDING=rms_norm._ROUNDINGS[rounding],
        HAS_WEIGHT=q_weight is not None,
        NEED_DWEIGHT=need_dweight,
        Q_BLOCK=q_block,
        K_BLOCK=k_block,
        BLOCK_HALF=block_half,
        BLOCK_REST=rest,
        REST=max(rest, 1),
        UNIT=unit(half, width, *(s[2] for s in strides)),
        STAGES=STAGES,
        num_warps=warps,
    )
    none = q.new_empty(0)
    dweights = total(partial, weights) if need_dweight else partial
    return *[*dxs, none][:2], *[*dweights, none][:2]
