"""Registering patterns: what works is found in a graph, what cannot work is refused with what to change."""

from __future__ import annotations

import functools
import math
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import capture, relative_error, rewritten
from torch import Tensor

from liger_compile import Options, PatternError, make_pattern, pattern, register_pattern, rewrite

# ---- refused ------------------------------------------------------------------------------------------------------


def one(x):
    return x


def two(x, w):
    return x


class Double(torch.autograd.Function):
    """Not what it replaces, so that a test sees whether it ran."""

    @staticmethod
    def forward(ctx, x, w, factor=2.0):
        ctx.save_for_backward(x, w)
        ctx.factor = factor
        return factor * x.sin() * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return ctx.factor * g * w * x.cos(), ctx.factor * g * x.sin(), None


class DoubleWithSetup(torch.autograd.Function):
    @staticmethod
    def forward(x, w, factor=2.0):
        return factor * x.sin() * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, ctx.factor = inputs
        ctx.save_for_backward(x, w)

    backward = Double.backward


def if_on_data(x):
    return x.exp() if x.sum() > 0 else -x


def if_on_size(x):
    return x.exp() if x.shape[-1] > 8 else -x


def if_on_dtype(x):
    return x.exp() if x.dtype == torch.float32 else -x


def if_on_dimensions(x):
    return x.exp() if x.ndim == 3 else -x


def while_on_data(x):
    while x.norm() > 1:
        x = x / 2
    return x


def loop_over_rows(x):
    for row in x:
        x = x + row
    return x


def unpacks_results(x):
    values, _ = x.exp().topk(2)
    return values


def if_any_size(x):
    return x.exp() if any(n == 1 for n in x.shape) else -x


def largest_of_two(x):
    return max(x.exp(), x)


def device_of_operand(x):
    return x.exp() + torch.arange(3, device=x.device)


def python_number_of_size(x):
    return x / math.sqrt(x.shape[-1])


def operand_read_for_its_dtype(x, w):
    return x.exp().to(w.dtype)


def unpacks_shape(x):
    _, width = x.shape
    return x / width


def shape_from_the_front(x):
    return x / x.shape[0]


def dimension_from_the_front(x):
    return x.softmax(-1) * x.sum(0)


def numpy_function(x):
    return np.exp(x)


def numpy_method(x):
    return torch.exp(x.numpy())


def item(x):
    return x * x.max().item()


def python_math(x):
    return x * math.sqrt(x.sum())


def in_place(x):
    return x.exp().add_(1)


def in_place_function(x):
    return F.silu(x, inplace=True) + 1


def out_argument(x):
    y = x.exp()
    return torch.add(x, 1, out=y)


def index_assignment(x):
    y = x.exp()
    y[..., 0] = 0
    return y


def tensor_made_inside(x):
    return x.exp() * torch.ones(3)


def tensor_made_of_a_size(x):
    return x.exp() * torch.arange(x.shape[-1])


def no_such_method(x):
    return x.exponential_linear()


def view_to_a_size(x):
    return x.view(-1, 3).exp()


def flattened_from_the_front(x):
    return x.flatten(1).exp()


def unflattened_in_threes(x):
    return x.unflatten(-1, (-1, 3)).exp()


def complex_of_anything(x):
    return torch.view_as_real(torch.view_as_complex(x.exp()) * 2)


def raises(x):
    raise KeyError("unheard of")


def returns_nothing(x):
    x.exp()


def returns_a_dictionary(x):
    return {"y": x.exp()}


def returns_its_operand(x):
    return x


def operand_never_used(x, w):
    return x.exp()


def operand_used_in_a_dead_branch(x, w):
    return x.exp() + (w if False else 1)


def starred(*xs):
    return xs[0].exp()


def keyword_without_values(x, *, eps):
    return x.exp() + eps


def keyword_of_any_value(x, *, eps: float = 1e-6):
    return x.exp() + eps


def exp(x):
    return x.exp()


def scaled(x, w):
    return x.exp() * w


def anything(**operands):
    return operands["x"]


