"""Whether a match may be rewritten where it stands. Each refusal is a sentence for the report."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import _torch
from .graph_terms import inputs_of, value_of
from .log import warn_once
from .match import Match
from .ops._library import AS_GIVEN
from .pattern import target_of
from .rules import is_arange
from .terms import Term

_FREE = {"cast", "slice", "select", "reshape", "permute", "expand", "repeat"}
"""Views and casts: when something else reads them too, the graph keeps them, and nothing is computed twice."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Illegal(Exception):
    """A match that must be left alone, with the reason."""

    def __init__(self, reason: str, at: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.at = at


@dataclass(frozen=True)
class Site:
    """A match in place: the nodes it replaces and where the replacement goes."""

    match: Match
    outputs: tuple[fx.Node, ...]
    """The nodes that hold the pattern's results."""
    interior: tuple[fx.Node, ...]
    """The nodes between the operands and the results, which die with the rewrite."""
    before: fx.Node
    """The replacement is inserted before this node."""
    deferred: tuple[fx.Node, ...] = ()
    """Interior nodes that the graph also returns, to be computed only if somebody reads them."""


def sites(match: Match) -> list[Site]:
    """Where a match stands; several places if the graph computes the same thing more than once."""
    view = match.view
    first = [_computed(match, root) for root in match.roots]
    if len(match.roots) > 1:
        return [_site(match, tuple(nodes[0] for nodes in first))]
    found = [_site(match, (node,)) for node in first[0]]
    found.sort(key=lambda s: view.position[s.before])
    return found


def _computed(match: Match, root: Term) -> list[fx.Node]:
    """The nodes that compute a term, leaving out those that only pass it on (`.contiguous()`)."""
    carriers = match.view.carriers[root]
    computed = [n for n in carriers if not any(match.view.of.get(i) is root for i in n.all_input_nodes)]
    return computed or carriers[:1]


def _captured(match: Match) -> list[tuple[str, Term]]:
    named = [(n, t) for n, c in match.captures.items() for t in (c if isinstance(c, tuple) else (c,))]
    return [(n, t) for n, t in named if isinstance(t, Term)]


def operands(match: Match) -> list[tuple[str, Term]]:
    """The tensors a match reads, by the names of the replacement's parameters."""
    return [(n, t) for n, t in _captured(match) if not t.is_number]


def sources(match: Match) -> dict[fx.Node, Term]:
    """The nodes that exist in the graph and from which the operands are read."""
    return match.view.sources(t for _, t in _captured(match))


def _site(match: Match, outputs: tuple[fx.Node, ...]) -> Site:
    view = match.view
    read = sources(match)
    read_terms = set(read.values())
    for output in outputs:
        if view.of.get(output) in read_terms:
            raise Illegal("the result is also an operand", output)
    interior: dict[fx.Node, None] = {}
    # An operand that was written to has its node in `read`, under a term that is not the one it was made with.
    ends = {*read, *outputs}
    for output in outputs:
        for node in inputs_of(output, stop=lambda n: n in ends or view.of.get(n) in read_terms):
            interior[node] = None
    start = max([view.position[n] for n in read], default=-1) + 1
    before = max(min(view.position[o] for o in outputs), start)
    return Site(match, outputs, tuple(interior), view.nodes[before])


def check(site: Site, defer: bool) -> Site:
    """Raises `Illegal` if rewriting the site could change what the graph computes.

    With `defer`, a pattern may allow returned intermediate results to be computed on demand; the site comes back with
    these noted.
    """
    _check_operands(site)
    _check_regions(site)
    _check_order(site)
    returned = _check_other_users(site, defer)
    if site.match.pattern.check is not None:
        found = _asked(site.match)
        if isinstance(found, str):
            raise Illegal(found, site.outputs[0])
        site = dataclasses.replace(site, match=site.match.with_operands(found or {}))
    # Results on demand are computed from the operands when the graph is done.
    _check_mutation(site, site.match.view.nodes[-1] if returned else site.before)
    return dataclasses.replace(site, deferred=returned)


def _asked(match: Match) -> Any:
    """What the pattern's own check says. One that fails costs its match and no other."""
    try:
        found = match.pattern.check(match)
        if not isinstance(found, (str, dict, type(None))):
            raise TypeError(f"returned {found!r}; it gives a reason to leave the match, further operands or None")
        return found
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        warn_once(f"the check of {match.pattern.name} failed, so that what it matches is left: {reason}")
        raise Illegal(f"its check failed: {reason}") from error


def _check_operands(site: Site) -> None:
    devices = set()
    for name, term in operands(site.match):
        for node in site.match.view.carriers.get(term, ())[:1]:
            value = value_of(node)
            if not _torch.is_plain_tensor(value):
                raise Illegal(f"{name} is a {type(value).__name__}, a tensor subclass", node)
            devices.add(value.device)
        if term.is_float and term.dtype not in DTYPES:
            raise Illegal(f"{name} is {str(term.dtype).removeprefix('torch.')}, which the kernels do not compute in")
    if len(devices) > 1:
        raise Illegal(f"the operands are on different devices: {', '.join(sorted(map(str, devices)))}")


def _check_regions(site: Site) -> None:
    region = site.match.view.region
    here = region[site.outputs[0]]
    replacement, _ = target_of(site.match.pattern.replacement)
    for node in (*site.outputs, *site.interior, site.before):
        # What autocast does to the replaced code is in the match, as casts.
        one = region[node] == here or (
            replacement in AS_GIVEN and region[node].without_autocast() == here.without_autocast()
        )
        if not one:
            raise Illegal(f"{node.name} runs in another grad, autocast or functorch region", node)
    if here.is_transformed:
        raise Illegal("runs inside a functorch transform (vmap, grad)", site.outputs[0])


def _check_order(site: Site) -> None:
    position = site.match.view.position
    inside = {*site.outputs, *site.interior}
    for output in site.outputs:
        for user in output.users:
            if user not in inside and position[user] < position[site.before]:
                raise Illegal(f"{output.name} is used by {user.name} before all operands are known", user)


def _check_mutation(site: Site, until: fx.Node) -> None:
    view = site.match.view
    for node, term in sources(site.match).items():
        seen = view.version.get(term, view.writes_before(node, node, inclusive=True))
        if view.writes_before(node, until) != seen:
            writer = view.mutations[_torch.storage_key(value_of(node))][seen]
            when = "in between" if until is site.before else "before what is returned could be computed from it"
            raise Illegal(f"{node.name} is changed in place by {writer.name} {when}", writer)


def _check_other_users(site: Site, defer: bool) -> tuple[fx.Node, ...]:
    """Intermediate results must not be needed elsewhere. Returns those that only the caller sees, if `defer`."""
    inside = {*site.outputs, *site.interior}
    free: set[fx.Node] = set()
    returned = []
    for node in sorted(site.interior, key=site.match.view.position.get):
        term = site.match.view.of.get(node)
        if (
            term is not None
            and (term.op in _FREE or is_arange(term))
            and not any(i in inside and i not in free for i in node.all_input_nodes)
        ):
            free.add(node)
            continue
        outside = [user for user in node.users if user not in inside]
        if outside and defer and all(u.op == "output" for u in outside) and _is_on_demand(site, term):
            returned.append(node)
        elif outside:
            what = "returned" if outside[0].op == "output" else f"also used by {outside[0].name}"
            raise Illegal(f"the intermediate result {node.name} is {what}", outside[0])
    return tuple(returned)


def _is_on_demand(site: Site, term: Term | None) -> bool:
    allowed = site.match.pattern.on_demand
    return allowed(term) if callable(allowed) and term is not None else bool(allowed)
