"""The command `liger-compile`: what the backend would do to a model, without its weights; finding a bad rewrite."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .explain import explain
from .fuel import EVERYTHING, search
from .pattern import name_of, target_of
from .registry import patterns
from .report import Report, table

PACKAGES = ("liger-compile", "torch", "triton", "transformers", "liger-kernel")


class Refused(Exception):
    """What the user asked for cannot be done; the message says what to change."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, or 1 if the model cannot be built or run (2: wrong usage)."""
    chosen = _parser().parse_args(arguments)
    try:
        chosen.run(chosen)
        sys.stdout.flush()
    except Refused as refused:
        print(f"liger-compile: {refused}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who reads has seen enough: `liger-compile patterns | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to write at exit
    return 0


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, not {text}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="liger-compile", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("explain", help="what is rewritten in a model, what is not, and why")
    command.add_argument(
        "model",
        help="a transformers config.json or a folder with one, a model type (llama), or package.module:factory, where "
        "factory() gives a module, or a module and a dictionary of its inputs",
    )
    command.add_argument("--rows", type=_count, default=2, help="batch size (2)")
    command.add_argument("--length", type=_count, default=2048, help="tokens a row (2048)")
    command.add_argument("--padded", action="store_true", help="with an attention_mask, as collators pass one")
    command.add_argument("--eval", action="store_true", help="in eval mode without labels, instead of a training step")
    command.add_argument("--checkpointed", action="store_true", help="with gradient checkpointing")
    command.add_argument("--json", action="store_true", help="JSON instead of a table")
    command.add_argument("--html", type=Path, metavar="FILE", help="also write a page to look at, one HTML file")
    command.set_defaults(run=_explain)
    command = commands.add_parser("bisect", help="find the rewrite that makes a command fail")
    command.add_argument("command", nargs=argparse.REMAINDER, help="what to run: `-- python train.py`")
    command.set_defaults(run=_bisect)
    command = commands.add_parser("patterns", help="the registered patterns and what replaces them")
    command.set_defaults(run=_patterns)
    command = commands.add_parser("env", help="versions, for a bug report")
    command.set_defaults(run=_env)
    return parser


def _explain(chosen: argparse.Namespace) -> None:
    model, inputs = _load(chosen)
    model.train(not chosen.eval)
    try:
        report = explain(model)(**inputs)
    except Exception as error:
        raise Refused(f"{chosen.model} does not run on the meta device: {type(error).__name__}: {error}") from error
    if chosen.html:
        _write_page(report, chosen.html)
    print(json.dumps(report.as_json(), indent=1) if chosen.json else report)


def _write_page(report: Report, path: Path) -> None:
    try:
        report.to_html(path)
    except OSError as error:
        raise Refused(f"--html {path} cannot be written: {error.strerror}") from error
    print(f"liger-compile: the page is {path.absolute()}", file=sys.stderr)


def _load(chosen: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model, on the meta device, and the inputs of one step."""
    made = _from_factory(chosen.model) if ":" in chosen.model else _from_config(chosen.model)
    if isinstance(made, tuple):
        return made
    if chosen.checkpointed:
        if not hasattr(made, "gradient_checkpointing_enable"):
            raise Refused(f"{chosen.model} cannot be checkpointed from outside; let the factory do it")
        made.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.ones(chosen.rows, chosen.length, dtype=torch.int64, device="meta")
    inputs = {"input_ids": ids}
    if chosen.padded:
        inputs["attention_mask"] = ids
    if not chosen.eval:
        inputs["labels"] = ids
    return made, inputs


def _from_factory(name: str) -> Any:
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: no name before the colon
        raise Refused(f"{name}: {error}; give package.module:function, importable from here") from error
    finally:
        sys.path.pop(0)
    try:
        with torch.device("meta"):
            made = factory()
    except Exception as error:
        raise Refused(f"{name}() fails: {type(error).__name__}: {error}") from error
    model, inputs = made if isinstance(made, tuple) else (made, {})
    if not isinstance(model, torch.nn.Module) or not isinstance(inputs, dict):
        raise Refused(f"{name}() gives {type(made).__name__}, not a module, or a module and a dictionary of its inputs")
    return (model, inputs) if isinstance(made, tuple) else model


def _from_config(name: str) -> torch.nn.Module:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    except ImportError as error:
        raise Refused("transformers is not installed: pip install it, or give package.module:factory") from error
    if not Path(name).exists() and name not in CONFIG_MAPPING_NAMES:
        near = difflib.get_close_matches(name, CONFIG_MAPPING_NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise Refused(f"{name} is no file or folder here, and no model type that transformers knows{hint}")
    try:
        config = AutoConfig.from_pretrained(name) if Path(name).exists() else AutoConfig.for_model(name)
        config.use_cache = False
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except Exception as error:
        raise Refused(f"{name} gives no causal language model: {type(error).__name__}: {error}") from error


def _bisect(chosen: argparse.Namespace) -> None:
    """Runs the command again and again, as `git bisect run` would."""
    command = chosen.command[1:] if chosen.command[:1] == ["--"] else chosen.command
    if not command:
        raise Refused("give the command to run, which exits with another status than 0 when the result is wrong")
    with tempfile.TemporaryDirectory() as folder:

        def works(limit: int) -> bool:
            environment = {**os.environ, "LIGER_COMPILE_FUEL": str(limit)}
            if limit == EVERYTHING:
                environment["LIGER_COMPILE_DEBUG"] = folder
            try:
                status = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            except OSError as error:
                raise Refused(f"{command[0]} does not start: {error}") from error
            made = "all" if limit == EVERYTHING else limit
            print(f"{made:>6} rewrites: {'works' if status.returncode == 0 else 'fails'}", file=sys.stderr, flush=True)
            return status.returncode == 0

        def made() -> list[dict[str, Any]]:
            folders = sorted(Path(folder).iterdir(), key=lambda p: int(p.name))
            return [m for p in folders for m in json.loads((p / "report.json").read_text(encoding="utf-8"))["matches"]]

        try:
            number, matches = search(works, made)
        except ValueError as error:
            raise Refused(str(error)) from error
    pattern, module, source = (matches[number - 1][key] for key in ("pattern", "module", "source"))
    print(f"rewrite {number} of {len(matches)}: {pattern} in {module or 'the model'} ({source})")


def _patterns(chosen: argparse.Namespace) -> None:
    rows = [("pattern", "function", "defined in", "priority", "replacement")]
    for pattern in patterns():
        code = getattr(pattern.function, "__code__", None)
        place = f"{Path(code.co_filename).name}:{code.co_firstlineno}" if code is not None else ""
        target, _ = target_of(pattern.replacement)
        rows.append((pattern.name, name_of(pattern.function), place, str(pattern.priority), name_of(target)))
    print("\n".join(table(rows)))


def _env(chosen: argparse.Namespace) -> None:
    for name in PACKAGES:
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "not installed"
        print(f"{name:16}{found}")
    print(f"{'python':16}{sys.version.split()[0]}")
    print(f"{'GPU':16}{torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")


if __name__ == "__main__":
    sys.exit(main())
