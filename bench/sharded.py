"""Training steps on several devices, where hooks and buckets cut the model into many graphs: fully_shard and DDP.

    python -m torch.distributed.run --nproc-per-node 2 -m bench.sharded [--case llama] [--out FOLDER]

Inductor and liger_compile train the same model on the same batches, with padded rows: the losses of each step, which
must agree, the median time of a step (forward, backward and AdamW), and the largest peak memory of a device.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from . import common
from .models import CASES

STEPS, WARM = 13, 3


def sharded(model: torch.nn.Module) -> torch.nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def replicated(model: torch.nn.Module) -> torch.nn.Module:
    return DistributedDataParallel(model)


WAYS = {"fully_shard": sharded, "DDP": replicated}


def batches(case: dict[str, Any], device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Of this process, one a step. Rows end in padding of up to a quarter, without labels there."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    rows, length = case["rows"], case["length"]
    made = []
    for _ in range(STEPS):
        ids = torch.randint(case["config"].vocab_size, (rows, length), generator=generator)
        tokens = length - torch.randint(length // 4, (rows, 1), generator=generator)
        mask = (torch.arange(length) < tokens).long()
        batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask != 0, ids, -100)}
        made.append({k: v.to(device) for k, v in batch.items()})
    return made


def train(case: dict[str, Any], way: str, backend: str, device: torch.device) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(case["config"], dtype=torch.bfloat16).train()
    model = WAYS[way](model)
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    losses, times = [], []
    for batch in batches(case, device):
        start = time.perf_counter()
        loss = compiled(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = loss.detach().float()
        dist.all_reduce(loss)
        losses.append(float(loss) / dist.get_world_size())  # waits for the device
        times.append(time.perf_counter() - start)
    peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0, device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    ms = statistics.median(times[WARM:]) * 1e3
    return {"way": way, "backend": backend, "ms": ms, "peak GiB": float(peak), "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="llama", choices=list(CASES))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    case = CASES[arguments.case]
    title = f"{case['title']} a device, padded rows, {dist.get_world_size()} devices"
    rows = []
    for way in arguments.ways:
        for backend in ("inductor", "liger"):
            rows.append(train(case, way, backend, device))
            if dist.get_rank() == 0:
                print(rows[-1], flush=True)
    if dist.get_rank() == 0:
        path = common.save("sharded", {"title": title, "rows": rows}, arguments.out)
        shown = [{k: v for k, v in row.items() if k != "losses"} | {"last loss": row["losses"][-1]} for row in rows]
        print(f"\n{title}\n\n{common.table(shown)}\n\n{path}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
