"""Reading tensors of integers and truth values back from the graph: what is said is what is computed."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import capture
from torch import fx

from bench.reading import tabulate
from liger_compile import predicate as p
from liger_compile.elements import positions, read
from liger_compile.graph_terms import GraphTerms
from liger_compile.predicate import Unread
from liger_compile.views import settle

NAMES = "abcdefgh"


class Recorder(fx.Interpreter):
    def __init__(self, module):
        super().__init__(module)
        self.values, self.made = {}, {}

    def run_node(self, node):
        value = self.values[node] = super().run_node(node)
        self.made[node] = value.clone() if isinstance(value, torch.Tensor) else value  # without later writes
        return value

    def value_of(self, term, view):
        node = view.carriers[term][0]
        return (self.made if view.of[node] is term else self.values)[node]


def reading(function, *args):
    """What is read of a function's result; raises AssertionError if it is not the result, or not on the diagonal."""
    gm = capture(function, *args)
    settle(gm.graph)
    recorder = Recorder(gm)
    (actual,) = recorder.run(*args)
    view = GraphTerms.view(gm.graph)
    (result,) = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    names = NAMES[: actual.ndim]
    at = positions(view.of[result].shape, names)
    value = read(view, view.of[result], at)

    def table(v):
        return tabulate(v, tuple(actual.shape), names, lambda term: recorder.value_of(term, view))

    assert torch.equal(table(value).to(actual.dtype), actual), value
    if actual.ndim == 2:
        diagonal = p.substituted(value, p.Index("b", p.linear(actual.shape[1])), at[0])
        n = min(actual.shape)
        assert torch.equal(table(diagonal)[:n, 0].to(actual.dtype), actual.diagonal()), (value, diagonal)
    return value


def is_read(value):
    """Whether nothing in the value is an element of some tensor."""
    return "[" not in repr(value)


cols = torch.arange


def rows(n):
    return torch.arange(n)[:, None]


def pairs(function):
    """`function` of every row and column, as transformers makes a mask out of a function of positions."""
    return torch.vmap(torch.vmap(function, (None, 0)), (0, None))(cols(4), cols(6))


def overwritten(x, items, value):
    x = x.clone()
    x[items] = value
    return x.clone()


def turned(x, *methods):
    """Read before and after each method that changes its shape in place, and written to through another view."""
    first, results = x[0], [x * 2]
    for name, *args in methods:
        getattr(x, name)(*args)
        results.append(x + 1)
    first += 70
    results.append(x * 3)
    return torch.cat([r.flatten() for r in results])


def fill(x, where, value):
    return x.masked_fill(where(x), value)


def twice_written(x):
    y = x.clone()
    x += 3
    y *= 2
    x[2:] = 7
    return x + y


