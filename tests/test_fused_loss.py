"""The fused loss in all its ways, against float64: interpreted at small sizes, on a GPU at real ones."""

from __future__ import annotations

import functools
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error

pytest.importorskip("triton")

module = import_module("liger_compile.ops.linear_cross_entropy")
fused = import_module("liger_compile.ops.fused_loss")
INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
ONE = torch.ones((), device=DEVICE)
gpu = pytest.mark.gpu
pytestmark = [] if INTERPRETED else [gpu]  # on a GPU, small ones are worth running too

WAYS = {
    # name: (reduction, memory, bytes of logits at a time)
    "packed": ("mean", "balanced", 1),
    "packed in one": ("sum", "balanced", 1 << 30),
    "rows kept": ("none", "balanced", 1 << 30),
    "rows again": ("none", "lean", 1),
}


@pytest.fixture(autouse=True)
def fused_everywhere(monkeypatch):
    """The fused road on this device, and fresh memory full of NaN, so that an element nobody writes shows."""
    monkeypatch.setattr(module, "_can_fuse", lambda hidden, weight, smoothing: hidden.dtype is torch.bfloat16)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    reduction, memory, budget = WAYS[request.param]
    monkeypatch.setitem(module.BUDGET, memory, budget)
    return {"reduction": reduction, "memory": memory}


two_ways = pytest.mark.parametrize("way", ["packed", "rows kept"], indirect=True)
"""Where the others would show nothing that these do not; interpreting takes long."""


def operands(n, width, classes, spread=1.0, bias=False, ignored=0.3, common=0.0):
    """hidden, weight, bias, target: logits with a standard deviation of `spread`."""
    hidden = torch.randn(n, width, device=DEVICE) + common * torch.randn(width, device=DEVICE)
    weight = torch.randn(classes, width, device=DEVICE) * spread / width**0.5
    made = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    made.append(torch.randn(classes, device=DEVICE).bfloat16().requires_grad_() if bias else None)
    target = torch.randint(classes, (n,), device=DEVICE)
    target[torch.rand(n, device=DEVICE) < ignored] = -100
    return *made, target


def eager(hidden, weight, bias, target, reduction="mean", factor=1.0, softcap=0.0, class_weight=None):
    z = F.linear(hidden, weight, bias)
    z = z if z.dtype is torch.float64 else z.float()
    z = z * factor
    z = softcap * torch.tanh(z / softcap) if softcap else z
    class_weight = None if class_weight is None else class_weight.to(z.dtype)
    return F.cross_entropy(z, target, weight=class_weight, reduction=reduction)


def ours(hidden, weight, bias, target, factor=1.0, **how):
    return module.linear_cross_entropy(hidden, weight, bias, target, scale=factor, **how)


def run(function, given, incoming, dtype=None):
    """The loss and its gradients, from operands of their own."""
    made = [g if g is None or dtype is None or not g.is_floating_point() else g.detach().to(dtype) for g in given]
    made = [
        m.detach().requires_grad_(g.requires_grad) if m is not None else None for m, g in zip(made, given, strict=True)
    ]
    loss = function(*made)
    wanted = [m for m in made if m is not None and m.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss, wanted, incoming.to(loss.dtype).expand_as(loss))


def check(given, incoming=None, **how):
    """Each error is at most 1.05 times eager's; interpreted, where bfloat16 is truncated, that of a few truncations."""
    memory = {"memory": how.pop("memory")} if "memory" in how else {}
    incoming = torch.tensor(0.37, device=DEVICE) if incoming is None else incoming
    exact = run(functools.partial(eager, **how), given, incoming, torch.float64)
    theirs = run(functools.partial(eager, **how), given, incoming)
    made = run(functools.partial(ours, **how, **memory), given, incoming)
    again = run(functools.partial(ours, **how, **memory), given, incoming) if not INTERPRETED else made
    for i, (o, a, t, x) in enumerate(zip(made, again, theirs, exact, strict=True)):
        assert torch.equal(o, a), f"result {i} differs from run to run"
        assert o.dtype is t.dtype and o.shape == t.shape and not o.isnan().any(), f"result {i}"
        allowed = max(1.5e-2 if INTERPRETED else 1.05 * relative_error(t, x), 2e-5 if i == 0 else 0)
        assert relative_error(o, x) <= allowed, f"result {i}: {relative_error(o, x)}, eager {relative_error(t, x)}"


