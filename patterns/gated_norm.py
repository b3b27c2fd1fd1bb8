"""RMS normalisation with a gate, before or after it, of whole rows or of groups."""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from liger_compile.patterns.rms_norm import check as check_norm

from liger_compile import ops
from liger_compile.match import Match
from liger_compile.pattern import subterms
from liger_compile.registry import pattern
from liger_compile.terms import same

Choice = Literal[False, True]


def normalize(h, eps):
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def check(match: Match) -> str | dict[str, Any] | None:
    x, gate = match.captures["x"], match.captures["gate"]
    if (reason := check_norm(match)) is not None:
        return reason
    if gate in match.terms and any(t.op in ("rsqrt", "rms_norm") and t in match.terms for t in subterms(gate)):
        return "the gate is the normalised value, which is then to be computed by itself"
    if gate.shape != x.shape:
        return f"the gate {tuple(gate.shape)} and what is normalised {tuple(x.shape)} broadcast"
    parts = match.captures.get("groups")  # the whole shape that x is viewed in
    if parts is not None and not (len(parts) > 1 and same(parts[:-2], x.shape[:-1])):
        return f"normalises {tuple(x.shape)} viewed as {parts}; the kernel takes groups of the last dimension"
    width = x.shape[-1] if parts is None else parts[-1]
    if width > 16384:
        return f"normalises {width} elements; with a gate the kernel holds at most 16384 in registers"
    return None if parts is None else {"groups": parts[-2:]}


def examples(make, rows):
    yield {"x": make(rows, 96), "gate": make(rows, 96), "weight": make(96), "eps": 1e-6, "groups": [4, 24]}
    x, gate = make(2, 3, rows, 33), make(2, 3, rows, 33)
    yield {"x": x, "gate": gate, "weight": make(33), "eps": 1e-5, "groups": [3, 11]}


def gated_norm(**fixed):
    op = partial(ops.gated_rms_norm, **fixed)
    return pattern(replace=op, check=check, name="gated_rms_norm", recompute=True, examples=examples)


def activate(gate, activation):
    return F.silu(gate.float()) if activation == "silu" else torch.sigmoid(gate.float())


@gated_norm(rounding="normed")  # Qwen3-Next, OLMo Hybrid
def gate_last(x, gate, weight, eps, *, activation: Literal["silu", "sigmoid"]):
    return (weight * normalize(x.float(), eps).to(x.dtype) * activate(gate, activation)).to(x.dtype)


def normed(h, weight, eps, functional):
    if functional:  # torch's own
        return F.rms_norm(h, (h.shape[-1],), weight.float(), eps)
    return weight.float() * normalize(h, eps)


@gated_norm(rounding="result")  # Kimi Linear
def gate_last_of_result(x, gate, weight, eps, *, activation: Literal["silu", "sigmoid"], functional: Choice):
    return (normed(x.float(), weight, eps, functional) * activate(gate, activation)).to(x.dtype)


@gated_norm(rounding="normed", gate_first=True)  # Mamba-2, Bamba
def gate_first(x, gate, weight, eps):
    return weight * normalize(x.float() * F.silu(gate.float()), eps).to(x.dtype)


@gated_norm(rounding="result", gate_first=True)  # mamba_ssm's reference
def gate_first_of_result(x, gate, weight, eps, *, functional: Choice):
    return normed(x.float() * F.silu(gate.float()), weight, eps, functional).to(x.dtype)


@gated_norm(rounding="normed", gate_first=True)  # Nemotron-H, Zamba-2
def gate_first_in_groups(x, gate, weight, eps, groups):
    parts = (x.float() * F.silu(gate.float())).unflatten(-1, groups)
    return weight * normalize(parts, eps).flatten(-2).to(x.dtype)