READ = {
    "arange": lambda x: cols(7),
    "arange from": lambda x: cols(3, 9),
    "arange by": lambda x: cols(1, 20, 3),
    "constants": lambda x: torch.full((2, 3), 4) + torch.ones(2, 3, dtype=torch.int64) - torch.zeros_like(cols(3)),
    "sum of positions": lambda x: cols(5) + rows(4) * 3 - 2,
    "remainder of a multiple": lambda x: (rows(4) * 8 + cols(8)) % 8,
    "quotient of a multiple": lambda x: (rows(4) * 8 + cols(8)) // 8,
    "quotient": lambda x: (cols(20) + 3) // 6,
    "negative quotient": lambda x: (cols(20) - 30) // 6,
    "negative remainder": lambda x: (cols(20) - 30) % 7,
    "view": lambda x: cols(24).view(2, 3, 4),
    "view back": lambda x: (rows(6) * 100 + cols(4)).reshape(3, 8),
    "view of three": lambda x: cols(24).view(4, 3, 2).reshape(2, 12),
    "flatten": lambda x: (rows(6) - cols(4)).flatten(),
    "transpose": lambda x: (rows(6) * 2 + cols(4)).t(),
    "permute": lambda x: cols(24).view(2, 3, 4).permute(2, 0, 1),
    "slices": lambda x: (rows(8) * 10 + cols(9))[1:7:2, 3:-1],
    "select": lambda x: (rows(8) * 10 + cols(9))[3],
    "last": lambda x: (rows(8) * 10 + cols(9))[:, -1],
    "new dimensions": lambda x: cols(5)[None, :, None] + cols(3),
    "expand": lambda x: cols(5)[:, None].expand(5, 4) + 0,
    "cat": lambda x: torch.cat((cols(3), cols(5) * 2, cols(2) + 40)),
    "cat with nothing": lambda x: torch.cat((cols(0), rows(5) + cols(6), rows(5) * 10, rows(5))[:2] * 2, 0),
    "cat of two dtypes": lambda x: torch.cat((torch.zeros(2), torch.ones(3, dtype=torch.int64))),
    "hstack": lambda x: torch.hstack((rows(5) + cols(6), rows(5) * 10)),
    "hstack of one dimension": lambda x: torch.hstack((cols(3), cols(4) * 2)),
    "hstack with no columns": lambda x: torch.hstack((torch.zeros(5, 0), torch.ones(5, 6).tril())),
    "chunk": lambda x: (rows(4) + cols(6)).chunk(2, -1)[1],
    "repeat_interleave": lambda x: cols(4).repeat_interleave(3, 0),
    "gather": lambda x: (cols(6) * cols(1)[0] + 2 * cols(6))[rows(3) + 1],
    "gather in two": lambda x: (rows(6) * 10 + cols(6))[rows(3), cols(5)],
    "gather behind new dimensions": lambda x: (rows(6) * 10 + cols(6))[None, None, cols(4) + 2],
    "gather before a new dimension": lambda x: (rows(6) * 10 + cols(6))[cols(4) + 2, None],
    "gather from the last dimension": lambda x: (rows(5) * 10 + cols(6))[..., cols(3)],
    "gather by an operator": lambda x: torch.ops.aten.index(rows(5) * 10 + cols(6), [None, cols(3)]),
    "diff": lambda x: torch.diff(cols(6) * 3),
    "diff with prepend": lambda x: torch.diff(cols(6), prepend=cols(1) - 1),
    "cumsum": lambda x: torch.ones(6, dtype=torch.int64).cumsum(0) * 2,
    "where": lambda x: torch.where(cols(6) > 3, cols(6) + 10, 0),
    "where as a method": lambda x: cols(6).where(cols(6) > 3, -cols(6)),
    "where of truth values": lambda x: (cols(6) > 1).where(cols(6) > 3, cols(6) < 2),
    "masked_fill": lambda x: cols(6).masked_fill(cols(6) % 2 == 0, -1),
    "masked_fill of one that was": lambda x: cols(6).masked_fill(cols(6) < 2, 9).masked_fill(cols(6) < 4, 7),
    "absolute": lambda x: (cols(6) - rows(5)).abs() * 2 + torch.abs(-cols(6)) + torch.absolute(cols(6) - 7),
    "absolute in place": lambda x: (cols(6) - rows(5)).abs_() > 1,
    "tril": lambda x: torch.ones(5, 6, dtype=torch.int64).tril(1) + torch.ones(5, 6, dtype=torch.int64).triu(-1),
    "and": lambda x: (cols(6) > 2) & (rows(6) < 4),
    "or": lambda x: (cols(6) > 2) | (rows(6) < 4) | (cols(6) == rows(6)),
    "xor": lambda x: (cols(6) > 2) ^ (rows(6) < 4),
    "equal truth values": lambda x: (cols(6) > 2) == (rows(6) < 4),
    "not": lambda x: ~((cols(6) > 2) & ~(rows(6) == cols(6))),
    "product of truth values": lambda x: (cols(6) > 2) * (rows(6) < 4),
    "sum of truth values": lambda x: (cols(6) > 2).int() + (rows(6) < 4).long(),
    "not equal": lambda x: cols(6) != rows(6),
    "always": lambda x: cols(6) - rows(6) < 6,
    "never": lambda x: cols(6) + rows(6) < 0,
    "vmap": lambda x: pairs(lambda i, j: (j <= i) & (j > 1)),
    "vmaps of vmaps": lambda x: pairs(lambda i, j: pairs(lambda a, b: i * 8 + a - b)[1, 2] + j),
    "vmaps one after another": lambda x: pairs(lambda i, j: i - j) + pairs(lambda i, j: 5 * j),
    "vmap over other dimensions": lambda x: torch.vmap(lambda c: c * 2 + cols(4), -1, 1)(rows(4) * 10 + cols(6)),
    "vmap of the same for all": lambda x: torch.vmap(lambda i: cols(3))(cols(4)),
    "gather in a vmap": lambda x: pairs(lambda i, j: torch.ops.aten.index(cols(24).view(6, 4), [j, i])),
    "in place": lambda x: cols(6).clone().add_(rows(1)[0]).mul_(3).masked_fill_(cols(6) == 2, 9),
    "truth values in place": lambda x: (cols(6) > 2).clone().logical_and_(cols(6) < 5).logical_not_(),
    "triangle in place": lambda x: torch.ones(5, 6, dtype=torch.int64).tril_(1),
    "filled": lambda x: cols(6).clone().fill_(4) + cols(6).clone().zero_(),
    "written to twice": lambda x: twice_written(cols(6)),
    "a range written to": lambda x: overwritten(cols(8), slice(2, -1), 5),
    "a block written to": lambda x: overwritten(rows(5) + cols(6), (slice(1, 3), slice(2)), cols(4)[2:] * 100),
    "a column written to": lambda x: overwritten(rows(5) + cols(6), (..., -1), cols(5) * 100),
    "a row written to": lambda x: overwritten(rows(5) + cols(6), 2, 7),
    "a mask written to": lambda x: overwritten(rows(5) + cols(6), rows(5) > cols(6), 70),
    "rows of a mask written to": lambda x: overwritten(rows(5) + cols(6), cols(5) > 2, cols(6) * 100),
    "columns of a mask written to": lambda x: overwritten(rows(5) + cols(6), (slice(1, 3), cols(6) > 2), 70),
    "a mask of a row written to": lambda x: overwritten(rows(5) + cols(6), (2, cols(6) > 2), 70),
    "a mask and a range written to": lambda x: overwritten(rows(5) + cols(6), (cols(5) > 2, slice(2, 4)), cols(2)),
    "a mask in the middle written to": lambda x: overwritten(cols(30).view(5, 3, 2), (..., cols(3) > 1, -1), 70),
    "index_put": lambda x: (rows(5) + cols(6)).index_put((rows(5) > cols(6),), torch.tensor(70)),
    "index_put in place": lambda x: (rows(5) + cols(6)).index_put_((rows(5) > cols(6),), torch.tensor(70)) + 1,
    "whole floats written to": lambda x: overwritten(cols(6), slice(2), 3.0),
    "truth values written to": lambda x: overwritten(rows(5) > cols(6), (slice(None), slice(1)), True),
    "unsqueezed in place": lambda x: torch.ones(5, 6).tril_().unsqueeze_(1) < 0.5,
    "transposed in place": lambda x: (rows(5) * 10 + cols(6)).transpose_(0, 1).t_().add_(1).swapaxes_(-1, 0) * 1,
    "squeezed in place": lambda x: (rows(5)[:, None] * 10 + cols(6)).squeeze_(1).mul_(2) + cols(6),
    "float choice in place": lambda x: torch.full((6, 6), -1e9).triu_(1).mul_(cols(6) > rows(6)),
    "float choice": lambda x: torch.where(cols(6) > rows(6), float("-inf"), 0.0),
    "float choice by itself": lambda x: fill(torch.ones(5, 6).triu(1), lambda m: m == 1, float("-inf")),
    "float choice by a part of it": lambda x: fill(torch.ones(5, 6).triu(1), lambda m: cols(6) > rows(5) + 2, -1e9),
    "logarithm": lambda x: torch.ones(5, 6).tril(1).log(),
    "logarithm of truth values": lambda x: torch.log(cols(6) > rows(5)),
    "logarithm in place": lambda x: torch.ones(5, 6).tril(1).log_() * 2,
    "float product": lambda x: (1.0 - (cols(6) <= rows(6)).float()) * -10000.0,
}


