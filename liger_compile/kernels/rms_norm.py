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
ADD, FLOOR = tl.constexpr(0), tl.constexpr(1)
_GUARDS = {"add": 0, "floor": 1, "outside": 2}


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
def _factor(square, n, eps, GUARD: tl.constexpr):
    """What rows are multiplied by, [rows, 1], of their sums of x^2; and by what their gradients lie along them: what
    `mean` in `_gradient` is a multiple of."""
    eps = tl.cast(eps, tl.float32)
    if GUARD == ADD:
        factor = tl.rsqrt(square / n + eps)
        slope = factor
    else:
        rms = tl.sqrt(square / n)
        if GUARD == FLOOR:
            factor = 1.0 / tl.where(rms < eps, eps, rms)  # a NaN stays one
            slope = tl.where(rms < eps, 0.0, factor)
        else:
            factor = 1.0 / (rms + eps)
            slope = tl.where(rms == 0.0, 0.0, 1.0 / rms)
    return factor[:, None], slope[:, None]


@triton.jit
def _load(ptr, at, within, cols, n_cols):
    """Columns of rows that begin at `at`, [rows, cols]."""
    return tl.load(ptr + at[:, None] + cols[None, :], mask=within[:, None] & (cols < n_cols)[None, :], other=0.0)


@triton.jit
def _store(ptr, at, within, cols, n_cols, value):
    mask = within[:, None] & (cols < n_cols)[None, :]
    tl.store(ptr + at[:, None] + cols[None, :], value.to(ptr.dtype.element_ty), mask=mask)


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
    divisor,
    GUARD: tl.constexpr,
    ROUNDING: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ADD_AFTER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """y = normalised x, scaled. Per element: x read once, y written once; the row stays in registers in between.

    With a residual r: h = x + r is normalised, and written too; per element two reads and two writes. If ADD_AFTER, r
    is added to what would have been y: two reads, one write. r and h are of the layout of x and y.

    A tile is one row, and of up to 512 elements as many as make 2048: vectors of 16 bytes for each of four warps, and
    enough programs on a multiprocessor to hide latency.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    within = row < n_rows
    cols = tl.arange(0, BLOCK_COLS)
    x_at = _offsets(row, n1, n2, x0, x1, x2)
    raw = _load(x_ptr, x_at, within, cols, n_cols)
    if h_ptr is not None:
        r = _load(r_ptr, x_at, within, cols, n_cols)
        raw = (raw.to(tl.float32) + r.to(tl.float32)).to(raw.dtype)
        _store(h_ptr, x_at, within, cols, n_cols, raw)
    scale = _scale(w_ptr, cols, n_cols, offset, ROUNDING, HAS_WEIGHT)  # before the sum, which loads do not pass
    x = raw.to(tl.float32)
    n = n_cols if divisor is None else tl.cast(divisor, tl.float32)
    factor, _slope = _factor(tl.sum(x * x, axis=1), n, eps, GUARD)
    if ROUNDING == FACTOR:
        factor = factor.to(raw.dtype).to(tl.float32)
    y = x * factor
    if ROUNDING != RESULT:
        y = y.to(raw.dtype).to(tl.float32)
    y = (y * scale).to(y_ptr.dtype.element_ty)
    y_at = _offsets(row, n1, n2, y0, y1, y2)
    if ADD_AFTER:
        y = y.to(tl.float32) + _load(r_ptr, y_at, within, cols, n_cols).to(tl.float32)
    _store(y_ptr, y_at, within, cols, n_cols, y)


@triton.jit
def _incoming(dy_ptr, dy2_ptr, dy3_ptr, at, within, cols, n_cols):
    """The sum of one to three gradients, in float32."""
    dy = _load(dy_ptr, at, within, cols, n_cols).to(tl.float32)
    if dy2_ptr is not None:
        dy += _load(dy2_ptr, at, within, cols, n_cols).to(tl.float32)
    if dy3_ptr is not None:
        dy += _load(dy3_ptr, at, within, cols, n_cols).to(tl.float32)
    return dy


@triton.jit
def _sums(raw, dy, scale):
    """Of x^2, and of x times the gradient of the normalised x."""
    x = raw.to(tl.float32)
    return tl.sum(x * x, axis=1), tl.sum(dy * scale * x, axis=1)


@triton.jit
def _gradient(dx_ptr, dr_ptr, y_ptr, at, within, cols, n_cols, raw, dy, scale, factor, mean, ROUNDING: tl.constexpr):
    """Writes dx, and y if it is made again; returns the rows' shares of dweight."""
    x = raw.to(tl.float32)
    normed = x * factor
    dx = factor * (dy * scale - normed * mean)
    if dr_ptr is not None:
        dx += _load(dr_ptr, at, within, cols, n_cols).to(tl.float32)
    _store(dx_ptr, at, within, cols, n_cols, dx)
    if ROUNDING != RESULT:
        rounded = normed.to(raw.dtype).to(tl.float32)
    else:
        rounded = normed
    if y_ptr is not None:
        if ROUNDING == FACTOR:
            y = (x * factor.to(raw.dtype).to(tl.float32)).to(raw.dtype).to(tl.float32)
        else:
            y = rounded
        _store(y_ptr, at, within, cols, n_cols, y * scale)
    return dy * rounded


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
    divisor,
    GUARD: tl.constexpr,
    ROUNDING: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx, and this program's share of dweight [programs, n_cols] in float32.

    Per element: dy and x read once, dx written once; 1 / rms is computed again from the row in hand, which costs no
    bytes. Programs stay resident and walk over tiles, so dweight is summed in registers, in a fixed order, and only
    n_cols floats a program reach memory. As few programs as that are kept busy by loading tiles ahead (STAGES), and by
    reducing a row once: with r = 1 / rms, dx = r (dn - x r^2 sum(dn x) / n) needs both sums of the row at one time.
    If WIDE, the weight is read again for each tile, from the cache: a row and its dweight fill the registers.

    Where they are given: dy2 and dy3 are added to dy; dr, the gradient that reaches x past the norm, to dx; and y is
    written again, for the weight gradients that follow. Each is one more access per element, in place of two or three
    in a kernel of its own. They are of the layout of dy or dx.
    """
    n = n_cols if divisor is None else tl.cast(divisor, tl.float32)
    cols = tl.arange(0, BLOCK_COLS)
    scale = _scale(w_ptr, cols, n_cols, offset, ROUNDING, HAS_WEIGHT)
    dw = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    if BLOCK_REST > 0:
        rest = BLOCK_COLS + tl.arange(0, BLOCK_REST)
        scale_rest = _scale(w_ptr, rest, n_cols, offset, ROUNDING, HAS_WEIGHT)
        dw_rest = tl.zeros((BLOCK_ROWS, BLOCK_REST), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        within = row < n_rows
        x_at = _offsets(row, n1, n2, x0, x1, x2)
        dy_at = _offsets(row, n1, n2, d0, d1, d2)
        dx_at = _offsets(row, n1, n2, o0, o1, o2)
        raw = _load(x_ptr, x_at, within, cols, n_cols)
        dy = _incoming(dy_ptr, dy2_ptr, dy3_ptr, dy_at, within, cols, n_cols)
        if WIDE:
            scale = _scale(w_ptr, cols, n_cols, offset, ROUNDING, HAS_WEIGHT)
        square, along = _sums(raw, dy, scale)
        if BLOCK_REST > 0:
            raw_rest = _load(x_ptr, x_at, within, rest, n_cols)
            dy_rest = _incoming(dy_ptr, dy2_ptr, dy3_ptr, dy_at, within, rest, n_cols)
            if WIDE:
                scale_rest = _scale(w_ptr, rest, n_cols, offset, ROUNDING, HAS_WEIGHT)
            square_rest, along_rest = _sums(raw_rest, dy_rest, scale_rest)
            square += square_rest
            along += along_rest
        factor, slope = _factor(square, n, eps, GUARD)
        mean = slope * along[:, None] / n
        share = _gradient(
            *(dx_ptr, dr_ptr, y_ptr, dx_at, within, cols, n_cols),
            *(raw, dy, scale, factor, mean, ROUNDING),
        )
        if NEED_DWEIGHT:
            dw += share
        if BLOCK_REST > 0:
            share = _gradient(
                *(dx_ptr, dr_ptr, y_ptr, dx_at, within, rest, n_cols),
                *(raw_rest, dy_rest, scale_rest, factor, mean, ROUNDING),
            )
            if NEED_DWEIGHT:
                dw_rest += share
    if NEED_DWEIGHT:
        at = dw_ptr + tl.program_id(0).to(tl.int64) * n_cols
        tl.store(at + cols, tl.sum(dw, axis=0), mask=cols < n_cols)
        if BLOCK_REST > 0:
            tl.store(at + rest, tl.sum(dw_rest, axis=0), mask=rest < n_cols)


@triton.jit
def _total(
    partial_ptr,
    out_ptr,
    partial2_ptr,
    out2_ptr,
    n_rows,
    n_cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Sums of columns of one table, or of two alike, in a fixed order, rounded once. Per element of partial: read once;
    BLOCK_COLS are a sector of 32 bytes in narrow tables, so that these too give several programs, else two."""
    if tl.program_id(1) > 0:
        partial_ptr, out_ptr = partial2_ptr, out2_ptr
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, n_rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < n_rows)[:, None] & (cols < n_cols)[None, :]
        total += tl.load(partial_ptr + row[:, None] * n_cols + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=cols < n_cols)


