"""RMS normalisation: kernels and launch heuristics. See `ops/rms_norm.py` for the maths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.rms_norm import out_dtype
from .launch import launch
from .layout import least, multiprocessors, rows

NORMED, RESULT, FACTOR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_ROUNDINGS = {"normed": 0, "result": 1, "factor": 2}


@triton.jit
def _offsets(row, n1, n2, s0, s1, s2):
    """Where each row begins in a tensor of three leading dimensions [*, n1, n2]."""
    return (row // (n1 * n2)) * s0 + (row // n2 % n1) * s1 + (row % n2) * s2


@triton.jit
def _scale(w_ptr, cols, n_cols, offset, ROUNDING: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """offset + weight as float32 [1, BLOCK_COLS], rounded as the model does."""
    if HAS_WEIGHT:
        w = tl.load(w_ptr + cols, mask=cols < n_cols, other=0.0)
        s = w.to(tl.float32) + tl.cast(offset, tl.float32)
        if ROUNDING != RESULT:
            s = s.to(w.dtype).to(tl.float32)
    else:
        s = tl.full(cols.shape, 1.0, tl.float32)
    return s[None, :]


@triton.jit
def _rms_norm(
    x_ptr,
    r_ptr,
    w_ptr,
    y_ptr,
    h_ptr,
    n_rows,
    n_cols,
    n1,
    n2,
    x0,
    x1,
    x2,
    y0,
    y1,
    y2,
    eps,
    offset,
    ROUNDING: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ADD_AFTER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """y = normalised x, scaled. Per element: x read once, y written once; the row stays in registers in between.

    With a residual r: h = x + r is normalised, and written too; per element two reads and two writes. If ADD_AFTER, r
    is added to what would have been y: two reads, one write. r and h are of the layout of x and y.

    A tile is BLOCK_ROWS whole rows: one for wide rows, and for narrow ones (64 to 256 per head) as many as make 2048
    elements: vectors of 16 bytes for each of four warps, and enough programs on a multiprocessor to hide latency.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    mask = (row < n_rows)[:, None] & (cols < n_cols)[None, :]
    x_at = _offsets(row, n1, n2, x0, x1, x2)[:, None] + cols[None, :]
    raw = tl.load(x_ptr + x_at, mask=mask, other=0.0)
    if h_ptr is not None:
        r = tl.load(r_ptr + x_at, mask=mask, other=0.0)
        raw = (raw.to(tl.float32) + r.to(tl.float32)).to(raw.dtype)
        tl.store(h_ptr + x_at, raw, mask=mask)
    scale = _scale(w_ptr, cols, n_cols, offset, ROUNDING, HAS_WEIGHT)  # before the sum, which loads do not pass
    x = raw.to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, axis=1) / n_cols + tl.cast(eps, tl.float32))[:, None]
    if ROUNDING == FACTOR:
        factor = factor.to(raw.dtype).to(tl.float32)
    y = x * factor
    if ROUNDING != RESULT:
        y = y.to(raw.dtype).to(tl.float32)
    y = (y * scale).to(y_ptr.dtype.element_ty)
    y_at = _offsets(row, n1, n2, y0, y1, y2)[:, None] + cols[None, :]
    if ADD_AFTER:
        r = tl.load(r_ptr + y_at, mask=mask, other=0.0)
        y = (y.to(tl.float32) + r.to(tl.float32)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + y_at, y, mask=mask)


