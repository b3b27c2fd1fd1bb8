"""Cross-entropy of rows of logits, loss and gradient in one kernel. See `ops/linear_cross_entropy.py` for the maths."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 2048, 4
BLOCK_TWICE, WARPS_TWICE = 4096, 16
"""A row is taken in blocks: of 16 elements a thread where it is read once; where it is read twice, with more warps to
a row, since fewer rows in flight leave more of each in L2 until its second reading."""


@triton.jit
def _rounded(x, WORK: tl.constexpr):
    return x.to(WORK).to(tl.float32)


@triton.jit
def _transform(x, scale, divisor, softcap, WORK: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """z and dz/dx of x, float32, each step rounded to WORK as the model's separate operations are."""
    slope = tl.full(x.shape, 1.0, tl.float32)
    if SCALED:
        by, over = tl.cast(scale, tl.float32), tl.cast(divisor, tl.float32)
        x = _rounded(tl.div_rn(_rounded(x * by, WORK), over), WORK)
        slope = slope * by / over
    if CAPPED:
        cap = tl.cast(softcap, tl.float32)
        u = _rounded(tl.div_rn(x, cap), WORK)
        e = tl.exp(-2.0 * tl.abs(u))
        t = _rounded(tl.where(u < 0, e - 1.0, 1.0 - e) / (1.0 + e), WORK)
        x = _rounded(t * cap, WORK)
        slope = slope * (1.0 - t * t)
    return x, slope


@triton.jit
def _rows(
    logits_ptr,
    target_ptr,
    loss_ptr,
    row_stride,
    n_cols,
    ignore_index,
    scale,
    divisor,
    softcap,
    WORK: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """loss = log sum exp(z) - z[target], z the transformed row; the row becomes d(loss)/d(row) in place if GRADIENT.

    Per element: two reads and one write (one read without GRADIENT); the second read follows a row (256 KB for 128k
    classes in half precision) later, so most of it comes from L2. Ignored rows are written as zeros and not read.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    at = logits_ptr + row * row_stride
    i = tl.arange(0, BLOCK)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, n_cols, BLOCK):
                cols = start + i
                tl.store(at + cols, tl.zeros((BLOCK,), logits_ptr.dtype.element_ty), mask=cols < n_cols)
        return
    # Read before the reductions below, whose barrier keeps other warps from writing the gradient over it first.
    inside = (target >= 0) & (target < n_cols)
    chosen = tl.load(at + target + tl.arange(0, 1), mask=inside, other=float("nan")).to(tl.float32)
    chosen, _chosen_slope = _transform(chosen, scale, divisor, softcap, WORK, SCALED, CAPPED)
    # A running maximum and sum for each lane; one reduction over lanes at the end.
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_cols, BLOCK):
        cols = start + i
        x = tl.load(at + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        z, _slope = _transform(x, scale, divisor, softcap, WORK, SCALED, CAPPED)
        z = tl.where(cols < n_cols, z, float("-inf"))
        larger = tl.maximum(most, z)
        # Lanes that have seen only -inf keep a sum of 0, without computing inf - inf.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(most - shift) + tl.exp(z - shift)
        most = larger
    peak = tl.max(most, axis=0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    # base and the sum are kept apart: their log, of the size of the largest logit, would be rounded with it.
    total = tl.sum(total * tl.exp(most - base), axis=0)
    tl.store(loss_ptr + row + tl.arange(0, 1), base - chosen + tl.log(total))
    if GRADIENT:
        inverse = 1.0 / total
        for start in range(0, n_cols, BLOCK):
            cols = start + i
            x = tl.load(at + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
            z, slope = _transform(x, scale, divisor, softcap, WORK, SCALED, CAPPED)
            g = (tl.exp(z - base) * inverse - tl.where(cols == target, 1.0, 0.0)) * slope
            tl.store(at + cols, g.to(logits_ptr.dtype.element_ty), mask=cols < n_cols)


_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def rows(
    logits: Tensor, target: Tensor, ignore_index: int, how: tuple[float, float, float, bool], gradient: bool
) -> Tensor:
    """The loss of each row of logits [n, V], float32; the logits become their own gradient if `gradient`.

    `how` is (scale, divisor, softcap, wide), the transform between the linear layer and the loss.
    """
    n, vocabulary = logits.shape
    losses = logits.new_empty(n, dtype=torch.float32)
    if n == 0:
        return losses
    scale, divisor, softcap, wide = how
    block, warps = (BLOCK_TWICE, WARPS_TWICE) if gradient else (BLOCK, WARPS)
    block = min(triton.next_power_of_2(vocabulary), block)
    _rows[(n,)](
        logits,
        target,
        losses,
        logits.stride(0),
        vocabulary,
        ignore_index,
        scale,
        divisor,
        softcap,
        WORK=tl.float32 if wide else _TRITON_DTYPES[logits.dtype],
        SCALED=scale != 1 or divisor != 1,
        CAPPED=softcap > 0,
        GRADIENT=gradient,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), warps),
        enable_fp_fusion=False,  # z - base must be of the rounded z, as base is: at z = 1e3 half an ulp is 3e-5
    )
    return losses
