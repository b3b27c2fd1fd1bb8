"""act(gate) * up: kernels and launch heuristics. See `ops/glu.py` for the maths."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import collapse

BLOCK = 2048
WARPS = 8
"""Eight elements a thread: one 16-byte access per operand in half precision, and enough programs for any size."""

SILU, GELU, GELU_TANH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit
def _tanh(x):
    """tanh by exponentials of a non-positive number, which cannot overflow; within 2 ulp of 1."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _activate(g, ACTIVATION: tl.constexpr):
    """act(g) and its derivative in float32; what the caller does not use is not computed."""
    if ACTIVATION == SILU:
        s = tl.sigmoid(g)
        y, slope = g * s, s * (1.0 + g * (1.0 - s))
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
def _forward(
    gate_ptr,
    up_ptr,
    y_ptr,
    n_cols,
    gate_stride,
    up_stride,
    y_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = act(gate) * up. Per element: gate and up read once, y written once."""
    row, cols = _at(n_cols, BLOCK)
    mask = cols < n_cols
    g = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0)
    u = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0)
    activated, _slope = _activate(g.to(tl.float32), ACTIVATION)
    y = activated.to(g.dtype).to(tl.float32) * u.to(tl.float32)
    tl.store(y_ptr + row * y_stride + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    n_cols,
    dy_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dgate = dy * up * act'(gate), dup = dy * act(gate). Per element: three reads, two writes."""
    row, cols = _at(n_cols, BLOCK)
    mask = cols < n_cols
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0)
    u = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    activated, slope = _activate(g.to(tl.float32), ACTIVATION)
    dup = dy * activated.to(g.dtype).to(tl.float32)
    tl.store(dgate_ptr + row * dgate_stride + cols, (dy * u * slope).to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + row * dup_stride + cols, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def _matrix(*tensors: Tensor) -> tuple[int, int, list[int], tuple[Tensor, ...]]:
    """(rows, columns, row strides, tensors): one row if everything is contiguous; copies where rows do not suffice."""
    for attempt in (tensors, tuple(t.contiguous() for t in tensors)):
        sizes, strides = collapse(attempt[0].shape, *(t.stride() for t in attempt))
        if not sizes:  # a single element
            return 1, 1, [0] * len(attempt), attempt
        if len(sizes) <= 2 and all(s[-1] == 1 for s in strides):
            n_rows = sizes[0] if len(sizes) == 2 else 1
            return n_rows, sizes[-1], [s[0] if len(s) == 2 else 0 for s in strides], attempt
    raise AssertionError("contiguous tensors of one shape are one row")


def _run_forward(gate: Tensor, up: Tensor, y: Tensor, activation: str) -> Tensor:
    if y.numel() == 0:
        return y
    n_rows, n_cols, strides, (gate, up, out) = _matrix(gate, up, y)
    _forward[(n_rows * triton.cdiv(n_cols, BLOCK),)](
        gate, up, out, n_cols, *strides, ACTIVATION=_ACTIVATIONS[activation], BLOCK=BLOCK, num_warps=WARPS
    )
    return out if out is y else y.copy_(out)


def _run_backward(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, activation: str) -> None:
    if dy.numel() == 0:
        return
    n_rows, n_cols, strides, tensors = _matrix(dy, gate, up, dgate, dup)
    _backward[(n_rows * triton.cdiv(n_cols, BLOCK),)](
        *tensors, n_cols, *strides, ACTIVATION=_ACTIVATIONS[activation], BLOCK=BLOCK, num_warps=WARPS
    )
    for wanted, written in zip((dgate, dup), tensors[3:], strict=True):
        if written is not wanted:
            wanted.copy_(written)


def forward(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    return _run_forward(gate, up, torch.empty_like(gate), activation)


def backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _run_backward(dy, gate, up, dgate, dup, activation)
    return dgate, dup


def _halves(x: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


def packed_forward(x: Tensor, activation: str = "silu", gate_first: bool = True) -> Tensor:
    gate, up = _halves(x, gate_first)
    return _run_forward(gate, up, x.new_empty(gate.shape), activation)


def packed_backward(dy: Tensor, x: Tensor, activation: str, gate_first: bool) -> Tensor:
    dx = torch.empty_like(x)
    _run_backward(dy, *_halves(x, gate_first), *_halves(dx, gate_first), activation)
    return dx
