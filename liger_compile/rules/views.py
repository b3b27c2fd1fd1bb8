"""Calls that move data: slices, shapes, dimensions, joins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..terms import Expr, PatternError, Term, arith, same, size
from .base import Call, NotCanonical, is_tensor, negative_dim, rule, through_cast, widens
from .rows import flat, has_rows, is_losses, of_rows


def slice_(c: Call, x: Term, dim: int, lo: Any, hi: Any, step: Any = 1) -> Term:
    """x[..., lo:hi:step, ...] with 0 <= lo <= hi <= size."""
    if widens(x):
        return through_cast(c, x, lambda y: slice_(c, y, dim, lo, hi, step))
    if same(lo, 0) and same(step, 1) and same(hi, size(x, dim)):
        return x  # x[:] -> x
    if not same(step, 1):  # the end is right behind the last element: x[0:8:2] -> x[0:7:2]
        last = arith("mul", arith("floordiv", arith("sub", arith("sub", hi, lo), 1), step), step)
        hi = arith("add", arith("add", lo, last), 1)
    if x.op == "expand" and same(hi, arith("add", lo, 1)) and _is_repeated(x, dim):
        shape = (*x.shape[:dim], 1, *x.shape[len(x.shape) + dim + 1 :])
        return _expand(Call(c.terms, x.dtype, shape), x.args[0])
    if x.op == "slice" and x.args[1] == dim and x.args[4] == 1:
        inner, _, start, _, _ = x.args
        return slice_(c, inner, dim, arith("add", start, lo), arith("add", start, hi), step)  # x[a:][b:c] -> x[a+b:a+c]
    if x.op == "slice" and dim < x.args[1]:  # nested slices in the order of their dimensions
        return slice_(c, slice_(c, x.args[0], dim, lo, hi, step), *x.args[1:])
    if dim != -1 and has_rows(x):
        return of_rows(c, x, lambda y: slice_(c, y, dim, lo, hi, step))
    shape = None
    if x.shape is not None:
        extent = hi - lo if step == 1 else -((lo - hi) // step)
        shape = (*x.shape[:dim], extent, *x.shape[len(x.shape) + dim + 1 :])
    return c.step("slice", x, dim, lo, hi, step, dtype=x.dtype, shape=shape)


def _is_repeated(expanded: Term, dim: int) -> bool:
    """Whether all elements along a dimension are the same one."""
    shape = expanded.args[0].shape
    return -dim > len(shape) or same(shape[dim], 1)


def select(c: Call, x: Term, dim: int, index: Any) -> Term:
    """x[..., index, ...], with the dimension dropped."""
    if widens(x):
        return through_cast(c, x, lambda y: select(c, y, dim, index))
    if dim < -1 and has_rows(x):
        return of_rows(c, x, lambda y: select(c, y, dim, index))
    if x.op == "reshape" and x.shape is not None and len(x.shape) > 1:
        whole, shape = x.args[0], x.shape
        if dim in (-1, -2) and isinstance(shape[-1], int) and isinstance(shape[-2], int):
            whole = reshape_to(c, whole, (*shape[:-2], shape[-2] * shape[-1]))
        if whole.shape is not None and dim in (-1, -2) and len(shape) == len(whole.shape) + 1:
            if same(shape[:-2], whole.shape[:-1]) and isinstance(shape[-1], int) and isinstance(shape[-2], int):
                k, d = shape[-2:]
                if dim == -2:  # x.view(.., k, d)[..., i, :] -> x[..., i*d:(i+1)*d]
                    return slice_(c, whole, -1, index * d, (index + 1) * d)
                return slice_(c, whole, -1, index, k * d, d)  # x.view(.., k, d)[..., i] -> x[..., i::d]
    shape = None if x.shape is None else (*x.shape[:dim], *x.shape[len(x.shape) + dim + 1 :])
    return c.step("select", x, dim, index, dtype=x.dtype, shape=shape)


def _pieces(c: Call, x: Term, dim: int, sizes: Any) -> tuple[Term, ...]:
    out, lo = [], 0
    for n in sizes:
        out.append(slice_(c, x, dim, lo, arith("add", lo, n)))
        lo = arith("add", lo, n)
    return tuple(out)


@rule("tensor_split", "split", "split_with_sizes")
def _split(c: Call, x: Term, split: Any, dim: int = 0) -> tuple[Term, ...]:
    dim = negative_dim(x, dim)
    if c.parts:
        return _pieces(c, x, dim, [p.shape[dim] for p in c.parts])
    if isinstance(split, (tuple, list)):
        return _pieces(c, x, dim, split)
    raise PatternError("splits into pieces of one size: in a pattern, use chunk(2, -1) or slices")


@rule("chunk")
def _chunk(c: Call, x: Term, chunks: int, dim: int = 0) -> tuple[Term, ...]:
    if c.parts:
        return _split(c, x, chunks, dim)
    dim = negative_dim(x, dim)
    n = size(x, dim)
    if chunks != 2:
        raise PatternError("splits into more than two pieces: in a pattern, use slices")
    half = arith("floordiv", n, 2)
    return slice_(c, x, dim, 0, half), slice_(c, x, dim, half, n)


@rule("unbind")
def _unbind(c: Call, x: Term, dim: int = 0) -> tuple[Term, ...]:
    dim = negative_dim(x, dim)
    if not c.parts:
        raise PatternError("has an unknown number of pieces: in a pattern, use x[..., i]")
    return tuple(select(c, x, dim, i) for i in range(len(c.parts)))


def reshape_to(c: Call, x: Term, shape: Any) -> Term:
    """The same elements in another shape; the graph's result shape says which."""
    shape = tuple(shape)
    if widens(x):
        return through_cast(c, x, lambda y: reshape_to(c, y, shape))
    if x.shape is not None and same(x.shape, shape):
        return x
    if x.op == "reshape":
        return reshape_to(c, x.args[0], shape)
    if x.op == "neg" and is_losses(flat(x.args[0])):
        inner = reshape_to(c, x.args[0], shape)
        return c.step("neg", inner, like=inner)
    if (repeated := _repeated(c, x, shape)) is not None:
        return repeated
    if x.op == "stack" and x.args[1] == -1 and same(shape[:-1], x.shape[:-2]):
        return _interleaved(c, x.args[0], x.dtype, shape)
    if x.op == "stack" and x.args[1] == -2 and same(shape[:-1], x.shape[:-2]):
        return c.step(
            "cat", x.args[0], -1, dtype=x.dtype, shape=shape
        )  # stack((x, y), -2).flatten(-2) -> cat((x, y), -1)
    if x.op in ("mean", "sum") and x.args[2] is False and isinstance(x.args[1], int):
        inner, dim, _ = x.args  # mean(x, dim).unsqueeze(dim) -> mean(x, dim, keepdim=True)
        if inner.shape is not None and same(shape, (*inner.shape[:dim], 1, *inner.shape[len(inner.shape) + dim + 1 :])):
            return c.step(x.op, inner, dim, True, dtype=x.dtype, shape=shape)
    if shape and x.shape and same(shape[-1], x.shape[-1]) and has_rows(x):
        return of_rows(c, x, lambda y: reshape_to(c, y, (*shape[:-1], y.shape[-1])))
    if x.op in _OF_EACH and x.shape != () and not any(map(is_tensor, x.args[1:])):
        inner = reshape_to(c, x.args[0], shape)
        if inner.op != "reshape":  # rsqrt(mean(x, dim) + eps).unsqueeze(dim) -> rsqrt(mean(x, dim, keepdim=True) + eps)
            return c.step(x.op, inner, *x.args[1:], dtype=x.dtype, shape=shape)
    return c.step("reshape", x, shape, dtype=x.dtype, shape=shape)


