"""Whether the masks that models build are read back right, in every decoder family that transformers knows.

    python -m bench.masks [families...] [--out FOLDER]

Each family is made tiny, with one layer of each of its kinds, and runs one training step with each kind of mask, with
one sequence and with three. Every mask that attention is given is compared, element by element, with the
predicate that is read of the graph, and with the code that is made of that. Then the graph runs with masks replaced
wherever they are read, also where that would not be fast; loss and gradients are compared with eager's.
"""

from __future__ import annotations

import collections
import inspect
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from . import common, coverage
from .reading import Attention, comparing

LONG, SHORT = 40, 12
"""Lengths of sequences: windows and chunks of tiny models are 16."""

Batch = dict[str, Tensor]


def padded(ids: Tensor, hidden: slice) -> Batch:
    """The last sequence is padded."""
    mask = torch.ones_like(ids)
    mask[-1, hidden] = 0
    return {"attention_mask": mask}


KINDS: dict[str, tuple[int, Callable[[Tensor], Batch]]] = {
    "none": (LONG, lambda ids: {}),
    "right": (LONG, lambda ids: padded(ids, slice(25, None))),
    "left": (LONG, lambda ids: padded(ids, slice(0, 7))),
    "packed": (LONG, lambda ids: {"position_ids": (torch.arange(ids.shape[1]) % 11).expand(ids.shape)}),
    "short": (SHORT, lambda ids: padded(ids, slice(0, 3))),
}
"""A length, and what the model is given beside tokens and labels."""
ROWS = (1, 3)
"""How many sequences."""


@dataclass
class Masks:
    family: str
    outcomes: dict[str, int] = field(default_factory=dict)
    """How many attentions, over all kinds of masks, of each `Attention.outcome`."""
    unread: dict[str, int] = field(default_factory=dict)
    """Why masks were not read."""
    wrong: list[str] = field(default_factory=list)
    """The kinds of masks, and the predicates, that are not what the model built."""
    replaced: int = 0
    """Attentions that run without their mask."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Kinds of masks that the model does not take, and why."""
    loss_error: float | None = None
    gradient_error: float | None = None
    """The largest over all kinds; None if nothing was replaced."""
    failure: str = ""


def tiny(family: str) -> torch.nn.Module:
    """As `coverage.tiny`, with one layer of each kind that the configuration has by default."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kinds = list(dict.fromkeys(getattr(CONFIG_MAPPING[family](), "layer_types", None) or ()))
    try:
        return coverage.tiny(family, **({"layer_types": kinds, "num_hidden_layers": len(kinds)} if kinds else {}))
    except Exception:  # a configuration that makes them of something else
        return coverage.tiny(family)


def check(family: str) -> Masks:
    result = Masks(family)
    try:
        model = tiny(family)
    except Exception as error:
        result.failure = f"cannot be made: {coverage.said(error)}"
        return result
    if model.config._attn_implementation != "sdpa":
        result.failure = "no SDPA"
        return result
    for kind, rows in itertools.product(KINDS, ROWS):
        run(result, model, kind, rows)
    if "none" in result.skipped:  # not for its mask
        result.failure = result.skipped["none"]
    return result


def run(result: Masks, model: torch.nn.Module, kind: str, rows: int) -> list[Attention]:
    """One training step with one kind of mask; adds to the result what it found, and returns it."""
    import liger_compile
    from liger_compile.options import Options

    length, more = KINDS[kind]
    ids = torch.randint(5, 250, (rows, length))
    batch = {"input_ids": ids, "labels": ids, **more(ids)}
    parameters = inspect.signature(model.forward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and (missing := batch.keys() - parameters.keys()):
        result.skipped[kind] = f"takes no {', '.join(sorted(missing))}"
        return []
    try:
        eager = coverage.step(model, model, batch)
    except Exception as error:
        result.skipped[kind] = f"does not run in eager: {coverage.said(error)}"
        return []
    found: list[Attention] = []
    replaced = 0

    def rewritten(gm: fx.GraphModule) -> fx.GraphModule:
        nonlocal replaced
        report = liger_compile.rewrite(gm, Options(enable=("attention",)))
        replaced += len(report.matches)
        return report.graphs[0].after

    torch._dynamo.reset()
    try:
        with mock.patch("liger_compile.patterns.attention._unfit", lambda match, seen: None):
            ours = coverage.step(model, torch.compile(model, backend=comparing(found, rewritten)), batch)
    except Exception as error:
        result.failure = f"{kind}: {coverage.said(error)}"
        return found
    for attention in found:
        result.outcomes[attention.outcome] = result.outcomes.get(attention.outcome, 0) + 1
        if attention.outcome == "unread":
            result.unread[attention.says] = result.unread.get(attention.says, 0) + 1
        if attention.outcome == "wrong":
            result.wrong.append(f"{kind}: {attention.says}")
    result.replaced += replaced
    if replaced:
        loss_error, gradient_error = coverage.errors(ours, eager)
        result.loss_error = max(result.loss_error or 0.0, loss_error)
        result.gradient_error = max(result.gradient_error or 0.0, gradient_error)
    return found


# ---- all of them --------------------------------------------------------------------------------------------------


def row(r: Masks) -> dict[str, Any]:
    return {
        "family": r.family,
        **{name: r.outcomes.get(name, "") for name in OUTCOMES},
        "replaced": r.replaced or "",
        "skipped": ", ".join(r.skipped),
        "loss": r.loss_error,
        "gradients": r.gradient_error,
        "": r.failure or "; ".join(r.unread)[:120],
    }


OUTCOMES = ("right", "wrong", "unread", "causal", "none")


def totals(results: list[Masks]) -> dict[str, int]:
    outcomes: collections.Counter[str] = collections.Counter()
    for r in results:
        outcomes.update(r.outcomes)
    masked = [r for r in results if any(r.outcomes.get(name) for name in ("right", "wrong", "unread"))]
    return {
        "families": len(results),
        "no SDPA": sum(r.failure == "no SDPA" for r in results),
        "failed": sum(r.failure not in ("", "no SDPA") for r in results),
        "with masks": len(masked),
        "all masks right": sum(r.outcomes.keys().isdisjoint(("wrong", "unread")) for r in masked),
        **{name: outcomes[name] for name in OUTCOMES},
        "replaced": sum(r.replaced for r in results),
    }


def main() -> None:
    arguments, found = common.sweep(
        "bench.masks", __doc__, check, coverage.families, told=lambda f: f["outcomes"], timeout=200
    )
    results = [Masks(**f) for f in found]
    print(common.table([row(r) for r in results]), "\n\n", totals(results))
    if not arguments.families or arguments.out:
        everything = {"totals": totals(results), "families": [asdict(r) for r in results]}
        print(common.save("masks", everything, arguments.out))


if __name__ == "__main__":
    main()
