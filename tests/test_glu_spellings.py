"""Every spelling of a gated linear unit is matched; what only looks like it is left alone."""

from __future__ import annotations

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from helpers import ordered, report_of
from torch import nn


def glu_llama(g, u):
    return F.silu(g) * u


def glu_other_order(g, u):
    return u * F.silu(g)


def glu_module(g, u):
    return nn.SiLU()(g) * u


def glu_sigmoid_product(g, u):
    return g * torch.sigmoid(g) * u


def glu_sigmoid_first(g, u):
    return torch.sigmoid(g) * g * u


def glu_sigmoid_method_other_order(g, u):
    return u * (g * g.sigmoid())


def glu_sigmoid_associated(g, u):
    return u * g * F.sigmoid(g)


def glu_swish_by_exponential(g, u):
    return g / (1 + torch.exp(-g)) * u


def glu_logistic_by_exponential(g, u):
    return (1 / (1 + (-g).exp())) * g * u


def glu_method(g, u):
    return F.silu(g).mul(u)


def glu_function(g, u):
    return torch.mul(u, torch.nn.functional.silu(g, inplace=False))


def glu_multiply(g, u):
    return torch.multiply(F.silu(input=g), other=u)


def glu_aten(g, u):
    return torch.ops.aten.silu(g) * u


def glu_contiguous(g, u):
    return F.silu(g).contiguous() * u


def glu_times_one(g, u):
    return (F.silu(g * 1) * 1.0 * u) / 1.0


def glu_activated_in_place(g, u):
    return F.silu(g.sin(), inplace=True) * u


def glu_module_in_place(g, u):
    g = g.sin()
    nn.SiLU(inplace=True)(g)
    return u * g


def glu_multiplied_in_place(g, u):
    out = u.sin()
    out *= F.silu(g)
    return out


def glu_activation_multiplied_in_place(g, u):
    out = F.silu(g)
    out.mul_(u)
    return out


