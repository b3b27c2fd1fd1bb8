"""Attention whose mask is read and given to FlexAttention, against the same with the mask kept, over lengths.

    python -m bench.attention [--dynamic] [--out FOLDER]

Forward + backward of one layer, out of four in a row that share a mask, as in a model: making the mask, or what stands
for it, is a part of what is timed. With `--dynamic` one compilation serves all lengths.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

import liger_compile

from . import common

LAYERS, TOKENS = 4, 16384
LENGTHS = {"static": (64, 128, 512, 2048), "dynamic": (200, 500, 1000, 2000)}
SHAPES = ((16, 8, 128), (32, 8, 64), (8, 4, 256))
"""Heads of queries, heads of keys and values, elements of a head."""

Mask = Callable[[torch.Tensor], torch.Tensor]
Inputs = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], torch.Tensor]
"""Of `layers`: queries, the keys and the values of each layer, tokens."""
Way = Callable[..., torch.Tensor]


def causal(n: int) -> torch.Tensor:
    i = torch.arange(n, device="cuda")
    return i[:, None] >= i


def padded(tokens: torch.Tensor) -> torch.Tensor:
    """`tokens` [B, T] is 0 where a row is padded."""
    return causal(tokens.shape[1]) & (tokens != 0)[:, None, None, :]


def packed(tokens: torch.Tensor) -> torch.Tensor:
    """`tokens` [B, T] begins a new document where it is 0."""
    document = (tokens == 0).cumsum(-1)
    return causal(tokens.shape[1]) & (document[:, None, :, None] == document[:, None, None, :])


def tokens_for(mask: Mask, rows: int, length: int) -> torch.Tensor:
    """Rows padded to a quarter at most, as a collator's; or documents of an eighth to three eighths of a row."""
    at = torch.arange(length, device="cuda")
    row = torch.arange(rows, device="cuda")[:, None]
    if mask is padded:
        return (at < length - row * length // (4 * max(rows - 1, 1))).long()
    return (at + row * length // 16) % (length // 8 + row % 3 * length // 8)


def layers(mask: Mask) -> Way:
    def function(q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], tokens: torch.Tensor) -> Any:
        seen = mask(tokens)
        for k, v in zip(keys, values, strict=True):
            groups = q.shape[1] // k.shape[1]
            k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
            q = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return q.transpose(1, 2).flatten(2)  # as the projection behind it takes it

    return function


def operands(rows: int, length: int, heads: int, groups: int, width: int) -> Any:
    """In the layout that projections leave them in."""

    def leaf(n: int) -> torch.Tensor:
        made = torch.randn(rows, length, n, width, device="cuda", dtype=torch.bfloat16)
        return made.transpose(1, 2).requires_grad_()

    return leaf(heads), *([leaf(groups) for _ in range(LAYERS)] for _ in range(2))


def case(mask: Mask, rows: int, length: int, shape: Any, dynamic: bool) -> Inputs:
    """What `layers` takes; the compiler does not know how many rows and how long they are if `dynamic`."""
    (q, keys, values), tokens = operands(rows, length, *shape), tokens_for(mask, rows, length)
    if dynamic:
        one = int(rows == 1)  # which the compiler takes for a constant
        torch._dynamo.mark_dynamic(tokens, [0, 1][one:])
        for x in (q, *keys, *values):
            torch._dynamo.mark_dynamic(x, [0, 2][one:])
    return q, keys, values, tokens


def alone(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The last row as leaves of its own."""

    def leaf(x: torch.Tensor) -> torch.Tensor:
        return x.detach()[-1:].to(dtype).requires_grad_()

    q, keys, values, tokens = inputs
    return leaf(q), [leaf(x) for x in keys], [leaf(x) for x in values], tokens[-1:]


def results(way: Way, inputs: Inputs, incoming: torch.Tensor) -> list[torch.Tensor]:
    """The output and all gradients of the last row."""
    q, keys, values, _ = inputs
    out = way(*inputs)
    gradients = torch.autograd.grad(out, [q, *keys, *values], incoming.to(out.dtype))
    return [x.detach()[-1:].double() for x in (out, *gradients)]


def errors(ways: dict[str, Way], mask: Mask, inputs: Inputs, incoming: torch.Tensor) -> dict[str, float]:
    """The median over the output and the gradients of the error against float64, over that of eager."""
    by_itself = (alone(inputs, dtype) for dtype in (torch.float64, inputs[0].dtype))
    exact, eager = (results(layers(mask), row, incoming[-1:]) for row in by_itself)
    found = {name: results(way, inputs, incoming) for name, way in ways.items()}
    return {
        f"{name} error": statistics.median(
            float((x - right).norm() / (theirs - right).norm())
            for x, theirs, right in zip(ours, eager, exact, strict=True)
        )
        for name, ours in found.items()
    }


def measured(ways: dict[str, Way], mask: Mask, inputs: Inputs) -> dict[str, Any]:
    q, keys, values, _ = inputs
    incoming = torch.randn_like(q.transpose(1, 2).flatten(2))
    leaves = [q, *keys, *values]
    steps = {n: lambda way=way: torch.autograd.grad(way(*inputs), leaves, incoming) for n, way in ways.items()}
    found = errors(ways, mask, inputs, incoming)
    base = torch.cuda.memory_allocated()
    for name, ms in common.interleaved(steps, repeats=15, ahead=3).items():
        found[f"{name} ms"] = ms / LAYERS
    for name, step in steps.items():
        found[f"{name} peak MiB"] = common.peak_gib(step, base) * 1024
    return found


def cases(lengths: tuple[int, ...]) -> list[tuple[Mask, int, int, Any]]:
    """(mask, rows, length, shape)."""
    wide = [(padded, TOKENS // n, n, shape) for shape in SHAPES for n in lengths]
    wide += [(packed, TOKENS // n, n, SHAPES[0]) for n in lengths]
    return wide + [(padded, 1, n, SHAPES[0]) for n in lengths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dynamic", action="store_true", help="lengths and rows that the compiler does not know")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    ways: dict[str, Way] = {}
    last: Any = None
    kind = "dynamic" if arguments.dynamic else "static"
    with mock.patch("liger_compile.patterns.attention._unfit", lambda match, seen: None):  # also where it is not taken
        for mask, rows, length, shape in cases(LENGTHS[kind]):
            inputs = case(mask, rows, length, shape, arguments.dynamic)
            this = (mask, shape, rows == 1) if arguments.dynamic else (mask, shape, rows, length)
            if this != last:
                rewrites = liger_compile.explain(layers(mask))(*inputs).counts.get("attention", 0)
                ways = {b: torch.compile(layers(mask), backend=b) for b in ("liger", "inductor")}
                last = this
            row = {"mask": mask.__name__, "shape": shape, "rows": rows, "length": length, "rewrites": rewrites}
            found.append(row | measured(ways, mask, inputs))
            print(found[-1], flush=True)
            path = common.save(f"attention-{kind}", found, arguments.out)  # what there is, if it does not end
    print(common.table(found))
    print(path)


if __name__ == "__main__":
    main()
