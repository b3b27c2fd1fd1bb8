"""Whole training steps, forward and backward, of model shapes that people train.

    python -m bench.models [cases...] [--modes model loss] [--memory balanced lean] [--out FOLDER]

Eager, Inductor, Liger-Kernel and liger_compile in one process, timed in turns; each with the whole model
(`torch.compile(model)`, which returns logits) and, compiled, with a step that returns the loss alone; liger_compile
with each `liger.memory` that is asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from liger_compile.options import CHOICES, Options

from . import common

CASES: dict[str, dict[str, Any]] = {
    "llama": {
        "title": "Llama-3-8B shape, 4 layers, 2 x 4096 tokens",
        "config": LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=4,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            max_position_embeddings=8192,
            rope_theta=500000.0,
            use_cache=False,
        ),
        "rows": 2,
        "length": 4096,
    },
    "qwen3": {
        "title": "Qwen3-0.6B shape, 28 layers, 8 x 2048 tokens",
        "config": Qwen3Config(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            use_cache=False,
        ),
        "rows": 8,
        "length": 2048,
    },
    "llama-1b": {
        "title": "Llama-3.2-1B shape, 16 layers, 4 x 2048 tokens",
        "config": LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            vocab_size=128256,
            max_position_embeddings=1 << 20,
            rope_theta=500000.0,
            tie_word_embeddings=True,
            use_cache=False,
        ),
        "rows": 4,
        "length": 2048,
    },
    "mistral": {
        "title": "Mistral-7B shape, 4 layers, 1 x 16384 tokens, window of 4096",
        "config": MistralConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=4,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=32000,
            max_position_embeddings=32768,
            sliding_window=4096,
            use_cache=False,
        ),
        "rows": 1,
        "length": 16384,
    },
    "gemma2": {
        "title": "Gemma-2-2B shape, 6 layers, 1 x 8192 tokens",
        "config": Gemma2Config(
            hidden_size=2304,
            intermediate_size=9216,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
            vocab_size=256000,
            max_position_embeddings=8192,
            sliding_window=4096,
            use_cache=False,
        ),
        "rows": 1,
        "length": 8192,
    },
    "tiny": {
        "title": "a shape to try the benchmark with",
        "config": LlamaConfig(
            hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=1024
        ),
        "rows": 2,
        "length": 128,
    },
}
CASES["qwen3-short"] = {
    **CASES["qwen3"],
    "title": "Qwen3-0.6B shape, 28 layers, 1 x 256 tokens: bound by the host",
    "rows": 1,
    "length": 256,
}
CASES["gemma2-short"] = {
    **CASES["gemma2"],
    "title": "Gemma-2-2B shape, 6 layers, 2 x 4096 tokens",
    "rows": 2,
    "length": 4096,
}
for _name in ("llama", "qwen3", "llama-1b", "gemma2-short", "tiny"):
    CASES[f"{_name}-unmasked"] = {
        **CASES[_name],
        "title": f"{CASES[_name]['title']}, without the explicit mask",
        "unmasked": True,
    }
for _name in ("llama", "qwen3", "tiny"):
    CASES[f"{_name}-padded"] = {
        **CASES[_name],
        "title": f"{CASES[_name]['title']}, rows padded to a quarter at most",
        "padded": True,
    }


def make(config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()


@contextlib.contextmanager
def unmasked() -> Iterator[None]:
    """Attention without the explicit mask that transformers makes under compilation: causal by itself, for all
    contenders alike."""
    before = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    AttentionMaskInterface.register("sdpa", lambda *args, **kwargs: None)
    try:
        yield
    finally:
        AttentionMaskInterface.register("sdpa", before)


class changes_kept(contextlib.AbstractContextManager):
    """Liger-Kernel replaces functions of the modeling module for the whole process. This notes what changes in its
    `with` block and undoes it at the end, so that the other contenders stay what they are; entering again brings the
    changes back for as long as the block lasts."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.space = vars(sys.modules[type(model).__module__])
        self.changed: dict[str, Any] | None = None

    def __enter__(self) -> changes_kept:
        self.original = dict(self.space)
        self.space.update(self.changed or {})
        return self

    def __exit__(self, *_: Any) -> None:
        if self.changed is None:
            self.changed = {k: v for k, v in self.space.items() if self.original.get(k) is not v}
        self.space.update({k: v for k, v in self.original.items() if k in self.changed})


