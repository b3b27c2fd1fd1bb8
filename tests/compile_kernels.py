"""Compiles every kernel that the launchers launch for sm_90, on a machine without a GPU. Run by test_kernels.py."""

from __future__ import annotations

import sys
from importlib import import_module

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)


class NoDevice:
    """As much of a driver as compiling needs."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return TARGET


def main() -> None:
    driver.set_active(NoDevice())
    compiled: list[str] = []

    def compile_only(kernel, grid):
        def launch(*args, **kwargs):
            binary = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            assert len(binary.asm["cubin"]) > 0
            compiled.append(kernel.__name__)

        return launch

    JITFunction.__getitem__ = compile_only
    rms_norm, glu, rope, cross_entropy, scale = (
        import_module(f"liger_compile.kernels.{name}") for name in ("rms_norm", "glu", "rope", "cross_entropy", "scale")
    )
    for dtype in (torch.bfloat16, torch.float32):
        x, w = torch.randn(16, 256).to(dtype), torch.randn(256).to(dtype)
        for rounding in ("normed", "result", "factor"):
            rms_norm.forward(x, w, 1e-6, 1.0, rounding)
            rms_norm.backward(x, x, w, 1e-6, 1.0, rounding, True)
        wide = torch.randn(4, 16384).to(dtype)
        rms_norm.backward(wide, wide, wide[0], 1e-6, 0.0, "normed", True)
        scale.scaled(torch.randn(16, 256), torch.ones(()), x)
        rms_norm.backward(x, x, None, 1e-6, 0.0, "result", False)
        for activation in ("silu", "gelu", "gelu_tanh"):
            glu.forward(x, x, activation)
            glu.packed_backward(x[:, :128], x, activation, False)
        q, cos = torch.randn(2, 8, 16, 64).to(dtype), torch.randn(16, 64).to(dtype)
        rope.pair_forward(q, q[:, :2], cos, cos)
        rope.backward(q, cos[:, :32], cos[:, :32], list(q.stride()), dtype, True)
        target = torch.zeros(16, dtype=torch.int64)
        for how in ((1.0, 1.0, 0.0, False), (0.5, 3.0, 20.0, False), (1.0, 1.0, 20.0, True)):
            for gradient in (False, True):
                cross_entropy.rows(torch.randn(16, 9000).to(dtype), target, -100, how, gradient)
    print(f"triton {triton.__version__}: compiled {len(compiled)} kernels: {sorted(set(compiled))}")
    sys.exit(0 if {"_forward", "_backward", "_total", "_rope", "_rows", "_scaled"} <= set(compiled) else 1)


if __name__ == "__main__":
    main()