# ---- small ----------------------------------------------------------------------------------------------------------


def test_ways(way):
    """Two chunks, blocks that are not full in any direction."""
    check(operands(200, 72, 530, bias=True, ignored=0.1), factor=0.5, softcap=3.0, **way)


def test_three_chunks(monkeypatch):
    monkeypatch.setitem(module.BUDGET, "balanced", 1)
    check(operands(300, 40, 260, ignored=0.0))


def test_dhidden_in_parts(way, monkeypatch):
    """As on a GPU with more multiprocessors than there are blocks of it."""
    products = import_module("liger_compile.kernels.loss_products")
    monkeypatch.setattr(products, "multiprocessors", lambda device: 12)
    check(operands(140, 72, 530, ignored=0.1), **way)


def test_what_each_way_does(way, monkeypatch):
    called = set()

    def spy(name, op):
        monkeypatch.setattr(fused, name, lambda *args: called.add(name) or op(*args))

    for name in ("fused_loss_and_gradients", "fused_loss_backward"):
        spy(name, getattr(fused, name))
    loss = ours(*operands(140, 16, 40), **way)
    each = way["reduction"] == "none"
    assert called == (set() if each else {"fused_loss_and_gradients"})
    loss.sum().backward()
    assert ("fused_loss_backward" in called) == (each and way["memory"] == "balanced")
    assert ("fused_loss_and_gradients" in called) == (not each or way["memory"] == "lean")


@pytest.mark.parametrize("small", [True, False])
def test_small_losses_are_left_to_the_compiler(small, monkeypatch):
    """With all that the op means, whether class weights, sums, or roundings."""
    from torch._dynamo.testing import AotEagerAndRecordGraphs

    monkeypatch.setattr(module, "SMALL_BYTES", 140 * 2048 * 2 if small else 0)
    hidden, weight, bias, target = operands(140, 16, 2048, bias=True)
    how = {"scale": 0.3, "divisor": 0.5, "softcap": 2.0, "reduction": "sum"}

    def eager(h, w, b):
        z = torch.tanh(F.linear(h, w, b) * 0.3 / 0.5 / 2.0) * 2.0
        return F.cross_entropy(z.float(), target, class_weight, reduction="sum")

    class_weight = torch.rand(2048, device=DEVICE)
    backend = AotEagerAndRecordGraphs()

    def op(h, w, b):
        return module.linear_cross_entropy(h, w, b, target, class_weight=class_weight, **how)

    given = (hidden, weight, bias)
    compiled = torch.compile(op, backend=backend, fullgraph=True), torch.compile(eager, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(*given), given) for f in compiled)
    graph = backend.fw_graphs[0].print_readable(print_output=False)
    assert ("liger_compile" in graph) is not small
    assert ("aten.mm" in graph or "aten.addmm" in graph) is small
    for o, t in zip(ours, theirs, strict=True):
        assert torch.equal(o, t) if small else relative_error(o, t) < 2e-2


def test_peaked_logits(way):
    """The largest logit is far above the sampled ones and the label's: its exponential overflows, and is done again."""
    hidden, weight, _, target = operands(140, 64, 300, spread=4.0)
    with torch.no_grad():
        weight[7] = hidden[3] * 4  # not in the sample, which takes every second class
        z = hidden.float() @ weight.float().t()
    assert z.amax() - z[3, target[3]] > 150
    check((hidden, weight, None, target), **way)


@two_ways
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden bias"])
def test_only_what_is_trained(trained, way):
    hidden, weight, bias, target = operands(140, 40, 260, bias=True)
    given = [
        x.detach().requires_grad_(n in trained) for n, x in (("hidden", hidden), ("weight", weight), ("bias", bias))
    ]
    check((*given, target), **way)


