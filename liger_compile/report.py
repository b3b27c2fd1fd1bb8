"""What was rewritten, what was not, and why."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Place:
    """Where in the user's model a node comes from."""

    module: str
    """`model.layers.0.mlp`; empty for code outside of any submodule."""
    source: str
    """`modeling_llama.py:65: variance = ...`."""
    file: str
    """The whole path of that file, and the line: `/.../modeling_llama.py:65`; empty if unknown."""

    @classmethod
    def of(cls, node: fx.Node) -> Place:
        return cls(_module_path(node), *_source_line(node))


def _module_path(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    path = re.sub(r"(\.__dict__\['_modules'\]|\._modules)(?=\[)", "", stack[-1][0])
    path = re.sub(r"^L\[['\"]\w+['\"]\]\.?", "", path).removeprefix("_orig_mod.")
    return re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path).strip(".")


def _source_line(node: fx.Node) -> tuple[str, str]:
    """The innermost line of Python that made a node, and its file with the whole path."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*(?:\n\s+([^\n]*))?', node.meta.get("stack_trace") or "")
    if not frames:
        return "", ""
    path, line, code = frames[-1]
    short = f"{path.rsplit('/', 1)[-1]}:{line}" + (f": {code.strip()}" if code.strip() else "")
    return short, f"{path}:{line}"


@dataclass(frozen=True)
class Rewritten:
    """One place where a pattern was replaced."""

    pattern: str
    module: str
    source: str
    replacement: str
    file: str = ""
    body: str = ""
    """The submodule's name in the graph, of a site in the body of an activation checkpoint; empty for others."""
    nodes: tuple[str, ...] = ()
    """The names of what was replaced, in the graph before."""
    made: tuple[str, ...] = ()
    """The names of what replaces it, in the graph after."""
    graph: int = 0
    """Which of the report's graphs it is in."""
    effect: str = ""
    """What the rewrite spares, where the pattern can tell."""


@dataclass(frozen=True)
class Miss:
    """One place where a pattern almost matched, or matched and was left alone."""

    pattern: str
    source: str
    module: str
    reason: str
    kind: str = "left"
    """Either "left" (it matched, and is left alone for the reason) or "near" (it differs from the pattern)."""
    file: str = ""
    body: str = ""
    nodes: tuple[str, ...] = ()
    """The names of the nodes it concerns, in the graph before."""
    graph: int = 0


@dataclass(frozen=True)
class GraphReport:
    """One graph before and after; the same object twice if nothing was rewritten."""

    before: fx.GraphModule
    after: fx.GraphModule


@dataclass
class Report:
    """What happened to one or more graphs."""

    matches: list[Rewritten] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Pattern name to number of rewrites."""
        return dict(collections.Counter(m.pattern for m in self.matches))

    def merge(self, other: Report) -> None:
        first = len(self.graphs)
        self.matches += [dataclasses.replace(m, graph=first + m.graph) for m in other.matches]
        self.misses += [dataclasses.replace(m, graph=first + m.graph) for m in other.misses]
        self.graphs += other.graphs

    def as_json(self) -> dict[str, Any]:
        """The report without its graphs, of plain types."""
        return {
            "counts": self.counts,
            "graphs": len(self.graphs),
            "matches": [dataclasses.asdict(m) for m in self.matches],
            "misses": [dataclasses.asdict(m) for m in self.misses],
        }

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes a page to look at: the graphs before and after, every match and miss with its line of the model."""
        from .page import page  # which is made of reports

        Path(path).write_text(page(self), encoding="utf-8")

    def __str__(self) -> str:
        graphs = f"{len(self.graphs)} graph{'s' * (len(self.graphs) != 1)}"
        lines = [f"liger_compile: {len(self.matches)} rewrite{'s' * (len(self.matches) != 1)} in {graphs}"]
        if self.matches:
            rows = [("pattern", "rewrites", "in modules", "what it spares")]
            for name, count in sorted(self.counts.items()):
                found = [m for m in self.matches if m.pattern == name]
                spared = "; ".join(dict.fromkeys(m.effect for m in found if m.effect))
                rows.append((name, str(count), _summary(found), spared))
            if not any(row[3] for row in rows[1:]):
                rows = [row[:3] for row in rows]
            lines += ["", *table(rows)]
        for kind, title in (("left", "left alone"), ("near", "near miss")):
            grouped = collections.Counter((m.pattern, m.reason, m.source) for m in self.misses if m.kind == kind)
            rows = [(p, str(n), reason, source) for (p, reason, source), n in grouped.items()]
            if rows:
                lines += ["", *table([(title, "times", "reason", "source"), *rows])]
        return "\n".join(lines)


def _summary(matches: list[Rewritten]) -> str:
    """Module paths with layer numbers folded: `model.layers.*.mlp`."""
    folded = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", m.module) for m in matches if m.module)
    names = list(folded)
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def size(n: int) -> str:
    """Bytes, in words: `1.5 GiB`, `561 MiB`."""
    exponent = min(max(n, 1).bit_length() - 1, 30) // 10
    amount = n / 1024**exponent
    return f"{amount:{'.0f' if amount >= 100 else '.3g'}} {('bytes', 'KiB', 'MiB', 'GiB')[exponent]}"


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table whose first row is its head."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]
