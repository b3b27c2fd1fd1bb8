"""Rotary position embedding, rotate-half form: `y = x * cos + cat(-x2, x1) * sin`, x1 and x2 the halves of x.

`rope(x, cos, sin, upcast=False, promote=False, contiguous=False) -> y`
`rope_pair(q, k, cos, sin, upcast=False, promote=False, contiguous=False) -> (y_q, y_k)`: two tensors with one cos and
sin, one launch.

- x: [..., D], 2 to 4 dimensions, any strides, float32, bfloat16 or float16.
- cos, sin: [..., R], one dtype, broadcast against x's leading dimensions, R even and R <= D. Where R < D
  only the first R components are rotated, by R / 2, and the rest are passed on.
- Products and their sum are rounded to the promoted dtype of x and cos (float32 if `upcast`), as in eager; y has x's
  dtype, or keeps the promoted one if `promote`. y has x's strides, made
  dense, or is contiguous, as torch.cat's results are.
- cos and sin are constants: asking for their gradient is an error. The backward rotates the other way.

Formula: Su et al., RoFormer, 2021 (arXiv:2104.09864), in the half layout of GPT-NeoX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import define, define_forward, dense_like, kernel, once_differentiable


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    rotated = cos.shape[-1]
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(f"rope: cos {cos.dtype}{tuple(cos.shape)} and sin {sin.dtype}{tuple(sin.shape)} must be alike")
    if rotated % 2 or rotated > x.shape[-1]:
        raise ValueError(f"rope: cos has {rotated} components, which must be even and at most x's {x.shape[-1]}")
    lead = torch.broadcast_shapes(x.shape[:-1], cos.shape[:-1])
    if tuple(lead) != tuple(x.shape[:-1]) or not 2 <= x.ndim <= 4:
        raise ValueError(f"rope: cos {tuple(cos.shape)} does not broadcast to x {tuple(x.shape)}")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, work: torch.dtype, forward: bool) -> Tensor:
    """The rotation, or its transpose, in `work` and rounded as the forward in eager is; no particular strides."""
    rotated = cos.shape[-1]
    part, rest = x[..., :rotated].to(work), x[..., rotated:].to(work)
    x1, x2 = part.chunk(2, dim=-1)
    if forward:
        y = part * cos + torch.cat((-x2, x1), dim=-1) * sin
    else:
        s1, s2 = sin.chunk(2, dim=-1)
        y = part * cos + torch.cat((x2 * s2, -x1 * s1), dim=-1)
    return torch.cat((y, rest), dim=-1) if rest.shape[-1] else y


def work_dtype(x: torch.dtype, cos: Tensor, upcast: bool) -> torch.dtype:
    """The dtype that products and sums are rounded to."""
    return torch.promote_types(torch.promote_types(x, cos.dtype), torch.float32 if upcast else x)


def empty(x: Tensor, cos: Tensor, upcast: bool, promote: bool, contiguous: bool) -> Tensor:
    """Room for the rotation of x."""
    dtype = work_dtype(x.dtype, cos, upcast) if promote else x.dtype
    return x.new_empty(x.shape, dtype=dtype) if contiguous else torch.empty_like(x, dtype=dtype)


def _fake(
    x: Tensor, cos: Tensor, sin: Tensor, upcast: bool = False, promote: bool = False, contiguous: bool = False
) -> Tensor:
    _check(x, cos, sin)
    return empty(x, cos, upcast, promote, contiguous)


def _reference(
    x: Tensor, cos: Tensor, sin: Tensor, upcast: bool = False, promote: bool = False, contiguous: bool = False
) -> Tensor:
    _check(x, cos, sin)
    y = _rotate(x, cos, sin, work_dtype(x.dtype, cos, upcast), True)
    y = y if promote else y.to(x.dtype)
    return y.contiguous() if contiguous else dense_like(y, x)


def _each(function: Any, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return function(q, *rest), function(k, *rest)


def _pair_fake(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    upcast: bool = False,
    promote: bool = False,
    contiguous: bool = False,
) -> tuple[Tensor, Tensor]:
    return _each(_fake, q, k, cos, sin, upcast, promote, contiguous)


def _pair_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    upcast: bool = False,
    promote: bool = False,
    contiguous: bool = False,
) -> tuple[Tensor, Tensor]:
    return _each(_reference, q, k, cos, sin, upcast, promote, contiguous)


def _backward_fake(
    dy: Tensor, cos: Tensor, sin: Tensor, strides: list[int], dtype: torch.dtype, upcast: bool
) -> Tensor:
    return dy.new_empty_strided(dy.shape, strides, dtype=dtype)


def _backward_reference(
    dy: Tensor, cos: Tensor, sin: Tensor, strides: list[int], dtype: torch.dtype, upcast: bool
) -> Tensor:
    dx = _rotate(dy, cos, sin, work_dtype(dtype, cos, upcast), False)
    return _backward_fake(dy, cos, sin, strides, dtype, upcast).copy_(dx)


def _pair_backward_fake(
    dq: Tensor,
    dk: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_strides: list[int],
    k_strides: list[int],
    dtype: torch.dtype,
    upcast: bool,
) -> tuple[Tensor, Tensor]:
    rest = (dtype, upcast)
    return _backward_fake(dq, cos, sin, q_strides, *rest), _backward_fake(dk, cos, sin, k_strides, *rest)


def _pair_backward_reference(
    dq: Tensor,
    dk: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_strides: list[int],
    k_strides: list[int],
    dtype: torch.dtype,
    upcast: bool,
) -> tuple[Tensor, Tensor]:
    rest = (dtype, upcast)
    return _backward_reference(dq, cos, sin, q_strides, *rest), _backward_reference(dk, cos, sin, k_strides, *rest)


rope_forward, rope = define_forward(
    "rope(Tensor x, Tensor cos, Tensor sin, bool upcast=False, bool promote=False, bool contiguous=False) -> Tensor",
    _reference,
    _fake,
    kernel("rope", "forward"),
)
rope_pair_forward, rope_pair = define_forward(
    "rope_pair(Tensor q, Tensor k, Tensor cos, Tensor sin, bool upcast=False, bool promote=False,"
    " bool contiguous=False) -> (Tensor, Tensor)",
    _pair_reference,
    _pair_fake,
    kernel("rope", "pair_forward"),
)
rope_backward = define(
    "rope_backward(Tensor dy, Tensor cos, Tensor sin, SymInt[] strides, ScalarType dtype, bool upcast) -> Tensor",
    _backward_reference,
    _backward_fake,
    kernel("rope", "backward"),
)
rope_pair_backward = define(
    "rope_pair_backward(Tensor dq, Tensor dk, Tensor cos, Tensor sin, SymInt[] q_strides, SymInt[] k_strides,"
    " ScalarType dtype, bool upcast) -> (Tensor, Tensor)",
    _pair_backward_reference,
    _pair_backward_fake,
    kernel("rope", "pair_backward"),
)


def _dense_strides(x: Tensor) -> tuple[int, ...]:
    """x's strides with any gaps closed: the layout its gradient is wanted in."""
    return torch.empty_like(x, device="meta").stride()


def _refuse_gradient_of_angles(ctx: Any, cos_at: int) -> None:
    if any(ctx.needs_input_grad[cos_at : cos_at + 2]):
        raise ValueError("rope: cos and sin are constants; detach them, or do not use this op to train them")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, upcast, *_ = inputs
    _refuse_gradient_of_angles(ctx, 1)
    ctx.layout = _dense_strides(x), x.dtype, upcast
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return rope_backward(dy, *ctx.saved_tensors, *ctx.layout), *(None,) * 5


def _pair_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, cos, sin, upcast, *_ = inputs
    _refuse_gradient_of_angles(ctx, 2)
    ctx.layout = _dense_strides(q), _dense_strides(k), q.dtype, upcast
    ctx.save_for_backward(cos, sin)


def _pair_backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
    return *rope_pair_backward(dq, dk, *ctx.saved_tensors, *ctx.layout), *(None,) * 5


torch.library.register_autograd(rope_forward.name(), _backward, setup_context=_setup)
torch.library.register_autograd(rope_pair_forward.name(), _pair_backward, setup_context=_pair_setup)
once_differentiable(rope_backward)
once_differentiable(rope_pair_backward)
