"""Cross-entropy of a linear layer's outputs, without ever holding all of them.

`linear_cross_entropy(hidden, weight, bias, target, ignore_index=-100, reduction="mean", scale=1.0, divisor=1.0,
softcap=0.0, wide=False) -> loss`

    logits = hidden @ weight.T + bias                             (rounded to hidden's dtype, as in eager)
    z      = logits * scale / divisor                             (in hidden's dtype, or in float32 if `wide`)
    z      = softcap * tanh(z / softcap), if softcap > 0          (likewise, each step rounded as in eager)
    loss_i = log(sum_j exp(z_ij)) - z_i,target_i                  (float32)

- hidden [N, H], weight [V, H], bias [V] or None: one dtype of float32, bfloat16, float16. target [N]: int64 in
  [0, V), or `ignore_index`. loss: a float32 scalar, the mean over the rows not ignored (NaN if none), or the sum.
- Many rows are taken in chunks (`chunk_rows`): one chunk's logits become their own gradient in place, and that is
  multiplied into dhidden and dweight at once, so the forward already holds the gradients and the backward only scales
  them. Both are kept in float32 and rounded once, after scaling. Memory above inputs: one chunk of logits, 4 N H bytes
  and 4 V H bytes for the float32 gradients, and the gradients themselves.
- Few rows (`keep_whole`) are kept instead: their logits, turned into their gradients in place, take less memory than a
  float32 dweight would. The backward multiplies them in slabs, scaled in float32 and rounded once. Memory above inputs:
  N V elements, SLAB_BYTES, and the gradients themselves.
- A gradient nobody needs is not computed.
- A target outside [0, V) raises IndexError on the CPU and a device-side assertion on CUDA, as in eager.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import known_true
from ._library import NAMESPACE, define, kernel, once_differentiable


class Transform(NamedTuple):
    """What happens to the logits between the linear layer and the loss."""

    scale: float = 1.0
    divisor: float = 1.0
    softcap: float = 0.0
    wide: bool = False


REDUCTIONS = ("mean", "sum")
CHUNK_ROWS = 1024, 4096
SLAB_BYTES = 32 << 20


def chunk_rows(n: int, width: int) -> int:
    """Rows of logits to hold at a time, for n rows of `width` hidden features: a quarter of n, but from 1024 to 4096.

    Each chunk reads the weight twice, and reads and writes its float32 gradient: below 1024 rows the matrix products
    wait for that, above 4096 little more is gained; docs/loss.md has the measurements. `width` rows are never too
    many: their logits take no more than the rounded dweight, which is not there yet.
    """
    least, most = CHUNK_ROWS
    fit = max(min(n // 4, most), least, width)
    chunks = max(-(-n // fit), 1)
    return max(-(-n // (chunks * 128)) * 128, 128)


def keep_whole(n: int, width: int, itemsize: int, need_dweight: bool) -> bool:
    """Whether n rows of logits take no more memory than the float32 dweight that chunks of them would be summed in."""
    return need_dweight and known_true(n * itemsize <= width * 4)


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


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    scale: float,
    divisor: float,
    softcap: float,
    wide: bool,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
    whole: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(hidden, weight, bias, target)
    sums = torch.promote_types(torch.float32, hidden.dtype)

    def grad(like: Tensor | None, needed: bool) -> Tensor:
        return hidden.new_empty(like.shape if needed and not whole else (0,), dtype=sums)

    return (
        hidden.new_empty(hidden.shape[0], dtype=sums),
        hidden.new_empty((hidden.shape[0], weight.shape[0]) if whole else (0,)),
        grad(hidden, need_dhidden),
        grad(weight, need_dweight),
        grad(bias, need_dbias),
    )


def _transform(logits: Tensor, how: Transform) -> tuple[Tensor, Tensor | None]:
    """(z, dz/dlogits) in float32; None where z is the logits themselves."""
    sums = torch.promote_types(torch.float32, logits.dtype)

    def rounded(x: Tensor) -> Tensor:
        return x if how.wide else x.to(logits.dtype).to(sums)

    z, slope = logits.to(sums, copy=True), None
    if how.scale != 1:
        z, slope = rounded(z * how.scale), torch.full_like(z, how.scale)
    if how.divisor != 1:
        z, slope = rounded(z / how.divisor), (torch.ones_like(z) if slope is None else slope) / how.divisor
    if how.softcap > 0:
        t = rounded(torch.tanh(rounded(z / how.softcap)))
        z, slope = rounded(t * how.softcap), (1 - t * t) * (1 if slope is None else slope)
    return z, slope


def _reference_rows(logits: Tensor, target: Tensor, ignore_index: int, how: Transform, gradient: bool) -> Tensor:
    """The loss of each row of logits [n, V], float32; the logits become d(loss_row)/d(logits) if `gradient`."""
    counted = target != ignore_index
    outside = counted & ((target < 0) | (target >= logits.shape[1]))
    if outside.any():
        raise IndexError(f"Target {int(target[outside][0])} is out of bounds for {logits.shape[1]} classes.")
    index = torch.where(counted, target, 0).unsqueeze(1)
    z, slope = _transform(logits, how)
    lse = torch.logsumexp(z, dim=1, keepdim=True)
    loss = torch.where(counted, (lse - z.gather(1, index)).squeeze(1), 0)
    if gradient:
        z = torch.softmax(z, dim=1)  # sums to 1; exp(z - lse) would be off by the rounding of lse, a factor for the row
        z.scatter_add_(1, index, z.new_full((), -1).expand_as(index))
        logits.copy_(torch.where(counted.unsqueeze(1), z if slope is None else z * slope, 0))
    return loss


def _product(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, with `out` float32 and the product never rounded to a narrower dtype."""
    if a.dtype is not out.dtype and out.is_cuda:
        if add:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        else:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=int(add))


