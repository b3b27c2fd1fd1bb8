"""The backend that `torch.compile(model, backend="liger")` finds through the `torch_dynamo_backends` entry point."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from . import _torch, debug, deferral, fuse, handed
from .graph_terms import value_of
from .log import log, warn_once
from .options import Options, split_options
from .report import Report
from .rewrite import rewrite


def liger(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrites a Dynamo graph and compiles the result with Inductor.

    Args:
        mode: Inductor's ("reduce-overhead", "max-autotune", ...).
        options: `liger.*` keys are ours (docs/options.md), all others Inductor's.

    Whatever cannot be rewritten is compiled as it is, with the reason logged once.
    """
    ours, inductor = split_options(options)
    config = {**_torch.mode_options(mode), **inductor}
    return handed.compiled(gm, example_inputs, partial(_compiled, ours=ours, config=config))


def _compiled(
    gm: fx.GraphModule, example_inputs: Sequence[Any], ours: Options, config: dict[str, Any]
) -> Callable[..., Any]:
    report = _rewritten(gm, ours)
    if report is None:
        return _torch.compile_fx(gm, example_inputs, config)
    after = report.graphs[0].after
    if after is gm:
        return _torch.compile_fx(gm, example_inputs, config)
    if ours.verify:
        return _lazily(after, lambda gm: gm.forward)
    fused = _freeing(_with_fusions(config) if ours.fuse else config, after)
    try:
        with contextlib.nullcontext() if _is_named(after, ours) else _torch.without_autograd_cache():
            return _lazily(after, lambda gm: _torch.compile_fx(gm, example_inputs, fused))
    except Exception as error:
        if _torch.is_restart(error):
            raise
        warn_once(f"the rewritten graph does not compile, so the original is used: {type(error).__name__}: {error}")
        return _torch.compile_fx(gm, example_inputs, config)


def _nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Those of the graph, and of the bodies in it."""
    return (n for m in gm.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes)


def _is_named(gm: fx.GraphModule, options: Options) -> bool:
    """Whether a graph's code, by which AOTAutograd's cache on disk knows it, names all that is made of it: whether the
    ops that were put in are all of this package, or of torch, and what the backward keeps is as always.

    The code of our ops is in the cache's keys; that of a user's op, whose gradient it traces through as well, may have
    changed. What `liger.memory` says is noted at nodes.
    """
    if options.memory != Options.memory:
        return False
    made = (n.target for n in _nodes(gm) if "liger_pattern" in n.meta)
    return all(t.namespace in ("liger_compile", "aten") for t in made if isinstance(t, torch._ops.OpOverload))


def _with_fusions(config: dict[str, Any]) -> dict[str, Any]:
    """Inductor's options, with fusions of our ops with their neighbours."""
    fusing = _torch.graph_pass(config, _fuse)
    if fusing is None:
        warn_once("post_grad_custom_pre_pass is set, so that ops are not fused with their neighbours")
    return fusing or config


LARGE = 16 * 2**20
"""Bytes that take a GPU longer to write than its host to allocate."""


def _bytes(tensor: torch.Tensor) -> int:
    """Of the sizes that the graph was captured with; one that hangs on data counts as 1."""
    return tensor.itemsize * math.prod(_torch.size_hint(n) or 1 for n in tensor.shape)


def _freeing(config: dict[str, Any], gm: fx.GraphModule) -> dict[str, Any]:
    """Inductor's options, by which a buffer on a GPU goes back to PyTorch's allocator after its last use, where there
    are large ones.

    By itself Inductor holds on to a buffer for the next one of its size, through all that runs in between: those of a
    gated unit's gradient through attention's, 0.4 GiB of a training step with 8,192 tokens of Llama-3-8B. In steps of
    few tokens, which the host keeps waiting, that is what to do.
    """
    made = (value_of(n) for n in _nodes(gm) if n.op.startswith("call"))
    large = any(isinstance(v, torch.Tensor) and v.is_cuda and _bytes(v) >= LARGE for v in made)
    return {"allow_buffer_reuse": False, **config} if large else config


def _fuse(graph: fx.Graph) -> None:
    try:
        made = fuse.fuse(graph)
    except Exception as error:
        warn_once(f"fusing ops with their neighbours failed: {type(error).__name__}: {error}")
        return
    if made:
        text = ", ".join(f"{count} x {name}" for name, count in made.items())
        log.info("fused: %s", text)
        _torch.trace("liger_compile_fused", lambda: text)


def _lazily(gm: fx.GraphModule, compiler: Callable[[fx.GraphModule], Callable[..., Any]]) -> Callable[..., Any]:
    """A rewritten graph, compiled, with results on demand made outside of it."""
    gm, rebuild = deferral.split(gm)
    compiled = compiler(gm)
    if rebuild is None:
        return compiled

    def run(*inputs: Any) -> list[Any]:
        return rebuild(inputs, compiled(*inputs))

    return run


def _rewritten(gm: fx.GraphModule, options: Options) -> Report | None:
    """The report of a rewrite, or None if our own code fails: a model that Inductor compiles must still compile."""
    try:
        report = rewrite(gm, options)
    except Exception as error:
        warn_once(f"rewriting failed, so the graph is compiled as it is: {type(error).__name__}: {error}")
        log.debug("rewriting failed", exc_info=True)
        return None
    log.info("%s", report)
    try:
        _torch.trace("liger_compile_report", lambda: str(report))
        _torch.trace("liger_compile_graph", lambda: debug.readable(report.graphs[0].after))
        if options.debug:
            debug.write(report, options.debug)
    except Exception as error:  # what cannot be told is no reason not to compile
        warn_once(f"the report was not written: {type(error).__name__}: {error}")
    return report
