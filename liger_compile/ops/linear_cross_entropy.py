"""Cross-entropy of a linear layer's outputs, without holding all of them.

`linear_cross_entropy(hidden, weight, bias, target, ignore_index=-100, reduction="mean", scale=1.0, divisor=1.0,
softcap=0.0, wide=False, class_weight=None, label_smoothing=0.0, memory="balanced") -> loss`::

    logits = hidden @ weight.T + bias
    z      = logits * scale / divisor;  z = softcap * tanh(z / softcap), if softcap > 0
    loss_i = w_y (log(sum_j exp(z_ij)) - (1 - e) z_iy - e mean_j(z_ij))

with y = target_i, w = class_weight or 1, e = label_smoothing.

- hidden [N, H], weight [V, H], bias [V] or None: one dtype of float32, bfloat16, float16. target [N]: int64 in
  [0, V), or `ignore_index`. class_weight: float [V], without a gradient; not together with label_smoothing.
- loss: float32; the mean, sum w_y loss_i / sum w_y, over the rows not ignored (NaN if none), or the sum: a scalar; or
  "none": [N], 0 where the row is ignored.
- memory: "lean", "balanced" or "fast": what is taken of logits at a time, see BUDGET. docs/loss.md has their costs.
- A gradient nobody needs is not computed. A target outside [0, V) raises IndexError on the CPU and a device-side
  assertion on CUDA, as in eager.

`linear_cross_entropy_rows(hidden, weight, bias, target, shape, ignore_index=-100, scale=1.0, divisor=1.0, softcap=0.0,
wide=False, label_smoothing=0.0, negative=False, memory="balanced") -> losses`: those of reduction "none", in another
shape of N elements; if `negative`, -losses: the log-probabilities of the labels.

`linear_cross_entropy_sum(hidden, weight, bias, target, row_weight=None, factor=1.0, ignore_index=-100, scale=1.0,
divisor=1.0, softcap=0.0, wide=False, label_smoothing=0.0, memory="balanced") -> loss`: a float32 scalar, factor times
the sum of w_i loss_i, with w the N elements of row_weight, which has no gradient, or 1. Rows of weight 0 are left out,
as those are that are ignored.

`linear_cross_entropy_z(hidden, weight, bias, target, z_weight=None, z_factor=1.0, row_weight=None, factor=1.0,
ignore_index=-100, reduction="sum", scale=1.0, divisor=1.0, softcap=0.0, wide=False, memory="balanced") -> loss`: the
loss, "mean" or "sum", or that of `linear_cross_entropy_sum` if there are row_weight or factor, plus z_factor times the
sum of v_i lse_i^2 over all rows, those whose label is ignored too: a float32 scalar. v is z_weight as w is row_weight,
and lse_i = log(sum_j exp(z_ij)).

`linear_cross_entropy_lse(hidden, weight, bias, target, ignore_index=-100, reduction="mean", scale=1.0, divisor=1.0,
softcap=0.0, wide=False, shape=None) -> (loss, lse)`: the loss, and float32 log(sum_j exp(z_ij)) of every row, [N] or in
another shape of N elements, for losses that are computed from that too (z-loss). It holds all logits, as the code does
that it stands for.

bfloat16 on Hopper is computed by `fused_loss.py`, all else by `chunked_loss.py`. A compiler is shown plain torch where
its own code is as fast: on Hopper if the loss is small (SMALL_BYTES), without kernels unless memory is "lean".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch import known_true
from . import chunked_loss as chunked
from . import fused_loss as fused
from ._library import define_composite, is_traced, shows_plain
from .chunked_loss import Transform

REDUCTIONS = ("mean", "sum", "none")
BUDGET = {"lean": 150 << 20, "balanced": 561 << 20, "fast": 4 << 30}
"""Bytes of logits, or of their gradients, that are held at a time."""
SMALL_BYTES = 256 << 20
"""On Hopper a compiler is shown plain torch for logits that take no more: it is as fast there."""


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
    squares: Tensor | None = None
    """That of the square of each row's log-sum-exp, which is added: float32 [N]."""


_Saved = tuple[Tensor | None, ...]
_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Way:
    """A way to compute rows' losses and their gradients; `scale` is that of all losses, or of each, [N]."""

    def forward(self, call: _Call, o: _Operands) -> tuple[Tensor, _Saved]:
        raise NotImplementedError

    def backward(self, call: _Call, saved: _Saved, scale: Tensor) -> _Gradients:
        raise NotImplementedError

    def lse(self, saved: _Saved) -> Tensor | None:
        """The rows' log-sum-exp, of those ways that give it."""
        return None