def _forward_with(rows_of: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any):
    """The rows' losses, and gradients; `rows_of` computes one chunk of losses, turning logits into their gradient."""
    ignore_index, scale, divisor, softcap, wide, need_dhidden, need_dweight, need_dbias, whole = rest
    how = Transform(scale, divisor, softcap, wide)
    losses, dlogits, dhidden, dweight, dbias = _forward_fake(hidden, weight, bias, target, *rest)
    gradient = need_dhidden or need_dweight or need_dbias
    n = hidden.shape[0]
    size = max(n, 1) if whole else chunk_rows(n, hidden.shape[1])
    dbias.zero_()
    if n == 0:
        dweight.zero_()
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, n, size):
            rows = slice(start, start + size)
            h = hidden[rows]
            logits = dlogits if whole else hidden.new_empty(h.shape[0], weight.shape[0])
            if bias is None:
                torch.mm(h, weight.t(), out=logits)
            else:
                torch.addmm(bias, h, weight.t(), out=logits)
            losses[rows] = rows_of(logits, target[rows], ignore_index, how, gradient)
            if whole:
                break
            if need_dhidden:
                _product(dhidden[rows], logits, weight)
            if need_dweight:
                _product(dweight, logits.t(), h, add=start > 0)
            if need_dbias:
                dbias += logits.sum(0, dtype=dbias.dtype)
    return losses, dlogits, dhidden, dweight, dbias


def _reference(*args: Any) -> tuple[Tensor, ...]:
    return _forward_with(_reference_rows, *args)


def _cuda(*args: Any) -> tuple[Tensor, ...]:
    return _forward_with(kernel("cross_entropy", "rows"), *args)


linear_cross_entropy_forward = define(
    "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int ignore_index,"
    " float scale, float divisor, float softcap, bool wide,"
    " bool need_dhidden, bool need_dweight, bool need_dbias, bool whole)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _reference,
    _forward_fake,
    _cuda,
)


def _backward_fake(
    dlogits: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor, need_dhidden: bool, need_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if need_dhidden else (0,)),
        weight.new_empty(weight.shape),
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


