"""The command `liger-compile`: output, messages and exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from models import build
from torch import nn

import liger_compile
from liger_compile.cli import main
from liger_compile.registry import patterns


@pytest.fixture
def config(tmp_path):
    """A folder with the config.json of a tiny Llama."""
    build("llama").config.save_pretrained(tmp_path)
    return tmp_path


def explained(capsys, *arguments):
    assert main(["explain", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


ALL = {"rms_norm": 5, "rope": 2, "swiglu": 2, "linear_cross_entropy": 1, "attention": 2}


@pytest.mark.parametrize("flags", [[], ["--padded"], ["--checkpointed"], ["--checkpointed", "--padded"]], ids=" ".join)
def test_explain_training(capsys, config, flags):
    """On the meta device a model is looked at as on a GPU."""
    found = explained(capsys, config, *flags)
    assert found["counts"] == ALL and {m["pattern"] for m in found["misses"]} == {"embedding"} and found["graphs"] == 1
    spared = {m["effect"] for m in found["matches"] if m["pattern"] == "attention"}
    assert (
        spared == {"blocks of scores that no query sees"}
        if "--padded" in flags
        else "half of the scores" in spared.pop()
    )
    assert {m["module"] for m in found["matches"] if m["pattern"] == "swiglu"} == {
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    }


def test_explain_eval(capsys, config):
    assert explained(capsys, config / "config.json", "--eval", "--length", 128)["counts"] == {
        k: n for k, n in ALL.items() if k != "linear_cross_entropy"
    }


def test_explain_as_a_table(capsys, config):
    assert main(["explain", str(config)]) == 0
    assert "12 rewrites in 1 graph" in capsys.readouterr().out


@pytest.mark.parametrize("flags, begins", [([], "liger_compile: 12 rewrites"), (["--json"], "{")])
def test_explain_as_a_page(capsys, config, tmp_path, flags, begins):
    page = tmp_path / "out.html"
    assert main(["explain", str(config), "--html", str(page), *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(begins) and str(page) in captured.err
    assert "model.layers.1.mlp" in page.read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written(capsys, tmp_path):
    assert main(["explain", "test_cli:norm", "--html", str(tmp_path / "none" / "out.html")]) == 1
    captured = capsys.readouterr()
    assert "out.html cannot be written: No such file or directory" in captured.err and not captured.out


class Norm(nn.Module):
    def forward(self, x):
        return nn.functional.rms_norm(x, (8,))


def norm():
    return Norm(), {"x": torch.empty(2, 8)}


def fails():
    raise RuntimeError("no such thing")


def not_a_module():
    return 3


def mistaken():
    return nn.Linear(3, 4), {"input": torch.empty(2, 5)}


def test_explain_a_factory(capsys):
    assert explained(capsys, "test_cli:norm")["counts"] == {"rms_norm": 1}


@pytest.mark.parametrize(
    "model, message",
    [
        ("lama", "did you mean llama?"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        (":", "give package.module:function"),
        ("test_cli:nothing", "give package.module:function"),
        ("test_cli:fails", "RuntimeError: no such thing"),
        ("test_cli:not_a_module", "gives int, not a module"),
        ("test_cli:mistaken", "does not run on the meta device"),
        ("vit", "vit gives no causal language model"),
    ],
)
def test_refused(capsys, model, message):
    assert main(["explain", model]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


@pytest.mark.parametrize("wrong", ["", "llama --rows 0", "llama --length -1", "llama --rows two"])
def test_wrong_usage(wrong):
    with pytest.raises(SystemExit) as stopped:
        main(["explain", *wrong.split()])
    assert stopped.value.code == 2


def test_patterns(capsys):
    assert main(["patterns"]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["pattern", "function", "defined", "in", "priority", "replacement"]
    assert [line.split()[:2] for line in lines] == [[p.name, p.function.__name__] for p in patterns()]
    swiglu = r"swiglu +swiglu +glu\.py:\d+ +0 +liger_compile\.glu\.default"
    assert any(re.fullmatch(swiglu, line) for line in lines)


def test_a_pattern_of_ones_own_is_listed(capsys, registered):
    liger_compile.register_pattern(lambda x: x.sin().exp(), lambda x: x.clone(), name="mine", priority=2)
    assert main(["patterns"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"mine +<lambda> +test_cli\.py:\d+ +2 +replacement", last)


def test_env():
    command = [sys.executable, "-m", "liger_compile.cli", "env"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert found["liger-compile"] == liger_compile.__version__ and found["torch"].startswith(
        torch.__version__.split("+")[0]
    )


def test_a_reader_that_stops():
    """As `head` does."""
    command = f"{sys.executable} -m liger_compile.cli patterns"
    result = subprocess.run(["sh", "-c", f"({command}; echo status $? >&2) | true"], capture_output=True, text=True)
    assert result.stderr == "status 0\n"