def contenders(
    config: Any, modes: list[str], memory: list[str]
) -> dict[str, Callable[[], tuple[torch.nn.Module, Callable[..., Any]]]]:
    """Name to a function that makes (the model, what is called each step)."""

    def eager() -> tuple[Any, Any]:
        model = make(config)
        return model, model

    def compiled(whole: bool, **how: Any) -> tuple[Any, Any]:
        model = make(config)
        if whole:
            return model, torch.compile(model, **how)
        return model, torch.compile(lambda **batch: model(**batch).loss, **how)

    def liger_kernel() -> tuple[Any, Any]:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        model = make(config)
        with changes_kept(model) as changed:
            _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=True)

        def call(**batch: Any) -> Any:
            with changed:
                return model(**batch)

        return model, call

    made: dict[str, Any] = {"eager": eager, "Liger-Kernel": liger_kernel}
    for mode in modes:
        made[f"Inductor, {mode}"] = functools.partial(compiled, mode == "model")
        for kept in memory:
            name = f"liger_compile, {mode}" + (f", {kept}" if kept != Options.memory else "")
            made[name] = functools.partial(compiled, mode == "model", backend="liger", options={"liger.memory": kept})
    return made


def batch(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random tokens. Padded rows end in 0 to a quarter of padding, as a collator's would, without labels there."""
    generator = torch.Generator("cuda").manual_seed(0)
    rows, length = case["rows"], case["length"]
    ids = torch.randint(case["config"].vocab_size, (rows, length), device="cuda", generator=generator)
    if not case.get("padded"):
        return {"input_ids": ids, "labels": ids}
    tokens = length - torch.arange(rows, device="cuda") * length // (4 * max(rows - 1, 1))
    mask = (torch.arange(length, device="cuda") < tokens[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask != 0, ids, -100)}


def run(case: dict[str, Any], modes: list[str], memory: list[str], repeats: int, only: str) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    inputs = batch(case)
    steps: dict[str, Callable[[], Any]] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, build in contenders(case["config"], modes, memory).items():
        if only not in name:
            continue
        base = torch.cuda.memory_allocated()
        model, call = build()

        def step(model: Any = model, call: Any = call) -> float:
            out = call(**inputs)
            loss = out if isinstance(out, torch.Tensor) else out.loss
            loss.backward()
            model.zero_grad(set_to_none=True)
            return loss.detach()

        start = time.perf_counter()
        loss = float(step())
        first = time.perf_counter() - start
        step()
        results[name] = {
            "contender": name,
            "ms": 0.0,
            "peak GiB": common.peak_gib(step, base),
            "first step s": first,
            "loss": loss,
        }
        steps[name] = step
        print(name, results[name], flush=True)
    for name, ms in common.interleaved(steps, repeats).items():
        results[name]["ms"] = ms
    return list(results.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real = [name for name in CASES if not name.startswith("tiny")]
    parser.add_argument("cases", nargs="*", default=real, choices=list(CASES))
    parser.add_argument("--modes", nargs="*", default=["model", "loss"], choices=["model", "loss"])
    parser.add_argument("--memory", nargs="*", default=[Options.memory], choices=CHOICES["memory"])
    parser.add_argument("--only", default="", help="contenders with this in their name")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    for name in arguments.cases:
        case = CASES[name]
        with unmasked() if case.get("unmasked") else contextlib.nullcontext():
            rows = run(case, arguments.modes, arguments.memory, arguments.repeats, arguments.only)
        path = common.save(f"models-{name}", {"title": case["title"], "rows": rows}, arguments.out)
        print(f"\n{case['title']}\n\n{common.table(rows)}\n\n{path}", flush=True)


if __name__ == "__main__":
    main()
