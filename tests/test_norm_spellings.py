"""Every spelling of RMSNorm, with and without a gate, is matched; what only looks like it is left alone."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import ordered, relative_error, report_of, rewritten
from torch import nn


def norm_llama(x, w):
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + 1e-6)).to(dtype)


def norm_reference_llama(x, w):
    output = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)
    return output * w


def norm_square_product(x, w):
    h = x.float()
    return (h * torch.rsqrt((h * h).mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype) * w


def norm_operator_power(x, w):
    h = x.float()
    return w * (h / torch.sqrt((h**2).mean(-1, True) + 1e-6)).to(x.dtype)


def norm_power_of_minus_half(x, w):
    h = x.float()
    return w * (h * torch.pow(h.square().mean(-1, keepdim=True) + 1e-6, -0.5)).to(x.dtype)


def norm_sum_over_size(x, w):
    h = x.float()
    return w * (h * ((h * h).sum(-1, keepdim=True) / h.shape[-1] + 1e-6) ** -0.5).to(x.dtype)


def norm_of_norm(x, w):
    h = x.float()
    ms = torch.linalg.vector_norm(h, dim=-1, keepdim=True).pow(2) / h.shape[-1]
    return w * (h * torch.rsqrt(1e-6 + ms)).to(x.dtype)


def norm_unsqueezed_mean(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(torch.mean(h.pow(2), dim=-1).unsqueeze(-1) + 1e-6)).to(x.dtype)


def norm_none_index(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(torch.mean(torch.square(h), -1)[..., None] + 1e-6)).to(x.dtype)


def norm_unsqueezed_factor(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1) + 1e-6)[..., None]).to(x.dtype)


def norm_unsqueezed_root(x, w):
    h = x.float()
    return (h / (h.square().mean(-1) + 1e-6).sqrt().unsqueeze(-1)).to(x.dtype) * w


def norm_keepdims(x, w):
    h = x.float()
    return (h * torch.rsqrt(torch.mean(h.square(), axis=-1, keepdims=True) + 1e-6)).to(x.dtype) * w


def norm_positive_dim(x, w):
    h = x.float()
    return w.mul(h.mul(h.pow(2.0).mean(x.ndim - 1, keepdim=True).add(1e-6).rsqrt()).to(x.dtype))


def norm_reciprocal_of_sqrt(x, w):
    h = x.float()
    return w * (h * (1.0 / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype)


def norm_weight_then_cast(x, w):
    h = x.to(torch.float32)
    return (w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype)


def norm_explicit_float_weight(x, w):
    h = x.float()
    return (w.float() * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))).type_as(x)


def norm_weight_associated_first(x, w):
    h = x.float()
    return (w * h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def norm_zero_centred(x, w):
    output = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return (output * (1.0 + w.float())).type_as(x)


def norm_zero_centred_after_cast(x, w):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * (w + 1)


def norm_without_weight(x, w):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) + w


def norm_factor_cast(x, w):
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x.dtype) * w


def norm_upcast_only_inside(x, w):
    r = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return (x * r).to(x.dtype) * w


def norm_without_upcast(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def norm_factor_in_place(x, w):
    factor = x.float().pow(2).mean(-1, keepdim=True)
    factor.add_(1e-6).rsqrt_()
    return w * (x.float() * factor).to(x.dtype)


def norm_power_in_place(x, w):
    return w * (x.float() * x.float().pow(2).mean(-1, keepdim=True).add_(1e-6).pow_(-0.5)).to(x.dtype)


def norm_functional(x, w):
    return F.rms_norm(x, (x.shape[-1],), w, 1e-6)


def norm_functional_without_weight(x, w):
    return torch.rms_norm(x, [x.shape[-1]], eps=1e-6) * w[0]


def norm_of_normalize(x, w):  # x-transformers
    return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * w


def norm_of_normalize_zero_centred(x, w):
    return F.normalize(x, p=2.0, dim=x.ndim - 1, eps=1e-6) * (w + 1) * 4


def norm_of_normalize_scaled_at_last(x, w):
    return F.normalize(x, dim=-1) * w * 4.0


def norm_of_normalize_then_cast(x, w):
    return (F.normalize(x.float(), dim=-1) * 4.0 * w).to(x.dtype)


def norm_of_normalize_weight_scaled(x, w):
    return w * 16**0.5 * F.normalize(x.float(), dim=-1).type_as(x)


def norm_of_clamped_length(x, w):
    return x / (x.norm(dim=-1, keepdim=True) * 16**-0.5).clamp(min=1e-8) * w


def norm_by_length_and_eps(x, w):  # the authors' own
    return w * (x / (x.norm(2, dim=-1, keepdim=True) * 16**-0.5 + 1e-8))


def norm_to_length_one(x, w):
    return F.normalize(x, dim=-1) @ w


def norm_by_sum(x, w):  # nGPT
    h = x.float()
    return F.linear((h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + 1e-6)).type_as(x), w[None])


def norm_by_sum_with_weight(x, w):
    return w * (x * torch.rsqrt(x.pow(2).sum(-1, True) + 1e-6))


def norm_by_sum_of_heads(x, w):
    h = x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)
    return h.view(3, 1, 5, 16).transpose(1, 2)[..., 8:] * w[8:]


def norm_in_double_dropout_of_zero(x, w):
    h = F.dropout(x, 0.0, training=True).contiguous().float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


NORMS = [f for name, f in list(globals().items()) if name.startswith("norm_")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("function", [f for f in NORMS if re.search("length|normalize|sum", f.__name__)])
def test_gradients_of_norms_by_length(function, dtype):
    """Of long rows, of short ones, and of one that is zero."""

    def results(function, dtype):
        operands = [t.detach().to(dtype).requires_grad_() for t in (x, w)]
        y = function(*operands)
        return y.detach(), *torch.autograd.grad(y, operands, dy.to(dtype)[: y.numel()].view(y.shape))

    x, w, dy = torch.randn(3, 5, 16, dtype=dtype), torch.randn(16, dtype=dtype), torch.randn(240, dtype=dtype)
    x = x * torch.tensor([1e-3, 1e4, 1.0, 30.0, 0.0], dtype=dtype)[:, None]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=rewritten(reports := []))
    ours, eager, exact = results(compiled, dtype), results(function, dtype), results(function, torch.float64)
    assert [r.counts for r in reports] == [{"rms_norm": 1}], reports
    for mine, theirs, true in zip(ours, eager, exact, strict=True):
        assert mine.dtype is theirs.dtype
        assert relative_error(mine, true) <= 1.5 * relative_error(theirs, true) + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("function", NORMS, ids=lambda f: f.__name__)
def test_rms_norm(function, dtype):
    x, w = torch.randn(3, 5, 16, dtype=dtype), torch.randn(16, dtype=dtype)
    report = report_of(function, x, w)
    assert report.counts == {"rms_norm": 1}, report
    assert "rsqrt" not in report.graphs[0].after.code and "pow" not in report.graphs[0].after.code
    torch.testing.assert_close(
        report.graphs[0].after(*ordered(report, x=x, w=w))[0], function(x, w), rtol=2e-2, atol=2e-2
    )


def test_rms_norm_of_heads_in_a_transposed_view():
    def q_norm(h, w):
        return norm_llama(h.view(2, 5, 4, 16).transpose(1, 2), w)

    report = report_of(q_norm, torch.randn(2, 5, 64), torch.randn(16))
    assert report.counts == {"rms_norm": 1}


def test_rms_norm_module():
    assert report_of(nn.RMSNorm(16), torch.randn(3, 16)).counts == {"rms_norm": 1}
    assert report_of(nn.RMSNorm(16, elementwise_affine=False), torch.randn(3, 16)).counts == {"rms_norm": 1}


# ---- with a gate ----------------------------------------------------------------------------------------------------


def mean_square(h):
    return h.pow(2).mean(-1, keepdim=True)


def gated_qwen(x, g, w):
    dtype = x.dtype
    x = x.to(torch.float32)
    x = x * torch.rsqrt(mean_square(x) + 1e-6)
    x = w * x.to(dtype)
    x = x * F.silu(g.to(torch.float32))
    return x.to(dtype)


def gated_other_order(x, g, w):
    h = x.float()
    normed = (h / torch.sqrt((h * h).mean(-1, True) + 1e-6)).type_as(x) * w
    return (F.silu(g.float()) * normed).type_as(x)


def gated_by_sigmoid_product(x, g, w):
    g = g.float()
    return (norm_llama(x, w) * (g * torch.sigmoid(g))).to(x.dtype)


def gated_kimi(x, g, w):
    h = x.to(torch.float32)
    h = w.to(torch.float32) * (h * torch.rsqrt(mean_square(h) + 1e-6))
    return (h * torch.sigmoid(g.to(torch.float32))).to(x.dtype)


def gated_of_torch(x, g, w):
    return (F.rms_norm(x.float(), (16,), w.float(), 1e-6) * F.silu(g.float())).to(x.dtype)


def gated_of_torch_by_sigmoid(x, g, w):
    return (torch.sigmoid(g.float()) * F.rms_norm(x.float(), x.shape[-1:], w.float(), 1e-6)).type_as(x)


def gated_of_torch_first(x, g, w):
    return F.rms_norm(x.float() * F.silu(g.float()), (16,), w.float(), 1e-6).to(x.dtype)


def gated_silu_of_result(x, g, w):
    h = x.float()
    return (h * torch.rsqrt(mean_square(h) + 1e-6) * w.float() * F.silu(g.float())).type_as(x)


def gated_mamba(x, g, w):
    h = x.to(torch.float32) * F.silu(g.to(torch.float32))
    return w * (h * torch.rsqrt(mean_square(h) + 1e-6)).to(x.dtype)


def gated_mamba_reference(x, g, w):
    w, h, g = w.float(), x.float(), g.float()
    h = h * F.silu(g)
    rstd = 1 / torch.sqrt(h.square().mean(dim=-1, keepdim=True) + 1e-6)
    return (h * rstd * w).to(x.dtype)


def gated_mamba_by_exponential(x, g, w):
    g = g.float()
    h = g / (1 + torch.exp(-g)) * x.float()
    return (h * (h.square().sum(-1, keepdim=True) / h.shape[-1] + 1e-6) ** -0.5).type_as(x) * w


def gated_zamba(x, g, w):
    h = x.to(torch.float32) * F.silu(g.to(torch.float32))
    *lead, width = h.shape
    parts = h.view(*lead, 2, width // 2)
    parts = parts * torch.rsqrt(mean_square(parts) + 1e-6)
    return w * parts.view(*lead, width).to(x.dtype)


def gated_unflattened(x, g, w):
    parts = (F.silu(g.float()) * x.float()).unflatten(-1, (2, 8))
    return (parts * torch.rsqrt(mean_square(parts) + 1e-6)).flatten(-2).type_as(x) * w


GATED = [f for name, f in list(globals().items()) if name.startswith("gated_")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("function", GATED, ids=lambda f: f.__name__)
def test_gated_rms_norm(function, dtype):
    x, g, w = torch.randn(3, 5, 16, dtype=dtype), torch.randn(3, 5, 16, dtype=dtype), torch.randn(16, dtype=dtype)
    report = report_of(function, x, g, w)
    assert report.counts == {"gated_rms_norm": 1}, report
    after = report.graphs[0].after
    assert not any(name in after.code for name in ("rsqrt", "mean", "functional", "torch.sigmoid")), after.code
    torch.testing.assert_close(after(*ordered(report, x=x, g=g, w=w))[0], function(x, g, w), rtol=2e-2, atol=2e-2)


def test_a_length_that_is_rounded_before_its_number():
    """Left, and told: a number is no weight."""

    def function(x, w):
        return F.normalize(x.float(), dim=-1).to(x.dtype) * 4.0 * w

    report = report_of(function, torch.randn(4, 16).bfloat16(), torch.randn(16).bfloat16())
    assert not report.counts and not any("failed" in m.reason for m in report.misses), report


def test_gate_of_another_dtype():
    """The state-space model's output is float32, the gate is not."""
    x, g, w = torch.randn(3, 5, 16), torch.randn(3, 5, 16).bfloat16(), torch.randn(16).bfloat16()
    for function in (gated_mamba, gated_qwen, gated_zamba):
        report = report_of(function, x, g, w)
        assert report.counts == {"gated_rms_norm": 1}, report
        torch.testing.assert_close(report.graphs[0].after(*ordered(report, x=x, g=g, w=w))[0], function(x, g, w))


