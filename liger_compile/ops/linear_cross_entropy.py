"""Cross-entropy of a linear layer's outputs, without holding all of them.

`linear_cross_entropy(hidden, weight, bias, target, ignore_index=-100, reduction="mean", scale=1.0, divisor=1.0,
softcap=0.0, wide=False, class_weight=None, label_smoothing=0.0, memory="balanced") -> loss`

    logits = hidden @ weight.T + bias
    z      = logits * scale / divisor;  z = softcap * tanh(z / softcap), if softcap > 0
    loss_i = w_y (log(sum_j exp(z_ij)) - (1 - e) z_iy - e mean_j(z_ij)),   y = target_i, w = class_weight or 1,
                                                                           e = label_smoothing

- hidden [N, H], weight [V, H], bias [V] or None: one dtype of float32, bfloat16, float16. target [N]: int64 in
  [0, V), or `ignore_index`. class_weight: float [V], without a gradient; not together with label_smoothing.
- loss: float32; the mean, sum w_y loss_i / sum w_y, over the rows not ignored (NaN if none), or the sum: a scalar; or
  "none": [N], 0 where the row is ignored.
- memory: "lean", "balanced" or "fast": what is taken of logits at a time, see BUDGET. docs/loss.md has their costs.
- A gradient nobody needs is not computed. A target outside [0, V) raises IndexError on the CPU and a device-side
  assertion on CUDA, as in eager.

`linear_cross_entropy_lse(hidden, weight, bias, target, ignore_index=-100, reduction="mean", scale=1.0, divisor=1.0,
softcap=0.0, wide=False) -> (loss, lse)`: the loss, and float32 [N] log(sum_j exp(z_ij)) of every row, for losses that
are computed from that too (z-loss). It holds all logits, as the code that it stands for does.

Two roads. bfloat16 on Hopper is fused, see `fused_loss.py`. Elsewhere cuBLAS makes the logits of a chunk of rows,
rounded to hidden's dtype, and one kernel makes them their own gradient (each step rounded as the model rounds it, in
float32 if `wide`), which is multiplied into dhidden and dweight, float32 until they are scaled. If all rows fit in one
chunk, or take no more memory than that dweight, they are kept for the backward instead, which multiplies them in slabs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import known_true
from . import fused_loss as fused
from ._library import NAMESPACE, define, kernel, once_differentiable

REDUCTIONS = ("mean", "sum", "none")
BUDGET = {"lean": 150 << 20, "balanced": 561 << 20, "fast": 4 << 30}
"""Bytes of logits, or of their gradients, that are held at a time."""
SLAB_BYTES = 32 << 20


class Transform(NamedTuple):
    """What happens to the logits between the linear layer and the loss, and how the loss smooths its labels."""

    scale: float = 1.0
    divisor: float = 1.0
    softcap: float = 0.0
    wide: bool = False
    smoothing: float = 0.0


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
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


# ---- the other road ------------------------------------------------------------------------------------------------


def chunk_rows(n: int, width: int, classes: int, itemsize: int, budget: int) -> int:
    """Rows of a chunk, of n rows in all: as many as `budget` holds, or as take no more than dweight will.

    Chunks are about equal, and their rows a multiple of 128.
    """
    fit = max(budget // (classes * itemsize), width, 128)
    chunks = max(-(-n // fit), 1)
    return max(-(-n // (chunks * 128)) * 128, 128)


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
    _check(hidden, weight, bias, target)
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
    return _forward_with(kernel("cross_entropy", "rows"), *args)


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
    dlogits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if need_dhidden else (0,)),
        weight.new_empty(weight.shape if need_dweight else (0,)),
        weight.new_empty(weight.shape[0] if need_dbias else 0),
    )


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
    return _backward_with(kernel("scale", "scaled"), *args)


linear_cross_entropy_backward = define(
    "linear_cross_entropy_backward(Tensor dlogits, Tensor hidden, Tensor weight, Tensor scale,"
    " bool need_dhidden, bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
    _backward_cuda,
)


def _from_logits_fake(
    logits: Tensor,
    target: Tensor,
    most: Tensor,
    total: Tensor,
    of_lse: Tensor,
    of_label: Tensor,
    scale: float,
    divisor: float,
    softcap: float,
    wide: bool,
    smoothing: float,
    hidden: Tensor,
    weight: Tensor,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_fake(logits, hidden, weight, most, need_dhidden, need_dweight, need_dbias)


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
    return _from_logits_with(kernel("cross_entropy", "row_gradients"), kernel("scale", "scaled"), *args)


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


# ---- ways to the gradient ------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """What is known of a call when it is traced."""

    ignore_index: int
    how: Transform
    need: tuple[bool, bool, bool]
    """Whether hidden, weight and bias need a gradient."""
    budget: int

    @property
    def factor(self) -> float:
        """What every gradient is multiplied with at the end."""
        return self.how.scale / self.how.divisor

    @property
    def fused(self) -> tuple[int, float, float]:
        """What the fused ops take of it."""
        return self.ignore_index, self.factor, self.how.softcap


class _Operands(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    given: Tensor | None
    """The gradient of each row's loss, if that is known beforehand and not one: float32 [N]."""


