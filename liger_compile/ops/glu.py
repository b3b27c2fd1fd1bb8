"""The gated linear unit of language models' MLPs: `y = act(gate) * up`.

`glu(gate, up, activation="silu", gate_scale=1.0, limit=None, alpha=1.0, up_offset=0.0, wide=False) -> y`: gate and up
[..., I], any strides; y has their shape, the dtype that a product of the two has, and gate's strides, made dense.
`packed_glu(x, activation="silu", gate_first=True, ..., interleaved=False) -> y`: both halves of x [..., 2I] at once,
the gate first or second, or alternating if `interleaved`; y is [..., I], contiguous. Its backward writes the gradient
of x directly, without a concatenation.
`glu_backward(dy, gate, up, activation, ..., again=False) -> (dgate, dup, y)` and `packed_glu_backward(dy, x, ...,
again=False) -> (dx, y)`: with `again`, y is made beside its gradients, of what they read anyway; else it is empty.

`y = act(min(gate_scale * gate, limit)) * (clamp(up, -limit, limit) + up_offset)`, without clamps if `limit` is None;
act is

- "silu": z sigmoid(alpha z), "gelu", "gelu_tanh", "relu", "relu2": relu(z)^2.

float32, bfloat16 or float16. The scaled gate, the activation and the shifted up are computed in float32 and rounded to
the dtype of gate, or of up, before they are used, as in eager; with `wide` they are not, and y alone is rounded.
Formulas: Shazeer, GLU Variants Improve Transformer, 2020 (arXiv:2002.05202); relu2: So et al., Primer, 2021
(arXiv:2109.08668).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import Launcher, define, define_forward, dense_like, once_differentiable

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def _check(gate: Tensor, up: Tensor, activation: str, alpha: float = 1.0, limit: float | None = None) -> None:
    if gate.shape != up.shape:
        raise ValueError(f"glu: gate {tuple(gate.shape)} and up {tuple(up.shape)} must be of one shape")
    if activation not in ACTIVATIONS:
        raise ValueError(f"glu: activation is one of {ACTIVATIONS}, not {activation!r}")
    if alpha != 1 and activation != "silu":
        raise ValueError(f"glu: alpha is a factor of silu's sigmoid, which {activation!r} does not have")
    if limit is not None and limit < 0:
        raise ValueError(f"glu: limit is {limit}; clamping to [{-limit}, {limit}] leaves nothing")


def _activate(x: Tensor, activation: str, alpha: float) -> Tensor:
    if activation == "silu":
        return F.silu(x) if alpha == 1 else x * torch.sigmoid(x * alpha)
    if activation in ("relu", "relu2"):
        return F.relu(x) if activation == "relu" else F.relu(x).square()
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activation_and_slope(g: Tensor, activation: str, alpha: float) -> tuple[Tensor, Tensor]:
    """act(g) and its derivative, in g's dtype; of relu and relu2, that for positive g."""
    if activation == "silu":  # g s(a g); s + g a s (1 - s)
        s = torch.sigmoid(alpha * g)
        return g * s, s * (1 + alpha * g * (1 - s))
    if activation == "relu":
        return F.relu(g), torch.ones_like(g)
    if activation == "relu2":
        return F.relu(g).square(), 2 * F.relu(g)
    if activation == "gelu":  # g Phi(g); Phi + g phi
        cdf = 0.5 * (1 + torch.erf(g * math.sqrt(0.5)))
        return g * cdf, cdf + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
    # 0.5 g (1 + t), t = tanh(k (g + 0.044715 g^3)); 0.5 (1 + t) + 0.5 g (1 - t^2) k (1 + 3 * 0.044715 g^2)
    k = math.sqrt(2 / math.pi)
    t = torch.tanh(k * (g + 0.044715 * g**3))
    return 0.5 * g * (1 + t), 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * k * (1 + 3 * 0.044715 * g * g)


def empty_product(gate: Tensor, up: Tensor) -> Tensor:
    """What y is written to."""
    return torch.empty_like(gate, dtype=torch.promote_types(gate.dtype, up.dtype))


def _fake(
    gate: Tensor,
    up: Tensor,
    activation: str = "silu",
    gate_scale: float = 1.0,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    wide: bool = False,
) -> Tensor:
    _check(gate, up, activation, alpha, limit)
    return empty_product(gate, up)


def _product(
    gate: Tensor,
    up: Tensor,
    activation: str,
    gate_scale: float,
    limit: float | None,
    alpha: float,
    up_offset: float,
    wide: bool,
) -> Tensor:
    _check(gate, up, activation, alpha, limit)
    dtype = torch.promote_types(gate.dtype, up.dtype)
    if wide:
        gate, up = (x.to(torch.promote_types(torch.float32, x.dtype)) for x in (gate, up))
    if gate_scale != 1:
        gate = gate * gate_scale
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if up_offset != 0:
        up = up + up_offset
    return (_activate(gate, activation, alpha) * up).to(dtype)


def _reference(
    gate: Tensor,
    up: Tensor,
    activation: str = "silu",
    gate_scale: float = 1.0,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    wide: bool = False,
) -> Tensor:
    return dense_like(_product(gate, up, activation, gate_scale, limit, alpha, up_offset, wide), gate)