def over_tokens(x, g, w):
    parts = (x * F.silu(g)).view(3, 5, 2, 8).transpose(-1, -2)
    return w * (parts * torch.rsqrt(mean_square(parts) + 1e-6)).transpose(-1, -2).reshape(3, 5, 16)


def over_several_tokens(x, g, w):
    parts = (x * F.silu(g)).view(3, 1, 80)
    return w * (parts * torch.rsqrt(mean_square(parts) + 1e-6)).view(3, 5, 16)


def in_groups_with_a_weight_for_all(x, g, w):
    parts = (x * F.silu(g)).view(3, 5, 2, 8)
    return w[:8] * (parts * torch.rsqrt(mean_square(parts) + 1e-6))


NOT_GATED = {
    # what is not the norm with its gate is at most the one and the other
    "gate broadcasts": (lambda x, g, w: norm_llama(x, w) * F.silu(g[..., :1]), {"rms_norm": 1}),
    "weight for each token": (lambda x, g, w: norm_llama(x, x.cos()) * F.silu(g), None),
    "normalised value used": (lambda x, g, w: (lambda y: y * F.silu(g) + y)(norm_llama(x, w)), {"rms_norm": 1, "swiglu": 1}),
    "torch's own, a gate of itself": (lambda x, g, w: (lambda y: F.silu(y) * y)(F.rms_norm(x, (16,), w, 1e-6)), {"rms_norm": 1, "swiglu": 1}),
    "gate used": (lambda x, g, w: (lambda a: norm_llama(x, w) * a + a)(F.silu(g)), {"rms_norm": 1}),
    "gate computed from the norm": (lambda x, g, w: (lambda y: y * F.silu(y @ w.outer(w)))(norm_llama(x, w)), {"rms_norm": 1, "swiglu": 1}),
    "statistics of the value without its gate": (lambda x, g, w: w * (x * F.silu(g) * torch.rsqrt(mean_square(x) + 1e-6)), None),
    "statistics of the gate": (lambda x, g, w: w * (x * F.silu(g) * torch.rsqrt(mean_square(F.silu(g)) + 1e-6)), None),
    "statistics with another gate": (lambda x, g, w: w * (x * F.silu(g) * torch.rsqrt(mean_square(x * F.silu(-g)) + 1e-6)), None),
    "other activation": (lambda x, g, w: norm_llama(x, w) * F.elu(g), {"rms_norm": 1}),
    "LayerNorm": (lambda x, g, w: norm_llama(x - x.mean(-1, keepdim=True), w) * F.silu(g), {"swiglu": 1}),
    "gated by itself": (lambda x, g, w: (lambda y: y * F.silu(y))(norm_llama(x, w)) + g, {"rms_norm": 1, "swiglu": 1}),
    "gated twice": (lambda x, g, w: norm_llama(x, w) * F.silu(g) * F.silu(-g), {"gated_rms_norm": 1, "swiglu": 1}),
    "sum for mean": (lambda x, g, w: w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)) * F.silu(g), None),
    "groups across": (over_tokens, None),
    "groups of several tokens": (over_several_tokens, None),
    "groups that stay": (in_groups_with_a_weight_for_all, None),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_GATED)
def test_what_is_no_gated_norm(name):
    function, expected = NOT_GATED[name]
    x, g, w = torch.randn(3, 5, 16), torch.randn(3, 5, 16), torch.randn(16)
    report = report_of(function, x, g, w)
    if expected is None:
        assert "gated_rms_norm" not in report.counts, report
    else:
        assert report.counts == expected, report
    torch.testing.assert_close(report.graphs[0].after(*ordered(report, x=x, g=g, w=w))[0], function(x, g, w))