REFUSED = [
    # function, replacement, further arguments, what the message says
    (if_on_data, one, {}, r"branches on call\(gt, .*sum.*\).*one pattern for each branch, or .* Literal"),
    (if_on_size, one, {}, r"branches on size\(x, -1\)"),
    (if_on_dtype, one, {}, r"branches on dtype\(x\)"),
    (if_on_dimensions, one, {}, r"reads \.ndim.*use check="),
    (while_on_data, one, {}, r"branches on"),
    (loop_over_rows, one, {}, r"loops over x or unpacks it.*x\.chunk\(n, dim=-1\)"),
    (unpacks_results, one, {}, r"loops over call\(topk, exp\(x\).*or unpacks it"),
    (if_any_size, one, {}, r"unpacks a shape.*x\.shape\[-1\]"),
    (largest_of_two, one, {}, r"branches on call\(gt, .*exp\(x\)"),
    (device_of_operand, one, {}, r"reads \.device.*use check="),
    (
        python_number_of_size,
        one,
        {},
        r"makes a Python number of size\(x, -1\).*x\.shape\[-1\] \*\* 0\.5 for math\.sqrt",
    ),
    (unpacks_shape, one, {}, r"unpacks a shape.*x\.shape\[-1\]"),
    (shape_from_the_front, one, {}, r"reads shape\[0\].*from the back"),
    (dimension_from_the_front, one, {}, r"from the front.*dim=-1"),
    (numpy_function, one, {}, r"passed to NumPy; write the pattern with torch functions"),
    (numpy_method, one, {}, r"uses \.numpy\(\), whose result is not a tensor"),
    (item, one, {}, r"uses \.item\(\), whose result is not a tensor"),
    (python_math, one, {}, r"makes a Python number of call\(sum, x.*torch functions"),
    (in_place, one, {}, r"writes to its operand with add_"),
    (in_place_function, one, {}, r"writes to its operand with silu"),
    (out_argument, one, {}, r"writes to its operand with add"),
    (index_assignment, one, {}, r"writes to its operand with \[\]"),
    (tensor_made_inside, one, {}, r"tensor made in the function; make it a parameter"),
    (tensor_made_of_a_size, one, {}, r"makes a tensor with arange; make it a parameter"),
    (no_such_method, one, {}, r"uses \.exponential_linear, which torch\.Tensor does not have"),
    (view_to_a_size, one, {}, r"a shape that a pattern cannot know"),
    (flattened_from_the_front, one, {}, r"flattens dimensions that a pattern cannot know.*use flatten\(-2\)"),
    (unflattened_in_threes, one, {}, r"a shape that a pattern cannot know.*use unflatten\(-1, \(-1, 2\)\)"),
    (complex_of_anything, one, {}, r"complex numbers of an unknown shape.*use x\.unflatten\(-1, \(-1, 2\)\)"),
    (raises, one, {}, r"cannot be traced: KeyError: 'unheard of'"),
    (returns_nothing, one, {}, r"must return a tensor, or a tuple of tensors, not None"),
    (returns_a_dictionary, one, {}, r"must return a tensor, .*not \{'y': exp\(x\)\}"),
    (returns_its_operand, one, {}, r"returns its parameter 'x' unchanged; leave it out of the results"),
    (operand_read_for_its_dtype, two, {}, r"of parameter 'w' only the size or dtype is used.*w: torch\.dtype"),
    (operand_never_used, two, {}, r"parameter 'w' has no part in the result; remove it"),
    (operand_used_in_a_dead_branch, two, {}, r"parameter 'w' has no part in the result"),
    (starred, one, {}, r"name each operand instead of \*xs"),
    (keyword_without_values, one, {}, r"'eps' needs an annotation Literal\[\.\.\.\]"),
    (keyword_of_any_value, one, {}, r"'eps' needs an annotation Literal\[\.\.\.\]"),
    (exp, two, {}, r"the replacement needs 'w', which is not an operand \(these are x\); rename it, fix it with funct"),
    (exp, two, {}, r"or give it a default if check= provides it"),
    (scaled, one, {}, r"the replacement does not take the operand 'w'; it takes x, and operands are given by name"),
    (scaled, torch.nn.Linear(3, 3), {}, r"replacement is a Linear, a module; give a function of its operands"),
    (torch.nn.Linear(3, 3), one, {}, r"function is a Linear, a module; give a function .* weight among them"),
    (exp, one, {"priority": "high"}, r"priority='high'; give a whole number"),
    (exp, anything, {}, r"the replacement does not take the operand 'x'"),
    (exp, functools.partial(two, v=3), {}, r"the replacement needs 'w'"),
    (scaled, functools.partial(two, 3), {}, r"fix arguments by name, not by position"),
    (exp, Double.apply, {}, r"the replacement needs 'w'"),
    (exp, torch.exp, {}, r"has no signature; wrap it in a function"),
    (exp, 3, {}, r"replacement=3 cannot be called"),
    (exp, None, {}, r"replacement=None cannot be called"),
    (3, one, {}, r"function=3 cannot be called"),
    (torch.exp, one, {}, r"pattern 'exp': has no signature; call it in a function"),
    (exp, one, {"check": "no"}, r"check='no' cannot be called"),
    (exp, one, {"examples": []}, r"examples=\[\] cannot be called"),
    (exp, one, {"effect": "much"}, r"effect='much' cannot be called"),
    (exp, one, {"name": ""}, r"name=''; give it a name"),
    (exp, one, {"name": 3}, r"name=3; give it a name"),
    (functools.partial(exp), one, {}, r"name=None; give it a name"),
]


