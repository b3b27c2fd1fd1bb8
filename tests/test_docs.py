"""Code in the documentation runs as it stands: each page from top to bottom, in one namespace."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from liger_compile import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

PREAMBLE = {
    "README.md": "import torch; model = torch.nn.RMSNorm(8, eps=1e-6)",
}
"""What a page takes for granted."""
SHOWS_OUTPUT = {"patterns.md"}
"""Pages on which a block without a language is what their code prints."""


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """The code in fences of a language ("" for none), with the line each begins at."""
    fences = re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.M | re.S)
    return [(text[: f.start(2)].count("\n"), f[2]) for f in fences if f[1].strip() == language]


def program(text: str) -> str:
    """A page's Python at the lines where it stands, so that errors and Triton find it there."""
    lines: list[str] = []
    for line, code in blocks(text, "python"):
        lines += [""] * (line - len(lines)) + code.splitlines()
    return "\n".join(lines) + "\n"


def commands(text: str) -> list[str]:
    """The `liger-compile` commands in a page's shell blocks."""
    lines = [
        line for language in ("sh", "bash", "shell", "") for _, b in blocks(text, language) for line in b.splitlines()
    ]
    return [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?liger-compile ", line)]


WITH_CODE = [p for p in PAGES if blocks(p.read_text(), "python")]


def test_pages_are_found():
    assert {"README.md", "patterns.md"} <= {p.name for p in WITH_CODE}


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: p.name)
def test_python(page, registered, capsys):
    if "triton" in page.read_text():
        pytest.importorskip("triton")
    namespace = {"__name__": f"page_{page.stem}"}
    exec(PREAMBLE.get(page.name, ""), namespace)
    exec(compile(program(page.read_text()), str(page), "exec"), namespace)
    printed = capsys.readouterr().out
    for _, block in blocks(page.read_text(), "") if page.name in SHOWS_OUTPUT else ():
        assert block in printed


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands(page):
    for command in commands(page.read_text()):
        cli._parser().parse_args(shlex.split(command, comments=True)[1:])


EXAMPLE = """
```python
a = 1
```
    text
```
liger-compile env  # versions
$ liger-compile explain llama --rows 3
make test
```
```python
b = 1 / 0
```
"""


def test_the_extraction():
    assert commands(EXAMPLE) == ["liger-compile env  # versions", "liger-compile explain llama --rows 3"]
    assert program(EXAMPLE).splitlines() == ["", "", "a = 1", *[""] * 8, "b = 1 / 0"]
    with pytest.raises(ZeroDivisionError):
        exec(program(EXAMPLE), {})
    with pytest.raises(SystemExit):
        cli._parser().parse_args(["explain", "llama", "--row-count", "3"])
