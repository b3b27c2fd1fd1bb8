"""What a replacement promises on a pattern's examples is compared when the pattern is made: an op with a wrong fake."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from liger_compile import PatternError, make_pattern, pattern, register_pattern, trial
from liger_compile.registry import patterns

NUMBERS = itertools.count()


def softplus_rows(x):
    return torch.log1p(x.exp()).sum(-1)


def halves(x):
    return x.sin().exp(), x.cos().exp()


def turned(x):
    return x.sin().exp().transpose(-1, -2)


def examples(make, rows):
    yield {"x": make(rows, 6)}
    yield {"x": make(2, rows, 6)}


def op_with_fake(fake, returns=Tensor):
    """An op of one tensor with this fake, and nothing behind it: no data is ever computed."""

    def body(x: Tensor):
        raise AssertionError("computed something")

    body.__annotations__["return"] = returns
    op = torch.library.custom_op(f"liger_trial::op{next(NUMBERS)}", body, mutates_args=())
    if fake is not None:
        op.register_fake(fake)
    return op


def rows_like(x):
    return x.new_empty(x.shape[:-1])


RIGHT = [
    (softplus_rows, rows_like, Tensor),
    (softplus_rows, lambda x: x.new_empty(x.shape[:-1], dtype=torch.float32), Tensor),  # rounded behind the op
    (halves, lambda x: (torch.empty_like(x), torch.empty_like(x)), tuple[Tensor, Tensor]),
    (turned, lambda x: torch.empty_like(x).transpose(-1, -2), Tensor),
]


@pytest.mark.parametrize("function, fake, returns", RIGHT, ids=range(len(RIGHT)))
def test_a_right_fake(function, fake, returns, registered):
    made = register_pattern(function, op_with_fake(fake, returns), examples=examples)
    assert registered[-1] is made


WRONG = [
    # function, fake, what the op returns, what the message says
    (
        softplus_rows,
        torch.empty_like,
        Tensor,
        r"pattern 'softplus_rows' \(.*test_trial\.py:\d+\): the replacement liger_trial\.op\d+\.default: result 0 has "
        r"another shape on its example 0 in float32: its fake says \(5, 6\), the pattern's function gives \(5,\); "
        r"correct its fake \(register_fake\), or what it returns",
    ),
    (
        softplus_rows,
        lambda x: x.new_empty(5),
        Tensor,
        r"another shape on its example 1 in float32: its fake says \(5,\), the pattern's function gives \(2, 5\)",
    ),
    (
        softplus_rows,
        lambda x: x.new_empty(x.shape[:-1], dtype=torch.int64),
        Tensor,
        r"another dtype on its example 0 in float32: its fake says torch.int64, .* gives torch.float32",
    ),
    (
        softplus_rows,
        lambda x: x.new_empty(x.shape[:-1], dtype=torch.bfloat16),
        Tensor,
        r"another dtype on its example 0 in float32: its fake says torch.bfloat16, .* gives torch.float32",
    ),
    (
        softplus_rows,
        lambda x: x.new_empty(x.shape[:-1], device="meta"),
        Tensor,
        r"another device .*: its fake says meta, the pattern's function gives (cpu|cuda:0)",
    ),
    (
        turned,
        lambda x: torch.empty_like(x).transpose(-1, -2).contiguous(),
        Tensor,
        r"another layout on its example 0 .*: its fake says strides \(5, 1\), the pattern's function gives strides "
        r"\(1, 6\)",
    ),
    (
        halves,
        lambda x: (torch.empty_like(x), x.new_empty(3)),
        tuple[Tensor, Tensor],
        r"result 1 has another shape .*: its fake says \(3,\)",
    ),
    (
        halves,
        torch.empty_like,
        Tensor,
        r"another number of results on its example 0 .*: its fake says 1, the pattern's function gives 2",
    ),
    (
        softplus_rows,
        None,
        Tensor,
        r"cannot be run on its example 0 in float32, on tensors without data, .*register_fake",
    ),
    (
        softplus_rows,
        lambda x, w: rows_like(x),
        Tensor,
        r"cannot be run .*TypeError: .*missing 1 required positional argument: 'w'.*a fake that takes these operands",
    ),
]


@pytest.mark.parametrize("function, fake, returns, message", WRONG, ids=range(len(WRONG)))
def test_a_wrong_fake(function, fake, returns, message, registered):
    before = list(registered)
    op = op_with_fake(fake, returns)
    with pytest.raises(PatternError, match=message):
        register_pattern(function, op, examples=examples)
    with pytest.raises(PatternError, match=message):
        pattern(replace=op, examples=examples)(function)
    with pytest.raises(PatternError, match=message):
        make_pattern(function, op, examples=examples)
    assert registered == before
    make_pattern(function, op)  # without examples nothing is run


def test_half_precision_is_tried_too():
    """A fake may be right for float32 alone."""

    def fake(x):
        return x.new_empty(x.shape[:-1], dtype=x.dtype if x.dtype is torch.float32 else torch.float16)

    with pytest.raises(PatternError, match=r"another dtype on its example 0 in bfloat16: its fake says torch\.float16"):
        make_pattern(softplus_rows, op_with_fake(fake), examples=examples)


def test_any_replacement_is_compared():
    def first_row(x):
        return x.sum(-1)

    with pytest.raises(PatternError, match=r"replacement first_row: result 0 has another shape .*: it gives \(5,\)"):
        make_pattern(lambda x: x.sin().exp(), first_row, examples=examples)

    with pytest.raises(PatternError, match=r"result 0 is None on its example 0 in float32; return tensors"):
        make_pattern(lambda x: x.sin().exp(), lambda x: None, examples=examples)


def raising(make, rows):
    yield {"x": make(rows, 6).no_such_thing()}


def of_one_argument(make):
    yield {"x": make(3)}


EXAMPLES = [
    (lambda make, rows: [make(3)], r"an example lacks the operand 'x'; yield dictionaries of all operands by name"),
    (lambda make, rows: [{"y": make(3)}], r"an example lacks the operand 'x'"),
    (lambda make, rows: [], r"none of its examples can be computed by it: there are none; yield operands that fit"),
    (lambda make, rows: [{"x": None}], r"none of its examples .*: AttributeError: 'NoneType' object has no"),
    (raising, r"examples\(make, rows\) raises AttributeError: .*no_such_thing.*a tensor factory make\(\*shape\)"),
    (of_one_argument, r"examples\(make, rows\) raises TypeError: .*takes 1 positional argument"),
]


@pytest.mark.parametrize("examples, message", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_that_cannot_be_used(examples, message):
    with pytest.raises(PatternError, match=message):
        make_pattern(softplus_rows, op_with_fake(rows_like), examples=examples)


def test_examples_for_other_spellings_are_passed_over():
    def mixed(make, rows):
        yield {"x": make(3, 4), "w": make(7)}
        yield {"x": make(3, 4), "w": make.constant(4)}

    made = make_pattern(lambda x, w: x.sin() * w, lambda x, w: x.cos() * w, examples=mixed)
    assert made.examples is mixed


def test_the_factory():
    seen = []

    def examples(make, rows):
        seen.append((make(2, rows), make.constant(3), make.integers(9, 2), torch.device(make.device)))
        yield {"x": make(rows, 2)}

    state = torch.get_rng_state()
    make_pattern(lambda x: x.sin().exp(), lambda x: x.clone(), examples=examples)
    assert torch.equal(torch.get_rng_state(), state)  # no random numbers are drawn
    assert [s[0].dtype for s in seen] == [torch.float32, torch.bfloat16]
    for values, constant, integers, device in seen:
        assert values.requires_grad and not constant.requires_grad and integers.dtype is torch.int64
        assert values.shape == (2, trial.ROWS) and values.device.type == device.type


def test_shipped_patterns_are_not_tried_at_import(monkeypatch):
    """They are below, once; importing them must stay quick."""
    tried = []
    monkeypatch.setattr(trial, "check_results", tried.append)

    def body(x):
        return x.sin().exp()

    body.__module__ = "liger_compile.patterns.mine"
    make_pattern(body, lambda x: x.clone(), examples=examples)
    assert not tried
    body.__module__ = "elsewhere"
    made = make_pattern(body, lambda x: x.clone(), examples=examples)
    assert tried == [made]


@pytest.mark.parametrize("shipped", patterns(), ids=lambda p: f"{p.name}-{p.function.__name__}")
def test_shipped_patterns(shipped):
    trial.check_results(shipped, "cpu")