class _Packed(_Way):
    """Fused, in chunks: gradients are made in the forward."""

    def forward(self, call: _Call, o: _Operands) -> tuple[Tensor, _Saved]:
        given = o.hidden.new_ones(1, dtype=torch.float32) if o.given is None else o.given
        made = fused.fused_loss_and_gradients(*o[:4], *call.fused, given, o.squares, *call.need, call.budget)
        return made[0], (o.hidden, o.weight, o.target, *made)

    def lse(self, saved: _Saved) -> Tensor | None:
        return fused.Packed(*saved[3:]).lse

    def backward(self, call: _Call, saved: _Saved, scale: Tensor) -> _Gradients:
        hidden, weight, target, *made = saved
        return fused.gradients(fused.Packed(*made), scale * call.factor, hidden, weight, target, call.need)


class _Kept(_Way):
    """Fused, where each row's loss has a gradient of its own: the exponentials of all rows are kept."""

    def forward(self, call: _Call, o: _Operands) -> tuple[Tensor, _Saved]:
        losses, _, *kept = fused.fused_loss(*o[:4], *call.fused, True)
        return losses, (o.hidden, o.weight, o.given, *kept)

    def backward(self, call: _Call, saved: _Saved, scale: Tensor) -> _Gradients:
        hidden, weight, given, *kept = saved
        scale = scale * call.factor if given is None else scale * given * call.factor
        return fused.fused_loss_backward(*kept, hidden, weight, scale, *call.need)


class _Again(_Packed):
    """Fused, where each row's loss has a gradient of its own: the logits are computed again when it is known."""

    def lse(self, saved: _Saved) -> Tensor | None:
        return None

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
        made = chunked.linear_cross_entropy_forward(
            *o[:5], call.ignore_index, *call.how, *call.need, self.keep, call.budget
        )
        losses, _, _, kept, *gradients = made
        return losses, (kept, o.hidden, o.weight) if self.keep else (o.hidden, *gradients)

    def backward(self, call: _Call, saved: _Saved, scale: Tensor) -> _Gradients:
        hidden, *gradients = saved
        return tuple((g * (scale * call.factor)).to(hidden.dtype) for g in gradients)


class _Gradient(_Chunks):
    """All logits' gradients are kept."""

    keep = "gradient"

    def backward(self, call: _Call, saved: _Saved, scale: Tensor) -> _Gradients:
        return chunked.linear_cross_entropy_backward(*saved, scale * call.factor, *call.need)


class _Logits(_Way):
    """All logits are kept."""

    def forward(self, call: _Call, o: _Operands) -> tuple[Tensor, _Saved]:
        need = (True, False, False)  # none of these is computed, but that something is needed
        made = chunked.linear_cross_entropy_forward(
            *o[:4], None, call.ignore_index, *call.how, *need, "logits", call.budget
        )
        losses, most, total, logits, *_ = made
        return losses, (o.hidden, o.weight, o.target, o.given, most, total, logits)

    def backward(self, call: _Call, saved: _Saved, scale: Tensor, of_lse: Tensor | None = None) -> _Gradients:
        hidden, weight, target, given, most, total, logits = saved
        scale = scale if given is None else scale * given
        of_label = torch.where(target == call.ignore_index, 0, scale).to(most.dtype)
        of_lse = of_label if of_lse is None else of_label + of_lse
        rows = logits, target, most, total, of_lse, of_label
        return chunked.linear_cross_entropy_from_logits(*rows, *call.how, hidden, weight, *call.need)


