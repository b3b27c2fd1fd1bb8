"""The gradient of an embedding's weight: kernels and launch heuristics. See `ops/embedding.py` for the maths.

Tokens come sorted. A program takes ROWS consecutive places and some columns, and adds up the runs of equal tokens among
them. A run that lies within is a row of the result, and written at once. What belongs to a run that goes on before or
behind is left in a buffer, a row for each end of a block, which a second kernel adds up. Every sum has one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32
"""Places a program takes: a few microseconds of loads in a row, and at 8192 tokens enough programs for an H100."""
BLOCK = 1024


@triton.jit
def _token(token_ptr, q, n):
    """The token at place q; -2 before the first and behind the last, which is no token."""
    return tl.load(token_ptr + q, mask=(q >= 0) & (q < n), other=-2)


@triton.jit
def _runs(
    dy_ptr, token_ptr, order_ptr, out_ptr, ends_ptr, n, width, row_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[token] of the runs within a block of places; ends [blocks, 2, width] of its first and last run, where cut.

    Per element of dy: a read; per element of a row of the result: a write. Negative tokens are left out.
    """
    block = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = k < width
    first = block * ROWS
    last = tl.minimum(first + ROWS, n) - 1
    total = tl.zeros((BLOCK,), tl.float32)
    started = first
    for q in range(first, last + 1):
        token = _token(token_ptr, q, n)
        i = tl.load(order_ptr + q)
        total += tl.load(dy_ptr + i * row_stride + k, mask=mask & (token >= 0), other=0.0).to(tl.float32)
        if (token != _token(token_ptr, q + 1, n)) | (q == last):
            before = (started == first) & (token == _token(token_ptr, first - 1, n))
            behind = (q == last) & (token == _token(token_ptr, q + 1, n))
            if token >= 0:
                if before | behind:
                    end = tl.where(before, 0, 1)
                    tl.store(ends_ptr + (block.to(tl.int64) * 2 + end) * width + k, total, mask=mask)
                else:
                    at = out_ptr + token.to(tl.int64) * width + k
                    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=mask)
            total = tl.zeros((BLOCK,), tl.float32)
            started = q + 1


@triton.jit
def _long_runs(token_ptr, out_ptr, ends_ptr, n, width, ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """out[token] of the run that begins in a block and goes on behind it.

    Per element of a row of `ends` that such a run left: a read, GROUP of them at a time.
    """
    block = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = k < width
    first = block * ROWS
    behind = first + ROWS
    token = _token(token_ptr, behind - 1, n)
    begins = (token != _token(token_ptr, first, n)) | (token != _token(token_ptr, first - 1, n))
    if (token >= 0) & (token == _token(token_ptr, behind, n)) & begins:
        total = tl.load(ends_ptr + (block.to(tl.int64) * 2 + 1) * width + k, mask=mask, other=0.0)
        while token == _token(token_ptr, behind, n):
            later = block + 1 + tl.arange(0, GROUP)
            same = _token(token_ptr, later * ROWS, n) == token
            at = ends_ptr + later.to(tl.int64)[:, None] * 2 * width + k[None, :]
            total += tl.sum(tl.load(at, mask=same[:, None] & mask[None, :], other=0.0), 0)
            block += GROUP
            behind += GROUP * ROWS
        at = out_ptr + token.to(tl.int64) * width + k
        tl.store(at, total.to(out_ptr.dtype.element_ty), mask=mask)


def backward(dy: Tensor, token: Tensor, order: Tensor, out: Tensor) -> None:
    """Writes the rows of `out` [V, H] that occur, from dy [N, H] and the tokens int32 [N], sorted, negative ones first
    or last; `order`, int64 [N], says which row of dy each is of."""
    n, width = dy.shape
    if n == 0 or width == 0:
        return
    grid = triton.cdiv(n, ROWS), triton.cdiv(width, BLOCK)
    ends = torch.empty((grid[0], 2, width), dtype=torch.float32, device=dy.device)
    size = {"ROWS": ROWS, "BLOCK": min(BLOCK, triton.next_power_of_2(width)), "num_warps": 4}
    _runs[grid](dy, token, order, out, ends, n, width, dy.stride(0), **size)
    _long_runs[grid](token, out, ends, n, width, GROUP=8, **size)
