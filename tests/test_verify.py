"""`liger.verify` and the search by `liger.fuel`: a wrong kernel, planted in any op, is found."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import capture, misses, relative_error, report_of, rewritten, skip_without_interpreter
from models import batch, build, step
from torch import nn

import liger_compile
from liger_compile import fuel, ops
from liger_compile.cli import main
from liger_compile.options import split_options

VERIFIED = {"liger.verify": True}


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="liger", options={**VERIFIED, **options})


# ---- right kernels -------------------------------------------------------------------------------------------------


HOW = ["f32", "bf16", "checkpointed", "autocast", "padded"]


@pytest.mark.parametrize("family, how", [*(("llama", how) for how in HOW), *((f, "f32") for f in ("gemma2", "phi3"))])
def test_models_pass(family, how):
    """With the results and gradients of the replacements, not of what they are compared with."""
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    model, inputs = build(family, dtype, num_hidden_layers=2 if family == "gemma2" else 1), batch()
    if how == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if how == "padded":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, -5:] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss, grads = step(model, compiled(model), inputs)
        expected, expected_grads = step(model, torch.compile(model, backend="eager"), inputs)
    tolerance = 1e-4 if how in ("f32", "checkpointed", "padded") else 5e-2
    assert relative_error(loss, expected) < tolerance
    for name, grad in expected_grads.items():
        assert relative_error(grads[name], grad) < tolerance, name


def test_everything_is_compared():
    report = liger_compile.rewrite(capture(build("phi3"), **batch()), liger_compile.Options(verify=True))
    after = report.graphs[0].after
    verifiers = [m for name, m in after.named_children() if name.startswith("verify_")]
    assert len(verifiers) == len(report.matches) > 10 and not misses(report)
    assert not [n for n in after.graph.nodes if "liger_compile" in str(n.target)]


def test_what_is_random_is_not_compared_and_said():
    def attend(q, k, v):
        mask = torch.ones(8, 8, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.5)

    q = torch.randn(1, 2, 8, 4)
    report = report_of(attend, q, q, q, options=liger_compile.Options(verify=True))
    assert report.counts == {"attention": 1}
    assert "not verified: it draws random numbers" in report.misses[0].reason


def test_what_runs_under_several_kinds_of_autocast_is_not_compared_and_said():
    def function(h, w, y):
        with torch.autocast("cpu", torch.bfloat16):
            logits = F.linear(h, w)
        return F.cross_entropy(logits.float(), y)

    h, w, y = torch.randn(6, 8), torch.randn(11, 8), torch.randint(11, (6,))
    report = report_of(function, h, w, y, options=liger_compile.Options(verify=True))
    assert report.counts == {"linear_cross_entropy": 1}
    assert "not verified: it runs under several kinds of autocast" in report.misses[0].reason


# ---- wrong kernels -------------------------------------------------------------------------------------------------


def norm(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gated(x, gate, w):
    return norm(x, w) * F.silu(gate.float())


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def rotate(x, c):
    return x * c + rotate_half(x) * c


def packed(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def loss(h, w, y, reduction="mean"):
    return F.cross_entropy(F.linear(h, w), y, reduction=reduction)


def z_loss(h, w, y):
    z = F.linear(h, w).float()
    return F.cross_entropy(z, y) + 1e-2 * torch.logsumexp(z, -1).square().mean()


def windowed(q, k, v):
    i = torch.arange(q.shape[-2])
    mask = (i[None] <= i[:, None]) & (i[None] > i[:, None] - 3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


GENERATOR = torch.Generator().manual_seed(0)


def some(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=GENERATOR).requires_grad_()


Y = torch.tensor([1, 3, -100, 0, 7, 7])
C = torch.randn(5, 8)
X = (some(6, 8), some(6, 8))
HEAD = (some(6, 8), some(9, 8), Y)
FUSED = (some(6, 8, dtype=torch.bfloat16), some(9, 8, dtype=torch.bfloat16), Y)
PLANTED = {
    # op: (pattern, function, operands)
    "rms_norm_forward": ("rms_norm", norm, (some(6, 8), some(8))),
    "rms_norm_backward": ("rms_norm", norm, (some(6, 8), some(8))),
    "gated_rms_norm_forward": ("gated_rms_norm", gated, (some(6, 8), some(6, 8), some(8))),
    "gated_rms_norm_backward": ("gated_rms_norm", gated, (some(6, 8), some(6, 8), some(8))),
    "glu_forward": ("swiglu", lambda g, u: F.silu(g) * u, X),
    "glu_backward": ("swiglu", lambda g, u: F.silu(g) * u, X),
    "packed_glu_forward": ("packed_swiglu", packed, (some(6, 8),)),
    "packed_glu_backward": ("packed_swiglu", packed, (some(6, 8),)),
    "rope_forward": ("rope", lambda x: rotate(x, C), (some(2, 5, 8),)),
    "rope_backward": ("rope", lambda x: rotate(x, C), (some(2, 5, 8),)),
    "rope_pair_forward": ("rope", lambda q, k: (rotate(q, C), rotate(k, C)), (some(2, 5, 8), some(2, 5, 8))),
    "rope_pair_backward": ("rope", lambda q, k: (rotate(q, C), rotate(k, C)), (some(2, 5, 8), some(2, 5, 8))),
    "masked_attention": ("attention", windowed, (some(1, 2, 8, 4), some(1, 2, 8, 4), some(1, 2, 8, 4))),
    "linear_cross_entropy_forward": ("linear_cross_entropy", loss, HEAD),
    "linear_cross_entropy_backward": ("linear_cross_entropy", loss, HEAD),
    "linear_cross_entropy_from_logits": ("linear_cross_entropy", z_loss, HEAD),
    "fused_loss": ("linear_cross_entropy", lambda *o: loss(*o, "none"), FUSED),
    "fused_loss_backward": ("linear_cross_entropy", lambda *o: loss(*o, "none"), FUSED),
    "fused_loss_and_gradients": ("linear_cross_entropy", loss, FUSED),
    "label_sums": ("linear_cross_entropy", loss, FUSED),
    "embedding_backward": (
        "embedding",
        lambda i, w: F.embedding(i, w),
        (torch.tensor([1, 3, 0, 0, 7]), some(9, 8, dtype=torch.bfloat16)),
    ),
}
FUSED_LATER = {"add_rms_norm", "rms_norm_add", "rms_norm_backward_add", "norm_rope", "norm_rope_backward"}
"""Ops that are put in when Inductor compiles, which it does not when rewrites are verified."""
COMPOSED = {
    *("rms_norm", "gated_rms_norm", "glu", "packed_glu", "rope", "rope_pair", "embedding"),
    *("complex_rope", "complex_rope_pair"),
    *("linear_cross_entropy", "linear_cross_entropy_lse", "linear_cross_entropy_rows", "linear_cross_entropy_sum"),
    "linear_cross_entropy_z",
}
"""Ops that have no kernel but those of others."""


@pytest.fixture
def planted(request, monkeypatch):
    """An op whose first result is half too large in places; all patterns on this device, at any size."""
    assert ops.rms_norm is torch.ops.liger_compile.rms_norm.default  # importing them has defined them
    op = getattr(torch.ops.liger_compile, request.param).default
    monkeypatch.setattr("liger_compile.patterns.attention._unfit", lambda match, seen: None)
    monkeypatch.setattr("liger_compile.patterns.embedding.LEAST", 0)
    module = importlib.import_module("liger_compile.ops.linear_cross_entropy")
    monkeypatch.setattr(module, "_can_fuse", lambda h, w, s: h.dtype is torch.bfloat16 and "fused" in loss_kind)
    loss_kind = "fused" if request.param.startswith("fused") or request.param == "label_sums" else ""
    skip_without_interpreter(request.param)
    others = torch._C.DispatchKeySet(torch._C.DispatchKey.XLA)  # its kernel is the one of every device but CUDA

    def wrong(*args, **kwargs):
        made = op.redispatch(others, *args, **kwargs)
        first = next(m for m in (made if isinstance(made, tuple) else (made,)) if m.numel() and m.is_floating_point())
        with torch.no_grad():
            first.detach().view(-1)[: max(first.numel() // 6, 1)].mul_(1.5)
        return made

    library = torch.library.Library("liger_compile", "IMPL")
    library.impl(request.param, wrong, "CPU")
    yield request.param
    library._destroy()


def test_every_op_is_planted():
    names = {n.partition("::")[2] for n in torch._C._dispatch_get_all_op_names() if n.startswith("liger_compile::")}
    assert set(PLANTED) == names - COMPOSED - FUSED_LATER


@pytest.mark.parametrize("planted", PLANTED, indirect=True)
def test_a_wrong_kernel_is_named(planted):
    pytest.importorskip("triton")
    pattern, function, operands = PLANTED[planted]
    with pytest.raises(liger_compile.VerificationError, match=rf"^{pattern}.*test_verify.py.*is off by") as raised:
        results = compiled(function)(*operands)
        sum(r.float().square().sum() for r in (results if isinstance(results, tuple) else (results,))).backward()
    kind = "the gradient of" if "backward" in planted or planted == "label_sums" else ""
    assert kind in str(raised.value) and f'"liger.disable": ["{pattern}"]' in str(raised.value)


def uncompiled(function, options):
    """`function` by the backend without Inductor."""
    return torch.compile(function, backend=rewritten(options=split_options(options)[0]))


def test_complex_numbers_are_compared():
    freqs = torch.polar(torch.ones(5, 4), torch.randn(5, 4))

    def rotate(x):
        z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * freqs
        return torch.view_as_real(z).flatten(-2).type_as(x)

    x = some(2, 5, 8)
    result = compiled(rotate)(x)
    assert relative_error(result.detach(), rotate(x).detach()) < 1e-6
    result.sum().backward()


def sine(x):
    return x.sin().exp()


SINE = liger_compile.make_pattern(sine, lambda x: torch.exp(torch.sin(x)))


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")  # of a composite op that is planted
@pytest.mark.parametrize("planted", PLANTED, indirect=True)
def test_bisection_names_a_wrong_kernel(planted):
    """Between two rewrites that are right."""
    pytest.importorskip("triton")
    pattern, function, operands = PLANTED[planted]
    wanted = [o for o in operands if o.requires_grad]

    def several(x, *operands):
        first, results = sine(x).sum(), function(*operands)
        results = results if isinstance(results, tuple) else (results,)
        return first + sum(r.float().square().sum() for r in results) + sine(x + 1).sum()

    def total_and_gradients(function):
        total = function(torch.ones(3), *operands)
        return total.detach(), *torch.autograd.grad(total, wanted)

    expected = total_and_gradients(several)
    tolerance = 2e-2 if any(o.dtype is torch.bfloat16 for o in operands) else 1e-3

    def works(options):
        found = total_and_gradients(uncompiled(several, {**options, "liger.patterns": [SINE]}))
        return all(relative_error(f, e) < tolerance for f, e in zip(found, expected, strict=True))

    found = liger_compile.bisect(works)
    assert found.pattern == pattern and "test_verify.py" in found.source


@pytest.mark.parametrize("planted", ["rms_norm_backward", "glu_forward"], indirect=True)
def test_bisection_finds_it_in_a_model(planted):
    model, inputs = build("llama", num_hidden_layers=1), batch()
    _, gradients = step(model, model, inputs)

    def works(options):
        _, grads = step(model, uncompiled(model, options), inputs)
        return all(relative_error(grads[n], g) < 1e-3 for n, g in gradients.items())

    found = liger_compile.bisect(works)
    expected = {"rms_norm_backward": ("rms_norm", "model.layers.0.input_layernorm")}
    assert (found.pattern, found.module) == expected.get(planted, ("swiglu", "model.layers.0.mlp"))


# ---- patterns of the user's ------------------------------------------------------------------------------------------


def scaled(x, dtype: torch.dtype):
    return (torch.relu(x) / x.shape[-1]).to(dtype)


@pytest.mark.parametrize("factor", [1, 2])
def test_operands_that_are_dtypes_and_sizes(factor):
    def replacement(x, dtype, width=0):
        return (x.relu() * factor / width).to(dtype)

    def function(x):
        return (torch.relu(x) / x.shape[-1]).to(torch.bfloat16)

    made = liger_compile.make_pattern(scaled, replacement, check=lambda match: {"width": match.shape("x")[-1]})
    options = {"liger.patterns": [made], **VERIFIED}
    call = torch.compile(function, backend="liger", options=options, dynamic=True)
    x = some(5, 6)
    if factor == 1:
        call(x).sum().backward()
        assert liger_compile.explain(function, options=options)(x).counts == {"scaled": 1}
    else:
        with pytest.raises(liger_compile.VerificationError, match=r"^scaled .*disable.: \[.scaled.\]"):
            call(x)


def test_nothing_is_compared_on_the_meta_device():
    function, operands = packed, (torch.empty(6, 8, device="meta"),)
    assert liger_compile.explain(function, options=VERIFIED)(*operands).counts == {"packed_swiglu": 1}


# ---- fuel ----------------------------------------------------------------------------------------------------------


def two(x, w):
    return norm(norm(x, w), w)


@pytest.fixture(autouse=True)
def full():
    fuel.reset()
    yield
    fuel.reset()


@pytest.mark.parametrize("limit, made", [(0, 0), (1, 1), (2, 2), (9, 2), (None, 2)])
def test_fuel(limit, made):
    options = liger_compile.Options(fuel=limit)
    report = report_of(two, some(3, 8), some(8), options=options)
    assert len(report.matches) == made
    assert [m.reason for m in report.misses] == [f"liger.fuel={limit} is used up"] * (2 - made)


def test_fuel_is_counted_over_graphs():
    counts = [len(report_of(two, some(3, 8), some(8), options=liger_compile.Options(fuel=3)).matches) for _ in range(3)]
    assert counts == [2, 1, 0]


@pytest.mark.parametrize("bad", range(1, 8))
def test_first_to_fail(bad):
    asked = []
    assert fuel.first_to_fail(lambda n: asked.append(n) or n < bad, 7) == bad
    assert len(asked) <= 3 and not {0, 7} & set(asked)


@pytest.mark.parametrize("outcome, message", [(True, "there is nothing to find"), (False, "the fault is elsewhere")])
def test_nothing_to_bisect(outcome, message):
    with pytest.raises(ValueError, match=message):
        liger_compile.bisect(lambda options: outcome)


PROGRAM = """
import json, os, pathlib, sys

