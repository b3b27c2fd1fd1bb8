"""Code in the documentation runs as it stands, page by page from top to bottom, and prints what the page shows."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import pytest

import liger_compile
from liger_compile import Options
from liger_compile.registry import BUILTIN

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

PREAMBLE = {
    "README.md": """
import torch
from models import batch, build

inputs = batch()
model, ids, labels = build("llama", num_hidden_layers=30), inputs["input_ids"], inputs["labels"]
build("llama").config.save_pretrained(".")
""",
    "index.md": """
import torch

model = torch.nn.Linear(2, 2)
""",
}
"""What a page takes for granted."""
NOT_RUN = {
    "make": "makes an environment, over the network",
    "pip install": "changes the environment",
    "python -m bench.": "needs a GPU, or an hour",
    "python -m torch.distributed.run": "needs two",
    "tlparse": "another project's program",
}
"""Commands in `sh` blocks that are not run, by how they begin, and why. All others are."""
DIAGRAMS = {"loss.md"}
"""Pages whose `text` blocks are not what something prints."""


class Block(NamedTuple):
    line: int
    language: str
    """`python`, `sh`, `text` or `toml`."""
    file: str
    """Of ```` ```python train.py ````: the file that the block is."""
    code: str


def blocks(text: str) -> Iterator[Block]:
    for fence in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.M | re.S):
        language, _, file = fence[1].partition(" ")
        yield Block(text[: fence.start(2)].count("\n"), language, file, fence[2])


def is_run(command: str) -> bool:
    return not command.startswith(tuple(NOT_RUN))


def shell(code: str, folder: Path) -> str:
    """Runs the commands of a block in `folder`; what they print, errors among it."""
    commands = folder / ".commands"
    commands.mkdir(exist_ok=True)
    for name, arguments in (("python", ""), ("liger-compile", "-m liger_compile.cli ")):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        (commands / name).chmod(0o755)
    script = "\n".join(line for line in code.splitlines() if is_run(line))
    environment = {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    run = subprocess.run(
        ["sh", "-e", "-c", script],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, f"{script}\n{run.stdout}"
    return run.stdout


def assert_printed(shown: str, printed: str) -> None:
    """`...` in what a page shows stands for anything."""
    pattern = re.escape(shown).replace(re.escape("..."), ".*?")
    if not re.search(pattern, printed, re.S):
        raise AssertionError(f"the page shows\n{shown}\nwhat is printed is\n{printed}")


def run_page(text: str, name: str, folder: Path) -> None:
    """Runs the blocks of a page in order; Python in one namespace, at the lines where it stands, so that Triton and
    errors find it there."""
    namespace = {"__name__": f"page_{Path(name).stem}"}
    exec(PREAMBLE.get(Path(name).name, ""), namespace)
    printed = io.StringIO()
    for block in blocks(text):
        if block.language == "python" and block.file:
            (folder / block.file).write_text(block.code)
        elif block.language == "python":
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * block.line + block.code, name, "exec"), namespace)
        elif block.language == "sh":
            printed.write(shell(block.code, folder))
        elif block.language == "toml":
            pytest.importorskip("tomllib").loads(block.code)  # from Python 3.11 on
        elif Path(name).name not in DIAGRAMS:
            assert_printed(block.code, printed.getvalue())


def test_pages_are_found():
    assert {"README.md", "patterns.md", "debugging.md"} <= {p.name for p in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_block_is_of_a_kind_that_is_checked(page):
    for block in blocks(page.read_text()):
        assert block.language in ("python", "sh", "text", "toml"), f"{page.name}:{block.line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_page(page, registered, tmp_path, monkeypatch):
    text = page.read_text()
    if "triton" in text and any(b.language == "python" for b in blocks(text)):
        pytest.importorskip("triton")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    run_page(text, str(page), tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links(page):
    """To other pages and files of the project."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
        assert (page.parent / target).exists(), target


# ---- the tables ------------------------------------------------------------------------------------------------------


def rows(head: str, page: str = "options.md") -> dict[str, list[str]]:
    """The further cells of a table of a page in docs, by the first."""
    text = (ROOT / "docs" / page).read_text()
    table = text.partition(f"\n| {head} |")[2].partition("\n\n")[0]
    cells = [[c.strip() for c in line.strip("| \n").split(" | ")] for line in table.splitlines()[2:]]
    assert cells and all(all(row) for row in cells)
    return {row[0].strip("`"): row[1:] for row in cells}