@pytest.mark.parametrize("name", READ)
def test_read(name):
    assert is_read(reading(READ[name], torch.zeros(1)))


ELEMENTS = {
    "an input": lambda x: x + cols(6),
    "gathered": lambda x: x[cols(3) * 2] == x[cols(3)][:, None],
    "a cumulative sum of data": lambda x: (x.cumsum(0) - cols(6)) > 0,
    "data in a mask": lambda x: (x > 3) & (cols(6) <= rows(6)),
    "sorted": lambda x: x.sort().values + 1,
    "positions that may be negative": lambda x: x[cols(4) - 2],
    "gathered from a row": lambda x: (rows(5) * 10 + cols(6))[2, cols(3)],
    "gathered where a dimension is between": lambda x: (rows(5) * 10 + cols(6))[cols(3), None, cols(3)],
    "bits": lambda x: (cols(6) & 3) + x,
    "narrow integers": lambda x: cols(6).to(torch.int8) + x,
    "integers that wrap around": lambda x: (1 - torch.full((6,), 2, dtype=torch.uint8)) > 0,
    "narrow data that may wrap around": lambda x: (x.to(torch.int8) * 64) > 0,
    "a product of positions": lambda x: cols(6) * rows(6) + x,
    "turned in place": lambda x: turned(
        rows(5) * 10 + cols(6), ("unsqueeze_", 1), ("transpose_", 0, -1), ("squeeze_",), ("t_",), ("swapdims_", 0, 1)
    ),
    "written in place": lambda x: x.clone().add_(1) + cols(6),
    "written to where data says": lambda x: overwritten(cols(6), x > 4, 3) + cols(6),
    "elements written to by number": lambda x: overwritten(cols(6), [0, 2], 7),
    "elements written to by tensor": lambda x: overwritten(cols(6), cols(3), 7),
    "two masks written to": lambda x: overwritten(rows(6) + cols(6), (cols(6) > 2, cols(6) > 2), 7),
    "an element of a mask for each row": lambda x: overwritten(rows(6) + cols(6), (slice(None), cols(6) > 2), rows(6)),
    "added to a mask": lambda x: cols(6).index_put((cols(6) > 2,), torch.tensor(7), accumulate=True),
    "rounded when written": lambda x: overwritten(cols(6), slice(2), 2.7),
    "data in a vmap": lambda x: pairs(lambda i, j: torch.ops.aten.index(x, [j]) > i),
    "data mapped over": lambda x: torch.vmap(lambda e: e + cols(4))(x),
}


