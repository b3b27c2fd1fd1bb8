"""The Triton kernels against the ops' references: interpreted at small sizes, compiled on a GPU at real ones."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import Accuracy, relative_error

from liger_compile.ops.chunked_loss import Transform

pytest.importorskip("triton")

INTERPRETED = not torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXACT = [torch.float32, torch.float16] if INTERPRETED else DTYPES
"""Those whose errors mean something: the interpreter, which is slow, truncates to bfloat16."""


def pair(module, kernel, reference, kernel_module=None):
    """A kernel's launcher and the reference of its op."""
    kernels = import_module(f"liger_compile.kernels.{kernel_module or module}")
    return getattr(kernels, kernel), getattr(import_module(f"liger_compile.ops.{module}"), reference)


RMS = pair("rms_norm", "forward", "_reference")
RMS_BACKWARD = pair("rms_norm", "backward", "_backward_reference")
ADD_RMS = pair("rms_norm", "add_forward", "_add_reference")
RMS_ADD = pair("rms_norm", "forward_add", "_added_reference")
RMS_BACKWARD_ADD = pair("rms_norm", "backward_add", "_backward_add_reference")
GATED = pair("gated_rms_norm", "forward", "_reference")
GATED_BACKWARD = pair("gated_rms_norm", "backward", "_backward_reference")
GLU = pair("glu", "forward", "_reference")
GLU_BACKWARD = pair("glu", "backward", "_backward_reference")
PACKED = pair("glu", "packed_forward", "_packed_reference")
PACKED_BACKWARD = pair("glu", "packed_backward", "_packed_backward_reference")
ROPE = pair("rope", "forward", "_reference")
ROPE_PAIR = pair("rope", "pair_forward", "_pair_reference")
ROPE_PAIR_BACKWARD = pair("rope", "pair_backward", "_pair_backward_reference")
NORM_ROPE = pair("norm_rope", "forward", "_reference")
NORM_ROPE_BACKWARD = pair("norm_rope", "backward", "_backward_reference")
ROWS = pair("chunked_loss", "rows", "_reference_rows", "cross_entropy")
ROW_GRADIENTS = pair("chunked_loss", "row_gradients", "_reference_row_gradients", "cross_entropy")


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory is filled with NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def compare(functions, args, scatter_rows):
    """Kernel and reference on the same operands, and the reference in float64."""
    kernel, reference = functions

    def double(value):
        if isinstance(value, torch.dtype):
            return torch.float64
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    accuracy = Accuracy()
    ours, again, eager = (as_tuple(f(*args)) for f in (kernel, kernel, reference))
    exact = as_tuple(reference(*map(double, args)))
    # The interpreter truncates to bfloat16 where it should round, results and values inside a kernel alike.
    seen = [v for v in (*args, *ours) if isinstance(v, torch.Tensor)]
    truncated = INTERPRETED and any(v.dtype is torch.bfloat16 for v in seen)
    for i, (o, a, e, x) in enumerate(zip(ours, again, eager, exact, strict=True)):
        assert torch.equal(o, a), f"result {i} differs from run to run"
        if e.numel():
            assert o.stride() == e.stride() and not o.isnan().any(), f"result {i}"
            if truncated:
                assert relative_error(o, x) < 2e-2, f"result {i}"
            else:
                accuracy.add(f"result {i}", o, e, x)
    accuracy.check(rows=scatter_rows)


# ---- small, interpreted -------------------------------------------------------------------------------------------


def small(dtype, *shape):
    return torch.randn(shape, device="cpu" if INTERPRETED else "cuda").to(dtype)


def layouts(dtype):
    """Operands of a norm: odd widths, one row, a transposed view of heads, a slice with gaps."""
    yield small(dtype, 5, 96)
    yield small(dtype, 3, 577)
    yield small(dtype, 1, 33)
    yield small(dtype, 2, 7, 3, 16).transpose(1, 2)
    yield small(dtype, 2, 3, 64)[..., :33]


@pytest.mark.parametrize("rounding", ["normed", "result", "factor"])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_rms_norm(dtype, rounding):
    for x in layouts(dtype):
        weight = small(dtype, x.shape[-1])
        for w, offset in ((weight, 0.0), (weight.float(), 1.0), (None, 0.0)):
            compare(RMS, (x, w, 1e-6, offset, rounding), scatter_rows=1)
            dy = small(
                torch.float32 if w is not None and w.dtype is torch.float32 and rounding != "result" else dtype,
                *x.shape,
            )
            compare(RMS_BACKWARD, (dy, x, w, 1e-6, offset, rounding, w is not None), scatter_rows=1)


