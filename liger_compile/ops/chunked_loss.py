"""Linear + cross-entropy by cuBLAS and one kernel of rows: the ops behind `linear_cross_entropy` on most devices.

cuBLAS makes the logits of a chunk of rows, rounded to hidden's dtype, and one kernel makes them their own gradient
(each step rounded as the model rounds it, in float32 if `wide`), which is multiplied into dhidden and dweight, float32
until they are scaled. If all rows fit in one chunk, or take no more memory than that dweight, they are kept for the
backward instead, which multiplies them in slabs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import known_true
from ._library import Launcher, define, once_differentiable

SLAB_BYTES = 32 << 20
TILE = 128
"""Rows of a chunk are a multiple of this."""


class Transform(NamedTuple):
    """What happens to the logits between the linear layer and the loss, and how the loss smooths its labels."""

    scale: float = 1.0
    divisor: float = 1.0
    softcap: float = 0.0
    wide: bool = False
    smoothing: float = 0.0


def check_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    """Raises ValueError if shapes or dtypes do not fit, naming what would."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}; needs [N, H], [V, H]"
        )
    dtypes = [t.dtype for t in (hidden, weight, bias) if t is not None]
    if len(set(dtypes)) > 1:
        raise ValueError(f"linear_cross_entropy: hidden, weight and bias are {dtypes}; they must agree")
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"linear_cross_entropy: bias has shape {tuple(bias.shape)}, needs [{weight.shape[0]}]")
    if target.ndim != 1 or target.shape[0] != hidden.shape[0] or target.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: target is {target.dtype}{tuple(target.shape)}, needs int64[{hidden.shape[0]}]"
        )


# ---- rows of logits ------------------------------------------------------------------------------------------------


def _transform(logits: Tensor, how: Transform) -> tuple[Tensor, Tensor | None]:
    """(z, dz/dlogits but for scale / divisor) in float32; None where that is one.

    A constant factor is left for later, when gradients are float32: near a label they are close to -1, which a narrow
    dtype rounds little.
    """
    sums = torch.promote_types(torch.float32, logits.dtype)

    def rounded(x: Tensor) -> Tensor:
        return x if how.wide else x.to(logits.dtype).to(sums)

    z = logits.to(sums, copy=True)
    if how.scale != 1:
        z = rounded(z * how.scale)
    if how.divisor != 1:
        z = rounded(z / how.divisor)
    if how.softcap <= 0:
        return z, None
    t = rounded(torch.tanh(rounded(z / how.softcap)))
    return rounded(t * how.softcap), 1 - t * t


def _labels(target: Tensor, ignore_index: int, classes: int) -> tuple[Tensor, Tensor]:
    """(which rows count, labels that can index, as a column)."""
    counted = target != ignore_index
    outside = counted & ((target < 0) | (target >= classes))
    if outside.any():
        raise IndexError(f"Target {int(target[outside][0])} is out of bounds for {classes} classes.")
    return counted, torch.where(counted, target, 0).unsqueeze(1)


def _gradient(
    z: Tensor,
    slope: Tensor | None,
    most: Tensor,
    total: Tensor,
    index: Tensor,
    of_lse: Tensor,
    of_label: Tensor,
    smoothing: float,
) -> Tensor:
    """of_lse softmax(z) - of_label ((1 - smoothing) [label] + smoothing / classes), times slope; these are columns."""
    gradient = torch.exp(z - most) * (of_lse / total) - of_label * (smoothing / z.shape[1])
    gradient.scatter_add_(1, index, -(1 - smoothing) * of_label)
    return gradient if slope is None else gradient * slope


