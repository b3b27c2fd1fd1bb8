"""`explain`: what the backend does to a function, in the manner of `torch._dynamo.explain`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from . import _torch, handed
from .options import split_options
from .report import Report
from .rewrite import rewrite


def explain(function: Callable[..., Any], **options: Any) -> Callable[..., Report]:
    """Returns a function of the same arguments that runs `function` once and reports what was rewritten::

        print(liger_compile.explain(model)(input_ids=ids, labels=labels))

    Args:
        function: a module or any function that torch.compile takes.
        options: `options={"liger.disable": [...], ...}`, as for torch.compile.

    The rewritten graphs run uncompiled, so this is quick, needs no GPU and shows the graphs a compilation would see. It
    resets Dynamo: what was compiled before in this process is compiled again when it is next called.
    """
    ours, _ = split_options(options.pop("options", None))
    if options:
        raise TypeError(f"explain() takes options={{...}}, not {next(iter(options))!r}")

    def run(*args: Any, **kwargs: Any) -> Report:
        report = Report()

        def rewritten(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
            one = rewrite(gm, ours)
            report.merge(one)
            return one.graphs[0].after.forward

        def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
            return handed.compiled(gm, example_inputs, rewritten)

        torch._dynamo.reset()
        try:
            with _torch.uncompiled(function):
                torch.compile(function, backend=backend)(*args, **kwargs)
        finally:
            torch._dynamo.reset()
        return report

    return run
