"""On a CPU, where there are no kernels: a compiler is shown plain torch, and fuses that as it would the model's own."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from models import FAMILIES, batch, build
from torch._dynamo.testing import AotEagerAndRecordGraphs

from liger_compile import _torch, ops
from liger_compile.ops import _library

Y = torch.tensor([1, 0, -100, 3, 6])


@pytest.fixture(autouse=True)
def ops_are_plain(ops_are_whole, monkeypatch):
    monkeypatch.setattr(_library, "WHOLE_ON", {"cuda", "meta"})


def traced(function, *given):
    """(results of the function as compiled, its forward graph as AOTAutograd has it, the backward's)."""
    aot = AotEagerAndRecordGraphs()
    made = torch.compile(function, backend=aot, fullgraph=True)(*given)
    made = made if isinstance(made, tuple) else (made,)
    trained = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
    gradients = torch.autograd.grad([m.sum() for m in made], trained)
    return (*made, *gradients), *(g.print_readable(print_output=False) for g in aot.fw_graphs + aot.bw_graphs)


def some(*shape, grad=True):
    return torch.randn(shape, requires_grad=grad)


LOSS = some(5, 8), some(7, 8), some(7)
CASES = {
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-6), (some(4, 8), some(8))),
    "glu": (lambda g, u: ops.glu(g, u, "gelu"), (some(4, 8), some(4, 8))),
    "packed_glu": (ops.packed_glu, (some(4, 8),)),
    "rope": (ops.rope, (some(4, 8), some(4, 8, grad=False), some(4, 8, grad=False))),
    "rope_pair": (ops.rope_pair, (some(3, 4, 8), some(2, 4, 8), some(4, 8, grad=False), some(4, 8, grad=False))),
    "rope of neighbours": (
        lambda x, c, s: ops.rope(x, c, s, contiguous=True, layout="neighbours to halves", inverse=True, per_pair=True),
        (some(3, 4, 8), some(4, 4, grad=False), some(4, 4, grad=False)),
    ),
    "rope of complex numbers": (
        ops.complex_rope_pair,
        (some(3, 4, 8), some(2, 4, 8), torch.polar(torch.ones(4, 4), torch.randn(4, 4))),
    ),
    "embedding": (lambda w: ops.embedding(torch.tensor([[1, 3], [1, 2]]), w, 2), (some(5, 8),)),
    "mean": (lambda h, w, b: ops.linear_cross_entropy(h, w, b, Y, scale=0.5, softcap=3.0), LOSS),
    "smoothed": (lambda h, w, b: ops.linear_cross_entropy(h, w, b, Y, reduction="none", label_smoothing=0.1), LOSS),
    "weighted": (
        lambda h, w, b: ops.linear_cross_entropy(h, w, b, Y, class_weight=torch.arange(7) + 1.0, divisor=2.0),
        LOSS,
    ),
    "lse": (lambda h, w, b: ops.linear_cross_entropy_lse(h, w, b, Y, reduction="sum"), LOSS),
}


@pytest.mark.parametrize("name", CASES)
def test_shown_as_plain_torch(name):
    """And means the same as the op itself, gradients included."""
    function, given = CASES[name]
    made, *graphs = traced(function, *given)
    assert len(graphs) == 2 and not any("liger_compile" in g for g in graphs)
    plain = function(*given)
    plain = plain if isinstance(plain, tuple) else (plain,)
    gradients = torch.autograd.grad([p.sum() for p in plain], [x for x in given if x.requires_grad])
    for ours, theirs in zip(made, (*plain, *gradients), strict=True):
        assert ours.stride() == theirs.stride() and relative_error(ours.detach(), theirs.detach()) < 1e-5


@pytest.mark.parametrize("memory", ["lean", "balanced", "fast"])
def test_chunks_only_if_asked_for(memory, monkeypatch):
    module = importlib.import_module("liger_compile.ops.linear_cross_entropy")
    for budget in module.BUDGET:
        monkeypatch.setitem(module.BUDGET, budget, 1)
    _, forward, _ = traced(lambda h, w, b: ops.linear_cross_entropy(h, w, b, Y, memory=memory), *LOSS)
    assert ("liger_compile.linear_cross_entropy_forward" in forward) == (memory == "lean")


@pytest.mark.parametrize("family, dynamic", [*((f, False) for f in FAMILIES), ("qwen3", True), ("gemma2", True)])
def test_models(family, dynamic, monkeypatch):
    """The graph that Inductor gets has none of our ops, and the step is eager's."""
    aot = AotEagerAndRecordGraphs()
    monkeypatch.setattr(_torch, "compile_fx", lambda gm, inputs, config: aot(gm, inputs))
    model, inputs = build(family), batch(3, 24)
    expected = model(**inputs)
    expected.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    out = torch.compile(model, backend="liger", dynamic=dynamic)(**inputs)
    out.loss.backward()
    assert relative_error(out.loss.detach(), expected.loss.detach()) < 1e-5
    for name, p in model.named_parameters():
        assert relative_error(p.grad, gradients[name]) < 1e-4, name
    assert aot.fw_graphs and aot.bw_graphs
    for graph in aot.fw_graphs + aot.bw_graphs:
        assert "liger_compile" not in graph.print_readable(print_output=False)
    with torch.no_grad():
        torch.testing.assert_close(F.softmax(out.logits, -1), F.softmax(expected.logits, -1), rtol=1e-4, atol=1e-5)