@pytest.mark.parametrize("guard", ["add", "floor", "outside"])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_rms_norm_by_length(dtype, guard):
    """Rows of zeros, and rows shorter than eps, beside others."""
    for x in layouts(dtype):
        x = x * torch.tensor(0.0 if x.shape[-2] == 1 else 1.0, dtype=dtype)
        x.select(-2, -1).mul_(1e-3)
        w, dy = small(dtype, x.shape[-1]), small(dtype, *x.shape)
        for weight, divisor in ((w, None), (None, 1.0), (w, 3.0)):
            how = guard, divisor
            compare(RMS, (x, weight, 0.1, 0.0, "result", *how), scatter_rows=1)
            compare(RMS_BACKWARD, (dy, x, weight, 0.1, 0.0, "result", weight is not None, *how), scatter_rows=1)


def summed_gradients(functions, count):
    """`backward_add` of `count` gradients, as a function of tensors alone."""
    return tuple(lambda *args, f=f: f(list(args[:count]), *args[count:]) for f in functions)


def compare_with_residual(dtype, shape, rounding, offset, rows):
    x, w, residual = (small(dtype, *s) for s in (shape, shape[-1:], shape))
    for function in (ADD_RMS, RMS_ADD):
        compare(function, (x, residual, w, 1e-6, offset, rounding), rows)
    for count, dresidual, need_dweight, again in (
        (1, None, True, True),
        (2, residual, True, False),
        (3, residual, False, True),
    ):
        dys = [small(dtype, *shape) for _ in range(count)]
        how = (x, w, dresidual, 1e-6, offset, rounding, need_dweight, again)
        compare(summed_gradients(RMS_BACKWARD_ADD, count), (*dys, *how), rows)


@pytest.mark.parametrize("rounding, offset", [("normed", 0.0), ("result", 1.0), ("factor", 0.0)])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_rms_norm_with_a_residual(dtype, rounding, offset):
    for shape in ((5, 96), (2, 3, 33), (3, 577)):
        compare_with_residual(dtype, shape, rounding, offset, 1)


def test_rms_norm_of_wide_rows():
    """Two blocks, and a weight that is not kept."""
    x, w, dy = small(torch.bfloat16, 3, 8205), small(torch.bfloat16, 8205), small(torch.bfloat16, 3, 8205)
    compare(RMS, (x, w, 1e-6, 0.0, "normed"), scatter_rows=1)
    compare(RMS_BACKWARD, (dy, x, w, 1e-6, 0.0, "normed", True), scatter_rows=1)


@pytest.mark.parametrize("n_cols", [1, 2, 3, 33, 96, 512, 513, 577, 1024, 1536, 2304, 3072, 5120, 8192, 8205, 65536])
def test_blocks_of_a_norm_hold_its_rows(n_cols):
    cols, rest = import_module("liger_compile.kernels.rms_norm")._parts(n_cols)
    assert n_cols <= cols + rest < 2 * n_cols and (rest == 0 or cols < n_cols)


GATED_NORMS = {
    "gate last": ("silu", False, "normed"),
    "gate last, result": ("silu", False, "result"),
    "sigmoid last, result": ("sigmoid", False, "result"),
    "gate first": ("silu", True, "normed"),
    "gate first, result": ("sigmoid", True, "result"),
}


@pytest.mark.parametrize("how", GATED_NORMS)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_gated_rms_norm(dtype, how):
    how = GATED_NORMS[how]
    for x in layouts(dtype):
        gate, weight = small(dtype, *x.shape), small(dtype, x.shape[-1])
        for g, w in ((gate, weight), (gate.float().transpose(0, 1).contiguous().transpose(0, 1), weight.float())):
            compare(GATED, (x, g, w, 1e-6, *how), scatter_rows=1)
            wide = how[1:] == (True, "normed") and w.dtype is torch.float32
            dy = small(torch.float32 if wide else dtype, *x.shape)
            compare(GATED_BACKWARD, (dy, x, g, w, 1e-6, *how, None, w is weight), scatter_rows=1)