def is_hopper(device: torch.device) -> bool:
    """What the fused kernels are made for, and measured on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def _can_fuse(hidden: Tensor, weight: Tensor, smoothing: float) -> bool:
    """Whether the fused kernels take a loss."""
    return (
        is_hopper(hidden.device)
        and hidden.dtype is torch.bfloat16
        and smoothing == 0
        and isinstance(weight.shape[0], int)
        and isinstance(weight.shape[1], int)
        and weight.shape[0] >= 1024
        and weight.shape[1] % 8 == 0
    )


def _is_left(hidden: Tensor, weight: Tensor, smoothing: float, memory: str) -> bool:
    """Whether a compiler is at work, and its own code for these logits no worse than ours.

    Without kernels, chunks take longer than Inductor's loss; who asks for "lean" gets them all the same.
    """
    if shows_plain(hidden):
        few = None if memory != "lean" else BUDGET[memory]
    elif is_traced(hidden) and _can_fuse(hidden, weight, smoothing):
        few = min(SMALL_BYTES, BUDGET[memory])
    else:
        return False
    size = hidden.shape[0] * weight.shape[0] * hidden.element_size()
    return few is None or known_true(size <= few)  # asked last: it guards the size


def _written_out(hidden: Tensor, weight: Tensor, bias: Tensor | None, how: Transform) -> Tensor:
    """What the op takes the cross-entropy of, float32, as the model would write it."""
    with torch.autocast(hidden.device.type, enabled=False):
        z = F.linear(hidden, weight, bias)
        z = z.float() if how.wide else z
        if how.scale != 1:
            z = z * how.scale
        if how.divisor != 1:
            z = z / how.divisor
        if how.softcap > 0:
            z = torch.tanh(z / how.softcap) * how.softcap
        return z.float()


def _way(call: _Call, hidden: Tensor, weight: Tensor, each: bool, memory: str) -> _Way:
    """The way to take; `each` says that each row's loss gets a gradient of its own."""
    n, classes, itemsize = hidden.shape[0], weight.shape[0], hidden.element_size()
    if _can_fuse(hidden, weight, call.how.smoothing):
        return (_Again() if memory == "lean" else _Kept()) if each else _Packed()
    if each:
        return _Logits()
    kept = chunked.keep_all(n, hidden.shape[1], classes, itemsize, call.budget, call.need[1])
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
        squares: Tensor | None,
        count: Tensor | None,
        call: _Call,
        memory: str,
    ) -> Tensor:
        call = call._replace(need=tuple(bool(n) for n in ctx.needs_input_grad[:3]))
        ctx.call, ctx.way, ctx.each = call, _way(call, hidden, weight, count is None, memory), count is None
        o = _Operands(hidden, weight, bias, target, given, squares)
        losses, saved = ctx.way.forward(call, o)
        ctx.save_for_backward(_trained(call, hidden, weight, bias), count, *saved)
        return _reduced(losses, ctx.way.lse(saved), o, count)

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
            "linear_cross_entropy has no second derivative; compute this gradient without create_graph=True, or compile"
            ' with options={"liger.disable": "linear_cross_entropy"}'
        )


# ---- the ops -------------------------------------------------------------------------------------------------------


def _losses(call: _Call, o: _Operands) -> tuple[Tensor, Tensor | None]:
    """The rows' losses, without gradients, and their log-sum-exp, where that costs nothing."""
    if _can_fuse(o.hidden, o.weight, call.how.smoothing):
        made = fused.Kept(*fused.fused_loss(*o[:4], *call.fused, False))
        return made.losses, made.lse
    no = (False, False, False)
    made = chunked.linear_cross_entropy_forward(*o[:4], None, call.ignore_index, *call.how, *no, "", call.budget)
    return made[0], None


def _reduced(losses: Tensor, lse: Tensor | None, o: _Operands, count: Tensor | None) -> Tensor:
    """The losses, times what is given, and squares of log-sum-exp, if they are asked for; or the sum over `count`."""
    losses = losses if o.given is None else losses * o.given
    losses = losses if o.squares is None else losses + o.squares * lse.square()
    return losses if count is None else losses.sum() / count


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"linear_cross_entropy: {name} is one of {known}, not {value!r}")


def _checked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, memory: str, label_smoothing: float
) -> None:
    chunked.check_operands(hidden, weight, bias, target)
    _one_of("memory", memory, tuple(BUDGET))
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing is between 0 and 1, not {label_smoothing}")


def _counted(target: Tensor, ignore_index: int, classes: int) -> Tensor:
    counted = target != ignore_index
    if target.is_cuda:  # elsewhere the op itself raises
        inside = ~counted | ((target >= 0) & (target < classes))
        torch._assert_async(inside.all(), "linear_cross_entropy: target out of range")
    return counted


def _one(hidden: Tensor) -> Tensor:
    """What a sum is divided by."""
    return hidden.new_ones((), dtype=torch.promote_types(torch.float32, hidden.dtype))