def _reference_rows(
    logits: Tensor, target: Tensor, given: Tensor | None, ignore_index: int, how: Transform, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of logits [n, V], in float32: its loss, its largest z, its sum of exp(z - largest).

    With `gradient`, the logits become d(loss)/d(logits), times `given` [n] and divisor / scale.
    """
    counted, index = _labels(target, ignore_index, logits.shape[1])
    z, slope = _transform(logits, how)
    most = z.amax(1, keepdim=True)
    most = torch.where(most.isinf(), 0, most)
    total = torch.exp(z - most).sum(1, keepdim=True)
    lse = most + torch.log(total)
    loss = (1 - how.smoothing) * (lse - z.gather(1, index))
    if how.smoothing:
        loss = loss + how.smoothing * (lse - z.mean(1, keepdim=True))
    if gradient:
        one = torch.ones_like(total) if given is None else given.unsqueeze(1)
        logits.copy_(_gradient(z, slope, most, total, index, one, one, how.smoothing))
        logits[~counted] = 0
    return torch.where(counted, loss.squeeze(1), 0), most.squeeze(1), total.squeeze(1)


def _reference_row_gradients(
    logits: Tensor,
    target: Tensor,
    most: Tensor,
    total: Tensor,
    of_lse: Tensor,
    of_label: Tensor,
    how: Transform,
    column: int,
    out: Tensor,
) -> None:
    """The gradient of rows of logits [n, V], times divisor / scale, from that of their log-sum-exp and of their labels'
    terms, [n] each: writes the columns from `column` on into `out`."""
    index = target.clamp(0, logits.shape[1] - 1).unsqueeze(1)
    columns = (x.unsqueeze(1) for x in (most, total))
    z, slope = _transform(logits, how)
    gradient = _gradient(z, slope, *columns, index, of_lse.unsqueeze(1), of_label.unsqueeze(1), how.smoothing)
    gradient[(of_lse == 0) & (of_label == 0)] = 0
    out.copy_(gradient[:, column : column + out.shape[1]])


# ---- the ops -------------------------------------------------------------------------------------------------------


def chunk_rows(n: int, width: int, classes: int, itemsize: int, budget: int) -> int:
    """Rows of a chunk, of n rows in all: as many as `budget` holds, or as take no more than dweight will."""
    return equal_chunks(n, max(budget // (classes * itemsize), width, TILE))


def equal_chunks(n: int, fit: int) -> int:
    """Rows of a chunk, of n rows in all, if about `fit` may be in one: as few chunks as that takes, and about equal."""
    return tiled(-(-n // max(-(-n // fit), 1)))


def tiled(n: int) -> int:
    return max(-(-n // TILE) * TILE, TILE)


def empty_gradients(
    hidden: Tensor, weight: Tensor, need_dhidden: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias), not written yet; those that nobody needs have no elements."""
    return (
        hidden.new_empty(hidden.shape if need_dhidden else (0,)),
        hidden.new_empty(weight.shape if need_dweight else (0,)),
        hidden.new_empty(weight.shape[0] if need_dbias else 0),
    )


def keep_all(n: int, width: int, classes: int, itemsize: int, budget: int, need_dweight: bool) -> bool:
    """Whether all logits are kept: they fit the budget, or take no more memory than a float32 dweight would."""
    return need_dweight and known_true((n * itemsize <= width * 4) | (n * classes * itemsize <= budget))


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    given: Tensor | None,
    ignore_index: int,
    scale: float,
    divisor: float,
    softcap: float,
    wide: bool,
    smoothing: float,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
    keep: str,
    budget: int,
) -> tuple[Tensor, ...]:
    check_operands(hidden, weight, bias, target)
    sums = torch.promote_types(torch.float32, hidden.dtype)
    n = hidden.shape[0]

    def grad(like: Tensor | None, needed: bool) -> Tensor:
        return hidden.new_empty(like.shape if needed and not keep else (0,), dtype=sums)

    return (
        hidden.new_empty(n, dtype=sums),
        hidden.new_empty(n, dtype=sums),
        hidden.new_empty(n, dtype=sums),
        hidden.new_empty((n, weight.shape[0]) if keep else (0,)),
        grad(hidden, need_dhidden),
        grad(weight, need_dweight),
        grad(bias, need_dbias),
    )


def _product(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, with `out` float32 and the product never rounded to a narrower dtype."""
    if a.dtype is not out.dtype and out.is_cuda:
        if add:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        else:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=int(add))


def _forward_with(rows_of: Any, *args: Any) -> tuple[Tensor, ...]:
    """The rows' losses, and gradients; `rows_of` computes one chunk of losses, turning logits into their gradient."""
    hidden, weight, bias, target, given, ignore_index, *transform = args[:11]
    need_dhidden, need_dweight, need_dbias, keep, budget = args[11:]
    how = Transform(*transform)
    losses, most, total, kept, dhidden, dweight, dbias = _forward_fake(*args)
    gradient = (need_dhidden or need_dweight or need_dbias) and keep != "logits"
    n = hidden.shape[0]
    size = max(n, 1) if keep else chunk_rows(n, hidden.shape[1], weight.shape[0], hidden.element_size(), budget)
    dbias.zero_()
    if n == 0:
        dweight.zero_()
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, n, size):
            rows = slice(start, start + size)
            h = hidden[rows]
            logits = kept if keep else hidden.new_empty(h.shape[0], weight.shape[0])
            if bias is None:
                torch.mm(h, weight.t(), out=logits)
            else:
                torch.addmm(bias, h, weight.t(), out=logits)
            part = None if given is None else given[rows]
            losses[rows], most[rows], total[rows] = rows_of(logits, target[rows], part, ignore_index, how, gradient)
            if keep:
                break
            if need_dhidden:
                _product(dhidden[rows], logits, weight)
            if need_dweight:
                _product(dweight, logits.t(), h, add=start > 0)
            if need_dbias:
                dbias += logits.sum(0, dtype=dbias.dtype)
    return losses, most, total, kept, dhidden, dweight, dbias


def _reference(*args: Any) -> tuple[Tensor, ...]:
    return _forward_with(_reference_rows, *args)


