"""The gated linear unit of Llama's MLP: `y = silu(gate) * up`, with silu(x) = x * sigmoid(x).

`swiglu(gate, up) -> y`: gate and up [..., I], one dtype, any strides; y has their shape and gate's strides, made dense.
`packed_swiglu(x, gate_first=True) -> y`: both halves of x [..., 2I] at once, the gate first or second; y is [..., I],
contiguous. Its backward writes the gradient of x directly, without a concatenation.

float32, bfloat16 or float16; silu is computed in float32 and rounded to the dtype before the product, as in eager.
Formula: Shazeer, GLU Variants Improve Transformer, 2020 (arXiv:2002.05202).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import define, dense_like, kernel, once_differentiable


def _check(gate: Tensor, up: Tensor) -> None:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: gate {gate.dtype}{tuple(gate.shape)} and up {up.dtype}{tuple(up.shape)} must be alike"
        )


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    _check(gate, up)
    return torch.empty_like(gate)


def _reference(gate: Tensor, up: Tensor) -> Tensor:
    _check(gate, up)
    return dense_like(torch.nn.functional.silu(gate) * up, gate)


def _gradients(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.float32, gate.dtype)
    d, g, u = dy.to(wide), gate.to(wide), up.to(wide)
    s = torch.sigmoid(g)
    silu = (g * s).to(gate.dtype).to(wide)
    return d * u * s * (1 + g * (1 - s)), d * silu


def _backward_fake(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _backward_reference(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = _gradients(dy, gate, up)
    return dense_like(dgate.to(gate.dtype), gate), dense_like(dup.to(up.dtype), up)


def _halves(x: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """(gate, up) as views of x."""
    if x.shape[-1] % 2:
        raise ValueError(f"packed_swiglu: the last dimension, {x.shape[-1]}, must be even")
    first, second = x.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


def _packed_fake(x: Tensor, gate_first: bool = True) -> Tensor:
    gate, _ = _halves(x, gate_first)
    return x.new_empty(gate.shape)


def _packed_reference(x: Tensor, gate_first: bool = True) -> Tensor:
    gate, up = _halves(x, gate_first)
    return (torch.nn.functional.silu(gate) * up).contiguous()


def _packed_backward_fake(dy: Tensor, x: Tensor, gate_first: bool) -> Tensor:
    return torch.empty_like(x)


def _packed_backward_reference(dy: Tensor, x: Tensor, gate_first: bool) -> Tensor:
    dgate, dup = _gradients(dy, *_halves(x, gate_first))
    dx = torch.cat((dgate, dup) if gate_first else (dup, dgate), dim=-1)
    return dense_like(dx.to(x.dtype), x)


swiglu = define("swiglu(Tensor gate, Tensor up) -> Tensor", _reference, _fake, kernel("swiglu", "forward"))
swiglu_backward = define(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
    kernel("swiglu", "backward"),
)
packed_swiglu = define(
    "packed_swiglu(Tensor x, bool gate_first=True) -> Tensor",
    _packed_reference,
    _packed_fake,
    kernel("swiglu", "packed_forward"),
)
packed_swiglu_backward = define(
    "packed_swiglu_backward(Tensor dy, Tensor x, bool gate_first) -> Tensor",
    _packed_backward_reference,
    _packed_backward_fake,
    kernel("swiglu", "packed_backward"),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return swiglu_backward(dy, *ctx.saved_tensors)


def _packed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.gate_first = inputs
    ctx.save_for_backward(x)


def _packed_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return packed_swiglu_backward(dy, *ctx.saved_tensors, ctx.gate_first), None


torch.library.register_autograd(swiglu.name(), _backward, setup_context=_setup)
torch.library.register_autograd(packed_swiglu.name(), _packed_backward, setup_context=_packed_setup)
once_differentiable(swiglu_backward)
once_differentiable(packed_swiglu_backward)
