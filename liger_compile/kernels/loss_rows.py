"""Linear + cross-entropy whose logits are never stored: the product's epilogue writes exponentials instead.

For row i, label y, logits z = h W^T (transformed), and a shift c close to the row's largest logit,

    E_ij = exp(z_ij - c_i) dz_ij, E_iy = 0;  s_i = sum_{j != y} exp(z_ij - c_i)            a product, `exponentials`
    t_i = s_i + exp(z_iy - c_i);  l_i = c_i + log t_i;  loss_i = l_i - z_iy;  g_i = -s_i / t_i dz_iy       `_finish`
    dhidden_i = a_i (E W)_i / t_i + a_i g_i W_y;  dweight_y = (E^T (a h / t))_y + sum_{i of y} a_i g_i h_i
                                                                          two products, `gradients`; `_label_sums`

with a_i the gradient of the row's loss and dz the derivative of the transform. Where l_i^2 has a gradient v_i too, b_i
= 2 v_i l_i is added to the first a_i, and b_i dz_iy - s_i / t_i (a_i + b_i) dz_iy stands for a_i g_i. Nothing of the
size of the logits is read or written but E, once by the first product and once by each of the others: the softmax costs
no pass of its own.
E is rounded as the gradient of the logits is in eager. The logits are not rounded, and neither are the labels' terms,
which are most of the gradient of an untrained model. In a trained one they nearly cancel with E's share at frequent
labels, so that rounding sums of that would show: `_add_product` adds it in float32 for the most frequent ones.

Rows whose label is ignored are left out: `order` names those that count, by label, `total` says how many, and every
kernel takes its share of a chunk's n rows from there, on the device. "The row at q" is the q-th in that order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .loss_products import BLOCK_M, LOG2E, VARYING, exponential, share, transform

FINISH_ROWS = 16
"""Rows a program of `_finish` takes: enough to read partial sums in lines of 64 bytes, few enough to use all SMs."""
LARGEST = tl.constexpr(2.0**100)
"""A sum of exponentials above this may have lost terms to overflow, and the row is done again with another shift."""


@triton.jit(do_not_specialize=VARYING)
def _gather(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    label_ptr,
    order_ptr,
    total_ptr,
    guess_ptr,
    rows_ptr,
    chosen_ptr,
    shift_ptr,
    first,
    n,
    space,
    width,
    classes,
    hidden_row,
    hidden_col,
    weight_row,
    factor,
    softcap,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row that counts: copied into the chunk; its label's logit and its shift, both times log2(e).

    Per element: a read of hidden and of the label's row of weight, a write. Rows that fill up the last block of a
    product are written as zeros.
    """
    r = tl.program_id(0)
    count = share(total_ptr, first, n)
    if r >= tl.cdiv(tl.maximum(count, 1), BM) * BM:
        return
    live = r < count
    i = tl.load(order_ptr + first + r, mask=live, other=0)
    label = tl.load(label_ptr + first + r, mask=live, other=0).to(tl.int64)
    inside = live & (label >= 0) & (label < classes)
    dot = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        h = tl.load(hidden_ptr + i * hidden_row + k * hidden_col, mask=(k < width) & live, other=0.0)
        w = tl.load(weight_ptr + label * weight_row + k, mask=(k < width) & inside, other=0.0)
        dot += h.to(tl.float32) * w.to(tl.float32)
        tl.store(rows_ptr + r.to(tl.int64) * width + k, h, mask=(k < width) & (r < space))
    at = tl.arange(0, 1)
    x = tl.sum(dot, 0) + tl.zeros((1,), tl.float32)
    if BIASED:
        x += tl.load(bias_ptr + label + at, mask=inside, other=0.0).to(tl.float32)
    z, _slope = transform(tl.where(inside, x, float("nan")), factor, softcap, CAPPED)
    guess, _slope = transform(tl.load(guess_ptr + i + at, mask=live, other=0.0), factor, softcap, CAPPED)
    tl.store(chosen_ptr + r + at, tl.where(live, z * LOG2E, 0.0))
    tl.store(shift_ptr + r + at, tl.where(live, tl.maximum(z, guess) * LOG2E, 0.0))


