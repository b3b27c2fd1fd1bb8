"""What several tests use: capturing graphs, comparing with float64, tiny models."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from liger_compile import Report, rewrite
from liger_compile.options import Options
from liger_compile.report import Miss


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


def skip_without_interpreter(op: str) -> None:
    """Skips a test that gives CPU tensors to an op which has kernels alone: these run interpreted, where there is no
    GPU."""
    if op in ("fused_loss", "fused_loss_backward", "fused_loss_and_gradients", "label_sums"):
        if torch.cuda.is_available():
            pytest.skip(f"{op} has kernels alone, which run on a GPU here")


def misses(report: Report) -> list[Miss]:
    """But for the token embedding, which is left in models as small as those of the tests."""
    return [m for m in report.misses if m.pattern != "embedding"]


def rewritten(
    reports: list[Report] | None = None, backend: str = "eager", options: Options | None = None
) -> Callable[..., Any]:
    """A backend that runs rewritten graphs as they are, without compiling them, or by another backend."""

    def run(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        report = rewrite(gm, options)
        if reports is not None:
            reports.append(report)
        after = report.graphs[0].after
        return after.forward if backend == "eager" else torch._dynamo.lookup_backend(backend)(after, example_inputs)

    return run


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||, in float64."""
    value, reference = value.double(), reference.double()
    scale = reference.norm()
    return float((value - reference).norm() / (scale if scale > 0 else 1))


class Accuracy:
    """Errors against float64 of ours and of eager in the same dtype, over several runs."""

    def __init__(self) -> None:
        self._errors: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._eps: dict[str, float] = {}

    def add(self, name: str, ours: Tensor, eager: Tensor, exact: Tensor) -> None:
        assert ours.dtype == eager.dtype and ours.shape == eager.shape, f"{name}: {ours.dtype}{tuple(ours.shape)}"
        exact = exact.double().flatten()
        errors = ours.double().flatten() - exact, eager.double().flatten() - exact, exact
        self._errors.setdefault(name, []).append(errors)
        self._eps[name] = torch.finfo(eager.dtype).eps

    def check(self, rows: int) -> None:
        """Every error is at most 1.05 times eager's, or that of a single rounding.

        The ratio of two errors estimated from n independent values scatters by 1 / sqrt(n), so three of these are
        allowed on top. n is the number of values that matter, (sum e^2)^2 / sum e^4, but at most `rows`: errors within
        a row share causes (the rounding of one logit's gradient reaches a whole row of the weight's). A correctly
        rounded result is off by eps / 4 on average and by eps in a single value; float32 sums in another order by a
        few eps.
        """
        for name, runs in self._errors.items():
            ours, theirs, exact = (torch.cat(values) for values in zip(*runs, strict=True))
            values = float(theirs.square().sum() ** 2 / theirs.pow(4).sum().clamp(min=1e-300))
            scatter = 1 / max(min(values, rows), 1) ** 0.5
            scale = exact.norm() if exact.norm() > 0 else 1
            error, eager = float(ours.norm() / scale), float(theirs.norm() / scale)
            eps = self._eps[name]
            rounding = 8 * eps if eps < 1e-6 else eps * (0.25 + 0.75 * scatter)
            assert error <= max((1.05 + 3 * scatter) * eager, rounding), f"{name}: error {error:.3e}, eager {eager:.3e}"


def ordered(report, **values):
    """The inputs of a graph in its order, by the names that Dynamo made from the function's parameters."""
    names = [n.target for n in report.graphs[0].before.graph.nodes if n.op == "placeholder"]
    return [values[re.fullmatch(r"L_(\w+?)_+", n).group(1)] for n in names]


def gradients(function, h, w, *others):
    """A loss and its gradients."""
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    loss = function(h, w, *others)
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


def half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def neighbours(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def as_complex(x):
    return torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