_Saved = tuple[Tensor | None, ...]
_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Way:
    """A way to compute rows' losses and their gradients; `scale` is that of all losses, or of each, [N]."""

    def forward(self, call: _Call, o: _Operands) -> tuple[Tensor, _Saved]:
        raise NotImplementedError

    def backward(self, call: _Call, saved: _Saved, scale: Tensor) -> _Gradients:
        raise NotImplementedError


class _Packed(_Way):
    """Fused, in chunks: gradients are made in the forward."""

    def forward(self, call: _Call, o: _Operands) -> tuple[Tensor, _Saved]:
        given = o.hidden.new_ones(1, dtype=torch.float32) if o.given is None else o.given
        made = fused.fused_loss_and_gradients(*o[:4], *call.fused, given, *call.need, call.budget)
        return made[0], (o.hidden, o.weight, o.target, *made)

    def backward(self, call: _Call, saved: _Saved, scale: Tensor) -> _Gradients:
        hidden, weight, target, *made = saved
        return fused.gradients(fused.Packed(*made), scale * call.factor, hidden, weight, target, call.need)


class _Kept(_Way):
    """Fused, in one chunk, whose exponentials are kept."""

    def forward(self, call: _Call, o: _Operands) -> tuple[Tensor, _Saved]:
        losses, *kept = fused.fused_loss(*o[:4], *call.fused, True)
        return losses, (o.hidden, o.weight, o.given, *kept)

    def backward(self, call: _Call, saved: _Saved, scale: Tensor) -> _Gradients:
        hidden, weight, given, *kept = saved
        scale = scale * call.factor
        scale = scale.reshape(-1) if given is None else scale * given
        return fused.fused_loss_backward(*kept, hidden, weight, scale, *call.need)


class _Again(_Packed):
    """Fused, where each row's loss has a gradient of its own: the logits are computed again when that is known."""

    def forward(self, call: _Call, o: _Operands) -> tuple[Tensor, _Saved]:
        losses, *_ = fused.fused_loss(*o[:4], *call.fused, False)
        return losses, o

    def backward(self, call: _Call, saved: _Saved, scale: Tensor) -> _Gradients:
        o = _Operands(*saved)
        _, made = super().forward(call, o._replace(given=scale if o.given is None else scale * o.given))
        return super().backward(call, made, scale.new_ones(()))


class _Chunks(_Way):
    """In chunks: gradients are made in the forward, in float32."""

    keep = ""

    def forward(self, call: _Call, o: _Operands) -> tuple[Tensor, _Saved]:
        made = linear_cross_entropy_forward(*o, call.ignore_index, *call.how, *call.need, self.keep, call.budget)
        losses, _, _, kept, *gradients = made
        return losses, (kept, o.hidden, o.weight) if self.keep else (o.hidden, *gradients)

    def backward(self, call: _Call, saved: _Saved, scale: Tensor) -> _Gradients:
        hidden, *gradients = saved
        return tuple((g * (scale * call.factor)).to(hidden.dtype) for g in gradients)


class _Gradient(_Chunks):
    """All logits' gradients are kept."""

    keep = "gradient"

    def backward(self, call: _Call, saved: _Saved, scale: Tensor) -> _Gradients:
        return linear_cross_entropy_backward(*saved, scale * call.factor, *call.need)