@pytest.mark.parametrize("how", ["gate last", "gate first"])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_gated_rms_norm_of_groups(dtype, how):
    x, gate, weight = small(dtype, 2, 9, 64)[..., :33], small(dtype, 2, 9, 33), small(dtype, 33)
    dy = small(dtype, 2, 9, 33)
    compare(GATED, (x, gate, weight, 1e-6, *GATED_NORMS[how], [3, 11]), scatter_rows=1)
    compare(GATED_BACKWARD, (dy, x, gate, weight, 1e-6, *GATED_NORMS[how], [3, 11], True), scatter_rows=1)


UNITS = {
    "silu": ("silu",),
    "gelu": ("gelu",),
    "gelu_tanh": ("gelu_tanh",),
    "relu": ("relu",),
    "relu2": ("relu2",),
    "scaled": ("silu", 0.7),
    "clamped": ("silu", 1.0, 0.9),
    "clamped, shifted": ("silu", 1.0, 0.9, 1.702, 1.0),
    "everything": ("relu2", -1.3, 0.9, 1.0, 0.5),
    "in float32": ("silu", 1.0, None, 1.0, 0.0, True),
    "everything in float32": ("silu", -1.3, 0.9, 1.702, 0.5, True),
}
"""Gated linear units by the arguments behind the operands, but for those of packing."""


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_glu(dtype, unit):
    whole = small(dtype, 2, 3, 66)
    activation, *variant = unit = UNITS[unit]
    for gate, up in (
        (small(dtype, 4, 33), small(dtype, 4, 33)),
        whole.chunk(2, -1),
        (whole.transpose(0, 1), whole.transpose(0, 1)),
    ):
        compare(GLU, (gate, up, *unit), scatter_rows=1)
        for again in (False, True):
            compare(with_product(GLU_BACKWARD, again), (small(dtype, *gate.shape), gate, up, *unit), scatter_rows=1)
    for gate_first in (True, False):
        compare(PACKED, (whole, activation, gate_first, *variant), scatter_rows=1)
        args = small(dtype, 2, 3, 33), whole, activation, gate_first, *variant
        compare(with_product(PACKED_BACKWARD, gate_first), args, scatter_rows=1)