@triton.jit
def _logits(
    rows_ptr, weight_ptr, r, v, width, classes, weight_row, ROWS: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr
):
    """A block of logits without the bias, computed slowly."""
    x = tl.zeros((ROWS, BLOCK), tl.float32)
    cols = v + tl.arange(0, BLOCK)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        h = tl.load(rows_ptr + r.to(tl.int64)[:, None] * width + k[None, :], mask=k[None, :] < width, other=0.0)
        at = weight_ptr + cols.to(tl.int64)[None, :] * weight_row + k[:, None]
        w = tl.load(at, mask=(k[:, None] < width) & (cols[None, :] < classes), other=0.0)
        x = tl.dot(h, w, x)
    return x


@triton.jit(do_not_specialize=VARYING)
def _finish(
    rows_ptr,
    weight_ptr,
    bias_ptr,
    label_ptr,
    order_ptr,
    total_ptr,
    chosen_ptr,
    shift_ptr,
    sums_ptr,
    given_ptr,
    squares_ptr,
    e_ptr,
    loss_ptr,
    lse_ptr,
    terms_ptr,
    first,
    n,
    all_rows,
    width,
    classes,
    blocks,
    weight_row,
    e_row,
    given_step,
    factor,
    softcap,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    STORE: tl.constexpr,
    SQUARES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
):
    """The loss of each row and l, to its place among all rows, and its `terms` [2, all rows]: a g and a / t.

    Reads the partial sums, 4 bytes for 256 elements of E. Rows whose exponentials have overflowed, because the largest
    logit is above the shift by more than 69, are computed again around their largest logit: slow, and rare.
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    count = share(total_ptr, first, n)
    if tl.program_id(0) * ROWS >= count:
        return
    live = r < count
    q = first + r
    factor = tl.cast(factor, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    s = tl.zeros((ROWS,), tl.float32)
    for start in range(0, blocks, BLOCK):
        j = start + tl.arange(0, BLOCK)
        at = sums_ptr + j[:, None] * n + r[None, :]
        s += tl.sum(tl.load(at, mask=(j[:, None] < blocks) & live[None, :], other=0.0), 0)
    label = tl.load(label_ptr + q, mask=live, other=-1)
    chosen = tl.load(chosen_ptr + r, mask=live, other=0.0)
    shift = tl.load(shift_ptr + r, mask=live, other=0.0)
    fits = s < LARGEST
    if tl.min(fits.to(tl.int32), 0) == 0:
        best = tl.full((ROWS,), float("-inf"), tl.float32)
        for v in range(0, classes, BLOCK):
            x = _logits(rows_ptr, weight_ptr, r, v, width, classes, weight_row, ROWS, BLOCK, BK)
            cols = v + tl.arange(0, BLOCK)
            if BIASED:
                x += tl.load(bias_ptr + cols, mask=cols < classes, other=0.0).to(tl.float32)[None, :]
            z, _slope = transform(x, factor, softcap, CAPPED)
            best = tl.maximum(best, tl.max(tl.where(cols[None, :] < classes, z, float("-inf")), 1))
        shift = tl.where(fits, shift, best * LOG2E)
        again = tl.zeros((ROWS,), tl.float32)
        for v in range(0, classes, BLOCK):
            x = _logits(rows_ptr, weight_ptr, r, v, width, classes, weight_row, ROWS, BLOCK, BK)
            e, slope = exponential(x, bias_ptr, shift, label, v, classes, factor, softcap, True, BIASED, CAPPED)
            again += tl.sum(e, 1)
            if STORE:
                cols = v + tl.arange(0, BLOCK)
                at = e_ptr + r.to(tl.int64)[:, None] * e_row + cols[None, :]
                mask = (live & (fits == 0))[:, None] & (cols[None, :] < classes)
                tl.store(at, (e * slope).to(e_ptr.dtype.element_ty), mask=mask)
        s = tl.where(fits, s, again)
    t = s + tl.exp2(chosen - shift)
    i = tl.load(order_ptr + q, mask=live, other=0)
    tl.store(loss_ptr + i, (shift - chosen) / LOG2E + tl.log(t), mask=live)
    lse = shift / LOG2E + tl.log(t)
    tl.store(lse_ptr + i, lse, mask=live)
    if STORE:
        slope = tl.full((ROWS,), 1.0, tl.float32)
        if CAPPED:
            tanh = chosen / (LOG2E * softcap)
            slope = 1.0 - tanh * tanh
        scale = tl.load(given_ptr + i * given_step, mask=live, other=0.0)
        b = tl.zeros((ROWS,), tl.float32)
        if SQUARES:
            b = 2.0 * tl.load(squares_ptr + i, mask=live, other=0.0) * lse
        scale = (scale + b) / t
        tl.store(terms_ptr + q, (b - s * scale) * slope, mask=live)
        tl.store(terms_ptr + all_rows + q, scale, mask=live)


@triton.jit(do_not_specialize=VARYING)
def _dlogits(
    e_ptr,
    label_ptr,
    order_ptr,
    total_ptr,
    terms_ptr,
    given_ptr,
    out_ptr,
    column,
    all_rows,
    columns,
    e_row,
    out_row,
    given_step,
    BLOCK: tl.constexpr,
):
    """The gradients of some columns of logits: E a / t, a g at the label; rows that do not count are zero.

    Per element: a read and a write.
    """
    q = tl.program_id(0)
    live = q < tl.load(total_ptr)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    given = tl.load(given_ptr + tl.load(order_ptr + q) * given_step)
    e = tl.load(e_ptr + q.to(tl.int64) * e_row + column + v, mask=live & (v < columns), other=0.0).to(tl.float32)
    e *= given * tl.load(terms_ptr + all_rows + q, mask=live, other=0.0)
    here = given * tl.load(terms_ptr + q, mask=live, other=0.0)
    e = tl.where(live & (column + v == tl.load(label_ptr + q)), here, e)
    tl.store(out_ptr + q.to(tl.int64) * out_row + v, e.to(out_ptr.dtype.element_ty), mask=v < columns)


@triton.jit(do_not_specialize=VARYING)
def _weighted(
    hidden_ptr,
    order_ptr,
    total_ptr,
    scale_ptr,
    column_ptr,
    rows_ptr,
    first,
    n,
    space,
    width,
    hidden_row,
    hidden_col,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The chunk's rows of hidden times a scale of each row, by its place, and one of each column.

    Per element: a read of hidden, a write. Rows that fill up the last block of a product are written as zeros.
    """
    r = tl.program_id(0)
    count = share(total_ptr, first, n)
    if r >= tl.minimum(tl.cdiv(tl.maximum(count, 1), BM) * BM, space):
        return
    live = r < count
    i = tl.load(order_ptr + first + r, mask=live, other=0)
    scale = tl.load(scale_ptr + first + r, mask=live, other=0.0)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        h = tl.load(hidden_ptr + i * hidden_row + k * hidden_col, mask=(k < width) & live, other=0.0).to(tl.float32)
        h = h * (scale * tl.load(column_ptr + k, mask=k < width, other=0.0))
        tl.store(rows_ptr + r.to(tl.int64) * width + k, h.to(rows_ptr.dtype.element_ty), mask=k < width)