@pytest.mark.parametrize("name", ELEMENTS)
def test_elements_of_what_is_not_known(name):
    assert not is_read(reading(ELEMENTS[name], torch.randint(0, 9, (6,))))


def test_what_differs_between_the_calls_of_a_vmap_is_no_element():
    """Of which tensor in the graph it is one, nobody could say."""
    with pytest.raises(Unread):
        reading(lambda x: pairs(lambda i, j: torch.stack((i, j)).sort().values[0]), torch.zeros(1))


@pytest.mark.parametrize(
    "function", [lambda x: x + cols(6), lambda x: cols(6).sqrt(), lambda x: cols(6) / 3], ids="abc"
)
def test_floating_point_stays_unread(function):
    with pytest.raises(Unread):
        reading(function, torch.rand(6))


# ---- random programs ----------------------------------------------------------------------------------------------


def integers(rng, depth):
    """A random function of positions: a tensor [4, 6] of integers, with the data x [4, 6] perhaps in it."""
    if depth == 0:
        return rng.choice(
            [
                lambda x: cols(6).expand(4, 6),
                lambda x: rows(4).expand(4, 6),
                lambda x: torch.arange(24).view(4, 6),
                lambda x: torch.arange(2, 50, 2).reshape(6, 4).t(),
                lambda x: x,
            ]
        )
    a, b, t = integers(rng, depth - 1), integers(rng, depth - 1), truths(rng, depth - 1)
    c, k = rng.randint(-3, 5), rng.randint(2, 5)
    return rng.choice(
        [
            lambda x: a(x) + b(x),
            lambda x: a(x) - b(x),
            lambda x: a(x) * c,
            lambda x: c - a(x),
            lambda x: a(x) // k,
            lambda x: a(x) % k,
            lambda x: torch.where(t(x), a(x), b(x)),
            lambda x: a(x).masked_fill(t(x), c),
            lambda x: a(x).reshape(3, 8).t().reshape(4, 6),
            lambda x: torch.cat((a(x)[:, 3:], b(x)[:, :3]), dim=-1),
            lambda x: a(x)[:, 2:4].repeat_interleave(3, dim=1),
            lambda x: torch.diff(a(x), prepend=b(x)[:, :1]),
            lambda x: a(x)[rows(4), (cols(6) + k) % 6],
            lambda x: t(x).long().cumsum(1),
            lambda x: a(x).tril(c) + b(x).triu(c),
            lambda x: a(x).clone().add_(b(x)).mul_(c),
            lambda x: overwritten(a(x), (slice(None), slice(1, 4)), c),
            lambda x: overwritten(a(x), (slice(2), ...), b(x)[2:]),
            lambda x: overwritten(a(x), t(x), c),
            lambda x: overwritten(a(x), (slice(1, 3), t(x)[0]), c),
            lambda x: torch.where(t(x), a(x).masked_fill(t(x), c), b(x)),
            lambda x: (a(x) - b(x)).abs(),
            lambda x: torch.hstack((a(x)[:, k:], b(x)[:, :k])),
            lambda x: a(x)[:, None, cols(6)].squeeze_(1),
            lambda x: torch.vmap(lambda column: column + k, 1, 1)(a(x)),
            lambda x: pairs(lambda i, j: torch.ops.aten.index(a(x), [i, j]) - j),
        ]
    )


