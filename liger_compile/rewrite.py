"""Rewriting one graph: match, check, replace, report."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from torch import fx

from . import _torch, fuel, verify
from .deferral import defer
from .emit import check_operands, emit
from .graph_terms import GraphTerms
from .inplace import outplaced
from .legality import Illegal, Site, check, sites
from .match import Matcher, NearMiss
from .options import Options
from .pattern import Spelling, name_of, target_of
from .regions import Region
from .registry import patterns
from .report import GraphReport, Miss, Place, Report, Rewritten
from .terms import Term
from .views import settle

BODIES = frozenset({"tag_activation_checkpoint", "wrap_activation_checkpoint", "invoke_subgraph", "wrap"})
"""Higher-order operations whose bodies run as they stand, so that rewriting them is rewriting the graph."""
LENDING = frozenset({"tag_activation_checkpoint"})
"""Those of them that pass on whatever operands they are given."""


def rewrite(gm: fx.GraphModule, options: Options | None = None) -> Report:
    """Replaces what the registered patterns match in a graph.

    Args:
        gm: a Dynamo graph or an ATen graph whose nodes carry `example_value` or `val` metadata. It is not modified.
        options: which patterns to use; all of them by default.

    Returns:
        The report, with one entry in `graphs`. Its `before` is `gm` itself, its `after` the rewritten module (`gm` too,
        if nothing matched), which takes and returns what `gm` does.
    """
    report = Report()
    options = options or Options()
    enabled = [p for p in patterns(options.patterns) if options.wants(p.name)]
    spellings = sorted((s for p in enabled for s in p.spellings), key=lambda s: (-s.pattern.priority, -s.operations))
    after, _ = _rewrite_module(gm, spellings, options, report)
    report.graphs.append(GraphReport(gm, after))
    return report


def _rewrite_module(
    gm: fx.GraphModule,
    spellings: list[Spelling],
    options: Options,
    report: Report,
    caller: GraphTerms | None = None,
    calls: Sequence[fx.Node] = (),
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Rewrites a graph and the bodies it calls; returns `gm` itself if nothing changes.

    Of a body, `calls` are the nodes that run it in the graph that `caller` views; also returned are the nodes of that
    graph which the body is to be given behind what it was given before.
    """
    after = _torch.copy_module(gm)
    settle(after.graph)
    region = caller.region[calls[0]] if caller is not None else Region()
    outplaced(after.graph, region)
    view = GraphTerms.view(after.graph, region)
    if caller is not None and len(calls) == 1:
        view.inputs_from(caller, calls[0].args)
        view.lender = caller if calls[0].target.__name__ in LENDING else None
    changed = _rewrite_bodies(after, view, spellings, options, report)
    found = _find(view, spellings, options, report)
    changed |= _replace(after, view, found, options, report)
    if not changed:
        return gm, []
    after.graph.lint()
    after.recompile()
    return after, view.borrowed


def _rewrite_bodies(
    gm: fx.GraphModule, view: GraphTerms, spellings: list[Spelling], options: Options, report: Report
) -> bool:
    options = dataclasses.replace(options, logits="keep")  # what a body returns, the graph around it reads
    calls: dict[str, list[fx.Node]] = {}
    for node in view.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") in BODIES:
            for body in node.all_input_nodes:
                if body.op == "get_attr" and isinstance(getattr(gm, body.target, None), fx.GraphModule):
                    calls.setdefault(body.target, []).append(node)
    changed = False
    for name, nodes in calls.items():
        module, inside = getattr(gm, name), Report()
        after, borrowed = _rewrite_module(module, spellings, options, inside, view, nodes)
        report.matches += [dataclasses.replace(m, body=_inside(name, m.body)) for m in inside.matches]
        report.misses += [dataclasses.replace(m, body=_inside(name, m.body)) for m in inside.misses]
        if after is not module:
            setattr(gm, name, after)
            changed = True
        if borrowed:
            nodes[0].args = (*nodes[0].args, *borrowed)
    return changed


def _inside(name: str, body: str) -> str:
    return f"{name}.{body}" if body else name


def _find(view: GraphTerms, spellings: list[Spelling], options: Options, report: Report) -> list[Site]:
    """The sites to rewrite, no two on the same nodes. Notes what is left alone and why.

    Patterns of one priority are tried widest first, exact matches before relaxed ones.
    """
    found: list[Site] = []
    taken = _Taken(view)
    refused: dict[tuple[str, frozenset[fx.Node]], Miss] = {}
    matchers = (Matcher(view, options), Matcher(view, options, relaxed=True))
    for _, group in itertools.groupby(spellings, key=lambda s: s.pattern.priority):
        for matcher, spelling in itertools.product(matchers, tuple(group)):
            for anchor in matcher.anchors(spelling.roots[0]):
                if anchor in taken.terms:
                    continue
                found += _match_at(matcher, spelling, anchor, options, taken, refused)
    for (_, nodes), miss in refused.items():
        if not nodes & taken.nodes:  # a narrower match that is refused too is not told again
            report.misses.append(miss)
            taken.add(nodes)
    report.misses += _near_misses(view, spellings, options, taken)
    return sorted(found, key=lambda s: view.position[s.before])


