"""act(gate) * up: kernels and launch heuristics. See `ops/glu.py` for the maths."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.glu import empty_product, halves
from .launch import launch
from .layout import collapse

BLOCK = 2048
WARPS = 8
"""Eight elements a thread: one 16-byte access per operand in half precision, and enough programs for any size."""

SILU, GELU, GELU_TANH, RELU, RELU2 = (tl.constexpr(i) for i in range(5))
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}

APART, GATE_FIRST, UP_FIRST = (tl.constexpr(i) for i in range(3))
"""Where gate and up are: in rows of their own, or alternating in one row that begins with the one or the other."""


@triton.jit
def _tanh(x):
    """tanh by exponentials of a non-positive number, which cannot overflow; within 2 ulp of 1."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _activate(g, alpha, ACTIVATION: tl.constexpr):
    """act(g) and its derivative (of relu and relu2, that for positive g) in float32; what the caller does not use is
    not computed."""
    if ACTIVATION == SILU:
        scaled = tl.cast(alpha, tl.float32) * g
        s = tl.sigmoid(scaled)
        y, slope = g * s, s * (1.0 + scaled * (1.0 - s))
    elif ACTIVATION == RELU:
        y = tl.where(g <= 0.0, 0.0, g)  # a NaN stays one
        slope = tl.full(g.shape, 1.0, tl.float32)
    elif ACTIVATION == RELU2:
        y = tl.where(g <= 0.0, 0.0, g)
        y, slope = y * y, 2.0 * y
    elif ACTIVATION == GELU:
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        y, slope = g * cdf, cdf + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    else:
        t = _tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))
        y = 0.5 * g * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * g * g)
    return y, slope


