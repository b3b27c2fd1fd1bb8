"""Rotary position embedding, of q and k together or of one tensor, on all of it or a part.

Which components are a pair (`layout`): those a half apart, or neighbours.
"""

from functools import partial
from typing import Any, Literal

import torch

from liger_compile import _torch, ops
from liger_compile.match import Match
from liger_compile.registry import pattern


def split(x, layout):
    half = x.shape[-1] // 2
    return (x[..., :half], x[..., half:]) if layout == "halves" else (x[..., 0::2], x[..., 1::2])


def join(x1, x2, layout):
    return torch.stack((x1, x2), dim=-1).flatten(-2) if layout == "neighbours" else torch.cat((x1, x2), dim=-1)


def rotate(x, cos, sin, layout, upcast, promote):
    h = x.float() if upcast else x
    x1, x2 = split(h, layout)
    y = h * cos + join(-x2, x1, layout) * sin
    return y if promote else y.to(x.dtype)


def rotate_part(x, cos, sin, layout, upcast, promote):
    width = cos.shape[-1]
    return torch.cat((rotate(x[..., :width], cos, sin, layout, upcast, promote), x[..., width:]), dim=-1)


def rotate_back(x, cos, sin):
    x1, x2 = split(x, "halves")
    return x * cos + torch.cat((x2, -x1), dim=-1) * sin


def rotate_pairs(x, cos, sin, layout, upcast, promote, inverse):
    x1, x2 = split(x.float() if upcast else x, layout)
    turned = (x1 * cos + x2 * sin, x2 * cos - x1 * sin) if inverse else (x1 * cos - x2 * sin, x2 * cos + x1 * sin)
    y = join(*turned, layout)
    return y if promote else y.to(x.dtype)


def rotate_complex(x, freqs, promote):
    z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    y = torch.view_as_real(z * freqs).flatten(-2)
    return y if promote else y.to(x.dtype)


def rotate_complex_halves(x, freqs, promote):
    z = torch.view_as_complex(torch.stack(split(x.float(), "halves"), dim=-1))
    y = torch.view_as_real(z * freqs)
    y = y if promote else y.to(x.dtype)
    return torch.cat(y.chunk(2, dim=-1), dim=-2).flatten(-2)


def check(match: Match) -> str | None:
    rotated, angles = {"x", "q", "k"} & match.captures.keys(), {"cos", "sin", "freqs"} & match.captures.keys()
    for name in sorted(angles):
        if match.requires_grad(name):
            return f"{name} needs a gradient, which the kernel does not compute"
    for name in sorted(rotated):
        shape = match.shape(name)
        if not 2 <= len(shape) <= 4:
            return f"{name} has {len(shape)} dimensions; the kernel takes 2 to 4"
        for angle in sorted(angles):
            if not broadcasts(match.shape(angle)[:-1], shape[:-1]):
                return f"{angle} {tuple(match.shape(angle))} does not broadcast to {name} {tuple(shape)}"
    return None


def broadcasts(shape: tuple[Any, ...], to: tuple[Any, ...]) -> bool:
    last = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(
        _torch.same_sizes((n,), (1,)) or _torch.same_sizes((n,), (m,)) for n, m in zip(shape, last, strict=True)
    )


def check_pairs(match: Match) -> str | None:
    """One value of cos and sin for each pair."""
    for name in {"x", "q", "k"} & match.captures.keys():
        for angles in {"cos", "sin", "freqs"} & match.captures.keys():
            if match.shape(angles)[-1] * 2 != match.shape(name)[-1]:
                return f"{angles} has {match.shape(angles)[-1]} components for {match.shape(name)[-1]} of {name}"
    return check(match)


def examples(make, rows):
    q, k = make(2, 4, rows, 16), make(2, 1, rows, 16)
    for width in (16, 6, 8):  # all of the head, a part of it, one for each pair
        yield {"q": q, "k": k, "x": q, "cos": make.constant(rows, width), "sin": make.constant(rows, width)}
        cos, sin = make.constant(2, 1, rows, width), make.constant(2, 1, rows, width)
        yield {"q": q, "k": k, "x": k, "cos": cos, "sin": sin}
        yield {"q": q, "k": k, "x": q, "cos": cos.float(), "sin": sin.float()}


