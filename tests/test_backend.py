"""`torch.compile(..., backend="liger")`: found by name, its options, its fallbacks, torch.compile's own features."""

from __future__ import annotations

import collections
import copy
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import Accuracy, capture, relative_error, rewritten
from models import batch, build
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, Unsupported
from torch._subclasses import FakeTensorMode

import liger_compile
from liger_compile import Options, _torch, backend, make_pattern, pattern, register_pattern, rewrite, rules


def norm(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def layer(x, w):
    x = norm(x, w)
    return F.silu(x) * (x + 1)


BOTH = {"rms_norm": 1, "swiglu": 1}
REUSE = "allow_buffer_reuse"


def head(x, w, v, y):
    logits = F.linear(layer(x, w), v)
    return F.cross_entropy(logits.float(), y), logits


def operands(rows=6, dtype=torch.float32):
    return torch.randn(rows, 8).to(dtype).requires_grad_(), torch.randn(8).to(dtype).requires_grad_()


def head_operands(rows=6, dtype=torch.float32):
    return *operands(rows, dtype), torch.randn(11, 8).to(dtype).requires_grad_(), torch.randint(11, (rows,))


def assert_like_eager(ours, eager, args, tolerance=1e-5):
    """Results, and gradients of their sum, of two functions."""
    wanted = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    found = []
    for function in (ours, eager):
        results = function(*args)
        results = list(results) if isinstance(results, (tuple, list)) else [results]
        grads = torch.autograd.grad(sum(r.float().sum() for r in results), wanted) if wanted else ()
        found.append([*(r.detach() for r in results), *grads])
    for o, e in zip(*found, strict=True):
        assert o.dtype == e.dtype and o.shape == e.shape
        assert relative_error(o, e) <= tolerance


@pytest.fixture
def configs(monkeypatch):
    """What Inductor is asked for, beside fusions; aot_eager stands in for it, which takes a tenth of the time."""
    seen = []

    def compile_fx(gm, example_inputs, config):
        seen.append({name: value for name, value in config.items() if name != "post_grad_custom_pre_pass"})
        return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)

    monkeypatch.setattr(_torch, "compile_fx", compile_fx)
    return seen


