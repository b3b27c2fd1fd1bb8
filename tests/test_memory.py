"""What a training step keeps for its backward is no more than Inductor alone keeps; `bench.kept` has all families."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from helpers import relative_error
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


def gradients(model, function):
    return torch.autograd.grad(function(**INPUTS).loss, list(model.parameters()))


def test_policies():
    """Queries and keys are kept normalised and rotated, or as they were; norms and gated units are kept, or not."""
    model = build("qwen3", torch.float32, num_hidden_layers=1)
    kept = {policy: activations(model, ours(memory=policy), INPUTS)[0] for policy in ("lean", "balanced", "speed")}
    config = model.config
    heads = config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    assert kept["balanced"] - kept["lean"] == 4 * 64 * heads * 4
    assert kept["speed"] - kept["balanced"] >= 4 * 64 * (config.hidden_size + config.intermediate_size) * 4
    eager = gradients(model, model)
    for policy in kept:
        torch._dynamo.reset()
        made = gradients(model, torch.compile(model, backend=ours(memory=policy)))
        assert all(relative_error(o, e) < 1e-4 for o, e in zip(made, eager, strict=True))


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
