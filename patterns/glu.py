"""The gated linear unit: gate and up projected apart, or packed in one tensor."""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from liger_compile import ops
from liger_compile.match import Match
from liger_compile.registry import pattern
from liger_compile.terms import Term


def check(match: Match) -> str | None:
    gate, up = match.captures["gate"], match.captures["up"]
    if gate.shape != up.shape:
        return f"the gate {tuple(gate.shape)} and the other operand {tuple(up.shape)} broadcast"
    if not (gate.is_float and up.is_float):
        return f"the gate is {gate.dtype} and the other operand {up.dtype}; the kernel takes floating point"
    if gate.dtype is not up.dtype and "cast" in (gate.op, up.op):
        return f"the gate is {gate.dtype} and the other operand {up.dtype}, of which one would be converted beforehand"
    return None


def check_scaled(match: Match) -> str | None:
    scale = match.captures["gate_scale"]
    if isinstance(scale, Term) and scale.op == "reciprocal":
        return "divides the gate, which the kernel does not: a product with the inverse is rounded otherwise"
    return check(match)


def examples(make, rows):
    numbers = {"gate_scale": 0.7, "limit": 0.9, "alpha": 1.702, "up_offset": 1.0}
    yield {"gate": make(rows, 96), "up": make(rows, 96), "x": make(rows, 192), **numbers}
    yield {"gate": make(2, rows, 33), "up": make(2, rows, 33), "x": make(2, rows, 66), **numbers}


def glu(name, check=check, **fixed):
    return pattern(replace=partial(ops.glu, **fixed), check=check, name=name, recompute=True, examples=examples)


def packed_glu(name, **fixed):
    op = partial(ops.packed_glu, **fixed)
    return pattern(replace=op, name=f"packed_{name}", recompute=True, examples=examples)


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
