"""The gradient of an embedding's table: kernel, op, and what is rewritten."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, report_of, rewritten
from torch import nn

from liger_compile import Options, ops

op = importlib.import_module("liger_compile.ops.embedding")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(dy, ids, classes, padding_idx):
    weight = torch.zeros(classes, dy.shape[-1], dtype=torch.float64, device=dy.device, requires_grad=True)
    y = F.embedding(ids, weight, None if padding_idx < 0 else padding_idx)
    return torch.autograd.grad(y, weight, dy.double())[0]


IDS = {
    "random": lambda n, classes: torch.randint(classes, (n,)),
    "one": lambda n, classes: torch.full((n,), classes - 1),
    "few": lambda n, classes: torch.randint(3, (n,)),
    "runs": lambda n, classes: torch.arange(n) // 40 % classes,
    "each once": lambda n, classes: torch.randperm(n) % classes,
}


def check_kernel(device, dtype, ids, n, classes, width):
    ids = IDS[ids](n, classes).to(device)
    roundings = 4.0 if device == "cpu" and dtype is torch.bfloat16 else 1.01  # the interpreter truncates bfloat16
    dy = torch.randn(n, width, device=device).to(dtype)
    for padding_idx in (-1, int(ids[n // 2])):
        made = op._cuda(dy, ids, classes, padding_idx)
        truth = exact(dy, ids, classes, padding_idx)
        rounded = truth.to(dtype)
        assert made.dtype is dtype and made.shape == (classes, width)
        assert torch.equal(made == 0, rounded == 0)  # no row is missing, and none is written for nothing
        assert (made.double() - truth).norm() <= roundings * (rounded.double() - truth).norm() + 1e-6 * truth.norm()
        if device == "cuda":
            assert torch.equal(made, op._cuda(dy, ids, classes, padding_idx))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("ids", IDS)
def test_kernel(dtype, ids):
    """Runs within blocks of places, over some, and over many; a last block that is not full."""
    pytest.importorskip("triton")
    check_kernel("cuda" if torch.cuda.is_available() else "cpu", dtype, ids, 331, 60, 24)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("n, classes, width", [(8192, 128256, 4096), (65536, 32000, 576), (3001, 70, 1000)])
def test_kernel_at_size(dtype, ids, n, classes, width):
    check_kernel("cuda", dtype, ids, n, classes, width)


@pytest.mark.gpu
def test_nothing_else_of_the_tables_size():
    dy, ids = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16), torch.randint(128256, (8192,)).cuda()
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        dweight = op._cuda(dy, ids, 128256, -1)
        peak = torch.cuda.max_memory_allocated() - before
    assert dweight.nbytes <= peak < dweight.nbytes + 64 * 2**20


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    classes = 2**31 // 4096 + 10
    ids = torch.tensor([5, classes - 1, classes - 1, 3]).cuda()
    dy = torch.randn(4, 4096, device="cuda", dtype=torch.bfloat16)
    dweight = op._cuda(dy, ids, classes, -1)
    assert torch.equal(dweight[5], dy[0]) and torch.equal(dweight[-1], (dy[1].float() + dy[2].float()).bfloat16())
    assert torch.count_nonzero(dweight) == torch.count_nonzero(dweight[[3, 5, classes - 1]])


@pytest.mark.parametrize("shape", [(7,), (2, 5), (0,), ()])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("padding_idx", [-1, 3])
def test_op(shape, dtype, padding_idx):
    weight = torch.randn(10, 8, requires_grad=True)
    ids = torch.randint(10, shape).to(dtype)
    y = ops.embedding(ids, weight, padding_idx)
    expected = F.embedding(ids, weight, None if padding_idx < 0 else padding_idx)
    assert torch.equal(y, expected)
    for dy in (torch.randn_like(y), torch.ones(()).expand_as(y)):
        ours, eager = (torch.autograd.grad(r, weight, dy, retain_graph=True)[0] for r in (y, expected))
        torch.testing.assert_close(ours, eager)


def test_second_derivative():
    weight, ids = torch.randn(10, 8, dtype=torch.float64, requires_grad=True), torch.tensor([1, 3, 3, 9])
    assert torch.autograd.gradgradcheck(lambda w: ops.embedding(ids, w, 9).sin(), weight)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.embedding(torch.tensor([1]), torch.randn(4)), r"weight is torch.float32\[4\], needs \[V, H\]"),
        (lambda: ops.embedding(torch.tensor([1.0]), torch.randn(4, 2)), r"ids are torch.float32, need int64 or int32"),
        (lambda: ops.embedding(torch.tensor([1]), torch.randn(4, 2), 4), r"padding_idx 4 is not a row of weight \[4"),
    ],
)
def test_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_id_outside_the_table_is_an_error():
    with pytest.raises(IndexError):
        ops.embedding(torch.tensor([4]), torch.randn(4, 2, requires_grad=True))


# ---- the pattern ---------------------------------------------------------------------------------------------------


def table(dtype=torch.bfloat16):
    return torch.randn(10, 8, dtype=dtype, requires_grad=True)


@pytest.fixture
def of_any_size(monkeypatch):
    monkeypatch.setattr("liger_compile.patterns.embedding.LEAST", 0)


SPELLINGS = {
    "functional": lambda ids, w: F.embedding(ids, w),
    "keywords": lambda ids, w: F.embedding(weight=w, input=ids, padding_idx=None),
    "padding": lambda ids, w: F.embedding(ids, w, 3),
    "padding from behind": lambda ids, w: F.embedding(ids, w, -2),
    "scaled": lambda ids, w: F.embedding(ids, w) * 8.0,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name, of_any_size):
    weight, ids, reports = table(), torch.tensor([[1, 3, 8], [3, 3, 9]]), []
    compiled = torch.compile(SPELLINGS[name], backend=rewritten(reports, "aot_eager"))
    ours, eager = (torch.autograd.grad(f(ids, weight).sin().sum(), weight)[0] for f in (compiled, SPELLINGS[name]))
    assert reports[0].counts == {"embedding": 1}
    torch.testing.assert_close(ours, eager)


def test_module(of_any_size):
    model = nn.Embedding(10, 8, padding_idx=0).bfloat16()
    report = report_of(model, torch.tensor([0, 4]))
    assert report.counts == {"embedding": 1}


@pytest.mark.parametrize("how", [{"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}], ids=str)
def test_other_gradients_are_left(how, of_any_size):
    weight = table()
    report = report_of(lambda ids, w: F.embedding(ids, w, **how), torch.tensor([0, 4]), weight)
    assert not report.counts


def test_small_tables_are_left_with_the_reason():
    weight = table()
    report = report_of(lambda ids, w: F.embedding(ids, w), torch.tensor([0, 4]), weight)
    assert not report.counts and "a table as small as [10, 8]" in report.misses[0].reason


def test_wide_tables_are_left_with_the_reason(of_any_size):
    """Inductor's needs no other table then, and atomics on one are as fast as sorting."""
    report = report_of(lambda ids, w: F.embedding(ids, w), torch.tensor([0, 4]), table(torch.float32))
    assert not report.counts and "a table of torch.float32" in report.misses[0].reason


def test_any_table_on_request():
    weight, ids = table(torch.float32), torch.tensor([0, 4, 4])
    report = report_of(lambda ids, w: F.embedding(ids, w, 4), ids, weight, options=Options(select="always"))
    assert report.counts == {"embedding": 1}
    after = report.graphs[0].after
    (ours,) = torch.autograd.grad(after(ids, weight)[0].sum(), weight)
    assert ours[0].eq(1).all() and ours[1:].eq(0).all()


def test_tied_weights(of_any_size):
    """The table is the head's weight too: its gradient is the sum of both."""

    def loss(ids, w):
        return F.cross_entropy(F.linear(F.embedding(ids, w), w), ids)

    weight, ids, reports = table(), torch.randint(10, (30,)), []
    compiled = torch.compile(loss, backend=rewritten(reports, "aot_eager"))
    ours, eager = (torch.autograd.grad(f(ids, weight), weight)[0] for f in (compiled, loss))
    assert reports[0].counts == {"embedding": 1, "linear_cross_entropy": 1}
    exact = weight.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(loss(ids, exact), exact)
    assert relative_error(ours, exact) <= 1.05 * relative_error(eager, exact)
