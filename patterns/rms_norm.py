"""RMS normalisation, in the spellings that differ in where values are rounded."""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from liger_compile import ops
from liger_compile.graph_terms import call_name
from liger_compile.match import Match
from liger_compile.registry import pattern
from liger_compile.terms import Term


def normalize(x, eps):
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def check(match: Match) -> str | None:
    x, weight = match.captures["x"], match.captures.get("weight")
    if x.op == "sub" and any(getattr(t, "op", "") == "mean" for t in x.args):
        return "subtracts the mean first: this is a LayerNorm, where Inductor's own kernel is as good"
    if x.shape is None or (weight is not None and weight.shape is None):
        return "its shape is not known"
    if weight is not None and weight.shape != x.shape[-1:]:
        return f"weight has shape {tuple(weight.shape)} where the kernel takes [{x.shape[-1]}]"
    if x.shape[-1] > 65536:
        return f"normalises {x.shape[-1]} elements; the kernel holds at most 65536 in registers"
    return None


def examples(make, rows):
    yield {"x": make(rows, 96), "weight": make(96), "eps": 1e-6}
    yield {"x": make(2, 3, rows, 33), "weight": make(33), "eps": 1e-5}


def rms_pattern(check=check, **fixed):
    op = partial(ops.rms_norm, **fixed)
    return pattern(replace=op, check=check, name="rms_norm", recompute=True, examples=examples)


@rms_pattern(rounding="normed")  # Llama, Mistral, Qwen
def cast_then_weight(x, weight, eps):
    return weight * normalize(x, eps).to(x.dtype)


@rms_pattern(rounding="normed", offset=1.0)
def cast_then_one_plus_weight(x, weight, eps):
    return (1.0 + weight) * normalize(x, eps).to(x.dtype)


@rms_pattern(rounding="result")  # OLMo 2, GPT-OSS
def weight_then_cast(x, weight, eps):
    return (weight * normalize(x, eps)).to(x.dtype)


@rms_pattern(rounding="result", offset=1.0)  # Gemma
def one_plus_weight_then_cast(x, weight, eps):
    return (normalize(x, eps) * (1.0 + weight.float())).to(x.dtype)


@rms_pattern(rounding="result", weight=None)  # Llama 4's L2Norm, Gemma 3n's v_norm
def no_weight(x, eps):
    return normalize(x, eps).to(x.dtype)


@rms_pattern(rounding="factor")
def factor_cast_weight(x, weight, eps):
    return weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps).to(x.dtype))


@rms_pattern(rounding="factor", weight=None)  # DeepSeek-V4
def factor_cast(x, eps):
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps).to(x.dtype)


@rms_pattern(rounding="result")  # torch.nn.RMSNorm, with or without a weight
def functional(x, weight, eps):
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def to_length_one(x, eps):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + eps)).to(x.dtype)


@rms_pattern(rounding="normed", divisor=1.0)
def length_one_then_weight(x, weight, eps):
    return weight * to_length_one(x, eps)


READ_FROM_MEMORY = {
    *("linear", "matmul", "mm", "bmm", "einsum", "conv1d", "scaled_dot_product_attention"),
    *("chunk", "split", "unbind", "getitem", "view_as_complex"),  # RoPE
}
PASSED_ON = {"view", "reshape", "flatten", "unflatten", "transpose", "permute", "unsqueeze", "to", "float", "type_as"}


def check_without_weight(match: Match) -> str | None:
    """Where only element-wise code reads the result, Inductor has it in registers, and a kernel costs a pass more."""
    todo = list(match.view.carriers[match.roots[0]])
    while todo:
        for user in todo.pop().users:
            name = call_name(user.target)
            if user.op == "output" or name in READ_FROM_MEMORY:
                return check(match)
            if name in PASSED_ON:
                todo.append(user)
    return "only element-wise code reads the result, which Inductor computes in the same pass"


@rms_pattern(check_without_weight, rounding="result", weight=None, divisor=1.0)  # nGPT, delta rules
def length_one(x, eps):
    return to_length_one(x, eps)


# ---- by the length of x, as F.normalize has it --------------------------------------------------------------------

Guard = Literal["floor", "outside"]


def unit(x, eps, scale, guard):
    h = x.float()
    length = h.norm(dim=-1, keepdim=True)
    return h / (length.clamp(min=eps) if guard == "floor" else length + eps) * scale


def to_length(x, eps, scale, *, rounding, guard, weight: torch.Tensor | None = None, offset=0.0):
    return ops.rms_norm(x, weight, eps / scale, offset, rounding, guard, float(scale) ** 2)


def is_scaled(reader: Term, root: Term) -> bool:
    """Whether what reads a result is the same norm to another length."""
    factors = (reader,) if reader.op == "unit" else reader.args if reader.op == "mul" else ()
    return any(isinstance(f, Term) and f.op == "unit" and f is not root for f in factors)


def check_unit(match: Match) -> str | None:
    for name in ("eps", "scale"):
        if not isinstance(number := match.captures[name], (int, float)) or number <= 0:
            return f"the {name} {number} is no positive number that is known beforehand"
    root = match.roots[0]
    readers = [match.view.of.get(user) for node in match.view.carriers[root] for user in node.users]
    if readers and all(t is not None and is_scaled(t, root) for t in readers):
        return "is scaled by a number behind, and matched with that"
    return check(match) if "weight" in match.captures else check_without_weight(match)


def unit_examples(make, rows):
    for operands in examples(make, rows):
        yield {**operands, "scale": 3.0}


def unit_pattern(**fixed):
    op = partial(to_length, **fixed)
    return pattern(replace=op, check=check_unit, name="rms_norm", recompute=True, examples=unit_examples)


@unit_pattern(rounding="result")
def unit_times_weight(x, weight, eps: float, scale: float, *, guard: Guard):
    return (weight * unit(x, eps, scale, guard)).to(x.dtype)


@unit_pattern(rounding="normed")  # x-transformers
def unit_then_weight(x, weight, eps: float, scale: float, *, guard: Guard):
    return weight * unit(x, eps, scale, guard).to(x.dtype)


@unit_pattern(rounding="normed", offset=1.0)
def unit_then_one_plus_weight(x, weight, eps: float, scale: float, *, guard: Guard):
    return (1.0 + weight) * unit(x, eps, scale, guard).to(x.dtype)


@unit_pattern(rounding="result")
def unit_alone(x, eps: float, scale: float, *, guard: Guard):
    return unit(x, eps, scale, guard).to(x.dtype)