matches = [{"pattern": "glu", "module": f"{i}", "source": f"a.py:{i}"} for i in range(%(graphs)d)]
if folder := os.environ.get("LIGER_COMPILE_DEBUG"):
    for i, match in enumerate(matches):
        (pathlib.Path(folder) / f"{i:03d}").mkdir()
        (pathlib.Path(folder) / f"{i:03d}" / "report.json").write_text(json.dumps({"matches": [match]}))
assert sys.argv[1:] == ["--", "of", "its", "own"]
sys.exit(int(os.environ["LIGER_COMPILE_FUEL"]) >= %(bad)s)
"""
"""What a training script does with the two variables; tests/test_docs.py runs one, that of docs/debugging.md."""


def bisected(tmp_path, graphs, bad):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM % {"graphs": graphs, "bad": bad})
    return main(["bisect", "--", sys.executable, str(path), "--", "of", "its", "own"])


@pytest.mark.parametrize("graphs, bad", [(1, 1), (3, 2), (1200, 1001)])
def test_bisect_a_command(tmp_path, capsys, graphs, bad):
    assert bisected(tmp_path, graphs, bad) == 0
    captured = capsys.readouterr()
    assert captured.out == f"rewrite {bad} of {graphs}: glu in {bad - 1} (a.py:{bad - 1})\n"
    assert captured.err.startswith("   all rewrites: fails\n     0 rewrites: works\n")


@pytest.mark.parametrize(
    "graphs, bad, message",
    [
        (3, "float('inf')", "it works with all rewrites"),
        (3, 0, "it fails without any rewrite too"),
        (0, 1, "nothing was rewritten"),
    ],
)
def test_bisect_refuses(tmp_path, capsys, graphs, bad, message):
    assert bisected(tmp_path, graphs, bad) == 1
    assert message in capsys.readouterr().err


def test_bisect_without_a_command(capsys):
    assert main(["bisect"]) == 1 and main(["bisect", "--", "no-such-command"]) == 1
    captured = capsys.readouterr().err
    assert "give the command to run" in captured and "no-such-command does not start" in captured


def test_options_from_the_environment(tmp_path, monkeypatch):
    """For programs that cannot be changed."""
    monkeypatch.setenv("LIGER_COMPILE_FUEL", "0")
    monkeypatch.setenv("LIGER_COMPILE_DEBUG", str(tmp_path / "debug"))
    torch.compile(nn.RMSNorm(8), backend="liger")(torch.randn(2, 8))
    report = json.loads((tmp_path / "debug" / "000" / "report.json").read_text())
    assert not report["counts"] and report["misses"][0]["reason"] == "liger.fuel=0 is used up"


@pytest.mark.parametrize("value", ["-1", "many", "1.5"])
def test_fuel_in_the_environment_is_checked(value, monkeypatch):
    monkeypatch.setenv("LIGER_COMPILE_FUEL", value)
    with pytest.raises(Exception, match=r"liger\.fuel: how many places to rewrite"):
        torch.compile(nn.RMSNorm(8), backend="liger")(torch.randn(2, 8))


def test_what_fails_without_being_rewritten_is_not_bisected():
    """It fails at first and works without rewrites, but there are none: the fault is not in one."""
    outcomes = iter([False, True])
    with pytest.raises(ValueError, match="nothing was rewritten"):
        liger_compile.bisect(lambda options: next(outcomes))
