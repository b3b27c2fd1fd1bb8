"""What a training step keeps for its backward is no more than Inductor alone keeps; `bench.kept` has all families."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from models import batch, build

from bench.kept import activations, check, ours, without_code

INPUTS = batch(4, 64)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text"])
def test_no_more_than_inductor(family):
    """The last three normalise queries and keys, before and after each block, or all of these."""
    model = build(family, torch.bfloat16, num_hidden_layers=1)
    inductor, inductor_held = activations(model, without_code, INPUTS)
    everything, everything_held = activations(model, ours(), INPUTS)
    assert everything <= inductor and everything_held <= inductor_held
    layers, layers_held = activations(model, ours(disable=["linear_cross_entropy"]), INPUTS)
    assert layers <= inductor and layers_held <= inductor_held


def test_each_pattern_by_itself():
    """None relies on what others save. A rotation keeps cos and sin, once for all layers, where Inductor computes them
    again from the angles."""
    model = build("qwen3", torch.bfloat16, num_hidden_layers=1)
    inductor, _ = activations(model, without_code, INPUTS)
    angles = 2 * 64 * 16 * 2
    for pattern, more in (("rms_norm", 0), ("swiglu", 0), ("rope", angles)):
        alone, _ = activations(model, ours(enable=[pattern]), INPUTS)
        assert alone <= inductor + more, pattern


def test_the_measure():
    """Nothing rewritten is Inductor; logits that are kept show."""
    model = build("llama", torch.bfloat16, num_hidden_layers=1)
    assert activations(model, ours(enable=[]), INPUTS) == activations(model, without_code, INPUTS)
    lazy, kept = activations(model, ours(), INPUTS), activations(model, ours(logits="keep"), INPUTS)
    logits = 4 * 64 * 256 * 2
    assert kept[1] >= logits and kept[0] != lazy[0]


@pytest.mark.parametrize("family", ["glm4", "qwen3_next"])
def test_families_of_the_sweep(family):
    """A packed gate, RoPE of neighbours and norms behind each block; gated norms."""
    result = check(family)
    assert not result.failure and result.rewritten and result.ratio <= 1, result
