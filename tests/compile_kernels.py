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
KERNELS = {
    *("_rms_norm", "_rms_norm_backward", "_total", "_glu", "_glu_backward"),
    *("_rope", "_rows", "_row_gradients", "_scaled", "_gather", "_exponentials"),
    *("_finish", "_dlogits", "_weighted", "_gradients", "_summed", "_column_sums", "_label_sums"),
    *("_whole_dhidden", "_whole_dweight", "_columns", "_add_product", "_runs", "_long_runs"),
    *("_norm_rope", "_norm_rope_backward", "_gated_forward", "_gated_backward"),
}
"""Those that must have been compiled."""


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
    names = "rms_norm", "norm_rope", "gated_rms_norm", "glu", "rope", "cross_entropy", "scale", "embedding"
    kernels = (import_module(f"liger_compile.kernels.{name}") for name in names)
    rms_norm, norm_rope, gated_rms_norm, glu, rope, cross_entropy, scale, embedding = kernels
    for dtype in (torch.bfloat16, torch.float32):
        x, w = torch.randn(16, 256).to(dtype), torch.randn(256).to(dtype)
        for rounding in ("normed", "result", "factor"):
            rms_norm.forward(x, w, 1e-6, 1.0, rounding)
            rms_norm.backward(x, x, w, 1e-6, 1.0, rounding, True)
            rms_norm.add_forward(x, x, w, 1e-6, 1.0, rounding)
            rms_norm.forward_add(x, x, w, 1e-6, 1.0, rounding)
            rms_norm.backward_add([x, x, x], x, w, x, 1e-6, 1.0, rounding, True, True)
        for guard in ("floor", "outside"):
            rms_norm.forward(x, w, 1e-6, 0.0, "normed", guard, 2.0)
            rms_norm.backward(x, x, w, 1e-6, 0.0, "normed", True, guard, 2.0)
        wide = torch.randn(4, 16384).to(dtype)
        for n in (x, wide):
            for how in (("silu", False, "normed", None), ("sigmoid", True, "result", [2, n.shape[-1] // 2])):
                gated_rms_norm.forward(n, n, n[0], 1e-6, *how)
                gated_rms_norm.backward(n, n, n, n[0], 1e-6, *how, True)
        rms_norm.backward(wide, wide, wide[0], 1e-6, 0.0, "normed", True)
        scale.scaled(torch.randn(16, 256), torch.ones(()), x)
        rms_norm.backward(x, x, None, 1e-6, 0.0, "result", False)
        for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
            glu.forward(x, x, activation)
            for again in (False, True):
                glu.packed_backward(x[:, :128], x, activation, False, again=again)
        for gate_first in (True, False):
            unit = ("silu", gate_first, 1.0, 7.0, 1.702, 1.0, not gate_first, True)
            glu.packed_forward(x, *unit)
            glu.packed_backward(x[:, :128], x, *unit, again=True)
        q, cos = torch.randn(2, 8, 16, 64).to(dtype), torch.randn(16, 64).to(dtype)
        rope.pair_forward(q, q[:, :2], cos, cos)
        rope.backward(q, cos[:, :32], cos[:, :32], list(q.stride()), dtype, True)
        for way in (("neighbours", False, False), ("neighbours", True, True), ("neighbours to halves", False, True)):
            some = cos[:, :32] if way[2] else cos
            rope.pair_forward(q, q[:, :2], some, some, False, False, False, *way)
            rope.backward(q, some, some, list(q.stride()), dtype, True, *way)
        angles = torch.randn(16, 32, 2).unbind(-1)
        rope.pair_forward(q, q[:, :2], *angles, True, False, False, "neighbours", False, True)
        for rounding in ("normed", "result", "factor"):
            for k, weights in ((q[:, :2], (w[:64], w[:64])), (None, (None, None))):
                how = (*weights, cos[:, :32], cos[:, :32], 1e-6, 1.0, rounding, False)
                norm_rope.forward(q, k, *how, False, True)
                norm_rope.backward(q, k, q, k, *how, weights[0] is not None)
        embedding.backward(x[:, :64], torch.zeros(x.shape[0]).int(), torch.zeros(x.shape[0]).long(), x[:, :64])
        target = torch.zeros(16, dtype=torch.int64)
        given, logits = torch.rand(16), torch.randn(16, 9000).to(dtype)
        for how in ((1.0, 1.0, 0.0, False, 0.0), (0.5, 3.0, 20.0, False, 0.1), (1.0, 1.0, 20.0, True, 0.0)):
            cross_entropy.row_gradients(logits, target, given, given, given, given, how, 0, logits)
            for gradient in (False, True):
                cross_entropy.rows(logits, target, given, -100, how, gradient)
    fused_loss()
    print(f"triton {triton.__version__}: compiled {len(compiled)} kernels: {sorted(set(compiled))}")
    sys.exit(0 if set(compiled) >= KERNELS else 1)


def fused_loss() -> None:
    """In all its ways, with and without bias, softcap and either gradient."""
    fused = import_module("liger_compile.ops.fused_loss")
    h, w, b = (torch.randn(shape).to(torch.bfloat16) for shape in ((300, 64), (1030, 64), (1030,)))
    y, given = torch.randint(1030, (300,)), torch.ones(1)
    for bias, softcap, need in ((b, 3.0, (True, True, True)), (None, 0.0, (True, False, False))):
        fused.fused_loss(h, w, bias, y, -100, 1.0, softcap, False)
        _, _, *kept = fused.fused_loss(h, w, bias, y, -100, 1.0, softcap, True)
        fused.fused_loss_backward(*kept, h, w, given, *need)
        squares = given if softcap else None
        made = fused.fused_loss_and_gradients(h, w, bias, y, -100, 1.0, softcap, given, squares, *need, 1)
        fused.gradients(fused.Packed(*made), torch.ones(()), h, w, y, need)
    rows = import_module("liger_compile.kernels.loss_rows")
    rows.whole_dhidden(h, w, y, torch.ones(300), y, given, h)
    rows.whole_dweight(w.view(torch.float16), torch.ones(64), h.float(), torch.zeros(1030).int(), given, w)


if __name__ == "__main__":
    main()
