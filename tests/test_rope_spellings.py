"""Every spelling of RoPE is matched; what only looks like it is left alone."""

from __future__ import annotations

import pytest
import torch
from helpers import as_complex, half, neighbours, ordered, report_of


def rope_llama(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (q * cos) + (half(q) * sin), (k * cos) + (half(k) * sin)


def rope_chunk(q, k, cos, sin):
    def rotate(x):
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat([-x2, x1], -1)

    cos, sin = cos[:, None], sin[:, None]
    return rotate(q) * sin + q * cos, rotate(k) * sin + k * cos


def rope_split(q, k, cos, sin):
    def rotate(x):
        x1, x2 = torch.split(x, x.shape[-1] // 2, dim=-1)
        return torch.cat((x2.neg(), x1), dim=-1)

    cos, sin = cos[:, None, :, :], sin[:, None, :, :]
    return torch.add(q * cos, rotate(q) * sin), torch.add(k * cos, rotate(k) * sin)


def rope_unbind(q, k, cos, sin):
    def rotate(x):
        x1, x2 = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2).unbind(dim=-2)
        return torch.cat((-x2, x1), dim=-1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def rope_concat_times_minus_one(q, k, cos, sin):
    def rotate(x):
        n = x.size(-1) // 2
        return torch.concat([x[..., n:] * -1, x[..., :n]], dim=x.ndim - 1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def rope_negative_slices(q, k, cos, sin):
    def rotate(x):
        return torch.cat((torch.neg(x[:, :, :, -4:]), x[:, :, :, :-4]), 3)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def rope_narrow(q, k, cos, sin):
    def rotate(x):
        return torch.cat((-x.narrow(-1, 4, 4), x.narrow(-1, 0, 4)), -1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q.mul(cos).add(rotate(q).mul(sin)), k.mul(cos).add(rotate(k).mul(sin))


def rope_operand_order(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return sin * half(q) + cos * q, sin * half(k) + cos * k


def rope_cast_back(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1).float(), sin.unsqueeze(1).float()
    return (q * cos + half(q) * sin).to(q.dtype), (k * cos + half(k) * sin).to(k.dtype)


def rope_upcast(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    qf, kf = q.float(), k.float()
    return (qf * cos + half(qf) * sin).type_as(q), (kf * cos + half(kf) * sin).type_as(k)


def rope_partial(q, k, cos, sin):
    cos, sin = cos[..., :4].unsqueeze(1), sin[..., :4].unsqueeze(1)

    def part(x):
        rot, rest = x[..., :4], x[..., 4:]
        return torch.cat([rot * cos + half(rot) * sin, rest], dim=-1)

    return part(q), part(k)


def rope_partial_of_everything(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def part(x):
        rot, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        return torch.cat([rot * cos + half(rot) * sin, rest], dim=-1)

    return part(q), part(k)


def rope_batched_angles(q, k, cos, sin):
    cos, sin = cos.expand(2, -1, -1).unsqueeze(1), sin.expand(2, -1, -1).unsqueeze(1)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def rope_tokens_before_heads(q, k, cos, sin):
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def rope_inverse(q, k, cos, sin):
    def rotate(x):
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x2, -x1), dim=-1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def rope_of_slices(q, k, cos, sin):
    """As in latent attention, where the last components of each head are rotated."""
    (_, q), (_, k) = q.split([4, 4], dim=-1), k.split([4, 4], dim=-1)
    cos, sin = cos[..., :4].unsqueeze(1), sin[..., :4].unsqueeze(1)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def repeated(cos, sin, dim=1):
    return (x[..., :4].repeat_interleave(2, dim=-1).unsqueeze(dim) for x in (cos, sin))


def rope_neighbours(q, k, cos, sin):
    cos, sin = repeated(cos, sin)
    return (q * cos) + (neighbours(q) * sin), (k * cos) + (neighbours(k) * sin)


def rope_neighbours_reshaped(q, k, cos, sin):
    def rotate(x):
        return torch.stack([-x[:, :, :, 1::2], x[:, :, :, 0::2]], dim=4).reshape_as(x)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def rope_neighbours_unbound(q, k, cos, sin):
    def rotate(x):
        x1, x2 = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        return torch.stack((-x2, x1), dim=-1).view(*x.shape)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def rope_neighbours_upcast(q, k, cos, sin):
    cos, sin = repeated(cos, sin)
    qf, kf = q.float(), k.float()
    return (qf * cos + neighbours(qf) * sin).to(q.dtype), (kf * cos + neighbours(kf) * sin).to(k.dtype)


def rope_neighbours_upcast_twice(q, k, cos, sin):
    cos, sin = repeated(cos, sin)

    def one(x):
        return ((x.float() * cos) + (neighbours(x).float() * sin)).to(x.dtype)

    return one(q), one(k)


def rope_neighbours_partial(q, k, cos, sin):
    cos, sin = repeated(cos[..., :3], sin[..., :3])

    def part(x):
        rot, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        return torch.cat([rot * cos + neighbours(rot) * sin, rest], dim=-1)

    return part(q), part(k)


def rope_neighbours_tokens_before_heads(q, k, cos, sin):
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    cos, sin = repeated(cos, sin, dim=2)
    return q * cos + neighbours(q) * sin, k * cos + neighbours(k) * sin


def rope_by_pairs(q, k, cos, sin):
    cos, sin = cos[..., :4].unsqueeze(1), sin[..., :4].unsqueeze(1)

    def one(x):
        first, second = torch.chunk(x, 2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return one(q), one(k)


def rope_by_pairs_cast_back(q, k, cos, sin):
    cos, sin = cos[..., :4].unsqueeze(1).float(), sin[..., :4].unsqueeze(1).float()

    def one(x):
        first, second = x.float().chunk(2, -1)
        return torch.cat((first * cos - second * sin, sin * first + cos * second), dim=-1).type_as(x)

    return one(q), one(k)


def rope_neighbours_by_pairs(q, k, cos, sin):
    cos, sin = cos[..., :4].unsqueeze(1), sin[..., :4].unsqueeze(1)

    def one(x):
        pairs = x.float().reshape(*x.shape[:-1], -1, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(3).type_as(x)

    return one(q), one(k)


def rope_neighbours_to_halves(q, k, cos, sin):
    cos, sin = cos[..., :4].unsqueeze(1), sin[..., :4].unsqueeze(1)

    def one(x):
        x1, x2 = x[..., 0::2], x[..., 1::2]
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)

    return one(q), one(k)


def rope_of_a_table(q, k, cos, sin):
    """As torchtune's: cos and sin are pairs of one float32 table, by which x and the angles could change places."""
    q, k, table = q.transpose(1, 2), k.transpose(1, 2), torch.stack((cos[0, :, :4], sin[0, :, :4]), -1).float()

    def one(x):
        pairs = x.float().reshape(*x.shape[:-1], -1, 2)
        at = table.view(1, x.shape[1], 1, pairs.shape[-2], 2)
        first = pairs[..., 0] * at[..., 0] - pairs[..., 1] * at[..., 1]
        second = pairs[..., 1] * at[..., 0] + pairs[..., 0] * at[..., 1]
        return torch.stack((first, second), -1).flatten(3).type_as(x)

    return one(q), one(k)


def rope_by_pairs_back(q, k, cos, sin):
    """As in nanochat."""
    cos, sin = cos[..., :4].unsqueeze(1), sin[..., :4].unsqueeze(1)

    def one(x):
        d = x.shape[3] // 2
        first, second = x[..., :d], x[..., d:]
        return torch.cat([first * cos + second * sin, first * (-sin) + second * cos], 3).to(x.dtype)

    return one(q), one(k)


def rope_by_pairs_back_in_float32(q, k, cos, sin):
    """As in modded-nanogpt."""
    cos, sin = cos[..., :4].unsqueeze(1).float(), sin[..., :4].unsqueeze(1).float()

    def one(x):
        first, second = x.to(torch.float32).chunk(2, dim=-1)
        return torch.cat((first * cos + second * sin, first * (-sin) + second * cos), 3).type_as(x)

    return one(q), one(k)


def rope_by_pairs_back_difference(q, k, cos, sin):
    cos, sin = cos[..., :4].unsqueeze(1), sin[..., :4].unsqueeze(1)

    def one(x):
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack((second * sin + first * cos, second * cos - first * sin), -1).flatten(-2)

    return one(q), one(k)


def rope_by_pairs_of_negatives(q, k, cos, sin):
    cos, sin = cos[..., :4].unsqueeze(1), sin[..., :4].unsqueeze(1)

    def one(x):
        first, second = x.float().chunk(2, -1)
        return torch.cat((-second * sin + first * cos, first * sin + cos * second), -1).type_as(x)

    return one(q), one(k)


def rope_with_a_scale_of_one(q, k, cos, sin):
    """As in rotary-embedding-torch."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos * 1.0 + neighbours(q) * sin * 1.0, k * cos / 1 + neighbours(k) * sin / 1.0


def rope_complex(q, k, cos, sin):
    freqs = torch.complex(cos[..., :4].float(), sin[..., :4].float()).unsqueeze(1)
    q_out = torch.view_as_real(as_complex(q) * freqs).flatten(3)
    k_out = torch.view_as_real(as_complex(k) * freqs).flatten(3)
    return q_out.type_as(q), k_out.type_as(k)


def rope_complex_tokens_before_heads(q, k, cos, sin):
    q, k = (x.transpose(1, 2).flatten(2) for x in (q, k))  # what a linear layer gives, seen as heads
    q, k = q.view(*q.shape[:2], -1, 8), k.view(*k.shape[:2], -1, 8)
    freqs = torch.complex(cos[0, :, :4].float(), sin[0, :, :4].float()).view(1, 5, 1, 4)
    return tuple(torch.view_as_real(freqs * as_complex(x)).reshape(x.shape).to(x.dtype) for x in (q, k))


def rope_complex_of_halves(q, k, cos, sin):  # Gemma's own code
    freqs = torch.complex(cos[0, :, :4].float(), sin[0, :, :4].float())

    def rotate(x):
        z = torch.view_as_complex(torch.stack(torch.chunk(x.float(), 2, dim=-1), dim=-1))
        y = torch.cat(torch.chunk(torch.view_as_real(z * freqs).type_as(x), 2, dim=-1), dim=-2)
        return y.reshape(*y.shape[:-2], -1)

    return rotate(q), rotate(k)


def rope_complex_of_two_parts(q, k, cos, sin):
    freqs = torch.complex(cos[..., :4].float(), sin[..., :4].float()).unsqueeze(1)
    pairs = (torch.complex(x[..., ::2].float(), x[..., 1::2].float()) for x in (q, k))
    return tuple(torch.view_as_real(z * freqs).flatten(-2).to(q.dtype) for z in pairs)


def rope_by_pairs_stacked(q, k, cos, sin):
    c, s = cos[:, None, :, :4], sin[:, None, :, :4]

    def rotate(x):
        x1, x2 = x.chunk(2, -1)
        return torch.stack((x1 * c - x2 * s, x2 * c + x1 * s), dim=-2).flatten(-2)

    return rotate(q), rotate(k)


def rope_of_viewed_halves(q, k, cos, sin):  # Qwen's and OLMo's own code, of heads that are views themselves
    q, k = (x.transpose(1, 2).flatten(2) for x in (q, k))  # what a linear layer gives, seen as heads
    q, k, cos, sin = q.view(2, 5, 4, 8), k.view(2, 5, 2, 8), cos.unsqueeze(2), sin.unsqueeze(2)

    def rotate_half(x):
        x1, x2 = x.view(*x.shape[:-1], 2, -1).unbind(-2)
        return torch.cat((-x2, x1), dim=-1)

    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def rope_complex_inverse(q, k, cos, sin):
    freqs = torch.complex(cos[..., :4].float(), sin[..., :4].float()).unsqueeze(1).conj()
    return tuple(torch.view_as_real(as_complex(x) * freqs).flatten(-2).type_as(x) for x in (q, k))


def rope_addcmul(q, k, cos, sin):
    cos, sin = cos[:, None].float(), sin[:, None].float()
    a, b = q.float(), k.float()
    return torch.addcmul(a * cos, half(a), sin).to(q.dtype), torch.addcmul(b * cos, half(b), sin).to(k.dtype)


def rope_addcmul_by_pairs(q, k, cos, sin):
    cos, sin = cos[:, None, :, :4].float(), sin[:, None, :, :4].float()

    def turn(x):
        a, b = x.float().chunk(2, -1)
        return torch.cat((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)), -1).to(x.dtype)

    return turn(q), turn(k)


ROPES = [f for name, f in list(globals().items()) if name.startswith("rope_")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("function", ROPES, ids=lambda f: f.__name__)
def test_rope(function, dtype):
    q, k = torch.randn(2, 5, 4, 8, dtype=dtype).transpose(1, 2), torch.randn(2, 5, 2, 8, dtype=dtype).transpose(1, 2)
    cos, sin = torch.randn(1, 5, 8, dtype=dtype), torch.randn(1, 5, 8, dtype=dtype)
    report = report_of(function, q, k, cos, sin)
    assert report.counts == {"rope": 1}, report
    assert "rope_pair" in report.graphs[0].after.code
    results = report.graphs[0].after(*ordered(report, q=q, k=k, cos=cos, sin=sin))
    for result, expected in zip(results, function(q, k, cos, sin), strict=True):
        torch.testing.assert_close(result, expected)
        assert result.stride() == expected.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("batch, heads", [(2, 4), (2, 1), (1, 1)])
def test_angles_that_are_shaped_as_what_they_turn(batch, heads, dtype):
    """Of two tensors that could be x by the formula alone, it is the one that the other broadcasts to, and that may
    have a gradient."""
    x, table = torch.randn(batch, 5, heads, 8, dtype=dtype, requires_grad=True), torch.randn(1, 5, 1, 4, 2)

    def function(x, t):
        a = x.float().reshape(*x.shape[:-1], -1, 2)
        first = a[..., 0] * t[..., 0] - a[..., 1] * t[..., 1]
        return torch.stack((first, a[..., 1] * t[..., 0] + a[..., 0] * t[..., 1]), -1).flatten(3).type_as(x)

    report = report_of(function, x, table)
    assert report.counts == {"rope": 1}, report
    (call,) = [n for n in report.graphs[0].after.graph.nodes if "rope" in str(n.target)]
    assert call.kwargs["x"].op == "placeholder"
    torch.testing.assert_close(report.graphs[0].after(*ordered(report, x=x, t=table))[0], function(x, table))


@pytest.mark.parametrize("value, dtype", [(2, torch.float32), (0.5, torch.float32), (1, torch.bfloat16)], ids=str)
def test_sums_with_a_scaled_or_unrounded_product_are_left(value, dtype):
    function = lambda q, cos, sin: torch.addcmul(q * cos, half(q), sin, value=value)
    assert not report_of(function, *(torch.randn(shape).to(dtype) for shape in ((2, 4, 5, 8), (5, 8), (5, 8)))).counts


def test_rope_on_one_tensor():
    report = report_of(
        lambda q, cos, sin: q * cos + half(q) * sin, torch.randn(2, 4, 5, 8), torch.randn(5, 8), torch.randn(5, 8)
    )
    assert report.counts == {"rope": 1} and "rope_pair" not in report.graphs[0].after.code


def test_rope_of_q_and_k_with_angles_of_their_own():
    def function(q, k, cos, sin):
        return q * cos + half(q) * sin, k * sin + half(k) * cos

    assert report_of(function, *[torch.randn(2, 4, 5, 8) for _ in range(4)]).counts == {"rope": 2}