@pytest.mark.parametrize(
    "function, replacement, rest, message",
    REFUSED,
    ids=[f"{i}-{getattr(r[0], '__name__', '')}" for i, r in enumerate(REFUSED)],
)
def test_refused(function, replacement, rest, message, registered):
    before = list(registered)
    with pytest.raises(PatternError, match=message):
        register_pattern(function, replacement, **rest)
    assert registered == before
    with pytest.raises(PatternError, match=message):
        make_pattern(function, replacement, **rest)


def test_the_message_says_where():
    with pytest.raises(PatternError) as error:
        make_pattern(if_on_data, one)
    line = if_on_data.__code__.co_firstlineno
    assert str(error.value).startswith(f"pattern 'if_on_data' ({__file__}:{line}): ")


def test_the_decorator_refuses_too(registered):
    before = list(registered)
    with pytest.raises(PatternError, match="branches on"):
        pattern(replace=one)(if_on_data)
    assert registered == before


# ---- accepted -----------------------------------------------------------------------------------------------------


def swapped(x):
    half = x.shape[-1] // 2
    return torch.cat((x[..., half:].sin(), x[..., :half]), -1)


def swapped_neighbours(x):
    return torch.stack((x[..., 1::2].sin(), x[..., 0::2]), -1).flatten(-2)


def joined(x):
    return x.unflatten(-1, (-1, 2)).exp().flatten(-2)


def by_views(x):
    pairs = x.view(*x.shape[:-1], -1, 2)
    return torch.stack((pairs[..., 1].sin(), pairs[..., 0]), -1).view(x.shape), pairs.exp().reshape(x.shape)


@pytest.mark.parametrize(
    "pattern, function, times",
    [
        (swapped, lambda x: swapped(x), 1),
        (swapped, lambda x: swapped(x[..., 2:10]) * x[..., 2:10], 1),
        (swapped, lambda x: swapped(x[..., 2:10][..., 1:7]) + x[..., 3:9], 1),
        (swapped, lambda x: torch.cat((x[..., 5:9].sin(), x[..., 2:6]), -1) * x[..., 2:10], 0),  # halves that overlap
        (swapped, lambda x: torch.cat((x[..., 6:10].sin(), x[..., 2:6]), -1), 0),  # the slice is nowhere in the graph
        (swapped_neighbours, lambda x: swapped_neighbours(x[..., 1:9]) * x[..., 1:9], 1),
        (swapped_neighbours, lambda x: torch.stack((x[..., 1:11:2].sin(), x[..., 0:10:2]), -1).flatten(-2), 0),
        (swapped_neighbours, lambda x: by_views(x)[0], 1),
        (swapped_neighbours, lambda x: by_views(x.view(3, 2, 2, 6))[0], 1),
        (joined, lambda x: by_views(x)[1], 1),
    ],
)
def test_slices_of_slices(pattern, function, times):
    made = make_pattern(pattern, lambda x: pattern(x))
    x = torch.randn(3, 2, 12)
    report = rewrite(capture(function, x), Options(patterns=(made,), enable=(pattern.__name__,)))
    assert report.counts.get(pattern.__name__, 0) == times, report.graphs[0].before.code
    (result,) = report.graphs[0].after(x)
    assert torch.equal(result, function(x))


