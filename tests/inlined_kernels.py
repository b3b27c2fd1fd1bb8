"""What Inductor makes of our ops where it starts their kernels itself, run without a GPU. Run by test_inline.py.

It writes the kernels' source into its own code. That is compiled here for the CPU, around kernels that are read from
there and interpreted, and compared with eager.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from compile_kernels import NoDevice
from helpers import relative_error
from interpreter import complete
from torch._inductor.async_compile import AsyncCompile
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from liger_compile.ops import _library

FOLDER = Path(tempfile.mkdtemp())
STARTED: list[str] = []
"""The kernels that were started, by name."""


class Driver(NoDevice):
    def get_benchmarker(self):
        return None


class Kernel:
    """As much of Inductor's kernel as its code calls."""

    numbers = itertools.count()

    def __init__(self, name, source):
        self.name = name
        start = source.index("@triton_heuristics")
        heuristics, body = source[start:].split("@triton.jit", 1)
        self.constants = {}

        def user_autotune(configs, triton_meta, **_):
            self.constants = triton_meta["constants"]

        made = "@interpreted" + body.replace("@triton.jit", "@interpreted")
        path = FOLDER / f"kernel_{next(self.numbers)}.py"
        path.write_text(f"import triton\nimport triton.language as tl\n{made}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        module.interpreted = InterpretedFunction
        spec.loader.exec_module(module)
        self.function = getattr(module, name)
        scope = {"user_autotune": user_autotune, "__file__": "", "DeviceProperties": lambda **_: None}
        exec(heuristics.replace("@triton_heuristics.", "").strip(), {**scope, "triton": module.triton})

    def run(self, *args, stream):
        STARTED.append(self.name)
        names = self.function.arg_names
        given = [n for n in names if not n.isupper()]
        *args, x, y, z = args
        arguments = dict(zip(given, args, strict=True)) | self.constants  # what is None came as -1
        self.function[(x, y, z)](**arguments)


def norm(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def block(x, w1, w2, a, b):
    """A norm, a packed unit, the residual sum and a norm behind it."""
    gate, up = (norm(x, w1) @ a).chunk(2, dim=-1)
    x = x + (F.silu(gate) * up) @ b
    return norm(x, w2)


COS, SIN = torch.randn(1, 1, 9, 16), torch.randn(1, 1, 9, 16)


def heads(x, a, wq, wk):
    q, k = (x @ a).view(2, -1, 3, 16).split((2, 1), dim=2)
    q, k = norm(q, wq).transpose(1, 2), norm(k, wk).transpose(1, 2)
    cos, sin = COS[:, :, : x.shape[1]], SIN[:, :, : x.shape[1]]
    return rotate(q, cos, sin), rotate(k, cos, sin)


def gated(x, a, w):
    g = x @ a
    return (norm(x, w) * F.silu(g.float())).to(x.dtype), F.gelu(x, approximate="tanh") * g


def some(*shape):
    return torch.randn(shape)


CASES = {
    block: ((2, 6, 16), (16,), (16,), (16, 64), (32, 16)),
    heads: ((2, 6, 16), (16, 48), (16,), (16,)),
    gated: ((6, 16), (16, 16), (16,)),
}


def results(function, operands, dynamic=False):
    operands = [o.detach().clone().requires_grad_() for o in operands]
    if dynamic:
        torch._dynamo.mark_dynamic(operands[0], operands[0].ndim - 2)
    outputs = function(*operands)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(3)
    along = [torch.randn(o.shape, generator=generator) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, operands, along)]


def main() -> None:
    assert triton.knobs.runtime.interpret, "Triton's own functions must be interpreted"
    triton.knobs.runtime.interpret = False  # ours must not be, or they are nothing to Inductor
    for name in ("gated_rms_norm", "glu", "norm_rope", "rms_norm", "rope"):
        importlib.import_module(f"liger_compile.kernels.{name}")
    triton.knobs.runtime.interpret = True
    torch._inductor.config.force_disable_caches = True
    complete()
    driver.set_active(Driver())
    _library.WHOLE_ON.add("cpu")
    AsyncCompile.triton = lambda self, name, source, device_str="cuda": Kernel(name, source)
    for (function, shapes), dynamic in itertools.product(CASES.items(), (False, True)):
        torch._dynamo.reset()
        STARTED.clear()
        compiled = torch.compile(function, backend="liger", fullgraph=True)
        operands = [some(*shape) for shape in shapes]
        compare(function, compiled, operands, dynamic)
        print(function.__name__ + dynamic * "_dynamic", sorted(STARTED), flush=True)
        if dynamic:  # and once more with other sizes, without compiling
            operands[0] = some(*(n if d != operands[0].ndim - 2 else n + 2 for d, n in enumerate(operands[0].shape)))
            with torch.compiler.set_stance("fail_on_recompile"):
                compare(function, compiled, operands, dynamic)


def compare(function, compiled, operands, dynamic):
    expected, made = results(function, operands), results(compiled, operands, dynamic)
    for i, (ours, eager) in enumerate(zip(made, expected, strict=True)):
        error = relative_error(ours.detach(), eager.detach())
        assert error < 1e-5, (function.__name__, dynamic, i, error)


if __name__ == "__main__":
    sys.exit(main())