def is_default(cell: str, value: object) -> bool:
    """Whether a cell of a table says what is true: a value, or words for the absence of one."""
    if value is None or value == ():
        return cell in ("none", "all patterns", "no limit", "the function's")
    return cell in (f"`{value!r}`", f'`"{value}"`')


def test_every_option_is_documented():
    found = rows("option")
    assert list(found) == [f"liger.{f.name}" for f in fields(Options)]
    for field in fields(Options):
        default, *effect_and_cost = found[f"liger.{field.name}"]
        assert len(effect_and_cost) == 2 and is_default(default, field.default), field.name


def test_every_environment_variable_is_documented():
    sources = "".join(p.read_text() for p in (ROOT / "liger_compile").rglob("*.py"))
    found = rows("variable")
    assert set(found) == set(re.findall(r"LIGER_COMPILE_\w+", sources))
    assert all(len(cells) == 3 and cells[0] == "not set" for cells in found.values())


def test_every_argument_of_a_pattern_is_documented():
    found, parameters = rows("argument"), signature(liger_compile.register_pattern).parameters
    assert list(found) == list(parameters)[2:]
    for name, (default, *effect_and_cost) in found.items():
        assert len(effect_and_cost) == 2 and is_default(default, parameters[name].default), name


def test_every_pattern_is_documented(registered):
    shipped = {p.name for p in registered if p.function.__module__.startswith(f"{BUILTIN}.")}
    assert set(rows("pattern", "matched.md")) == shipped


def test_the_trainer_does_not_take_the_backend_by_name():
    """What docs/index.md warns of. If this fails, accelerate has learnt it, and the page can say so."""
    utils = pytest.importorskip("accelerate.utils")
    with pytest.raises(ValueError, match="'LIGER' is not a valid DynamoBackend"):
        utils.TorchDynamoPlugin(backend="liger")


def test_every_page_is_in_the_contents():
    pages = {p.stem for p in (ROOT / "docs").iterdir() if p.suffix in (".md", ".rst")}
    contents = re.search(r'PAGES = """.*?\n\n(.*?)\n```', (ROOT / "docs" / "conf.py").read_text(), re.S)[1].split()
    assert {*contents, "index"} == pages and len(contents) == len(pages) - 1


# ---- the checks themselves -------------------------------------------------------------------------------------------

EXAMPLE = """
```python
a = 1
```
```python two.py
print(2)
```
```sh
make nothing
python two.py && liger-compile --help
```
```text
2
usage: liger-compile ...
```
```python
b = 1 / 0
```
"""


def test_a_page_is_run(tmp_path):
    assert [(b.line, b.language, b.file) for b in blocks(EXAMPLE)][:2] == [(2, "python", ""), (5, "python", "two.py")]
    with pytest.raises(ZeroDivisionError) as raised:
        run_page(EXAMPLE, "example.md", tmp_path)
    assert raised.traceback[-1].lineno + 1 == EXAMPLE[: EXAMPLE.index("b = 1")].count("\n") + 1


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("```sh\nliger-compile explain --rows\n```\n", "usage: liger-compile"),
        ("```sh\nfalse\ntrue\n```\n", "false"),
        ("```python\nprint(1)\n```\n```text\n2\n```\n", "the page shows\n2"),
    ],
)
def test_what_is_wrong_is_found(wrong, message, tmp_path):
    with pytest.raises(AssertionError) as raised:
        run_page(wrong, "example.md", tmp_path)
    assert message in str(raised.value)
