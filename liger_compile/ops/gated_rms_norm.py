"""RMS normalisation with a gate, over the last dimension or groups of it, as after state-space and linear attention.

`gated_rms_norm(x, gate, weight, eps, activation="silu", gate_first=False, rounding="normed", groups=None) -> y`

- gated last: `y = norm(x) * weight * act(gate)`; first: `y = norm(x * act(gate)) * weight`.
- x, gate: [..., H], float32, bfloat16 or float16, any strides; weight: [H]. act is "silu" or "sigmoid".
- `groups=[G, D]`, with G D = H: each of G groups of D neighbours is normalised by itself.
- The statistics, the activation and products are float32. "normed" rounds the normalised value to x's dtype before the
  weight, and the product with the weight to that of x and weight; "result" does not.
- y has x's dtype; gated first and "normed", it has the promoted dtype of x and weight. It has x's strides, made dense.
- Gradients: dx and dgate in their operands' dtypes; dweight is summed in float32, then rounded once.

Formulas: Dao and Gu, Transformers are SSMs, 2024 (arXiv:2405.21060); Yang et al., Gated Delta Networks, 2024
(arXiv:2412.06464).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import Launcher, define, define_forward, dense_like, once_differentiable

ACTIVATIONS = ("silu", "sigmoid")
ROUNDINGS = ("normed", "result")


def _check(x: Tensor, gate: Tensor, weight: Tensor, activation: str, rounding: str, groups: list[int] | None) -> None:
    if gate.shape != x.shape:
        raise ValueError(f"gated_rms_norm: gate has shape {tuple(gate.shape)}, x needs {tuple(x.shape)}")
    if weight.ndim != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"gated_rms_norm: weight has shape {tuple(weight.shape)}, x needs [{x.shape[-1]}]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated_rms_norm: activation is one of {ACTIVATIONS}, not {activation!r}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"gated_rms_norm: rounding is one of {ROUNDINGS}, not {rounding!r}")
    if groups is not None and (len(groups) != 2 or groups[0] * groups[1] != x.shape[-1]):
        raise ValueError(f"gated_rms_norm: groups {groups} are not the {x.shape[-1]} elements of a row")


def out_dtype(x: Tensor, weight: Tensor, gate_first: bool, rounding: str) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if gate_first and rounding == "normed" else x.dtype


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(torch.float32, x.dtype))


def _factor(h: Tensor, eps: float, groups: list[int] | None) -> Tensor:
    """1 / rms of each element's group."""
    if groups is None:
        return torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    parts = h.unflatten(-1, groups)
    return torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps).expand_as(parts).flatten(-2)


def _fake(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    activation: str = "silu",
    gate_first: bool = False,
    rounding: str = "normed",
    groups: list[int] | None = None,
) -> Tensor:
    _check(x, gate, weight, activation, rounding, groups)
    return torch.empty_like(x, dtype=out_dtype(x, weight, gate_first, rounding))


def _reference(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    activation: str = "silu",
    gate_first: bool = False,
    rounding: str = "normed",
    groups: list[int] | None = None,
) -> Tensor:
    _check(x, gate, weight, activation, rounding, groups)
    activated = getattr(torch.nn.functional, activation)(_wide(gate))
    h = _wide(x) * activated if gate_first else _wide(x)
    y = h * _factor(h, eps, groups)
    y = weight * y.to(x.dtype) if rounding == "normed" else weight.to(y.dtype) * y
    if not gate_first:
        y = y * activated
    return dense_like(y.to(out_dtype(x, weight, gate_first, rounding)), x)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    activation: str,
    gate_first: bool,
    rounding: str,
    groups: list[int] | None,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gate), torch.empty_like(weight) if need_dweight else x.new_empty(0)


def _backward_reference(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    activation: str,
    gate_first: bool,
    rounding: str,
    groups: list[int] | None,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d, value, g, w = map(_wide, (dy, x, gate, weight))
    s = torch.sigmoid(g)
    activated, slope = (g * s, s * (1 + g * (1 - s))) if activation == "silu" else (s, s * (1 - s))
    h = value * activated if gate_first else value
    factor = _factor(h, eps, groups)
    normed = h * factor
    seen, product = normed, normed * w
    if rounding == "normed":
        seen = normed.to(x.dtype).to(normed.dtype)
        product = (seen * w).to(torch.promote_types(x.dtype, weight.dtype)).to(normed.dtype)
    dproduct = d if gate_first else d * activated
    dnormed = dproduct * w
    along = dnormed * normed if groups is None else (dnormed * normed).unflatten(-1, groups)
    along = along.mean(-1, keepdim=True).expand_as(along).reshape(normed.shape)
    dh = factor * (dnormed - normed * along)
    dx, dgate = (dh * activated, dh * value * slope) if gate_first else (dh, d * product * slope)
    dweight = (dproduct * seen).sum_to_size(weight.shape).to(weight.dtype) if need_dweight else x.new_empty(0)
    return dense_like(dx.to(x.dtype), x), dense_like(dgate.to(gate.dtype), gate), dweight


gated_rms_norm_forward, gated_rms_norm = define_forward(
    'gated_rms_norm(Tensor x, Tensor gate, Tensor weight, float eps, str activation="silu", bool gate_first=False,'
    ' str rounding="normed", int[]? groups=None) -> Tensor',
    _reference,
    _fake,
    Launcher("gated_rms_norm", "forward"),
)
gated_rms_norm_backward = define(
    "gated_rms_norm_backward(Tensor dy, Tensor x, Tensor gate, Tensor weight, float eps, str activation,"
    " bool gate_first, str rounding, int[]? groups, bool need_dweight) -> (Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
    Launcher("gated_rms_norm", "backward"),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, weight, *ctx.how = inputs
    ctx.save_for_backward(x, gate, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    need_dweight = ctx.needs_input_grad[2]
    dx, dgate, dweight = gated_rms_norm_backward(dy, *ctx.saved_tensors, *ctx.how, need_dweight)
    return dx, dgate, dweight if need_dweight else None, *(None for _ in ctx.how)


torch.library.register_autograd(gated_rms_norm_forward.name(), _backward, setup_context=_setup)
once_differentiable(gated_rms_norm_backward)