def _dense(bias: Tensor | None, target: Tensor) -> tuple[Tensor | None, Tensor]:
    """Both without gaps, as the kernels read them; hidden and weight may lie anyhow."""
    return None if bias is None else bias.contiguous(), target.contiguous()


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
    _checked(hidden, weight, bias, target, memory, label_smoothing)
    _one_of("reduction", reduction, REDUCTIONS)
    sums = torch.promote_types(torch.float32, hidden.dtype)
    if class_weight is not None:
        if label_smoothing:
            raise ValueError("linear_cross_entropy: class_weight and label_smoothing are not taken together")
        if class_weight.shape != weight.shape[:1] or class_weight.requires_grad:
            raise ValueError(
                f"linear_cross_entropy: class_weight has shape {tuple(class_weight.shape)}, needs [{weight.shape[0]}], "
                "and no gradient"
            )
    how = Transform(scale, divisor, softcap, wide, label_smoothing)
    if _is_left(hidden, weight, label_smoothing, memory):
        class_weight = None if class_weight is None else class_weight.float()
        z = _written_out(hidden, weight, bias, how)
        semantics = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        return F.cross_entropy(z, target, class_weight, **semantics)
    counted = _counted(target, ignore_index, weight.shape[0])
    given = count = None
    if class_weight is not None:
        given = torch.where(counted, class_weight.to(sums)[torch.where(counted, target, 0)], 0)
    if reduction != "none":
        ones = counted if given is None else given
        count = ones.sum().to(sums) if reduction == "mean" else _one(hidden)
    call = _Call(ignore_index, how, (), BUDGET[memory])
    return _computed(call, _Operands(hidden, weight, *_dense(bias, target), given), count, memory)


def _computed(call: _Call, o: _Operands, count: Tensor | None, memory: str) -> Tensor:
    """The losses, times what is given, or their sum over `count`."""
    if torch.is_grad_enabled():
        return _Loss.apply(*o, count, call, memory)
    return _reduced(*_losses(call, o), o, count)


linear_cross_entropy = define_composite(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int ignore_index=-100,"
    " str reduction='mean', float scale=1.0, float divisor=1.0, float softcap=0.0, bool wide=False,"
    " Tensor? class_weight=None, float label_smoothing=0.0, str memory='balanced') -> Tensor",
    _linear_cross_entropy,
)


