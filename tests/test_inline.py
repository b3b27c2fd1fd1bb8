"""Ops as the kernels that they start: that the kernels alone give the results, and that Inductor can start them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ops import SAMPLES
from torch._inductor import lowering
from torch.utils._pytree import tree_leaves, tree_map_only

from liger_compile import _torch, inline
from liger_compile.ops import _library

NAMES = {op.name().partition("::")[2].partition(".")[0]: op for op in _library.LAUNCHERS}


def on_kernels_device(value):
    """Kernels are interpreted for CPU tensors; on a GPU machine they are not."""
    return value.cuda() if torch.cuda.is_available() else value


def sample(name, index):
    args, kwargs = SAMPLES[name][index]()
    schema = NAMES[name]._schema.arguments
    given = dict(zip([a.name for a in schema], args, strict=False)) | kwargs
    args = [given.get(a.name, a.default_value) for a in schema]
    return tree_map_only(torch.Tensor, on_kernels_device, args)


def replay(program, fakes, reals):
    """The results, of real tensors: memory is made, and the kernels are started."""
    base = {}
    for fake, real in zip(tree_leaves(fakes), tree_leaves(reals), strict=True):
        if isinstance(fake, torch.Tensor):
            base[_torch.storage_key(fake)] = real
    for fake in program.made:
        made = torch.full(fake.shape, torch.nan, dtype=torch.float64).to(fake.dtype)
        base[_torch.storage_key(fake)] = on_kernels_device(made.as_strided(fake.shape, fake.stride()).clone())

    def real(fake):
        found = base[_torch.storage_key(fake)]
        return found.as_strided(fake.shape, fake.stride(), found.storage_offset() + fake.storage_offset())

    for each in program.launches:
        each.kernel[each.grid](**tree_map_only(torch.Tensor, real, each.arguments), num_warps=each.num_warps)
    return tree_map_only(torch.Tensor, real, program.results)


def program_of(name, args):
    """The tensors without data that stand for args, and the program; None if the launcher computes something else."""
    with _torch.fake_mode() as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, args)
        try:
            return fakes, inline.program(_library.LAUNCHERS[NAMES[name]], tuple(fakes), {})
        except inline.NotLaunchesAlone:
            return fakes, None


@pytest.mark.parametrize("name", NAMES)
def test_ops_are_programs(name):
    """But for layouts that have to be copied, and tensors without elements."""
    assert any(program_of(name, sample(name, i))[1] for i in range(len(SAMPLES[name])))


@pytest.mark.parametrize("name, index", [(n, i) for n in NAMES for i in range(len(SAMPLES[n]))])
def test_a_program_is_its_op(name, index):
    args = sample(name, index)
    fakes, program = program_of(name, args)
    if program is None:
        pytest.skip("called as an op")
    expected, found = _library.LAUNCHERS[NAMES[name]](*args), replay(program, fakes, args)
    for ours, theirs in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride() or ours.numel() == 0
        assert torch.equal(ours, theirs)


def test_what_else_is_computed_is_refused():
    x = torch.randn(3, 4)
    for launcher, reason in ((lambda x: x.clone(), "clone"), (lambda x: x, "operand"), (lambda x: x.add_(1), "add_")):
        with pytest.raises(inline.NotLaunchesAlone, match=reason):
            inline.program(launcher, (x,), {})
    with pytest.raises(inline.NotLaunchesAlone, match="operand"):
        inline.program(lambda *, x: x, (), {"x": x})


def test_a_launcher_that_copies_is_called_as_an_op():
    """A layout of four dimensions that cannot be addressed by rows."""
    x = torch.randn(3, 5, 7, 2, 16).permute(1, 3, 0, 2, 4)[::2, :, ::2, ::3]
    with pytest.raises(inline.NotLaunchesAlone):
        inline.program(_library.LAUNCHERS[NAMES["rms_norm_forward"]], (x, None, 1e-6, 0.0, "normed"), {})


def test_a_version_that_was_not_looked_at(monkeypatch):
    """Ops are called as ops there."""
    monkeypatch.setattr(_torch, "STARTED_BEFORE", (2, 0))
    op = NAMES["glu_forward"]
    before = lowering.lowerings.pop(op, None)
    monkeypatch.setattr(_torch, "_lowered", lambda *_: pytest.fail("kernels are started"))
    _torch._know_ops()
    assert lowering.lowerings.pop(op)
    if before is not None:
        lowering.lowerings[op] = before


@pytest.mark.skipif(torch.__version__ >= _torch.STARTED_BEFORE, reason="ops are called as ops")
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs interpreted; whole models run on the GPU itself")
def test_inductor_starts_the_kernels():
    """In a process of its own, in which our kernels are not interpreted, but compiled by Inductor."""
    script = Path(__file__).parent / "inlined_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    lines = (line.partition(" ") for line in result.stdout.splitlines())
    started = {function: set(re.findall(r"'(\w+)'", kernels)) for function, _, kernels in lines}
    gated = {"_gated_forward", "_gated_backward", "_glu", "_glu_backward", "_total"}
    for known in ("", "_dynamic"):  # all sizes, or all but the number of tokens
        assert started[f"block{known}"] == {"_rms_norm", "_rms_norm_backward", "_total", "_glu", "_glu_backward"}
        assert started[f"heads{known}"] == {"_norm_rope", "_norm_rope_backward", "_total"}
        assert started[f"gated{known}"] == gated
