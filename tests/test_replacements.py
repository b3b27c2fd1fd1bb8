"""Any callable can be a replacement: each kind, compiled by torch.compile(backend="liger"), forward and backward.

All compute twice what the pattern does, so that a test sees that they ran.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import relative_error
from torch import Tensor

from liger_compile import backend, make_pattern

triton = pytest.importorskip("triton")
tl = triton.language


def squared_relu(x, w):
    return torch.relu(x) ** 2 * w


# ---- a custom op -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("liger_test::squared_relu", mutates_args=())
def custom(x: Tensor, w: Tensor) -> Tensor:
    return 2 * x.relu().square() * w


@custom.register_fake
def _(x, w):
    return torch.empty_like(x)


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def gradients(ctx, dy):
    x, w = ctx.saved_tensors
    return 4 * dy * x.relu() * w, 2 * dy * x.relu().square()


custom.register_autograd(gradients, setup_context=save)


# ---- an op of another library, defined by hand -----------------------------------------------------------------------

LIBRARY = torch.library.Library("liger_test_other", "DEF")
LIBRARY.define("squared_relu(Tensor x, Tensor w) -> Tensor")
LIBRARY.impl("squared_relu", lambda x, w: 2 * x.relu().square() * w, "CompositeExplicitAutograd")
torch.library.register_fake("liger_test_other::squared_relu", lambda x, w: torch.empty_like(x), lib=LIBRARY)
torch.library.register_autograd("liger_test_other::squared_relu", gradients, setup_context=save, lib=LIBRARY)


# ---- Triton kernels --------------------------------------------------------------------------------------------------

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# triton_op traces its kernels; interpreted ones cannot be traced, and their op must be opaque.
triton_op = torch.library.custom_op if INTERPRETED else torch.library.triton_op
launch = (lambda kernel: kernel) if INTERPRETED else torch.library.wrap_triton
DEVICE = "cpu" if INTERPRETED else "cuda"


@triton.jit
def forward_kernel(x_ptr, w_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.maximum(tl.load(x_ptr + at, mask=at < n), 0.0)
    tl.store(y_ptr + at, 2 * x * x * tl.load(w_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def backward_kernel(dy_ptr, x_ptr, w_ptr, dx_ptr, dw_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.maximum(tl.load(x_ptr + at, mask=at < n), 0.0)
    dy = tl.load(dy_ptr + at, mask=at < n)
    tl.store(dx_ptr + at, 4 * dy * x * tl.load(w_ptr + at, mask=at < n), mask=at < n)
    tl.store(dw_ptr + at, 2 * dy * x * x, mask=at < n)


@triton_op("liger_test::squared_relu_triton", mutates_args=())
def kernel(x: Tensor, w: Tensor) -> Tensor:
    y = torch.empty_like(x)
    launch(forward_kernel)[(triton.cdiv(x.numel(), 64),)](x, w, y, x.numel(), BLOCK=64)
    return y


@triton_op("liger_test::squared_relu_triton_backward", mutates_args=())
def kernel_backward(dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    dy = dy.contiguous()
    dx, dw = torch.empty_like(x), torch.empty_like(w)
    launch(backward_kernel)[(triton.cdiv(x.numel(), 64),)](dy, x, w, dx, dw, x.numel(), BLOCK=64)
    return dx, dw


if INTERPRETED:
    kernel.register_fake(lambda x, w: torch.empty_like(x))
    kernel_backward.register_fake(lambda dy, x, w: (torch.empty_like(x), torch.empty_like(w)))
kernel.register_autograd(lambda ctx, dy: kernel_backward(dy, *ctx.saved_tensors), setup_context=save)


# ---- others ----------------------------------------------------------------------------------------------------------


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return 2 * x.relu().square() * w

    backward = staticmethod(gradients)


def composition(x, w):
    return torch.relu(x).mul(2) * torch.relu(x) * w


REPLACEMENTS = {
    "custom op": custom,
    "triton op": kernel,
    "autograd function": Function.apply,
    "op of another library": torch.ops.liger_test_other.squared_relu,
    "composition": composition,
    "lambda": lambda x, w: 2 * torch.relu(x) ** 2 * w,
}


def examples(make, rows):
    yield {"x": make(rows, 6), "w": make(rows, 6)}


@pytest.mark.parametrize("replacement", REPLACEMENTS.values(), ids=REPLACEMENTS.keys())
def test_compiled(replacement, monkeypatch):
    reports = []
    rewrite = backend.rewrite
    monkeypatch.setattr(backend, "rewrite", lambda *args: reports.append(rewrite(*args)) or reports[-1])
    made = make_pattern(squared_relu, replacement, examples=examples)
    compiled = torch.compile(
        lambda x, w: (x * squared_relu(x, w)).sum(), backend="liger", options={"liger.patterns": [made]}, fullgraph=True
    )
    x = torch.randn(7, 30, device=DEVICE, requires_grad=True)
    w = torch.randn(7, 30, device=DEVICE, requires_grad=True)
    value = compiled(x, w)
    assert [r.counts for r in reports] == [{"squared_relu": 1}], reports
    expected = (2 * x * squared_relu(x, w)).sum()
    assert relative_error(value.detach(), expected.detach()) < 1e-5
    theirs = torch.autograd.grad(expected, (x, w))
    for ours, exact in zip(torch.autograd.grad(value, (x, w)), theirs, strict=True):
        assert relative_error(ours, exact) < 1e-5


def test_a_lambda_without_source_can_be_printed(monkeypatch):
    """As in a notebook that keeps no source: the graph that is compiled is printed by FX."""
    replacement = eval("lambda x, w: 2 * torch.relu(x) ** 2 * w", {"torch": torch, "__name__": "__main__"})
    test_compiled(replacement, monkeypatch)


TRACED = """
import sys
import torch
from test_replacements import INTERPRETED, examples, kernel, squared_relu
from torch._dynamo.backends.common import aot_autograd
from liger_compile import make_pattern, registered, rewrite

def stop(gm, inputs):
    print([str(n.target) for n in gm.graph.nodes if n.op == "call_function"])
    sys.exit()

def backend(gm, inputs):
    report = rewrite(gm)
    print(report.counts)
    return aot_autograd(fw_compiler=stop)(report.graphs[0].after, inputs)

assert not INTERPRETED
with registered(make_pattern(squared_relu, kernel, examples=examples, priority=1)):
    torch.compile(squared_relu, backend=backend)(torch.randn(3, 4), torch.randn(3, 4))
"""


def test_a_triton_op_is_traced_to_its_kernel():
    """What compiling it needs, as far as that goes without a GPU: interpreted kernels are in an opaque op above."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    run = subprocess.run([sys.executable, "-c", TRACED], env=environment, capture_output=True, text=True)
    counts, targets = run.stdout.splitlines()
    assert counts == "{'squared_relu': 1}" and "triton_kernel_wrapper" in targets, run.stderr[-2000:]