_OF_EACH = {"rsqrt", "sqrt", "add", "clamp", "reciprocal"}
"""Element by element, here of a tensor and numbers."""


def _repeated(c: Call, x: Term, shape: tuple[Any, ...]) -> Term | None:
    """x[.., h, None, ..].expand(.., h, n, ..).reshape(.., h * n, ..) -> repeat(x, n), as `repeat_interleave` does."""
    if x.op != "expand" or x.shape is None or x.args[0].shape is None or len(x.args[0].shape) != len(x.shape):
        return None
    inner, rank = x.args[0].shape, len(x.shape)
    new = [d for d in range(1, rank) if not same(inner[d], x.shape[d])]
    if len(new) != 1 or not isinstance(n := x.shape[new[0]], int) or not same(inner[new[0]], 1):
        return None
    d = new[0]
    if not same(shape, (*x.shape[: d - 1], x.shape[d - 1] * n, *x.shape[d + 1 :])):
        return None
    whole = reshape_to(c, x.args[0], (*inner[:d], *inner[d + 1 :]))
    return c.step("repeat", whole, d - rank, n, dtype=x.dtype, shape=shape)


@rule("repeat_interleave")
def _repeat_interleave(c: Call, x: Term, repeats: Any, dim: Any = None, *, output_size: Any = None) -> Term:
    if dim is None or is_tensor(repeats):
        raise NotCanonical("repeats by numbers that are data")
    return through_cast(
        c, x, lambda y: c.step("repeat", y, negative_dim(y, dim), repeats, dtype=y.dtype, shape=c.shape)
    )


