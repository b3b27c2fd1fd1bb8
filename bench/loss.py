"""Linear + cross-entropy, forward and backward: time, memory and error of each way to compute it.

    python -m bench.loss [speed] [sums] [tokens] [ignored] [accuracy] [--out FOLDER]

speed: what each way takes; the floor is the three matrix products alone. sums: the same for losses under a mask that
hides half of the tokens, and for one with a z-loss. tokens: the same for log-probabilities of the
labels, each with a gradient of its own, and without gradients. ignored: time against the share of labels that are
ignored. accuracy: errors of loss and gradients against float64, next to eager's, over five seeds.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import liger_compile

from . import common

SHAPES = [
    *((8192, 4096, 128256), (16384, 2048, 151936), (4096, 2304, 256000), (2048, 4096, 32000)),
    (65536, 1024, 151936),
]
POLICIES = ("lean", "balanced", "fast")
SEEDS = 5


def plain(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float(), y)


def products(h: Tensor, w: Tensor) -> Callable[[], Any]:
    """The three products alone, of as many rows at a time as cuBLAS takes."""
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


def ours(policy: str) -> Callable[..., Tensor]:
    return torch.compile(plain, backend="liger", options={"liger.loss": policy})


def ways() -> dict[str, Callable[..., Tensor]]:
    """Functions of (hidden, weight, labels); those of other libraries where they are installed."""
    made: dict[str, Callable[..., Tensor]] = {"eager": plain, "Inductor": torch.compile(plain)}
    if hasattr(F, "linear_cross_entropy"):
        made["F.linear_cross_entropy"] = functools.partial(
            F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions()
        )
    if (liger := _liger()) is not None:
        made["Liger-Kernel"] = lambda h, w, y: liger(w, h, y)
    try:
        from cut_cross_entropy import linear_cross_entropy

        made["Apple CCE"] = linear_cross_entropy  # filters gradients
    except ImportError:
        pass
    return made | {f"liger_compile, {policy}": ours(policy) for policy in POLICIES}


def _liger(**how: Any) -> Callable[..., Tensor] | None:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss(**how)


def gradients(function: Callable[..., Tensor], h: Tensor, w: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = function(h, w, *rest)
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


def operands(n: int, width: int, classes: int, spread: float = 0.02) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.randn(n, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(classes, width, device="cuda", dtype=torch.bfloat16) * spread).requires_grad_()
    return h, w, torch.randint(classes, (n,), device="cuda")


def fits(function: Callable[[], Any]) -> bool:
    try:
        function()
        torch.cuda.synchronize()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def speed(repeats: int) -> list[dict[str, Any]]:
    results = []
    for shape in SHAPES:
        torch._dynamo.reset()
        h, w, y = operands(*shape)
        functions = {"three products": products(h, w)}
        functions |= {name: functools.partial(gradients, function, h, w, y) for name, function in ways().items()}
        rows = [{"way": name, "ms": None, "of the products": None, "peak MiB": None} for name in functions]
        able = {name: function for name, function in functions.items() if fits(function)}
        base = torch.cuda.memory_allocated()
        peaks = {name: round(common.peak_gib(function, base) * 1024) for name, function in able.items()}
        times = common.interleaved(able, repeats, ahead=2)
        for row in rows:
            if row["way"] in able:
                ms = times[row["way"]]
                row |= {"ms": ms, "of the products": ms / times["three products"], "peak MiB": peaks[row["way"]]}
        least = 2 * (h.numel() + w.numel()) / 2**20
        title = f"{' x '.join(map(str, shape))}; the gradients alone take {least:.0f} MiB"
        results.append({"title": title, "rows": rows})
        print(f"\n{title}\n\n{common.table(rows)}", flush=True)
    return results


def masked(h: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return (F.cross_entropy(F.linear(h, w).float(), y, reduction="none") * mask).sum() / mask.sum()


def with_z_loss(h: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    logits = F.linear(h, w).float()
    return F.cross_entropy(logits, y) + 1e-4 * logits.logsumexp(-1).square().mean()


def sums(repeats: int) -> list[dict[str, Any]]:
    results = []
    for shape in SHAPES[:2]:
        h, w, y = operands(*shape)
        mask = (torch.rand(y.shape, device="cuda") < 0.5).float()
        for function in (masked, with_z_loss):
            torch._dynamo.reset()
            rewrites = [m.replacement for m in liger_compile.explain(function)(h, w, y, mask).matches]
            made: dict[str, Callable[..., Tensor]] = {"eager": function, "Inductor": torch.compile(function)}
            if function is with_z_loss and (liger := _liger(lse_square_scale=1e-4)) is not None:
                made["Liger-Kernel"] = lambda h, w, y, mask, liger=liger: liger(w, h, y)
            for policy in POLICIES:
                options = {"liger.loss": policy}
                made[f"liger_compile, {policy}"] = torch.compile(function, backend="liger", options=options)
            able = {n: f for n, g in made.items() if fits(f := functools.partial(gradients, g, h, w, y, mask))}
            base = torch.cuda.memory_allocated()
            peaks = {name: round(common.peak_gib(function, base) * 1024) for name, function in able.items()}
            times = common.interleaved(able, repeats, ahead=2)
            rows = [{"way": n, "ms": times.get(n), "peak MiB": peaks.get(n)} for n in made]
            title = f"{' x '.join(map(str, shape))}: {function.__name__}"
            results.append({"title": title, "replaced by": rewrites, "rows": rows})
            print(f"\n{title} {rewrites}\n\n{common.table(rows)}", flush=True)
    return results


def log_probabilities(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.log_softmax(F.linear(h, w).float(), -1).gather(-1, y[:, None]).squeeze(-1)


def with_gradients(function: Callable[..., Tensor], h: Tensor, w: Tensor, y: Tensor, incoming: Tensor) -> Any:
    return torch.autograd.grad(function(h, w, y), (h, w), incoming)


@torch.no_grad()
def without_gradients(function: Callable[..., Tensor], h: Tensor, w: Tensor, y: Tensor, incoming: Tensor) -> Any:
    return function(h, w, y)


def tokens(repeats: int) -> list[dict[str, Any]]:
    results = []
    for shape in SHAPES[:2]:
        torch._dynamo.reset()
        h, w, y = operands(*shape)
        incoming = torch.randn(y.shape, device="cuda")
        made = {"eager": log_probabilities, "Inductor": torch.compile(log_probabilities)}
        for policy in POLICIES:
            options = {"liger.loss": policy}
            made[f"liger_compile, {policy}"] = torch.compile(log_probabilities, backend="liger", options=options)
        rows: list[dict[str, Any]] = [{"way": name} for name in made]
        for what, call in {"forward + backward": with_gradients, "forward": without_gradients}.items():
            functions = {name: functools.partial(call, function, h, w, y, incoming) for name, function in made.items()}
            able = {name: function for name, function in functions.items() if fits(function)}
            base = torch.cuda.memory_allocated()
            peaks = {name: round(common.peak_gib(function, base) * 1024) for name, function in able.items()}
            times = common.interleaved(able, repeats, ahead=2)
            for row in rows:
                row |= {f"{what}: ms": times.get(row["way"]), f"{what}: peak MiB": peaks.get(row["way"])}
        title = f"{' x '.join(map(str, shape))}: log-probabilities of the labels"
        results.append({"title": title, "rows": rows})
        print(f"\n{title}\n\n{common.table(rows)}", flush=True)
    return results


def ignored(repeats: int) -> list[dict[str, Any]]:
    results = []
    for shape in SHAPES[:2]:
        torch._dynamo.reset()
        h, w, y = operands(*shape)
        functions = {}
        both = {"Inductor": torch.compile(plain), "liger_compile": ours("balanced")}
        for share in (0, 0.25, 0.5, 0.75, 0.9):
            labels = torch.where(torch.rand(y.shape, device="cuda") < share, -100, y)
            for name, function in both.items():
                functions[share, name] = functools.partial(gradients, function, h, w, labels)
        times = common.interleaved(functions, repeats, ahead=2)
        rows = [
            {
                "ignored": share,
                **{name: times[share, name] for name in both},
                "of none ignored": t / times[0, "liger_compile"],
            }
            for (share, name), t in times.items()
            if name == "liger_compile"
        ]
        title = " x ".join(map(str, shape))
        results.append({"title": title, "rows": rows})
        print(f"\n{title}: ms by the share of labels that are ignored\n\n{common.table(rows)}", flush=True)
    return results


def inputs(shape: tuple[int, int, int], seed: int) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """Kinds of operands by name."""
    torch.manual_seed(seed)
    n, width, classes = shape
    h, w, y = operands(*shape)
    yield "random", (h, w, y)
    yield "random, half ignored", (h, w, torch.where(torch.rand(n, device="cuda") < 0.5, -100, y))
    peaked = (w.detach() * 8).requires_grad_()
    with torch.no_grad():
        best = torch.cat([(part @ peaked.t()).argmax(1) for part in h.split(1024)])
    yield "peaked, most labels right", (h, peaked, torch.where(torch.rand(n, device="cuda") < 0.7, best, y))
    frequency = 1 / torch.arange(1, classes + 1, device="cuda").double()
    y = torch.multinomial(frequency / frequency.sum(), n, replacement=True)
    common_part = 0.5 * torch.randn(width, device="cuda", dtype=torch.bfloat16)
    h = (h.detach() + common_part).requires_grad_()
    yield "states with a common part, Zipf labels", (h, w, y)
    known = torch.outer(
        frequency.log() - frequency.log().mean(), common_part.double() / common_part.double().square().sum()
    )
    yield "the same, frequencies known", (h, (w.detach() + known.bfloat16()).requires_grad_(), y)


def exact(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64, some rows at a time."""
    wide, dw, dh = (
        w.detach().double(),
        torch.zeros_like(w, dtype=torch.float64),
        torch.zeros_like(h, dtype=torch.float64),
    )
    count, loss = (y != -100).sum(), torch.zeros((), dtype=torch.float64, device="cuda")
    for rows in torch.arange(h.shape[0], device="cuda").split(512):
        part = h.detach()[rows].double()
        z = (part @ wide.t()).requires_grad_()
        some = F.cross_entropy(z, y[rows], reduction="sum") / count
        (g,) = torch.autograd.grad(some, z)
        loss += some.detach()
        dh[rows] = g @ wide
        dw += g.t() @ part
    return loss, dh, dw


