"""Masks that one graph makes and another is given: what they say reaches the other, as long as it is true."""

from __future__ import annotations

import copy
import importlib

import pytest
import sympy
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from liger_compile import handed

T = 24


def causal(n, pad=None):
    i = torch.arange(n)
    return (i[:, None] >= i)[None, None].expand(2, 1, -1, -1).clone()


def window(n, pad=None):
    i = torch.arange(n)
    return ((i[:, None] >= i) & (i[:, None] - i < 5))[None, None].expand(2, 1, -1, -1).clone()


def padded(n, pad):
    i = torch.arange(n)
    return (i[:, None] >= i)[None, None] & (pad[:, None, None, :] != 0)


def attend(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def broken(make, between=lambda mask: mask):
    """Attention twice, each in a graph of its own, neither that of the mask."""

    def function(q, k, v, pad):
        mask = make(q.shape[-2], pad)
        torch._dynamo.graph_break()
        mask = between(mask)
        y = attend(q, k, v, mask)
        torch._dynamo.graph_break()
        return attend(y, k, v, mask)

    return function


def heads(length=T):
    return [torch.randn(2, 4, length, 16).requires_grad_() for _ in range(3)]


def padding(length=T):
    return (torch.arange(length) < torch.tensor([[length], [length - 7]])).long()


pytestmark = pytest.mark.usefixtures("everywhere")


def counts(reports):
    return sum(r.counts.get("attention", 0) for r in reports)


def assert_like_eager(compiled, function, *args):
    ours, eager = compiled(*args), function(*args)
    assert relative_error(ours.detach(), eager.detach()) < 1e-5
    operands = [a for a in args if a.requires_grad]
    gradient = torch.randn_like(eager)
    for o, e in zip(*(torch.autograd.grad(r, operands, gradient) for r in (ours, eager)), strict=True):
        assert relative_error(o, e) < 1e-5


def documents(n, pad):
    """Of what the graph computes of its inputs, which the other graph is given too."""
    i = torch.arange(n)
    document = (pad == 0).cumsum(-1)
    return (i[:, None] >= i)[None, None] & (document[:, None, :, None] == document[:, None, None, :])


@pytest.mark.parametrize("make", [causal, window, padded, documents], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_a_mask_from_another_graph(reports, make, dynamic):
    function = broken(make)
    compiled = torch.compile(function, backend="liger", dynamic=dynamic)
    assert_like_eager(compiled, function, *heads(), padding())
    assert counts(reports) == (0 if dynamic and make in (padded, documents) else 2), reports
    assert_like_eager(compiled, function, *heads(), padding())
    assert_like_eager(compiled, function, *heads(17), padding(17))


def test_what_it_says_may_change(reports):
    """Another mask of the same layout, for which Dynamo has no reason to compile again."""
    compiled = torch.compile(attend, backend="liger")
    masks = [torch.compile(make, backend="liger")(T) for make in (causal, window)]
    for mask in (masks[0], masks[1], masks[0], torch.rand(2, 1, T, T) > 0.5, masks[1], masks[0]):
        assert_like_eager(compiled, attend, *heads(), mask)
    assert counts(reports) == 1 and sum(m.pattern == "attention" for r in reports for m in r.misses) == 1, reports


def see_more(mask):
    mask[..., -1, :] = True
    mask[..., 0, 1] = True
    return mask


def turned(mask):
    return mask.flip(-1).flip(-2)


@pytest.mark.parametrize("change", [see_more, turned])
def test_a_mask_that_is_changed_in_between(reports, change):
    function = broken(causal, torch._dynamo.disable(change))
    compiled = torch.compile(function, backend="liger")
    for _ in range(2):
        assert_like_eager(compiled, function, *heads(), padding())
    assert counts(reports) == 0


def test_a_mask_that_is_changed_where_it_is_read(reports):
    def function(q, k, v, pad):
        mask = causal(q.shape[-2])
        torch._dynamo.graph_break()
        before = attend(q, k, v, mask)
        mask[..., 0, :] = True
        return before + attend(q, k, v, mask)

    compiled = torch.compile(function, backend="liger")
    assert_like_eager(compiled, function, *heads(), padding())
    assert counts(reports) == 0


def test_what_a_mask_reads_is_changed_in_between(reports):
    """It is then read as it was, which only the mask still knows."""

    @torch._dynamo.disable
    def change(pad):
        pad.zero_()

    def function(q, k, v, pad):
        mask = padded(q.shape[-2], pad)
        change(pad)
        return attend(q, k, v, mask)

    compiled = torch.compile(function, backend="liger")
    q, k, v = heads()
    for _ in range(2):
        pad = padding()
        assert relative_error(compiled(q, k, v, pad.clone()), function(q, k, v, pad)) < 1e-5
    assert counts(reports) == 0


def test_padding_that_both_graphs_are_given(reports):
    def function(q, k, v, pad):
        mask = padded(q.shape[-2], pad)
        torch._dynamo.graph_break()
        return attend(q, k, v, mask) * (pad[:, None, :, None] != 0)

    compiled = torch.compile(function, backend="liger")
    for n in (T, T, 17, 29):
        assert_like_eager(compiled, function, *heads(n), padding(n))
    assert counts(reports) >= 1


def test_positions_from_another_graph(reports):
    """Of which a graph in between makes the mask: the documents in them are known to be one."""

    def function(q, k, v, pad):
        ids = torch.arange(q.shape[-2])[None]
        torch._dynamo.graph_break()
        mask = documents(q.shape[-2], torch.diff(ids, prepend=ids[:, :1] - 1).expand(2, -1))
        torch._dynamo.graph_break()
        return attend(q, k, v, mask)

    compiled = torch.compile(function, backend="liger")
    for _ in range(2):
        assert_like_eager(compiled, function, *heads(), padding())
    (match,) = (m for r in reports for m in r.matches)
    assert match.effect == "half of the scores"  # not FlexAttention's


def test_one_tensor_that_becomes_two(reports):
    """The layers' graph is given the padding too when it is compiled, and another tensor later."""

    def function(q, k, v, pad, other):
        mask = padded(q.shape[-2], pad)
        torch._dynamo.graph_break()
        return attend(q, k, v, mask) * (other[:, None, :, None] + 1)

    compiled = torch.compile(function, backend="liger")
    pad = padding()
    assert_like_eager(compiled, function, *heads(), pad, pad)
    assert counts(reports) == 1
    assert_like_eager(compiled, function, *heads(), pad, torch.randint(0, 2, pad.shape))
    assert_like_eager(compiled, function, *heads(), 1 - pad, torch.randint(0, 2, pad.shape))
    assert_like_eager(compiled, function, *heads(), padding(), pad)


def test_two_masks(reports):
    """One of which comes to say something else, as the window of another layer, and of other padding."""

    def function(q, k, v, pads):
        near, far = (padded(q.shape[-2], pad) for pad in pads)
        near = near & window(q.shape[-2])
        torch._dynamo.graph_break()
        return attend(q, k, v, near) + attend(v, q, k, far)

    compiled = torch.compile(lambda q, k, v, a, b: function(q, k, v, (a, b)), backend="liger")
    plain = lambda q, k, v, a, b: function(q, k, v, (a, b))  # noqa: E731
    pad = padding()
    assert_like_eager(compiled, plain, *heads(), pad, pad)
    assert counts(reports) == 2
    for a, b in ((pad, 1 - pad), (1 - pad, pad), (padding(), padding()), (pad, pad)):
        assert_like_eager(compiled, plain, *heads(), a, b)


def test_inference(reports):
    function = broken(causal)
    compiled = torch.compile(function, backend="liger")
    q, k, v = (x.detach() for x in heads())
    with torch.inference_mode():
        assert relative_error(compiled(q, k, v, padding()), function(q, k, v, padding())) < 1e-5
    with torch.no_grad():
        assert relative_error(compiled(q, k, v, padding()), function(q, k, v, padding())) < 1e-5


def test_checkpoint_bodies(reports):
    from torch.utils.checkpoint import checkpoint

    def function(q, k, v, pad):
        mask = padded(q.shape[-2], pad)
        torch._dynamo.graph_break()
        return checkpoint(lambda q, k, v: attend(q, k, v, mask).square(), q, k, v, use_reentrant=False)

    compiled = torch.compile(function, backend="liger")
    assert_like_eager(compiled, function, *heads(), padding())
    assert counts(reports) == 1


class Layer(nn.Module):
    """Weights of 1 MiB, so that DDP has several buckets."""

    def __init__(self):
        super().__init__()
        self.project, self.out = nn.Linear(256, 768, bias=False), nn.Linear(256, 256, bias=False)

    def forward(self, x, mask):
        q, k, v = (t.unflatten(-1, (4, 64)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        return x + self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class Layers(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x, pad):
        mask = self.make(x.shape[1], pad)
        for layer in self.layers:
            x = layer(x, mask)
        return x


@pytest.mark.parametrize("make", [causal, padded, documents], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["data parallel", "fully sharded"])
def test_distributed(reports, process_group, make, kind):
    """DDP cuts the graph in pieces, FSDP's hooks break it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = Layers(make)
    model = copy.deepcopy(plain)
    if kind == "data parallel":
        wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
    else:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    compiled = torch.compile(wrapped, backend="liger")
    for _ in range(2):
        x, pad = torch.randn(2, T, 256), padding()
        ours, eager = compiled(x, pad), plain(x, pad)
        assert relative_error(ours.detach(), eager.detach()) < 1e-5
        for y in (ours, eager):
            y.square().mean().backward()
    assert len(reports) > 1 and counts(reports) > 0, reports
    assert not any(m.pattern == "attention" for r in reports for m in r.misses), reports
    for (name, p), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        gradient = p.grad.full_tensor() if kind == "fully sharded" else p.grad
        assert relative_error(gradient, expected.grad) < 1e-5, name


def test_only_masks_are_noted(reports):
    def function(q, k, v, pad):
        """A result that is read, two of data, of which one is made of as much, one that hangs on something for every
        pair, and floats."""
        pairs = pad[:, None, :].cumsum(-1) > pad[:, :, None].cumsum(1)
        return causal(T), pad != 0, pad.cumsum(-1) > 3, pairs.cumsum(-1)[:, None] > 3, q * 2, torch.zeros(2, 1, T, T)

    handed._SAID.clear()
    results = torch.compile(function, backend="liger")(*heads(), padding())
    assert [handed.said_of(r) is not None for r in results] == [True, True, False, False, False, False]
    assert repr(handed.said_of(results[0]).value) == "q - k >= 0"
    results[0][0, 0, 0, 5] = True
    assert handed.said_of(results[0]) is None


def test_flex_attention_of_padding_from_another_graph(monkeypatch, reports):
    """What the mask reads is an input of its own, of the sizes that it has: a guard on symbols would have no source."""
    op_file = importlib.import_module("liger_compile.ops.masked_attention")  # the op has the name too
    monkeypatch.setattr(op_file, "_has_kernel", lambda query: True)
    monkeypatch.setattr("liger_compile._torch.compile_fx", lambda gm, inputs, config: aot_eager(gm, inputs))
    symbols, create_symbol = [], ShapeEnv.create_symbol

    def noting(self, *args, **kwargs):
        made = create_symbol(self, *args, **kwargs)
        symbols.extend([made] if isinstance(made, sympy.Symbol) else [])
        return made

    monkeypatch.setattr(ShapeEnv, "create_symbol", noting)
    function = broken(padded)
    assert_like_eager(torch.compile(function, backend="liger"), function, *heads(256), padding(256))
    assert counts(reports) == 2 and not symbols, (reports, symbols)
