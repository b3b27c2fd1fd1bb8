"""Lazy results in graphs: recipes are put in the place of what a graph returns, and taken out before it is compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from .graph_terms import value_of
from .lazy import Recipe
from .legality import Site, sources
from .regions import copy_under_autocast


def defer(root: fx.GraphModule, site: Site, moved: dict[fx.Node, fx.Node]) -> None:
    """Replaces each of the site's returned intermediate results by a call of its recipe.

    `moved` maps nodes that earlier rewrites have replaced to what stands in their place.
    """
    view = site.match.view
    read = sources(site.match)
    ends = {moved.get(n, n) for n in read} | {n for n, term in view.of.items() if term in set(read.values())}
    for node in site.deferred:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        inputs, between = _collect(node, ends)
        for source in inputs:
            copies[source] = graph.placeholder(source.name)
        copy_under_autocast(sorted(between, key=view.position.get), view.region, graph, copies)
        graph.output(copies[node])
        recipe = Recipe(fx.GraphModule(root, graph), value_of(node))
        number = sum(isinstance(m, Recipe) for m in root.children())
        name = f"recipe_{number}"
        root.add_module(name, recipe)
        output = next(n for n in reversed(root.graph.nodes) if n.op == "output")
        with root.graph.inserting_before(output):
            call = root.graph.call_module(name, tuple(inputs))
        call.meta["example_value"] = value_of(node)
        output.replace_input_with(node, call)


def _collect(node: fx.Node, ends: set[fx.Node]) -> tuple[dict[fx.Node, None], dict[fx.Node, None]]:
    """What a value is computed from, as far back as `ends`, in the order it is met: what is given, and what is made of
    that, the value included."""
    given: dict[fx.Node, None] = {}
    made = {node: None}
    todo = [node]
    while todo:
        for n in todo.pop().all_input_nodes:
            if n in ends or n.op in ("placeholder", "get_attr") or not isinstance(value_of(n), Tensor):
                given[n] = None
            elif n not in made:
                made[n] = None
                todo.append(n)
    return given, made


def split(gm: fx.GraphModule) -> tuple[fx.GraphModule, Callable[[Sequence[Any], Sequence[Any]], list[Any]] | None]:
    """Takes the recipes out of a graph's outputs, for a compiler that would compute them.

    Returns the graph, which now returns what the recipes need instead, and a function of (the graph's inputs, its
    outputs) that makes the original outputs; None if there are no recipes. Modifies `gm`.
    """
    output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    results = list(output.args[0])
    calls = [r for r in results if isinstance(r, fx.Node) and r.op == "call_module" and _is_recipe(gm, r)]
    if not calls:
        return gm, None
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    kept = [r for r in results if r not in calls]
    for call in dict.fromkeys(calls):
        kept += [a for a in call.args if a not in kept and a not in placeholders]
    plan: list[Any] = []
    for r in results:
        if r in calls:
            plan.append((getattr(gm, r.target), [_where(a, placeholders, kept) for a in r.args]))
        else:
            plan.append((None, [_where(r, [], kept)]))
    output.args = (tuple(kept),)
    for call in dict.fromkeys(calls):
        gm.graph.erase_node(call)
    gm.recompile()

    def rebuild(inputs: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
        made: list[Any] = []
        for recipe, where in plan:
            values = [(inputs if source == "input" else outputs)[i] for source, i in where]
            made.append(values[0] if recipe is None else recipe(*values))
        return made

    return gm, rebuild


def _is_recipe(gm: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(getattr(gm, str(node.target), None), Recipe)


def _where(value: Any, placeholders: list[fx.Node], kept: list[Any]) -> tuple[str, int]:
    if value in placeholders:
        return "input", placeholders.index(value)
    return "output", kept.index(value)
