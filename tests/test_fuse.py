"""Fusions in the graphs that AOTAutograd has split: that they are made, what they compute, where they are not made."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
import torch.nn.functional as F
from helpers import Accuracy, relative_error, rewritten
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import exc, lowering
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from liger_compile import fuse
from liger_compile.ops import _library

OPS = torch.ops.liger_compile
ADD_NORM, NORM_ADD, GRADIENT = "residual + RMSNorm", "RMSNorm + residual", "RMSNorm's gradient + its neighbours"
PRODUCT = "GLU's gradient + its product"
DTYPES = [torch.float32, torch.bfloat16]


def compiled(function, made=None):
    """A function as the backend compiles it, but for Inductor: its graphs are run as they are after fusions."""

    def compiler(gm, example_inputs, name):
        if made is not None:
            made[name] = dict(fuse.fuse(gm.graph))
        gm.graph.lint()
        gm.recompile()
        return gm.forward

    aot = aot_autograd(
        fw_compiler=functools.partial(compiler, name="forward"),
        bw_compiler=functools.partial(compiler, name="backward"),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    return torch.compile(function, backend=rewritten(backend=aot), fullgraph=True)


def results(function, operands):
    """Outputs and gradients, all of them, by name."""
    operands = [o.detach().clone().requires_grad_(o.is_floating_point()) for o in operands]
    outputs = function(*operands)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(5)
    along = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, [o for o in operands if o.requires_grad], along)
    return [*outputs, *gradients]


def fusions(function, *operands):
    """What is fused, forward and backward; results are compared with those of the same code unfused."""
    made = {}
    ours, plain = results(compiled(function, made), operands), results(function, operands)
    exact = results(function, [o.double() if o.is_floating_point() else o for o in operands])
    accuracy = Accuracy()
    for i, (o, p, x) in enumerate(zip(ours, plain, exact, strict=True)):
        accuracy.add(f"result {i}", o.detach(), p.detach(), x.detach())
    accuracy.check(rows=1)
    return made["forward"], made["backward"]


def norm(x, w, eps=1e-6):
    h = x.float() if x.dtype is not torch.float64 else x
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return w * h.to(x.dtype)


def some(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def layer(x, w1, a, w2, b):
    """Two residual branches with a norm in front of each, and a norm behind."""
    x = x + norm(x, w1) @ a
    y = norm(x, w2)
    x = x + (y @ b + y @ a)
    return norm(x, w1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer(dtype):
    operands = [some(*s, dtype=dtype) for s in ((2, 6, 16), (16,), (16, 16), (16,), (16, 16))]
    forward, backward = fusions(layer, *operands)
    # In the second branch the sum of two products is no value in memory, so the residual is left to Inductor.
    assert forward == {ADD_NORM: 1}
    assert backward == {GRADIENT: 2}


def norm_behind(x, r, w, a):
    return r + norm(x @ a, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_before_the_residual(dtype):
    operands = [some(*s, dtype=dtype) for s in ((2, 6, 16), (2, 6, 16), (16,), (16, 16))]
    assert fusions(norm_behind, *operands) == ({NORM_ADD: 1}, {})


def attention_block(x, w, a, b, c):
    """One norm before three products: three gradients are summed, and the norm is made again for three others."""
    y = norm(x, w)
    return x + torch.sigmoid(y @ a) * (y @ b) * (y @ c)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_gradients(dtype):
    operands = [some(*s, dtype=dtype) for s in ((2, 6, 16), (16,), (16, 16), (16, 16), (16, 16))]
    made = {}
    results(compiled(attention_block, made), operands)
    assert fusions(attention_block, *operands) == ({}, {GRADIENT: 1})


def calls(function, operands):
    """The fused ops of forward and backward, with their operands."""
    seen = []
    merge = fuse._merge

    def noted(replaced, target, args, made):
        done = merge(replaced, target, args, made)
        if done:
            seen.append((target, args))
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuse, "_merge", noted)
        fusions(function, *operands)
    return seen


def test_what_a_gradient_takes_in():
    operands = [some(*s) for s in ((2, 6, 16), (16,), (16, 16), (16, 16), (16, 16))]
    ((target, (dys, _, _, dresidual, *_, again)),) = calls(attention_block, operands)
    assert target is torch.ops.liger_compile.rms_norm_backward_add.default
    assert len(dys) == 3 and dresidual is not None and again


def test_a_norm_that_its_gradient_hangs_on_is_not_made_by_it():
    """y is read by what dy is made of; the sum with the residual's gradient is taken in all the same."""

    def gradients(d, r, x, w):
        y = OPS.rms_norm_forward(x, w, 1e-6)
        dx, dw = OPS.rms_norm_backward(d * y, x, w, 1e-6, 0.0, "normed", True)
        return y.t() @ d, dx + r, dw

    operands = [some(*s) for s in ((6, 16), (6, 16), (6, 16), (16,))]
    gm = make_fx(gradients, tracing_mode="fake")(*operands)
    assert fuse.fuse(gm.graph) == {GRADIENT: 1}
    gm.graph.lint()
    gm.recompile()
    assert sum(n.target is OPS.rms_norm_forward.default for n in gm.graph.nodes) == 1
    for ours, plain in zip(gm(*operands), gradients(*operands), strict=True):
        assert relative_error(ours, plain) < 1e-6


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def heads(x, a, wq, wk, cos, sin, layout="heads first", k_eps=1e-6, reused=False):
    """q and k of one product, normed by head and rotated."""
    q, k = (x @ a).unflatten(-1, (4, 8)).split((3, 1), 2)
    q, k = norm(q, wq), norm(k, wk, k_eps)
    if layout == "heads first":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    else:
        cos, sin = cos[:, None], sin[:, None]
    rest = q.sum() if reused else 0
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q + rest, k