@triton.jit
def _add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _rms_norm_backward(
    dy_ptr,
    dy2_ptr,
    dy3_ptr,
    x_ptr,
    w_ptr,
    dr_ptr,
    dx_ptr,
    dw_ptr,
    y_ptr,
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
    o0,
    o1,
    o2,
    eps,
    offset,
    ROUNDING: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx, and this program's share of dweight [programs, n_cols] in float32.

    Per element: dy and x read once, dx written once; 1 / rms is computed again from the row in hand, which costs no
    bytes. Programs stay resident and walk over tiles, so dweight is summed in registers, in a fixed order, and only
    n_cols floats a program reach memory. As few programs as that are kept busy by loading tiles ahead (STAGES), and by
    reducing a row once: with r = 1 / rms, dx = r (dn - x r^2 sum(dn x) / n) needs both sums of the row at one time.

    Where they are given: dy2 and dy3 are added to dy; dr, the gradient that reaches x past the norm, to dx; and y is
    written again, for the weight gradients that follow. Each is one more access per element, in place of two or three
    in a kernel of its own. They are of the layout of dy or dx.
    """
    cols = tl.arange(0, BLOCK_COLS)
    scale = _scale(w_ptr, cols, n_cols, offset, ROUNDING, HAS_WEIGHT)
    if NEED_DWEIGHT:
        dw = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < n_rows)[:, None] & (cols < n_cols)[None, :]
        raw = tl.load(x_ptr + _offsets(row, n1, n2, x0, x1, x2)[:, None] + cols[None, :], mask=mask, other=0.0)
        dy_at = _offsets(row, n1, n2, d0, d1, d2)[:, None] + cols[None, :]
        dx_at = _offsets(row, n1, n2, o0, o1, o2)[:, None] + cols[None, :]
        dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
        if dy2_ptr is not None:
            dy += tl.load(dy2_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
        if dy3_ptr is not None:
            dy += tl.load(dy3_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
        x = raw.to(tl.float32)
        dnormed = dy * scale
        square, along = tl.reduce((x * x, dnormed * x), 1, _add_pairs)
        factor = tl.rsqrt(square / n_cols + tl.cast(eps, tl.float32))[:, None]
        normed = x * factor
        dx = factor * (dnormed - normed * (factor * along[:, None] / n_cols))
        if dr_ptr is not None:
            dx += tl.load(dr_ptr + dx_at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + dx_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if y_ptr is not None:
            if ROUNDING == FACTOR:
                y = (x * factor.to(raw.dtype).to(tl.float32)).to(raw.dtype).to(tl.float32)
            elif ROUNDING == NORMED:
                y = normed.to(raw.dtype).to(tl.float32)
            else:
                y = normed
            tl.store(y_ptr + dx_at, (y * scale).to(y_ptr.dtype.element_ty), mask=mask)
        if NEED_DWEIGHT:
            if ROUNDING != RESULT:
                normed = normed.to(raw.dtype).to(tl.float32)
            dw += dy * normed
    if NEED_DWEIGHT:
        tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * n_cols + cols, tl.sum(dw, axis=0), mask=cols < n_cols)


@triton.jit
def _total(partial_ptr, out_ptr, n_rows, n_cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Sums of columns, in a fixed order, rounded once. Per element of partial: read once; BLOCK_COLS are 64 bytes, two
    sectors, so that even narrow weights give several programs."""
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, n_rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < n_rows)[:, None] & (cols < n_cols)[None, :]
        total += tl.load(partial_ptr + row[:, None] * n_cols + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=cols < n_cols)


TILE = 2048
"""Elements a program works on at a time, if a row has no more; see the kernels."""