GLUS = [f for name, f in list(globals().items()) if name.startswith("glu_")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("function", GLUS, ids=lambda f: f.__name__)
def test_swiglu(function, dtype):
    g, u = torch.randn(4, 6, dtype=dtype), torch.randn(4, 6, dtype=dtype)
    report = report_of(function, g, u)
    assert report.counts == {"swiglu": 1}, report
    torch.testing.assert_close(
        report.graphs[0].after(*ordered(report, g=g, u=u))[0], function(g, u), rtol=3e-2, atol=3e-2
    )


@pytest.mark.parametrize("narrow", ["gate", "up"])
def test_swiglu_of_two_dtypes(narrow):
    g, u = torch.randn(4, 6), torch.randn(4, 6)
    g, u = (g.bfloat16(), u) if narrow == "gate" else (g, u.bfloat16())
    report = report_of(glu_llama, g, u)
    assert report.counts == {"swiglu": 1}, report
    torch.testing.assert_close(report.graphs[0].after(*ordered(report, g=g, u=u))[0], glu_llama(g, u))


IN_FLOAT32 = {
    "both cast": lambda g, u: (F.silu(g.float()) * u.float()).to(g.dtype),
    "gate cast": lambda g, u: (u * F.silu(g.float())).type_as(u),
    "written out": lambda g, u: (lambda g, u: g * torch.sigmoid(g) * u)(g.float(), u.float()).bfloat16(),
    "halves cast": lambda g, u: (F.silu(torch.cat([g, u], -1).chunk(2, -1)[0].float()) * u).to(g.dtype),
    "clamped": lambda g, u: (F.silu(g.float().clamp(max=0.5)) * u.float().clamp(-0.5, 0.5)).to(g.dtype),
    "of two dtypes": lambda g, u: F.silu(g.float()) * (u.float() @ u.float().t() @ u.float()),
}


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_swiglu_in_float32(name):
    """The activation is not rounded before the product."""
    g, u = torch.randn(4, 6).bfloat16(), torch.randn(4, 6).bfloat16()
    report = report_of(IN_FLOAT32[name], g, u)
    assert report.counts == {"swiglu": 1}, report
    after = report.graphs[0].after
    (call,) = [n for n in after.graph.nodes if "glu" in str(n.target)]
    assert call.kwargs["wide"], after.code
    torch.testing.assert_close(after(*ordered(report, g=g, u=u))[0], IN_FLOAT32[name](g, u), rtol=0, atol=0)


def test_packed_swiglu_in_float32():
    h = torch.randn(4, 12).bfloat16()
    for function in (
        lambda h: (lambda g, u: F.silu(g) * u)(*h.float().chunk(2, -1)).to(h.dtype),
        lambda h: (lambda g, u: F.silu(g.float()) * u.float())(*h.chunk(2, -1)).to(h.dtype),
    ):
        report = report_of(function, h)
        assert report.counts == {"packed_swiglu": 1}, report
        torch.testing.assert_close(report.graphs[0].after(h)[0], function(h), rtol=0, atol=0)


def test_an_activation_in_float32_that_is_rounded_is_that_of_the_operand():
    """F.silu of half precision is computed in float32 and rounded, too."""
    g, u = torch.randn(4, 6).bfloat16(), torch.randn(4, 6).bfloat16()
    for activation, name in ((F.silu, "swiglu"), (F.gelu, "geglu"), (F.relu, "reglu")):
        function = lambda g, u: activation(g.float()).to(g.dtype) * u  # noqa: B023
        report = report_of(function, g, u)
        assert report.counts == {name: 1}, report
        after = report.graphs[0].after
        assert "wide" not in after.code, after.code
        torch.testing.assert_close(after(*ordered(report, g=g, u=u))[0], function(g, u), rtol=0, atol=0)


def test_an_activation_in_float64_is_not_that_of_float32():
    assert not report_of(lambda g, u: F.silu(g.double()).float() * u, torch.randn(4, 6), torch.randn(4, 6)).counts


@pytest.mark.parametrize("how", ["cast", "clamped", "added"])
def test_a_unit_whose_operands_would_be_written_in_float32_is_left(how):
    """Inductor computes them in the kernel that multiplies; here they would be twice as many bytes, written and read."""

    def function(g, u, w):
        g, u = g.float(), u.float()
        if how == "clamped":
            g = g.clamp(max=0.5)
        if how == "added":
            g = (g + 1) * 2
        return (F.silu(g) * u * w).to(torch.bfloat16)  # weighted before it is rounded

    report = report_of(function, torch.randn(4, 6).bfloat16(), torch.randn(4, 6).bfloat16(), torch.rand(4, 1))
    assert not report.counts, report
    assert any("and would be written and read again" in m.reason for m in report.misses), report


def test_integers_times_one_are_no_integers():
    """Nor is the number a scale of the gate, which is no gate as it stands."""
    report = report_of(lambda g, u: F.silu(g * 1.0) * (u / 1), *(torch.arange(24).view(4, 6) for _ in "gu"))
    (call,) = [n for n in report.graphs[0].after.graph.nodes if "glu" in str(n.target)]
    assert report.counts == {"swiglu": 1}, report
    assert (call.kwargs["gate"].target, call.kwargs["up"].target) == (operator.mul, operator.truediv)


def packed_chunk(h):
    g, u = h.chunk(2, dim=-1)
    return F.silu(g) * u


def packed_chunk_up_first(h):
    u, g = torch.chunk(h, 2, -1)
    return u * F.silu(g)


def packed_split(h):
    g, u = torch.split(h, 8, dim=-1)
    return u * F.silu(g)


def packed_split_sizes(h):
    g, u = h.split([8, 8], -1)
    return F.silu(g) * u


def packed_tensor_split(h):
    g, u = h.tensor_split(2, dim=-1)
    return F.silu(g) * u


def packed_slices(h):
    return F.silu(h[..., :8]) * h[..., 8:]


def packed_negative_slices(h):
    return F.silu(h[..., :-8]) * h[..., -8:]


def packed_positional_slices(h):
    return F.silu(h[:, :, 8:16]) * h[:, :, 0:8]


def packed_unbind(h):
    g, u = h.view(3, 5, 2, 8).unbind(-2)
    return F.silu(g) * u


def packed_unflatten(h):
    pair = h.unflatten(-1, (2, 8))
    return F.silu(pair[..., 0, :]) * pair[..., 1, :]


def packed_narrow(h):
    return F.silu(h.narrow(-1, 0, 8)) * torch.narrow(h, 2, 8, 8)


def packed_select(h):
    pair = h.reshape(3, 5, 2, 8)
    return F.silu(pair.select(2, 0)) * pair.select(-2, 1)


def packed_interleaved(h):
    return F.silu(h[..., ::2]) * h[..., 1::2]


def packed_interleaved_pairs(h):
    up, gate = h.unflatten(-1, (-1, 2)).unbind(-1)
    return up * F.silu(gate)


def packed_interleaved_select(h):
    pairs = h.view(3, 5, 8, 2)
    return F.silu(pairs[..., 0]) * pairs.select(-1, 1)


PACKED = [f for name, f in list(globals().items()) if name.startswith("packed_")]


@pytest.mark.parametrize("function", PACKED, ids=lambda f: f.__name__)
def test_packed_swiglu(function):
    h = torch.randn(3, 5, 16)
    report = report_of(function, h)
    assert report.counts == {"packed_swiglu": 1}, report
    torch.testing.assert_close(report.graphs[0].after(h)[0], function(h))


def test_geglu():
    g, u = torch.randn(4, 6), torch.randn(4, 6)
    for approximate in ("tanh", "none"):
        report = report_of(lambda g, u, a=approximate: F.gelu(g, approximate=a) * u, g, u)
        assert report.counts == {"geglu": 1}
        assert report_of(
            lambda h, a=approximate: (lambda x, y: x * F.gelu(y, approximate=a))(*h.chunk(2, -1)), g
        ).counts == {"packed_geglu": 1}


def gelu_of_gpt2(g, u):
    return 0.5 * g * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (g + 0.044715 * torch.pow(g, 3.0)))) * u