def complex_examples(make, rows):
    q, k = make(2, rows, 4, 16), make(2, rows, 1, 16)
    for shape in ((rows, 1, 8), (2, rows, 1, 8)):
        freqs = torch.complex(make.constant(*shape).float(), make.constant(*shape).float())
        yield {"q": q, "k": k, "x": q, "freqs": freqs}


Layout = Literal["halves", "neighbours"]
FromLayout = Literal["halves", "neighbours", "neighbours to halves"]
Choice = Literal[False, True]


rope_pattern = partial(pattern, name="rope", recompute="lean")


@rope_pattern(replace=ops.rope_pair, check=check, examples=examples)
def rope_pair(q, k, cos, sin, *, layout: Layout, upcast: Choice, promote: Choice):
    return rotate(q, cos, sin, layout, upcast, promote), rotate(k, cos, sin, layout, upcast, promote)


@rope_pattern(replace=ops.rope, check=check, examples=examples)
def rope(x, cos, sin, *, layout: Layout, upcast: Choice, promote: Choice):
    return rotate(x, cos, sin, layout, upcast, promote)


@rope_pattern(replace=partial(ops.rope_pair, contiguous=True), check=check, examples=examples)
def partial_rope_pair(q, k, cos, sin, *, layout: Layout, upcast: Choice, promote: Choice):
    return rotate_part(q, cos, sin, layout, upcast, promote), rotate_part(k, cos, sin, layout, upcast, promote)


@rope_pattern(replace=partial(ops.rope, contiguous=True), check=check, examples=examples)
def partial_rope(x, cos, sin, *, layout: Layout, upcast: Choice, promote: Choice):
    return rotate_part(x, cos, sin, layout, upcast, promote)


@rope_pattern(replace=partial(ops.rope_pair, inverse=True, promote=True), check=check, examples=examples)
def inverse_rope_pair(q, k, cos, sin):
    return rotate_back(q, cos, sin), rotate_back(k, cos, sin)


@rope_pattern(replace=partial(ops.rope, inverse=True, promote=True), check=check, examples=examples)
def inverse_rope(x, cos, sin):
    return rotate_back(x, cos, sin)


@rope_pattern(replace=partial(ops.rope_pair, contiguous=True, per_pair=True), check=check_pairs, examples=examples)
def rope_pair_by_pairs(q, k, cos, sin, *, layout: FromLayout, upcast: Choice, promote: Choice, inverse: Choice):
    how = layout, upcast, promote, inverse
    return rotate_pairs(q, cos, sin, *how), rotate_pairs(k, cos, sin, *how)


@rope_pattern(replace=partial(ops.rope, contiguous=True, per_pair=True), check=check_pairs, examples=examples)
def rope_by_pairs(x, cos, sin, *, layout: FromLayout, upcast: Choice, promote: Choice, inverse: Choice):
    return rotate_pairs(x, cos, sin, layout, upcast, promote, inverse)


@rope_pattern(replace=ops.complex_rope_pair, check=check_pairs, examples=complex_examples)
def complex_rope_pair(q, k, freqs, *, promote: Choice):
    return rotate_complex(q, freqs, promote), rotate_complex(k, freqs, promote)


@rope_pattern(replace=ops.complex_rope, check=check_pairs, examples=complex_examples)
def complex_rope(x, freqs, *, promote: Choice):
    return rotate_complex(x, freqs, promote)


complex_halves = partial(rope_pattern, check=check_pairs, examples=complex_examples)


@complex_halves(replace=partial(ops.complex_rope_pair, layout="halves"))  # Gemma's own code
def complex_rope_pair_of_halves(q, k, freqs, *, promote: Choice):
    return rotate_complex_halves(q, freqs, promote), rotate_complex_halves(k, freqs, promote)


@complex_halves(replace=partial(ops.complex_rope, layout="halves"))
def complex_rope_of_halves(x, freqs, *, promote: Choice):
    return rotate_complex_halves(x, freqs, promote)
