"""Rotary position embedding: kernel and launch heuristics. See `ops/rope.py` for the maths."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.rope import empty, layouts, work_dtype
from .launch import launch
from .layout import alike, collapse, unit

TILE = 4096
"""Elements of a half a program rotates at a time: 32 heads of 128, the widest common case, in one go."""


@triton.jit
def aligned(size, UNIT: tl.constexpr):
    """A size that is a multiple of UNIT, as the compiler can see here. It loads vectors no larger than it knows sizes
    and strides to be multiples of, and is told of multiples of 16 alone: half a head of 80 would be single elements."""
    return size // UNIT * UNIT


@triton.jit
def _load_pairs(rows, mask, half, NEIGHBOURS: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """The two components of each pair, of rows that begin at `rows` [n, 1].

    Neighbours are read together and parted in registers: apart, each read would be of every second element.
    """
    if NEIGHBOURS:
        i = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both = tl.load(rows + i, mask=mask & (i < 2 * half), other=0.0)
        x1, x2 = tl.split(tl.reshape(both, (both.shape[0], BLOCK_HALF, 2)))
    else:
        i = tl.arange(0, BLOCK_HALF)[None, :]
        x1 = tl.load(rows + i, mask=mask & (i < half), other=0.0)
        x2 = tl.load(rows + half + i, mask=mask & (i < half), other=0.0)
    return x1.to(tl.float32), x2.to(tl.float32)


@triton.jit
def _store_pairs(rows, mask, half, y1, y2, NEIGHBOURS: tl.constexpr, BLOCK_HALF: tl.constexpr):
    dtype = rows.dtype.element_ty
    if NEIGHBOURS:
        i = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        tl.store(rows + i, tl.interleave(y1.to(dtype), y2.to(dtype)), mask=mask & (i < 2 * half))
    else:
        i = tl.arange(0, BLOCK_HALF)[None, :]
        tl.store(rows + i, y1.to(dtype), mask=mask & (i < half))
        tl.store(rows + half + i, y2.to(dtype), mask=mask & (i < half))


@triton.jit
def _rotate_heads(
    x_ptr,
    y_ptr,
    x_head,
    y_head,
    n_heads,
    heads,
    half,
    width,
    c1,
    c2,
    s1,
    s2,
    WORK: tl.constexpr,
    BACKWARDS: tl.constexpr,
    X_NEIGHBOURS: tl.constexpr,
    Y_NEIGHBOURS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rotates one token's heads: y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2; with -s1 and -s2 if BACKWARDS."""
    mask = (heads < n_heads)[:, None]
    x_rows, y_rows = x_ptr + heads[:, None] * x_head, y_ptr + heads[:, None] * y_head
    x1, x2 = _load_pairs(x_rows, mask, half, X_NEIGHBOURS, BLOCK_HALF)
    # Rounded once, behind the sum: where the products are too, as in eager, all gradients of a model are further off.
    if BACKWARDS:
        y1, y2 = x1 * c1 + x2 * s1, x2 * c2 - x1 * s2
    else:
        y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    _store_pairs(y_rows, mask, half, y1.to(WORK), y2.to(WORK), Y_NEIGHBOURS, BLOCK_HALF)
    if BLOCK_REST > 0:
        j = 2 * half + tl.arange(0, BLOCK_REST)[None, :]
        passed = tl.load(x_rows + j, mask=mask & (j < width), other=0.0)
        tl.store(y_rows + j, passed.to(y_ptr.dtype.element_ty), mask=mask & (j < width))


