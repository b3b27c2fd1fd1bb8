"""RMS normalisation over the last dimension: `y = x / sqrt(mean(x^2) + eps) * (offset + weight)`.

`rms_norm(x, weight, eps, offset=0.0, rounding="normed", guard="add", divisor=None) -> y`

- x: [..., H], float32, bfloat16 or float16, any strides; weight: [H] or None.
- The statistics and products are float32. `rounding` says where values are rounded to x's dtype, as models differ:

  - "normed": the normalised x, before the weight (Llama). y has the promoted dtype of x and weight.
  - "result": the product with the weight (Gemma, OLMo 2). y has x's dtype.
  - "factor": 1 / sqrt(...) and the products, all in x's dtype (DeepSeek-V4). y has the promoted dtype.

- `divisor` stands for H in mean(x^2) = sum(x^2) / H. 1 makes rows of length 1.
- `guard` says how eps keeps rows of zeros finite: x is multiplied by

  - "add": 1 / sqrt(mean(x^2) + eps).
  - "floor": 1 / max(rms, eps), where rms = sqrt(mean(x^2)). Rows under the floor are x / eps, a constant factor.
  - "outside": 1 / (rms + eps). The gradient of the rms of a row of zeros is zero.

- y has x's strides, made dense. Gradients: dx in x's dtype; dweight is summed in float32, then rounded once.

With a residual, for graphs whose gradients are there already (`fuse.py`); all tensors contiguous, of one shape:

`add_rms_norm(x, residual, weight, eps, offset, rounding) -> (y, h)`: h = x + residual, in their dtype; y is its norm.
`rms_norm_add(x, residual, weight, eps, offset, rounding) -> h`: residual + the norm of x, which has residual's dtype.
`rms_norm_backward_add(dy, x, weight, dresidual, eps, offset, rounding, need_dweight, again) -> (dx, dweight, y)`: of
the sum of dy, one to three tensors; dresidual, if not None, is added to dx; y is the norm of x if `again`, else empty.

Formula: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import Launcher, define, define_forward, dense_like, once_differentiable

ROUNDINGS = ("normed", "result", "factor")
GUARDS = ("add", "floor", "outside")


def _check(x: Tensor, weight: Tensor | None, rounding: str, guard: str) -> None:
    if weight is not None and (weight.ndim != 1 or weight.shape[0] != x.shape[-1]):
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, x needs [{x.shape[-1]}]")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rms_norm: rounding is one of {ROUNDINGS}, not {rounding!r}")
    if guard not in GUARDS:
        raise ValueError(f"rms_norm: guard is one of {GUARDS}, not {guard!r}")


def out_dtype(x: Tensor, weight: Tensor | None, rounding: str) -> torch.dtype:
    return x.dtype if weight is None or rounding == "result" else torch.promote_types(x.dtype, weight.dtype)


def _rms(h: Tensor, n: float) -> Tensor:
    """By the length of a row, not a root, which may be one of zero: torch's length has a gradient there."""
    return torch.linalg.vector_norm(h, dim=-1, keepdim=True) / n**0.5


def _factor(h: Tensor, n: float, eps: float, guard: str) -> Tensor:
    """What each row is multiplied by."""
    if guard == "add":
        return torch.rsqrt(h.square().sum(-1, keepdim=True) / n + eps)
    rms = _rms(h, n)
    return 1 / (rms.clamp(min=eps) if guard == "floor" else rms + eps)


def _fake(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    rounding: str = "normed",
    guard: str = "add",
    divisor: float | None = None,
) -> Tensor:
    _check(x, weight, rounding, guard)
    return torch.empty_like(x, dtype=out_dtype(x, weight, rounding))


def _reference(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    rounding: str = "normed",
    guard: str = "add",
    divisor: float | None = None,
) -> Tensor:
    _check(x, weight, rounding, guard)
    h = x.float() if x.dtype is not torch.float64 else x
    factor = _factor(h, h.shape[-1] if divisor is None else divisor, eps, guard)
    y = x * factor.to(x.dtype) if rounding == "factor" else h * factor
    if rounding == "normed":
        y = y.to(x.dtype)
    if weight is not None:
        y = y * ((offset + weight) if rounding != "result" else (offset + weight.to(y.dtype)))
    return dense_like(y.to(out_dtype(x, weight, rounding)), x)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    rounding: str,
    need_dweight: bool,
    guard: str = "add",
    divisor: float | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if not need_dweight else torch.empty_like(weight)


def _backward_reference(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    rounding: str,
    need_dweight: bool,
    guard: str = "add",
    divisor: float | None = None,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.float32, x.dtype)
    h, g = x.to(wide), dy.to(wide)
    n = h.shape[-1] if divisor is None else divisor
    factor = slope = _factor(h, n, eps, guard)
    if guard != "add":
        rms = _rms(h, n)
        slope = torch.where(rms < eps, 0, factor) if guard == "floor" else torch.where(rms == 0, 0, 1 / rms)
    normed = h * factor
    dnormed = g if weight is None else g * (offset + weight.to(wide))
    dx = factor * (dnormed - normed * slope * (dnormed * h).sum(-1, keepdim=True) / n)
    dx = dense_like(dx.to(x.dtype), x)
    if not need_dweight:
        return dx, x.new_empty(0)
    seen = normed if rounding == "result" else normed.to(x.dtype).to(wide)
    return dx, (g * seen).sum_to_size(weight.shape).to(weight.dtype)


