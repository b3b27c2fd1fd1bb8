"""The longest sequence that trains, forward and backward, on one device: Llama-3.2-1B shape, one row, bfloat16.

    python -m bench.longest [--step 2048] [--out FOLDER]

Peaks at three short lengths give a first guess; from there the length goes up or down by `step` until one fits and the
next does not. Whole models, `torch.compile(model)` where compiled, with their gradients and no optimizer.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from liger_compile.options import Options

from . import common
from .models import CASES, contenders

CONFIG = CASES["llama-1b"]["config"]
SHORT = (4096, 8192, 12288)


def peak(model: torch.nn.Module, call: Callable[..., Any], length: int) -> int | None:
    """The most bytes allocated in a step, or None if the device has not as many."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(CONFIG.vocab_size, (1, length), device="cuda")
    torch._dynamo.maybe_mark_dynamic(ids, 1)
    try:
        call(input_ids=ids, labels=ids).loss.backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        return None
    finally:
        model.zero_grad(set_to_none=True)


def guess(lengths: tuple[int, ...], peaks: list[int], most: int) -> int:
    """The length at which a parabola through three points reaches `most`."""
    a, b, c = torch.linalg.solve(
        torch.tensor([[x * x, x, 1.0] for x in lengths], dtype=torch.float64),
        torch.tensor(peaks, dtype=torch.float64),
    ).tolist()
    length = lengths[-1]
    while a * length**2 + b * length + c < most and length < 1 << 19:
        length += 256
    return length


def longest(model: torch.nn.Module, call: Callable[..., Any], step: int) -> dict[str, Any]:
    peaks = [peak(model, call, length) for length in SHORT]
    if None in peaks:
        raise RuntimeError(f"no memory for {SHORT} tokens")
    total = torch.cuda.get_device_properties(0).total_memory
    length = guess(SHORT, peaks, int(total * 0.98)) // step * step
    fits: dict[int, int | None] = dict(zip(SHORT, peaks, strict=True))
    while True:
        fits[length] = peak(model, call, length)
        print(f"  {length}: {fits[length]}", flush=True)
        up, down = length + step, length - step
        if fits[length] is not None and fits.get(up, 0) is None:
            return {"tokens": length, "peak GiB": fits[length] / 2**30}
        if fits[length] is None and fits.get(down) is not None:
            return {"tokens": down, "peak GiB": fits[down] / 2**30}
        length = down if fits[length] is None else up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    title = f"Llama-3.2-1B shape, one row: the longest sequence that fits, in steps of {arguments.step} tokens"
    rows = []
    for name, build in contenders(CONFIG, ["model"], [Options.memory]).items():
        torch._dynamo.reset()
        model, call = build()
        print(name, flush=True)
        rows.append({"contender": name} | longest(model, call, arguments.step))
        del model, call
        path = common.save("longest", {"title": title, "rows": rows}, arguments.out)
    print(f"\n{title}\n\n{common.table(rows)}\n\n{path}")


if __name__ == "__main__":
    main()