class _Logits(_Way):
    """All logits are kept."""

    def forward(self, call: _Call, o: _Operands) -> tuple[Tensor, _Saved]:
        need = (True, False, False)  # none of these is computed, but that something is needed
        made = linear_cross_entropy_forward(*o[:4], None, call.ignore_index, *call.how, *need, "logits", call.budget)
        losses, most, total, logits, *_ = made
        return losses, (o.hidden, o.weight, o.target, o.given, most, total, logits)

    def backward(self, call: _Call, saved: _Saved, scale: Tensor, of_lse: Tensor | None = None) -> _Gradients:
        hidden, weight, target, given, most, total, logits = saved
        scale = scale if given is None else scale * given
        of_label = torch.where(target == call.ignore_index, 0, scale).to(most.dtype)
        of_lse = of_label if of_lse is None else of_label + of_lse
        rows = logits, target, most, total, of_lse, of_label
        return linear_cross_entropy_from_logits(*rows, *call.how, hidden, weight, *call.need)


def _can_fuse(hidden: Tensor, weight: Tensor, smoothing: float) -> bool:
    """Whether the fused kernels take a loss: they are made for Hopper, and measured there."""
    return (
        hidden.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(hidden.device) == (9, 0)
        and hidden.dtype is torch.bfloat16
        and smoothing == 0
        and isinstance(weight.shape[0], int)
        and isinstance(weight.shape[1], int)
        and weight.shape[0] >= 1024
        and weight.shape[1] % 8 == 0
    )


def _way(call: _Call, hidden: Tensor, weight: Tensor, each: bool, memory: str) -> _Way:
    """The way to take; `each` says that each row's loss gets a gradient of its own."""
    n, classes, itemsize = hidden.shape[0], weight.shape[0], hidden.element_size()
    if _can_fuse(hidden, weight, call.how.smoothing):
        if each:
            return _Again() if memory == "lean" else _Kept()
        return _Kept() if known_true(fused.kept_bytes(n, hidden.shape[1], classes) <= call.budget) else _Packed()
    if each:
        return _Logits()
    kept = keep_all(n, hidden.shape[1], classes, itemsize, call.budget, call.need[1])
    return _Gradient() if kept else _Chunks()


class _Loss(torch.autograd.Function):
    """The losses of rows, or their sum over `count`, with the gradients of one of the ways."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        given: Tensor | None,
        count: Tensor | None,
        call: _Call,
        memory: str,
    ) -> Tensor:
        call = call._replace(need=tuple(bool(n) for n in ctx.needs_input_grad[:3]))
        ctx.call, ctx.way, ctx.each = call, _way(call, hidden, weight, count is None, memory), count is None
        losses, saved = ctx.way.forward(call, _Operands(hidden, weight, bias, target, given))
        ctx.save_for_backward(_trained(call, hidden, weight, bias), count, *saved)
        losses = losses if given is None else losses * given
        return losses if count is None else losses.sum() / count

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        trained, count, *saved = ctx.saved_tensors
        with torch.no_grad():
            scale = dloss if ctx.each else torch.where(count > 0, dloss / count, 0.0)
            gradients = ctx.way.backward(ctx.call, tuple(saved), scale)
        gradients = tuple(g if n else None for g, n in zip(gradients, ctx.call.need, strict=True))
        return *_final(trained, dloss, gradients), *(None,) * (len(ctx.needs_input_grad) - 3)


class _LossAndLse(torch.autograd.Function):
    """The losses of rows and their log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, call: _Call
    ) -> tuple[Tensor, Tensor]:
        ctx.call = call._replace(need=tuple(bool(n) for n in ctx.needs_input_grad[:3]))
        losses, saved = _Logits().forward(ctx.call, _Operands(hidden, weight, bias, target, None))
        *_, most, total, _ = saved
        ctx.save_for_backward(_trained(ctx.call, hidden, weight, bias), *saved)
        return losses, most + torch.log(total)

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor, dlse: Tensor) -> tuple[Any, ...]:
        trained, *saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = _Logits().backward(ctx.call, tuple(saved), dlosses, dlse)
        gradients = tuple(g if n else None for g, n in zip(gradients, ctx.call.need, strict=True))
        return *_final(trained, dlosses, gradients), None, None


def _trained(call: _Call, *operands: Tensor | None) -> Tensor | None:
    """An operand that needs a gradient."""
    return next((x for x, needed in zip(operands, call.need, strict=True) if needed), None)


def _final(trained: Tensor, dloss: Tensor, gradients: _Gradients) -> _Gradients:
    """With create_graph=True, gradients must not pass for constants."""
    return _Final.apply(trained, dloss, *gradients) if torch.is_grad_enabled() else gradients


