"""Defining an op: schema, reference, kernel and fake implementation in one call."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "liger_compile"
DEFINED: list[Any] = []
"""The ops that a compiler is shown whole."""
AS_GIVEN: set[Any] = set()
"""The ops that compute in the dtypes they are given, whatever autocast is on around them."""
LAUNCHERS: dict[Any, Callable[..., Any]] = {}
"""Of these, the ones that start kernels and do nothing else as a rule, and what does that: see `inline.py`."""
WHOLE_ON = {"cuda", "meta"}
"""Devices on which a compiler is shown ops whole: those with kernels, and the one that stands for them."""


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any], cuda: Callable[..., Any]) -> Any:
    """Defines `liger_compile::<schema>` and returns the op. `reference` serves every device but CUDA."""
    name = f"{NAMESPACE}::{schema.partition('(')[0]}"
    # The fakes promise strides for the inputs as traced, so Inductor must pass inputs laid out just so.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    torch.library.define(name, schema[schema.index("(") :], tags=tags)
    torch.library.impl(name, "CompositeExplicitAutograd")(reference)
    torch.library.impl(name, "CUDA")(cuda)
    torch.library.register_fake(name)(fake)
    DEFINED.append(_op(name))
    AS_GIVEN.add(DEFINED[-1])
    if isinstance(cuda, Launcher):
        LAUNCHERS[DEFINED[-1]] = cuda
    return DEFINED[-1]


def define_composite(schema: str, function: Callable[..., Any], as_given: bool = True) -> Any:
    """Defines `liger_compile::<schema>` as what `function` does with other ops, and returns the op. `as_given`: whether
    it computes in the dtypes it is given under autocast too."""
    name = f"{NAMESPACE}::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :], tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "CompositeImplicitAutograd")(function)
    if as_given:
        AS_GIVEN.add(_op(name))
    return _op(name)


def define_forward(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], cuda: Callable[..., Any]
) -> tuple[Any, Any]:
    """(`<name>_forward`, as `define` defines it; `<name>`, which is that op, or its reference where that is shown)."""
    name, rest = schema[: schema.index("(")], schema[schema.index("(") :]
    forward = define(f"{name}_forward{rest}", reference, fake, cuda)

    def function(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (reference if shows_plain(x) else forward)(x, *args, **kwargs)

    return forward, define_composite(schema, function)


def _op(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name.partition("::")[2]).default


def is_traced(x: Tensor) -> bool:
    """Whether x stands for other tensors: a compiler is at work."""
    return type(x) not in (Tensor, torch.nn.Parameter)


def shows_plain(x: Tensor) -> bool:
    """Whether a compiler is at work for a device without kernels. It is shown plain torch, which it fuses, and derives
    the gradient of: a whole op would run its reference, one operation at a time."""
    return is_traced(x) and x.device.type not in WHOLE_ON


class Launcher:
    """A function of `liger_compile.kernels.<module>`, imported on first use: triton is not needed before."""

    def __init__(self, module: str, function: str) -> None:
        self.name = module, function

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        module, function = self.name
        return getattr(importlib.import_module(f"liger_compile.kernels.{module}"), function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def dense_like(y: Tensor, x: Tensor) -> Tensor:
    """y with the strides of `torch.empty_like(x)`, as the fakes promise; copied only if it has others."""
    strides = torch.empty_like(x, device="meta").stride()
    return y if y.stride() == strides else y.new_empty_strided(y.shape, strides).copy_(y)


def once_differentiable(op: Any) -> None:
    """Makes differentiating a backward op an error instead of a silent zero."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{op.name()} has no second derivative; compute this gradient without create_graph=True")

    torch.library.register_autograd(op.name(), refuse)