def _check_dense(*tensors: Tensor | None) -> None:
    first, *others = (t for t in tensors if t is not None)
    if not first.is_contiguous() or any(t.shape != first.shape or not t.is_contiguous() for t in others):
        raise ValueError("rms_norm: tensors that are added must be contiguous and of one shape")


def _add_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, rounding: str
) -> tuple[Tensor, Tensor]:
    _check_dense(x, residual)
    if x.dtype != residual.dtype:
        raise ValueError(f"rms_norm: x is {x.dtype} and the residual {residual.dtype}; they must be alike")
    return _fake(x, weight, eps, offset, rounding), torch.empty_like(x)


def _add_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, rounding: str
) -> tuple[Tensor, Tensor]:
    _add_fake(x, residual, weight, eps, offset, rounding)
    h = x + residual
    return _reference(h, weight, eps, offset, rounding), h


def _added_fake(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, rounding: str) -> Tensor:
    _check_dense(x, residual)
    y = _fake(x, weight, eps, offset, rounding)
    if y.dtype != residual.dtype:
        raise ValueError(f"rms_norm: the norm is {y.dtype} and the residual {residual.dtype}; they must be alike")
    return y


def _added_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, rounding: str
) -> Tensor:
    _added_fake(x, residual, weight, eps, offset, rounding)
    return residual + _reference(x, weight, eps, offset, rounding)


def _check_sum(dy: list[Tensor], x: Tensor, dresidual: Tensor | None) -> None:
    _check_dense(x, dresidual, *dy)
    if not 1 <= len(dy) <= 3 or len({t.dtype for t in dy}) > 1:
        raise ValueError(f"rms_norm_backward_add: dy is one to three tensors of a dtype, not {[t.dtype for t in dy]}")


def _backward_add_fake(
    dy: list[Tensor],
    x: Tensor,
    weight: Tensor | None,
    dresidual: Tensor | None,
    eps: float,
    offset: float,
    rounding: str,
    need_dweight: bool,
    again: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_sum(dy, x, dresidual)
    made = _backward_fake(dy[0], x, weight, eps, offset, rounding, need_dweight)
    return *made, _fake(x, weight, eps, offset, rounding) if again else x.new_empty(0)


def _backward_add_reference(
    dy: list[Tensor],
    x: Tensor,
    weight: Tensor | None,
    dresidual: Tensor | None,
    eps: float,
    offset: float,
    rounding: str,
    need_dweight: bool,
    again: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_sum(dy, x, dresidual)
    dx, dweight = _backward_reference(sum(dy), x, weight, eps, offset, rounding, need_dweight)
    y = _reference(x, weight, eps, offset, rounding) if again else x.new_empty(0)
    return dx if dresidual is None else dx + dresidual, dweight, y


rms_norm_forward, rms_norm = define_forward(
    'rms_norm(Tensor x, Tensor? weight, float eps, float offset=0.0, str rounding="normed", str guard="add",'
    " float? divisor=None) -> Tensor",
    _reference,
    _fake,
    Launcher("rms_norm", "forward"),
)
rms_norm_backward = define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, float eps, float offset, str rounding, bool need_dweight,"
    ' str guard="add", float? divisor=None) -> (Tensor, Tensor)',
    _backward_reference,
    _backward_fake,
    Launcher("rms_norm", "backward"),
)

add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, str rounding)"
    " -> (Tensor, Tensor)",
    _add_reference,
    _add_fake,
    Launcher("rms_norm", "add_forward"),
)
rms_norm_add = define(
    "rms_norm_add(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, str rounding) -> Tensor",
    _added_reference,
    _added_fake,
    Launcher("rms_norm", "forward_add"),
)
rms_norm_backward_add = define(
    "rms_norm_backward_add(Tensor[] dy, Tensor x, Tensor? weight, Tensor? dresidual, float eps, float offset,"
    " str rounding, bool need_dweight, bool again) -> (Tensor, Tensor, Tensor)",
    _backward_add_reference,
    _backward_add_fake,
    Launcher("rms_norm", "backward_add"),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, ctx.offset, ctx.rounding, ctx.guard, ctx.divisor = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    need_dweight = weight is not None and ctx.needs_input_grad[1]
    how = ctx.eps, ctx.offset, ctx.rounding, need_dweight, ctx.guard, ctx.divisor
    dx, dweight = rms_norm_backward(dy, x, weight, *how)
    return dx, dweight if need_dweight else None, *(None,) * 5


torch.library.register_autograd(rms_norm_forward.name(), _backward, setup_context=_setup)
once_differentiable(rms_norm_backward)