class _Final(torch.autograd.Function):
    """Gradients, tied to what they depend on only so that differentiating them again is an error."""

    @staticmethod
    def forward(ctx: Any, trained: Tensor, dloss: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{_NAME} has no second derivative; compute this gradient without create_graph=True, or compile with "
            'options={"liger.disable": "linear_cross_entropy"}'
        )


# ---- the ops -------------------------------------------------------------------------------------------------------


def _losses(call: _Call, o: _Operands) -> tuple[Tensor, Tensor]:
    """The rows' losses and log-sum-exp, without gradients; the latter is not computed by the fused kernels."""
    if _can_fuse(o.hidden, o.weight, call.how.smoothing):
        return fused.fused_loss(*o[:4], *call.fused, False)[0], o.hidden.new_empty(0)
    no = (False, False, False)
    made = linear_cross_entropy_forward(*o[:4], None, call.ignore_index, *call.how, *no, "", call.budget)
    losses, most, total, *_ = made
    return losses, most + torch.log(total)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"linear_cross_entropy: {name} is one of {known}, not {value!r}")


def _counted(target: Tensor, ignore_index: int, classes: int) -> Tensor:
    counted = target != ignore_index
    if target.is_cuda:  # elsewhere the op itself raises
        inside = ~counted | ((target >= 0) & (target < classes))
        torch._assert_async(inside.all(), "linear_cross_entropy: target out of range")
    return counted


_NAME = f"{NAMESPACE}::linear_cross_entropy"
torch.library.define(
    _NAME,
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int ignore_index=-100, str reduction='mean',"
    " float scale=1.0, float divisor=1.0, float softcap=0.0, bool wide=False, Tensor? class_weight=None,"
    " float label_smoothing=0.0, str memory='balanced') -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_NAME, "CompositeImplicitAutograd")
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    divisor: float = 1.0,
    softcap: float = 0.0,
    wide: bool = False,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    memory: str = "balanced",
) -> Tensor:
    _check(hidden, weight, bias, target)
    _one_of("reduction", reduction, REDUCTIONS)
    _one_of("memory", memory, tuple(BUDGET))
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing is between 0 and 1, not {label_smoothing}")
    sums = torch.promote_types(torch.float32, hidden.dtype)
    given = None
    counted = _counted(target, ignore_index, weight.shape[0])
    if class_weight is not None:
        if label_smoothing:
            raise ValueError("linear_cross_entropy: class_weight and label_smoothing are not taken together")
        if class_weight.shape != weight.shape[:1] or class_weight.requires_grad:
            raise ValueError(
                f"linear_cross_entropy: class_weight has shape {tuple(class_weight.shape)}, needs [{weight.shape[0]}], "
                "and no gradient"
            )
        given = torch.where(counted, class_weight.to(sums)[torch.where(counted, target, 0)], 0)
    count = None
    if reduction != "none":
        ones = counted if given is None else given
        count = ones.sum().to(sums) if reduction == "mean" else torch.ones((), dtype=sums, device=hidden.device)
    call = _Call(ignore_index, Transform(scale, divisor, softcap, wide, label_smoothing), (), BUDGET[memory])
    if torch.is_grad_enabled():
        return _Loss.apply(hidden, weight, bias, target, given, count, call, memory)
    losses, _ = _losses(call, _Operands(hidden, weight, bias, target, None))
    losses = losses if given is None else losses * given
    return losses if count is None else losses.sum() / count


linear_cross_entropy = torch.ops.liger_compile.linear_cross_entropy.default

_LSE_NAME = f"{NAMESPACE}::linear_cross_entropy_lse"
torch.library.define(
    _LSE_NAME,
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int ignore_index=-100, str reduction='mean',"
    " float scale=1.0, float divisor=1.0, float softcap=0.0, bool wide=False) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_LSE_NAME, "CompositeImplicitAutograd")
def _linear_cross_entropy_lse(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    divisor: float = 1.0,
    softcap: float = 0.0,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    _check(hidden, weight, bias, target)
    _one_of("reduction", reduction, REDUCTIONS)
    counted = _counted(target, ignore_index, weight.shape[0])
    call = _Call(ignore_index, Transform(scale, divisor, softcap, wide), (), BUDGET["balanced"])
    losses, lse = _LossAndLse.apply(hidden, weight, bias, target, call)
    if reduction == "none":
        return losses, lse
    return (losses.sum() / counted.sum() if reduction == "mean" else losses.sum()), lse


linear_cross_entropy_lse = torch.ops.liger_compile.linear_cross_entropy_lse.default
