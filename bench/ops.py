"""Each op, plain PyTorch code that is compiled by `backend="liger"`, against Inductor's own kernels and Liger-Kernel's.

    python -m bench.ops [--only NAME] [--out FOLDER]

Forward, and forward + backward. Kernels are timed without host time, as long as the host keeps ahead of them. The floor
is the bytes that must move over the rate of a copy. Where `rewrites` is 0, liger_compile is Inductor.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F

import liger_compile

from . import common

TOKENS = 16384


def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def add_then_norm(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return norm(total, w), total


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def rotate_neighbours(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    def turned(x: torch.Tensor) -> torch.Tensor:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)

    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def rotate_complex(q: torch.Tensor, k: torch.Tensor, freqs: torch.Tensor) -> Any:
    def rotated(x: torch.Tensor) -> torch.Tensor:
        z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(z * freqs).flatten(-2).type_as(x)

    return rotated(q), rotated(k)


def gated_norm(x: torch.Tensor, gate: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (norm(x, w) * F.silu(gate.float())).to(x.dtype)


def norm_of_gated(x: torch.Tensor, gate: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.float() * F.silu(gate.float())
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def swiglu_oai(x: torch.Tensor) -> torch.Tensor:
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(1.702 * gate))


def cases() -> dict[str, dict[str, Any]]:
    """Name to the plain function, Liger-Kernel's, the operands, and the bytes of (forward, backward)."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    made: dict[str, dict[str, Any]] = {}
    shapes = (TOKENS, 4096), (TOKENS, 1024), (TOKENS * 16, 128), (2048, 16384)
    for rows, width in (*shapes, (TOKENS * 2, 576), (TOKENS, 2304), (TOKENS, 2880), (TOKENS, 5120)):
        made[f"RMSNorm {rows} x {width}"] = {
            "plain": norm,
            "liger": _liger("LigerRMSNormFunction", lambda f: lambda x, w: f.apply(x, w, 1e-6)),
            "operands": (tensor(rows, width), tensor(width)),
            "bytes": (4 * rows * width, 6 * rows * width),
        }
    for width in (14336, 3072):
        made[f"SwiGLU {TOKENS} x {width}"] = {
            "plain": lambda g, u: F.silu(g) * u,
            "liger": _liger("LigerSiLUMulFunction", lambda f: lambda g, u: f.apply(g, u)),
            "operands": (tensor(TOKENS, width), tensor(TOKENS, width)),
            "bytes": (6 * TOKENS * width, 10 * TOKENS * width),
        }
    made[f"SwiGLU, up in float32 {TOKENS} x 3072"] = {
        "plain": lambda g, u: F.silu(g) * u,
        "liger": None,
        "operands": (tensor(TOKENS, 3072), tensor(TOKENS, 3072).detach().float().requires_grad_()),
        "bytes": (10 * TOKENS * 3072, 16 * TOKENS * 3072),
    }
    made[f"SwiGLU, packed {TOKENS} x {2 * 8192}"] = {
        "plain": lambda x: F.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :],
        "liger": None,
        "operands": (tensor(TOKENS, 2 * 8192),),
        "bytes": (6 * TOKENS * 8192, 10 * TOKENS * 8192),
    }
    made[f"SwiGLU of GPT-OSS, interleaved {TOKENS} x {2 * 2880}"] = {
        "plain": swiglu_oai,
        "liger": None,
        "operands": (tensor(TOKENS, 2 * 2880),),
        "bytes": (6 * TOKENS * 2880, 10 * TOKENS * 2880),
    }
    gates_first = [(TOKENS, width, True) for width in (4096, 5120, 1536)]
    for rows, width, first in ((TOKENS * 32, 128, False), (TOKENS, 2304, False), *gates_first):
        made[f"RMSNorm, gate {'first' if first else 'last'} {rows} x {width}"] = {
            "plain": norm_of_gated if first else gated_norm,
            "liger": None,
            "operands": (tensor(rows, width), tensor(rows, width), tensor(width)),
            "bytes": (6 * rows * width, 10 * rows * width),
        }
    narrow = (9, 3, 64, 8, 2048), (32, 32, 80, 4, 2048), (32, 32, 96, 4, 2048)
    for heads, kv_heads, width, batch, length in (*narrow, (32, 8, 128, 2, 8192), (16, 8, 128, 8, 2048)):
        operands = tuple(
            tensor(batch, length, h, width).detach().transpose(1, 2).requires_grad_() for h in (heads, kv_heads)
        )
        cos, sin = tensor(1, 1, length, width).detach(), tensor(1, 1, length, width).detach()
        size = sum(x.numel() for x in operands)
        made[f"RoPE {batch} x {length}, {heads} + {kv_heads} heads of {width}"] = {
            "plain": lambda q, k, cos=cos, sin=sin: rotate(q, k, cos, sin),
            "liger": _liger(
                "LigerRopeFunction", lambda f, cos=cos, sin=sin: lambda q, k: f.apply(q, k, cos[0], sin[0])
            ),
            "operands": operands,
            "bytes": (4 * size, 4 * size),
        }
    freqs = torch.polar(torch.ones(1, 1, length, 64), torch.randn(1, 1, length, 64)).cuda()
    made[f"RoPE of neighbours {batch} x {length}, {heads} + {kv_heads} heads of 128"] = {
        "plain": lambda q, k, cos=cos, sin=sin: rotate_neighbours(q, k, cos, sin),
        "liger": None,
        "operands": operands,
        "bytes": (4 * size, 4 * size),
    }
    made[f"RoPE of complex numbers {batch} x {length}, {heads} + {kv_heads} heads of 128"] = {
        "plain": lambda q, k, freqs=freqs: rotate_complex(q, k, freqs),
        "liger": None,
        "operands": operands,
        "bytes": (4 * size, 4 * size),
    }
    for heads, kv_heads, width, batch, length in ((32, 8, 128, 2, 8192), (16, 8, 128, 8, 2048), (8, 4, 256, 4, 4096)):
        operands = (
            *(tensor(batch, length, n, width) for n in (heads, kv_heads)),
            *(tensor(width) for _ in range(2)),
        )
        cos, sin = (tensor(1, 1, length, width).detach() for _ in range(2))
        size = operands[0].numel() + operands[1].numel()

        def plain(q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any = cos, sin: Any = sin) -> Any:
            return rotate(norm(q, q_weight).transpose(1, 2), norm(k, k_weight).transpose(1, 2), cos, sin)

        made[f"q/k-norm + RoPE {batch} x {length}, {heads} + {kv_heads} heads of {width}"] = {
            "plain": plain,
            "liger": None,
            "operands": operands,
            "bytes": (4 * size, 6 * size),
        }
    for rows, width in ((TOKENS, 4096), (TOKENS, 1024), (TOKENS, 2304)):
        operands = tensor(rows, width), tensor(rows, width), tensor(width)
        made[f"residual + RMSNorm {rows} x {width}"] = {
            "plain": add_then_norm,
            "liger": _liger("LigerFusedAddRMSNormFunction", lambda f: lambda x, r, w: f.apply(x, r, w, 1e-6)),
            "operands": operands,
            "bytes": (8 * rows * width, 8 * rows * width),
        }
    for classes, width, tokens, kind in (
        *((128256, 4096, 8192, ""), (128256, 4096, 8192, " of one kind"), (128256, 4096, 8192, ", float32")),
        *((151936, 1024, TOKENS, ""), (32000, 4096, TOKENS, ""), (32000, 4096, TOKENS, ", float32")),
        *((32000, 1024, TOKENS, ""), (32000, 1024, 512, ""), (49152, 576, TOKENS, ""), (16000, 1024, TOKENS, "")),
    ):
        one, wide = "one" in kind, "float32" in kind
        ids = (torch.zeros(tokens, dtype=torch.int64) if one else torch.randint(classes, (tokens,))).cuda()
        table = tensor(classes, width)
        made[f"Embedding {classes} x {width}, {tokens} tokens{kind}"] = {
            "plain": lambda w, ids=ids: F.embedding(ids, w),
            "liger": None,
            "operands": (table.detach().float().requires_grad_() if wide else table,),
            "bytes": tuple(b << wide for b in (4 * tokens * width, 2 * (classes + tokens) * width)),
        }
    return made


