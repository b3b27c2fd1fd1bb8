"""Scaling a float32 matrix by a number on the device, rounding once. See `ops/chunked_loss.py` for its use."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
WARPS = 4
"""16 elements a thread, in vectors of 16 bytes, and programs small enough to hide each other's latency."""


@triton.jit
def _scaled(x_ptr, scale_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """out = x * scale. Per element: x read once, mostly from L2 (a matrix product has just written it), out written."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0)
    tl.store(out_ptr + i, (x * tl.load(scale_ptr)).to(out_ptr.dtype.element_ty), mask=i < size)


def scaled(x: Tensor, scale: Tensor, out: Tensor) -> None:
    """Writes x * scale into `out`; x and `out` are contiguous, of one size; x and scale, one value, are float32."""
    if x.numel():
        _scaled[(triton.cdiv(x.numel(), BLOCK),)](x, scale, out, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