@two_ways
def test_frequent_labels(way, monkeypatch):
    """Their rows of dweight are added apart; there are more labels than that takes."""
    monkeypatch.setattr(fused, "FREQUENT", 16)
    hidden, weight, _, _ = operands(140, 64, 300, common=2.0)
    target = torch.where(torch.rand(140, device=DEVICE) < 0.6, 5, torch.randint(300, (140,), device=DEVICE))
    assert len(target.unique()) > 16
    check((hidden, weight, None, target), **way)


@two_ways
@pytest.mark.parametrize("n, width, classes", [(1, 64, 300), (130, 8, 300), (129, 264, 1025), (5, 8, 1)])
def test_sizes(n, width, classes, way):
    check(operands(n, width, classes, ignored=0), **way)


@pytest.mark.parametrize("way", ["rows kept", "rows again"], indirect=True)
def test_rows_of_their_own(way):
    """Upstream gradients of any shape."""
    incoming = torch.randn(140, device=DEVICE)
    incoming[::3] = 0
    check(operands(140, 64, 300), incoming, **way)


@two_ways
def masked(hidden, weight, bias, target, row_weight):
    """As models write it."""
    z = F.linear(hidden, weight, bias)
    losses = F.cross_entropy(z if z.dtype is torch.float64 else z.float(), target, reduction="none")
    return (losses.view(2, -1) * row_weight.view(2, -1)).sum() / row_weight.sum()


def masked_by_op(hidden, weight, bias, target, row_weight):
    total = module.linear_cross_entropy_sum(hidden, weight, bias, target, row_weight.view(2, -1))
    return total / row_weight.sum()


def with_squares(hidden, weight, bias, target, z_weight, softcap=0.0):
    z = F.linear(hidden, weight, bias)
    z = z if z.dtype is torch.float64 else z.float()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return F.cross_entropy(z, target) + 0.3 * (z.logsumexp(-1).square() * z_weight).mean()


def with_squares_by_op(hidden, weight, bias, target, z_weight, softcap=0.0):
    n = len(target)
    return module.linear_cross_entropy_z(
        hidden, weight, bias, target, z_weight, 0.3 / n, reduction="mean", softcap=softcap
    )


def compare(theirs, ours, given, **how):
    """Each error of one function is at most 1.05 times that of another, as in `check`."""
    exact = run(functools.partial(theirs, **how), given, ONE, torch.float64)
    other, made = (run(functools.partial(f, **how), given, ONE) for f in (theirs, ours))
    for i, (o, t, x) in enumerate(zip(made, other, exact, strict=True)):
        assert o.dtype is t.dtype and o.shape == t.shape and not o.isnan().any(), f"result {i}"
        allowed = max(1.5e-2 if INTERPRETED else 1.05 * relative_error(t, x), 2e-5 if i == 0 else 0)
        assert relative_error(o, x) <= allowed, f"result {i}"


def weights(kind, n):
    """Of rows: a mask, or rewards."""
    made = torch.randn(n, device=DEVICE) + 0.5
    return (made > 1).float() if kind == "mask" else torch.where(made.abs() < 0.3, 0, made)


@pytest.mark.parametrize("kind", ["mask", "rewards"])
def test_weights_of_rows(kind, monkeypatch):
    monkeypatch.setitem(module.BUDGET, "balanced", 1)
    compare(masked, masked_by_op, operands(200, 72, 530, bias=True, ignored=0.1), row_weight=weights(kind, 200))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("kind", ["mask", "rewards"])
def test_squares(kind, softcap, monkeypatch):
    """Of rows that have a label and of others."""
    monkeypatch.setitem(module.BUDGET, "balanced", 1)
    given, z_weight = operands(200, 72, 530, bias=True), weights(kind, 200)
    compare(with_squares, with_squares_by_op, given, z_weight=z_weight, softcap=softcap)


