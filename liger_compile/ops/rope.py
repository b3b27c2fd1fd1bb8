"""Rotary position embedding: each pair of components (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin).

`rope(x, cos, sin, upcast=False, promote=False, contiguous=False, layout="halves", inverse=False, per_pair=False) -> y`
`rope_pair(q, k, cos, sin, ...) -> (y_q, y_k)`: two tensors with one cos and sin, one launch; options as for `rope`.
`complex_rope(x, freqs, promote=False, layout="neighbours") -> y`, `complex_rope_pair(q, k, freqs, ...) -> (y_q, y_k)`:
pairs as complex numbers times `freqs` = cos + i sin, complex64, [..., D / 2].

- x: [..., D], 2 to 4 dimensions, any strides, float32, bfloat16 or float16.
- cos, sin: [..., R], one dtype, broadcast against x's leading dimensions, R even and R <= D. Where R < D
  only the first R components are rotated, and the rest are passed on. With `per_pair` they are [..., R / 2], one value
  for both of a pair; else each component of y has its own.
- layout: which components are a pair. "halves": i and i + R / 2. "neighbours": 2 i and 2 i + 1. "neighbours to halves":
  neighbours of x, which are put at i and i + R / 2 of y.
- inverse: the rotation the other way, with -sin.
- The sum is rounded to the promoted dtype of x and cos (float32 if `upcast`), and the products before it too by the
  reference, as in eager; y has x's dtype, or keeps the promoted one if `promote`. y has x's strides, made dense, or is
  contiguous, as torch.cat's results are.
- cos and sin are constants: asking for their gradient is an error. The backward is the transpose of the rotation.

Formula: Su et al., RoFormer, 2021 (arXiv:2104.09864); halves as in GPT-NeoX, complex numbers as in Llama.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import Launcher, define, define_composite, define_forward, dense_like, once_differentiable

LAYOUTS = ("halves", "neighbours", "neighbours to halves")


def layouts(layout: str) -> tuple[bool, bool]:
    """Whether neighbours are a pair, in x and in y."""
    return layout != "halves", layout == "neighbours"


def _check(x: Tensor, cos: Tensor, sin: Tensor, layout: str = "halves", per_pair: bool = False) -> None:
    rotated = cos.shape[-1] * (2 if per_pair else 1)
    if layout not in LAYOUTS:
        raise ValueError(f"rope: layout is one of {LAYOUTS}, not {layout!r}")
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(f"rope: cos {cos.dtype}{tuple(cos.shape)} and sin {sin.dtype}{tuple(sin.shape)} must be alike")
    if rotated % 2 or rotated > x.shape[-1]:
        raise ValueError(f"rope: cos has {rotated} components, which must be even and at most x's {x.shape[-1]}")
    lead = torch.broadcast_shapes(x.shape[:-1], cos.shape[:-1])
    if tuple(lead) != tuple(x.shape[:-1]) or not 2 <= x.ndim <= 4:
        raise ValueError(f"rope: cos {tuple(cos.shape)} does not broadcast to x {tuple(x.shape)}")


def _split(x: Tensor, neighbours: bool) -> tuple[Tensor, ...]:
    return (x[..., 0::2], x[..., 1::2]) if neighbours else x.chunk(2, dim=-1)


def _join(x1: Tensor, x2: Tensor, neighbours: bool) -> Tensor:
    return torch.stack((x1, x2), dim=-1).flatten(-2) if neighbours else torch.cat((x1, x2), dim=-1)


def _turn(x: Tensor, neighbours: bool) -> Tensor:
    """Every pair a quarter turn on."""
    x1, x2 = _split(x, neighbours)
    return _join(-x2, x1, neighbours)


def _rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    work: torch.dtype,
    forward: bool,
    layout: str = "halves",
    inverse: bool = False,
    per_pair: bool = False,
) -> Tensor:
    """The rotation, or its transpose, in `work` and rounded as the forward in eager is; no particular strides."""
    before, after = layouts(layout)
    if per_pair:
        cos, sin = _join(cos, cos, after), _join(sin, sin, after)
    sin = -sin if inverse else sin
    rotated = cos.shape[-1]
    part, rest = x[..., :rotated].to(work), x[..., rotated:].to(work)
    if forward:
        part = part if before == after else _join(*_split(part, before), after)
        y = part * cos + _turn(part, after) * sin
    else:
        y = part * cos - _turn(part * sin, after)
        y = y if before == after else _join(*_split(y, after), before)
    return torch.cat((y, rest), dim=-1) if rest.shape[-1] else y


def work_dtype(x: torch.dtype, cos: Tensor, upcast: bool) -> torch.dtype:
    """The dtype that sums are rounded to."""
    return torch.promote_types(torch.promote_types(x, cos.dtype), torch.float32 if upcast else x)


def empty(x: Tensor, cos: Tensor, upcast: bool, promote: bool, contiguous: bool) -> Tensor:
    """Room for the rotation of x."""
    dtype = work_dtype(x.dtype, cos, upcast) if promote else x.dtype
    return x.new_empty(x.shape, dtype=dtype) if contiguous else torch.empty_like(x, dtype=dtype)


def _fake(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    upcast: bool = False,
    promote: bool = False,
    contiguous: bool = False,
    layout: str = "halves",
    inverse: bool = False,
    per_pair: bool = False,
) -> Tensor:
    _check(x, cos, sin, layout, per_pair)
    return empty(x, cos, upcast, promote, contiguous)


def _reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    upcast: bool = False,
    promote: bool = False,
    contiguous: bool = False,
    layout: str = "halves",
    inverse: bool = False,
    per_pair: bool = False,
) -> Tensor:
    _check(x, cos, sin, layout, per_pair)
    y = _rotate(x, cos, sin, work_dtype(x.dtype, cos, upcast), True, layout, inverse, per_pair)
    y = y if promote else y.to(x.dtype)
    return y.contiguous() if contiguous else dense_like(y, x)


def _each(function: Any, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return function(q, *rest), function(k, *rest)


def _pair_fake(*args: Any) -> tuple[Tensor, Tensor]:
    return _each(_fake, *args)


def _pair_reference(*args: Any) -> tuple[Tensor, Tensor]:
    return _each(_reference, *args)


def _backward_fake(
    dy: Tensor,
    cos: Tensor,
    sin: Tensor,
    strides: list[int],
    dtype: torch.dtype,
    upcast: bool,
    layout: str = "halves",
    inverse: bool = False,
    per_pair: bool = False,
) -> Tensor:
    return dy.new_empty_strided(dy.shape, strides, dtype=dtype)


def _backward_reference(
    dy: Tensor,
    cos: Tensor,
    sin: Tensor,
    strides: list[int],
    dtype: torch.dtype,
    upcast: bool,
    layout: str = "halves",
    inverse: bool = False,
    per_pair: bool = False,
) -> Tensor:
    dx = _rotate(dy, cos, sin, work_dtype(dtype, cos, upcast), False, layout, inverse, per_pair)
    return dy.new_empty_strided(dy.shape, strides, dtype=dtype).copy_(dx)


def _each_backward(
    function: Any,
    dq: Tensor,
    dk: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_strides: list[int],
    k_strides: list[int],
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    return function(dq, cos, sin, q_strides, *rest), function(dk, cos, sin, k_strides, *rest)


def _pair_backward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    return _each_backward(_backward_fake, *args)


def _pair_backward_reference(*args: Any) -> tuple[Tensor, Tensor]:
    return _each_backward(_backward_reference, *args)


_MORE = 'str layout="halves", bool inverse=False, bool per_pair=False'
"""The parameters that came later, and say more of which rotation it is."""

rope_forward, rope = define_forward(
    f"rope(Tensor x, Tensor cos, Tensor sin, bool upcast=False, bool promote=False, bool contiguous=False, {_MORE})"
    " -> Tensor",
    _reference,
    _fake,
    Launcher("rope", "forward"),
)
rope_pair_forward, rope_pair = define_forward(
    "rope_pair(Tensor q, Tensor k, Tensor cos, Tensor sin, bool upcast=False, bool promote=False,"
    f" bool contiguous=False, {_MORE}) -> (Tensor, Tensor)",
    _pair_reference,
    _pair_fake,
    Launcher("rope", "pair_forward"),
)
rope_backward = define(
    f"rope_backward(Tensor dy, Tensor cos, Tensor sin, SymInt[] strides, ScalarType dtype, bool upcast, {_MORE})"
    " -> Tensor",
    _backward_reference,
    _backward_fake,
    Launcher("rope", "backward"),
)
rope_pair_backward = define(
    "rope_pair_backward(Tensor dq, Tensor dk, Tensor cos, Tensor sin, SymInt[] q_strides, SymInt[] k_strides,"
    f" ScalarType dtype, bool upcast, {_MORE}) -> (Tensor, Tensor)",
    _pair_backward_reference,
    _pair_backward_fake,
    Launcher("rope", "pair_backward"),
)


def _dense_strides(x: Tensor) -> tuple[int, ...]:
    """x's strides with any gaps closed: the layout its gradient is wanted in."""
    return torch.empty_like(x, device="meta").stride()


