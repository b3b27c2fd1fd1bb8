"""`rewrite` itself: what it promises about the graphs it is given and gives back, and what it leaves alone."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import capture, relative_error, report_of, rewritten
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from liger_compile import Options, Report, make_pattern, rewrite


def norm(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def everything(x, w, c, s, head, y):
    x = norm(x, w)
    x = F.silu(x) * (x + 1)
    x = x * c + half(x) * s
    return F.cross_entropy(F.linear(x, head).float(), y)


def operands(dtype=torch.float32):
    x, w, head = torch.randn(6, 8, dtype=dtype), torch.randn(8, dtype=dtype), torch.randn(11, 8, dtype=dtype)
    c, s = torch.randn(6, 8, dtype=dtype), torch.randn(6, 8, dtype=dtype)
    return x.requires_grad_(), w.requires_grad_(), c, s, head.requires_grad_(), torch.tensor([0, 10, 3, -100, 3, 7])


ALL = {"rms_norm": 1, "swiglu": 1, "rope": 1, "linear_cross_entropy": 1}


def our_calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if getattr(n.target, "namespace", "") == "liger_compile"]


def run(function, *args):
    """Results and gradients, of operands of their own."""
    args = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
    results = function(*args)
    results = [r for r in (results if isinstance(results, (tuple, list)) else (results,))]
    wanted = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    sums = [r.float().sum() for r in results if r.requires_grad]
    grads = torch.autograd.grad(sums, wanted, allow_unused=True, materialize_grads=True) if sums else []
    return [*(r.detach() for r in results), *grads, *(a.detach() for a in args if isinstance(a, torch.Tensor))]


def rewritten_like_eager(function, *args, options=None, tolerance=1e-5) -> Report:
    """The report of rewriting a function; the rewritten graph gives eager's results, gradients and changed operands."""
    reports: list[Report] = []
    torch._dynamo.reset()
    ours = run(torch.compile(function, backend=rewritten(reports, "aot_eager", options), fullgraph=True), *args)
    for i, (o, e) in enumerate(zip(ours, run(function, *args), strict=True)):
        assert o.dtype == e.dtype and o.shape == e.shape
        assert relative_error(o, e) <= tolerance, i
    assert len(reports) == 1
    return reports[0]


# ---- what is promised about graphs ----------------------------------------------------------------------------------


def snapshot(gm: fx.GraphModule):
    """All there is of a graph: nodes, their arguments and each entry of their notes, by identity."""
    return (
        gm.code,
        [
            (n, n.name, n.op, n.target, n.args, dict(n.kwargs), {k: id(v) for k, v in n.meta.items()})
            for n in gm.graph.nodes
        ],
        [(name, id(module)) for name, module in gm.named_modules()],
        [(name, id(p)) for name, p in (*gm.named_parameters(), *gm.named_buffers())],
        {k: id(v) for k, v in vars(gm).items() if k not in ("_modules", "_code", "_lineno_map")},
        {k: id(v) for k, v in gm.meta.items()},
    )


def test_the_graph_is_not_modified():
    gm = capture(everything, *operands())
    before = snapshot(gm)
    report = rewrite(gm)
    assert report.counts == ALL, report
    assert snapshot(gm) == before
    assert report.graphs[0].before is gm and report.graphs[0].after is not gm


def test_bodies_are_not_modified():
    gm = capture(lambda x, w: checkpoint(norm, x, w, use_reentrant=False), *operands()[:2])
    bodies = {name: snapshot(m) for name, m in gm.named_children() if isinstance(m, fx.GraphModule)}
    before = snapshot(gm)
    assert rewrite(gm).counts == {"rms_norm": 1}
    assert snapshot(gm) == before and bodies
    assert {name: snapshot(m) for name, m in gm.named_children() if isinstance(m, fx.GraphModule)} == bodies


def test_without_a_match_the_graph_itself_comes_back():
    gm = capture(lambda x: x.sin() + 1, torch.randn(3))
    report = rewrite(gm)
    assert report.graphs[0].after is gm and not report.counts
    gm = capture(everything, *operands())
    assert rewrite(gm, Options(enable=())).graphs[0].after is gm