def _backward_with(
    scaled: Any, dlogits: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor, need_dhidden: bool, need_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The products of the logits' gradients; `scaled(x, scale, out)` writes a product, scaled and rounded."""
    dhidden, dweight, dbias = _backward_fake(dlogits, hidden, weight, scale, need_dhidden, need_dbias)
    with torch.autocast(hidden.device.type, enabled=False):
        if need_dhidden:
            _scaled_product(scaled, dhidden, dlogits, weight, scale)
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
    " bool need_dhidden, bool need_dbias) -> (Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
    _backward_cuda,
)
once_differentiable(linear_cross_entropy_forward)
once_differentiable(linear_cross_entropy_backward)


def _reduce(losses: Tensor, target: Tensor, ignore_index: int, reduction: str, classes: int) -> tuple[Tensor, Tensor]:
    """(the loss, what a row's loss is multiplied with in it)."""
    counted = target != ignore_index
    if target.is_cuda:  # elsewhere the op itself raises
        inside = ~counted | ((target >= 0) & (target < classes))
        torch._assert_async(inside.all(), "linear_cross_entropy: target out of range")
    if reduction == "sum":
        return losses.sum(), losses.new_ones(())
    count = counted.sum().to(losses.dtype)
    return losses.sum() / count, torch.where(count > 0, 1 / count, 0.0)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ignore_index: int,
        reduction: str,
        *transform: Any,
    ) -> Tensor:
        need = [bool(n) for n in ctx.needs_input_grad[:3]]
        ctx.whole = keep_whole(hidden.shape[0], hidden.shape[1], hidden.element_size(), need[1])
        losses, dlogits, *gradients = linear_cross_entropy_forward(
            hidden, weight, bias, target, ignore_index, *transform, *need, ctx.whole
        )
        loss, inverse = _reduce(losses, target, ignore_index, reduction, weight.shape[0])
        known = weight if need[1] else hidden if need[0] else bias
        ctx.save_for_backward(known, inverse, *((dlogits, hidden, weight) if ctx.whole else gradients))
        ctx.dtype = hidden.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        known, inverse, *saved = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        with torch.no_grad():
            scale = dloss * inverse
            if ctx.whole:
                gradients = linear_cross_entropy_backward(*saved, scale, need[0], need[2])
            else:
                gradients = [(g * scale).to(ctx.dtype) if n else None for g, n in zip(saved, need, strict=True)]
        gradients = [g if n else None for g, n in zip(gradients, need, strict=True)]
        if torch.is_grad_enabled():  # create_graph=True: they must not pass for constants
            gradients = _Final.apply(known, dloss, *gradients)
        return *gradients, *(None,) * (len(ctx.needs_input_grad) - 3)


class _Final(torch.autograd.Function):
    """Gradients, tied to what they depend on only so that differentiating them again is an error."""

    @staticmethod
    def forward(ctx: Any, known: Tensor, dloss: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{_NAME} has no second derivative; compute this gradient without create_graph=True, or compile with "
            'options={"liger.disable": "linear_cross_entropy"}'
        )


_NAME = f"{NAMESPACE}::linear_cross_entropy"
torch.library.define(
    _NAME,
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int ignore_index=-100, str reduction='mean',"
    " float scale=1.0, float divisor=1.0, float softcap=0.0, bool wide=False) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_NAME, "CompositeImplicitAutograd")
def _composite(
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
) -> Tensor:
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction is one of {REDUCTIONS}, not {reduction!r}")
    transform = Transform(scale, divisor, softcap, wide)
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(hidden, weight, bias, target, ignore_index, reduction, *transform)
    losses, *_ = linear_cross_entropy_forward(
        hidden, weight, bias, target, ignore_index, *transform, False, False, False, False
    )
    return _reduce(losses, target, ignore_index, reduction, weight.shape[0])[0]


linear_cross_entropy = torch.ops.liger_compile.linear_cross_entropy.default
