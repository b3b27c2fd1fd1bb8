"""Training steps of many families at the sizes of their own configurations, two layers each: never worse than Inductor?

    python -m bench.families [families...] [--jobs 1] [--out FOLDER]

Eager, Inductor and liger_compile run the same bfloat16 model in turns, with the mask and the logits that a user of
`torch.compile(model)` has. Gradients are compared with those of the same model in float32, all of them as one vector,
and the worst parameter by itself. With more jobs than one timings disturb each other; a first run of that kind fills
the compiler's caches.
"""

from __future__ import annotations

import copy
import functools
import gc
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import common, models
from .coverage import said

Gradients = dict[str, torch.Tensor]

FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "cohere2": {"vocab_size": 128000},
    "deepseek_v2": {
        "first_k_dense_replace": 1,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
    },
    "deepseek_v3": {},
    "ernie4_5": {},
    "exaone4": {},
    "falcon": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "glm": {},
    "glm4": {},
    "glm4_moe": {"n_routed_experts": 16},
    "gpt2": {"n_positions": 2048},
    "gpt_neox": {},
    "gpt_oss": {"num_local_experts": 8},
    "gptj": {},
    "granite": {},
    "granitemoe": {},
    "helium": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "llama4_text": {"num_local_experts": 4},
    "mistral": {},
    "mixtral": {},
    "mpt": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {},
    "opt": {},
    "phi": {},
    "phi3": {},
    "phimoe": {"num_local_experts": 8},
    "qwen2": {},
    "qwen2_moe": {"num_experts": 16},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 16},
    "qwen3_next": {"num_experts": 16},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {},
}
"""What is changed of their configurations, so that they fit: experts, and the largest vocabulary."""
ROWS, LENGTH = 2, 2048


@dataclass
class Contender:
    ms: float = 0.0
    peak_gib: float = 0.0
    first_step_s: float = 0.0
    loss: float = 0.0
    error: float = 0.0
    """Of all gradients, relative to float32's."""


@dataclass
class Family:
    family: str
    parameters: int = 0
    contenders: dict[str, Contender] = field(default_factory=dict)
    worst: tuple[str, float] = ("", 0.0)
    """The parameter whose gradient's error is largest next to Inductor's, and by how much."""
    rewritten: dict[str, int] = field(default_factory=dict)
    failure: str = ""

    def ratio(self, name: str) -> float:
        ours, inductor = self.contenders["liger_compile"], self.contenders["Inductor"]
        return getattr(ours, name) / getattr(inductor, name)


def make(family: str) -> torch.nn.Module:
    """Two layers of the family's default sizes, without dropout, in bfloat16."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[family]()
    changes: dict[str, Any] = {"use_cache": False}
    for name, value in config.to_dict().items():
        if name in ("num_hidden_layers", "n_layer", "n_layers"):
            changes[name] = 2
        elif name == "layer_types" and value:
            changes[name] = [value[0], value[-1]]
        elif re.search("dropout|pdrop", name) and isinstance(value, float):
            changes[name] = 0.0
    config = CONFIG_MAPPING[family](**{**changes, **FAMILIES.get(family, {})})
    return models.make(config)


def batch(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return models.batch({"config": model.config, "rows": ROWS, "length": LENGTH})


def step(model: torch.nn.Module, call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = call(**inputs).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.detach()


def gradients(model: torch.nn.Module, call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Gradients:
    call(**inputs).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def squared(found: Gradients, exact: Gradients) -> dict[str, tuple[float, float]]:
    """Of each parameter: the squares of its gradient's error and of what it should be."""
    return {n: (float((found[n].float() - g).square().sum()), float(g.square().sum())) for n, g in exact.items()}


def check(family: str) -> Family:
    result = Family(family)
    try:
        measure(result)
    except Exception as error:
        result.failure = said(error)
    return result


def measure(result: Family) -> None:
    import liger_compile

    model = make(result.family)
    result.parameters = sum(p.numel() for p in model.parameters())
    inputs = batch(model)
    calls = {
        "eager": model,
        "Inductor": torch.compile(model),
        "liger_compile": torch.compile(model, backend="liger"),
    }
    steps = {name: functools.partial(step, model, call, inputs) for name, call in calls.items()}
    for name, run in steps.items():
        start = time.perf_counter()
        loss = float(run())
        result.contenders[name] = Contender(first_step_s=time.perf_counter() - start, loss=loss)
        run()
    for name, run in steps.items():
        result.contenders[name].peak_gib = common.peak_gib(run, 0)
    for name, ms in common.interleaved(steps, repeats=10).items():
        result.contenders[name].ms = ms
    in_float32 = copy.deepcopy(model).float()
    exact = gradients(in_float32, in_float32, inputs)
    del in_float32
    gc.collect()
    each = {}
    for name, call in calls.items():
        each[name] = squared(gradients(model, call, inputs), exact)
        error, size = (sum(part) for part in zip(*each[name].values(), strict=True))
        result.contenders[name].error = (error / size) ** 0.5
    largest = max(size for _, size in each["eager"].values())
    matter = [n for n, (_, size) in each["eager"].items() if size > 1e-12 * largest]
    worse = {n: (each["liger_compile"][n][0] / max(each["Inductor"][n][0], 1e-30)) ** 0.5 for n in matter}
    name = max(worse, key=worse.__getitem__)
    result.worst = name, worse[name]
    result.rewritten = dict(liger_compile.explain(model)(**inputs).counts)


def row(r: Family) -> dict[str, Any]:
    eager, inductor, ours = (r.contenders[n] for n in ("eager", "Inductor", "liger_compile"))
    return {
        "family": r.family,
        "eager": f"{eager.ms:.1f}, {eager.peak_gib:.1f}",
        "Inductor": f"{inductor.ms:.1f}, {inductor.peak_gib:.1f}",
        "liger_compile": f"{ours.ms:.1f}, {ours.peak_gib:.1f}",
        "time": round(r.ratio("ms"), 2),
        "peak": round(r.ratio("peak_gib"), 2),
        "error": round(r.ratio("error"), 2),
    }


def main() -> None:
    def told(found: dict[str, Any]) -> Any:
        return row(read(found))

    arguments, found = common.sweep("bench.families", __doc__, check, lambda: list(FAMILIES), told)
    results = [read(f) for f in found]
    print(common.table([row(r) for r in results if not r.failure]))
    print({r.family: r.failure for r in results if r.failure})
    print(common.save("families", [asdict(r) for r in results], arguments.out))


def read(found: dict[str, Any]) -> Family:
    contenders = {n: Contender(**c) for n, c in found.get("contenders", {}).items()}
    return Family(**{**found, "contenders": contenders})


if __name__ == "__main__":
    main()