def truths(rng, depth):
    if depth == 0:
        return rng.choice([lambda x: cols(6) <= rows(4), lambda x: x > 4, lambda x: (cols(6) > 2).expand(4, 6)])
    a, b = integers(rng, depth - 1), integers(rng, depth - 1)
    t, u = truths(rng, depth - 1), truths(rng, depth - 1)
    compare = rng.choice([torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge])
    return rng.choice(
        [
            lambda x: compare(a(x), b(x)),
            lambda x: t(x) & u(x),
            lambda x: t(x) | u(x),
            lambda x: t(x) ^ u(x),
            lambda x: ~t(x),
            lambda x: torch.where(t(x), u(x), a(x) > 2),
            lambda x: t(x) == u(x),
            lambda x: a(x).bool(),
        ]
    )


@pytest.mark.parametrize("seed", range(8))
def test_random_programs(seed):
    rng = random.Random(torch.initial_seed() + seed)
    fully = 0
    for _ in range(20):
        program = rng.choice([integers, truths])(rng, rng.randint(1, 4))
        fully += is_read(reading(program, torch.randint(0, 9, (4, 6))))
    assert fully >= 2, "hardly anything was read"


# ---- the algebra --------------------------------------------------------------------------------------------------

q, k = positions((24, 24), "qk")
n = p.linear(p.Size("n"))
LONG = p.index("i", n)