@pytest.mark.parametrize("unit", ["silu", "everything", "everything in float32"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_glu_of_two_dtypes(dtypes, unit):
    """As autocast leaves them: what comes out of a projection is narrower than what does not."""
    gate, up = (small(dtype, 4, 33) for dtype in dtypes)
    compare(GLU, (gate, up, *UNITS[unit]), scatter_rows=1)
    for again in (False, True):
        args = small(torch.float32, 4, 33), gate, up, *UNITS[unit]
        compare(with_product(GLU_BACKWARD, again), args, scatter_rows=1)


def with_product(functions, again):
    """A unit's gradients, and its product beside them."""
    return tuple(functools.partial(f, again=again) for f in functions)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_product_beside_its_gradients_is_the_forward_s(dtype):
    gate, up, dy, x = (small(dtype, 4, n) for n in (33, 33, 33, 66))
    for unit in UNITS.values():
        activation, *variant = unit
        *_, y = GLU_BACKWARD[0](dy, gate, up, *unit, again=True)
        assert torch.equal(y, GLU[0](gate, up, *unit))
        variant += [*[1.0, None, 1.0, 0.0, False][len(variant) :], True]
        *_, y = PACKED_BACKWARD[0](dy, x, activation, True, *variant, again=True)
        assert torch.equal(y, PACKED[0](x, activation, True, *variant))


@pytest.mark.parametrize("unit", UNITS)
def test_glu_keeps_what_is_not_finite(unit):
    gate, up = small(torch.float32, 4, 33), small(torch.float32, 4, 33)
    gate[0, ::4], gate[1, ::4], gate[2, ::4] = torch.nan, torch.inf, -torch.inf
    up[3, ::4], up[0, 1::4], up[1, 1::4] = torch.nan, torch.inf, -torch.inf
    dy = small(torch.float32, 4, 33)
    for (kernel, reference), args in ((GLU, (gate, up)), (GLU_BACKWARD, (dy, gate, up))):
        for ours, eager in zip(
            as_tuple(kernel(*args, *UNITS[unit])), as_tuple(reference(*args, *UNITS[unit])), strict=True
        ):
            assert not ours[~eager.isfinite()].isfinite().any()
            torch.testing.assert_close(ours[eager.isfinite()], eager[eager.isfinite()])


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_interleaved_glu(dtype, unit):
    activation, *variant = UNITS[unit]
    variant += [*[1.0, None, 1.0, 0.0, False][len(variant) :], True]
    for x in (
        small(dtype, 4, 6, 66),
        small(dtype, 3, 4100),  # more than a block
        small(dtype, 4, 66, 6).transpose(1, 2),
        small(dtype, 4, 6, 70)[..., 2:-2],
    ):
        dy = small(dtype, *x.shape[:-1], x.shape[-1] // 2)
        for gate_first in (True, False):
            compare(PACKED, (x, activation, gate_first, *variant), scatter_rows=1)
            compare(
                with_product(PACKED_BACKWARD, gate_first), (dy, x, activation, gate_first, *variant), scatter_rows=1
            )


ROPES = {
    "transposed heads": ((2, 3, 3, 16), (2, 3, 1, 16), (1, 1, 3, 16)),
    "a part": ((2, 3, 3, 16), (2, 3, 1, 16), (2, 1, 3, 6)),
    "tokens before heads": ((2, 3, 3, 20), (2, 3, 2, 20), (2, 3, 1, 12)),
    "angles of their own": ((2, 3, 4, 16), (2, 3, 4, 16), (2, 3, 4, 16)),
    "rows": ((7, 16), (7, 16), (7, 16)),
}


@pytest.mark.parametrize("layout", ROPES)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_rope(dtype, layout):
    q, k, cos = (small(dtype, *shape) for shape in ROPES[layout])
    if layout in ("transposed heads", "a part"):
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    dense = import_module("liger_compile.ops.rope")._dense_strides
    for wide, upcast, promote, contiguous in (
        (0, False, False, True),
        (0, True, False, False),
        (1, False, True, False),
    ):
        c = cos.float() if wide else cos
        s = torch.randn_like(c)
        compare(ROPE_PAIR, (q, k, c, s, upcast, promote, contiguous), scatter_rows=1)
        gradients = small(torch.float32 if wide else dtype, *q.shape), small(dtype, *k.shape)
        compare(ROPE_PAIR_BACKWARD, (*gradients, c, s, dense(q), dense(k), dtype, upcast), scatter_rows=1)
    compare(ROPE, (q, cos, cos, False, False, False), scatter_rows=1)


WAYS = [
    # layout, inverse, per_pair
    ("halves", True, False),
    ("halves", False, True),
    ("neighbours", False, False),
    ("neighbours", True, True),
    ("neighbours to halves", False, True),
    ("neighbours to halves", True, False),
]


@pytest.mark.parametrize("layout", ["transposed heads", "a part", "tokens before heads", "rows"])
@pytest.mark.parametrize("way", WAYS, ids=lambda w: "-".join(map(str, w)))
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_rope_of_other_pairs(dtype, way, layout):
    q, k, cos = (small(dtype, *shape) for shape in ROPES[layout])
    if layout in ("transposed heads", "a part"):
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    cos = cos[..., : cos.shape[-1] // 2] if way[2] else cos  # with gaps between the rows
    sin = small(dtype, *cos.shape)
    dense = import_module("liger_compile.ops.rope")._dense_strides
    compare(ROPE_PAIR, (q, k, cos, sin, False, False, True, *way), scatter_rows=1)
    gradients = small(dtype, *q.shape), small(dtype, *k.shape)
    compare(ROPE_PAIR_BACKWARD, (*gradients, cos, sin, dense(q), dense(k), dtype, True, *way), scatter_rows=1)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_rope_with_angles_between_others(dtype):
    """cos and sin of complex numbers lie next to each other, and are read where they lie."""
    q, k = small(dtype, 2, 5, 3, 12), small(dtype, 2, 5, 1, 12)
    cos, sin = small(torch.float32, 5, 1, 6, 2).unbind(-1)
    compare(ROPE_PAIR, (q, k, cos, sin, True, False, False, "neighbours", False, True), scatter_rows=1)
    cos, sin = small(torch.float32, 5, 1, 12, 2).unbind(-1)
    compare(ROPE, (q, cos, sin), scatter_rows=1)


def compare_norm_rope(q, k, cos, weight, rounding, offset, how, gradients, rows):
    """Forward and backward. `weight` is the weights' dtype, None for no weights; `how`: upcast, promote, contiguous."""
    upcast, promote, contiguous = how
    sin = torch.randn_like(cos)
    weights = [None] * 2 if weight is None else [torch.randn_like(x[0, 0, 0]).to(weight) for x in (q, q)]
    if k is None:
        weights[1] = None
    norm = (1e-6, offset, rounding)
    compare(NORM_ROPE, (q, k, *weights, cos, sin, *norm, upcast, promote, contiguous), rows)
    dtype = NORM_ROPE[1](q, k, *weights, cos, sin, *norm, upcast, promote, contiguous)[0].dtype
    dys = [None if x is None else gradients(torch.randn_like(x).to(dtype)) for x in (q, k)]
    for need in {weight is not None, False}:
        compare(NORM_ROPE_BACKWARD, (*dys, q, k, *weights, cos, sin, *norm, upcast, need), rows)


@pytest.mark.parametrize("rounding, offset", [("normed", 0.0), ("result", 1.0), ("factor", 0.0)])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_norm_rope(dtype, rounding, offset):
    packed = small(dtype, 2, 3, 3 + 1 + 1, 16).transpose(1, 2)  # as of one product for q, k and v
    q, k = packed[:, :3], packed[:, 3:4]
    apart = small(dtype, 2, 3, 3, 16).transpose(1, 2)
    same, plain = (lambda d: d), (False, False, False)
    cases = [
        (q, k, small(dtype, 1, 1, 3, 16), dtype, plain, same),
        (apart, k.contiguous(), small(dtype, 2, 1, 3, 6), dtype, (False, False, True), lambda d: d.contiguous()),
        (apart, None, small(dtype, 3, 16), None, (True, False, False), same),
        (q, k, small(torch.float32, 1, 1, 3, 16), torch.float32, (False, True, False), same),
    ]
    for q, k, cos, weight, how, gradients in cases:
        compare_norm_rope(q, k, cos, weight, rounding, offset, how, gradients, 1)


def test_one_head_of_keys_is_taken_with_those_of_queries(monkeypatch):
    """Its strides say nothing of heads, which is no reason to take it apart."""
    module = import_module("liger_compile.kernels.norm_rope")
    q, k, w = (small(torch.float32, *s) for s in ((2, 3, 3, 16), (2, 3, 1, 16), (16,)))
    operands = (q.transpose(1, 2), k.transpose(1, 2), w, w, *small(torch.float32, 2, 3, 16))
    expected = NORM_ROPE[1](*operands, 1e-6, 0.0, "normed", False, False, False)
    monkeypatch.setattr(module.rms_norm, "forward", None)  # what it would be taken apart with
    for y, e in zip(module.forward(*operands, 1e-6, 0.0, "normed", False, False, False), expected, strict=True):
        assert relative_error(y, e) < 1e-6


TRANSFORMS = [
    Transform(),
    Transform(scale=0.25),
    Transform(divisor=3.0),
    Transform(softcap=2.0),
    Transform(scale=0.5, divisor=3.0, softcap=2.0, wide=True),
    Transform(softcap=2.0, smoothing=0.1),
]


@pytest.mark.parametrize("how", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_cross_entropy_rows(dtype, how):
    logits = small(dtype, 7, 300) * 3
    target = torch.randint(0, 300, (7,), device=logits.device)
    target[2] = -100

    def losses_and_gradient(function):
        def run(logits, target, given):
            mine = logits.clone()
            losses, _, _ = function(mine, target, given, -100, how, True)
            again, most, total = function(logits.clone(), target, None, -100, how, False)
            assert torch.equal(losses, again)
            return losses, mine, most + total.log()

        return run

    given = torch.rand(7, device=logits.device)
    compare(tuple(map(losses_and_gradient, ROWS)), (logits, target, given), scatter_rows=1)


@pytest.mark.parametrize("how", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_row_gradients(dtype, how):
    logits = small(dtype, 7, 300) * 3
    target = torch.randint(0, 300, (7,), device=logits.device)
    of_lse, of_label = torch.randn(2, 7, device=logits.device)
    of_lse[3] = of_label[3] = 0

    def gradient(rows, function):
        def run(logits, target, of_lse, of_label):
            _, most, total = rows(logits.clone(), target, None, -100, how, False)
            out = torch.empty_like(logits)
            for part in (slice(0, 170), slice(170, 300)):
                function(logits, target, most, total, of_lse, of_label, how, part.start, out[:, part])
            return out

        return run

    functions = tuple(gradient(r, g) for r, g in zip(ROWS, ROW_GRADIENTS, strict=True))
    compare(functions, (logits, target, of_lse, of_label), scatter_rows=1)


def test_cross_entropy_target_outside_the_vocabulary_is_not_read():
    logits = small(torch.float32, 2, 10)
    losses, _, _ = ROWS[0](logits, torch.tensor([3, 10], device=logits.device), None, -100, Transform(), False)
    assert losses[0].isfinite() and losses[1].isnan()


def test_infinite_logits():
    logits = small(torch.float32, 2, 10)
    logits[0, 3:] = float("-inf")
    target = torch.tensor([0, 1], device=logits.device)
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(ROWS[0](logits.clone(), target, None, -100, Transform(), True)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled(dtype):
    scaled, reference = pair("chunked_loss", "scaled", "_reference_scaled", "scale")
    x = small(torch.float32, 5, 701)
    scale = torch.tensor(0.37, device=x.device)

    def returning(function):
        def run(x, scale):
            out = x.new_empty(x.shape, dtype=torch.float64 if x.dtype is torch.float64 else dtype)
            function(x, scale, out)
            return out

        return run

    compare((returning(scaled), returning(reference)), (x, scale), scatter_rows=x.numel())


def test_kernels_compile_for_a_gpu():
    """In a process of its own, since this one interprets them."""
    script = Path(__file__).parent / "compile_kernels.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]


# ---- real sizes, on a GPU -----------------------------------------------------------------------------------------

gpu = pytest.mark.gpu
HALF = [torch.bfloat16, torch.float16]


def real(dtype, *shape):
    return torch.randn(shape, device="cuda").to(dtype)


@gpu
@pytest.mark.parametrize(
    "rows, width",
    [
        *((16384, 4096), (16384, 1024), (65536, 128), (2048, 16384), (4095, 5119), (300, 65536)),
        *((32768, 576), (16384, 2304), (4096, 12288)),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_at_size(dtype, rows, width):
    x, w, dy = real(dtype, rows, width), real(dtype, width), real(dtype, rows, width)
    for rounding, offset in (("normed", 0.0), ("result", 1.0)):
        compare(RMS, (x, w, 1e-6, offset, rounding), rows)
        compare(RMS_BACKWARD, (dy, x, w, 1e-6, offset, rounding, True), rows)


@gpu
@pytest.mark.parametrize("rows, width", [(16384, 4096), (65536, 128), (2048, 16384), (4095, 5119)])
@pytest.mark.parametrize("guard, divisor", [("add", 1.0), ("floor", None), ("floor", 1.0), ("outside", None)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_by_length_at_size(dtype, guard, divisor, rows, width):
    x, w, dy = real(dtype, rows, width), real(dtype, width), real(dtype, rows, width)
    x[::7] *= 1e-5
    x[::11] = 0
    for weight in (w, None):
        compare(RMS, (x, weight, 1e-3, 0.0, "normed", guard, divisor), rows)
        need = weight is not None
        compare(RMS_BACKWARD, (dy, x, weight, 1e-3, 0.0, "normed", need, guard, divisor), rows)


@gpu
@pytest.mark.parametrize(
    "rows, width", [(16384, 4096), (16384, 1024), (2048, 16384), (4095, 5119), (300, 65536), (16384, 2304)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_with_a_residual_at_size(dtype, rows, width):
    for rounding, offset in (("normed", 0.0), ("result", 1.0)):
        compare_with_residual(dtype, (rows, width), rounding, offset, rows)


@gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rms_norm_of_heads_at_size(dtype):
    x = real(dtype, 8, 2048, 16, 128).transpose(1, 2)
    compare(RMS, (x, real(dtype, 128), 1e-6, 0.0, "normed"), 10**5)
    compare(RMS_BACKWARD, (real(dtype, *x.shape), x, real(dtype, 128), 1e-6, 0.0, "normed", True), 10**5)


@gpu
@pytest.mark.parametrize("how", GATED_NORMS)
@pytest.mark.parametrize(
    "rows, width, groups",
    [(65536, 128, None), (8192, 4096, None), (2048, 16384, None), (4095, 5119, None), (8192, 8192, [8, 1024])],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_rms_norm_at_size(dtype, rows, width, groups, how):
    x, gate, dy, w = real(dtype, rows, width), real(dtype, rows, width), real(dtype, rows, width), real(dtype, width)
    compare(GATED, (x, gate, w, 1e-6, *GATED_NORMS[how], groups), rows)
    compare(GATED_BACKWARD, (dy, x, gate, w, 1e-6, *GATED_NORMS[how], groups, True), rows)


@gpu
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_glu_at_size(dtype, unit):
    activation, *variant = unit = UNITS[unit]
    x = real(dtype, 8192, 2 * 14336 // 4 + 2)
    gate, up = x.chunk(2, -1)
    compare(GLU, (gate.contiguous(), up.contiguous(), *unit), 8192)
    for again in (False, True):
        compare(with_product(GLU_BACKWARD, again), (real(dtype, *gate.shape), gate.contiguous(), up, *unit), 8192)
    compare(PACKED, (x, activation, True, *variant), 8192)
    compare(with_product(PACKED_BACKWARD, True), (real(dtype, *gate.shape), x, activation, False, *variant), 8192)
    up, dy = up.float(), real(torch.float32, *gate.shape)
    compare(GLU, (gate, up, *unit), 8192)
    compare(with_product(GLU_BACKWARD, False), (dy, gate, up, *unit), 8192)


@gpu
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interleaved_glu_at_size(dtype, unit):
    activation, *variant = UNITS[unit]
    variant += [*[1.0, None, 1.0, 0.0, False][len(variant) :], True]
    x = real(dtype, 8192, 2 * 2880 + 2)
    dy = real(dtype, 8192, 2881)
    for gate_first in (True, False):
        compare(PACKED, (x, activation, gate_first, *variant), 8192)
        compare(with_product(PACKED_BACKWARD, gate_first), (dy, x, activation, gate_first, *variant), 8192)


@gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "heads, kv_heads, width, rotated", [(32, 8, 128, 128), (16, 8, 128, 128), (8, 4, 256, 256), (64, 1, 80, 32)]
)
def test_rope_at_size(dtype, heads, kv_heads, width, rotated):
    q, k = real(dtype, 2, 4096, heads, width).transpose(1, 2), real(dtype, 2, 4096, kv_heads, width).transpose(1, 2)
    cos, sin = real(dtype, 1, 1, 4096, rotated), real(dtype, 1, 1, 4096, rotated)
    dense = import_module("liger_compile.ops.rope")._dense_strides
    compare(ROPE_PAIR, (q, k, cos, sin, False, False, rotated < width), 8192)
    gradients = real(dtype, *q.shape), real(dtype, *k.shape)
    compare(ROPE_PAIR_BACKWARD, (*gradients, cos, sin, dense(q), dense(k), dtype, False), 8192)


@gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "heads, kv_heads, width, rotated", [(16, 8, 128, 128), (40, 8, 128, 128), (8, 4, 256, 256), (12, 1, 96, 48)]
)
def test_norm_rope_at_size(dtype, heads, kv_heads, width, rotated):
    q, k = (real(dtype, 2, 4096, n, width).transpose(1, 2) for n in (heads, kv_heads))
    cos = real(dtype, 1, 1, 4096, rotated)
    for rounding, offset in (("normed", 0.0), ("result", 1.0)):
        how = (False, False, rotated < width)
        compare_norm_rope(q, k, cos, dtype, rounding, offset, how, lambda d: d.contiguous(), 8192)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda w: "-".join(map(str, w)))
@pytest.mark.parametrize("heads, kv_heads, width, rotated", [(32, 8, 128, 128), (16, 1, 256, 64), (12, 12, 80, 40)])
def test_rope_of_other_pairs_at_size(dtype, way, heads, kv_heads, width, rotated):
    q, k = real(dtype, 2, 2048, heads, width).transpose(1, 2), real(dtype, 2, 2048, kv_heads, width).transpose(1, 2)
    cos, sin = (real(dtype, 1, 1, 2048, rotated // 2 if way[2] else rotated) for _ in range(2))
    dense = import_module("liger_compile.ops.rope")._dense_strides
    compare(ROPE_PAIR, (q, k, cos, sin, False, False, True, *way), 4096)
    gradients = real(dtype, *q.shape), real(dtype, *k.shape)
    compare(ROPE_PAIR_BACKWARD, (*gradients, cos, sin, dense(q), dense(k), dtype, False, *way), 4096)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_complex_rope_at_size(dtype):
    q, k = real(dtype, 2, 2048, 32, 128), real(dtype, 2, 2048, 8, 128)
    cos, sin = torch.view_as_real(torch.polar(torch.ones(2048, 1, 64), torch.randn(2048, 1, 64)).cuda()).unbind(-1)
    how = (True, False, False, "neighbours", False, True)
    compare(ROPE_PAIR, (q, k, cos, sin, *how), 4096)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary, peak", [(128256, 1.0), (151936, 8.0), (32003, 3.0), (50257, 20.0)])
def test_cross_entropy_rows_at_size(dtype, vocabulary, peak):
    logits = real(dtype, 512, vocabulary) * peak
    target = torch.randint(0, vocabulary, (512,), device="cuda")
    target[::3] = -100

    def run_with(function):
        def run(logits, target):
            mine = logits.clone()
            return function(mine, target, None, -100, Transform(), True)[0], mine

        return run

    compare(tuple(map(run_with, ROWS)), (logits, target), 340)


@gpu
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "chunks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_cross_entropy_at_size(dtype, kept, monkeypatch):
    """The road of other devices, on this one."""
    module = import_module("liger_compile.ops.linear_cross_entropy")
    chunked = import_module("liger_compile.ops.chunked_loss")
    monkeypatch.setattr(chunked, "keep_all", lambda *_: kept)
    monkeypatch.setattr(module, "_can_fuse", lambda *_: False)
    monkeypatch.setitem(module.BUDGET, "balanced", 64 << 20)
    h, w, b = real(dtype, 3000, 512), real(dtype, 32003, 512) * 0.1, real(dtype, 32003)
    target = torch.randint(0, 32003, (3000,), device="cuda")
    target[:700] = -100

    def gradients(function):
        def run(*operands):
            operands = [o.detach().requires_grad_() for o in operands]
            loss = function(*operands)
            return loss, *torch.autograd.grad(loss * 0.37, operands)

        return run

    # cuBLAS sums float32 products in an order that hangs on the rows at hand, so eager gets as many at a time as ours.
    chunk = chunked.chunk_rows(3000, 512, 32003, 4, 64 << 20)
    size = chunk if dtype is torch.float32 and not kept else 3000

    def eager(h, w, b):
        losses = []
        for rows, labels in zip(h.split(size), target.split(size), strict=True):
            logits = torch.nn.functional.linear(rows, w, b)
            logits = logits if h.dtype is torch.float64 else logits.float()
            losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        return sum(losses) / 2300

    ours = gradients(lambda h, w, b: module.linear_cross_entropy(h, w, b, target))
    compare((ours, gradients(eager)), (h, w, b), 3000)


@gpu
def test_more_than_two_to_the_31_elements():
    n = 2**31 // 4096 + 8
    x = torch.randn(n, 4096, device="cuda", dtype=torch.bfloat16)
    tail = slice(n - 16, n)
    compare_tail = lambda y, expected: torch.testing.assert_close(y[tail], expected, rtol=2e-2, atol=2e-2)  # noqa: E731
    w = real(torch.bfloat16, 4096)
    compare_tail(RMS[0](x, w, 1e-6), RMS[1](x[tail], w, 1e-6))
    compare_tail(GLU[0](x, x), GLU[1](x[tail], x[tail]))
    compare_tail(GLU_BACKWARD[0](x, x, x, "silu")[1], GLU_BACKWARD[1](x[tail], x[tail], x[tail], "silu")[1])
    dx, _ = RMS_BACKWARD[0](x, x, w, 1e-6, 0.0, "normed", True)
    compare_tail(dx, RMS_BACKWARD[1](x[tail], x[tail], w, 1e-6, 0.0, "normed", True)[0])
    del dx
    cos = real(torch.bfloat16, n, 128)
    heads = x.view(n, 32, 128)
    for layout in ("halves", "neighbours"):
        how = (False, False, False, layout)
        y = ROPE[0](heads, cos[:, None], cos[:, None], *how)
        compare_tail(y, ROPE[1](heads[tail], cos[tail, None], cos[tail, None], *how))
        del y
    target = torch.randint(0, 4096, (n,), device="cuda")
    expected, _, _ = ROWS[1](x[tail].clone(), target[tail], None, -100, Transform(), False)
    losses, _, _ = ROWS[0](x, target, None, -100, Transform(), True)
    torch.testing.assert_close(losses[tail], expected, rtol=1e-3, atol=1e-3)