def _refuse_gradient_of_angles(ctx: Any, cos_at: int) -> None:
    if any(ctx.needs_input_grad[cos_at : cos_at + 2]):
        raise ValueError("rope: cos and sin are constants; detach them, or do not use this op to train them")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, upcast, _, _, *which = inputs
    _refuse_gradient_of_angles(ctx, 1)
    ctx.rest = _dense_strides(x), x.dtype, upcast, *which
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return rope_backward(dy, *ctx.saved_tensors, *ctx.rest), *(None,) * 8


def _pair_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, cos, sin, upcast, _, _, *which = inputs
    _refuse_gradient_of_angles(ctx, 2)
    ctx.rest = _dense_strides(q), _dense_strides(k), q.dtype, upcast, *which
    ctx.save_for_backward(cos, sin)


def _pair_backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
    return *rope_pair_backward(dq, dk, *ctx.saved_tensors, *ctx.rest), *(None,) * 8


torch.library.register_autograd(rope_forward.name(), _backward, setup_context=_setup)
torch.library.register_autograd(rope_pair_forward.name(), _pair_backward, setup_context=_pair_setup)
once_differentiable(rope_backward)
once_differentiable(rope_pair_backward)


def _angles(freqs: Tensor) -> tuple[Tensor, Tensor]:
    """Their cos and sin, as views."""
    if freqs.dtype is not torch.complex64:
        raise ValueError(f"rope: freqs is {freqs.dtype}; it must be complex64")
    return torch.view_as_real(freqs.resolve_conj()).unbind(-1)


_COMPLEX = {"upcast": True, "per_pair": True}


def _complex(x: Tensor, freqs: Tensor, promote: bool = False, layout: str = "neighbours") -> Tensor:
    return rope(x, *_angles(freqs), promote=promote, layout=layout, **_COMPLEX)


def _complex_pair(
    q: Tensor, k: Tensor, freqs: Tensor, promote: bool = False, layout: str = "neighbours"
) -> tuple[Tensor, Tensor]:
    return rope_pair(q, k, *_angles(freqs), promote=promote, layout=layout, **_COMPLEX)


complex_rope = define_composite(
    "complex_rope(Tensor x, Tensor freqs, bool promote=False, str layout='neighbours') -> Tensor", _complex
)
complex_rope_pair = define_composite(
    "complex_rope_pair(Tensor q, Tensor k, Tensor freqs, bool promote=False, str layout='neighbours')"
    " -> (Tensor, Tensor)",
    _complex_pair,
)
