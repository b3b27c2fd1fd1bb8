"""The gated linear unit: gate and up projected apart, or packed in one tensor."""

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


@pattern(replace=ops.swiglu, check=check, recompute=True)
def swiglu(gate, up):
    return F.silu(gate) * up


@pattern(replace=ops.packed_swiglu, recompute=True)
def packed_swiglu(x, *, gate_first: Literal[True, False]):
    first, second = x.chunk(2, dim=-1)
    return F.silu(first) * second if gate_first else first * F.silu(second)
