"""What the first step costs: Inductor and liger_compile, with empty caches and with those of the run before.

    python -m bench.compile_time [--case llama] [--out FOLDER]

Each measurement is a process of its own, with cache folders of its own, from the call of the compiled model to the end
of its first forward and backward. Cold is the first process, warm the second with the same folders.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import common

BACKENDS = {"Inductor": "inductor", "liger_compile": "liger"}


def first_step(case: str, backend: str) -> dict[str, Any]:
    """Seconds of the first step of this process, and how often its caches were hit."""
    import torch
    from torch._dynamo.utils import counters
    from transformers import AutoModelForCausalLM

    from .models import CASES

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    chosen = CASES[case]
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(chosen["config"], dtype=torch.bfloat16).train()
        ids = torch.randint(model.config.vocab_size, (chosen["rows"], chosen["length"]))
    torch.ones(8, device=device).sum().item()
    start = time.perf_counter()
    loss = torch.compile(model, backend=backend)(input_ids=ids, labels=ids).loss
    loss.backward()
    loss.item()
    return {
        "seconds": time.perf_counter() - start,
        "FX graph cache hits": counters["inductor"]["fxgraph_cache_hit"],
        "AOTAutograd cache hits": counters["aot_autograd"]["autograd_cache_hit"],
    }


def measure(case: str, backend: str, folder: str) -> dict[str, Any]:
    """`first_step` in a process that keeps its caches in `folder`."""
    command = [sys.executable, "-m", "bench.compile_time", "--case", case, "--only", backend]
    result = subprocess.run(command, env=common.with_caches(folder), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="llama", choices=["llama", "qwen3", "tiny"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--only", choices=list(BACKENDS.values()), help="measure in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(first_step(arguments.case, arguments.only)))
        return
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(arguments.repeats):
        for name, backend in BACKENDS.items():
            with tempfile.TemporaryDirectory() as folder:
                for state in ("cold", "warm"):
                    runs.setdefault((name, state), []).append(measure(arguments.case, backend, folder))
                    print(name, state, runs[name, state][-1], flush=True)
    rows = [
        {"contender": name, "caches": state, **found[0], "seconds": statistics.median(r["seconds"] for r in found)}
        for (name, state), found in runs.items()
    ]
    results = {"case": arguments.case, "rows": rows}
    print(f"\n{common.table(rows)}\n\n{common.save('compile-time', results, arguments.out)}")


if __name__ == "__main__":
    main()