ROTATED = (2, 5, 16), (16, 32), (8,), (8,)
ROPE, ROPE_GRADIENT = "RMSNorm + RoPE", "RMSNorm + RoPE, gradient"


@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads(dtype, layout):
    cos, sin = some(2, 5, 8, dtype=dtype)
    operands = [some(*s, dtype=dtype) for s in ROTATED]
    function = lambda *o: heads(*o, *(a.to(o[0].dtype) for a in (cos, sin)), layout)  # noqa: E731
    assert fusions(function, *operands) == ({ROPE: 1}, {ROPE_GRADIENT: 1})


def test_heads_with_an_epsilon_of_their_own_are_not_fused():
    cos, sin = some(2, 5, 8)
    function = lambda *o: heads(*o, *(a.to(o[0].dtype) for a in (cos, sin)), k_eps=1e-3)  # noqa: E731
    assert fusions(function, *(some(*s) for s in ROTATED)) == ({}, {})


def rotate_neighbours(x, cos, sin):
    return x * cos + torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2) * sin


def rotate_back(x, cos, sin):
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.cat((x2, -x1), -1) * sin


def rotate_by_pairs(x, cos, sin):
    (x1, x2), cos, sin = x.chunk(2, -1), cos[..., :4], sin[..., :4]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


@pytest.mark.parametrize("other", [rotate_neighbours, rotate_back, rotate_by_pairs])
def test_heads_with_another_rotation_are_not_fused(other, monkeypatch):
    monkeypatch.setitem(globals(), "rotate", other)
    cos, sin = some(2, 5, 8)
    function = lambda *o: heads(*o, *(a.to(o[0].dtype) for a in (cos, sin)))  # noqa: E731
    assert fusions(function, *(some(*s) for s in ROTATED)) == ({}, {})


def test_heads_with_weights_of_two_dtypes_are_not_fused():
    cos, sin = some(2, 5, 8, dtype=torch.bfloat16)
    operands = [some(*s, dtype=torch.bfloat16) for s in ROTATED]
    operands[3] = operands[3].float()
    made = {}
    results(compiled(lambda *o: heads(*o, cos, sin), made), operands)
    assert made == {"forward": {}, "backward": {}}


def test_heads_whose_norm_is_used_again_are_not_fused():
    cos, sin = some(2, 5, 8)
    function = lambda *o: heads(*o, *(a.to(o[0].dtype) for a in (cos, sin)), reused=True)  # noqa: E731
    assert fusions(function, *(some(*s) for s in ROTATED)) == ({}, {})


@pytest.mark.parametrize(
    "function",
    [
        lambda x, r, w: norm(x + r[:, :1], w),  # broadcasts
        lambda x, r, w: norm(x.relu() + r, w),  # Inductor makes the ReLU and the sum in one
        lambda x, r, w: norm(x + 1.0, w) * r,
        lambda x, r, w: norm(x + x, w) * r,
        lambda x, r, w: norm(torch.add(x, r, alpha=2), w),
        lambda x, r, w: norm((x + r).transpose(1, 2), w[:6]),
        lambda x, r, w: norm(x, w).mul(2) + r,
        lambda x, r, w: (lambda y: (r + y, y))(norm(x, w)),
        lambda x, r, w: r.relu() + norm(x, w),
        lambda x, r, w: norm(x, w) + r[:, :1],
        lambda x, r, w: torch.nn.functional.normalize(x + r, dim=-1) * 4.0 * w,
        lambda x, r, w: r + torch.nn.functional.normalize(x, dim=-1) * 4.0 * w,
    ],
    ids=range(12),
)
def test_not_fused(function):
    forward, _ = fusions(function, some(2, 6, 16), some(2, 6, 16), some(16))
    assert forward == {}


