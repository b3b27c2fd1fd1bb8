"""Linear + cross-entropy, forward and backward: time and memory of each way to compute it.

    python -m bench.loss [--out FOLDER]

The floor is the three matrix products alone. Our op is also measured with several chunk sizes and with the logits kept
whole, which is how the rules in `liger_compile.ops.linear_cross_entropy` were chosen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from liger_compile import ops

from . import common

SHAPES = [(8192, 4096, 128256), (16384, 2048, 151936), (4096, 2304, 256000), (2048, 4096, 32000)]
ROWS = [512, 1024, 2048, 4096, None]
"""Chunk sizes to measure; None keeps the logits whole."""


def products(h: torch.Tensor, w: torch.Tensor) -> Callable[[], Any]:
    n, v = h.shape[0], w.shape[0]
    rows = min(n, 2**31 // v // 2)
    logits = torch.randn(rows, v, device="cuda", dtype=h.dtype)
    h, w = h.detach(), w.detach()

    def run() -> None:
        for start in range(0, n, rows):
            part = h[start : start + rows]
            g = logits[: part.shape[0]]
            torch.mm(part, w.t(), out=g)
            torch.mm(g, w)
            torch.mm(g.t(), part)

    return run


def contenders(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], Any]]:
    def plain(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(h, w).float(), y)

    def ours(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ops.linear_cross_entropy(h, w, None, y)

    def backward(function: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(h, w, y), (h, w))

    made: dict[str, Callable[[], Any]] = {
        "three products": products(h, w),
        "eager": backward(plain),
        "Inductor": backward(torch.compile(plain)),
    }
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        made["Liger-Kernel"] = backward(lambda h, w, y: LigerFusedLinearCrossEntropyLoss()(w, h, y))
    except ImportError:
        pass
    compiled = torch.compile(plain, backend="liger")
    made["liger_compile"] = backward(compiled)

    module = import_module("liger_compile.ops.linear_cross_entropy")
    rules = module.chunk_rows, module.keep_whole

    def forced(rows: int | None) -> Any:
        module.chunk_rows, module.keep_whole = lambda *_: rows, lambda *_: rows is None
        try:
            return torch.autograd.grad(ours(h, w, y), (h, w))
        finally:
            module.chunk_rows, module.keep_whole = rules

    for rows in ROWS:
        if rows is None or rows < h.shape[0]:
            made[f"op alone, {f'chunks of {rows} rows' if rows else 'whole'}"] = partial(forced, rows)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    results = []
    for n, width, vocabulary in SHAPES:
        torch._dynamo.reset()
        h = torch.randn(n, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        w = (torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16) * 0.02).requires_grad_()
        y = torch.randint(vocabulary, (n,), device="cuda")
        functions = contenders(h, w, y)
        rows = []
        for name, function in functions.items():
            function()
            base = torch.cuda.memory_allocated()
            rows.append(
                {"way": name, "ms": 0.0, "peak above inputs MiB": round(common.peak_gib(function, base) * 1024)}
            )
        for row, ms in zip(rows, common.interleaved(functions, arguments.repeats).values(), strict=True):
            row["ms"] = ms
        title = f"{n} x {width} x {vocabulary}"
        results.append({"title": title, "rows": rows})
        print(f"\n{title}\n\n{common.table(rows)}", flush=True)
    print(common.save("loss", results, arguments.out))


if __name__ == "__main__":
    main()