def accuracy(_: int) -> list[dict[str, Any]]:
    results = []
    for shape in [*SHAPES[:2], (4096, 2304, 128259)]:
        torch._dynamo.reset()
        functions = {"eager": plain} | {policy: ours(policy) for policy in POLICIES}
        seen: dict[str, dict[str, list[list[float]]]] = {}
        for seed in range(SEEDS):
            for kind, operand in inputs(shape, seed + int(torch.randint(10**6, ()))):
                truth = exact(*operand)
                for name, function in functions.items():
                    found = gradients(function, *operand)
                    errors = [float((f.double() - t).norm() / t.norm()) for f, t in zip(found, truth, strict=True)]
                    errors.append(float((found[0].double() - truth[0]) / truth[0]))
                    errors += [
                        float((f.double() - t).mean() / t.abs().mean())
                        for f, t in zip(found[1:], truth[1:], strict=True)
                    ]
                    seen.setdefault(kind, {}).setdefault(name, []).append(errors)
                del truth, found
        rows = []
        for kind, by_name in seen.items():
            for name in POLICIES:
                row: dict[str, Any] = {"operands": kind, "policy": name}
                for i, what in enumerate(("loss", "dhidden", "dweight")):
                    ratios = [o[i] / e[i] for o, e in zip(by_name[name], by_name["eager"], strict=True)]
                    row[what] = statistics.median(o[i] for o in by_name[name])
                    row |= {f"{what} / eager's": statistics.median(ratios), f"{what}, largest": max(ratios)}
                for i, what in enumerate(("loss", "dhidden", "dweight")):
                    both = [statistics.mean(x[3 + i] for x in by_name[which]) for which in (name, "eager")]
                    row |= {f"{what}: signed mean": both[0], f"{what}: eager's signed mean": both[1]}
                rows.append(row)
        title = " x ".join(map(str, shape))
        results.append({"title": title, "rows": rows})
        short = [{k: v for k, v in r.items() if "signed" not in k} for r in rows]
        print(f"\n{title}: relative errors against float64, {SEEDS} seeds\n\n{common.table(short)}", flush=True)
    return results


PARTS = {"speed": speed, "sums": sums, "tokens": tokens, "ignored": ignored, "accuracy": accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    for name in arguments.parts or PARTS:
        print(common.save(f"loss-{name}", PARTS[name](arguments.repeats), arguments.out))


if __name__ == "__main__":
    main()
