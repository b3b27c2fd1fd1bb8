"""Rotary position embedding: kernel and launch heuristics. See `ops/rope.py` for the maths."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.rope import empty, work_dtype
from .layout import collapse

TILE = 4096
"""Elements of a half a program rotates at a time: 32 heads of 128, the widest common case, in one go."""


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
    FORWARD: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rotates one token's heads: y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2; the transpose of that if not FORWARD."""
    i = tl.arange(0, BLOCK_HALF)
    mask = (heads < n_heads)[:, None] & (i < half)[None, :]
    x_at = x_ptr + heads[:, None] * x_head + i[None, :]
    x1 = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_at + half, mask=mask, other=0.0).to(tl.float32)
    # Each product is rounded before the sum, as the separate operations of eager are.
    a1, a2 = (x1 * c1).to(WORK).to(tl.float32), (x2 * c2).to(WORK).to(tl.float32)
    if FORWARD:
        b1, b2 = (-x2 * s1).to(WORK).to(tl.float32), (x1 * s2).to(WORK).to(tl.float32)
    else:
        b1, b2 = (x2 * s2).to(WORK).to(tl.float32), (-x1 * s1).to(WORK).to(tl.float32)
    y_at = y_ptr + heads[:, None] * y_head + i[None, :]
    tl.store(y_at, (a1 + b1).to(WORK).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_at + half, (a2 + b2).to(WORK).to(y_ptr.dtype.element_ty), mask=mask)
    if BLOCK_REST > 0:
        j = 2 * half + tl.arange(0, BLOCK_REST)
        rest = (heads < n_heads)[:, None] & (j < width)[None, :]
        passed = tl.load(x_ptr + heads[:, None] * x_head + j[None, :], mask=rest, other=0.0)
        tl.store(y_ptr + heads[:, None] * y_head + j[None, :], passed.to(y_ptr.dtype.element_ty), mask=rest)


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
    sin_b,
    sin_t,
    WORK: tl.constexpr,
    FORWARD: tl.constexpr,
    PAIR: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rotates q, and k if PAIR, for one token and a block of heads.

    Per element of q and k: one read, one write. A program takes one token, so its cos and sin (4 D bytes in half
    precision) are read once for all heads; with 32 + 8 heads of 128 it moves 20 KB.
    """
    token = tl.program_id(0).to(tl.int64)
    b, t = token // n_t, token % n_t
    i = tl.arange(0, BLOCK_HALF)
    cos_at = cos_ptr + b * cos_b + t * cos_t + i
    sin_at = sin_ptr + b * sin_b + t * sin_t + i
    c1 = tl.load(cos_at, mask=i < half, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos_at + half, mask=i < half, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin_at, mask=i < half, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin_at + half, mask=i < half, other=0.0).to(tl.float32)[None, :]
    heads = tl.program_id(1).to(tl.int64) * Q_BLOCK + tl.arange(0, Q_BLOCK)
    x, y = q_ptr + b * q_b + t * q_t, yq_ptr + b * yq_b + t * yq_t
    _rotate_heads(x, y, q_h, yq_h, q_heads, heads, half, width, c1, c2, s1, s2, WORK, FORWARD, BLOCK_HALF, BLOCK_REST)
    if PAIR:
        heads = tl.program_id(1).to(tl.int64) * K_BLOCK + tl.arange(0, K_BLOCK)
        x, y = k_ptr + b * k_b + t * k_t, yk_ptr + b * yk_b + t * yk_t
        _rotate_heads(
            x, y, k_h, yk_h, k_heads, heads, half, width, c1, c2, s1, s2, WORK, FORWARD, BLOCK_HALF, BLOCK_REST
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


def _launch(q: Tensor, k: Tensor | None, yq: Tensor, yk: Tensor | None, cos: Tensor, sin: Tensor, work, forward: bool):
    """Writes the rotation of q into yq, and of k into yk if there is one."""
    rotated, width = cos.shape[-1], q.shape[-1]
    if q.numel() == 0 and (k is None or k.numel() == 0):
        return
    pairs = [(q, yq)] if k is None else [(q, yq), (k, yk)]
    plans = []
    for x, y in pairs:
        c = cos.expand(*x.shape[:-1], rotated)
        s = sin.expand(*x.shape[:-1], rotated)
        plans.append((_tokens([x, y, c, s], _head_dim(x, c)), c, s))
    agree = len({(*p[0][0][:2], *p[0][1][2], *p[0][1][3]) for p in plans if p[0] is not None}) == 1
    if not agree or any(p[0] is None for p in plans):  # layouts that share no tokens: one at a time, copied
        for (x, y), (plan, c, s) in zip(pairs, plans, strict=True):
            if plan is not None and len(pairs) > 1:
                _launch(x, None, y, None, cos, sin, work, forward)
                continue
            flat = [t.reshape(-1, t.shape[-1]).contiguous() for t in (x, c, s)]
            out = y.new_empty(flat[0].shape)
            _launch(flat[0], None, out, None, flat[1], flat[2], work, forward)
            y.copy_(out.view(y.shape))
        return
    (sizes, (q_s, yq_s, c_s, s_s)), _, _ = plans[0]
    (k_sizes, (k_s, yk_s, _, _)), _, _ = plans[-1]
    block_half = triton.next_power_of_2(max(rotated // 2, 1))
    most = max(TILE // block_half, 1)
    q_block = min(triton.next_power_of_2(sizes[2]), most)
    k_block = min(triton.next_power_of_2(k_sizes[2]), most)
    programs = max(triton.cdiv(sizes[2], q_block), triton.cdiv(k_sizes[2], k_block))
    rest = width - rotated
    _rope[(sizes[0] * sizes[1], programs)](
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
        *s_s[:2],
        WORK=_TRITON_DTYPES[work],
        FORWARD=forward,
        PAIR=k is not None,
        Q_BLOCK=q_block,
        K_BLOCK=k_block,
        BLOCK_HALF=block_half,
        BLOCK_REST=0 if rest == 0 else triton.next_power_of_2(rest),
        num_warps=min(max(q_block * block_half // 512, 1), 8),
    )


_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def forward(
    x: Tensor, cos: Tensor, sin: Tensor, upcast: bool = False, promote: bool = False, contiguous: bool = False
) -> Tensor:
    y = empty(x, cos, upcast, promote, contiguous)
    _launch(x, None, y, None, cos, sin, work_dtype(x.dtype, cos, upcast), True)
    return y


def pair_forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    upcast: bool = False,
    promote: bool = False,
    contiguous: bool = False,
) -> tuple[Tensor, Tensor]:
    yq, yk = (empty(x, cos, upcast, promote, contiguous) for x in (q, k))
    _launch(q, k, yq, yk, cos, sin, work_dtype(q.dtype, cos, upcast), True)
    return yq, yk


def backward(dy: Tensor, cos: Tensor, sin: Tensor, strides: list[int], dtype: torch.dtype, upcast: bool) -> Tensor:
    dx = dy.new_empty_strided(dy.shape, strides, dtype=dtype)
    _launch(dy, None, dx, None, cos, sin, work_dtype(dtype, cos, upcast), False)
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
) -> tuple[Tensor, Tensor]:
    xq = dq.new_empty_strided(dq.shape, q_strides, dtype=dtype)
    xk = dk.new_empty_strided(dk.shape, k_strides, dtype=dtype)
    _launch(dq, dk, xq, xk, cos, sin, work_dtype(dtype, cos, upcast), False)
    return xq, xk
