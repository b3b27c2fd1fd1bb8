"""What every benchmark shares: the environment it ran in, timing, memory, results as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Date, GPU, versions and commit: what a figure means nothing without."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    root = Path(__file__).parent.parent
    note = root / "COMMIT"  # made by who copies the tree to another machine without its history
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=root).stdout
    commit = note.read_text() if note.exists() else head
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "commit": commit.strip(),
        **{name: installed(name) for name in ("torch", "triton", "transformers", "liger-kernel")},
        **ceilings(),
    }


def with_caches(folder: str) -> dict[str, str]:
    """The environment of a process that keeps what it compiles in `folder`."""
    return {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}


def sweep(
    module: str,
    about: str,
    check: Callable[..., Any],
    known: Callable[[], list[str]],
    told: Callable[[dict[str, Any]], Any],
    timeout: int = 300,
    situations: tuple[str, ...] = (),
) -> tuple[argparse.Namespace, list[dict[str, Any]]]:
    """The command line of a benchmark over model families, and the fields of what `check` finds of each, a dataclass:
    of those named, or of all that are known. Each has a process of its own, and what is `told` of it, or its failure,
    is printed. If there are `situations`, those that are chosen of them are passed to `check`.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="all of them by default")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--here", action="store_true", help="run in this process, print JSON")
    if situations:
        parser.add_argument("--situations", nargs="+", default=situations, choices=situations, metavar="NAME")
    arguments = parser.parse_args()
    chosen = arguments.families or known()
    passed = [tuple(arguments.situations)] if situations else []
    if arguments.here:
        for family in chosen:
            print(json.dumps(dataclasses.asdict(check(family, *passed))), flush=True)
        sys.exit()

    def one(family: str) -> dict[str, Any]:
        found = _alone(module, family, ["--situations", *passed[0]] if passed else [], timeout)
        print(family, found["failure"] or told(found), file=sys.stderr, flush=True)
        return found

    with ThreadPoolExecutor(arguments.jobs) as pool:
        return arguments, list(pool.map(one, chosen))


def _alone(module: str, family: str, options: list[str], timeout: int) -> dict[str, Any]:
    """What `module` finds of one family in a process of its own: a crash or a change of global state harms no other."""
    with tempfile.TemporaryFile("w+") as errors:
        try:
            result = subprocess.run(
                [sys.executable, "-m", module, "--here", family, *options],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return {"family": family, "failure": f"no answer in {timeout} s"}
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["no answer"])[-1]
    line = result.stdout.strip().splitlines()[-1:]
    return json.loads(line[0]) if line else {"family": family, "failure": last[:120]}


@functools.cache
def ceilings() -> dict[str, float]:
    """What this device can do: a large copy, bytes read plus written, and a large bfloat16 matrix product. Measured
    once, after a while: a device that was idle copied at 0.9 times its rate."""
    if not torch.cuda.is_available():
        return {}
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source), repeats=30, warmup=100)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = median_ms(lambda: a @ b, repeats=10)
    return {
        "copy_TB_per_s": round(2 * source.nbytes / copy / 1e9, 2),
        "bf16_matmul_TFLOP_per_s": round(2 * 8192**3 / product / 1e9),
    }


def median_ms(function: Callable[[], Any], repeats: int = 20, warmup: int = 3) -> float:
    return interleaved({"": function}, repeats, warmup)[""]


def interleaved(
    functions: dict[Any, Callable[[], Any]], repeats: int = 20, warmup: int = 3, ahead: int = 0
) -> dict[Any, float]:
    """Median milliseconds on the device of each function, taking turns, so that a drifting clock meets all alike.

    With `ahead`, a turn is one call that is not timed and so many that are, one after another: the host is ahead of the
    device, as it is in training.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    torch.cuda.synchronize()
    times: dict[Any, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if ahead:
                function()
            start.record()
            for _ in range(max(ahead, 1)):
                function()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) / max(ahead, 1))
    return {name: statistics.median(t) for name, t in times.items()}


def peak_gib(function: Callable[[], Any], base: int) -> float:
    """The most memory allocated during a call, less `base` bytes that belong to others."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - base) / 2**30


def save(name: str, results: Any, folder: Path | None = None) -> Path:
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    if not rows:
        return "None."
    names = list(rows[0])
    cells = [names, *[[_cell(r[n]) for n in names] for r in rows]]
    widths = [max(len(c[i]) for c in cells) for i in range(len(names))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
