"""A report as a page to look at: every graph before and after, what was rewritten in it, what was not, and why."""

from __future__ import annotations

import json
import linecache
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from . import __version__
from .pattern import name_of
from .report import GraphReport, Miss, Place, Report, Rewritten

CONTEXT = 3
"""Lines of the user's file that are shown above and below a line."""


def page(report: Report) -> str:
    """The report as one HTML file that needs nothing else: no network, and no longer the user's files.

    The page (`page.html`) makes its elements from one piece of JSON, and only those that are looked at, so that it
    opens at once for graphs of many thousand nodes. Texts that come from the graph reach it in that JSON only.
    """
    data = json.dumps(_Data(report).as_json(), separators=(",", ":"))
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("{{data}}", data.replace("<", "\\u003c"))  # neither `</script>` nor `<!--` ends it early


class _Data:
    """What the page shows. Texts and places are kept once, in tables, and referred to by their number there."""

    def __init__(self, report: Report) -> None:
        self.strings: dict[str, int] = {}
        self.places: dict[tuple[str, str], int] = {}
        self.nodes: list[list[int]] = []
        self.number: dict[tuple[int, str, str, str], int] = {}
        """The number of a node, by its graph, its side ("before", "after"), body and name."""
        self.patterns = sorted({s.pattern for s in (*report.matches, *report.misses)})
        self.graphs = [self._sections(i, graph) for i, graph in enumerate(report.graphs)]
        self.sites = [self._site(s) for s in (*report.matches, *report.misses)]

    def as_json(self) -> dict[str, Any]:
        files: dict[str, dict[int, str]] = {}
        places = [(source, *_split(file)) for source, file in self.places]
        for _, path, line in places:
            files.setdefault(path, {}).update(_context(path, line))
        return {
            "versions": {"torch": torch.__version__, "liger_compile": __version__},
            "patterns": self.patterns,
            "sites": self.sites,
            "graphs": self.graphs,
            "nodes": self.nodes,
            "places": places,
            "files": files,
            "context": CONTEXT,
            "strings": list(self.strings),
        }

    def _text(self, text: str) -> int:
        return self.strings.setdefault(text, len(self.strings))

    def _place(self, source: str, file: str) -> int:
        return self.places.setdefault((source, file), len(self.places))

    def _sections(self, graph: int, pair: GraphReport) -> list[dict[str, Any]]:
        """The nodes of a graph by body and layer; the sections of a body follow the one that refers to it."""
        sections: dict[tuple[str, str], dict[str, Any]] = {}
        parents: dict[str, tuple[str, str]] = {}
        last = ("", "")
        for side, module in (("before", pair.before), ("after", pair.after)):
            for body, layer, place, node in _walk(module):
                if body:
                    parents.setdefault(body, last)
                last = body, layer
                empty = {"body": body, "module": layer, "before": [], "after": []}
                sections.setdefault(last, empty)[side].append(self._node(graph, side, body, place, node))

        def ordered(body: str) -> Iterator[dict[str, Any]]:
            for key, section in sections.items():
                if key[0] == body:
                    yield section
                    for inner, parent in parents.items():
                        if parent == key:
                            yield from ordered(inner)

        return list(ordered(""))

    def _node(self, graph: int, side: str, body: str, place: Place, node: fx.Node) -> int:
        number = self.number[graph, side, body, node.name] = len(self.nodes)
        texts = (node.name, _type(node), _operation(node), _arguments(node), place.module)
        self.nodes.append([*map(self._text, texts), self._place(place.source, place.file)])
        return number

    def _site(self, site: Rewritten | Miss) -> dict[str, Any]:
        rewritten = isinstance(site, Rewritten)
        names = {"before": site.nodes, "after": site.made if rewritten else site.nodes}  # what is left keeps its name
        numbers = {
            side: [
                self.number[key] for name in names[side] if (key := (site.graph, side, site.body, name)) in self.number
            ]
            for side in names
        }
        return {
            "kind": "rewritten" if rewritten else site.kind,
            "pattern": self.patterns.index(site.pattern),
            "graph": site.graph,
            "body": site.body,
            "module": site.module,
            "text": "; ".join(filter(None, (site.replacement, site.effect))) if rewritten else site.reason,
            "place": self._place(site.source, site.file),
            **numbers,
        }


def _walk(module: fx.GraphModule, body: str = "", layer: str = "") -> Iterator[tuple[str, str, Place, fx.Node]]:
    """Every node with its body, layer and place; a body's nodes come right behind the first node that names it.

    What a body does outside of any module, such as returning, counts to the layer before it, or to the body's caller.
    """
    modules = dict(module.named_modules())
    for node in module.graph.nodes:
        place = Place.of(node)
        layer = _layer(place.module) or (layer if body else "")
        yield body, layer, place, node
        if node.op in ("get_attr", "call_module") and node.target in modules:
            for name, graph in _graphs_in(node.target, modules.pop(node.target)):
                yield from _walk(graph, f"{body}.{name}" if body else name, layer)


def _graphs_in(name: str, module: torch.nn.Module) -> list[tuple[str, fx.GraphModule]]:
    """A body itself, or the graphs that a module runs: that of logits which are computed when they are read."""
    if isinstance(module, fx.GraphModule):
        return [(name, module)]
    return [(f"{name}.{n}", m) for n, m in module.named_children() if isinstance(m, fx.GraphModule)]


def _layer(module: str) -> str:
    """`model.layers.0` of `model.layers.0.mlp.up_proj`; outside of numbered layers, the first name: `model`."""
    numbered = re.match(r"(?:[^.]*\.)*?\d+(?=\.|$)", module)
    return numbered[0] if numbered else module.partition(".")[0]


def _split(file: str) -> tuple[str, int]:
    path, _, line = file.rpartition(":")
    return path, int(line or 0)


def _context(path: str, line: int) -> dict[int, str]:
    """The lines around one, as far as the file has them: none if it cannot be read."""
    lines = linecache.getlines(path) if path else []
    first = max(line - CONTEXT, 1)
    return {i: text.rstrip("\n") for i, text in enumerate(lines[first - 1 : line + CONTEXT], first)}


def _type(node: fx.Node) -> str:
    value = node.meta.get("example_value", node.meta.get("val"))
    return "" if value is None else _type_of(value)


def _type_of(value: Any) -> str:
    """`float32[2, 64]` of a tensor, the like of each in a tuple, the name of any other type."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_type_of, value))})"
    return type(value).__name__


def _operation(node: fx.Node) -> str:
    if node.op in ("placeholder", "get_attr", "output"):
        return node.op
    return node.target if isinstance(node.target, str) else name_of(node.target)


def _arguments(node: fx.Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return str(node.target)
    return ", ".join([*map(_argument, node.args), *(f"{k}={_argument(v)}" for k, v in node.kwargs.items())])


def _argument(value: Any) -> str:
    """As in Python, with slices as in an index."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, tuple | list):
        inside = ", ".join(map(_argument, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {_argument(v)}' for k, v in value.items())}}}"
    if isinstance(value, slice):
        parts = ["" if v is None else _argument(v) for v in (value.start, value.stop, value.step)]
        return ":".join(parts if parts[2] else parts[:2])
    if value is Ellipsis:
        return "..."
    if isinstance(value, torch.device | torch.dtype):
        return str(value)
    return value.__name__ if callable(value) and hasattr(value, "__name__") else repr(value)