def _cuda(*args: Any) -> tuple[Tensor, ...]:
    return _forward_with(Launcher("cross_entropy", "rows"), *args)


linear_cross_entropy_forward = define(
    "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? given,"
    " int ignore_index, float scale, float divisor, float softcap, bool wide, float smoothing,"
    " bool need_dhidden, bool need_dweight, bool need_dbias, str keep, int budget)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _reference,
    _forward_fake,
    _cuda,
)


def _backward_fake(
    dlogits: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor, *need: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, *need)


def _scaled_product(scaled: Any, out: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> None:
    """out = (a @ b) * scale, in slabs of rows whose float32 products take SLAB_BYTES, each rounded once."""
    sums = torch.promote_types(torch.float32, out.dtype)
    size = max(SLAB_BYTES // (sums.itemsize * max(b.shape[1], 1)) // 128 * 128, 128)
    slab = out.new_empty((min(size, out.shape[0]), b.shape[1]), dtype=sums)
    for start in range(0, out.shape[0], size):
        part = out[start : start + size]
        product = slab[: part.shape[0]]
        _product(product, a[start : start + size], b)
        scaled(product, scale, part)


def _backward_with(scaled: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The products of the logits' gradients; `scaled(x, scale, out)` writes a product, scaled and rounded."""
    dlogits, hidden, weight, scale, need_dhidden, need_dweight, need_dbias = args
    dhidden, dweight, dbias = _backward_fake(*args)
    with torch.autocast(hidden.device.type, enabled=False):
        if need_dhidden:
            _scaled_product(scaled, dhidden, dlogits, weight, scale)
        if need_dweight:
            _scaled_product(scaled, dweight, dlogits.t(), hidden, scale)
        if need_dbias:
            scaled(dlogits.sum(0, dtype=scale.dtype), scale, dbias)
    return dhidden, dweight, dbias


def _reference_scaled(x: Tensor, scale: Tensor, out: Tensor) -> None:
    torch.mul(x, scale, out=out)


def _backward_reference(*args: Any) -> tuple[Tensor, ...]:
    return _backward_with(_reference_scaled, *args)


def _backward_cuda(*args: Any) -> tuple[Tensor, ...]:
    return _backward_with(Launcher("scale", "scaled"), *args)


linear_cross_entropy_backward = define(
    "linear_cross_entropy_backward(Tensor dlogits, Tensor hidden, Tensor weight, Tensor scale,"
    " bool need_dhidden, bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
    _backward_cuda,
)


def _from_logits_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, *need = args[11:]
    return empty_gradients(hidden, weight, *need)


def _from_logits_with(row_gradients: Any, scaled: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, from the logits that were kept: theirs are made and multiplied some columns at a time."""
    logits, target, most, total, of_lse, of_label = args[:6]
    how, (hidden, weight, need_dhidden, need_dweight, need_dbias) = Transform(*args[6:11]), args[11:]
    dhidden, dweight, dbias = _from_logits_fake(*args)
    (n, classes), sums = logits.shape, most.dtype
    scale = most.new_full((), how.scale / how.divisor)
    whole = dhidden.new_zeros(dhidden.shape, dtype=sums)
    size = max(4 * SLAB_BYTES // (logits.element_size() * max(n, 1)) // 128 * 128, 128)
    slab = logits.new_empty((n, min(size, classes)))
    with torch.autocast(hidden.device.type, enabled=False):
        for column in range(0, classes, size):
            part = slice(column, column + size)
            some = slab[:, : classes - column]
            row_gradients(logits, target, most, total, of_lse, of_label, how, column, some)
            if need_dhidden:
                _product(whole, some, weight[part], add=column > 0)
            if need_dweight:
                _scaled_product(scaled, dweight[part], some.t(), hidden, scale)
            if need_dbias:
                scaled(some.sum(0, dtype=sums), scale, dbias[part])
    if need_dhidden:
        scaled(whole, scale, dhidden)
    return dhidden, dweight, dbias


def _from_logits_reference(*args: Any) -> tuple[Tensor, ...]:
    return _from_logits_with(_reference_row_gradients, _reference_scaled, *args)


def _from_logits_cuda(*args: Any) -> tuple[Tensor, ...]:
    return _from_logits_with(Launcher("cross_entropy", "row_gradients"), Launcher("scale", "scaled"), *args)


linear_cross_entropy_from_logits = define(
    "linear_cross_entropy_from_logits(Tensor logits, Tensor target, Tensor most, Tensor total, Tensor of_lse,"
    " Tensor of_label, float scale, float divisor, float softcap, bool wide, float smoothing, Tensor hidden,"
    " Tensor weight, bool need_dhidden, bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)",
    _from_logits_reference,
    _from_logits_fake,
    _from_logits_cuda,
)

for _op in (linear_cross_entropy_forward, linear_cross_entropy_backward, linear_cross_entropy_from_logits):
    once_differentiable(_op)
