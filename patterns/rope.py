"""Rotary position embedding in the rotate-half form: on q and k together or on one tensor, on all of it or a part."""

from functools import partial
from typing import Literal

import torch

from liger_compile import ops
from liger_compile.graph_terms import value_of
from liger_compile.match import Match
from liger_compile.registry import pattern


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate(x, cos, sin, upcast, promote):
    h = x.float() if upcast else x
    y = h * cos + rotate_half(h) * sin
    return y if promote else y.to(x.dtype)


def rotate_part(x, cos, sin, upcast):
    width = cos.shape[-1]
    return torch.cat((rotate(x[..., :width], cos, sin, upcast, False), x[..., width:]), dim=-1)


def check(match: Match) -> str | None:
    for name in ("cos", "sin"):
        if any(value_of(n).requires_grad for n in match.nodes(name)):
            return f"{name} needs a gradient, which the kernel does not compute"
    for name in ("x", "q", "k"):
        if name in match.captures and not 2 <= len(match.shape(name)) <= 4:
            return f"{name} has {len(match.shape(name))} dimensions; the kernel takes 2 to 4"
    return None


def examples(make, rows):
    for width in (16, 6):  # all of the head, a part of it
        q, k = make(2, 4, rows, 16), make(2, 1, rows, 16)
        yield {"q": q, "k": k, "x": q, "cos": make.constant(rows, width), "sin": make.constant(rows, width)}
        cos, sin = make.constant(2, 1, rows, width), make.constant(2, 1, rows, width)
        yield {"q": q, "k": k, "x": k, "cos": cos, "sin": sin}
        yield {"q": q, "k": k, "x": q, "cos": cos.float(), "sin": sin.float()}


@pattern(replace=ops.rope_pair, check=check, name="rope", examples=examples)
def rope_pair(q, k, cos, sin, *, upcast: Literal[False, True], promote: Literal[False, True]):
    return rotate(q, cos, sin, upcast, promote), rotate(k, cos, sin, upcast, promote)


@pattern(replace=ops.rope, check=check, examples=examples)
def rope(x, cos, sin, *, upcast: Literal[False, True], promote: Literal[False, True]):
    return rotate(x, cos, sin, upcast, promote)


@pattern(replace=partial(ops.rope_pair, contiguous=True), check=check, name="rope", examples=examples)
def partial_rope_pair(q, k, cos, sin, *, upcast: Literal[False, True]):
    return rotate_part(q, cos, sin, upcast), rotate_part(k, cos, sin, upcast)


@pattern(replace=partial(ops.rope, contiguous=True), check=check, name="rope", examples=examples)
def partial_rope(x, cos, sin, *, upcast: Literal[False, True]):
    return rotate_part(x, cos, sin, upcast)