def gelu_of_bloom(g, u):
    return u * (g * 0.5 * (1.0 + torch.tanh(0.79788456 * g * (1 + 0.044715 * g * g))))


def gelu_of_a_cube(g, u):
    return u * (g / 2 * (torch.tanh(0.7978845608028654 * g + 0.035677408136300125 * g * g * g) + 1))


def gelu_of_bert(g, u):
    return g * 0.5 * (1.0 + torch.erf(g / math.sqrt(2.0))) * u


def gelu_by_its_distribution(g, u):
    return g * (0.5 * (1.0 + torch.erf(g * 0.7071067811865476))) * u


def gelu_halved_at_last(g, u):
    return 0.5 * (g * (1 + (g / 1.4142135623730951).erf())) * u


def gelu_in_place(g, u):
    cdf = torch.erf(g / math.sqrt(2.0))
    cdf += 1
    cdf *= 0.5
    return u * (cdf * g)


GELUS = [f for name, f in list(globals().items()) if name.startswith("gelu_")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("function", GELUS, ids=lambda f: f.__name__)
def test_written_out_gelu(function, dtype):
    g, u = torch.randn(4, 6, dtype=dtype), torch.randn(4, 6, dtype=dtype)
    report = report_of(function, g, u)
    assert report.counts == {"geglu": 1} and not report.misses, report
    after = report.graphs[0].after
    assert [n.op for n in after.graph.nodes].count("call_function") == 1, after.code
    torch.testing.assert_close(after(*ordered(report, g=g, u=u))[0], function(g, u), rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(after(*ordered(report, g=g.float(), u=u.float()))[0], function(g.float(), u.float()))


@pytest.mark.parametrize("function", [gelu_of_gpt2, gelu_of_bert])
def test_written_out_gelu_of_halves_in_float32(function):
    h = torch.randn(4, 12)
    assert report_of(lambda h: function(*h.chunk(2, -1)), h).counts == {"packed_geglu": 1}
    report = report_of(lambda g, u: function(g.float(), u), h.bfloat16(), h)
    assert report.counts == {"geglu": 1}, report
    torch.testing.assert_close(
        report.graphs[0].after(*ordered(report, g=h.bfloat16(), u=h))[0], function(h.bfloat16().float(), h)
    )


TANH_ROOT, ERF_ROOT = math.sqrt(2 / math.pi), math.sqrt(0.5)


def tanh_unit(g, u, half=0.5, one=1.0, root=TANH_ROOT, cube=0.044715, power=3, other=None):
    return half * g * (one + torch.tanh(root * (g + cube * (g if other is None else other) ** power))) * u


def erf_unit(g, u, half=0.5, one=1.0, root=ERF_ROOT, other=None):
    return half * g * (one + torch.erf(root * (g if other is None else other))) * u


NOT_GELU = {
    "not halved": lambda g, u: tanh_unit(g, u, half=1.0),
    "another sum": lambda g, u: tanh_unit(g, u, one=2.0),
    "another root": lambda g, u: tanh_unit(g, u, root=0.798),
    "another cube": lambda g, u: tanh_unit(g, u, cube=0.0447),
    "squared": lambda g, u: tanh_unit(g, u, power=2),
    "of two": lambda g, u: tanh_unit(g, u, other=u),
    "erf not halved": lambda g, u: erf_unit(g, u, half=1.0),
    "erf of x": lambda g, u: erf_unit(g, u, root=1.0),
    "a rough root": lambda g, u: erf_unit(g, u, root=0.7071),
    "erf of another": lambda g, u: erf_unit(g, u, other=u),
    "twice": lambda g, u: erf_unit(g, 1 + torch.erf(math.sqrt(0.5) * g)),
    "of a square": lambda g, u: g * erf_unit(g, u),
    "subtracted": lambda g, u: 0.5 * g * (1.0 - torch.erf(math.sqrt(0.5) * g)) * u,
    "with a tensor": lambda g, u: u[0, 0] * g * (1.0 + torch.erf(math.sqrt(0.5) * g)) * u,
    "erfc": lambda g, u: 0.5 * g * torch.special.erfc(-math.sqrt(0.5) * g) * u,
}


@pytest.mark.parametrize("name", NOT_GELU)
def test_what_is_no_gelu(name):
    g, u = torch.randn(4, 6), torch.randn(4, 6)
    report = report_of(NOT_GELU[name], g, u)
    torch.testing.assert_close(report.graphs[0].after(*ordered(report, g=g, u=u))[0], NOT_GELU[name](g, u))
    assert report.counts == ({"geglu": 1} if name in ("twice", "of a square") else {}), report


def oai_gpt_oss(h):
    gate, up = h[..., ::2], h[..., 1::2]
    gate = gate.clamp(min=None, max=0.7)
    up = up.clamp(min=-0.7, max=0.7)
    glu = gate * torch.sigmoid(gate * 1.702)
    return (up + 1) * glu


def oai_minimax(h):
    gate, up = h.chunk(2, dim=-1)
    gate = torch.clamp(gate, max=0.7)
    up = up.clip(-0.7, 0.7)
    return gate * torch.sigmoid(1.702 * gate) * (1.0 + up)


def oai_up_first(h):
    up, gate = h.view(3, 5, 8, 2).unbind(-1)
    gate = gate.clamp_max(0.7)
    return (torch.clamp(up, -0.7, max=0.7) + 1) * gate * F.sigmoid(gate * 1.702)


def oai_slices(h):
    gate, up = h[..., :8].clamp(max=0.7), h[..., 8:].clip(min=-0.7, max=0.7)
    return torch.mul(gate * (gate * 1.702).sigmoid(), torch.add(up, 1))


OAI = [f for name, f in list(globals().items()) if name.startswith("oai_")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("function", OAI, ids=lambda f: f.__name__)
def test_swiglu_oai(function, dtype):
    h = torch.randn(3, 5, 16, dtype=dtype)
    report = report_of(function, h)
    assert report.counts == {"packed_swiglu": 1} and "sigmoid" not in report.graphs[0].after.code, report
    torch.testing.assert_close(report.graphs[0].after(h)[0], function(h))


def variant_squared_relu(g, u):
    return F.relu(g) ** 2 * u


def variant_relu_times_itself(g, u):
    r = torch.relu(g)
    return u * (r * r)


def variant_relu(g, u):
    return u * g.relu()


def variant_scaled(g, u):
    return u * F.silu(g * 0.7)


def variant_clamped(g, u):
    return F.silu(g.clamp(max=0.9)) * torch.clamp(u, min=-0.9, max=0.9)


def variant_clamped_and_shifted(g, u):
    g = g.clamp(max=0.9)
    return (u.clamp(-0.9, 0.9) + 1) * (g * torch.sigmoid(g * 1.702))


def variant_not_clamped(g, u):
    return F.silu(g).clamp(max=float("inf")) * u.clamp(min=float("-inf"), max=float("inf"))


VARIANTS = [f for name, f in list(globals().items()) if name.startswith("variant_")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("function", VARIANTS, ids=lambda f: f.__name__)
def test_other_units(function, dtype):
    g, u = torch.randn(4, 6, dtype=dtype), torch.randn(4, 6, dtype=dtype)
    report = report_of(function, g, u)
    assert sum(report.counts.values()) == 1 and not report.misses, report
    after = report.graphs[0].after
    assert not any(n.op == "call_function" and "liger" not in str(n.target) for n in after.graph.nodes), after.code
    assert not any(n.op == "call_method" for n in after.graph.nodes), after.code
    torch.testing.assert_close(after(*ordered(report, g=g, u=u))[0], function(g, u))


def used_before_the_clamp(g, u):
    return F.silu(g) * u.clamp(-0.9, 0.9) + g.clamp(max=0.9)


PARTLY = {
    # what is not part of any unit stays in the graph, which computes the same
    "gate clamped from below": (lambda g, u: F.silu(g.clamp(min=-0.9)) * u.clamp(-0.9, 0.9), ["clamp", "clamp"]),
    "gate clamped on both sides": (lambda g, u: F.silu(g.clamp(-0.9, 0.9)) * u.clamp(-0.9, 0.9), ["clamp", "clamp"]),
    "up clamped on one side": (lambda g, u: F.silu(g.clamp(max=0.9)) * u.clamp(max=0.9), ["clamp", "clamp"]),
    "bounds that differ": (lambda g, u: F.silu(g.clamp(max=0.9)) * u.clamp(-0.8, 0.8), ["clamp", "clamp"]),
    "bounds that are not opposite": (lambda g, u: F.silu(g.clamp(max=0.9)) * u.clamp(-0.8, 0.9), ["clamp", "clamp"]),
    "gate and up swapped": (lambda g, u: F.silu(g.clamp(-0.9, 0.9)) * u.clamp(max=0.9), ["clamp", "clamp"]),
    "clamped behind the activation": (lambda g, u: F.silu(g).clamp(max=0.1) * u, None),
    "clamped in one place": (used_before_the_clamp, ["clamp", "add", "clamp"]),
    "divided": (lambda g, u: F.silu(g / 0.7) * u, ["truediv"]),
    "scaled gate used": (lambda g, u: (lambda h: F.silu(h) * u + h)(g * 0.7), ["mul", "add"]),
    "up scaled": (lambda g, u: F.silu(g) * (u * 0.7), ["mul"]),
    "scaled by a tensor": (lambda g, u: F.silu(g * u[0, 0]) * u, ["getitem", "mul"]),
    "shifted without clamps": (lambda g, u: (u + 1) * F.silu(g), ["add"]),
    "negative limit": (lambda g, u: F.silu(g.clamp(max=-0.9)) * u.clamp(0.9, -0.9), None),
    "alpha at the gate alone": (lambda g, u: (u.clamp(-2, 2) + 1) * (g.clamp(max=2) * torch.sigmoid(1.7 * g)), None),
    "alpha outside the sigmoid": (lambda g, u: g * (torch.sigmoid(g) * 1.7) * u, None),
    "sigmoid of up": (lambda g, u: (u.clamp(-2, 2) + 1) * (g.clamp(max=2) * torch.sigmoid(1.7 * u)), None),
    "other limits in the parts": (
        lambda g, u: (u.clamp(-2, 2) + 1) * (g.clamp(max=2) * torch.sigmoid(1.7 * g.clamp(max=1))), None
    ),
    "cubed": (lambda g, u: F.relu(g) ** 3 * u, None),
    "broadcast": (lambda g, u: F.relu(g[:1]) ** 2 * u, None),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTLY)
def test_what_is_not_a_variant(name):
    function, left = PARTLY[name]
    g, u = torch.randn(4, 6), torch.randn(4, 6)
    report = report_of(function, g, u)
    after = report.graphs[0].after
    if left is None:
        assert report.counts == {}, report
    else:
        assert report.counts == {"swiglu": 1}, report
        calls = [n for n in after.graph.nodes if n.op.startswith("call") and "liger" not in str(n.target)]
        assert sorted(getattr(n.target, "__name__", n.target) for n in calls) == sorted(left), after.code
    torch.testing.assert_close(after(*ordered(report, g=g, u=u))[0], function(g, u))


def strided_by_three(h):
    return F.silu(h[..., ::3]) * h[..., 1::3]


def from_the_second_on(h):
    return F.silu(h[..., 1::2]) * h[..., 1::2].sin()


@pytest.mark.parametrize("function", [strided_by_three, from_the_second_on])
def test_not_interleaved(function):
    h = torch.randn(4, 18)
    assert report_of(function, h).counts in ({"swiglu": 1}, {})
