"""The gated linear unit: gate and up projected apart, or packed in one tensor."""

import inspect
from functools import partial, wraps
from typing import Any, Literal

import torch
import torch.nn.functional as F

from liger_compile import ops
from liger_compile.match import Match
from liger_compile.registry import register_pattern
from liger_compile.rules import widens
from liger_compile.terms import Term


def check(match: Match) -> str | dict[str, Any] | None:
    gate, up = match.captures["gate"], match.captures["up"]
    if gate.shape != up.shape:
        return f"the gate {tuple(gate.shape)} and the other operand {tuple(up.shape)} broadcast"
    if not (gate.is_float and up.is_float):
        return f"the gate is {gate.dtype} and the other operand {up.dtype}; the kernel takes floating point"
    if widens(gate) and widened(up) is None and up.dtype is gate.dtype:
        return {"gate": gate.args[0], "wide": True}
    if (reason := check_read(match)) is not None:
        return reason
    if gate.dtype is not up.dtype and "cast" in (gate.op, up.op):
        return f"the gate is {gate.dtype} and the other operand {up.dtype}, of which one would be converted beforehand"
    return None


def check_read(match: Match) -> str | None:
    for name, operand in match.captures.items():
        if isinstance(operand, Term) and (source := widened(operand)) is not None:
            return f"{name} is {operand.dtype}, made of {source.dtype}, and would be written and read again as such"
    return None


def widened(x: Term) -> Term | None:
    """What x is computed of in more precision than it has, if it is element by element and of nothing else."""
    while not widens(x):
        tensors = [a for a in x.args if isinstance(a, Term) and not a.is_number]
        if x.op not in ("clamp", "add", "sub", "mul", "slice", "reshape") or len(tensors) != 1:
            return None
        x = tensors[0]
    return x.args[0]


def check_scaled(match: Match) -> str | dict[str, Any] | None:
    scale = match.captures["gate_scale"]
    if isinstance(scale, Term) and scale.op == "reciprocal":
        return "divides the gate, which the kernel does not: a product with the inverse is rounded otherwise"
    return check(match)


def examples(make, rows):
    numbers = {"gate_scale": 0.7, "limit": 0.9, "alpha": 1.702, "up_offset": 1.0}
    yield {"gate": make(rows, 96), "up": make(rows, 96), "x": make(rows, 192), **numbers}
    yield {"gate": make(2, rows, 33), "up": make(2, rows, 33), "x": make(2, rows, 66), **numbers}


def in_float32(function):
    """The same unit, computed in float32 of operands in another dtype, and rounded once."""

    @wraps(function)
    def wide(*args, **kwargs):
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        operands = {name: given[name] for name in ("gate", "up", "x") if name in given}
        y = function(**{**given, **{name: x.float() for name, x in operands.items()}})
        return y.to(next(iter(operands.values())).dtype)

    wide.__qualname__ += "_in_float32"
    return wide


def unit(name, op, check, fixed):
    def register(function):
        for spelling, wide in ((function, False), (in_float32(function), True)):
            replace = partial(op, **fixed, **({"wide": True} if wide else {}))
            # Of float32 operands both are the same, and the plain one comes first.
            register_pattern(spelling, replace, check, name, True, examples=examples, priority=-wide)
        return function

    return register


def glu(name, check=check, **fixed):
    return unit(name, ops.glu, check, fixed)


def packed_glu(name, **fixed):
    return unit(f"packed_{name}", ops.packed_glu, check_read, fixed)


def halves(x, gate_first, interleaved=False):
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


@glu("swiglu")
def swiglu(gate, up):
    return F.silu(gate) * up


@packed_glu("swiglu")
def packed_swiglu(x, *, gate_first: Literal[True, False], interleaved: Literal[True, False]):
    gate, up = halves(x, gate_first, interleaved)
    return F.silu(gate) * up


@glu("geglu", activation="gelu_tanh")
def geglu(gate, up):
    return F.gelu(gate, approximate="tanh") * up


@glu("geglu", activation="gelu")
def exact_geglu(gate, up):
    return F.gelu(gate) * up


@packed_glu("geglu", activation="gelu_tanh")
def packed_geglu(x, *, gate_first: Literal[True, False]):
    gate, up = halves(x, gate_first)
    return F.gelu(gate, approximate="tanh") * up


@packed_glu("geglu", activation="gelu")
def packed_exact_geglu(x, *, gate_first: Literal[True, False]):
    gate, up = halves(x, gate_first)
    return F.gelu(gate) * up


@glu("reglu", activation="relu")
def reglu(gate, up):
    return F.relu(gate) * up


@glu("reglu", activation="relu2")  # BitNet
def squared_reglu(gate, up):
    return F.relu(gate).square() * up


@packed_glu("reglu", activation="relu")
def packed_reglu(x, *, gate_first: Literal[True, False]):
    gate, up = halves(x, gate_first)
    return F.relu(gate) * up


@packed_glu("reglu", activation="relu2")
def packed_squared_reglu(x, *, gate_first: Literal[True, False]):
    gate, up = halves(x, gate_first)
    return F.relu(gate).square() * up


@glu("swiglu", check_scaled)  # Falcon-H1
def scaled_swiglu(gate, up, gate_scale):
    return F.silu(gate * gate_scale) * up


@glu("swiglu")  # DeepSeek-V4's shared expert
def clamped_swiglu(gate, up, limit):
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


@packed_glu("swiglu")  # and its experts
def packed_clamped_swiglu(x, limit, *, gate_first: Literal[True, False]):
    gate, up = halves(x, gate_first)
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def clamped_product(gate, up, limit, alpha, up_offset):
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + up_offset) * (gate * torch.sigmoid(gate * alpha))


@glu("swiglu")
def swiglu_oai(gate, up, limit, alpha, up_offset):
    return clamped_product(gate, up, limit, alpha, up_offset)


@packed_glu("swiglu")  # GPT-OSS, interleaved; MiniMax-M3, in halves
def packed_swiglu_oai(
    x, limit, alpha, up_offset, *, gate_first: Literal[True, False], interleaved: Literal[True, False]
):
    return clamped_product(*halves(x, gate_first, interleaved), limit, alpha, up_offset)