@triton.jit
def _load_angles(row, half, step, PER_PAIR: tl.constexpr, NEIGHBOURS: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """cos or sin of the two components of each pair, [1, half]."""
    i = tl.arange(0, BLOCK_HALF)[None, :]
    if PER_PAIR:
        a1 = tl.load(row + i * step, mask=i < half, other=0.0).to(tl.float32)
        a2 = a1
    else:
        a1, a2 = _load_pairs(row + tl.zeros((1, 1), tl.int32), half > 0, half, NEIGHBOURS, BLOCK_HALF)
    return a1, a2


@triton.jit
def _rope(
    q_ptr,
    k_ptr,
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
    k_b,
    k_t,
    k_h,
    yq_b,
    yq_t,
    yq_h,
    yk_b,
    yk_t,
    yk_h,
    cos_b,
    cos_t,
    cos_i,
    sin_b,
    sin_t,
    sin_i,
    WORK: tl.constexpr,
    FORWARD: tl.constexpr,
    INVERSE: tl.constexpr,
    X_NEIGHBOURS: tl.constexpr,
    Y_NEIGHBOURS: tl.constexpr,
    PER_PAIR: tl.constexpr,
    PAIR: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Rotates q, and k if PAIR, for one token and a block of heads.

    Per element of q and k: one read, one write. A program takes one token, so its cos and sin (4 D bytes in half
    precision) are read once for all heads; with 32 + 8 heads of 128 it moves 20 KB.
    """
    half, width = aligned(half, UNIT), aligned(width, UNIT)
    q_h, k_h, yq_h, yk_h = aligned(q_h, UNIT), aligned(k_h, UNIT), aligned(yq_h, UNIT), aligned(yk_h, UNIT)
    token = tl.program_id(0).to(tl.int64)
    b, t = token // n_t, token % n_t
    # cos and sin lie as the rotation's result does: what is read, where its transpose is computed.
    NEIGHBOURS: tl.constexpr = Y_NEIGHBOURS if FORWARD else X_NEIGHBOURS
    c1, c2 = _load_angles(cos_ptr + b * cos_b + t * cos_t, half, cos_i, PER_PAIR, NEIGHBOURS, BLOCK_HALF)
    s1, s2 = _load_angles(sin_ptr + b * sin_b + t * sin_t, half, sin_i, PER_PAIR, NEIGHBOURS, BLOCK_HALF)
    if not FORWARD:  # transposed: each component meets the sin of the one it came from
        s1, s2 = s2, s1
    BACKWARDS: tl.constexpr = FORWARD == INVERSE
    heads = tl.program_id(1).to(tl.int64) * Q_BLOCK + tl.arange(0, Q_BLOCK)
    x, y = q_ptr + b * q_b + t * q_t, yq_ptr + b * yq_b + t * yq_t
    _rotate_heads(
        x,
        y,
        q_h,
        yq_h,
        q_heads,
        heads,
        half,
        width,
        c1,
        c2,
        s1,
        s2,
        WORK,
        BACKWARDS,
        X_NEIGHBOURS,
        Y_NEIGHBOURS,
        BLOCK_HALF,
        BLOCK_REST,
    )
    if PAIR:
        heads = tl.program_id(1).to(tl.int64) * K_BLOCK + tl.arange(0, K_BLOCK)
        x, y = k_ptr + b * k_b + t * k_t, yk_ptr + b * yk_b + t * yk_t
        _rotate_heads(
            x,
            y,
            k_h,
            yk_h,
            k_heads,
            heads,
            half,
            width,
            c1,
            c2,
            s1,
            s2,
            WORK,
            BACKWARDS,
            X_NEIGHBOURS,
            Y_NEIGHBOURS,
            BLOCK_HALF,
            BLOCK_REST,
        )


def _head_dim(x: Tensor, cos: Tensor) -> int | None:
    """The leading dimension that shares its cos: of several, the one closest together in memory."""
    shared = [d for d in range(x.ndim - 1) if cos.stride(d) == 0 or x.shape[d] == 1]
    return min(shared, key=x.stride) if shared else None


def _tokens(tensors: list[Tensor], head: int | None) -> tuple[list[int], list[tuple[int, int, int]]] | None:
    """(batch, tokens, heads) and each tensor's strides for them; None if the leading dimensions are more than these."""
    lead = [d for d in range(tensors[0].ndim - 1) if d != head]
    sizes, strides = collapse([tensors[0].shape[d] for d in lead], *([t.stride(d) for d in lead] for t in tensors))
    if len(sizes) > 2 or any(t.stride(-1) != 1 and t.shape[-1] > 1 for t in tensors):
        return None
    missing = 2 - len(sizes)
    heads = 1 if head is None else tensors[0].shape[head]
    return (
        [1] * missing + sizes + [heads],
        [
            tuple([0] * missing + s + [0 if head is None else t.stride(head)])
            for s, t in zip(strides, tensors, strict=True)
        ],
    )


def _launch(
    q: Tensor,
    k: Tensor | None,
    yq: Tensor,
    yk: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    work: torch.dtype,
    forward: bool,
    layout: str,
    inverse: bool,
    per_pair: bool,
) -> None:
    """Writes the rotation of q into yq, and of k into yk if there is one."""
    how = (work, forward, layout, inverse, per_pair)
    rotated, width = cos.shape[-1] * (2 if per_pair else 1), q.shape[-1]
    if q.numel() == 0 and (k is None or k.numel() == 0):
        return
    if not per_pair and (cos.stride(-1) != 1 or sin.stride(-1) != 1):
        cos, sin = cos.contiguous(), sin.contiguous()
    pairs = [(q, yq)] if k is None else [(q, yq), (k, yk)]
    plans = []
    for x, y in pairs:
        c = cos.expand(*x.shape[:-1], cos.shape[-1])
        s = sin.expand(*x.shape[:-1], cos.shape[-1])
        # One component of cos and sin stands for all: they may have gaps.
        plans.append((_tokens([x, y, c[..., :1], s[..., :1]], _head_dim(x, c)), c, s))
    found = [p[0] for p in plans if p[0] is not None]
    agree = alike(*((*sizes[:2], *strides[2][:2], *strides[3][:2]) for sizes, strides in found))
    if not agree or len(found) < len(plans):  # layouts that share no tokens: one at a time, copied
        for (x, y), (plan, c, s) in zip(pairs, plans, strict=True):
            if plan is not None and len(pairs) > 1:
                _launch(x, None, y, None, cos, sin, *how)
                continue
            flat = [t.reshape(-1, t.shape[-1]).contiguous() for t in (x, c, s)]
            out = y.new_empty(flat[0].shape)
            _launch(flat[0], None, out, None, flat[1], flat[2], *how)
            y.copy_(out.view(y.shape))
        return
    before, after = layouts(layout) if forward else reversed(layouts(layout))
    (sizes, (q_s, yq_s, c_s, s_s)), _, _ = plans[0]
    (k_sizes, (k_s, yk_s, _, _)), _, _ = plans[-1]
    block_half = triton.next_power_of_2(max(rotated // 2, 1))
    most = max(TILE // block_half, 1)
    q_block = min(triton.next_power_of_2(sizes[2]), most)
    k_block = min(triton.next_power_of_2(k_sizes[2]), most)
    programs = max(triton.cdiv(sizes[2], q_block), triton.cdiv(k_sizes[2], k_block))
    rest = width - rotated
    launch(
        _rope,
        (sizes[0] * sizes[1], programs),
        q,
        q if k is None else k,
        yq,
        yq if yk is None else yk,
        cos,
        sin,
        sizes[1],
        rotated // 2,
        width,
        sizes[2],
        k_sizes[2],
        *q_s,
        *k_s,
        *yq_s,
        *yk_s,
        *c_s[:2],
        cos.stride(-1),
        *s_s[:2],
        sin.stride(-1),
        WORK=_TRITON_DTYPES[work],
        FORWARD=forward,
        INVERSE=inverse,
        X_NEIGHBOURS=before,
        Y_NEIGHBOURS=after,
        PER_PAIR=per_pair,
        PAIR=k is not None,
        Q_BLOCK=q_block,
        K_BLOCK=k_block,
        BLOCK_HALF=block_half,
        BLOCK_REST=0 if rest == 0 else triton.next_power_of_2(rest),
        UNIT=unit(rotated // 2, width, *(s[2] for s in (q_s, k_s, yq_s, yk_s))),
        num_warps=min(max(q_block * block_half // 512, 1), 8),
    )


_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def forward(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    upcast: bool = False,
    promote: bool = False,
    contiguous: bool = False,
    layout: str = "halves",
    inverse: bool = False,
    per_pair: bool = False,
) -> Tensor:
    y = empty(x, cos, upcast, promote, contiguous)
    _launch(x, None, y, None, cos, sin, work_dtype(x.dtype, cos, upcast), True, layout, inverse, per_pair)
    return y


def pair_forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    upcast: bool = False,
    promote: bool = False,
    contiguous: bool = False,
    layout: str = "halves",
    inverse: bool = False,
    per_pair: bool = False,
) -> tuple[Tensor, Tensor]:
    yq, yk = (empty(x, cos, upcast, promote, contiguous) for x in (q, k))
    _launch(q, k, yq, yk, cos, sin, work_dtype(q.dtype, cos, upcast), True, layout, inverse, per_pair)
    return yq, yk


def backward(
    dy: Tensor,
    cos: Tensor,
    sin: Tensor,
    strides: list[int],
    dtype: torch.dtype,
    upcast: bool,
    layout: str = "halves",
    inverse: bool = False,
    per_pair: bool = False,
) -> Tensor:
    dx = dy.new_empty_strided(dy.shape, strides, dtype=dtype)
    _launch(dy, None, dx, None, cos, sin, work_dtype(dtype, cos, upcast), False, layout, inverse, per_pair)
    return dx


def pair_backward(
    dq: Tensor,
    dk: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_strides: list[int],
    k_strides: list[int],
    dtype: torch.dtype,
    upcast: bool,
    layout: str = "halves",
    inverse: bool = False,
    per_pair: bool = False,
) -> tuple[Tensor, Tensor]:
    xq = dq.new_empty_strided(dq.shape, q_strides, dtype=dtype)
    xk = dk.new_empty_strided(dk.shape, k_strides, dtype=dtype)
    _launch(dq, dk, xq, xk, cos, sin, work_dtype(dtype, cos, upcast), False, layout, inverse, per_pair)
    return xq, xk