def test_inputs_and_outputs_stay():
    gm = capture(everything, *operands())
    after = rewrite(gm).graphs[0].after
    inputs = [[n.target for n in g.graph.nodes if n.op == "placeholder"] for g in (gm, after)]
    assert inputs[0] == inputs[1]
    for old, new in zip(gm.graph.find_nodes(op="placeholder"), after.graph.find_nodes(op="placeholder"), strict=True):
        assert new.meta["example_value"] is old.meta["example_value"]
        assert getattr(new, "_dynamo_source", None) is getattr(old, "_dynamo_source", None)
    assert after.meta == gm.meta
    output = [g.graph.find_nodes(op="output")[0] for g in (gm, after)]
    assert output[0].meta == output[1].meta
    assert len(output[0].args[0]) == len(output[1].args[0])


def test_parameters_are_shared():
    """An exported module holds them itself."""
    norm_layer = nn.RMSNorm(8, eps=1e-6)
    gm = torch.export.export(norm_layer, (torch.randn(4, 8),)).module()
    report = rewrite(gm)
    assert report.counts == {"rms_norm": 1}
    assert report.graphs[0].after.weight is gm.weight


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(8, eps=1e-6), nn.RMSNorm(8, eps=1e-6)])

    def forward(self, x):
        for layer in self.norms:
            x = layer(x).to(torch.bfloat16)
        return F.silu(x) * x


def test_replacements_carry_the_notes_of_what_they_replace():
    gm = capture(Model(), torch.randn(3, 8))
    report = rewrite(gm)
    after = report.graphs[0].after
    assert report.counts == {"rms_norm": 2, "swiglu": 1}, report
    old = {n.name for n in gm.graph.nodes}
    made = [n for n in after.graph.nodes if n.name not in old]
    assert len(our_calls(after)) == 3 and set(our_calls(after)) <= set(made)
    originals = [n for n in gm.graph.nodes if n.target in (torch.rms_norm, F.rms_norm) or n.name.startswith("mul")]
    for node, original in zip(our_calls(after), originals, strict=True):
        assert node.meta["stack_trace"] == original.meta["stack_trace"]
        assert node.meta.get("nn_module_stack") == original.meta.get("nn_module_stack")
        assert node.meta["liger_pattern"] in ("rms_norm", "swiglu")
    for node in made:
        value, run_again = node.meta["example_value"], node.meta.get("stack_trace")
        assert isinstance(value, FakeTensor) and run_again
    norms = [n for n in our_calls(after) if "rms_norm" in n.name]
    assert [list(n.meta["nn_module_stack"].values())[-1][1] for n in norms] == [nn.RMSNorm] * 2
    values = [n.meta["example_value"] for n in our_calls(after)]
    assert [v.dtype for v in values] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert [m.module for m in report.matches] == ["norms.0", "norms.1", ""]