@triton.jit
def _at(n_cols, BLOCK: tl.constexpr):
    """The row and the columns of this program; a row takes cdiv(n_cols, BLOCK) programs."""
    per_row = tl.cdiv(n_cols, BLOCK)
    row = (tl.program_id(0) // per_row).to(tl.int64)
    cols = (tl.program_id(0) % per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, cols


@triton.jit
def _load(gate_ptr, up_ptr, gate_stride, up_stride, n_cols, PACKING: tl.constexpr, BLOCK: tl.constexpr):
    """This program's gate and up. Where they alternate, they are read as they lie, 16 bytes a thread, and told apart on
    the chip: two loads of every other element would be of 2 bytes, and fetch each sector twice."""
    row, cols = _at(n_cols, BLOCK)
    if PACKING == APART:
        g = tl.load(gate_ptr + row * gate_stride + cols, mask=cols < n_cols, other=0.0)
        u = tl.load(up_ptr + row * up_stride + cols, mask=cols < n_cols, other=0.0)
    else:
        both = _both(BLOCK)
        first, second = tl.split(tl.reshape(tl.load(gate_ptr + both, mask=both < 2 * n_cols, other=0.0), (BLOCK, 2)))
        g, u = (first, second) if PACKING == GATE_FIRST else (second, first)
    return g, u


@triton.jit
def _both(BLOCK: tl.constexpr):
    """Where this program's gates and ups lie, of one row in which they alternate."""
    return tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)


@triton.jit
def _rounded(x, like, WIDE: tl.constexpr):
    """float32 x, rounded to the dtype of `like` unless the unit is computed in float32 throughout."""
    return x if WIDE else x.to(like.dtype).to(tl.float32)


@triton.jit
def _factors(g, u, gate_scale, limit, up_offset, PLAIN: tl.constexpr, WIDE: tl.constexpr):
    """What the activation is taken of, and what multiplies it, in float32, rounded as the model does."""
    gate, up = g.to(tl.float32), u.to(tl.float32)
    if not PLAIN:
        gate = _rounded(gate * tl.cast(gate_scale, tl.float32), g, WIDE)
        if limit is not None:
            most = tl.cast(limit, tl.float32)
            gate = _rounded(tl.where(gate > most, most, gate), g, WIDE)  # a NaN stays one
            up = tl.where(up > most, most, tl.where(up < -most, -most, up))
        up = _rounded(up + tl.cast(up_offset, tl.float32), u, WIDE)
    return gate, up


@triton.jit
def _glu(
    gate_ptr,
    up_ptr,
    y_ptr,
    n_cols,
    gate_stride,
    up_stride,
    y_stride,
    gate_scale,
    limit,
    alpha,
    up_offset,
    ACTIVATION: tl.constexpr,
    PLAIN: tl.constexpr,
    WIDE: tl.constexpr,
    PACKING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = act(gate) * up. Per element: gate and up read once, y written once."""
    row, cols = _at(n_cols, BLOCK)
    mask = cols < n_cols
    g, u = _load(gate_ptr, up_ptr, gate_stride, up_stride, n_cols, PACKING, BLOCK)
    gate, up = _factors(g, u, gate_scale, limit, up_offset, PLAIN, WIDE)
    activated, _slope = _activate(gate, alpha, ACTIVATION)
    y = _rounded(activated, g, WIDE) * up
    tl.store(y_ptr + row * y_stride + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu_backward(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    y_ptr,
    n_cols,
    dy_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    y_stride,
    gate_scale,
    limit,
    alpha,
    up_offset,
    ACTIVATION: tl.constexpr,
    PLAIN: tl.constexpr,
    WIDE: tl.constexpr,
    PACKING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dgate = dy * up * act'(gate), dup = dy * act(gate), and y as `_glu` makes it, unless y_ptr is None. Per element:
    three reads, two or three writes."""
    row, cols = _at(n_cols, BLOCK)
    mask = cols < n_cols
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    g, u = _load(gate_ptr, up_ptr, gate_stride, up_stride, n_cols, PACKING, BLOCK)
    gate, up = _factors(g, u, gate_scale, limit, up_offset, PLAIN, WIDE)
    activated, slope = _activate(gate, alpha, ACTIVATION)
    dgate = dy * up * slope
    activated = _rounded(activated, g, WIDE)
    dup = dy * activated
    if y_ptr is not None:
        tl.store(y_ptr + row * y_stride + cols, (activated * up).to(y_ptr.dtype.element_ty), mask=mask)
    if ACTIVATION == RELU or ACTIVATION == RELU2:  # noqa: SIM109
        # Chosen, not multiplied: a zero also where up is not finite.
        dgate = tl.where(gate <= 0.0, 0.0, dgate)
    if not PLAIN:
        dgate *= tl.cast(gate_scale, tl.float32)
        if limit is not None:  # what a clamp stops has no gradient, nor has a NaN that it lets through
            most = tl.cast(limit, tl.float32)
            scaled = _rounded(g.to(tl.float32) * tl.cast(gate_scale, tl.float32), g, WIDE)
            dgate = tl.where(scaled <= most, dgate, 0.0)
            dup = tl.where(tl.abs(u.to(tl.float32)) <= most, dup, 0.0)
    dgate, dup = dgate.to(dgate_ptr.dtype.element_ty), dup.to(dup_ptr.dtype.element_ty)
    if PACKING == APART:
        tl.store(dgate_ptr + row * dgate_stride + cols, dgate, mask=mask)
        tl.store(dup_ptr + row * dup_stride + cols, dup, mask=mask)
    else:
        both = _both(BLOCK)
        pairs = tl.interleave(dgate, dup) if PACKING == GATE_FIRST else tl.interleave(dup, dgate)
        tl.store(dgate_ptr + both, pairs, mask=both < 2 * n_cols)


def _matrix(*tensors: Tensor) -> tuple[int, int, list[int], tuple[Tensor, ...]]:
    """(rows, columns, row strides, tensors): one row if everything is contiguous; copies where rows do not suffice."""
    sizes, strides = collapse(tensors[0].shape, *(t.stride() for t in tensors))
    if not sizes:  # a single element
        return 1, 1, [0] * len(tensors), tensors
    if len(sizes) > 2 or any(s[-1] != 1 for s in strides):
        return _matrix(*(t.contiguous() for t in tensors))
    n_rows = sizes[0] if len(sizes) == 2 else 1
    return n_rows, sizes[-1], [s[0] if len(s) == 2 else 0 for s in strides], tensors


def _how(
    activation: str, gate_scale: float, limit: float | None, alpha: float, up_offset: float, wide: bool
) -> dict[str, Any]:
    """The arguments of a kernel that say which unit it is. The plain one, without clamps, scale and offset, is compiled
    by itself; those of the others are not compiled in, but `alpha`, a factor where there are exponentials, never is."""
    plain = gate_scale == 1 and limit is None and up_offset == 0
    return {
        "gate_scale": float(gate_scale),
        "limit": None if limit is None else float(limit),
        "alpha": float(alpha),
        "up_offset": float(up_offset),
        "ACTIVATION": _ACTIVATIONS[activation],
        "PLAIN": plain,
        "WIDE": wide,
        "BLOCK": BLOCK,
        "num_warps": WARPS,
    }


def _run_forward(gate: Tensor, up: Tensor, y: Tensor, how: dict[str, Any]) -> Tensor:
    if y.numel() == 0:
        return y
    n_rows, n_cols, strides, (gate, up, out) = _matrix(gate, up, y)
    launch(_glu, (n_rows * triton.cdiv(n_cols, BLOCK),), gate, up, out, n_cols, *strides, PACKING=APART, **how)
    return out if out is y else y.copy_(out)


def _run_backward(
    dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, y: Tensor | None, how: dict[str, Any]
) -> None:
    if dy.numel() == 0:
        return
    made = (dgate, dup) if y is None else (dgate, dup, y)
    n_rows, n_cols, strides, tensors = _matrix(dy, gate, up, *made)
    if y is None:
        strides, tensors = [*strides, 0], (*tensors, None)
    launch(_glu_backward, (n_rows * triton.cdiv(n_cols, BLOCK),), *tensors, n_cols, *strides, PACKING=APART, **how)
    for wanted, written in zip(made, tensors[3:], strict=False):
        if written is not wanted:
            wanted.copy_(written)


def forward(
    gate: Tensor,
    up: Tensor,
    activation: str = "silu",
    gate_scale: float = 1.0,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    wide: bool = False,
) -> Tensor:
    y = empty_product(gate, up)
    return _run_forward(gate, up, y, _how(activation, gate_scale, limit, alpha, up_offset, wide))


def backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    gate_scale: float = 1.0,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    wide: bool = False,
    again: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    y = empty_product(gate, up) if again else None
    _run_backward(dy, gate, up, dgate, dup, y, _how(activation, gate_scale, limit, alpha, up_offset, wide))
    return dgate, dup, gate.new_empty(0) if y is None else y


def packed_forward(
    x: Tensor,
    activation: str = "silu",
    gate_first: bool = True,
    gate_scale: float = 1.0,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    wide: bool = False,
    interleaved: bool = False,
) -> Tensor:
    how = _how(activation, gate_scale, limit, alpha, up_offset, wide)
    y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    if not interleaved:
        return _run_forward(*halves(x, gate_first), y, how)
    if y.numel():
        x, n = x.contiguous(), y.numel()
        packing = GATE_FIRST if gate_first else UP_FIRST
        launch(_glu, (triton.cdiv(n, BLOCK),), x, x, y, n, 0, 0, 0, PACKING=packing, **how)
    return y


def packed_backward(
    dy: Tensor,
    x: Tensor,
    activation: str,
    gate_first: bool,
    gate_scale: float = 1.0,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    wide: bool = False,
    interleaved: bool = False,
    again: bool = False,
) -> tuple[Tensor, Tensor]:
    how = _how(activation, gate_scale, limit, alpha, up_offset, wide)
    dx = torch.empty_like(x)
    y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2)) if again else None
    if not interleaved:
        _run_backward(dy, *halves(x, gate_first), *halves(dx, gate_first), y, how)
    elif x.numel():
        dy, x, n = dy.contiguous(), x.contiguous(), dy.numel()
        out = dx if dx.is_contiguous() else torch.empty_like(x)
        packing = GATE_FIRST if gate_first else UP_FIRST
        strides = (0,) * 6
        launch(_glu_backward, (triton.cdiv(n, BLOCK),), dy, x, x, out, out, y, n, *strides, PACKING=packing, **how)
        dx = out if out is dx else dx.copy_(out)
    return dx, x.new_empty(0) if y is None else y