def _of_rows(name: str, given: Tensor | None, target: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Weights of rows, [N]."""
    if given is None:
        return None
    if given.numel() != target.numel() or given.requires_grad:
        raise ValueError(
            f"linear_cross_entropy: {name} has shape {tuple(given.shape)}, needs {target.shape[0]} elements, and no "
            "gradient"
        )
    return given.reshape(-1).to(dtype)


def _linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None = None,
    factor: float = 1.0,
    ignore_index: int = -100,
    scale: float = 1.0,
    divisor: float = 1.0,
    softcap: float = 0.0,
    wide: bool = False,
    label_smoothing: float = 0.0,
    memory: str = "balanced",
) -> Tensor:
    how = scale, divisor, softcap, wide, None, label_smoothing, memory
    if row_weight is None:
        return _linear_cross_entropy(hidden, weight, bias, target, ignore_index, "sum", *how) * factor
    sums = torch.promote_types(torch.float32, hidden.dtype)
    row_weight = _of_rows("row_weight", row_weight, target, sums)
    if _is_left(hidden, weight, label_smoothing, memory):
        losses = _linear_cross_entropy(hidden, weight, bias, target, ignore_index, "none", *how)
        return (losses * row_weight).sum() * factor
    _checked(hidden, weight, bias, target, memory, label_smoothing)
    _counted(target, ignore_index, weight.shape[0])
    target = torch.where(row_weight == 0, ignore_index, target)
    call = _Call(ignore_index, Transform(*how[:4], label_smoothing), (), BUDGET[memory])
    o = _Operands(hidden, weight, *_dense(bias, target), row_weight)
    return _computed(call, o, _one(hidden), memory) * factor


linear_cross_entropy_sum = define_composite(
    "linear_cross_entropy_sum(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? row_weight=None,"
    " float factor=1.0, int ignore_index=-100, float scale=1.0, float divisor=1.0, float softcap=0.0, bool wide=False,"
    " float label_smoothing=0.0, str memory='balanced') -> Tensor",
    _linear_cross_entropy_sum,
)


def _linear_cross_entropy_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    shape: Sequence[int],
    ignore_index: int = -100,
    scale: float = 1.0,
    divisor: float = 1.0,
    softcap: float = 0.0,
    wide: bool = False,
    label_smoothing: float = 0.0,
    negative: bool = False,
    memory: str = "balanced",
) -> Tensor:
    how = scale, divisor, softcap, wide, None, label_smoothing, memory
    losses = _linear_cross_entropy(hidden, weight, bias, target, ignore_index, "none", *how)
    return (-losses if negative else losses).view(shape)


linear_cross_entropy_rows = define_composite(
    "linear_cross_entropy_rows(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, SymInt[] shape,"
    " int ignore_index=-100, float scale=1.0, float divisor=1.0, float softcap=0.0, bool wide=False,"
    " float label_smoothing=0.0, bool negative=False, str memory='balanced') -> Tensor",
    _linear_cross_entropy_rows,
)


def _linear_cross_entropy_z(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    z_weight: Tensor | None = None,
    z_factor: float = 1.0,
    row_weight: Tensor | None = None,
    factor: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "sum",
    scale: float = 1.0,
    divisor: float = 1.0,
    softcap: float = 0.0,
    wide: bool = False,
    memory: str = "balanced",
) -> Tensor:
    _checked(hidden, weight, bias, target, memory, 0.0)
    _one_of("reduction", reduction, REDUCTIONS[:2])
    how = Transform(scale, divisor, softcap, wide)
    sums = torch.promote_types(torch.float32, hidden.dtype)
    row_weight = _of_rows("row_weight", row_weight, target, sums)
    z_weight = _of_rows("z_weight", z_weight, target, sums)
    counted = _counted(target, ignore_index, weight.shape[0])
    given = counted.to(sums) * factor if row_weight is None else torch.where(counted, row_weight * factor, 0)
    none: float | Tensor = 0.0
    if reduction == "mean":
        count = counted.sum()
        given, none = torch.where(count > 0, given / count, 0), torch.where(count > 0, 0.0, math.nan)
    squares = torch.full_like(given, z_factor) if z_weight is None else z_weight * z_factor
    one = _one(hidden)
    o = _Operands(hidden, weight, bias, target, given, squares)
    if _is_left(hidden, weight, 0.0, memory):
        z = _written_out(hidden, weight, bias, how)
        losses = F.cross_entropy(z, target, ignore_index=ignore_index, reduction="none")
        return _reduced(losses, z.logsumexp(1), o, one) + none
    if not _can_fuse(hidden, weight, 0.0):
        made = _linear_cross_entropy_lse(hidden, weight, bias, target, ignore_index, "none", *how[:4])
        return _reduced(*made, o, one) + none
    # A row whose label is ignored has a square. Of its loss, which counts nothing, any label will do.
    target = torch.where(counted & (given != 0), target, torch.where(squares != 0, 0, ignore_index))
    bias, target = _dense(bias, target)
    call = _Call(ignore_index, how, (), BUDGET[memory])
    return _computed(call, o._replace(bias=bias, target=target), one, memory) + none


linear_cross_entropy_z = define_composite(
    "linear_cross_entropy_z(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? z_weight=None,"
    " float z_factor=1.0, Tensor? row_weight=None, float factor=1.0, int ignore_index=-100, str reduction='sum',"
    " float scale=1.0, float divisor=1.0, float softcap=0.0, bool wide=False, str memory='balanced') -> Tensor",
    _linear_cross_entropy_z,
)


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
    shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    chunked.check_operands(hidden, weight, bias, target)
    _one_of("reduction", reduction, REDUCTIONS)
    how = Transform(scale, divisor, softcap, wide)
    shape = hidden.shape[:1] if shape is None else shape
    if shows_plain(hidden):
        z = _written_out(hidden, weight, bias, how)
        return F.cross_entropy(z, target, ignore_index=ignore_index, reduction=reduction), z.logsumexp(1).view(shape)
    bias, target = _dense(bias, target)
    counted = _counted(target, ignore_index, weight.shape[0])
    call = _Call(ignore_index, how, (), BUDGET["balanced"])
    losses, lse = _LossAndLse.apply(hidden, weight, bias, target, call)
    lse = lse.view(shape)
    if reduction == "none":
        return losses, lse
    return (losses.sum() / counted.sum() if reduction == "mean" else losses.sum()), lse


linear_cross_entropy_lse = define_composite(
    "linear_cross_entropy_lse(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int ignore_index=-100,"
    " str reduction='mean', float scale=1.0, float divisor=1.0, float softcap=0.0, bool wide=False,"
    " SymInt[]? shape=None) -> (Tensor, Tensor)",
    _linear_cross_entropy_lse,
)
