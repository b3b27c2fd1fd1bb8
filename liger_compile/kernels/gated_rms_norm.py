"""RMS normalisation with a gate: kernels and launch heuristics. See `ops/gated_rms_norm.py` for the maths."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.gated_rms_norm import out_dtype
from .launch import launch
from .layout import least, multiprocessors
from .rms_norm import TILE, _addressed, _offsets, total


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

    A tile is whole rows: one, or as many as make 2048 elements: vectors of 16 bytes for each of four warps, and
    enough programs on a multiprocessor to hide latency. The second dimension of the grid is the group.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = tl.arange(0, BLOCK_COLS)
    cols = tl.program_id(1) * n_cols + inside
    mask = (row < n_rows)[:, None] & (inside < n_cols)[None, :]
    raw = tl.load(x_ptr + _offsets(row, n1, n2, x0, x1, x2)[:, None] + cols[None, :], mask=mask, other=0.0)
    g = tl.load(gate_ptr + _offsets(row, n1, n2, g0, g1, g2)[:, None] + cols[None, :], mask=mask, other=0.0)
    w = tl.load(w_ptr + cols, mask=inside < n_cols, other=0.0).to(tl.float32)[None, :]
    activated, _slope = _gate(g.to(tl.float32), SILU)
    h = raw.to(tl.float32)
    if GATE_FIRST:
        h *= activated
    factor = tl.rsqrt(tl.sum(h * h, axis=1) / n_cols + tl.cast(eps, tl.float32))[:, None]
    _seen, y = _weighted(h * factor, w, raw, ROUND_NORMED, ROUND_PRODUCT and not GATE_FIRST)
    if not GATE_FIRST:
        y *= activated
    y_at = y_ptr + _offsets(row, n1, n2, y0, y1, y2)[:, None] + cols[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


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
    STAGES: tl.constexpr,
):
    """dx, dgate, and this program's share of dweight [programs, all columns] in float32.

    Per element: dy, x and gate read once, dx and dgate written once; 1 / rms and the activation are computed again. As
    in `rms_norm._backward`, programs stay resident and walk over tiles, so that dweight is summed in registers in a
    fixed order, load tiles ahead, and reduce a row once. The second dimension of the grid is the group.
    """
    inside = tl.arange(0, BLOCK_COLS)
    cols = tl.program_id(1) * n_cols + inside
    w = tl.load(w_ptr + cols, mask=inside < n_cols, other=0.0).to(tl.float32)[None, :]
    if NEED_DWEIGHT:
        dw = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < n_rows)[:, None] & (inside < n_cols)[None, :]
        raw = tl.load(x_ptr + _offsets(row, n1, n2, x0, x1, x2)[:, None] + cols[None, :], mask=mask, other=0.0)
        g = tl.load(gate_ptr + _offsets(row, n1, n2, g0, g1, g2)[:, None] + cols[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + _offsets(row, n1, n2, d0, d1, d2)[:, None] + cols[None, :], mask=mask, other=0.0)
        x, dy = raw.to(tl.float32), dy.to(tl.float32)
        activated, slope = _gate(g.to(tl.float32), SILU)
        if GATE_FIRST:
            h, dproduct = x * activated, dy
        else:
            h, dproduct = x, dy * activated
        dnormed = dproduct * w
        square, along = tl.reduce((h * h, dnormed * h), 1, _add_pairs)
        factor = tl.rsqrt(square / n_cols + tl.cast(eps, tl.float32))[:, None]
        normed = h * factor
        dh = factor * (dnormed - normed * (factor * along[:, None] / n_cols))
        seen, product = _weighted(normed, w, raw, ROUND_NORMED, ROUND_PRODUCT)
        if GATE_FIRST:
            dx, dgate = dh * activated, dh * x * slope
        else:
            dx, dgate = dh, dy * product * slope
        dx_at = dx_ptr + _offsets(row, n1, n2, o0, o1, o2)[:, None] + cols[None, :]
        tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dgate_at = dgate_ptr + _offsets(row, n1, n2, p0, p1, p2)[:, None] + cols[None, :]
        tl.store(dgate_at, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
        if NEED_DWEIGHT:
            dw += dproduct * seen
    if NEED_DWEIGHT:
        all_cols = tl.num_programs(1) * n_cols
        dw_at = dw_ptr + tl.program_id(0).to(tl.int64) * all_cols + cols
        tl.store(dw_at, tl.sum(dw, axis=0), mask=inside < n_cols)


def _how(x: Tensor, weight: Tensor, activation: str, gate_first: bool, rounding: str) -> dict[str, bool]:
    normed = rounding == "normed"
    return {
        "SILU": activation == "silu",
        "GATE_FIRST": gate_first,
        "ROUND_NORMED": normed,
        "ROUND_PRODUCT": normed and torch.promote_types(x.dtype, weight.dtype) is x.dtype,
    }


def _blocks(n_cols: int) -> tuple[int, int]:
    """(BLOCK_ROWS, BLOCK_COLS) of a tile."""
    block_cols = triton.next_power_of_2(n_cols)
    return max(1, TILE // block_cols), block_cols


def _warps(tile: int, most: int) -> int:
    """16 elements a thread, from 4 warps to `most`."""
    return min(max(tile // 512, 4), most)


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
    block_rows, block_cols = _blocks(n_cols)
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
        num_warps=_warps(block_rows * block_cols, 16),
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
    block_rows, block_cols = _blocks(n_cols)
    tile = block_rows * block_cols
    # As `rms_norm.backward`, with one operand more in each stage ahead.
    resident = multiprocessors(x.device) * max(8192 // tile, 1)
    programs = least(triton.cdiv(n_rows, block_rows), triton.cdiv(resident, n_groups))
    ahead = tile * x.element_size() <= 16384
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
        STAGES=3 if ahead else 1,
        num_warps=max(_warps(tile, 16), 8) if ahead else min(tile // 512, 32),  # 4 measured slower for heads of 128
    )
    for wanted, written in zip((dx, dgate), outs, strict=True):
        if written is not wanted:
            wanted.copy_(written)
    if not need_dweight:
        return dx, dgate, x.new_empty(0)
    return dx, dgate, *total([partial], [weight])