def _liger(name: str, use: Callable[[Any], Callable[..., Any]]) -> Callable[..., Any] | None:
    try:
        from liger_kernel import ops as liger_ops
    except ImportError:
        return None
    return use(getattr(liger_ops, name))


def measure(ways: dict[str, Callable[..., Any]], operands: tuple[torch.Tensor, ...]) -> dict[str, tuple[float, float]]:
    """Milliseconds of the forward, and of forward and backward, of each way.

    The host runs ahead: a matrix product keeps the device busy while a round of calls is queued behind it, and only the
    calls are timed. They take turns over copies of the operands that together do not fit the L2 cache.
    """
    size = sum(x.nbytes for x in operands)
    sets = [operands] + [
        tuple(x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in operands)
        for _ in range(min(2**29 // size, 8))
    ]
    blocker = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    found: dict[str, list[list[float]]] = {name: [[], []] for name in ways}
    for round_ in range(8):
        for name, function in ways.items():
            results = function(*operands)
            incoming = [torch.randn_like(r) for r in (results if isinstance(results, tuple) else (results,))]

            def forward(each: tuple[torch.Tensor, ...], function: Any = function) -> None:
                with torch.no_grad():
                    function(*each)

            def both(each: tuple[torch.Tensor, ...], function: Any = function, incoming: Any = incoming) -> None:
                made = function(*each)
                torch.autograd.grad(made if isinstance(made, tuple) else (made,), each, incoming)

            for part, call in enumerate((forward, both)):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                for _ in range(6):
                    torch.mm(blocker, blocker)
                start.record()
                for each in sets:
                    call(each)
                end.record()
                torch.cuda.synchronize()
                if round_ >= 2:  # the first rounds warm up
                    found[name][part].append(start.elapsed_time(end) / len(sets))
    return {name: tuple(map(statistics.median, parts)) for name, parts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure the ops whose names contain this")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    # Else a compiled function copies each incoming gradient that is laid out as its result, and not contiguous.
    torch._functorch.config.guess_tangent_strides_as_outputs = True
    rate = common.ceilings()["copy_TB_per_s"] * 1e9
    rows = []
    for name, case in cases().items():
        if arguments.only not in name:
            continue
        torch._dynamo.reset()
        rewrites = sum(liger_compile.explain(case["plain"])(*case["operands"]).counts.values())
        ways = {
            "Inductor": torch.compile(case["plain"]),
            "Liger-Kernel": case["liger"],
            "liger_compile": torch.compile(case["plain"], backend="liger"),
        }
        floor = tuple(sum(case["bytes"][: i + 1]) / rate for i in range(2))
        row: dict[str, Any] = {"op": name, "rewrites": rewrites}
        for i, part in enumerate(("forward", "forward + backward")):
            row[f"{part}: floor ms"] = floor[i]
        times = measure({k: f for k, f in ways.items() if f is not None}, case["operands"])
        for way in ways:
            for part, time in zip(("forward", "forward + backward"), times.get(way, (None, None)), strict=True):
                row[f"{part}: {way} ms"] = time
        rows.append(row)
        print(row, flush=True)
        path = common.save("ops", rows, arguments.out)  # what there is, if it does not end
    for part in ("forward", "forward + backward"):
        print(
            f"\n{part}\n\n"
            + common.table(
                [
                    {k.replace(f"{part}: ", ""): v for k, v in r.items() if ":" not in k or k.startswith(f"{part}:")}
                    for r in rows
                ]
            )
        )
    print(path)


if __name__ == "__main__":
    main()