def test_a_sum_of_lookups_is_not_fused():
    """Inductor makes both lookups and their sum in one."""
    ids = torch.randint(9, (2, 6))
    function = lambda table, places, w: norm(F.embedding(ids, table) + F.embedding(ids, places), w)  # noqa: E731
    forward, _ = fusions(function, some(9, 16), some(9, 16), some(16))
    assert forward == {}


def test_a_residual_of_another_dtype_is_not_fused():
    forward, _ = fusions(lambda x, r, w: norm(x + r, w), some(2, 6, 16, dtype=torch.bfloat16), some(2, 6, 16), some(16))
    assert forward == {}


# ---- a gated unit -------------------------------------------------------------------------------------------------


def mlp(x, a, b, c):
    return (F.silu(x @ a) * (x @ b)) @ c


def packed_mlp(x, ab, c):
    gate, up = (x @ ab).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ c


def frozen_behind(x, a, b):
    """No weight behind has a gradient, so nothing needs the product again."""
    return mlp(x, a, b, torch.linspace(-1, 1, 24, dtype=x.dtype)[:, None].expand(-1, 16))


def product_kept(x, a, b, c):
    """Its gradient hangs on the product: another product of the backward reads it first."""
    y = F.silu(x @ a) * (x @ b)
    return (y * y) @ c


WEIGHTS = (16, 24), (16, 24), (24, 16)


@pytest.mark.parametrize(
    "function, shapes, expected",
    [
        (mlp, WEIGHTS, {PRODUCT: 1}),
        (packed_mlp, ((16, 48), (24, 16)), {PRODUCT: 1}),
        (frozen_behind, WEIGHTS[:2], {}),
        (product_kept, WEIGHTS, {}),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_unit(function, shapes, expected, dtype):
    operands = [some(*s, dtype=dtype) for s in ((2, 6, 16), *shapes)]
    assert fusions(function, *operands) == ({}, expected)


# ---- in the backend -----------------------------------------------------------------------------------------------

OPERANDS = (2, 6, 16), (16,), (16, 16), (16,), (16, 16)


@pytest.fixture
def told(monkeypatch):
    """What the backend logs, each once."""
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    log = logging.getLogger("liger_compile")
    monkeypatch.setattr("liger_compile.log._said", set())
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "level", logging.INFO)
    log.manager._clear_cache()
    yield told
    log.manager._clear_cache()


def equal_results(**how):
    operands = [some(*s) for s in OPERANDS]
    ours = results(torch.compile(layer, backend="liger", **how), operands)
    for o, plain in zip(ours, results(layer, operands), strict=True):
        assert relative_error(o.detach(), plain.detach()) < 1e-5


def test_told_by_the_backend(told):
    with torch._inductor.config.patch(fx_graph_cache=False):
        equal_results()
    assert f"fused: 1 x {ADD_NORM}" in told and f"fused: 2 x {GRADIENT}" in told


def test_symbolic_sizes(told):
    with torch._inductor.config.patch(fx_graph_cache=False):
        function = torch.compile(layer, backend="liger", dynamic=True)
        for rows in (6, 9):
            operands = [some(*s) for s in ((2, rows, 16), *OPERANDS[1:])]
            for ours, plain in zip(results(function, operands), results(layer, operands), strict=True):
                assert relative_error(ours.detach(), plain.detach()) < 1e-5
    assert f"fused: 1 x {ADD_NORM}" in told and f"fused: 2 x {GRADIENT}" in told


def test_inductor_knows_the_ops_without_describing_them(monkeypatch):
    """Before torch 2.13 it describes the operands of an op that it does not know, with all that they are made of."""

    def described(target, args, kwargs):
        raise AssertionError(f"{target} is not known")

    monkeypatch.setattr(exc.OperatorIssue, "operator_str", staticmethod(described))
    with torch._inductor.config.patch(fx_graph_cache=False):
        equal_results()
    assert all(op in lowering.lowerings for op in _library.DEFINED)


def test_a_failure_breaks_nothing(told, monkeypatch):
    def fail(graph):
        raise KeyError("val")

    monkeypatch.setattr(fuse, "fuse", fail)
    with torch._inductor.config.patch(fx_graph_cache=False):
        equal_results()
    assert told.count("fusing ops with their neighbours failed: KeyError: 'val'") == 1


def test_turned_off(told):
    with torch._inductor.config.patch(fx_graph_cache=False):
        equal_results(options={"liger.fuse": False})
    assert not any("fused" in t for t in told)


def test_a_pass_of_the_user(told):
    seen = []
    with torch._inductor.config.patch(fx_graph_cache=False, post_grad_custom_pre_pass=seen.append):
        equal_results()
    assert len(seen) == 2 and not any(t.startswith("fused") for t in told)
    assert "post_grad_custom_pre_pass is set, so that ops are not fused with their neighbours" in told