@triton.jit(do_not_specialize=VARYING)
def _columns(e_ptr, column_ptr, total_ptr, out_ptr, first, n, e_row, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Columns of E, out [n, COLUMNS]; zero where the column is negative, and in rows that do not count.

    Per element: a read of 32 bytes, a write.
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    column = tl.load(column_ptr + j)[None, :]
    mask = (r < share(total_ptr, first, n))[:, None] & (column >= 0)
    e = tl.load(e_ptr + r.to(tl.int64)[:, None] * e_row + column, mask=mask, other=0.0)
    tl.store(out_ptr + r[:, None] * COLUMNS + j[None, :], e, mask=(r < n)[:, None])


@triton.jit(do_not_specialize=VARYING)
def _add_product(
    e_ptr,
    rows_ptr,
    total_ptr,
    out_ptr,
    first,
    n,
    width,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
):
    """out [COLUMNS, width] += e^T rows, of the chunk's rows that count; e [n, COLUMNS].

    Per element of rows: a read, and 2 COLUMNS operations: 1/1000 of the other products, so that any block will do.
    """
    count = share(total_ptr, first, n)
    j = tl.arange(0, COLUMNS)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.zeros((COLUMNS, BLOCK), tl.float32)
    for start in range(0, count, BK):
        r = start + tl.arange(0, BK)
        e = tl.load(e_ptr + r[None, :] * COLUMNS + j[:, None], mask=r[None, :] < count, other=0.0)
        at = rows_ptr + r.to(tl.int64)[:, None] * width + k[None, :]
        h = tl.load(at, mask=(r[:, None] < count) & (k[None, :] < width), other=0.0)
        x = tl.dot(e, h, x)
    at = out_ptr + j[:, None] * width + k[None, :]
    tl.store(at, tl.load(at, mask=k[None, :] < width, other=0.0) + x, mask=k[None, :] < width)


@triton.jit(do_not_specialize=VARYING)
def _summed(
    x_ptr,
    order_ptr,
    total_ptr,
    factor_ptr,
    out_ptr,
    first,
    n,
    width,
    parts,
    part_rows,
    PLACED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of parts [parts, part_rows, width] times a factor: row by place, or PLACED where they belong among all rows.

    Per element: `parts` reads, most of them from L2, and a write.
    """
    r = tl.program_id(0).to(tl.int64)
    if r >= share(total_ptr, first, n):
        return
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, parts):
        x += tl.load(x_ptr + (part * part_rows + r) * width + k, mask=k < width, other=0.0).to(tl.float32)
    if PLACED:
        r = tl.load(order_ptr + first + r)
    out = x * tl.load(factor_ptr)
    tl.store(out_ptr + r * width + k, out.to(out_ptr.dtype.element_ty), mask=k < width)


@triton.jit(do_not_specialize=VARYING)
def _column_sums(
    e_ptr, total_ptr, scale_ptr, out_ptr, first, n, classes, e_row, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out += the sums of E's columns, rows times their scales. Per element of E: a read."""
    count = share(total_ptr, first, n)
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, ROWS):
        r = start + tl.arange(0, ROWS)
        scale = tl.load(scale_ptr + first + r, mask=r < count, other=0.0)
        at = e_ptr + r.to(tl.int64)[:, None] * e_row + v[None, :]
        e = tl.load(at, mask=(r < count)[:, None] & (v < classes)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(e * scale[:, None], 0)
    old = tl.load(out_ptr + v, mask=v < classes, other=0.0)
    tl.store(out_ptr + v, old + total, mask=v < classes)


@triton.jit(do_not_specialize=VARYING)
def _label_sums(
    hidden_ptr,
    label_ptr,
    order_ptr,
    total_ptr,
    terms_ptr,
    column_ptr,
    slot_ptr,
    frequent_ptr,
    out_ptr,
    width,
    hidden_row,
    hidden_col,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For each label, what dweight has beyond what was packed: the sum of a g h; a frequent one's share of E^T rows.

    It is at the label's first row of out [all rows, width], which is zero elsewhere. Always added in the same order.

    Per element of hidden: a read and a write.
    """
    q = tl.program_id(0)
    total = tl.load(total_ptr)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    label = tl.load(label_ptr + q)
    if (q >= total) | (tl.load(label_ptr + q - 1, mask=q > 0, other=-1) == label):
        tl.store(out_ptr + q.to(tl.int64) * width + k, sums, mask=k < width)
        return
    slot = tl.load(slot_ptr + q)
    if slot >= 0:
        sums += tl.load(frequent_ptr + slot * width + k, mask=k < width, other=0.0)
        sums /= tl.load(column_ptr + k, mask=k < width, other=1.0)
    start = q
    while tl.load(label_ptr + start, mask=start < total, other=-1) == label:
        at = start + tl.arange(0, ROWS)
        live = at < total
        live = live & (tl.load(label_ptr + at, mask=live, other=-1) == label)
        i = tl.load(order_ptr + at, mask=live, other=0)
        g = tl.load(terms_ptr + at, mask=live, other=0.0)
        mask = live[:, None] & (k < width)[None, :]
        h = tl.load(hidden_ptr + i[:, None] * hidden_row + k[None, :] * hidden_col, mask=mask, other=0.0)
        sums += tl.sum(g[:, None] * h.to(tl.float32), 0)
        start += ROWS
    tl.store(out_ptr + q.to(tl.int64) * width + k, sums, mask=k < width)


@triton.jit
def _whole_dhidden(
    part_ptr,
    weight_ptr,
    target_ptr,
    coefficient_ptr,
    at_ptr,
    scale_ptr,
    out_ptr,
    width,
    weight_row,
    weight_col,
    BLOCK: tl.constexpr,
):
    """(dhidden's part at the row's place + coefficient * its label's row of weight) * scale; 0 if it does not count.

    Per element: two reads and a write.
    """
    r = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    q = tl.load(at_ptr + r)
    inside = (k < width) & (q >= 0)
    label = tl.load(target_ptr + r)
    coefficient = tl.load(coefficient_ptr + q, mask=q >= 0, other=0.0)
    x = tl.load(part_ptr + q * width + k, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + label * weight_row + k * weight_col, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(q >= 0, (x + coefficient * w) * tl.load(scale_ptr), 0.0)
    tl.store(out_ptr + r * width + k, x.to(out_ptr.dtype.element_ty), mask=k < width)


@triton.jit
def _whole_dweight(packed_ptr, column_ptr, sums_ptr, first_ptr, scale_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """(packed / column + the label's sum, where it has one) * scale. Per element: a read and a write."""
    v = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    q = tl.load(first_ptr + v).to(tl.int64)
    x = tl.load(packed_ptr + v * width + k, mask=k < width, other=0.0).to(tl.float32)
    x /= tl.load(column_ptr + k, mask=k < width, other=1.0)
    x += tl.load(sums_ptr + q * width + k, mask=(k < width) & (q >= 0), other=0.0)
    tl.store(out_ptr + v * width + k, (x * tl.load(scale_ptr)).to(out_ptr.dtype.element_ty), mask=k < width)


def _row_block(width: int) -> dict[str, int]:
    """A program for a row, 8 elements a thread and turn."""
    return {"BLOCK": min(triton.next_power_of_2(width), 1024), "num_warps": 4}


def gather(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label: Tensor,
    order: Tensor,
    total: Tensor,
    guess: Tensor,
    factor: float,
    softcap: float,
    first: int,
    n: int,
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """Copies a chunk's rows into `rows`, of which there may be fewer than n. Returns (label's logit, shift) [n]."""
    classes, width = weight.shape
    chosen, shift = guess.new_empty((2, n))
    _gather[(triton.cdiv(rows.shape[0], BLOCK_M) * BLOCK_M,)](
        *(hidden, weight, weight if bias is None else bias, label, order, total, guess, rows, chosen, shift),
        *(first, n, rows.shape[0], width, classes, *hidden.stride(), weight.stride(0), factor, softcap),
        BIASED=bias is not None,
        CAPPED=softcap > 0,
        BM=BLOCK_M,
        **_row_block(width),
    )
    return chosen, shift


def finish(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label: Tensor,
    order: Tensor,
    total: Tensor,
    chosen: Tensor,
    shift: Tensor,
    sums: Tensor,
    given: Tensor,
    squares: Tensor | None,
    factor: float,
    softcap: float,
    first: int,
    e: Tensor | None,
    losses: Tensor,
    lse: Tensor,
    terms: Tensor,
) -> None:
    """See `_finish`. `given` is the gradient of each row's loss, or one of all, `squares` that of each l^2, if any."""
    classes, width = weight.shape
    blocks, n = sums.shape
    _finish[(triton.cdiv(rows.shape[0], FINISH_ROWS),)](
        *(rows, weight, weight if bias is None else bias, label, order, total, chosen, shift, sums, given),
        *(given if squares is None else squares, sums if e is None else e, losses, lse, terms),
        *(first, n, order.shape[0], width, classes, blocks, weight.stride(0), 0 if e is None else e.stride(0)),
        *(int(given.numel() > 1), factor, softcap),
        BIASED=bias is not None,
        CAPPED=softcap > 0,
        STORE=e is not None,
        SQUARES=squares is not None,
        ROWS=FINISH_ROWS,
        BLOCK=64,
        BK=64,
        num_warps=4,
    )


def dlogits(
    e: Tensor, label: Tensor, order: Tensor, total: Tensor, terms: Tensor, given: Tensor, column: int, out: Tensor
) -> None:
    """See `_dlogits`: writes the columns from `column` on into `out` [N, columns]."""
    n, columns = out.shape
    block = min(triton.next_power_of_2(columns), 4096)
    _dlogits[(n, triton.cdiv(columns, block))](
        *(e, label, order, total, terms, given, out, column, n, columns, e.stride(0), out.stride(0)),
        int(given.numel() > 1),
        BLOCK=block,
        num_warps=max(block // 512, 1),
    )


def weighted(
    hidden: Tensor, order: Tensor, total: Tensor, scale: Tensor, columns: Tensor, first: int, n: int, rows: Tensor
) -> None:
    """See `_weighted`: fills `rows`."""
    width = hidden.shape[1]
    _weighted[(rows.shape[0],)](
        *(hidden, order, total, scale, columns, rows, first, n, rows.shape[0], width, *hidden.stride()),
        BM=BLOCK_M,
        **_row_block(width),
    )


def add_columns(e: Tensor, columns: Tensor, rows: Tensor, total: Tensor, first: int, out: Tensor) -> None:
    """out [columns, width] += the columns of E, transposed, times rows. `columns`: int32, a power of two of them."""
    (n, width), many = rows.shape, columns.shape[0]
    some = rows.new_empty((n, many))
    _columns[(triton.cdiv(n, 32),)](e, columns, total, some, first, n, e.stride(0), COLUMNS=many, ROWS=32, num_warps=4)
    _add_product[(triton.cdiv(width, 64),)](
        some, rows, total, out, first, n, width, COLUMNS=many, BLOCK=64, BK=64, num_warps=4
    )


def summed(x: Tensor, order: Tensor, total: Tensor, factor: Tensor, first: int, placed: bool, out: Tensor) -> None:
    """See `_summed`; `out` is the chunk's own rows, or all rows if `placed`."""
    parts, part_rows, width = x.shape
    n = min(part_rows, order.shape[0] - first)
    _summed[(n, triton.cdiv(width, 2048))](
        *(x, order, total, factor, out, first, n, width, parts, part_rows), PLACED=placed, BLOCK=2048, num_warps=4
    )


def column_sums(e: Tensor, total: Tensor, scale: Tensor, first: int, out: Tensor) -> None:
    """See `_column_sums`."""
    n, classes = e.shape
    _column_sums[(triton.cdiv(classes, 128),)](
        e, total, scale, out, first, n, classes, e.stride(0), ROWS=32, BLOCK=128, num_warps=4
    )


def label_sums(
    hidden: Tensor,
    label: Tensor,
    order: Tensor,
    total: Tensor,
    terms: Tensor,
    columns: Tensor,
    slot: Tensor,
    frequent: Tensor,
) -> Tensor:
    """See `_label_sums`: float32 [all rows, width]. `slot` [all rows] is the label's row of `frequent`, or -1."""
    n, width = hidden.shape
    out = hidden.new_empty((n, width), dtype=torch.float32)
    block = min(triton.next_power_of_2(width), 2048)
    if n:
        _label_sums[(n, triton.cdiv(width, block))](
            *(hidden, label, order, total, terms, columns, slot, frequent, out, width, *hidden.stride()),
            ROWS=4,
            BLOCK=block,
            num_warps=8,
        )
    return out


def whole_dhidden(
    part: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor, at: Tensor, scale: Tensor, out: Tensor
) -> None:
    """See `_whole_dhidden`."""
    n, width = out.shape
    if n:
        _whole_dhidden[(n, triton.cdiv(width, 2048))](
            part, weight, target, coefficient, at, scale, out, width, *weight.stride(), BLOCK=2048, num_warps=4
        )


def whole_dweight(packed: Tensor, columns: Tensor, sums: Tensor, first: Tensor, scale: Tensor, out: Tensor) -> None:
    """See `_whole_dweight`; `packed` is float16."""
    classes, width = out.shape
    _whole_dweight[(classes, triton.cdiv(width, 2048))](
        packed, columns, sums, first, scale, out, width, BLOCK=2048, num_warps=4
    )
