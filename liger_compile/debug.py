"""Debug mode: the graphs before and after, and the report, as files."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import fx

from .report import Report

FOLDER = "liger_debug"


def write(report: Report, folder: bool | str | os.PathLike[str]) -> Path:
    """Writes before.py, after.py, report.txt, .json and .html to a new numbered folder, and returns it."""
    root = Path(FOLDER if folder is True else folder)
    root.mkdir(parents=True, exist_ok=True)
    number = len([p for p in root.iterdir() if p.is_dir()])
    while (here := root / f"{number:03d}").exists():
        number += 1
    here.mkdir()
    for graph in report.graphs:
        (here / "before.py").write_text(readable(graph.before), encoding="utf-8")
        (here / "after.py").write_text(readable(graph.after), encoding="utf-8")
    (here / "report.txt").write_text(f"{report}\n", encoding="utf-8")
    (here / "report.json").write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
    report.to_html(here / "report.html")
    return here


def readable(gm: fx.GraphModule) -> str:
    """A graph as Python, with shapes, strides and devices."""
    return gm.print_readable(print_output=False, include_stride=True, include_device=True)