def total(tables: Sequence[Tensor], likes: Sequence[Tensor]) -> list[Tensor]:
    """The column sums of one or two float32 tables [n, m] of one size, each like a weight [m]."""
    sums = [torch.empty_like(w) for w in likes]
    (n_rows, n_cols), narrow = tables[0].shape, tables[0].shape[1] <= 1024
    launch(
        _total,
        (triton.cdiv(n_cols, 8 if narrow else 16), len(tables)),
        tables[0],
        sums[0],
        tables[-1],
        sums[-1],
        n_rows,
        n_cols,
        BLOCK_ROWS=128 if narrow else 64,
        BLOCK_COLS=8 if narrow else 16,
    )
    return sums


TILE = 2048
"""Elements that a program works on at a time, if a row has at most a quarter of them; see the kernels."""


def _rows(block_cols: int) -> int:
    """Of a tile."""
    return TILE // block_cols if block_cols <= TILE // 4 else 1


def _forward_warps(n_cols: int) -> int:
    """One for each 512 elements of a row. (Twice as many took 4% longer for rows of 576, and 8% for 2304.)"""
    return 4 if n_cols <= TILE // 4 else min(triton.next_power_of_2(n_cols // 512 + 1) // 2, 8)


def _parts(n_cols: int) -> tuple[int, int]:
    """(BLOCK_COLS, BLOCK_REST) of the backward.

    A block has a power of two elements, so that one for a row of 2304 would be idle by nearly a half. Rows of more than
    512 are taken as two blocks if these have less than three quarters of the elements of one. So are all of more than
    8192, where the one would not fit the registers. (Rows of 2880 and 3072 measured alike in both ways, 1536 slower in
    two, 2304 and 5120 faster by 7 to 13%, 12288 by 30%.)
    """
    whole = triton.next_power_of_2(n_cols)
    first = whole // 2
    rest = triton.next_power_of_2(max(n_cols - first, 1))
    if n_cols <= TILE // 4 or first + rest >= (whole if whole > 8192 else whole * 3 // 4):
        return whole, 0
    return first, rest


