"""The sweep over model families, on some of them: sites are counted right, all are rewritten, nothing changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import capture

from bench.coverage import SITUATIONS, cover, sites

LEFT = {
    "bitnet": {}, "gpt_oss": {},
    "apertus": {}, "arcee": {}, "exaone4": {}, "gemma": {}, "granite": {}, "hunyuan_v1_dense": {}, "llama": {},
    "mixtral": {}, "olmo2": {}, "olmoe": {}, "phi3": {}, "qwen2": {}, "qwen3": {}, "qwen3_moe": {}, "smollm3": {},
    "ernie4_5": {}, "glm": {}, "glm4": {}, "helium": {}, "llama4_text": {}, "minicpm3": {},
    "nanochat": {},
}  # fmt: skip
"""Families, and the sites that no pattern takes yet."""


@pytest.mark.parametrize("family", LEFT)
def test_family(family):
    result = in_situation(family, "float32")
    left = {kind: n for kind, n in result.left.items() if kind != "mask"}  # windows stay on a CPU
    assert result.found["norm"] and result.found["loss"] == 1 and left == LEFT[family], result
    assert result.reasons or not result.left, "left without a reason"
    assert result.loss_error < 1e-5 and result.gradient_error < 1e-4, result


@pytest.mark.parametrize("situation", SITUATIONS[1:])
@pytest.mark.parametrize("family", ["glm4", "deepseek_v3"])
def test_other_situations(family, situation):
    """RoPE of a part of neighbours, and of pairs, which a wider dtype reaches under autocast."""
    result = in_situation(family, situation)
    assert result.found["norm"] and result.found["rope"] == 4 and result.found["loss"] == 1 and not result.left, result
    assert result.gradient_error < (1.05 * result.plain_error if situation == "autocast" else 1e-4), result


@pytest.mark.parametrize(
    "family, situation, found",
    [
        ("gpt_oss", "dynamic", "glu"),  # its limits are numbers that the graph computes
        ("mamba", "dynamic", "glu"),  # a length that is another's only by a guard
        ("mamba", "autocast", "glu"),  # a gate of bfloat16 and what it gates in float32
        ("xglm", "dynamic", "loss"),  # a width that is a symbol and known
    ],
)
def test_sites_of_one_situation(family, situation, found):
    result = in_situation(family, situation)
    left = {kind: n for kind, n in result.left.items() if kind != "mask"}
    assert result.found[found] and result.found["loss"] == 1 and not left, result
    assert result.gradient_error < (1.05 * result.plain_error if situation == "autocast" else 1e-4), result


def in_situation(family, situation):
    result = cover(family, (situation,))
    assert not result.failure, result.failure
    assert not result.runs[situation].failure, result.runs[situation].failure
    return result.runs[situation]


def count(function, *inputs):
    return dict(sites(capture(function, *inputs), inputs))


def half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def neighbours(x):
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * 1j).flatten(-2)


COUNTED = {
    "norm": lambda x: x * (x * x).mean(-1, keepdim=True).add(1e-6).rsqrt(),
    "norm by a power": lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6) ** -0.5,
    "norm by a root": lambda x: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6),
    "norm as one": lambda x: F.rms_norm(x, (8,)),
    "rope": lambda x: x * 0.5 + half(x) * 0.7,
    "rope of complex numbers": neighbours,
    "glu": lambda x: F.silu(x) * (x + 1),
    "glu of two operands": lambda x: F.gelu(x.exp()) * x,
    "glu by a square": lambda x: F.relu(x).square() * (x + 1),
    "glu by a product": lambda x: F.relu(x) * F.relu(x) * (x + 1),
    "glu with a factor": lambda x: (x + 1) * (x * torch.sigmoid(1.702 * x)),
    "glu with clamps": lambda x: F.silu(x).clamp(max=1) * (x + 1).clamp(-1, 1),
    "loss": lambda x: F.cross_entropy(x, torch.tensor([0, 1, 2, 3])),
    "mask": lambda x: F.scaled_dot_product_attention(
        x.view(1, 1, 4, 8), x.view(1, 1, 4, 8), x.view(1, 1, 4, 8), torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_counting(name):
    assert count(COUNTED[name], torch.randn(4, 8)) == {name.split()[0]: 1}


NOT_COUNTED = {
    "layer norm": lambda x: F.layer_norm(x, (8,)),
    "layer norm by hand": lambda x: (
        (x - x.mean(-1, keepdim=True)) * (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
    ),
    "activation": lambda x: F.silu(x) * 2,
    "swish by hand": lambda x: F.silu(x) * x,
    "squared activation": lambda x: F.relu(x) * F.relu(x),
    "sigmoid with a factor": lambda x: x * torch.sigmoid(1.702 * x),
    "cubed activation": lambda x: F.relu(x).pow(3) * (x + 1),
    "two halves": lambda x: torch.cat(x.chunk(2, -1), -1) + 1,
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], is_causal=True),
}


@pytest.mark.parametrize("name", NOT_COUNTED)
def test_not_counting(name):
    assert count(NOT_COUNTED[name], torch.randn(4, 8)) == {}