class _Taken:
    """The nodes and terms that are spoken for."""

    def __init__(self, view: GraphTerms) -> None:
        self.view = view
        self.nodes: set[fx.Node] = set()
        self.terms: set[Term] = set()
        self.outputs: set[fx.Node] = set()

    def add(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            self.nodes.add(node)
            if node in self.view.of:
                self.terms.add(self.view.of[node])


def _match_at(
    matcher: Matcher,
    spelling: Spelling,
    anchor: Term,
    options: Options,
    taken: _Taken,
    refused: dict[tuple[str, frozenset[fx.Node]], Miss],
) -> list[Site]:
    """The sites of the first legal way to match a spelling at an anchor.

    Matches that must be left alone are noted in `refused` by their nodes; of several ways to rewrite the same nodes,
    the reason against the last is kept.
    """
    view = matcher.view
    name = spelling.pattern.name
    for match in matcher.matches(spelling, anchor, taken.terms):
        nodes = {view.carriers[anchor][0]}
        try:
            legal = []
            for site in sites(match):
                nodes = {*site.outputs, *site.interior}
                legal.append(check(site, defer=options.logits == "lazy"))
                check_operands(view, legal[-1])
        except Illegal as illegal:
            refused[name, frozenset(nodes)] = _miss(name, view.carriers[anchor][0], str(illegal), "left", nodes)
            continue
        if any(node in taken.outputs for site in legal for node in site.interior):
            continue  # would take apart what another pattern has replaced
        for site in legal:
            taken.add((*site.outputs, *site.interior))
            taken.outputs.update(site.outputs)
        return legal
    return []


def _near_misses(view: GraphTerms, spellings: list[Spelling], options: Options, taken: _Taken) -> list[Miss]:
    """The best near miss of each pattern at each place that no rewrite has covered."""
    matcher = Matcher(view, options, relaxed=True, tolerance=2)
    found: list[tuple[str, NearMiss]] = []
    for spelling in spellings:
        for anchor in matcher.anchors(spelling.roots[0]):
            if anchor not in taken.terms:
                near = matcher.near_miss(spelling, anchor)
                if near is not None and not (near.terms & taken.terms):
                    found.append((spelling.pattern.name, near))
    found.sort(key=lambda item: (-item[1].spelling.pattern.priority, -item[1].score, -len(item[1].terms)))
    misses: list[tuple[int, Miss]] = []
    told: dict[str, set[Term]] = {}
    for name, near in found:
        region = {t for t in near.terms if t.op not in ("leaf", "cast")}
        if told.setdefault(name, set()) & region:
            continue
        told[name] |= region
        node = next((n for t in (near.at, near.root) for n in view.carriers.get(t, ())), view.carriers[near.root][0])
        nodes = [n for t in near.terms for n in view.carriers.get(t, ())]
        misses.append((view.position[node], _miss(name, node, near.reason, "near", nodes)))
    return [miss for _, miss in sorted(misses, key=lambda m: m[0])]


def _miss(name: str, node: fx.Node, reason: str, kind: str, nodes: Iterable[fx.Node]) -> Miss:
    place = Place.of(node)
    names = tuple(dict.fromkeys(n.name for n in nodes))
    return Miss(name, place.source, place.module, reason, kind, place.file, nodes=names)


def _replace(gm: fx.GraphModule, view: GraphTerms, found: list[Site], options: Options, report: Report) -> bool:
    """Puts the replacements in and takes the replaced nodes out. Returns whether anything changed."""
    moved: dict[fx.Node, fx.Node] = {}
    changed = False
    for site in found:
        name = site.match.pattern.name
        nodes = (*site.interior, *site.outputs)
        try:
            if not fuel.left(options.fuel):
                raise Illegal(f"liger.fuel={options.fuel} is used up")
            results, inserted = emit(view, site, moved)
        except Illegal as illegal:
            report.misses.append(_miss(name, site.outputs[0], str(illegal), "left", nodes))
            continue
        if options.verify:
            try:
                results = verify.beside(gm, view, site, inserted, results)
            except verify.Unverified as unverified:
                reason = f"is rewritten, but not verified: {unverified}"
                report.misses.append(_miss(name, site.outputs[0], reason, "left", nodes))
        for result, output in zip(results, site.outputs, strict=True):
            output.replace_all_uses_with(result, propagate_meta=False)
            moved[output] = result
        defer(gm, site, moved)
        target, _ = target_of(site.match.pattern.replacement)
        place, names = Place.of(site.outputs[0]), tuple(n.name for n in nodes)
        made = tuple(n.name for n in dict.fromkeys(results if options.verify else inserted))
        called = name_of(target)
        told = {"nodes": names, "made": made, "effect": site.match.effect}
        rewritten = Rewritten(name, place.module, place.source, called, place.file, **told)
        report.matches.append(rewritten)
        fuel.spend(options.fuel, rewritten)
        changed = True
    dead = {n for site in found if site.outputs[0] in moved for n in (*site.outputs, *site.interior)}
    read: set[fx.Node] = set()
    for node in sorted(dead, key=view.position.get, reverse=True):
        if not node.users:
            read.update(node.all_input_nodes)
            view.graph.erase_node(node)
    _erase_unused(view, read - dead)
    return changed


def _erase_unused(view: GraphTerms, nodes: Iterable[fx.Node]) -> None:
    """Takes out what only replaced nodes have read, such as the mask of rewritten attention."""
    todo = set(nodes)
    while todo:
        node = max(todo, key=lambda n: view.position.get(n, -1))  # the last first, so that readers go before the read
        todo.remove(node)
        if not node.users and view.is_pure(node):
            todo.update(node.all_input_nodes)
            view.graph.erase_node(node)