def _pattern_view(c: Call, x: Term, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Term:
    """In a pattern the shape after a view follows from the operand's, once that is known."""
    return through_cast(c, x, lambda y: c.step("reshape", y, Expr("shape", (y, change)), dtype=y.dtype))


@rule("unsqueeze")
def unsqueeze(c: Call, x: Term, dim: int) -> Term:
    if c.shape is not None:
        return reshape_to(c, x, c.shape)
    if dim >= 0:
        raise PatternError("counts dimensions from the front: in a pattern, count from the back (dim=-1)")
    if x.op in ("mean", "sum") and x.args[2] is False and x.args[1] == dim:
        return c.step(x.op, x.args[0], dim, True, dtype=x.dtype)
    return _pattern_view(c, x, lambda s: (*s[: len(s) + dim + 1], 1, *s[len(s) + dim + 1 :]))


@rule("squeeze")
def _squeeze(c: Call, x: Term, dim: Any = None) -> Term:
    if c.shape is not None:
        return reshape_to(c, x, c.shape)
    if not isinstance(dim, int) or dim >= 0:
        raise PatternError("drops unknown dimensions: in a pattern, name one from the back (dim=-1)")
    return _pattern_view(c, x, lambda s: (*s[: len(s) + dim], *s[len(s) + dim + 1 :]))


@rule("flatten")
def _flatten(c: Call, x: Term, start_dim: int = 0, end_dim: int = -1) -> Term:
    if c.shape is not None:
        return reshape_to(c, x, c.shape)
    if (start_dim, end_dim) != (-2, -1):
        raise PatternError("flattens dimensions that a pattern cannot know: in a pattern, use flatten(-2)")
    if widens(x):
        return through_cast(c, x, lambda y: _flatten(c, y, start_dim, end_dim))
    if x.op == "stack" and x.args[1] == -1:
        return _interleaved(c, x.args[0], x.dtype)
    return _pattern_view(c, x, lambda s: (*s[:-2], s[-2] * s[-1]))


def _in_pairs(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*shape[:-1], shape[-1] // 2, 2)


@rule("unflatten")
def _unflatten(c: Call, x: Term, dim: int, sizes: Any) -> Term:
    if c.shape is not None:
        return reshape_to(c, x, c.shape)
    if dim == -1 and isinstance(sizes, Term):
        return c.step("reshape", x, sizes, dtype=x.dtype)  # in a pattern, an operand: the whole shape is bound to it
    if dim != -1 or tuple(sizes) != (-1, 2):
        raise PatternError("gives a shape that a pattern cannot know: in a pattern, use unflatten(-1, (-1, 2))")
    return _pattern_view(c, x, _in_pairs)


@rule("view_as_complex")
def _view_as_complex(c: Call, x: Term) -> Term:
    """view_as_complex(x.float().unflatten(-1, (-1, 2))) -> complex(x); of a stack, what that would be flat."""
    if x.shape is not None:
        x = reshape_to(c, x, (*x.shape[:-2], x.shape[-2] * 2))
    x = x.args[0] if widens(x) and x.dtype is torch.float32 else x
    if c.shape is None:
        shape = x.args[1] if x.op == "reshape" else None
        if x.op == "stack" and x.args[1] == -1:
            x = _interleaved(c, x.args[0], dtype=x.dtype)
        elif isinstance(shape, Expr) and shape.args[1] is _in_pairs:
            x = x.args[0]
        else:
            raise PatternError(
                "makes complex numbers of an unknown shape: in a pattern, use x.unflatten(-1, (-1, 2)) or "
                "torch.stack((real, imaginary), dim=-1)"
            )
    return c.step("complex", x, dtype=c.dtype, shape=c.shape)


@rule("complex")
def _complex(c: Call, real: Term, imag: Term) -> Term:
    """complex(x, y) -> complex(stack((x, y), -1).flatten(-2))"""
    parts = [x.args[0] if widens(x) and x.dtype is torch.float32 else x for x in (real, imag)]
    shape = None if real.shape is None else (*real.shape[:-1], real.shape[-1] * 2)
    return c.step("complex", _interleaved(c, tuple(parts), parts[0].dtype, shape), dtype=c.dtype, shape=c.shape)


def _interleaved(c: Call, parts: tuple[Term, ...], dtype: Any = None, shape: Any = None) -> Term:
    """stack(parts, -1).flatten(-2), which of the neighbours of x is x."""
    whole = parts[0].args[0] if parts[0].op == "slice" else None
    if whole is not None and len(parts) == 2 and all(p.op == "slice" and p.args[0] is whole for p in parts):
        ends = [(dim, lo, step) for _, dim, lo, _, step in (p.args for p in parts)]
        if ends == [(-1, 0, 2), (-1, 1, 2)] and same(parts[1].args[3], size(whole, -1)):
            return whole
    return c.step("interleave", parts, dtype=dtype, shape=shape)


@rule("view", "reshape", "view_as", "reshape_as", "_unsafe_view", "ravel")
def _reshape(c: Call, x: Term, *args: Any, **kwargs: Any) -> Term:
    if any(isinstance(a, torch.dtype) for a in args):
        raise NotCanonical("reinterprets the bits")
    if c.shape is None:
        if len(args) == 1 and isinstance(args[0], Term):
            return c.step("reshape", x, args[0], dtype=x.dtype)  # in a pattern, an operand: the whole shape
        raise PatternError("gives a shape that a pattern cannot know: write the pattern without it")
    return reshape_to(c, x, c.shape)


@rule("expand", "expand_as", "broadcast_to")
def _expand(c: Call, x: Term, *args: Any, **kwargs: Any) -> Term:
    if c.shape is None:
        raise PatternError("gives a shape that a pattern cannot know: operands broadcast without it")
    if x.shape is not None and same(x.shape, c.shape):
        return x
    if x.is_float and len(x.shape) == len(c.shape) == 4 and isinstance(n := c.shape[1], int):
        if same((x.shape[0], 1, *x.shape[2:]), x.shape) and same((x.shape[0], n, *x.shape[2:]), c.shape):
            return through_cast(c, x, lambda y: c.step("repeat", y, -3, n, dtype=y.dtype, shape=c.shape))  # one head
    return through_cast(c, x, lambda y: c.step("expand", y, c.shape, dtype=y.dtype, shape=c.shape))


@rule("repeat")
def _repeat(c: Call, x: Term, *repeats: Any) -> Term:
    repeats = repeats[0] if len(repeats) == 1 and isinstance(repeats[0], (tuple, list)) else repeats
    if c.shape is None or len(repeats) != len(x.shape):
        raise NotCanonical("has a shape that is not known, or more dimensions than before")
    if not all(same(r, 1) or same(n, 1) for r, n in zip(repeats, x.shape, strict=True)):
        raise NotCanonical("repeats what has several elements")
    return _expand(c, x)


@rule("broadcast_tensors")
def _broadcast_tensors(c: Call, *tensors: Any) -> tuple[Term, ...]:
    tensors = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else tensors
    if not c.parts:
        raise PatternError("gives shapes that a pattern cannot know: operands broadcast without it")
    return tuple(_expand(Call(c.terms, v.dtype, tuple(v.shape)), t) for t, v in zip(tensors, c.parts, strict=True))


def permute(c: Call, x: Term, order: tuple[int, ...]) -> Term:
    """`order` names, for each of the last dimensions of the result, the negative dimension it comes from."""
    if widens(x):
        return through_cast(c, x, lambda y: permute(c, y, order))
    if x.op == "permute":
        inner = x.args[1]
        n = max(len(order), len(inner))
        first = tuple(range(-n, -len(inner))) + inner
        then = tuple(range(-n, -len(order))) + order
        return permute(c, x.args[0], tuple(first[i] for i in then))
    while order and order[0] == -len(order):
        order = order[1:]
    if not order:
        return x
    if order[-1] == -1 and has_rows(x):
        return of_rows(c, x, lambda y: permute(c, y, order))
    if x.op == "log_softmax":  # log_softmax(x, dim).permute(order) -> log_softmax(x.permute(order), dim')
        inner, dim = permute(c, x.args[0], order), x.args[1]
        return c.terms.make("log_softmax", (inner, _moved(dim, order)), x.dtype, inner.shape)
    shape = None
    if x.shape is not None:
        shape = (*x.shape[: len(x.shape) - len(order)], *(x.shape[i] for i in order))
    if x.op == "repeat":  # repeat(x, dim, n).permute(order) -> repeat(x.permute(order), dim', n)
        inner, dim, n = x.args
        return c.step("repeat", permute(c, inner, order), _moved(dim, order), n, dtype=x.dtype, shape=shape)
    return c.step("permute", x, order, dtype=x.dtype, shape=shape)


def _moved(dim: int, order: tuple[int, ...]) -> int:
    """Where a dimension is behind `permute`."""
    return order.index(dim) - len(order) if dim in order else dim


@rule("transpose", "swapaxes", "swapdims")
def _transpose(c: Call, x: Term, dim0: int, dim1: int) -> Term:
    a, b = negative_dim(x, dim0), negative_dim(x, dim1)
    order = list(range(min(a, b), 0))
    order[a], order[b] = b, a
    return permute(c, x, tuple(order))


@rule("t")
def _t(c: Call, x: Term) -> Term:
    if x.shape is not None and len(x.shape) < 2:
        return x
    return permute(c, x, (-1, -2))


@rule("getattr")
def _attribute(c: Call, x: Term, name: str) -> Term:
    if name not in ("T", "mT") or x.shape is None or len(x.shape) < 2 or (name == "T" and len(x.shape) > 2):
        raise NotCanonical("is no transposition")
    return permute(c, x, (-1, -2))


@rule("permute")
def _permute(c: Call, x: Term, *dims: Any) -> Term:
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    return permute(c, x, tuple(negative_dim(x, d) for d in dims))


@rule("movedim", "moveaxis")
def _movedim(c: Call, x: Term, source: Any, destination: Any) -> Term:
    if not isinstance(source, int) or not isinstance(destination, int):
        raise NotCanonical("moves several dimensions")
    return move_dim(c, x, negative_dim(x, source), negative_dim(x, destination))


def move_dim(c: Call, x: Term, source: int, destination: int) -> Term:
    n = max(-source, -destination)
    order = [d for d in range(-n, 0) if d != source]
    order.insert(destination + n, source)
    return permute(c, x, tuple(order))
