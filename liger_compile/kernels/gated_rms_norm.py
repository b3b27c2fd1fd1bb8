"""RMS normalisation with a gate: kernels and launch heuristics. See `ops/gated_rms_norm.py` for the maths."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.gated_rms_norm import out_dtype
from .launch import launch
from .layout import least, multiprocessors
from .rms_norm import SHARED, _addressed, _load, _offsets, _store, total


@triton.jit
def _gate(g, SILU: tl.constexpr):
    """act(g) and its derivative in float32; what the caller does not use is not computed."""
    s = tl.sigmoid(g)
    if SILU:
        y, slope = g * s, s * (1.0 + g * (1.0 - s))
    else:
        y, slope = s, s * (1.0 - s)
    return y, slope


@triton.jit
def _weights(w_ptr, cols, n_cols):
    """[1, cols] in float32."""
    return tl.load(w_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _weighted(normed, w, like, ROUND_NORMED: tl.constexpr, ROUND_PRODUCT: tl.constexpr):
    """The normalised value as the weight sees it, and their product, rounded to `like`'s dtype where the model does."""
    if ROUND_NORMED:
        normed = normed.to(like.dtype).to(tl.float32)
    product = normed * w
    if ROUND_PRODUCT:
        product = product.to(like.dtype).to(tl.float32)
    return normed, product


