"""The matrix products of a fused linear + cross-entropy. `loss_rows.py` has the rest of it; see there for the formulas.

Blocks of 128 x 256 results a program fill the registers of 8 warps, and of all blocks that fit they read the least from
L2; 64 deep and 3 stages fill the shared memory. An H100 is limited by its power in such products: these run at cuBLAS's
speed, the exponentials cost 3% of theirs, adding to dweight 2 to 6%.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .layout import multiprocessors

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
PRODUCT = {"BM": BLOCK_M, "BN": BLOCK_N, "BK": BLOCK_K, "num_warps": 8, "num_stages": 3}
EPILOGUE = tl.constexpr(8)
"""Writing a block of dweight takes about as long as this many steps of its product; only used to share out work."""
VARYING = ("first", "n", "space", "all_rows", "parts", "part_rows")
"""Arguments that differ from chunk to chunk: a kernel is not compiled again for a value of theirs."""
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def share(total_ptr, first, n):
    """How many of the chunk's n rows, which begin at row `first`, count."""
    return tl.minimum(tl.maximum(tl.load(total_ptr) - first, 0), n)


@triton.jit
def transform(x, factor, softcap, CAPPED: tl.constexpr):
    """(z, dz/dx / factor) of logits x: z = factor x, or softcap tanh(factor x / softcap). float32."""
    z = x * factor
    slope = tl.full(x.shape, 1.0, tl.float32)
    if CAPPED:
        u = z * (1.0 / softcap)
        e = tl.exp2(tl.abs(u) * (-2.0 * LOG2E))
        r = 1.0 / (1.0 + e)
        t = (1.0 - e) * r
        z = softcap * tl.where(u < 0, -t, t)
        slope = 4.0 * e * (r * r)
    return z, slope


@triton.jit
def exponential(
    x, bias_ptr, shift, label, v, classes, factor, softcap, special, BIASED: tl.constexpr, CAPPED: tl.constexpr
):
    """(exp(z - shift), dz/dx) of a block of logits x whose first column is v; zero at labels and beyond the classes."""
    cols = tl.arange(0, x.shape[1])
    if BIASED:
        x += tl.load(bias_ptr + v + cols, mask=v + cols < classes, other=0.0).to(tl.float32)[None, :]
    if CAPPED:
        z, slope = transform(x, factor, softcap, CAPPED)
        e = tl.exp2(z * LOG2E - shift[:, None])
    else:
        slope = 1.0
        e = tl.exp2(x * (factor * LOG2E) - shift[:, None])
    if special:  # few blocks hold a label or the last class, and comparing costs as much as the exponentials
        e = tl.where((cols[None, :] == label[:, None] - v) | (v + cols >= classes)[None, :], 0.0, e)
    return e, slope


@triton.jit(do_not_specialize=VARYING)
def _exponentials(
    rows_desc,
    weight_desc,
    e_desc,
    bias_ptr,
    label_ptr,
    shift_ptr,
    sums_ptr,
    total_ptr,
    first,
    n,
    space,
    width,
    classes,
    factor,
    softcap,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    STORE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """E [n, classes] and, of each block of columns, the sums of its rows [blocks, n].

    Per element of E: a write, and 2 width operations; per block of 128 rows a read of weight, which the blocks beside
    it find in L2. The epilogue goes in halves, so that it needs less shared memory.
    """
    # Of the first chunk at least one block is made, so that dweight can be written from it if no row counts.
    blocks_m = tl.maximum(tl.cdiv(share(total_ptr, first, n), BM), tl.where(first == 0, 1, 0))
    blocks = blocks_m * tl.cdiv(classes, BN)
    factor = tl.cast(factor, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), flatten=True):
        m = (block % blocks_m) * BM
        j = block // blocks_m
        v = j * BN
        x = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, width, BK):
            x = tl.dot(rows_desc.load([m, k]), weight_desc.load([v, k]).T, x)
        rows = m + tl.arange(0, BM)
        shift = tl.load(shift_ptr + rows)
        label = tl.load(label_ptr + first + rows, mask=rows < space, other=-1)
        special = (tl.max(((label >= v) & (label < v + BN)).to(tl.int32), 0) > 0) | (v + BN > classes)
        left, right = x.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        e, slope = exponential(left, bias_ptr, shift, label, v, classes, factor, softcap, special, BIASED, CAPPED)
        total = tl.sum(e, 1)
        if STORE:
            e_desc.store([m, v], (e * slope).to(e_desc.dtype))
        v += BN // 2
        e, slope = exponential(right, bias_ptr, shift, label, v, classes, factor, softcap, special, BIASED, CAPPED)
        total += tl.sum(e, 1)
        if STORE:
            e_desc.store([m, v], (e * slope).to(e_desc.dtype))
        tl.store(sums_ptr + j * n + rows, total)


