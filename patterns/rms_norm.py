"""RMS normalisation, in the spellings that differ in where values are rounded."""

from functools import partial

import torch
import torch.nn.functional as F

from liger_compile import ops
from liger_compile.match import Match
from liger_compile.registry import pattern


def normalize(x, eps):
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def check(match: Match) -> str | None:
    x, weight = match.captures["x"], match.captures.get("weight")
    if x.op == "sub" and any(getattr(t, "op", "") == "mean" for t in x.args):
        return "subtracts the mean first: this is a LayerNorm, where Inductor's own kernel is as good"
    if weight is not None and weight.shape != x.shape[-1:]:
        return f"weight has shape {tuple(weight.shape)} where the kernel takes [{x.shape[-1]}]"
    if x.shape[-1] > 65536:
        return f"normalises {x.shape[-1]} elements; the kernel holds at most 65536 in registers"
    return None


def examples(make, rows):
    yield {"x": make(rows, 96), "weight": make(96), "eps": 1e-6}
    yield {"x": make(2, 3, rows, 33), "weight": make(33), "eps": 1e-5}


def rms_pattern(**fixed):
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
