"""What several tests use: capturing graphs, comparing with float64, tiny models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from liger_compile import Report, rewrite
from liger_compile.options import Options


def capture(function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> fx.GraphModule:
    """The Dynamo graph of a function that compiles to one."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    assert len(graphs) == 1
    return graphs[0]


def report_of(function: Callable[..., Any], *args: Any, options: Options | None = None, **kwargs: Any) -> Report:
    return rewrite(capture(function, *args, **kwargs), options)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||, in float64."""
    value, reference = value.double(), reference.double()
    scale = reference.norm()
    return float((value - reference).norm() / (scale if scale > 0 else 1))


def assert_as_accurate(name: str, value: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The error against float64 is at most 1.05 times eager's in the same dtype, or that of a single rounding."""
    assert value.dtype == eager.dtype and value.shape == eager.shape, f"{name}: {value.dtype}{value.shape}"
    ours, theirs = relative_error(value, exact), relative_error(eager, exact)
    rounding = torch.finfo(eager.dtype).eps * (8 if eager.dtype is torch.float32 else 0.25)
    assert ours <= max(1.05 * theirs, rounding), f"{name}: error {ours:.3e}, eager {theirs:.3e}"