@pytest.fixture
def logged(monkeypatch):
    """The warnings of the backend, with nothing warned about before."""
    messages = []

    class Handler(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    monkeypatch.setattr("liger_compile.log._said", set())
    handler = Handler(logging.WARNING)
    backend.log.addHandler(handler)
    yield messages
    backend.log.removeHandler(handler)


# ---- found by name ---------------------------------------------------------------------------------------------------


def run_python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    return result.stdout


def test_found_through_the_entry_point():
    out = run_python("""
import sys, torch, torch.nn.functional as F
assert "liger" in torch._dynamo.list_backends()
assert not any(name.startswith("liger_compile") for name in sys.modules)
graphs = []
def f(g, u):
    return F.silu(g) * u
g, u = torch.randn(4, 6), torch.randn(4, 6)
torch.testing.assert_close(torch.compile(f, backend="liger")(g, u), f(g, u))
assert "liger_compile" in sys.modules
assert not any(name.startswith("liger_compile.kernels.") for name in sys.modules)
import liger_compile
print(liger_compile.explain(f)(g, u).counts)
""")
    assert out.strip() == "{'swiglu': 1}"


def test_without_triton():
    out = run_python("""
import sys

sys.modules["triton"] = None  # cannot be imported
import torch, liger_compile
from liger_compile import ops
h, w, y = torch.randn(4, 8, requires_grad=True), torch.randn(7, 8), torch.tensor([0, 1, -100, 6])
ops.linear_cross_entropy(h, w, None, y).backward()
ops.rms_norm(h, None, 1e-6), ops.packed_glu(h), ops.rope(h, w[:4], w[:4])
report = liger_compile.explain(lambda x: torch.rms_norm(x, (8,), w[0], 1e-6))(h)
print(report.counts, sys.modules["triton"])
""")
    assert out.strip() == "{'rms_norm': 1} None"


def test_the_function_itself_is_a_backend(configs, reports):
    x, w = operands()
    assert_like_eager(torch.compile(layer, backend=backend.liger), layer, (x, w))
    assert reports[0].counts == BOTH


# ---- through Inductor ------------------------------------------------------------------------------------------------


def test_inductor(reports):
    """Loss, logits on demand, gradients."""
    args = head_operands()
    assert_like_eager(torch.compile(head, backend="liger"), head, args)
    assert reports[0].counts == {**BOTH, "linear_cross_entropy": 1} and len(reports) == 1


@pytest.mark.parametrize("rows", [6, 300], ids=["kept", "chunks"])
def test_backward_twice_through_inductor(rows, reports, small_chunks):
    """The loss in chunks holds gradients from the forward on: they must not be overwritten."""
    args = head_operands(rows)
    wanted = args[:3]

    def total(function):
        loss, logits = function(*args)
        return loss + 0.1 * logits.square().mean()

    compiled = torch.compile(head, backend="liger")
    # Inductor refuses retain_graph=True for what it compiled without, and says to set this; its caches do not tell the
    # two apart
    caches = torch.compiler.config.patch(force_disable_caches=True)
    with torch._functorch.config.patch(donated_buffer=False), caches:
        loss = total(compiled)
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        second = torch.autograd.grad(loss, wanted)
    assert reports[0].counts["linear_cross_entropy"] == 1
    for a, b, e in zip(first, second, torch.autograd.grad(total(head), wanted), strict=True):
        assert torch.equal(a, b) and relative_error(a, e) < 1e-5


def test_second_derivative_is_an_error(configs):
    """As with any backend on AOTAutograd; the ops by themselves refuse in test_ops.py."""
    args = head_operands()
    gradient = torch.autograd.grad(torch.compile(head, backend="liger")(*args)[0], args[:3], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.sum().backward()


# ---- mode and options ------------------------------------------------------------------------------------------------


def test_mode_is_forwarded(configs):
    x, w = operands()
    torch.compile(layer, backend="liger", mode="max-autotune-no-cudagraphs")(x, w)
    assert configs == [{"max_autotune": True, "coordinate_descent_tuning": True}]


def test_no_mode_and_no_options(configs):
    torch.compile(layer, backend="liger")(*operands())
    assert configs == [{}]


def test_options_are_forwarded(configs, reports):
    options = {"max_autotune": True, "triton.cudagraphs": False, "joint-graph-constant-folding": False}
    torch.compile(layer, backend="liger", options={**options, "liger.disable": ["swiglu"]})(*operands())
    assert configs == [{"max_autotune": True, "triton.cudagraphs": False, "joint_graph_constant_folding": False}]
    assert reports[0].counts == {"rms_norm": 1}


def test_options_reach_inductor():
    """A pass of the user's sees the replacement, in the graph that Inductor compiles."""
    seen = []

    class Pass(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph):
            seen.extend(str(n.target) for n in graph.nodes)

        def uuid(self):
            return None

    x, w = (t.detach() for t in operands())
    torch.compile(layer, backend="liger", options={"post_grad_custom_pre_pass": Pass()})(x, w)
    assert "liger_compile.rms_norm_forward.default" in seen


@pytest.mark.parametrize(
    "options, message",
    [
        ({"liger.disabel": []}, r"unknown option 'liger\.disabel'; did you mean 'liger\.disable'\?"),
        ({"max_autotun": True}, r"unknown option 'max_autotun'; did you mean 'max_autotune'\?"),
        ({"max_autotune": 1}, r"max_autotune: a value of type bool, not 1"),
        ({"liger.enable": ["rmsnorm"]}, r"no pattern is called 'rmsnorm'; did you mean 'rms_norm'\?"),
        ({"liger.logits": "none"}, r'liger\.logits: "lazy" or "keep"'),
    ],
    ids=str,
)
def test_wrong_options_are_errors(options, message, configs):
    """Not fallbacks: the user asked for something that does not exist."""
    with pytest.raises(BackendCompilerFailed, match=message) as error:
        torch.compile(layer, backend="liger", options=options)(*operands())
    assert isinstance(error.value.inner_exception, ValueError) and not configs


def test_wrong_mode_is_an_error(configs):
    with pytest.raises(BackendCompilerFailed, match="Unrecognized mode=fastest"):
        torch.compile(layer, backend="liger", mode="fastest")(*operands())


@pytest.mark.parametrize(
    "options, counts",
    [
        ({}, BOTH),
        ({"liger.enable": ["rms_norm"]}, {"rms_norm": 1}),
        ({"liger.enable": "swiglu"}, {"swiglu": 1}),
        ({"liger.enable": []}, {}),
        ({"liger.disable": ["rms_norm"]}, {"swiglu": 1}),
        ({"liger.disable": ["rms_norm", "swiglu"]}, {}),
        ({"liger.disable": []}, BOTH),
        ({"liger.enable": ["rms_norm", "swiglu"], "liger.disable": ["swiglu"]}, {"rms_norm": 1}),
        ({"liger.enable": None, "liger.disable": None}, BOTH),
    ],
    ids=str,
)
def test_enable_and_disable(options, counts, configs, reports):
    args = operands()
    assert_like_eager(torch.compile(layer, backend="liger", options=options), layer, args)
    assert reports[0].counts == counts
    assert not {"rms_norm", "swiglu"} & {m.pattern for m in reports[0].misses}  # not wanted is not missed


def test_each_compilation_has_options_of_its_own(configs, reports):
    args = operands()
    without = torch.compile(layer, backend="liger", options={"liger.disable": ["swiglu"]})
    for function in (without, torch.compile(layer, backend="liger"), without):
        assert_like_eager(function, layer, args)
    assert [r.counts for r in reports] == [{"rms_norm": 1}, BOTH]


def test_keep_logits(configs, reports):
    args = head_operands()
    compiled = torch.compile(head, backend="liger", options={"liger.logits": "keep"})
    assert_like_eager(compiled, head, args)
    assert type(compiled(*args)[1]) is torch.Tensor
    assert reports[0].counts == BOTH


# ---- debug -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["folder", Path("folder"), True], ids=["str", "path", "true"])
def test_debug_folder(option, configs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def two_graphs(x, w):
        x = norm(x, w)
        torch._dynamo.graph_break()
        return F.relu(x) * w

    torch.compile(two_graphs, backend="liger", options={"liger.debug": option})(*operands())
    root = tmp_path / ("liger_debug" if option is True else "folder")
    assert sorted(p.name for p in root.iterdir()) == ["000", "001"]
    for folder in root.iterdir():
        assert sorted(p.name for p in folder.iterdir()) == [
            "after.py",
            "before.py",
            "report.html",
            "report.json",
            "report.txt",
        ]
    first, second = ({p.name: p.read_text() for p in (root / n).iterdir()} for n in ("000", "001"))
    assert "rsqrt: " in first["before.py"] and "rms_norm" not in first["before.py"]
    assert "liger_compile.rms_norm.default" in first["after.py"] and "rsqrt: " not in first["after.py"]
    assert "f32[6, 8]" in first["before.py"] and "f32[6, 8]" in first["after.py"]
    assert first["report.txt"].startswith("liger_compile: 1 rewrite in 1 graph")
    assert all("rms_norm" in first[f"report.{kind}"] for kind in ("txt", "json", "html"))
    assert second["before.py"] == second["after.py"] and "relu" in second["report.txt"]
    torch._dynamo.reset()
    torch.compile(two_graphs, backend="liger", options={"liger.debug": option})(*operands())
    assert len(list(root.iterdir())) == 4  # nothing is overwritten


def test_no_debug_folder_unless_asked(configs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.compile(layer, backend="liger", options={"liger.debug": False})(*operands())
    assert not list(tmp_path.iterdir())


def test_a_debug_folder_that_cannot_be_written_is_told(configs, logged, tmp_path):
    (tmp_path / "file").touch()
    compiled = torch.compile(layer, backend="liger", options={"liger.debug": tmp_path / "file"})
    assert_like_eager(compiled, layer, operands())
    assert len(logged) == 1 and "the report was not written" in logged[0]


def test_reports_are_logged(configs):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append((record.levelname, record.getMessage()))
    backend.log.addHandler(handler)
    backend.log.setLevel(logging.INFO)
    try:
        torch.compile(layer, backend="liger")(*operands())
    finally:
        backend.log.removeHandler(handler)
        backend.log.setLevel(logging.NOTSET)
    assert [level for level, _ in messages] == ["INFO"]
    assert "2 rewrites in 1 graph" in messages[0][1]


def test_torchs_own_logging_and_trace(tmp_path):
    """`TORCH_LOGS` shows the reports; in a `TORCH_TRACE` they and the graphs are artifacts, for tlparse."""
    code = "import torch; f = torch.compile(torch.nn.RMSNorm(8), backend='liger', options={'liger.verify': True})"
    environment = {**os.environ, "TORCH_LOGS": "+liger_compile", "TORCH_TRACE": str(tmp_path)}
    program = [sys.executable, "-c", f"{code}; f(torch.randn(2, 8))"]
    result = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert "liger_compile: 1 rewrite in 1 graph" in result.stderr
    (trace,) = tmp_path.iterdir()
    trace = trace.read_text()
    for name, text in (("report", "1 rewrite in 1 graph"), ("graph", "verify_0")):
        assert f'"artifact": {{"name": "liger_compile_{name}", "encoding": "string"}}' in trace and text in trace


# ---- fallbacks -------------------------------------------------------------------------------------------------------


def broken(x, w):
    """Two graphs, so that a reason could be told twice."""
    x = layer(x, w)
    torch._dynamo.graph_break()
    return layer(x, w)


def test_a_failure_of_ours_is_no_failure_of_the_users(configs, logged, monkeypatch):
    def fail(gm, options=None):
        raise KeyError("a bug in the rewriter")

    monkeypatch.setattr(backend, "rewrite", fail)
    assert_like_eager(torch.compile(broken, backend="liger"), broken, operands())
    assert logged == ["rewriting failed, so the graph is compiled as it is: KeyError: 'a bug in the rewriter'"]
    assert configs == [{}, {}]


def test_a_failing_rule_costs_its_calls(configs, logged, monkeypatch):
    def fail(c, x):
        raise IndexError("a bug in a rule")

    def function(x, w):
        return layer(torch.sin(x), w) * torch.sin(w)

    monkeypatch.setitem(rules.RULES, "sin", fail)
    assert liger_compile.explain(function)(*operands()).counts == BOTH
    told = "the rule of sin failed, so that its calls are taken as they are: IndexError: a bug in a rule"
    assert logged == [told]


def test_a_failing_check(configs, logged, registered):
    def check(match):
        raise ZeroDivisionError("a bug in a check")

    @pattern(replace=lambda x: x.clone(), check=check)
    def sine(x):
        return x.sin().exp()

    def function(x, w):
        return layer(x.sin().exp(), w)

    assert_like_eager(torch.compile(function, backend="liger"), function, operands())
    assert logged == ["the check of sine failed, so that what it matches is left: ZeroDivisionError: a bug in a check"]


def test_a_failing_replacement(configs, logged):
    """It runs when it is put into the graph, but not when the graph is compiled."""
    calls = []

    def replacement(x):
        calls.append(x)
        if len(calls) > 1:
            raise RuntimeError("not a second time")
        return x.clone()

    def function(x):
        return x.sin().exp() * 2

    made = make_pattern(lambda x: x.sin().exp(), replacement, name="flaky")
    compiled = torch.compile(function, backend="liger", options={"liger.patterns": [made]})
    assert_like_eager(compiled, function, operands()[:1])
    assert len(logged) == 1 and len(calls) > 1
    assert logged[0].startswith("the rewritten graph does not compile, so the original is used: ")
    assert "not a second time" in logged[0]


def test_a_failure_of_inductor_is_the_users_to_see(monkeypatch, logged):
    def fail(gm, example_inputs, config):
        raise NotImplementedError("Inductor cannot do this")

    monkeypatch.setattr(_torch, "compile_fx", fail)
    with pytest.raises(BackendCompilerFailed, match="Inductor cannot do this"):
        torch.compile(layer, backend="liger")(*operands())


# ---- kinds of tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, configs, reports):
    args = head_operands(dtype=dtype)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 2e-2)
    assert_like_eager(torch.compile(head, backend="liger"), head, args, tolerance)
    wide = dtype is torch.float64  # this norm computes in float32 whatever it is given
    assert reports[0].counts == ({"rms_norm": 1} if wide else {**BOTH, "linear_cross_entropy": 1})


def test_tensor_subclass(configs, reports):
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    x = two_tensor.TwoTensor(torch.randn(6, 8), torch.randn(6, 8))
    w = torch.randn(8)
    ours, eager = torch.compile(layer, backend="liger")(x, w), layer(x, w)
    assert type(ours) is type(eager)
    torch.testing.assert_close(ours.a, eager.a)
    torch.testing.assert_close(ours.b, eager.b)
    assert not reports[0].counts
    assert {m.reason for m in reports[0].misses} == {
        "x is a TwoTensor, a tensor subclass",
        "gate is a TwoTensor, a tensor subclass",
    }


def test_distributed_tensor(configs, reports, process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    x = distribute_tensor(torch.randn(6, 8), mesh, [Shard(0)]).requires_grad_()
    w = distribute_tensor(torch.randn(8), mesh, [Replicate()]).requires_grad_()

    def mixed(x, w):
        y = layer(x, w)
        return y.to_local().sum() + layer(x.to_local(), w.to_local()).sum()

    ours, eager = torch.compile(mixed, backend="liger")(x, w), mixed(x, w)
    assert reports[0].counts == BOTH  # of the local tensors
    assert any("is a DTensor, a tensor subclass" in m.reason for m in reports[0].misses)
    assert relative_error(ours.detach(), eager.detach()) < 1e-5
    for o, e in zip(torch.autograd.grad(ours, (x, w)), torch.autograd.grad(eager, (x, w)), strict=True):
        assert relative_error(o.to_local(), e.to_local()) < 1e-5


class Blocks(nn.Module):
    """Weights of 1 MiB each, so that DDP has several buckets."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(512, eps=1e-6) for _ in range(3))
        self.linears = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(3))

    def forward(self, x, y):
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(F.silu(x) * norm(x))
        logits = F.linear(x, self.linears[0].weight)
        return F.cross_entropy(logits.float(), y), logits


def test_data_parallel(configs, reports, process_group):
    """Dynamo splits the graph where buckets end, and the backend gets the pieces."""
    model = Blocks()
    x, y = torch.randn(6, 512), torch.randint(512, (6,))
    losses, grads = [], []
    for call in (model, torch.compile(nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1), backend="liger")):
        loss, logits = call(x, y)
        (loss + logits.square().mean()).backward()
        losses.append(loss.detach())
        grads.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    assert len(reports) > 1
    total = sum((collections.Counter(r.counts) for r in reports), collections.Counter())
    assert total == {"gated_rms_norm": 3, "linear_cross_entropy": 1}
    assert relative_error(losses[1], losses[0]) < 1e-5
    for name, grad in grads[0].items():
        assert relative_error(grads[1][name], grad) < 1e-5, name


def test_fully_sharded(process_group):
    """FSDP's hooks on the outputs compute no logits; once it has freed the weights, or another step has been made,
    these are an error, and not those of other weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, reports = Blocks(), []
    sharded = fully_shard(copy.deepcopy(plain), mesh=init_device_mesh("cpu", (1,)))
    compiled = torch.compile(sharded, backend=rewritten(reports))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, sharded)]
    kept = []
    for step in range(3):
        x, y = torch.randn(6, 512), torch.randint(512, (6,))
        losses, logits = zip(*(call(x, y) for call in (plain, compiled)), strict=True)
        assert not logits[1].computed
        if step == 1:
            assert relative_error(logits[1], logits[0]) < 1e-5
        for loss in losses:
            loss.backward()
        assert relative_error(*losses) < 1e-5
        if step == 0:
            with pytest.raises(RuntimeError, match="have been freed since, as FSDP does"):
                logits[1].sum()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        kept.append(logits[1])
    compiled(x, y)  # which gathers the weights again
    with pytest.raises(RuntimeError, match="have changed since"):
        kept[0].sum()
    assert kept[1].computed
    total = sum((collections.Counter(r.counts) for r in reports), collections.Counter())
    assert total == {"gated_rms_norm": 3, "linear_cross_entropy": 1}
    sharded.reshard()
    for ours, expected in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert relative_error(ours.full_tensor(), expected) < 1e-5


# ---- torch.compile's features ----------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return layer(x, self.weight)


def test_module(configs, reports):
    model = Model()
    compiled = torch.compile(model, backend="liger")
    (x, _) = operands()
    for step in range(3):
        compiled(x).sum().backward()
        assert model.calls == step + 1 and len(reports) == 1
    grad = model.weight.grad.clone()
    model.weight.grad = None
    (3 * model(x).sum()).backward()
    assert relative_error(grad, model.weight.grad) < 1e-5
    model.compile(backend="liger")
    assert relative_error(model(x).detach(), Model()(x).detach()) < 1e-6
    assert reports[-1].counts == BOTH


@pytest.mark.parametrize(
    "device, rows, given, asked",
    [
        ("cpu", 2**20, {}, {}),
        ("cuda", 2**10, {}, {}),
        ("cuda", 2**20, {}, {REUSE: False}),
        ("cuda", 2**20, {REUSE: True}, {REUSE: True}),
    ],
)
def test_large_buffers_on_a_gpu_are_freed(device, rows, given, asked):
    """Unless the user says otherwise."""
    with FakeTensorMode():
        gm = capture(lambda x: x + 1, torch.empty(rows, 8, device=device))
    assert backend._freeing(given, gm) == asked


def test_what_the_code_of_a_graph_does_not_say():
    """AOTAutograd's cache on disk knows a graph by its code, in which policies for memory are not."""
    gm = rewrite(capture(layer, *operands())).graphs[0].after
    named = {memory: backend._is_named(gm, Options(memory=memory)) for memory in ("speed", "balanced", "lean")}
    assert named == {"speed": False, "balanced": True, "lean": False}


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_shapes_that_change(dynamic, configs, reports):
    compiled = torch.compile(head, backend="liger", dynamic=dynamic, fullgraph=True)
    for rows in (9, 12, 17, 9):
        assert_like_eager(compiled, head, head_operands(rows))
    assert len(reports) == {None: 2, True: 1, False: 3}[dynamic]
    assert all(r.counts == {**BOTH, "linear_cross_entropy": 1} for r in reports), reports[-1]


def preferences(x, w, v, y, counted):
    """What DPO and policy gradients take of a model: each label's log-probability, and the logits for evaluation."""
    logits = F.linear(layer(x, w), v)
    taken = F.log_softmax(logits[:, :-1].float() / 0.7, -1).gather(-1, y[:, 1:, None]).squeeze(-1)
    return (taken * counted[:, 1:]).sum(-1), logits


@pytest.mark.parametrize("dynamic", [None, True])
def test_log_probabilities_of_labels(dynamic, configs, reports):
    compiled = torch.compile(preferences, backend="liger", dynamic=dynamic, fullgraph=True)
    for rows, length in ((2, 7), (3, 9), (5, 4)):
        x, w = torch.randn(rows, length, 8).requires_grad_(), torch.randn(8).requires_grad_()
        v, y = torch.randn(11, 8).requires_grad_(), torch.randint(11, (rows, length))
        assert_like_eager(compiled, preferences, (x, w, v, y, torch.rand(rows, length)))
    assert all(r.counts == {**BOTH, "linear_cross_entropy": 1} for r in reports) and reports, reports


def test_fullgraph_with_a_graph_break(configs):
    with pytest.raises(Unsupported):
        torch.compile(broken, backend="liger", fullgraph=True)(*operands())


def test_graph_breaks(configs, reports):
    assert_like_eager(torch.compile(broken, backend="liger"), broken, operands())
    assert [r.counts for r in reports] == [BOTH, BOTH]


def test_logits_on_demand_across_a_graph_break(configs, reports):
    """The rest of the function gets them as an argument."""

    def function(x, w, v, y):
        loss, logits = head(x, w, v, y)
        torch._dynamo.graph_break()
        return loss + 0.1 * (logits.float() * 2).square().mean(), logits

    assert_like_eager(torch.compile(function, backend="liger"), function, head_operands())
    assert reports[0].counts == {**BOTH, "linear_cross_entropy": 1}


def test_a_graph_break_inside_a_pattern(configs, reports):
    def function(x, w):
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        print(end="")  # a call that Dynamo does not trace
        torch._dynamo.graph_break()
        return w * (x * r)

    assert_like_eager(torch.compile(function, backend="liger"), function, operands())
    assert [r.counts for r in reports] == [{}, {}]


def test_no_grad_and_inference_mode(configs, reports):
    args = head_operands()
    compiled = torch.compile(head, backend="liger")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            ours, eager = compiled(*args), head(*args)
            for o, e in zip(ours, eager, strict=True):
                assert not o.requires_grad and relative_error(o.clone(), e) < 1e-6
    assert_like_eager(compiled, head, args)  # and back to training
    assert all(r.counts == {**BOTH, "linear_cross_entropy": 1} for r in reports) and len(reports) >= 2


def test_frozen_weights(configs, reports):
    x, w, v, y = head_operands()
    args = x, w.detach(), v.detach(), y
    assert_like_eager(torch.compile(head, backend="liger"), head, args)
    assert reports[0].counts == {**BOTH, "linear_cross_entropy": 1}


def test_autocast_around(configs, reports):
    """Outside of the compiled function; the report says what the casts look like."""
    args = head_operands()
    compiled = torch.compile(head, backend="liger")
    with torch.autocast("cpu", torch.bfloat16):
        assert_like_eager(compiled, head, args, tolerance=2e-2)
    assert reports[0].counts == {**BOTH, "linear_cross_entropy": 1}, reports[0]


@pytest.mark.parametrize("bias", [True, False])
def test_autocast_of_a_head_behind_what_is_narrow_already(bias, configs, reports):
    """Only the head's weights are cast then."""
    body, head = nn.Linear(16, 16), nn.Linear(16, 40, bias=bias)
    y = torch.randint(40, (300,))

    def loss(x):
        return F.cross_entropy(head(F.gelu(body(x))).float(), y)

    x, parameters = torch.randn(300, 16), [*body.parameters(), *head.parameters()]
    exact = torch.autograd.grad(loss(x), parameters)
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = (torch.autograd.grad(f(x), parameters) for f in (torch.compile(loss, backend="liger"), loss))
    assert reports[-1].counts == {"linear_cross_entropy": 1}
    accuracy = Accuracy()
    for each in zip("wbWB", ours, eager, exact, strict=False):
        accuracy.add(*each)
    accuracy.check(rows=300)


def test_reset_and_compile_again(configs, reports):
    args = operands()
    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(layer, backend="liger")(*args)
    assert [r.counts for r in reports] == [BOTH, BOTH]


def test_nothing_to_rewrite(configs, reports):
    def function(x, w):
        return (x + w).cos()

    assert_like_eager(torch.compile(function, backend="liger"), function, operands())
    assert not reports[0].counts and reports[0].graphs[0].after is reports[0].graphs[0].before


def test_a_module_of_a_model_compiled_by_itself(configs, reports):
    model = nn.Sequential(Model(), nn.Linear(8, 8), Model())
    model[2].compile(backend="liger")
    (x, _) = operands()
    eager = nn.Sequential(Model(), model[1], Model())
    assert relative_error(model(x).detach(), eager(x).detach()) < 1e-6
    assert [r.counts for r in reports] == [BOTH]


# ---- patterns of the user's ------------------------------------------------------------------------------------------


def shifted(x, w):
    return (x + 1).sin().exp() * w


def double(x):
    """Not what it replaces, so that a test sees whether it ran."""
    return 2 * (x.sin().exp())


def test_registered_pattern(configs, reports, registered):
    register_pattern(lambda x: x.sin().exp(), double, name="sine")
    args = operands()
    assert_like_eager(torch.compile(shifted, backend="liger"), lambda *a: 2 * shifted(*a), args)
    assert reports[0].counts == {"sine": 1}
    compiled = torch.compile(shifted, backend="liger", options={"liger.disable": "sine"})
    assert_like_eager(compiled, shifted, args)


def test_decorated_pattern(configs, reports, registered):
    @pattern(replace=double)
    def sine(x):
        return x.sin().exp()

    assert_like_eager(torch.compile(shifted, backend="liger"), lambda *a: 2 * shifted(*a), operands())
    assert reports[0].counts == {"sine": 1}


def test_pattern_in_options(configs, reports, registered):
    before = list(registered)
    args = operands()
    made = make_pattern(lambda x: x.sin().exp(), double, name="sine")
    compiled = torch.compile(shifted, backend="liger", options={"liger.patterns": [made]})
    assert_like_eager(compiled, lambda *a: 2 * shifted(*a), args)
    assert_like_eager(torch.compile(shifted, backend="liger"), shifted, args)  # for that compilation alone
    assert [r.counts for r in reports] == [{"sine": 1}, {}] and registered == before


def test_pattern_through_inductor(reports):
    """An autograd.Function in the place of a formula: its own backward runs."""

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin().exp()

        @staticmethod
        def backward(ctx, g):
            return torch.full_like(ctx.saved_tensors[0], 7)

    made = make_pattern(lambda x: x.sin().exp(), Sine.apply, name="sine")
    x = torch.randn(4, 3, requires_grad=True)
    y = torch.compile(lambda x: x.sin().exp() * 2, backend="liger", options={"liger.patterns": made})(x)
    assert reports[0].counts == {"sine": 1}
    assert relative_error(y.detach(), 2 * x.sin().exp().detach()) < 1e-6
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 7))