def double(x, w):
    return 2 * x.sin() * w


def double_by(x, w, factor=1.0):
    return factor * x.sin() * w


@torch.library.custom_op("liger_test::double", mutates_args=())
def double_op(x: Tensor, w: Tensor) -> Tensor:
    return 2 * x.sin() * w


@double_op.register_fake
def _(x, w):
    return torch.empty_like(x)


double_op.register_autograd(
    lambda ctx, g: (2 * g * ctx.saved_tensors[1] * ctx.saved_tensors[0].cos(), 2 * g * ctx.saved_tensors[0].sin()),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def sine(x, w):
    return x.sin() * w


REPLACEMENTS = {
    "function": double,
    "partial": functools.partial(double_by, factor=2.0),
    "partial of partial": functools.partial(functools.partial(double_by, factor=1.0), factor=2.0),
    "custom op": double_op,
    "op packet": torch.ops.liger_test.double,
    "op overload": torch.ops.liger_test.double.default,
    "autograd function": Double.apply,
    "autograd function with setup_context": DoubleWithSetup.apply,
    "partial autograd function": functools.partial(Double.apply, factor=2.0),
}


@pytest.mark.parametrize("replacement", REPLACEMENTS.values(), ids=REPLACEMENTS.keys())
def test_every_kind_of_replacement(replacement):
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    options = Options(enable=("sine",), patterns=(make_pattern(sine, replacement),))
    report = rewrite(capture(sine, x, w), options)
    assert report.counts == {"sine": 1}, report
    (y,) = report.graphs[0].after(x, w)
    assert relative_error(y.detach(), 2 * sine(x, w).detach()) < 1e-6
    eager = torch.autograd.grad(2 * sine(x, w).sum(), (x, w))
    for ours, theirs in zip(torch.autograd.grad(y.sum(), (x, w)), eager, strict=True):
        assert relative_error(ours, theirs) < 1e-6


def found(function, replacement, graph, *args, **rest):
    made = make_pattern(function, replacement, name="mine", **rest)
    return rewrite(capture(graph, *args), Options(enable=("mine",), patterns=(made,)))


def test_comparisons_are_operations():
    def leaky(x):
        return torch.where(x > 0, x, 0.1 * x)

    def graph(y):
        return torch.where(y.gt(0), y, y * 0.1).sum()

    x = torch.randn(5)
    assert found(leaky, one, graph, x).counts == {"mine": 1}
    assert not found(leaky, one, lambda y: torch.where(y >= 0, y, y * 0.1), x).counts
    assert not found(leaky, one, lambda y: torch.where(y > 1, y, y * 0.1), x).counts


def test_equality_is_an_operation():
    def masked(x):
        return torch.where(x == 0, x, x.exp())

    x = torch.randn(5)
    assert found(masked, one, lambda y: torch.where(y == 0, y, y.exp()), x).counts == {"mine": 1}
    assert not found(masked, one, lambda y: torch.where(y != 0, y, y.exp()), x).counts


def test_choices_reach_the_replacement():
    seen = []

    def either(x, *, sine: Literal[True, False]):
        return x.sin().exp() if sine else x.cos().exp()

    def replace(x, sine):
        seen.append(sine)
        return x.clone()

    report = found(either, replace, lambda x: (x.sin().exp(), (x + 1).cos().exp()), torch.randn(3))
    assert report.counts == {"mine": 2} and seen == [True, False]


def test_scalars_are_operands():
    seen = []

    def powered(x, factor):
        return (x * factor).exp()

    def replace(x: Tensor, factor: float) -> Tensor:
        seen.append(factor)
        return x.clone()

    assert found(powered, replace, lambda x: (x * 3.5).exp(), torch.randn(3)).counts == {"mine": 1}
    assert seen == [3.5]


CONSTANTS = [
    # pattern, graph, captured
    (lambda x, n: x.sin() / n, lambda x: x.sin() / 3, 3),
    (lambda x, n: x.sin() / n, lambda x: x.sin() / x.shape[-1], 6),
    (lambda x, n: F.mse_loss(x.sin(), x, reduction=n), lambda x: F.mse_loss(x.sin(), x, reduction="sum"), "sum"),
    (lambda x, n: F.mse_loss(x.sin(), x, reduction=n), lambda x: F.mse_loss(x.sin(), x), "mean"),
    (lambda x, n: F.gelu(x.sin(), approximate=n), lambda x: F.gelu(x.sin(), approximate="tanh"), "tanh"),
    (lambda x, n: F.softmax(x.sin(), n), lambda x: F.softmax(x.sin(), -1), -1),
    (lambda x, n: F.leaky_relu(x.sin(), n), lambda x: F.leaky_relu(x.sin(), 0.3), 0.3),
    (lambda x, n: F.hardtanh(x.sin(), max_val=n), lambda x: F.hardtanh(x.sin(), max_val=2.5), 2.5),
]


@pytest.mark.parametrize("function, graph, value", CONSTANTS, ids=range(len(CONSTANTS)))
def test_constants_are_operands(function, graph, value):
    seen = []

    def replace(x, n):
        seen.append(n)
        return function(x, n)

    report = found(function, replace, graph, torch.randn(4, 6))
    assert report.counts == {"mine": 1} and seen == [value], report


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float32])
def test_a_dtype_is_an_operand(dtype):
    """Casting to the dtype a value has leaves no trace in a graph, and is found all the same."""

    def rounded(x, dtype: torch.dtype):
        return x.sin().to(dtype)

    x = torch.randn(3)
    report = found(rounded, lambda x, dtype: x.cos().to(dtype), lambda x: x.sin().to(dtype), x)
    assert report.counts == {"mine": 1}, report
    assert torch.equal(report.graphs[0].after(x)[0], x.cos().to(dtype))
    assert len(report.graphs[0].after.graph.nodes) == 3 + (dtype is x.dtype)  # no cast behind it, but for an idle one