REGISTERS, SHARED = 65536, 200 << 10
"""Of a multiprocessor: 32-bit registers, and bytes of memory that its programs may load ahead into."""


def _backward_plan(tile: int, loads: int, size: int) -> tuple[bool, int, int, int]:
    """(WIDE, warps of a program, programs that a multiprocessor holds, STAGES) for tiles of `tile` elements, of which
    `loads` tensors are read that have `size` bytes an element.

    Few warps with many elements each measured fastest: their sums need the fewest exchanges. A thread has about four
    registers for an element (dy, x, the weight and its gradient) and 60 for the rest; beyond 6144 elements, 4 warps
    have too few, and one program of 16 or 32 takes all that there are.
    """
    if tile > 6144:
        warps, programs = 16 if tile <= 16384 else 32, 1
    else:
        warps, programs = 4, max(REGISTERS // (128 * (4 * max(tile // 128, 1) + 60)), 1)
    wide = tile > 8192
    buffers = SHARED // ((loads + wide) * tile * size * programs)
    return wide, warps, programs, 1 + min(buffers, 2)


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
    guard: str = "add",
    divisor: float | None = None,
) -> None:
    """Writes y, and h = x + residual if there is one; else a residual is added to y."""
    if x.numel() == 0:
        return
    (_, n1, n2), (xs, ys), (x, out) = _addressed(x, y)
    n_cols = x.shape[-1]
    n_rows = x.numel() // n_cols
    block_cols = triton.next_power_of_2(n_cols)
    block_rows = _rows(block_cols)
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
        divisor,
        GUARD=_GUARDS[guard],
        ROUNDING=_ROUNDINGS[rounding],
        HAS_WEIGHT=weight is not None,
        ADD_AFTER=residual is not None and h is None,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        num_warps=_forward_warps(n_cols),
    )
    if out is not y:
        y.copy_(out)


def forward(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    rounding: str = "normed",
    guard: str = "add",
    divisor: float | None = None,
) -> Tensor:
    y = torch.empty_like(x, dtype=out_dtype(x, weight, rounding))
    _run_forward(x, None, weight, eps, offset, rounding, y, None, guard, divisor)
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
    guard: str = "add",
    divisor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(dx, dweight), and y is written again if there is one."""
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(weight) if need_dweight else x.new_empty(0)
    dy, *more = dys
    (_, n1, n2), (ds, xs, os), (dy, x, out) = _addressed(dy, x, dx)
    n_cols = x.shape[-1]
    n_rows = x.numel() // n_cols
    block_cols, block_rest = _parts(n_cols)
    block_rows = _rows(block_cols)
    tile = block_rows * (block_cols + block_rest)
    loads = 2 + len(more) + (dresidual is not None)
    wide, warps, resident, stages = _backward_plan(tile, loads, x.element_size())
    if wide and y is not None:  # whose registers are not there
        _run_forward(x, None, weight, eps, offset, rounding, y, None)
        y = None
    programs = least(triton.cdiv(n_rows, block_rows), multiprocessors(x.device) * resident)
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
        divisor,
        GUARD=_GUARDS[guard],
        ROUNDING=_ROUNDINGS[rounding],
        HAS_WEIGHT=weight is not None,
        NEED_DWEIGHT=need_dweight,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        BLOCK_REST=block_rest,
        WIDE=wide,
        STAGES=stages,
        num_warps=warps,
    )
    if out is not dx:
        dx.copy_(out)
    if not need_dweight:
        return dx, partial
    return dx, *total([partial], [weight])


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    rounding: str,
    need_dweight: bool,
    guard: str = "add",
    divisor: float | None = None,
) -> tuple[Tensor, Tensor]:
    return _run_backward((dy,), x, weight, None, eps, offset, rounding, need_dweight, None, guard, divisor)


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