# ---- explain ---------------------------------------------------------------------------------------------------------


def test_explain():
    args = operands()
    report = liger_compile.explain(broken)(*args)
    assert report.counts == {"rms_norm": 2, "swiglu": 2} and len(report.graphs) == 2
    assert str(report).startswith("liger_compile: 4 rewrites in 2 graphs")
    report = liger_compile.explain(broken, options={"liger.disable": "swiglu"})(*args)
    assert report.counts == {"rms_norm": 2}


def test_explain_of_what_is_compiled_in_place():
    """As `model.compile(backend="liger")` does, which the Trainer wants, of the whole or of a part."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.RMSNorm(16)

        def forward(self, x):
            return self.inner(x)

    for part in (lambda m: m, lambda m: m.inner):
        model = Layer()
        part(model).compile(backend="liger")
        before = part(model)._compiled_call_impl
        assert liger_compile.explain(model)(torch.randn(4, 16)).counts == {"rms_norm": 1}
        assert part(model)._compiled_call_impl is before


def test_explain_costs_less_than_tracing_again(monkeypatch):
    """It traces once, never calls Inductor, and rewriting takes less time than the tracing."""
    monkeypatch.setattr(_torch, "compile_fx", None)
    model, inputs = build("llama", num_hidden_layers=4), batch()
    start = time.perf_counter()
    graph = capture(model, **inputs)
    traced = time.perf_counter() - start
    spent = []
    for _ in range(3):  # the machine may be busy with other things
        start = time.perf_counter()
        rewrite(graph)
        spent.append(time.perf_counter() - start)
    print(f"tracing {traced:.2f} s, rewriting {min(spent):.2f} s")
    assert min(spent) < traced
    explained = liger_compile.explain(model)(**inputs)
    assert len(explained.graphs) == 1 and explained.counts["rms_norm"] == 9


def test_explain_refuses_other_arguments():
    with pytest.raises(TypeError, match=r"explain\(\) takes options=\{\.\.\.\}, not 'mode'"):
        liger_compile.explain(layer, mode="max-autotune")
    with pytest.raises(ValueError, match=r"did you mean 'liger\.disable'"):
        liger_compile.explain(layer, options={"liger.disabled": []})


def test_explain_shows_what_a_compilation_does(configs, reports):
    args = operands()
    torch.compile(layer, backend="liger")(*args)
    explained = liger_compile.explain(layer)(*args)
    assert explained.counts == reports[0].counts
    assert rewrite(capture(layer, *args)).graphs[0].after.code == explained.graphs[0].after.code