def test_squares_alone():
    """No label counts: the mean loss is NaN, as in eager, and the sum 0."""
    hidden, weight, _, target = operands(140, 16, 40, ignored=1.0)
    assert module.linear_cross_entropy_z(hidden, weight, None, target, reduction="mean").isnan()
    exact = F.linear(hidden.double(), weight.double()).logsumexp(-1).square().sum()
    assert relative_error(module.linear_cross_entropy_z(hidden, weight, None, target), exact) < 1e-2
    with torch.no_grad():
        assert relative_error(module.linear_cross_entropy_z(hidden, weight, None, target), exact) < 1e-2


def test_rows_of_weight_zero_are_left_out(monkeypatch):
    seen = []
    order = fused._Order.of
    monkeypatch.setattr(fused._Order, "of", lambda *args: seen.append(order(*args)) or seen[-1])
    row_weight = weights("mask", 140)
    masked_by_op(*operands(140, 16, 40, ignored=0.0), row_weight).backward()
    assert [int(rows.total) for rows in seen] == [int(row_weight.sum())]


def test_class_weights(way):
    check(operands(140, 64, 300), class_weight=torch.rand(300, device=DEVICE), **way)


@pytest.mark.parametrize("n", [0, 140])
def test_no_label_counts(n, way):
    """The mean of nothing is NaN, and no gradient is."""
    given = operands(n, 16, 40, bias=True)[:3]
    target = torch.full((n,), -100, device=DEVICE)
    loss, *gradients = run(functools.partial(ours, **way), (*given, target), ONE)
    expected = {"mean": torch.full((), torch.nan), "sum": torch.zeros(()), "none": torch.zeros(n)}[way["reduction"]]
    torch.testing.assert_close(loss.cpu(), expected, equal_nan=True)
    assert not any(g.isnan().any() or g.any() for g in gradients)


@two_ways
def test_operands_as_they_lie(way, monkeypatch):
    """Transposed hidden states, every second row of a weight, one that does not begin at 16 bytes, a transposed one;
    every second target and element of the bias."""
    monkeypatch.setattr(fused, "_runs_now", lambda x: True)
    hidden = torch.randn(64, 150, device=DEVICE).bfloat16().t().requires_grad_()
    target = torch.randint(300, (300,), device=DEVICE)[::2]
    bias = torch.randn(600, device=DEVICE).bfloat16()[::2].requires_grad_()
    whole = torch.randn(600 * 64 + 1, device=DEVICE).bfloat16() * 0.1
    for weight in (whole[:-1].view(600, 64)[::2], whole[1:].view(600, 64)[:300], whole[:-1].view(64, 600)[:, :300].t()):
        check((hidden, weight.requires_grad_(), bias, target), **way)


@two_ways
def test_not_finite(way):
    """Where eager's loss or gradients are not finite, ours are not; a row that is spoils no other's dhidden."""
    hidden, weight, _, target = operands(140, 64, 300, ignored=0)
    with torch.no_grad():
        hidden[3, 5] = float("inf")
        hidden[9, 1] = float("nan")
    loss, dhidden, dweight = run(functools.partial(ours, **way), (hidden, weight, None, target), ONE)
    assert not (loss if loss.ndim == 0 else loss[[3, 9]]).isfinite().any()
    assert not dhidden[[3, 9]].isfinite().all(1).any() and dhidden[[0, 50, 139]].isfinite().all()
    assert not dweight.isfinite().any()


@two_ways
def test_minus_infinity_in_the_bias(way):
    """Classes that are masked out."""
    hidden, weight, bias, target = operands(140, 64, 300, bias=True)
    with torch.no_grad():
        bias[100:200] = float("-inf")
        target[(target >= 100) & (target < 200)] = 7
    loss, *gradients = run(functools.partial(ours, **way), (hidden, weight, bias, target), ONE)
    expected = run(functools.partial(eager, reduction=way["reduction"]), (hidden, weight, bias, target), ONE)
    assert loss.isfinite().all() and not any(g.isnan().any() for g in gradients)
    for o, e in zip(gradients, expected[1:], strict=True):
        assert relative_error(o, e) < 2e-2


@two_ways
def test_backward_twice(way):
    given = operands(140, 64, 300)
    loss = ours(*given, **way).sum()
    first = torch.autograd.grad(loss, given[:2], retain_graph=True)
    second = torch.autograd.grad(loss, given[:2])
    assert all(map(torch.equal, first, second))