def _blocks(n_cols: int) -> tuple[int, int]:
    """(BLOCK_ROWS, BLOCK_COLS) of a tile."""
    block_cols = triton.next_power_of_2(n_cols)
    return max(1, TILE // block_cols), block_cols


def _warps(tile: int, most: int) -> int:
    """16 elements a thread, from 4 warps to `most`."""
    return min(max(tile // 512, 4), most)


def _addressed(*tensors: Tensor) -> tuple[list[int], list[list[int]], tuple[Tensor, ...]]:
    found = rows(*tensors, dims=3)
    if found is None:
        tensors = tuple(t.contiguous() for t in tensors)
        found = rows(*tensors, dims=3)
    return *found, tensors


def _run_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    offset: float,
    rounding: str,
    y: Tensor,
    h: Tensor | None,
) -> None:
    """Writes y, and h = x + residual if there is one; else a residual is added to y."""
    if x.numel() == 0:
        return
    (_, n1, n2), (xs, ys), (x, out) = _addressed(x, y)
    n_cols = x.shape[-1]
    n_rows = x.numel() // n_cols
    block_rows, block_cols = _blocks(n_cols)
    weight = weight if weight is None else weight.contiguous()
    launch(
        _rms_norm,
        (triton.cdiv(n_rows, block_rows),),
        x,
        residual,
        weight,
        out,
        h,
        n_rows,
        n_cols,
        n1,
        n2,
        *xs,
        *ys,
        eps,
        offset,
        ROUNDING=_ROUNDINGS[rounding],
        HAS_WEIGHT=weight is not None,
        ADD_AFTER=residual is not None and h is None,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        num_warps=_warps(block_rows * block_cols, 8),
    )
    if out is not y:
        y.copy_(out)


def forward(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, rounding: str = "normed") -> Tensor:
    y = torch.empty_like(x, dtype=out_dtype(x, weight, rounding))
    _run_forward(x, None, weight, eps, offset, rounding, y, None)
    return y


def add_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, rounding: str
) -> tuple[Tensor, Tensor]:
    y, h = torch.empty_like(x, dtype=out_dtype(x, weight, rounding)), torch.empty_like(x)
    _run_forward(x, residual, weight, eps, offset, rounding, y, h)
    return y, h


def forward_add(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, rounding: str) -> Tensor:
    y = torch.empty_like(x, dtype=residual.dtype)
    _run_forward(x, residual, weight, eps, offset, rounding, y, None)
    return y


def _run_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    weight: Tensor | None,
    dresidual: Tensor | None,
    eps: float,
    offset: float,
    rounding: str,
    need_dweight: bool,
    y: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dx, dweight), and y is written again if there is one."""
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(weight) if need_dweight else x.new_empty(0)
    dy, *more = dys
    (_, n1, n2), (ds, xs, os), (dy, x, out) = _addressed(dy, x, dx)
    n_cols = x.shape[-1]
    n_rows = x.numel() // n_cols
    block_rows, block_cols = _blocks(n_cols)
    tile = block_rows * block_cols
    # A multiprocessor has 8192 elements in hand and as many in each stage ahead, which wide rows leave no room for.
    programs = least(triton.cdiv(n_rows, block_rows), multiprocessors(x.device) * max(8192 // tile, 1))
    ahead = tile * x.element_size() <= 16384
    stages = 3 if len(more) + (dresidual is not None) == 0 else 2
    weight = weight if weight is None else weight.contiguous()
    partial = x.new_empty((programs, n_cols) if need_dweight else (0,), dtype=torch.float32)
    launch(
        _rms_norm_backward,
        (programs,),
        dy,
        *(*more, None, None)[:2],
        x,
        weight,
        dresidual,
        out,
        partial,
        y,
        n_rows,
        n_cols,
        n1,
        n2,
        *ds,
        *xs,
        *os,
        eps,
        offset,
        ROUNDING=_ROUNDINGS[rounding],
        HAS_WEIGHT=weight is not None,
        NEED_DWEIGHT=need_dweight,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        STAGES=stages if ahead else 1,
        num_warps=_warps(tile, 8) if ahead else min(tile // 1024, 32),
    )
    if out is not dx:
        dx.copy_(out)
    if not need_dweight:
        return dx, partial
    dweight = torch.empty_like(weight)
    launch(_total, (triton.cdiv(n_cols, 16),), partial, dweight, programs, n_cols, BLOCK_ROWS=64, BLOCK_COLS=16)
    return dx, dweight


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, offset: float, rounding: str, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    return _run_backward((dy,), x, weight, None, eps, offset, rounding, need_dweight, None)


def backward_add(
    dys: Sequence[Tensor],
    x: Tensor,
    weight: Tensor | None,
    dresidual: Tensor | None,
    eps: float,
    offset: float,
    rounding: str,
    need_dweight: bool,
    again: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, dtype=out_dtype(x, weight, rounding)) if again else None
    dx, dweight = _run_backward(dys, x, weight, dresidual, eps, offset, rounding, need_dweight, y)
    return dx, dweight, x.new_empty(0) if y is None else y