def test_a_dtype_used_twice_is_the_same():
    def rounded(x, y, dtype: torch.dtype):
        return torch.softmax(x.sin(), -1, dtype=dtype) * y.sin().to(dtype)

    def graph(x, y, dtype):
        return torch.softmax(x.sin(), -1, dtype=torch.float16) * y.sin().to(dtype)

    x, y = torch.randn(2, 3)
    for dtype, count in ((torch.float16, {"mine": 1}), (torch.bfloat16, {})):
        report = found(rounded, lambda x, y, dtype: x.to(dtype), lambda x, y, d=dtype: graph(x, y, d), x, y)
        assert report.counts == count, report


def test_a_dtype_by_the_schema_of_an_op():
    @torch.library.custom_op("liger_test::rounded", mutates_args=())
    def op(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.cos().to(dtype)

    op.register_fake(lambda x, dtype: torch.empty_like(x, dtype=dtype))
    x = torch.randn(3)
    report = found(lambda x, dtype: x.sin().to(dtype), op, lambda x: x.sin().to(torch.float16), x)
    assert report.counts == {"mine": 1}, report
    assert torch.equal(report.graphs[0].after(x)[0], x.cos().half())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("by_check", [False, True], ids=["captured", "by check"])
def test_a_size_is_handed_to_the_replacement(dynamic, by_check):
    """With sizes that only the compiler knows, too."""

    def captured(x, n: int):
        return x.sin() / n

    def read(x):
        return x.sin() / x.shape[-1]

    def replace(x, n: int = 0):
        return x.cos() * n

    function, check = (read, lambda match: {"n": match.shape("x")[-1]}) if by_check else (captured, None)
    x = torch.randn(4, 6)
    gm = capture(read, x, dynamic=dynamic)
    made = make_pattern(function, replace, check, name="mine")
    report = rewrite(gm, Options(enable=("mine",), patterns=(made,)))
    assert report.counts == {"mine": 1}, report
    assert torch.equal(
        torch.compile(read, backend=rewritten(options=Options(patterns=(made,))), dynamic=dynamic)(x), x.cos() * 6
    )


def test_a_size_of_an_operand_that_the_graph_does_not_read():
    """Then the replacement's argument is read from the operand."""

    def replace(x, n: int = 0):
        return x.cos() * n

    made = make_pattern(exp, replace, lambda match: {"n": match.shape("x")[0]}, name="mine")
    reports = []
    compiled = torch.compile(exp, backend=rewritten(reports, options=Options(patterns=(made,))), dynamic=True)
    for rows in (4, 7):
        x = torch.randn(rows, 3)
        assert torch.equal(compiled(x), x.cos() * rows)
    assert [r.counts for r in reports] == [{"mine": 1}]


OPTIONAL = {
    "left out": lambda x, w, b: F.linear(x.sin(), w),
    "None": lambda x, w, b: F.linear(x.sin(), w, None),
    "there": lambda x, w, b: F.linear(x.sin(), w, b),
}


@pytest.mark.parametrize("graph", OPTIONAL.values(), ids=OPTIONAL.keys())
def test_an_optional_operand(graph):
    def layer(x, w, b: Tensor | None):
        return F.linear(x.sin(), w, b)

    def replace(x, w, b):
        return F.linear(x.cos(), w, b)

    x, w, b = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    there = graph is OPTIONAL["there"]
    report = found(layer, replace, graph, x, w, b)
    assert report.counts == {"mine": 1}, report
    (y,) = report.graphs[0].after(*((x, w, b) if there else (x, w)))
    assert torch.equal(y, F.linear(x.cos(), w, b if there else None))


def test_an_operand_that_is_not_optional():
    def layer(x, w, b: Tensor):
        return F.linear(x.sin(), w, b)

    def replace(x, w, b):
        return F.linear(x.cos(), w, b)

    x, w, b = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    assert not found(layer, replace, OPTIONAL["left out"], x, w, b).counts
    assert found(layer, replace, OPTIONAL["there"], x, w, b).counts == {"mine": 1}


def test_an_operand_used_twice_is_one_tensor():
    def gated(x):
        return x.sigmoid() * x.exp()

    x, y = torch.randn(2, 3)
    assert found(gated, one, lambda x, y: y.exp() * x.sigmoid(), x, x.clone()).counts == {}
    report = found(gated, one, lambda x, y: x.sigmoid() * y.exp(), x, y)
    assert not report.counts and [m.reason for m in report.misses] == ["x is l_x in one place and l_y in another"]
    assert found(gated, one, lambda x, y: y.exp() * y.sigmoid(), x, y).counts == {"mine": 1}


def test_what_a_loss_would_drop_is_there_for_other_patterns():
    """Less the rows' maxima, a linear layer's outputs are a term of their own; as a pattern's operand they are none."""

    def exponentials(x):
        return torch.exp(x - x.amax(-1, keepdim=True))

    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    assert found(exponentials, one, exponentials, x).counts == {"mine": 1}
    assert found(exponentials, one, lambda x: exponentials(F.linear(x, weight)), x).counts == {"mine": 1}


def test_a_number_used_twice_is_one_number():
    def scaled(x, n: float):
        return (x * n).exp() * n

    x = torch.randn(3)
    assert not found(scaled, lambda x, n: x.clone(), lambda x: (x * 2).exp() * 3, x).counts
    assert found(scaled, lambda x, n: x.clone(), lambda x: (x * 2).exp() * 2, x).counts == {"mine": 1}


OPERATORS = [
    lambda x, y: (x > 0) & (y > 0),
    lambda x, y: ~(x > 0) | (y > 1),
    lambda x, y: abs(x.sin() - y),
    lambda x, y: (x.sin() + y) // 2,
    lambda x, y: (x.sin() + y) % 3,
    lambda x, y: (x.sin() + y) / x.shape[-1] ** 0.5,
    lambda x, y: (x.exp().sum(-1) / x.shape[-1]) * y.sum(-1),
]


@pytest.mark.parametrize("function", OPERATORS, ids=range(len(OPERATORS)))
def test_python_operators(function):
    x, y = torch.randn(2, 4, 8)
    assert found(function, lambda x, y: function(x, y), function, x, y).counts == {"mine": 1}


def test_annotations_that_cannot_be_evaluated_say_nothing():
    def annotated(x: "OnlyForTypeCheckers"):  # noqa: F821, UP037
        return x.sin().exp()

    assert found(annotated, one, lambda x: x.sin().exp(), torch.randn(3)).counts == {"mine": 1}


def test_check_leaves_alone_with_its_reason():
    def check(match):
        return f"the width is {match.shape('x')[-1]}" if match.shape("x")[-1] > 3 else None

    report = found(exp, one, lambda x: x.exp(), torch.randn(3), check=check)
    assert report.counts == {"mine": 1}
    report = found(exp, one, lambda x: x.exp(), torch.randn(4), check=check)
    assert not report.counts and [m.reason for m in report.misses] == ["the width is 4"]


def test_a_replacement_of_another_shape_is_refused():
    report = found(exp, lambda x: x[:1], lambda x: x.exp(), torch.randn(3))
    assert not report.counts
    assert [m.reason for m in report.misses] == ["the replacement gives (1,) on cpu, the graph has (3,) on cpu"]


def pair(x):
    return x.sin(), x.cos()


MISMATCHED = [
    # function, replacement, what the report says
    (exp, lambda x: (x, x), "the replacement gives a tuple of 2 where the pattern gives one result"),
    (exp, lambda x: (x.clone(),), "the replacement gives a tuple of 1 where the pattern gives one result"),
    (exp, lambda x: None, "the replacement gives None, the graph has (3,) on cpu"),
    (exp, lambda x: x.half(), "the replacement gives torch.float16, the graph has torch.float32"),
    (exp, lambda x: x.to("meta"), "the replacement gives (3,) on meta, the graph has (3,) on cpu"),
    (pair, lambda x: x.clone(), "the replacement gives one result where the pattern gives a tuple of 2"),
    (pair, lambda x: (x + 1, x, x), "the replacement gives a tuple of 3 where the pattern gives a tuple of 2"),
]


@pytest.mark.parametrize("function, replacement, reason", MISMATCHED, ids=[m[2] for m in MISMATCHED])
def test_a_replacement_with_other_results_is_refused(function, replacement, reason):
    report = found(function, replacement, function, torch.randn(3))
    assert not report.counts and [m.reason for m in report.misses] == [reason]


def test_a_replacement_that_raises_is_refused():
    def refuse(x):
        raise ValueError("not this one")

    report = found(exp, refuse, lambda x: x.exp(), torch.randn(3))
    assert not report.counts
    assert "ValueError: not this one" in report.misses[0].reason


def test_several_results():
    def both(x):
        return x.sin(), x.cos().exp()

    def replace(x):
        return x + 1, x + 2

    x = torch.randn(3)
    report = found(both, replace, lambda x: x.cos().exp() * x.sin(), x)
    assert report.counts == {"mine": 1}, report
    assert torch.equal(report.graphs[0].after(x)[0], (x + 1) * (x + 2))


def test_functions_that_share_a_name_are_spellings_of_one_pattern(registered):
    count = len(registered)
    register_pattern(lambda x: x.sin().exp(), one, name="shared")
    register_pattern(lambda x: x.cos().exp(), one, name="shared")
    assert len(registered) == count + 2
    report = rewrite(capture(lambda x: (x.sin().exp(), x.cos().exp()), torch.randn(3)))
    assert report.counts == {"shared": 2}
    report = rewrite(capture(lambda x: (x.sin().exp(), x.cos().exp()), torch.randn(3)), Options(disable=("shared",)))
    assert not report.counts


def test_registering_changes_later_compilations(registered):
    def graph(x):
        return x.sin().exp().exp()

    x = torch.randn(3)
    assert not rewrite(capture(graph, x)).counts

    @pattern(replace=one)
    def sine_twice(x):
        return x.sin().exp().exp()

    assert callable(sine_twice) and torch.equal(sine_twice(x), graph(x))  # the function itself comes back
    assert registered[-1].name == "sine_twice"
    assert rewrite(capture(graph, x)).counts == {"sine_twice": 1}


def test_a_pattern_for_one_compilation_is_not_registered(registered):
    before = list(registered)
    make_pattern(exp, one)
    assert registered == before