@triton.jit
def _gated_forward(
    x_ptr,
    gate_ptr,
    w_ptr,
    y_ptr,
    n_rows,
    n_cols,
    n1,
    n2,
    x0,
    x1,
    x2,
    g0,
    g1,
    g2,
    y0,
    y1,
    y2,
    eps,
    SILU: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    ROUND_NORMED: tl.constexpr,
    ROUND_PRODUCT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """y = norm(x) * weight * act(gate), or norm(x * act(gate)) * weight. Per element: x and gate read once, y written
    once; the row stays in registers in between.

    A tile is whole rows: one, or as many as make 1024 elements: two vectors of 16 bytes for each thread of two warps,
    and enough programs on a multiprocessor to hide latency. The second dimension of the grid is the group.
    """
    group = tl.program_id(1) * n_cols
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    within = row < n_rows
    cols = tl.arange(0, BLOCK_COLS)
    raw = _load(x_ptr + group, _offsets(row, n1, n2, x0, x1, x2), within, cols, n_cols)
    g = _load(gate_ptr + group, _offsets(row, n1, n2, g0, g1, g2), within, cols, n_cols)
    w = _weights(w_ptr + group, cols, n_cols)
    activated, _slope = _gate(g.to(tl.float32), SILU)
    h = raw.to(tl.float32)
    if GATE_FIRST:
        h *= activated
    factor = tl.rsqrt(tl.sum(h * h, axis=1) / n_cols + tl.cast(eps, tl.float32))[:, None]
    _seen, y = _weighted(h * factor, w, raw, ROUND_NORMED, ROUND_PRODUCT and not GATE_FIRST)
    if not GATE_FIRST:
        y *= activated
    _store(y_ptr + group, _offsets(row, n1, n2, y0, y1, y2), within, cols, n_cols, y)


@triton.jit
def _gated_values(raw, g, dy, SILU: tl.constexpr, GATE_FIRST: tl.constexpr):
    """In float32: x, act(gate), its derivative, what is normalised, and the gradient of the weighted norm."""
    x = raw.to(tl.float32)
    activated, slope = _gate(g.to(tl.float32), SILU)
    if GATE_FIRST:
        h, dproduct = x * activated, dy.to(tl.float32)
    else:
        h, dproduct = x, dy.to(tl.float32) * activated
    return x, activated, slope, h, dproduct


@triton.jit
def _sums(raw, g, dy, w, SILU: tl.constexpr, GATE_FIRST: tl.constexpr):
    """Of what is normalised, squared, and times the gradient of its normalised value."""
    _x, _activated, _slope, h, dproduct = _gated_values(raw, g, dy, SILU, GATE_FIRST)
    return tl.sum(h * h, axis=1), tl.sum(dproduct * w * h, axis=1)


@triton.jit
def _gradients(
    dx_ptr,
    dgate_ptr,
    dx_at,
    dgate_at,
    within,
    cols,
    n_cols,
    raw,
    g,
    dy,
    w,
    factor,
    mean,
    SILU: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    ROUND_NORMED: tl.constexpr,
    ROUND_PRODUCT: tl.constexpr,
):
    """Writes dx and dgate; returns the rows' shares of dweight."""
    x, activated, slope, h, dproduct = _gated_values(raw, g, dy, SILU, GATE_FIRST)
    normed = h * factor
    dh = factor * (dproduct * w - normed * mean)
    seen, product = _weighted(normed, w, raw, ROUND_NORMED, ROUND_PRODUCT)
    if GATE_FIRST:
        dx, dgate = dh * activated, dh * x * slope
    else:
        dx, dgate = dh, dy.to(tl.float32) * product * slope
    _store(dx_ptr, dx_at, within, cols, n_cols, dx)
    _store(dgate_ptr, dgate_at, within, cols, n_cols, dgate)
    return dproduct * seen


@triton.jit
def _gated_backward(
    dy_ptr,
    x_ptr,
    gate_ptr,
    w_ptr,
    dx_ptr,
    dgate_ptr,
    dw_ptr,
    n_rows,
    n_cols,
    n1,
    n2,
    d0,
    d1,
    d2,
    x0,
    x1,
    x2,
    g0,
    g1,
    g2,
    o0,
    o1,
    o2,
    p0,
    p1,
    p2,
    eps,
    SILU: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    ROUND_NORMED: tl.constexpr,
    ROUND_PRODUCT: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx, dgate, and this program's share of dweight [programs, all columns] in float32.

    Per element: dy, x and gate read once, dx and dgate written once; 1 / rms and the activation are computed again. As
    in `rms_norm._rms_norm_backward`, programs stay resident and walk over tiles, so that dweight is summed in registers
    in a fixed order, load tiles ahead, and take a row as one block or two; if WIDE, the weight is read for each tile.
    The second dimension of the grid is the group.
    """
    group = tl.program_id(1) * n_cols
    x_ptr, gate_ptr, dy_ptr, w_ptr = x_ptr + group, gate_ptr + group, dy_ptr + group, w_ptr + group
    dx_ptr, dgate_ptr = dx_ptr + group, dgate_ptr + group
    cols = tl.arange(0, BLOCK_COLS)
    w = _weights(w_ptr, cols, n_cols)
    dw = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    if BLOCK_REST > 0:
        rest = BLOCK_COLS + tl.arange(0, BLOCK_REST)
        w_rest = _weights(w_ptr, rest, n_cols)
        dw_rest = tl.zeros((BLOCK_ROWS, BLOCK_REST), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        within = row < n_rows
        x_at = _offsets(row, n1, n2, x0, x1, x2)
        gate_at = _offsets(row, n1, n2, g0, g1, g2)
        dy_at = _offsets(row, n1, n2, d0, d1, d2)
        dx_at = _offsets(row, n1, n2, o0, o1, o2)
        dgate_at = _offsets(row, n1, n2, p0, p1, p2)
        raw = _load(x_ptr, x_at, within, cols, n_cols)
        g = _load(gate_ptr, gate_at, within, cols, n_cols)
        dy = _load(dy_ptr, dy_at, within, cols, n_cols)
        if WIDE:
            w = _weights(w_ptr, cols, n_cols)
        square, along = _sums(raw, g, dy, w, SILU, GATE_FIRST)
        if BLOCK_REST > 0:
            raw_rest = _load(x_ptr, x_at, within, rest, n_cols)
            g_rest = _load(gate_ptr, gate_at, within, rest, n_cols)
            dy_rest = _load(dy_ptr, dy_at, within, rest, n_cols)
            if WIDE:
                w_rest = _weights(w_ptr, rest, n_cols)
            square_rest, along_rest = _sums(raw_rest, g_rest, dy_rest, w_rest, SILU, GATE_FIRST)
            square += square_rest
            along += along_rest
        factor = tl.rsqrt(square / n_cols + tl.cast(eps, tl.float32))[:, None]
        mean = factor * along[:, None] / n_cols
        share = _gradients(
            *(dx_ptr, dgate_ptr, dx_at, dgate_at, within, cols, n_cols, raw, g, dy, w, factor, mean),
            *(SILU, GATE_FIRST, ROUND_NORMED, ROUND_PRODUCT),
        )
        if NEED_DWEIGHT:
            dw += share
        if BLOCK_REST > 0:
            share = _gradients(
                *(dx_ptr, dgate_ptr, dx_at, dgate_at, within, rest, n_cols, raw_rest, g_rest, dy_rest, w_rest),
                *(factor, mean, SILU, GATE_FIRST, ROUND_NORMED, ROUND_PRODUCT),
            )
            if NEED_DWEIGHT:
                dw_rest += share
    if NEED_DWEIGHT:
        at = dw_ptr + tl.program_id(0).to(tl.int64) * tl.num_programs(1) * n_cols + group
        tl.store(at + cols, tl.sum(dw, axis=0), mask=cols < n_cols)
        if BLOCK_REST > 0:
            tl.store(at + rest, tl.sum(dw_rest, axis=0), mask=rest < n_cols)


TILE = 1024
"""Elements that a program works on at a time, if a row has no more."""


def _rows(block_cols: int) -> int:
    """Of a tile."""
    return max(TILE // block_cols, 1)


def _forward_warps(n_cols: int) -> int:
    """As `rms_norm._forward_warps`, with more for wide rows: 16 warps took 0.73 times the time of 8 for 16384."""
    return 2 if n_cols <= TILE else min(triton.next_power_of_2(n_cols // 512 + 1) // 2, 16)


def _parts(n_cols: int) -> tuple[int, int]:
    """(BLOCK_COLS, BLOCK_REST) of the backward: rows of more than 4096 as two blocks, if these are smaller than one.
    (5120 was faster by 18% in two, 2304 slower by 3%.)"""
    whole = triton.next_power_of_2(n_cols)
    rest = triton.next_power_of_2(max(n_cols - whole // 2, 1))
    return (whole, 0) if whole <= 4096 or rest == whole // 2 else (whole // 2, rest)


def _backward_plan(tile: int, size: int) -> tuple[bool, int, int, int]:
    """(WIDE, warps of a program, programs that a multiprocessor holds, STAGES) for tiles of `tile` elements of `size`
    bytes: what measured fastest for rows of 128 to 16384.

    Up to 32 elements a thread, twice that for 16384, and 8192 elements in hand on a multiprocessor, with twice as many
    on their way. From 4096 on, a row and its share of dweight leave no registers for the weight.
    """
    wide, programs = tile >= 4096, min(max(8192 // tile, 1), 4)
    buffers = SHARED // ((3 + wide) * tile * size * programs)
    return wide, 4 if tile <= 4096 else 8, programs, 1 + min(buffers, 2)


def _how(x: Tensor, weight: Tensor, activation: str, gate_first: bool, rounding: str) -> dict[str, bool]:
    normed = rounding == "normed"
    return {
        "SILU": activation == "silu",
        "GATE_FIRST": gate_first,
        "ROUND_NORMED": normed,
        "ROUND_PRODUCT": normed and torch.promote_types(x.dtype, weight.dtype) is x.dtype,
    }


def forward(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    activation: str = "silu",
    gate_first: bool = False,
    rounding: str = "normed",
    groups: list[int] | None = None,
) -> Tensor:
    y = torch.empty_like(x, dtype=out_dtype(x, weight, gate_first, rounding))
    if x.numel() == 0:
        return y
    (_, n1, n2), strides, (x, gate, out) = _addressed(x, gate, y)
    n_groups, n_cols = groups or (1, x.shape[-1])
    n_rows = x.numel() // x.shape[-1]
    block_cols = triton.next_power_of_2(n_cols)
    block_rows = _rows(block_cols)
    launch(
        _gated_forward,
        (triton.cdiv(n_rows, block_rows), n_groups),
        x,
        gate,
        weight.contiguous(),
        out,
        n_rows,
        n_cols,
        n1,
        n2,
        *(s for each in strides for s in each),
        eps,
        **_how(x, weight, activation, gate_first, rounding),
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        num_warps=_forward_warps(n_cols),
    )
    return out if out is y else y.copy_(out)


def backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    activation: str,
    gate_first: bool,
    rounding: str,
    groups: list[int] | None,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dgate = torch.empty_like(x), torch.empty_like(gate)
    if x.numel() == 0:
        return dx, dgate, torch.zeros_like(weight) if need_dweight else x.new_empty(0)
    (_, n1, n2), strides, (dy, x, gate, *outs) = _addressed(dy, x, gate, dx, dgate)
    width = x.shape[-1]
    n_groups, n_cols = groups or (1, width)
    n_rows = x.numel() // width
    block_cols, block_rest = _parts(n_cols)
    block_rows = _rows(block_cols)
    tile = block_rows * (block_cols + block_rest)
    wide, warps, resident, stages = _backward_plan(tile, x.element_size())
    programs = least(triton.cdiv(n_rows, block_rows), triton.cdiv(multiprocessors(x.device) * resident, n_groups))
    partial = x.new_empty((programs, width) if need_dweight else (0,), dtype=torch.float32)
    launch(
        _gated_backward,
        (programs, n_groups),
        dy,
        x,
        gate,
        weight.contiguous(),
        *outs,
        partial,
        n_rows,
        n_cols,
        n1,
        n2,
        *(s for each in strides for s in each),
        eps,
        **_how(x, weight, activation, gate_first, rounding),
        NEED_DWEIGHT=need_dweight,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        BLOCK_REST=block_rest,
        WIDE=wide,
        STAGES=stages,
        num_warps=warps,
    )
    for wanted, written in zip((dx, dgate), outs, strict=True):
        if written is not wanted:
            wanted.copy_(written)
    if not need_dweight:
        return dx, dgate, x.new_empty(0)
    return dx, dgate, *total([partial], [weight])
