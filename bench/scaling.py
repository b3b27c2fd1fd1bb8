"""What rewriting costs by the size of a model, beside what Inductor takes to compile it.

    python -m bench.scaling [--layers 2 8 32 128] [--out FOLDER]

A narrow Llama of so many layers on this machine's CPU; sizes of tensors do not matter to either. Rewriting is the whole
of `liger_compile.rewrite`, report included; compiling is the first forward and backward under `torch.compile(model)`,
with Inductor's caches off. Models of more layers than COMPILED are only rewritten: Inductor takes ten minutes for 128.
Each number of layers is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import common

COMPILED = 32


def measure(layers: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import liger_compile

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.randint(256, (2, 32))
    found: dict[str, Any] = {}

    def rewriting(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        start = time.perf_counter()
        report = liger_compile.rewrite(gm)
        found.update({"rewriting s": time.perf_counter() - start, "rewrites": sum(report.counts.values())})
        found["nodes"] = len(gm.graph.nodes)
        return gm.forward

    torch.compile(model, backend=rewriting)(input_ids=ids, labels=ids)
    row = {
        "layers": layers,
        "nodes": found["nodes"],
        "rewrites": found["rewrites"],
        "rewriting s": found["rewriting s"],
        "us per node": found["rewriting s"] / found["nodes"] * 1e6,
        "Inductor's first step s": None,
        "share": None,
    }
    if layers <= COMPILED:
        torch._dynamo.reset()
        torch._inductor.config.force_disable_caches = True
        start = time.perf_counter()
        torch.compile(model, backend="inductor")(input_ids=ids, labels=ids).loss.backward()
        row["Inductor's first step s"] = time.perf_counter() - start
        row["share"] = row["rewriting s"] / row["Inductor's first step s"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 8, 32, 128])
    parser.add_argument("--here", action="store_true", help="measure in this process and print JSON")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.layers[0])))
        return
    rows = []
    for layers in arguments.layers:
        command = [sys.executable, "-m", "bench.scaling", "--here", "--layers", str(layers)]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    print(f"\n{common.table(rows)}\n\n{common.save('scaling', rows, arguments.out)}")


if __name__ == "__main__":
    main()