def test_order_of_writing_does_not_matter():
    below = p.at_least_zero(p.plus(q, k, -1))
    assert p.negation(p.negation(below)) == below
    assert p.conjunction(below, p.is_zero(p.plus(q, k, -1))) == p.conjunction(p.is_zero(p.plus(k, q, -1)), below)
    assert p.disjunction(below, p.negation(below)) is True
    assert p.conjunction(below, p.negation(below)) is False


def test_ranges():
    assert p.at_least_zero(p.plus(p.linear(23), q, -1)) is True
    assert p.at_least_zero(p.plus(p.linear(22), q, -1)) not in (True, False)
    assert p.at_least_zero(p.plus(q, p.linear(24), -1)) is False
    assert p.at_least_zero(p.plus(p.plus(n, LONG, -1), p.linear(-1))) is True  # n - 1 - i >= 0
    assert p.at_least_zero(p.plus(n, LONG, -2)) not in (True, False)
    assert p.quotient(q, 24) == p.linear(0) and p.remainder(q, 24) == q
    assert p.quotient(p.plus(p.scaled(q, 6), p.linear(5)), 6) == q


def test_stricter_bounds_win():
    below, near = p.at_least_zero(p.plus(q, k, -1)), p.at_least_zero(p.plus(p.plus(q, k, -1), p.linear(3)))
    assert p.conjunction(below, near) == below
    assert p.disjunction(below, near) == near
    assert p.conjunction(p.negation(near), below) is False
    assert p.disjunction(p.negation(below), near) is True
    assert p.conjunction(p.negation(below), near) not in (True, False)


def test_choices_by_what_is_known():
    below, near = p.at_least_zero(p.plus(q, k, -1)), p.at_least_zero(p.plus(p.plus(q, k, -1), p.linear(3)))
    padding = p.Truth(p.Element("x", (k,)))
    inner = p.choice(below, 1.0, 2.0)
    assert p.choice(below, 0.0, inner) == p.choice(below, 0.0, 2.0)
    assert p.choice(p.negation(below), inner, 0.0) == p.choice(p.negation(below), 2.0, 0.0)
    assert p.choice(near, 0.0, inner) == p.choice(near, 0.0, 2.0)  # what is below is near
    assert p.choice(p.conjunction(below, padding), inner, 0.0) == p.choice(p.conjunction(below, padding), 1.0, 0.0)
    assert p.choice(below, 0.0, p.choice(padding, inner, 3.0)) == p.choice(below, 0.0, p.choice(padding, 2.0, 3.0))
    for other in (padding, p.negation(near), p.conjunction(below, padding)):
        assert repr(inner) in repr(p.choice(other, 0.0, inner))


def test_one_position_for_another():
    below = p.at_least_zero(p.plus(q, k, -1))
    near = p.at_least_zero(p.plus(p.plus(k, q, -1), p.linear(8)))
    chunk = p.is_zero(p.plus(p.quotient(q, 16), p.quotient(k, 16), -1))
    document = p.is_zero(p.plus(p.linear(p.Element("x", (q,))), p.linear(p.Element("x", (k,))), -1))
    padding = p.negation(p.is_zero(p.linear(p.Element("y", (k,)))))
    position = p.Index("k", p.linear(24))

    def itself(*parts):
        return p.substituted(p.conjunction(*parts), position, q)

    assert itself(below, near, chunk, document) is True
    assert itself(below, padding) == p.negation(p.is_zero(p.linear(p.Element("y", (q,)))))
    assert itself(p.disjunction(padding, below)) is True
    assert itself(p.at_least_zero(p.plus(p.plus(q, k, -1), p.linear(-1)))) is False
