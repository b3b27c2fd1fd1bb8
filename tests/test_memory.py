"""What a training step keeps for its backward is no more than Inductor alone keeps.

Inductor's own front end and partitioner decide what is kept; only code generation, which has no say in it, is left out
here, so that a model takes seconds.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch._inductor.compile_fx import compile_fx

pytest.importorskip("transformers")

from models import batch, build

from liger_compile import _torch
from liger_compile.backend import liger
from liger_compile.lazy import LazyTensor


def without_code(gm, example_inputs, config=None):
    """Inductor up to the graphs it would generate code for."""

    def inner(gm, example_inputs, **kwargs):
        def run(inputs):
            return gm(*inputs)

        run._boxed_call = True
        return run

    with torch._functorch.config.patch(enable_autograd_cache=False):
        return compile_fx(gm, example_inputs, inner_compile=inner, config_patches=config or None)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(_torch, "compile_fx", without_code)


def activations(model, backend):
    """Bytes that one forward keeps: (for its backward, and with what the outputs hold on to)."""
    torch._dynamo.reset()
    inputs = batch(4, 64)
    compiled = torch.compile(model, backend=backend)
    compiled(**inputs).loss.backward()
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *inputs.values())}
    kept = {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = compiled(**inputs)
    saved = sum(kept.values())
    for t in out.logits._state.inputs if isinstance(out.logits, LazyTensor) else [out.logits]:
        keep(t)
    return saved, sum(kept.values())


def ours(**options):
    return functools.partial(liger, options={f"liger.{k}": v for k, v in options.items()})


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text"])
def test_no_more_than_inductor(family):
    """The last three normalise queries and keys, before and after each block, or all of these."""
    model = build(family, torch.bfloat16, num_hidden_layers=1)
    inductor, inductor_held = activations(model, without_code)
    everything, everything_held = activations(model, ours())
    assert everything <= inductor and everything_held <= inductor_held
    layers, layers_held = activations(model, ours(disable=["linear_cross_entropy"]))
    assert layers <= inductor and layers_held <= inductor_held


def test_each_pattern_by_itself():
    """None relies on what others save. A rotation keeps cos and sin, once for all layers, where Inductor computes them
    again from the angles."""
    model = build("qwen3", torch.bfloat16, num_hidden_layers=1)
    inductor, _ = activations(model, without_code)
    angles = 2 * 64 * 16 * 2
    for pattern, more in (("rms_norm", 0), ("swiglu", 0), ("rope", angles)):
        alone, _ = activations(model, ours(enable=[pattern]))
        assert alone <= inductor + more, pattern


def test_the_measure():
    """Nothing rewritten is Inductor; logits that are kept show."""
    model = build("llama", torch.bfloat16, num_hidden_layers=1)
    assert activations(model, ours(enable=[])) == activations(model, without_code)
    lazy, kept = activations(model, ours()), activations(model, ours(logits="keep"))
    logits = 4 * 64 * 256 * 2
    assert kept[1] >= logits and kept[0] != lazy[0]
