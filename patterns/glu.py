"""The gated linear unit: gate and up projected apart, or packed in one tensor."""

from functools import partial
from typing import Literal

import torch.nn.functional as F

from liger_compile import ops
from liger_compile.match import Match
from liger_compile.registry import pattern


def check(match: Match) -> str | None:
    gate, up = match.captures["gate"], match.captures["up"]
    if gate.shape != up.shape:
        return f"the gate {tuple(gate.shape)} and the other operand {tuple(up.shape)} broadcast"
    if gate.dtype is not up.dtype:
        return f"the gate is {gate.dtype} and the other operand {up.dtype}"
    return None


def examples(make, rows):
    yield {"gate": make(rows, 96), "up": make(rows, 96), "x": make(rows, 192)}
    yield {"gate": make(2, rows, 33), "up": make(2, rows, 33), "x": make(2, rows, 66)}


@pattern(replace=ops.glu, check=check, recompute=True, examples=examples)
def swiglu(gate, up):
    return F.silu(gate) * up


@pattern(replace=partial(ops.glu, activation="gelu_tanh"), check=check, recompute=True, examples=examples)
def geglu(gate, up):
    return F.gelu(gate, approximate="tanh") * up


@pattern(replace=partial(ops.glu, activation="gelu"), check=check, name="geglu", recompute=True, examples=examples)
def exact_geglu(gate, up):
    return F.gelu(gate) * up


@pattern(replace=ops.packed_glu, recompute=True, examples=examples)
def packed_swiglu(x, *, gate_first: Literal[True, False]):
    first, second = x.chunk(2, dim=-1)
    return F.silu(first) * second if gate_first else first * F.silu(second)


@pattern(replace=partial(ops.packed_glu, activation="gelu_tanh"), recompute=True, examples=examples)
def packed_geglu(x, *, gate_first: Literal[True, False]):
    first, second = x.chunk(2, dim=-1)
    return F.gelu(first, approximate="tanh") * second if gate_first else first * F.gelu(second, approximate="tanh")


@pattern(replace=partial(ops.packed_glu, activation="gelu"), name="packed_geglu", recompute=True, examples=examples)
def packed_exact_geglu(x, *, gate_first: Literal[True, False]):
    first, second = x.chunk(2, dim=-1)
    return F.gelu(first) * second if gate_first else first * F.gelu(second)
