"""The gated linear unit of language models' MLPs: `y = act(gate) * up`.

`glu(gate, up, activation="silu") -> y`: gate and up [..., I], one dtype, any strides; y has their shape and gate's
strides, made dense.
`packed_glu(x, activation="silu", gate_first=True) -> y`: both halves of x [..., 2I] at once, the gate first or second;
y is [..., I], contiguous. Its backward writes the gradient of x directly, without a concatenation.

float32, bfloat16 or float16. The activation ("silu", "gelu" or "gelu_tanh") is computed in float32 and rounded to the
dtype before the product, as in eager.
Formulas: Shazeer, GLU Variants Improve Transformer, 2020 (arXiv:2002.05202).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import define, define_forward, dense_like, kernel, once_differentiable

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"glu: gate {gate.dtype}{tuple(gate.shape)} and up {up.dtype}{tuple(up.shape)} must be alike")
    if activation not in ACTIVATIONS:
        raise ValueError(f"glu: activation is one of {ACTIVATIONS}, not {activation!r}")


def _activate(x: Tensor, activation: str) -> Tensor:
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activation_and_slope(g: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(g) and its derivative, in g's dtype."""
    if activation == "silu":  # g s(g); s + g s (1 - s)
        s = torch.sigmoid(g)
        return g * s, s * (1 + g * (1 - s))
    if activation == "gelu":  # g Phi(g); Phi + g phi
        cdf = 0.5 * (1 + torch.erf(g * math.sqrt(0.5)))
        return g * cdf, cdf + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
    # 0.5 g (1 + t), t = tanh(k (g + 0.044715 g^3)); 0.5 (1 + t) + 0.5 g (1 - t^2) k (1 + 3 * 0.044715 g^2)
    k = math.sqrt(2 / math.pi)
    t = torch.tanh(k * (g + 0.044715 * g**3))
    return 0.5 * g * (1 + t), 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * k * (1 + 3 * 0.044715 * g * g)


def _fake(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    _check(gate, up, activation)
    return torch.empty_like(gate)


def _reference(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    _check(gate, up, activation)
    return dense_like(_activate(gate, activation) * up, gate)


def _gradients(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.float32, gate.dtype)
    d, u = dy.to(wide), up.to(wide)
    activated, slope = _activation_and_slope(gate.to(wide), activation)
    return (d * u * slope).to(gate.dtype), (d * activated.to(gate.dtype)).to(gate.dtype)


def _backward_fake(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _backward_reference(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dgate, dup = _gradients(dy, gate, up, activation)
    return dense_like(dgate, gate), dense_like(dup, up)


def halves(x: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """(gate, up) as views of x."""
    if x.shape[-1] % 2:
        raise ValueError(f"packed_glu: the last dimension, {x.shape[-1]}, must be even")
    first, second = x.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


def _packed_fake(x: Tensor, activation: str = "silu", gate_first: bool = True) -> Tensor:
    gate, up = halves(x, gate_first)
    _check(gate, up, activation)
    return x.new_empty(gate.shape)


def _packed_reference(x: Tensor, activation: str = "silu", gate_first: bool = True) -> Tensor:
    gate, up = halves(x, gate_first)
    _check(gate, up, activation)
    return (_activate(gate, activation) * up).contiguous()


def _packed_backward_fake(dy: Tensor, x: Tensor, activation: str, gate_first: bool) -> Tensor:
    return torch.empty_like(x)


def _packed_backward_reference(dy: Tensor, x: Tensor, activation: str, gate_first: bool) -> Tensor:
    dgate, dup = _gradients(dy, *halves(x, gate_first), activation)
    return dense_like(torch.cat((dgate, dup) if gate_first else (dup, dgate), dim=-1), x)


glu_forward, glu = define_forward(
    'glu(Tensor gate, Tensor up, str activation="silu") -> Tensor', _reference, _fake, kernel("glu", "forward")
)
glu_backward = define(
    "glu_backward(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
    kernel("glu", "backward"),
)
packed_glu_forward, packed_glu = define_forward(
    'packed_glu(Tensor x, str activation="silu", bool gate_first=True) -> Tensor',
    _packed_reference,
    _packed_fake,
    kernel("glu", "packed_forward"),
)
packed_glu_backward = define(
    "packed_glu_backward(Tensor dy, Tensor x, str activation, bool gate_first) -> Tensor",
    _packed_backward_reference,
    _packed_backward_fake,
    kernel("glu", "packed_backward"),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return *glu_backward(dy, *ctx.saved_tensors, ctx.activation), None


def _packed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.activation, ctx.gate_first = inputs
    ctx.save_for_backward(x)


def _packed_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return packed_glu_backward(dy, *ctx.saved_tensors, ctx.activation, ctx.gate_first), None, None


torch.library.register_autograd(glu_forward.name(), _backward, setup_context=_setup)
torch.library.register_autograd(packed_glu_forward.name(), _packed_backward, setup_context=_packed_setup)
once_differentiable(glu_backward)
once_differentiable(packed_glu_backward)
