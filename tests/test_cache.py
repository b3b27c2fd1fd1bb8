"""A second process finds what the first one compiled, and nothing that was compiled with other code of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import liger_compile

SCRIPT = """
import json, torch, torch.nn.functional as F
from torch._dynamo.utils import counters
from liger_compile import _torch, backend
from liger_compile.ops import _library

_library.WHOLE_ON.add("cpu")  # ops of ours in the graphs that are kept

def model(x, w, v, y):
    logits = F.linear(F.silu(F.rms_norm(x, (8,), w, 1e-6)) * x, v)
    return F.cross_entropy(logits.float(), y), logits

rewrites = []
rewrite = backend.rewrite
backend.rewrite = lambda *args: rewrites.append(rewrite(*args)) or rewrites[-1]

def run():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    x, w, v, y = torch.randn(6, 8), torch.randn(8), torch.randn(11, 8), torch.randint(11, (6,))
    wanted = [t.requires_grad_() for t in (x, w, v)]
    loss, logits = torch.compile(model, backend="liger")(x, w, v, y)
    (loss + logits.square().mean()).backward()
    return {
        "results": [loss.tolist(), logits.tolist(), *(t.grad.tolist() for t in wanted)],
        "rewrites": rewrites[-1].counts,
        "aot": dict(counters["aot_autograd"]),
        "inductor": {k: n for k, n in counters["inductor"].items() if "cache" in k},
    }

results = [run()]
_torch.fingerprint = lambda: "other code"
print(json.dumps([*results, run()]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """[with our code, with other code] of the first process, and of the second."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}

    def run():
        result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(result.stdout.splitlines()[-1])

    return [run(), run()]


def test_the_first_process_compiles(runs):
    first, _ = runs[0]
    assert first["rewrites"] == {"rms_norm": 1, "swiglu": 1, "linear_cross_entropy": 1}
    assert first["aot"]["autograd_cache_miss"] == first["aot"]["autograd_cache_saved"] == 1
    assert first["inductor"] == {"fxgraph_cache_miss": 2}  # forward and backward
    assert "autograd_cache_bypass" not in first["aot"]


def test_the_second_process_finds_it(runs):
    first, second = runs[0][0], runs[1][0]
    assert second["aot"]["autograd_cache_hit"] == 1 and "autograd_cache_miss" not in second["aot"]
    assert second["inductor"] == {"fxgraph_cache_hit": 2}
    assert second["results"] == first["results"]
    assert second["rewrites"] == first["rewrites"]


def test_other_code_of_the_ops_is_not_found(runs):
    """The caches know an op by its name; a new release must not run what an old one traced."""
    (first, changed), (_, again) = runs
    assert changed["aot"]["autograd_cache_miss"] == 1 and "autograd_cache_hit" not in changed["aot"]
    assert changed["results"] == first["results"]
    assert again["aot"]["autograd_cache_hit"] == 1  # each has entries of its own


@torch.library.custom_op("liger_test::half_square", mutates_args=())
def half_square(x: torch.Tensor) -> torch.Tensor:
    return x.square() / 2


half_square.register_fake(torch.empty_like)
FACTOR = [1.0]
half_square.register_autograd(
    lambda ctx, dy: FACTOR[0] * dy * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def test_another_gradient_of_a_users_op_is_seen():
    """Its name is what it was; AOTAutograd's cache would have the gradient of before."""
    made = liger_compile.make_pattern(lambda x: x.square() / 2, half_square)
    x = torch.ones(8, requires_grad=True)
    with fresh_cache():
        for factor in (1.0, 3.0):
            FACTOR[0] = factor
            torch._dynamo.reset()
            counters.clear()
            compiled = torch.compile(lambda x: x.square() / 2, backend="liger", options={"liger.patterns": [made]})
            (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
            assert torch.equal(gradient, torch.full((8,), factor))
            assert not counters["aot_autograd"]["autograd_cache_hit"]
    assert counters["inductor"]["fxgraph_cache_hit"] == 1  # the forward