def test_without_gradients(way):
    given = operands(140, 64, 300, bias=True)
    with torch.no_grad():
        loss = ours(*given, **way)
        expected = eager(*(g.double() if g.is_floating_point() else g for g in given), reduction=way["reduction"])
    assert relative_error(loss, expected) < 1e-5


def test_order():
    """Rows that count, by label; nothing waits for the device."""
    rows = fused._Order.of(torch.tensor([5, -100, 2, 5, -100, 0]), -100)
    assert rows.total == 4 and rows.order[:4].tolist() == [5, 2, 0, 3]
    assert rows.label.tolist() == [0, 2, 5, 5, -1, -1]
    assert rows.at.tolist() == [2, -1, 1, 3, -1, 0]
    assert rows.first_of(7).tolist() == [0, -1, 1, -1, -1, 2, -1]


def test_frequent():
    target = torch.tensor([3] * 4 + [-100] * 9 + [200] * 5 + [0] + list(range(300, 500)) + [7] * 2)
    rows = fused._Order.of(target[torch.randperm(len(target))], -100)
    labels, slot = rows.frequent()
    assert labels[:3].tolist() == [200, 3, 7] and labels.shape == (fused.FREQUENT,) and labels.min() >= 0
    first = rows.first_of(500)
    assert slot[first[labels]].tolist() == list(range(fused.FREQUENT))
    assert (slot >= 0).sum() == fused.FREQUENT
    few = fused._Order.of(torch.tensor([5, -100, 5, 1]), -100).frequent()
    assert few[0][:2].tolist() == [5, 1] and set(few[0][2:].tolist()) == {-1} and few[1].tolist() == [1, 0, -1, -1]
    assert set(fused._Order.of(torch.full((3,), -100), -100).frequent()[0].tolist()) == {-1}