def _gradients(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    gate_scale: float = 1.0,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(torch.float32, dy.dtype)

    def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x if wide else x.to(dtype).to(exact)

    d, g, u = dy.to(exact), rounded(gate.to(exact) * gate_scale, gate.dtype), up.to(exact)
    bound = math.inf if limit is None else limit
    activated, slope = _activation_and_slope(rounded(g.clamp(max=bound), gate.dtype), activation, alpha)
    other = rounded(u.clamp(-bound, bound) + up_offset, up.dtype)
    dgate = d * other * slope * gate_scale
    dup = d * rounded(activated, gate.dtype)
    if activation in ("relu", "relu2"):  # chosen, not multiplied: a zero also where up is not finite
        dgate = torch.where(g <= 0, 0, dgate)
    if limit is not None:
        dgate, dup = torch.where(g <= limit, dgate, 0), torch.where(u.abs() <= limit, dup, 0)
    return dgate.to(gate.dtype), dup.to(up.dtype)


def _backward_fake(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    gate_scale: float = 1.0,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    wide: bool = False,
    again: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    y = _fake(gate, up, activation, gate_scale, limit, alpha, up_offset, wide) if again else gate.new_empty(0)
    return torch.empty_like(gate), torch.empty_like(up), y


def _backward_reference(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    gate_scale: float = 1.0,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    wide: bool = False,
    again: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    how = activation, gate_scale, limit, alpha, up_offset, wide
    dgate, dup = _gradients(dy, gate, up, *how)
    y = _reference(gate, up, *how) if again else gate.new_empty(0)
    return dense_like(dgate, gate), dense_like(dup, up), y


def halves(x: Tensor, gate_first: bool, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """(gate, up) as views of x."""
    if x.shape[-1] % 2:
        raise ValueError(f"packed_glu: the last dimension, {x.shape[-1]}, must be even")
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


def _packed_fake(
    x: Tensor,
    activation: str = "silu",
    gate_first: bool = True,
    gate_scale: float = 1.0,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    wide: bool = False,
    interleaved: bool = False,
) -> Tensor:
    gate, up = halves(x, gate_first, interleaved)
    _check(gate, up, activation, alpha, limit)
    return x.new_empty(gate.shape)


def _packed_reference(
    x: Tensor,
    activation: str = "silu",
    gate_first: bool = True,
    gate_scale: float = 1.0,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    wide: bool = False,
    interleaved: bool = False,
) -> Tensor:
    gate, up = halves(x, gate_first, interleaved)
    return _product(gate, up, activation, gate_scale, limit, alpha, up_offset, wide).contiguous()


def _packed_backward_fake(
    dy: Tensor,
    x: Tensor,
    activation: str,
    gate_first: bool,
    gate_scale: float = 1.0,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    wide: bool = False,
    interleaved: bool = False,
    again: bool = False,
) -> tuple[Tensor, Tensor]:
    how = activation, gate_first, gate_scale, limit, alpha, up_offset, wide, interleaved
    return torch.empty_like(x), _packed_fake(x, *how) if again else x.new_empty(0)


def _packed_backward_reference(
    dy: Tensor,
    x: Tensor,
    activation: str,
    gate_first: bool,
    gate_scale: float = 1.0,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    wide: bool = False,
    interleaved: bool = False,
    again: bool = False,
) -> tuple[Tensor, Tensor]:
    gate, up = halves(x, gate_first, interleaved)
    variant = gate_scale, limit, alpha, up_offset, wide
    dgate, dup = _gradients(dy, gate, up, activation, *variant)
    pair = (dgate, dup) if gate_first else (dup, dgate)
    dx = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    y = _packed_reference(x, activation, gate_first, *variant, interleaved) if again else x.new_empty(0)
    return dense_like(dx, x), y


_VARIANT = "float gate_scale=1.0, float? limit=None, float alpha=1.0, float up_offset=0.0, bool wide=False"

glu_forward, glu = define_forward(
    f'glu(Tensor gate, Tensor up, str activation="silu", {_VARIANT}) -> Tensor',
    _reference,
    _fake,
    Launcher("glu", "forward"),
)
glu_backward = define(
    f"glu_backward(Tensor dy, Tensor gate, Tensor up, str activation, {_VARIANT}, bool again=False)"
    " -> (Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
    Launcher("glu", "backward"),
)
packed_glu_forward, packed_glu = define_forward(
    f'packed_glu(Tensor x, str activation="silu", bool gate_first=True, {_VARIANT}, bool interleaved=False) -> Tensor',
    _packed_reference,
    _packed_fake,
    Launcher("glu", "packed_forward"),
)
packed_glu_backward = define(
    f"packed_glu_backward(Tensor dy, Tensor x, str activation, bool gate_first, {_VARIANT}, bool interleaved=False,"
    " bool again=False) -> (Tensor, Tensor)",
    _packed_backward_reference,
    _packed_backward_fake,
    Launcher("glu", "packed_backward"),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, *ctx.how = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dgate, dup, _ = glu_backward(dy, *ctx.saved_tensors, *ctx.how)
    return dgate, dup, *(None for _ in ctx.how)


def _packed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.how = inputs
    ctx.save_for_backward(x)


def _packed_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dx, _ = packed_glu_backward(dy, *ctx.saved_tensors, *ctx.how)
    return dx, *(None for _ in ctx.how)


torch.library.register_autograd(glu_forward.name(), _backward, setup_context=_setup)
torch.library.register_autograd(packed_glu_forward.name(), _packed_backward, setup_context=_packed_setup)
once_differentiable(glu_backward)
once_differentiable(packed_glu_backward)
