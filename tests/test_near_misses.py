"""What only looks like a pattern is left alone, and the report says why."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import as_complex, gradients, half, neighbours, ordered, relative_error, report_of, rewritten

X, W, G, U = torch.randn(3, 5, 16), torch.randn(16), torch.randn(4, 6), torch.randn(4, 6)
Q, COS, SIN = torch.randn(2, 4, 5, 8), torch.randn(5, 8), torch.randn(5, 8)
H, V, Y = torch.randn(6, 8), torch.randn(11, 8), torch.tensor([0, 10, 3, 5, 3, 7])


def normed(x, w, power=2, dim=-1, eps=1e-6):
    return w * (x * torch.rsqrt(x.pow(power).mean(dim, keepdim=True) + eps))


def norm_mutated(x, w):
    x = x.clone()
    r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    x.add_(1)
    return w * (x * r)


def norm_statistics_used(x, w):
    variance = x.pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + 1e-6)), variance


def norm_without_gradient_inside(x, w):
    with torch.no_grad():
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * (x * r)


def silu_mutated(g, u):
    s = F.silu(g)
    s.mul_(2)
    return s * u


def silu_used_twice(g, u):
    s = F.silu(g)
    return s * u, s + 1


def rotated(x, cos, sin, rotate):
    return x * cos + rotate(x) * sin


def parts(x, cos, other_cos, sin, last):
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, last(x2 * other_cos, x1 * sin)), -1)


def both(x, first, second):
    return torch.cat((first(*x.chunk(2, -1)), second(*x.chunk(2, -1))), -1)


def angles_implied(x, table):
    c, s = table.float().chunk(2, -1)
    return parts(x, c, c, s, torch.add)


def complex_product(x, freqs):
    return as_complex(x) * freqs


NEAR_MISSES = [
    # pattern, what the reason must name, function, arguments
    ("rms_norm", r"-2.*where the pattern has -1", lambda x, w: normed(x, w, dim=-2), (X, W)),
    ("rms_norm", r"pow\(l_x, 3\).*square", lambda x, w: normed(x, w, power=3), (X, W)),
    ("rms_norm", r"abs\(l_x\).*square", lambda x, w: w * (x * torch.rsqrt(x.abs().mean(-1, True) + 1e-6)), (X, W)),
    ("rms_norm", r"only element-wise code reads", lambda x, w: F.normalize(x, dim=-1).sigmoid() * w, (X, W)),
    ("rms_norm", r"only element-wise code reads", lambda x, w: (x * torch.rsqrt(x.pow(2).sum(-1, True) + 1e-6)).transpose(1, 2).contiguous() * 2, (X, W)),
    ("rms_norm", r"the scale .* is no positive number", lambda x, w: F.normalize(x, dim=-1) * -4.0 * w, (X, W)),
    ("rms_norm", r"sqrt.*rsqrt", lambda x, w: w * (x * torch.sqrt(x.pow(2).mean(-1, True) + 1e-6)), (X, W)),
    ("rms_norm", r"mean.*add", lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, True))), (X, W)),
    ("rms_norm", r"sub.*add|LayerNorm", lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, True) - 1e-6)), (X, W)),
    ("rms_norm", r"in one place", lambda x, w: w * (x.tanh() * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6)), (X, W)),
    ("rms_norm", r"LayerNorm", lambda x, w: F.rms_norm(x - x.mean(-1, keepdim=True), (16,), w), (X, W)),
    ("rms_norm", r"x is add.*in one place", norm_mutated, (X, W)),
    ("rms_norm", r"variance is returned", norm_statistics_used, (X, W)),
    ("rms_norm", r"region|in one place", norm_without_gradient_inside, (X.clone().requires_grad_(), W)),
    ("rms_norm", r"float64", lambda x, w: normed(x, w), (X.double(), W.double())),
    ("rms_norm", r"detach", lambda x, w: w * (x * torch.rsqrt(x.detach().pow(2).mean(-1, True) + 1e-6)), (X, W)),
    ("rms_norm", r"True.*False|False.*True", lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6)), (X[0, 0], W)),
    ("swiglu", r"elu.*silu", lambda g, u: F.elu(g) * u, (G, U)),
    ("reglu", r"pow.*square", lambda g, u: F.relu(g) ** 3 * u, (G, U)),
    ("swiglu", r"sigmoid.*silu", lambda g, u: torch.sigmoid(g) * u, (G, U)),
    ("swiglu", r"mish.*silu", lambda g, u: F.mish(g) * u, (G, U)),
    ("swiglu", r"add.*mul", lambda g, u: F.silu(g) + u, (G, U)),
    ("swiglu", r"sub.*mul", lambda g, u: F.silu(g) - u, (G, U)),
    ("swiglu", r"broadcast", lambda g, u: F.silu(g) * u, (G, U[:1])),
    ("swiglu", r"broadcast", lambda g, u: F.silu(g) * u, (G[..., :1], U)),
    ("swiglu", r"u is 2\.0|up is 2\.0", lambda g, u: F.silu(g) * 2.0 + u, (G, U)),
    ("swiglu", r"silu is also used|silu.*returned|also used by", silu_used_twice, (G, U)),
    ("swiglu", r"up is 2", silu_mutated, (G, U)),
    ("swiglu", r"float64", lambda g, u: F.silu(g) * u, (G.double(), U.double())),
    ("swiglu", r"up is torch.float32, made of torch.bfloat16", lambda g, u: F.silu(g) * u.float(), (G.bfloat16(), U.bfloat16())),
    ("swiglu", r"converted beforehand", lambda g, u: F.silu(g.bfloat16()) * u, (G, U)),
    ("swiglu", r"sigmoid.*silu", lambda g, u: g * torch.sigmoid(1.702 * g) * u, (G, U)),
    ("rope", r"neg", lambda x, c, s: rotated(x, c, s, lambda x: torch.cat((x[..., 4:], x[..., :4]), -1)), (Q, COS, SIN)),
    ("rope", r"neg", lambda x, c, s: rotated(x, c, s, lambda x: torch.cat((-x[..., 4:], -x[..., :4]), -1)), (Q, COS, SIN)),
    ("rope", r"sub.*add", lambda x, c, s: x * c - half(x) * s, (Q, COS, SIN)),
    ("rope", r"3.*4|size", lambda x, c, s: rotated(x, c, s, lambda x: torch.cat((-x[..., 3:], x[..., :3]), -1)), (Q, COS, SIN)),
    ("rope", r"has 0 in slice.*= 4", lambda x, c, s: rotated(x, c, s, lambda x: torch.cat((-x[..., :4], x[..., 4:]), -1)), (Q, COS, SIN)),
    ("rope", r"in one place", lambda x, c, s: x * c + half(x.relu()) * s, (Q, COS, SIN)),
    ("rope", r"in one place|half", lambda x, c, s: x.sin() * c + half(x) * s, (Q, COS, SIN)),
    ("rope", r"needs a gradient", lambda x, c, s: x * c + half(x) * s, (Q, COS.clone().requires_grad_(), SIN)),
    ("rope", r"also used by|returned", lambda x, c, s: (lambda r: (x * c + r * s, r))(half(x)), (Q, COS, SIN)),
    ("rope", r"float64", lambda x, c, s: x * c + half(x) * s, (Q.double(), COS.double(), SIN.double())),
    ("rope", r"5 dimensions", lambda x, c, s: x * c + half(x) * s, (Q[None], COS, SIN)),
    ("rope", r"neg", lambda x, c, s: rotated(x, c, s, lambda x: torch.stack((x[..., 1::2], -x[..., ::2]), -1).flatten(-2)), (Q, COS, SIN)),
    ("rope", r"slice", lambda x, c, s: rotated(x, c, s, lambda x: torch.stack((-x[..., ::2], x[..., 1::2]), -1).flatten(-2)), (Q, COS, SIN)),
    ("rope", r"slice", lambda x, c, s: rotated(x, c, s, lambda x: torch.stack((-x[..., 4:], x[..., :4]), -1).flatten(-2)), (Q, COS, SIN)),
    ("rope", r"slice|cat", lambda x, c, s: rotated(x, c, s, lambda x: torch.cat((-x[..., 1::2], x[..., ::2]), -1)), (Q, COS, SIN)),
    ("rope", r"in one place", lambda x, c, s: x * c + neighbours(x.relu()) * s, (Q, COS, SIN)),
    ("rope", r"sub.*add", lambda x, c, s: parts(x, c, c, s, lambda a, b: a - b), (Q, COS[..., :4], SIN[..., :4])),
    ("rope", r"in one place", lambda x, c, s: parts(x, c, c.exp(), s, torch.add), (Q, COS[..., :4], SIN[..., :4])),
    ("rope", r"in one place|where the pattern", lambda x, c, s: both(x, lambda a, b: a * c + b * s, lambda a, b: a * s + b * c), (Q, COS[..., :4], SIN[..., :4])),
    ("rope", r"in one place|where the pattern", lambda x, c, s: both(x, lambda a, b: a * c + b * -s, lambda a, b: b * c + a * -s), (Q, COS[..., :4], SIN[..., :4])),
    ("rope", r"in one place|where the pattern", lambda x, c, s: both(x, lambda a, b: a * c + b * s, lambda a, b: a * s - b * c), (Q, COS[..., :4], SIN[..., :4])),
    ("rope", r"in one place|where the pattern", lambda x, c, s: both(x, lambda a, b: a * c + b * s, lambda a, b: -a * s + b * -c), (Q, COS[..., :4], SIN[..., :4])),
    ("rope", r"needs a gradient", angles_implied, (Q.bfloat16(), torch.cat((COS[..., :4], SIN[..., :4]), -1).bfloat16().requires_grad_())),
    ("rope", r"does not broadcast", lambda x, c, s: parts(x, c, c, s, torch.add), (Q[:1], COS[..., :4].expand(2, 4, 5, 4), SIN[..., :4].expand(2, 4, 5, 4))),
    ("rope", r"1 components", lambda x, c, s: parts(x, c, c, s, torch.add), (Q, COS[..., :1], SIN[..., :1])),
    ("rope", r"complex128", lambda x, c: torch.view_as_real(complex_product(x, c)).flatten(-2).type_as(x), (Q, torch.complex(COS, SIN)[..., :4].to(torch.complex128))),
    ("rope", r"needs a gradient", lambda x, c: torch.view_as_real(complex_product(x, c)).flatten(-2).type_as(x), (Q, torch.complex(COS, SIN)[..., :4].requires_grad_())),
    ("rope", r"view_as_complex|complex", lambda x, c: torch.view_as_real(as_complex(x.sin()) + c).flatten(-2).type_as(x), (Q, torch.complex(COS, SIN)[..., :4])),
    ("linear_cross_entropy", r"0\.1", lambda h, w, y: F.cross_entropy(F.linear(h, w), y, weight=w[:, 0], label_smoothing=0.1), (H, V, Y)),
    ("linear_cross_entropy", r"probabilities", lambda h, w, y: F.cross_entropy(F.linear(h, w), F.one_hot(y, 11).float()), (H, V, Y)),
    ("linear_cross_entropy", r"relu.*linear", lambda h, w, y: F.cross_entropy(F.linear(h, w).relu(), y), (H, V, Y)),
    ("linear_cross_entropy", r"add.*linear", lambda h, w, y: F.cross_entropy(F.linear(h, w) + F.linear(h, w.sin()), y), (H, V, Y)),
    ("linear_cross_entropy", r"where the pattern has linear.*; l_h is an input of this graph", lambda h, w, y: F.cross_entropy(h, y), (H, V, Y % 8)),
    ("linear_cross_entropy", r"also used by", lambda h, w, y: (lambda z: F.cross_entropy(z, y) + z.square().mean())(F.linear(h, w)), (H, V, Y)),
    ("linear_cross_entropy", r"slice.*linear", lambda h, w, y: F.cross_entropy(F.linear(h, w)[..., ::2], y.clamp(max=5)), (H, V, Y)),
    ("linear_cross_entropy", r"float64", lambda h, w, y: F.cross_entropy(F.linear(h, w), y), (H.double(), V.double(), Y)),
    ("linear_cross_entropy", r"kl_div|mse_loss|cross_entropy", lambda h, w, y: F.mse_loss(F.linear(h, w).float(), w[y]), (H, torch.randn(8, 8), Y % 8)),
    ("linear_cross_entropy", r"has pick.*where the pattern has cross_entropy", lambda h, w, y: (lambda z: z.gather(-1, y[:, None]) - z.tanh().logsumexp(-1, True))(F.linear(h, w)), (H, V, Y)),
    ("linear_cross_entropy", r"has pick.*where the pattern has cross_entropy", lambda h, w, y: (lambda z: z.gather(-1, y[:, None])[:, 0] - torch.stack([r.logsumexp(-1) for r in z]))(F.linear(h, w).float()), (H.bfloat16(), V.bfloat16(), Y)),
    ("linear_cross_entropy", r"also used by", lambda h, w, y: (lambda p: p.gather(-1, y[:, None]).mean() + p.mean())(F.log_softmax(F.linear(h, w), -1)), (H, V, Y)),
    ("linear_cross_entropy", r"also used by", lambda h, w, y: (lambda z: (z.logsumexp(-1) - z[range(6), y]).mean() + z.square().mean())(F.linear(h, w)), (H, V, Y)),
    ("linear_cross_entropy", r"max_1 is also used by", lambda h, w, y: (lambda z, m: (z - m[0]).logsumexp(-1) - (z - m[0])[range(6), y] + m[1].sum())(*(lambda z: (z, z.max(-1, True)))(F.linear(h, w))), (H, V, Y)),
    ("linear_cross_entropy", r"not positive|softcap", lambda h, w, y: F.cross_entropy(torch.tanh(F.linear(h, w) / 30.0) * 20.0, y), (H, V, Y)),
]  # fmt: skip


@pytest.mark.parametrize(
    "pattern, reason, function, args", NEAR_MISSES, ids=[f"{m[0]}-{i}" for i, m in enumerate(NEAR_MISSES)]
)
def test_near_miss(pattern, reason, function, args):
    report = report_of(function, *args)
    assert pattern not in report.counts, report
    told = [m.reason for m in report.misses if m.pattern == pattern]
    assert told, f"nothing was told:\n{report}"
    assert any(re.search(reason, r) for r in told), told


Z_LOSSES = {
    # and what they are replaced by: that of parts which are no number of squares holds all logits
    "flat for the loss": (lambda z, y: flat_loss(z, y) + z.logsumexp(-1).square().mean(), "z"),
    "classes second": (lambda z, y: F.cross_entropy(z.transpose(1, 2), y) + (z.logsumexp(-1) ** 2).mean(), "z"),
    "dimension kept": (lambda z, y: flat_loss(z, y) + z.logsumexp(-1, True).square().sum(), "z"),
    "magnitudes": (lambda z, y: flat_loss(z, y) + z.logsumexp(-1).abs().mean(), "lse"),
    "float32": (lambda z, y: flat_loss(z.float(), y) + z.float().logsumexp(-1).mean(), "lse"),
}


def flat_loss(z, y):
    return F.cross_entropy(z.view(-1, 8), y.view(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", Z_LOSSES)
def test_z_loss_of_logits_in_their_own_shape(name, dtype):
    """The loss sees rows, the z-loss sequences of them."""
    if dtype is torch.bfloat16 and name != "float32":
        pytest.skip("the logits' own dtype is the loss's: the kernel's is float32")

    def function(h, w, y):
        return Z_LOSSES[name][0](F.linear(h, w), y)

    h, w = (torch.randn(2, 3, 5).to(dtype).requires_grad_(), torch.randn(8, 5).to(dtype).requires_grad_())
    y = torch.randint(8, (2, 3))
    report = report_of(function, h, w, y)
    assert [m.replacement for m in report.matches] == [
        f"liger_compile.linear_cross_entropy_{Z_LOSSES[name][1]}.default"
    ]
    torch._dynamo.reset()
    ours, eager = torch.compile(function, backend=rewritten([]))(h, w, y), function(h, w, y)
    torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3)
    for a, b in zip(torch.autograd.grad(ours, (h, w)), torch.autograd.grad(eager, (h, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    "head", [lambda h, w: F.linear(h, w) + F.linear(h, w), lambda h, w: F.linear(h, w)[torch.tensor([0, 2, 3])]]
)
def test_what_is_told_does_not_hang_on_the_dtype(head):
    h, w, y = torch.randn(6, 5), torch.randn(8, 5), torch.randint(8, (6,))
    function = lambda h, w, y: (lambda z: F.cross_entropy(z, y[: z.shape[0]]))(head(h, w))
    told = [
        [m.reason for m in report_of(function, h.to(d), w.to(d), y).misses] for d in (torch.float32, torch.bfloat16)
    ]
    assert told[0] and told[0] == told[1], told


ELEMENTS = {
    "of a score of each row": lambda x, w, p: -F.logsigmoid((lambda r: r[0] - r[1])(F.linear(x, p).squeeze(-1))),
    "of a flat parameter": lambda x, w, p: p.view(-1)[0] + p.flatten()[-1] + p.reshape(-1)[1],
}


@pytest.mark.parametrize("name", ELEMENTS)
def test_elements_of_one_dimension_cost_no_other_rewrite(name):
    """A learned factor, a reward."""

    def function(x, w, p):
        return normed(x, w) * ELEMENTS[name](x, w, p)

    x, w, p = torch.randn(3, 16), torch.randn(16), torch.randn(1, 16)
    report = report_of(function, x, w, p)
    assert report.counts == {"rms_norm": 1}, report
    torch.testing.assert_close(report.graphs[0].after(*ordered(report, x=x, w=w, p=p))[0], function(x, w, p))


SIGMOIDS = {
    "of logits": lambda z: 30 * torch.sigmoid(z / 7.5),
    "of logits divided by more": lambda z: 30 * torch.sigmoid(z / (7.5 * z.shape[-1] ** 0.5)),
    "of logits as they are": lambda z: torch.sigmoid(z.float()) * 8,
    "before the upcast": lambda z: (torch.sigmoid(z * 0.2) * 12).float(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", SIGMOIDS)
def test_a_softcap_by_a_sigmoid(name, dtype):
    """Which is one by a tanh, and a number for all classes (modded-nanogpt)."""

    def function(h, w, y):
        z = SIGMOIDS[name](F.linear(h.view(4, 8, 12), w))
        return F.cross_entropy(z.view(-1, 101), y)

    h, w, y = torch.randn(32, 12).to(dtype), torch.randn(101, 12).to(dtype), torch.randint(101, (32,))
    report = report_of(function, h, w, y)
    assert report.counts == {"linear_cross_entropy": 1}, report
    torch._dynamo.reset()
    ours, eager = gradients(torch.compile(function, backend=rewritten([])), h, w, y), gradients(function, h, w, y)
    exact = gradients(function, h.double(), w.double(), y)
    torch.testing.assert_close(ours[0].double(), exact[0].double(), rtol=torch.finfo(dtype).eps, atol=0)
    for mine, theirs, true in zip(ours[1:], eager[1:], exact[1:], strict=True):
        assert relative_error(mine, true) <= 1.05 * relative_error(theirs, true) + torch.finfo(torch.float32).eps


def test_a_scaled_sigmoid_is_no_gate():
    report = report_of(lambda h, w: 30 * torch.sigmoid(F.linear(h, w) / 7.5), H, V)
    assert not report.counts and not report.misses, report


def focal_loss(h, w, y):
    loss = F.cross_entropy(F.linear(h, w).float(), y, reduction="none")
    return ((1 - torch.exp(-loss)) ** 2 * loss).mean()


NOTHING_TO_TELL = {
    # what has sums, products and squares, or an activation without a gate, but nothing else of a pattern
    "z-loss": lambda h, w, y: 1e-4 * torch.logsumexp(h @ w.T, -1).square().mean() + h.sum(),
    "focal loss": focal_loss,
    "squared ReLU without a gate": lambda h, w, y: F.relu(F.linear(h, w)).square() @ w,
    "GELU without a gate": lambda h, w, y: F.linear(F.gelu(F.linear(h, w)), w.T),
    "SiLU without a gate, dropped": lambda h, w, y: F.dropout(F.silu(F.linear(h, w)), 0.1) @ w,
    "sum of residuals": lambda h, w, y: w[0, 0] * h + w[0, 1] * h.sin(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", NOTHING_TO_TELL)
def test_nothing_is_told_of_what_is_anywhere(name, dtype):
    report = report_of(NOTHING_TO_TELL[name], H.to(dtype), V.to(dtype), Y)
    assert not report.misses, report