@pytest.mark.parametrize("budget", [1, 1 << 20, 10 << 20, 100 << 20])
@pytest.mark.parametrize("n, width, classes", [(1, 64, 1000), (8192, 4096, 128256), (16384, 2048, 151936)])
def test_chunks_fit_the_budget(n, width, classes, budget):
    rows = fused.chunk_rows(n, width, classes, budget)
    assert rows % 128 == 0 and (rows == 128 or rows * classes * 2 <= budget)
    assert -(-n // rows) * rows < n + 128 * -(-n // rows)


def test_chunks_of_the_issue():
    """Half a gigabyte holds what the measured shapes need."""
    assert fused.chunk_rows(8192, 4096, 128256, module.BUDGET["balanced"]) == 2048
    assert fused.chunk_rows(16384, 2048, 151936, module.BUDGET["balanced"]) == 1920


@pytest.mark.parametrize("scale", [0.3, float("nan")])
def test_wholes_as_compiled_and_at_once(scale):
    """What a compiler is shown, and the kernels for whoever calls the op itself."""
    rows, scale = import_module("liger_compile.kernels.loss_rows"), torch.tensor(scale, device=DEVICE)
    part, weight = (torch.randn(n, 48, device=DEVICE).bfloat16() for n in (6, 9))
    target, at = torch.tensor([3, -100, 8, 0, 1, 3]), torch.tensor([2, -1, 0, 4, 1, 3])
    operands = part, weight, target.to(DEVICE), torch.rand(6, device=DEVICE), at.to(DEVICE), scale
    packed, first = torch.randn(9, 48, device=DEVICE).half(), torch.tensor([-1, 0, 2, -1, 5, 1, 3, -1, -1]).int()
    of_weight = torch.rand(48, device=DEVICE) + 0.5, torch.randn(6, 48, device=DEVICE), first.to(DEVICE), scale
    made = torch.full_like(part, 9), torch.full_like(weight, 9)
    rows.whole_dhidden(*operands, made[0])
    rows.whole_dweight(packed, *of_weight, made[1])
    shown = [fused.whole_dhidden(*operands), fused.whole_dweight(packed.view(torch.bfloat16), *of_weight)]
    for m, s in zip(made, shown, strict=True):
        torch.testing.assert_close(m, s, rtol=8e-3, atol=1e-6, equal_nan=True)


def test_how_many_parts():
    products = import_module("liger_compile.kernels.loss_products")
    for programs in (132, 114):
        for n, width in ((128, 256), (512, 2048), (2048, 4096), (1920, 2048), (128, 16384)):
            few = -(-n // 128) * -(-width // 256)
            beside, alone = (products._parts(few, programs, b) for b in (True, False))
            assert 2 * few * beside >= programs
            assert 1 <= alone <= 8


# ---- real sizes, on a GPU -------------------------------------------------------------------------------------------


def realistic(kind, n, width, classes):
    hidden, weight, _, target = operands(n, width, classes, ignored=0.0)
    if kind == "half ignored":
        target[torch.rand(n, device=DEVICE) < 0.5] = -100
    if kind == "peaked":
        with torch.no_grad():
            weight *= 8
            best = (hidden @ weight.t()).argmax(1)
        target = torch.where(torch.rand(n, device=DEVICE) < 0.7, best, target)
    if kind in ("common part, Zipf", "known frequencies"):
        part = torch.randn(width, device=DEVICE) / 2
        frequency = 1 / torch.arange(1, classes + 1, device=DEVICE)
        with torch.no_grad():
            hidden += part
        target = torch.multinomial(frequency / frequency.sum(), n, replacement=True)
    if kind == "known frequencies":
        with torch.no_grad():
            weight += torch.outer(frequency.log() - frequency.log().mean(), part / part.square().sum()).bfloat16()
    return hidden, weight, None, target


@gpu
@pytest.mark.parametrize("kind", ["random", "half ignored", "peaked", "common part, Zipf", "known frequencies"])
@pytest.mark.parametrize("name", WAYS)
def test_at_size(name, kind, monkeypatch):
    reduction, memory, budget = WAYS[name]
    monkeypatch.setitem(module.BUDGET, memory, max(budget, 128 << 20))
    check(realistic(kind, 4096, 2048, 50257), reduction=reduction, memory=memory)


def log_probabilities(hidden, weight, _, target):
    z = F.linear(hidden.view(2, -1, hidden.shape[-1]), weight)
    z = z if z.dtype is torch.float64 else z.float()
    return F.log_softmax(z / 0.7, -1).gather(-1, target.view(2, -1, 1)).squeeze(-1)


@gpu
@pytest.mark.parametrize("kind", ["random", "peaked"])
@pytest.mark.parametrize("memory", ["lean", "balanced"])
def test_log_probabilities_at_size(memory, kind):
    """Looked up in sequences, each with a gradient of its own, of either sign."""
    from liger_compile import explain

    given, incoming = realistic(kind, 4096, 2048, 50257), torch.randn(2, 2048, device=DEVICE)
    assert explain(log_probabilities)(*given).counts == {"linear_cross_entropy": 1}
    compiled = torch.compile(log_probabilities, backend="liger", options={"liger.loss": memory})
    exact = run(log_probabilities, given, incoming, torch.float64)
    theirs, made = (run(f, given, incoming) for f in (log_probabilities, compiled))
    for o, t, x in zip(made, theirs, exact, strict=True):
        assert o.dtype is t.dtype and o.shape == t.shape
        assert relative_error(o, x) <= max(1.05 * relative_error(t, x), 2e-5)


def scaled(hidden, weight, scale, target):
    return F.cross_entropy(F.linear(hidden, weight) * scale, target)


def compare_at_size(function, op, logits, **how):
    """Compiled, it is replaced by an op, and its errors are at most 1.05 times eager's."""
    from liger_compile import explain

    given = realistic(logits, 4096, 2048, 50257)
    (match,) = explain(function)(*given, *how.values()).matches
    assert match.replacement == f"liger_compile.{op}.default"
    compare(function, torch.compile(function, backend="liger"), given, **how)


@gpu
@pytest.mark.parametrize("kind", ["mask", "rewards"])
@pytest.mark.parametrize("logits", ["random", "peaked"])
def test_weights_of_rows_at_size(logits, kind):
    compare_at_size(masked, "linear_cross_entropy_sum", logits, row_weight=weights(kind, 4096))


@gpu
@pytest.mark.parametrize("kind", ["mask", "rewards"])
@pytest.mark.parametrize("logits", ["random", "half ignored", "peaked"])
def test_squares_at_size(logits, kind):
    compare_at_size(with_squares, "linear_cross_entropy_z", logits, z_weight=weights(kind, 4096))


@gpu
@pytest.mark.parametrize("kind", ["random", "peaked"])
def test_scaled_by_class_at_size(kind):
    """The weight is rounded for it, and the logits are not."""
    from liger_compile import explain

    hidden, weight, _, target = realistic(kind, 4096, 2048, 50257)
    scale = (torch.rand(50257, device=DEVICE) + 0.5).bfloat16().requires_grad_()
    given = hidden, weight, scale, target
    assert explain(scaled)(*given).counts == {"linear_cross_entropy": 1}
    exact = run(scaled, given, ONE, torch.float64)
    theirs, made = (run(f, given, ONE) for f in (scaled, torch.compile(scaled, backend="liger")))
    for o, t, x in zip(made, theirs, exact, strict=True):
        assert o.dtype is t.dtype and o.shape == t.shape
        one = torch.finfo(o.dtype).eps / 2  # a number is off by chance
        assert relative_error(o, x) <= max(1.05 * relative_error(t, x), one if o.numel() == 1 else 0)


def requested():
    """Bytes asked of the allocator, whose blocks may be larger by as much as it happens to have."""
    return torch.cuda.memory_stats_as_nested_dict()["requested_bytes"]["all"]


@gpu
@pytest.mark.parametrize("memory, most", [("lean", 0.15), ("balanced", 0.55)])
@pytest.mark.parametrize("shape", [(8192, 4096, 128256), (16384, 2048, 151936)], ids=str)
def test_peak_memory(memory, most, shape):
    """Above the operands and their gradients, compiled: in the backward, Inductor writes over what the forward made."""
    from liger_compile.backend import liger

    compiled = torch.compile(eager, backend=functools.partial(liger, options={"liger.loss": memory}))
    hidden, weight, _, target = operands(*shape)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = requested()["current"]
        gradients = torch.autograd.grad(compiled(hidden, weight, None, target), (hidden, weight))
        peak = requested()["peak"] - before
        taken = sum(g.nbytes for g in gradients)
        del gradients
    assert taken < peak <= taken + most * 2**30


@gpu
def test_nothing_waits_for_the_device(way):
    """No synchronisation, so that it can be captured: replayed with other operands, it gives their results."""
    given = operands(600, 256, 3000)
    wanted = given[:2]

    def step():
        loss = ours(*given, **way).sum()
        return loss, *torch.autograd.grad(loss, wanted)

    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for g, other in zip(given, operands(600, 256, 3000, ignored=0.8), strict=True):
            if g is not None:
                g.copy_(other)
    graph.replay()
    assert all(map(torch.equal, captured, step()))


@gpu
@pytest.mark.parametrize("memory", ["balanced", "fast"])
def test_more_than_two_to_the_31_logits(memory, monkeypatch):
    monkeypatch.setitem(module.BUDGET, "fast", 8 << 30)
    hidden, weight, _, target = operands(20480, 256, 128256, ignored=0.0)
    loss = ours(hidden, weight, None, target, memory=memory, reduction="sum")
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    tail = slice(20000, None)
    exact = run(functools.partial(eager, reduction="sum"), (hidden[tail], weight, None, target[tail]), ONE)
    assert relative_error(dhidden[tail], exact[1]) < 5e-3
    total = torch.zeros_like(weight, dtype=torch.float64)
    for rows in torch.arange(20480, device=DEVICE).split(2048):
        part = [x.detach().float() for x in (hidden[rows], weight)]
        z = (part[0] @ part[1].t()).requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(z, target[rows], reduction="sum"), z)
        total += (g.t() @ part[0]).double()
    assert relative_error(dweight, total) < 3e-3