@triton.jit
def _put(desc, row, column, x, ADD: tl.constexpr):
    if ADD:
        desc.atomic_add([row, column], x)
    else:
        desc.store([row, column], x)


@triton.jit(do_not_specialize=VARYING)
def _gradients(
    e_rows_desc,
    weight_desc,
    dhidden_desc,
    e_cols_desc,
    rows_desc,
    dweight_desc,
    row_scale_ptr,
    total_ptr,
    first,
    n,
    width,
    classes,
    parts,
    part_rows,
    DHIDDEN: tl.constexpr,
    DWEIGHT: tl.constexpr,
    ADD_DHIDDEN: tl.constexpr,
    ADD_DWEIGHT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """E W [parts, part_rows, width], each part the sum over some of the classes, times a scale of each row, by its
    place; and E^T rows [classes, width].

    Per element of E: a read from memory for each product, 2 width operations each; per element of the results: a write,
    and where they are added a read, in L2 (both are rounded to the result's dtype). Blocks of E W are few and take
    long: the programs that get none begin with blocks of the other product, so that all end together.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    count = share(total_ptr, first, n)
    across = tl.cdiv(width, BN)
    few = tl.cdiv(count, BM) * across
    steps = tl.cdiv(tl.cdiv(classes, BK), parts)
    items = 0
    if DHIDDEN:
        items = few * parts
        for item in tl.range(program, items, programs):
            part = item // few
            m = (item % few) // across * BM
            c = item % across * BN
            x = tl.zeros((BM, BN), tl.float32)
            for k in tl.range(part * steps * BK, tl.minimum((part + 1) * steps * BK, classes), BK):
                x = tl.dot(e_rows_desc.load([m, k]), weight_desc.load([k, c]), x)
            rows = m + tl.arange(0, BM)
            x *= tl.load(row_scale_ptr + first + rows, mask=rows < count, other=0.0)[:, None]
            left, right = x.to(dhidden_desc.dtype).reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
            a, b = left.reshape(BM, 2, BN // 4).permute(0, 2, 1).split()
            _put(dhidden_desc, part * part_rows + m, c, a, ADD_DHIDDEN)
            _put(dhidden_desc, part * part_rows + m, c + BN // 4, b, ADD_DHIDDEN)
            a, b = right.reshape(BM, 2, BN // 4).permute(0, 2, 1).split()
            _put(dhidden_desc, part * part_rows + m, c + BN // 2, a, ADD_DHIDDEN)
            _put(dhidden_desc, part * part_rows + m, c + BN // 4 * 3, b, ADD_DHIDDEN)
    if DWEIGHT:
        depth = tl.maximum(count, 1)
        many = tl.cdiv(classes, BM) * across
        if ADD_DWEIGHT and count == 0:
            many = 0
        busy = items % programs
        waiting = tl.where(busy == 0, 0, programs - busy)
        early = tl.minimum(waiting * (steps // (tl.cdiv(depth, BK) + EPILOGUE)), many)
        mine_early = tl.where(program >= busy, tl.cdiv(early - (program - busy), tl.maximum(waiting, 1)), 0)
        mine_early = tl.where(waiting == 0, 0, tl.maximum(mine_early, 0))
        mine = mine_early + tl.maximum(tl.cdiv(many - early - program, programs), 0)
        for turn in tl.range(0, mine, flatten=True):
            ahead = turn < mine_early
            block = tl.where(ahead, program - busy + waiting * turn, early + program + programs * (turn - mine_early))
            v = block // across * BM
            c = block % across * BN
            x = tl.zeros((BM, BN), tl.float32)
            for k in tl.range(0, depth, BK):
                x = tl.dot(e_cols_desc.load([k, v]).T, rows_desc.load([k, c]), x)
            left, right = x.to(dweight_desc.dtype).reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
            _put(dweight_desc, v, c, left, ADD_DWEIGHT)
            _put(dweight_desc, v, c + BN // 2, right, ADD_DWEIGHT)


def exponentials(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label: Tensor,
    shift: Tensor,
    total: Tensor,
    first: int,
    n: int,
    factor: float,
    softcap: float,
    e: Tensor | None,
) -> Tensor:
    """Writes E [n, classes], if asked for, from a chunk's rows; returns the sums of its blocks [blocks, n]."""
    classes, width = weight.shape
    sums = shift.new_empty((triton.cdiv(classes, BLOCK_N), n))
    rows_desc = TensorDescriptor.from_tensor(rows, [BLOCK_M, BLOCK_K])
    _exponentials[(multiprocessors(rows.device),)](
        rows_desc,
        TensorDescriptor.from_tensor(weight, [BLOCK_N, BLOCK_K]),
        rows_desc if e is None else TensorDescriptor.from_tensor(e, [BLOCK_M, BLOCK_N // 2]),
        *(weight if bias is None else bias, label, shift, sums, total),
        *(first, n, rows.shape[0], width, classes, factor, softcap),
        BIASED=bias is not None,
        CAPPED=softcap > 0,
        STORE=e is not None,
        **PRODUCT,
    )
    return sums


def parts(n: int, width: int, device: torch.device, beside: bool) -> int:
    """Into how many parts of the classes E W is taken for n rows, so that its few long blocks keep programs busy."""
    return _parts(triton.cdiv(n, BLOCK_M) * triton.cdiv(width, BLOCK_N), multiprocessors(device), beside)


def _parts(few: int, programs: int, beside: bool) -> int:
    """With another product `beside` it, which fills up what is left, a block may take as long as all programs together
    need for both, and no longer. By itself, the last round must be nearly full."""
    if beside:
        return triton.cdiv(programs, 2 * few)
    used = {s: few * s / (triton.cdiv(few * s, programs) * programs) for s in range(1, 9)}
    return next(s for s, share in used.items() if share >= 0.97 * max(used.values()))


def gradients(
    e: Tensor,
    weight: Tensor,
    rows: Tensor,
    row_scale: Tensor,
    total: Tensor,
    first: int,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    add_dhidden: bool = False,
    add_dweight: bool = False,
) -> None:
    """Writes, or adds, row_scale E W in parts [parts, rows, width], and E^T rows [classes, width].

    With several parts, their rows are a multiple of 128: blocks are written whole.
    """
    (n, classes), width = e.shape, weight.shape[1]
    rows_desc = TensorDescriptor.from_tensor(rows, [BLOCK_K, BLOCK_N])
    x = rows if dhidden is None else dhidden.view(-1, width)
    _gradients[(multiprocessors(rows.device),)](
        TensorDescriptor.from_tensor(e, [BLOCK_M, BLOCK_K]),
        TensorDescriptor.from_tensor(weight, [BLOCK_K, BLOCK_N]),
        TensorDescriptor.from_tensor(x, [BLOCK_M, BLOCK_N // 4]),
        TensorDescriptor.from_tensor(e, [BLOCK_K, BLOCK_M]),
        rows_desc,
        rows_desc if dweight is None else TensorDescriptor.from_tensor(dweight, [BLOCK_M, BLOCK_N // 2]),
        *(row_scale, total, first, n, width, classes, *((1, n) if dhidden is None else dhidden.shape[:2])),
        DHIDDEN=dhidden is not None,
        DWEIGHT=dweight is not None,
        ADD_DHIDDEN=add_dhidden,
        ADD_DWEIGHT=add_dweight,
        **PRODUCT,
    )