def test_example_values_are_what_the_graph_computes():
    """Shape, dtype and strides of every node of a rewritten graph, against a run of it."""
    args = operands(torch.bfloat16)
    gm = capture(everything, *args)
    after = rewrite(gm).graphs[0].after
    seen = 0

    class Check(fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            expected = n.meta.get("example_value")
            if n.op.startswith("call") and isinstance(result, torch.Tensor):
                nonlocal seen
                seen += 1
                assert (result.shape, result.dtype, result.stride()) == (
                    tuple(expected.shape),
                    expected.dtype,
                    expected.stride(),
                ), n
            return result

    names = [n.name for n in after.graph.find_nodes(op="placeholder")]
    order = {"x": 0, "w": 1, "c": 2, "s": 3, "head": 4, "y": 5}
    Check(after).run(*(args[order[name.strip("_").removeprefix("l_").strip("_")]] for name in names))
    assert seen >= 4


def test_rewriting_twice_finds_nothing_new():
    after = rewrite(capture(everything, *operands())).graphs[0].after
    before = snapshot(after)
    again = rewrite(after)
    assert not again.counts and not again.misses and again.graphs[0].after is after
    assert snapshot(after) == before


def test_every_replacement_once_where_values_are_shared():
    """The same norm twice in a graph is two calls; one norm read twice is one."""
    x, w = operands()[:2]
    assert rewritten_like_eager(lambda x, w: norm(x, w) + norm(x, w), x, w).counts == {"rms_norm": 2}

    def twice(x, w):
        y = norm(x, w)
        return y + y.sin()

    assert rewritten_like_eager(twice, x, w).counts == {"rms_norm": 1}


def test_operand_in_the_layout_that_was_read():
    """The same values are there in two layouts, of which the first would give another result's strides."""

    def function(x, w, c, s):
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        return (x * c + half(x) * s).as_strided((6, 8), (1, 6))

    def written(x, w, c, s):
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        y = x * c + half(x) * s
        x.zero_()
        return y.as_strided((6, 8), (1, 6))

    for each in (function, written):
        report = rewritten_like_eager(each, *operands()[:4])
        assert report.counts == ({"rope": 1} if each is function else {}), report


# ---- ATen graphs and exported modules -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_aten_graph(dtype):
    x, w, c, s = (t.detach() for t in operands(dtype)[:4])

    def function(x, w, c, s):
        x = norm(x, w)
        x = F.silu(x) * (x + 1)
        return x * c + half(x) * s

    gm = make_fx(function, tracing_mode="fake")(x, w, c, s)
    report = rewrite(gm)
    assert report.counts == {"rms_norm": 1, "swiglu": 1, "rope": 1}, report
    assert relative_error(report.graphs[0].after(x, w, c, s), function(x, w, c, s)) < 1e-6


def test_exported_module():
    """It takes and returns trees, and so does the rewritten one."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.RMSNorm(8, eps=1e-6)

        def forward(self, inputs):
            y = self.norm(inputs["x"])
            return {"y": F.silu(y) * inputs["up"]}

    layer, inputs = Layer(), {"x": torch.randn(4, 8), "up": torch.randn(4, 8)}
    gm = torch.export.export(layer, (inputs,)).module()
    report = rewrite(gm)
    assert report.counts == {"rms_norm": 1, "swiglu": 1}, report
    result = report.graphs[0].after(inputs)
    assert list(result) == ["y"] and relative_error(result["y"].detach(), layer(inputs)["y"].detach()) < 1e-6


# ---- bodies of higher-order operations ------------------------------------------------------------------------------


def test_checkpointed_body():
    def function(x, w, c, s, head, y):
        x = checkpoint(lambda x, w: F.silu(norm(x, w)) * x, x, w, use_reentrant=False)
        x = checkpoint(lambda x: x * c + half(x) * s, x, use_reentrant=False)
        return F.cross_entropy(F.linear(x, head).float(), y)

    report = rewritten_like_eager(function, *operands())
    assert report.counts == ALL, report
    bodies = [m for name, m in report.graphs[0].after.named_modules() if name.startswith("wrap_body")]
    assert [len(our_calls(b)) for b in bodies] == [2, 1]


def test_nested_checkpoints():
    def inner(x, w):
        return norm(x, w) + 1

    def outer(x, w):
        return checkpoint(inner, F.silu(x) * x, w, use_reentrant=False)

    report = rewritten_like_eager(lambda x, w: checkpoint(outer, x, w, use_reentrant=False), *operands()[:2])
    assert report.counts == {"rms_norm": 1, "swiglu": 1}, report


def test_loss_in_a_checkpointed_body_keeps_logits_that_are_read_outside():
    def body(x, head, y):
        logits = F.linear(x, head)
        return F.cross_entropy(logits, y), logits

    def function(x, head, y):
        loss, logits = checkpoint(body, x, head, y, use_reentrant=False)
        return loss + logits.square().mean()

    x, _, _, _, head, y = operands()
    report = rewritten_like_eager(function, x, head, y)
    assert not report.counts
    assert any("logits" in m.reason or "returned" in m.reason for m in report.misses), report


# ---- changes in place ------------------------------------------------------------------------------------------------


def constants():
    """Without gradients: autograd itself refuses most changes of what it needs."""
    return [t.detach() for t in operands()[:2]]


def factor(x):
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def add_between(x, w):
    x = x.clone()
    r = factor(x)
    x.add_(1)
    return w * (x * r)


def assign_between(x, w):
    x = x.clone()
    r = factor(x)
    x[..., 0] = 3
    return w * (x * r)


def view_written_between(x, w):
    x = x.clone()
    flat = x.view(-1)
    r = factor(x)
    flat.mul_(2)
    return w * (x * r)


def out_between(x, w):
    x = x.clone()
    r = factor(x)
    torch.add(w, 1, out=x[0])
    return w * (x * r)


def intermediate_written(x, w):
    """Up to the write it is a norm without a weight."""
    h = x * factor(x)
    h.mul_(2)
    return w * h


def weight_written_between(x, w):
    w = w.clone()
    y = x * factor(x)
    z = w * y
    w.add_(1)
    return z + w


def copied_then_written(x, w):
    """The copy is normalised after its source has changed; they are one term."""
    x = x * 2
    y = x.clone()
    x.add_(1)
    return norm(y, w) + x


def copied_then_copy_written(x, w):
    y = x.clone()
    z = norm(y, w)
    y.add_(1)
    return z + y


def written_before(x, w):
    x = x.clone()
    x.add_(1)
    return norm(x, w)


def written_after(x, w):
    x = x.clone()
    y = norm(x, w)
    x.add_(1)
    return y, x


def result_written(x, w):
    y = norm(x, w)
    y.add_(1)
    return y


def silu_in_place(x, w):
    g = x * 2
    return F.silu(g, inplace=True) * (x + w)


REFUSED = {
    add_between: r"x is add\(.*\) in one place and",
    assign_between: r"after setitem|changed in place by setitem",
    view_written_between: r"after mul_|changed in place by mul_",
    out_between: r"after add|changed in place by add",
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_change_in_between_is_refused(function):
    report = rewritten_like_eager(function, *constants())
    assert "rms_norm" not in report.counts, report
    reasons = [m.reason for m in report.misses if m.pattern == "rms_norm"]
    assert any(re.search(REFUSED[function], r) for r in reasons), reasons


@pytest.mark.parametrize(
    "function",
    [
        copied_then_written,
        intermediate_written,
        weight_written_between,
        copied_then_copy_written,
        written_before,
        written_after,
        result_written,
    ],
)
def test_change_before_or_behind_is_no_obstacle(function):
    assert rewritten_like_eager(function, *constants()).counts == {"rms_norm": 1}


def test_activation_in_place():
    assert rewritten_like_eager(silu_in_place, *constants()).counts == {"swiglu": 1}


def loss_in_place(change):
    """The loss of logits that `change` does something to; what it returns, if anything, is added or returned.

    Something else is rewritten in any case, so that it is never the graph as it was that is compared.
    """

    def function(x, head, y):
        x = F.silu(x) * (x + 1)
        logits = F.linear(x, head)
        other = change(logits, x)
        loss = F.cross_entropy(logits, y)
        return (loss, logits) if other is logits else loss if other is None else loss + other.sum()

    return function


def divide(z, x):
    z.div_(0.7)


def divide_view(z, x):
    z.view(-1).div_(0.7)


def add_a_column(z, x):
    z.add_(x.sum(-1, keepdim=True))


def divide_detached(z, x):
    z.detach().div_(0.7)


def divide_data(z, x):
    z.data.div_(0.7)


def divide_without_gradient(z, x):
    with torch.no_grad():
        z.div_(0.7)


def divide_and_assign(z, x):
    z.div_(0.7)
    z[:, 0] = 0


def divide_by_wider(z, x):
    z.div_(x.new_full((), 2, dtype=torch.float64).exp() * torch.ones_like(z, dtype=torch.float64))


def view_then_divide(z, x):
    view = z.view(-1)
    z.div_(0.7)
    return view


def divide_a_part(z, x):
    z[:3].div_(0.7)


def divide_a_copy_too(z, x):
    copy = z.clone()
    copy.mul_(3)
    z.div_(0.7)
    return copy


CHANGES = {
    # what happens to logits before their loss, and whether this is rewritten
    "divided": (divide, True),
    "divided and returned": (lambda z, x: z.div_(0.7), True),
    "divided and read again": (lambda z, x: z.div_(0.7).square(), False),
    "read and divided": (lambda z, x: (z.sum(), z.div_(0.7))[0], False),
    "divided in a view": (divide_view, False),
    "added to": (add_a_column, False),
    "a part": (divide_a_part, False),
    "divided and multiplied": (lambda z, x: z.div_(30).mul_(7), False),
    "and assigned to": (divide_and_assign, False),
    "detached": (divide_detached, False),
    "data": (divide_data, False),
    "without gradient": (divide_without_gradient, False),
    "by a wider dtype": (divide_by_wider, False),
    "after a view": (view_then_divide, False),
    "and a copy": (divide_a_copy_too, False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_step_in_place(name):
    change, matched = CHANGES[name]
    x, _, _, _, head, y = operands()
    report = rewritten_like_eager(loss_in_place(change), x, head, y)
    assert report.counts == {"swiglu": 1} | ({"linear_cross_entropy": 1} if matched else {}), report


@pytest.mark.parametrize("dtype, matched", [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_a_step_in_place_under_autocast(dtype, matched):
    """Not in place, autocast computes it in float32."""

    def function(x, w):
        y = F.silu(x) * (x + w)
        with torch.autocast("cpu", torch.bfloat16):
            factor = x.pow(2).mean(-1, keepdim=True).to(x.dtype)
            factor.add_(1e-6).rsqrt_()
            return y + w * (x * factor)

    report = rewritten_like_eager(function, *operands(dtype)[:2], tolerance=1e-2 if dtype is torch.bfloat16 else 1e-5)
    assert report.counts == {"swiglu": 1} | ({"rms_norm": 1} if matched else {}), report


def input_in_place(x, w):
    x.mul_(2)
    return F.silu(x) * (x + w)


def view_of_input_in_place(x, w):
    x.view(-1).mul_(2)
    return F.silu(x) * (x + w)


def activation_of_input_in_place(x, w):
    return F.silu(x, inplace=True) * (x + w)


def input_in_place_later(x, w):
    y = F.silu(x) * w
    x.add_(1)
    return y


@pytest.mark.parametrize(
    "function", [input_in_place, view_of_input_in_place, activation_of_input_in_place, input_in_place_later]
)
def test_inputs_are_changed_as_before(function):
    rewritten_like_eager(function, *constants())


def test_an_activation_of_an_input_in_place_is_told():
    (miss,) = rewritten_like_eager(activation_of_input_in_place, *constants()).misses
    assert "l_x_ after silu where the pattern has silu(gate)" in miss.reason


def test_operand_that_a_custom_op_may_write_to():
    def function(x, w):
        x = x.clone()
        r = factor(x)
        torch.ops.aten.add_.Tensor(x, torch.ones_like(x))
        return w * (x * r)

    assert not rewritten_like_eager(function, *constants()).counts


# ---- grad, autocast and functorch regions ----------------------------------------------------------------------------


def test_no_grad_region():
    def function(x, w):
        with torch.no_grad():
            a = norm(x, w)
        return a * norm(x, w) + norm(a, w)

    report = rewritten_like_eager(function, *operands()[:2])
    assert report.counts == {"rms_norm": 3}, report  # the same maths in two regions are two calls


def test_pattern_across_the_border_of_a_no_grad_region():
    def function(x, w):
        with torch.no_grad():
            r = factor(x)
        return w * (x * r)

    assert not rewritten_like_eager(function, *operands()[:2]).counts


def test_enable_grad_inside_no_grad():
    def function(x, w):
        with torch.no_grad():
            a = norm(x, w)
            with torch.enable_grad():
                b = norm(x, w)
        return a + b

    assert rewritten_like_eager(function, *operands()[:2]).counts == {"rms_norm": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_region(dtype):
    def function(x, w, c, s, head, y):
        with torch.autocast("cpu", torch.bfloat16):
            x = F.linear(norm(x, w), head.t() @ head)
            x = F.silu(x) * (x + 1)
            x = x * c + half(x) * s
            return F.cross_entropy(F.linear(x, head), y)

    report = rewritten_like_eager(function, *operands(dtype), tolerance=2e-2)
    assert report.counts == ALL, report


@pytest.mark.parametrize("upcast", [False, True], ids=["", "upcast"])
def test_a_loss_outside_of_its_heads_autocast(upcast):
    def function(x, head, y):
        with torch.autocast("cpu", torch.bfloat16):
            logits = F.linear(x, head)
        return F.cross_entropy(logits.float() if upcast else logits, y)

    x, _, _, _, head, y = operands()
    report = rewritten_like_eager(function, x, head, y, tolerance=2e-2)
    assert report.counts == {"linear_cross_entropy": 1}, report


def test_a_norm_whose_statistics_alone_are_outside_of_autocast():
    def function(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            x = F.linear(x, w.diag())
            with torch.autocast("cpu", enabled=False):
                h = x.float()
                h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
            return (w * h).to(x.dtype)

    report = rewritten_like_eager(function, *operands()[:2], tolerance=2e-2)
    assert report.counts == {"rms_norm": 1}, report


def test_a_replacement_of_somebody_elses_across_the_border_of_an_autocast_region():
    """Autocast may do to it something else than it did to what it replaces."""

    def scores(q, k):
        return torch.softmax(F.linear(q, k), -1)

    def function(x, head):
        with torch.autocast("cpu", torch.bfloat16):
            z = F.linear(x, head)
        return torch.softmax(z, -1)

    x, _, _, _, head, _ = operands()
    ours = make_pattern(scores, lambda q, k: F.linear(q, k).softmax(-1), name="scores")
    report = rewritten_like_eager(function, x, head, options=Options(patterns=(ours,)))
    assert not report.counts
    assert [m.reason for m in report.misses] == ["z runs in another grad, autocast or functorch region"]


def test_autocast_switched_off_inside():
    """As models do around their rotations and norms."""

    def function(x, w, c, s, head, y):
        with torch.autocast("cpu", torch.bfloat16):
            x = F.linear(x, head.t() @ head)
            with torch.autocast("cpu", enabled=False):
                x = norm(x, w)
            return F.cross_entropy(F.linear(x, head), y) + (c * s).sum()

    report = rewritten_like_eager(function, *operands(), tolerance=2e-2)
    assert report.counts == {"rms_norm": 1, "linear_cross_entropy": 1}, report


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: torch.vmap(lambda r: norm(r, w))(x),
        lambda x, w: torch.func.grad(lambda r: norm(r, w).square().sum())(x),
    ],
    ids=["vmap", "grad"],
)
def test_functorch_region(function):
    x, w = (t.detach() for t in operands()[:2])
    gm = capture(function, x, w)
    report = rewrite(gm)
    assert report.graphs[0].after is gm
    assert [m.reason for m in report.misses] == ["runs inside a functorch transform (vmap, grad)"]


# ---- which pattern ---------------------------------------------------------------------------------------------------


def mine(name, function, check=None):
    return make_pattern(function, lambda x: x.clone(), check, name=name)


def wide(x):
    return x.sin().exp().cos()


def narrow(x):
    return x.sin().exp()


@pytest.mark.parametrize("order", [1, -1])
def test_the_widest_wins(order):
    both = (mine("narrow", narrow), mine("wide", wide))[::order]
    options = Options(enable=("narrow", "wide"), patterns=both)
    report = rewrite(capture(lambda x: (x.sin().exp().cos(), (x + 1).sin().exp() * 2), torch.randn(3)), options)
    assert [m.pattern for m in report.matches] == ["wide", "narrow"]
    assert not report.misses


def test_a_narrower_pattern_where_the_widest_is_refused():
    both = (mine("narrow", narrow), mine("wide", wide, check=lambda match: "not this one"))
    report = rewrite(capture(wide, torch.randn(3)), Options(enable=("narrow", "wide"), patterns=both))
    assert report.counts == {"narrow": 1}
    assert [m.reason for m in report.misses if m.pattern == "wide"] in ([], ["not this one"])


def test_a_check_that_fails():
    """Its match is left, with the error for a reason; others are made."""
    broken = make_pattern(lambda x: x.cosh(), lambda x: x.clone(), lambda match: match.shape("y"), name="broken")
    report = rewrite(
        capture(lambda x: (x.cosh(), x.sin().exp()), torch.randn(3)),
        Options(enable=("broken", "narrow"), patterns=(broken, mine("narrow", narrow))),
    )
    assert report.counts == {"narrow": 1}
    assert [m.reason for m in report.misses] == ["its check failed: KeyError: 'y'"]


def test_a_check_that_returns_something_else():
    broken = make_pattern(lambda x: x.cosh(), lambda x: x.clone(), lambda match: True, name="broken")
    report = rewrite(capture(lambda x: x.cosh(), torch.randn(3)), Options(enable=("broken",), patterns=(broken,)))
    assert not report.counts
    assert [m.reason for m in report.misses] == [
        "its check failed: TypeError: returned True; it gives a reason to leave the match, further operands or None"
    ]


def test_overlapping_matches_are_not_both_taken():
    """x.sin().exp() and exp().cos() share the exponential."""
    first, second = mine("first", narrow), mine("second", lambda x: x.exp().cos())
    report = rewrite(capture(wide, torch.randn(3)), Options(enable=("first", "second"), patterns=(first, second)))
    assert len(report.matches) == 1


def test_chained_matches():
    """The result of one replacement is the operand of the next."""

    def function(x, w):
        for _ in range(4):
            x = norm(x, w)
        return F.silu(x) * x

    assert rewritten_like_eager(function, *operands()[:2]).counts == {"rms_norm": 4, "swiglu": 1}


# ---- the report ------------------------------------------------------------------------------------------------------


def test_report():
    def function(x, w):
        y = norm(norm(x, w), w)
        return F.silu(y) * y, F.mish(x) * y

    report = rewrite(capture(function, *operands()[:2]))
    assert report.counts == {"rms_norm": 2, "swiglu": 1}
    assert [(m.pattern, m.module) for m in report.matches] == [("rms_norm", "")] * 2 + [("swiglu", "")]
    assert all(m.source.startswith("test_rewrite.py:") for m in report.matches)
    assert [m.replacement for m in report.matches] == ["liger_compile.rms_norm.default"] * 2 + [
        "liger_compile.glu.default"
    ]
    (miss,) = [m for m in report.misses if m.pattern == "swiglu"]
    assert "mish" in miss.reason and "F.mish(x) * y" in miss.source
    lines = str(report).splitlines()
    assert lines[0] == "liger_compile: 3 rewrites in 1 graph"
    assert any(line.split() == ["rms_norm", "2"] for line in lines)
    assert any(line.split()[:2] == ["swiglu", "1"] and "mish" in line and "test_rewrite.py" in line for line in lines)


def test_report_of_nothing():
    report = rewrite(capture(lambda x: x + 1, torch.randn(3)))
    assert str(report) == "liger_compile: 0 rewrites in 1 graph" and report.counts == {}


def test_reports_merge():
    report = Report()
    for _ in range(2):
        report.merge(rewrite(capture(norm, *operands()[:2])))
    assert report.counts == {"rms_norm": 2} and len(report.graphs) == 2
    assert str(report).startswith("liger_compile: 2 rewrites in 2 graphs")
    assert str(report).count("rms_norm") == 1


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(
    "like",
    [
        lambda x, other: x.type_as(other),
        lambda x, other: x.to(other),
        lambda x, other: x.view_as(other),
        lambda x, other: x.reshape_as(other),
        lambda x, other: x.expand_as(other),
    ],
)
def test_what_gives_a_dtype_or_a_shape_alone_is_no_part_of_a_match(like, used):
    def function(g, u, other):
        return like(F.silu(g), other) * u, other.exp() if used else u

    g, u, other = torch.randn(3, 4, 6)
    report = report_of(function, g, u, other)
    assert report.counts == {"swiglu": 1}, report
    inputs = [n.name for n in report.graphs[0].after.graph.nodes if n.op == "placeholder"]
    assert len(inputs) == 3, inputs


def test_a_linear_layer_of_two_dtypes():
    """Eager raises an error, and so does what is left."""
    h, w, y = torch.randn(6, 8), torch.randn(11, 8, dtype=torch.float64), torch.randint(11, (6,))
    reports = []
    with pytest.raises(RuntimeError, match="same dtype"):
        torch.compile(lambda h, w, y: F.cross_entropy(F.linear(h, w), y), backend=rewritten(reports))(h, w, y)
    assert not reports[0].counts
