"""Cross-entropy of rows of logits, loss and gradient in one kernel. See `ops/chunked_loss.py` for the maths."""

from __future__ import annotations

from typing import Any

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
    """z, and dz/dx but for scale / divisor, of x, float32, each step rounded to WORK as the model's operations are."""
    slope = tl.full(x.shape, 1.0, tl.float32)
    if SCALED:
        by, over = tl.cast(scale, tl.float32), tl.cast(divisor, tl.float32)
        x = _rounded(tl.div_rn(_rounded(x * by, WORK), over), WORK)
    if CAPPED:
        cap = tl.cast(softcap, tl.float32)
        u = _rounded(tl.div_rn(x, cap), WORK)
        e = tl.exp(-2.0 * tl.abs(u))
        t = _rounded(tl.where(u < 0, e - 1.0, 1.0 - e) / (1.0 + e), WORK)
        x = _rounded(t * cap, WORK)
        slope = 1.0 - t * t
    return x, slope


@triton.jit
def _rows(
    logits_ptr,
    target_ptr,
    given_ptr,
    loss_ptr,
    most_ptr,
    total_ptr,
    row_stride,
    n_cols,
    ignore_index,
    scale,
    divisor,
    softcap,
    smoothing,
    WORK: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    GIVEN: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """loss = log sum exp(z) - z[target] (or smoothed), z the transformed row. With GRADIENT the row becomes
    given d(loss)/d(row) divisor / scale in place; without it the largest z and the sum of exp(z - largest) are written.

    Per element: two reads and one write (one read without GRADIENT); the second read follows a row (256 KB for 128k
    classes in half precision) later, so most of it comes from L2. With GRADIENT, ignored rows are written as zeros and
    not read.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    at = logits_ptr + row * row_stride
    i = tl.arange(0, BLOCK)
    one = tl.arange(0, 1)
    if GRADIENT and target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        for start in range(0, n_cols, BLOCK):
            cols = start + i
            tl.store(at + cols, tl.zeros((BLOCK,), logits_ptr.dtype.element_ty), mask=cols < n_cols)
        return
    # Read before the reductions below, whose barrier keeps other warps from writing the gradient over it first.
    inside = (target >= 0) & (target < n_cols)
    chosen = tl.load(at + target + one, mask=inside, other=float("nan")).to(tl.float32)
    chosen, _chosen_slope = _transform(chosen, scale, divisor, softcap, WORK, SCALED, CAPPED)
    # A running maximum and sum for each lane; one reduction over lanes at the end.
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_cols, BLOCK):
        cols = start + i
        x = tl.load(at + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        z, _slope = _transform(x, scale, divisor, softcap, WORK, SCALED, CAPPED)
        if SMOOTHED:
            plain += tl.where(cols < n_cols, z, 0.0)
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
    loss = base - chosen + tl.log(total)
    smooth = tl.cast(smoothing, tl.float32)
    if SMOOTHED:
        loss = (1.0 - smooth) * loss + smooth * (base - tl.sum(plain, axis=0) / n_cols + tl.log(total))
    tl.store(loss_ptr + row + one, tl.where(target == ignore_index, 0.0, loss))
    if GRADIENT:
        given = 1.0
        if GIVEN:
            given = tl.load(given_ptr + row).to(tl.float32)
        inverse = 1.0 / total
        for start in range(0, n_cols, BLOCK):
            cols = start + i
            x = tl.load(at + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
            z, slope = _transform(x, scale, divisor, softcap, WORK, SCALED, CAPPED)
            g = tl.exp(z - base) * inverse - tl.where(cols == target, 1.0 - smooth, 0.0)
            if SMOOTHED:
                g -= smooth / n_cols
            tl.store(at + cols, (g * slope * given).to(logits_ptr.dtype.element_ty), mask=cols < n_cols)
    else:
        tl.store(most_ptr + row, base)
        tl.store(total_ptr + row, total)


@triton.jit
def _row_gradients(
    logits_ptr,
    target_ptr,
    most_ptr,
    total_ptr,
    of_lse_ptr,
    of_label_ptr,
    out_ptr,
    row_stride,
    out_stride,
    n_cols,
    column,
    columns,
    scale,
    divisor,
    softcap,
    smoothing,
    WORK: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = (of_lse softmax(z) - of_label smoothed label) dz/dx divisor / scale, of some columns of each row.

    Per element: a read and a write; rows of which neither is wanted are written as zeros and not read.
    """
    row = tl.program_id(0).to(tl.int64)
    here = row + tl.arange(0, 1)
    of_lse, of_label = tl.load(of_lse_ptr + here).to(tl.float32), tl.load(of_label_ptr + here).to(tl.float32)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < columns
    wanted = (of_lse != 0) | (of_label != 0)
    x = tl.load(logits_ptr + row * row_stride + column + cols, mask=inside & wanted, other=0.0).to(tl.float32)
    z, slope = _transform(x, scale, divisor, softcap, WORK, SCALED, CAPPED)
    smooth = tl.cast(smoothing, tl.float32)
    g = tl.exp(z - tl.load(most_ptr + row)) * (of_lse / tl.load(total_ptr + row))
    g -= of_label * (tl.where(column + cols == tl.load(target_ptr + row), 1.0 - smooth, 0.0) + smooth / n_cols)
    g = tl.where(wanted, g * slope, 0.0)
    tl.store(out_ptr + row * out_stride + cols, g.to(out_ptr.dtype.element_ty), mask=inside)


_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _transformed(logits: Tensor, scale: float, divisor: float, softcap: float, wide: bool) -> dict[str, Any]:
    return {
        "WORK": tl.float32 if wide else _TRITON_DTYPES[logits.dtype],
        "SCALED": scale != 1 or divisor != 1,
        "CAPPED": softcap > 0,
        "enable_fp_fusion": False,  # z - base must be of the rounded z, as base is: at z = 1e3 half an ulp is 3e-5
    }


def rows(
    logits: Tensor,
    target: Tensor,
    given: Tensor | None,
    ignore_index: int,
    how: tuple[float, float, float, bool, float],
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.chunked_loss._reference_rows`. With `gradient`, largest and sum are not written.

    `how` is (scale, divisor, softcap, wide, smoothing), the transform between the linear layer and the loss.
    """
    n, vocabulary = logits.shape
    losses, most, total = logits.new_empty((3, n), dtype=torch.float32)
    if n == 0:
        return losses, most, total
    scale, divisor, softcap, wide, smoothing = how
    block, warps = (BLOCK_TWICE, WARPS_TWICE) if gradient else (BLOCK, WARPS)
    block = min(triton.next_power_of_2(vocabulary), block)
    _rows[(n,)](
        *(logits, target, losses if given is None else given, losses, most, total, logits.stride(0), vocabulary),
        *(ignore_index, scale, divisor, softcap, smoothing),
        SMOOTHED=smoothing > 0,
        GIVEN=given is not None,
        GRADIENT=gradient,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), warps),
        **_transformed(logits, scale, divisor, softcap, wide),
    )
    return losses, most, total


def row_gradients(
    logits: Tensor,
    target: Tensor,
    most: Tensor,
    total: Tensor,
    of_lse: Tensor,
    of_label: Tensor,
    how: tuple[float, float, float, bool, float],
    column: int,
    out: Tensor,
) -> None:
    """See `ops.chunked_loss._reference_row_gradients`."""
    n, columns = out.shape
    scale, divisor, softcap, wide, smoothing = how
    block = min(triton.next_power_of_2(columns), BLOCK)
    if n:
        _row_gradients[(n, triton.cdiv(columns, block))](
            *(logits, target, most, total, of_lse, of_label, out, logits.stride(0), out.stride(0)),
            *(logits.shape[1], column, columns, scale, divisor, softcap, smoothing),
            BLOCK=block,
            num_warps=min(max(block // 256, 1), WARPS),
            **_transformed(logits, scale, divisor, softcap, wide),
        )
