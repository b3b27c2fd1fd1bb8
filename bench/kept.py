"""What a training step keeps for its backward, with our rewrites and under Inductor alone, in the families of decoders
that bench.coverage found something to rewrite in.

    python -m bench.kept [families...] [--out FOLDER]

Each family is made tiny, in bfloat16. Inductor's own front end and partitioner decide what is kept; only code
generation, which has no say in it, is left out, so that this needs no GPU and takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from liger_compile.options import CHOICES

from . import common, coverage

ROWS, LENGTH = 4, 64


def without_code(gm: fx.GraphModule, example_inputs: Any, config: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Inductor up to the graphs it would generate code for."""
    from torch._inductor.compile_fx import compile_fx

    def inner(gm: fx.GraphModule, example_inputs: Any, **_: Any) -> Callable[..., Any]:
        def run(inputs: list[Any]) -> Any:
            return gm(*inputs)

        run._boxed_call = True
        return run

    with torch._functorch.config.patch(enable_autograd_cache=False):
        return compile_fx(gm, example_inputs, inner_compile=inner, config_patches=config or None)


def ours(**options: Any) -> Callable[..., Any]:
    """Our backend, which gives what it rewrote, with ops as they are on a GPU, to `without_code`."""
    from liger_compile.backend import liger
    from liger_compile.ops import _library

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        as_on_gpu = mock.patch.object(_library, "WHOLE_ON", {*_library.WHOLE_ON, "cpu"})
        with mock.patch("liger_compile._torch.compile_fx", without_code), as_on_gpu:
            return liger(gm, example_inputs, options={f"liger.{k}": v for k, v in options.items()})

    return backend


def activations(model: torch.nn.Module, backend: Callable[..., Any], inputs: dict[str, Tensor]) -> tuple[int, int]:
    """Bytes that one forward keeps: (for its backward, and with what the outputs hold on to)."""
    from liger_compile.lazy import LazyTensor

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    compiled(**inputs).loss.backward()
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *inputs.values())}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = compiled(**inputs)
    saved = sum(kept.values())
    for t in out.logits._state.inputs if isinstance(out.logits, LazyTensor) else [out.logits]:
        keep(t)
    return saved, sum(kept.values())


@dataclass
class Kept:
    family: str
    inductor: tuple[int, int] = (0, 0)
    """Bytes, as `activations` has them."""
    ours: tuple[int, int] = (0, 0)
    rewritten: dict[str, int] = field(default_factory=dict)
    failure: str = ""

    @property
    def ratio(self) -> float:
        return self.ours[0] / self.inductor[0]


def check(family: str) -> Kept:
    import liger_compile

    result = Kept(family)
    try:
        model = coverage.tiny(family).to(torch.bfloat16)
        inputs = coverage.batch_of(ROWS, LENGTH)
        result.inductor = activations(model, without_code, inputs)
        result.ours = activations(model, ours(), inputs)
        result.rewritten = liger_compile.explain(model)(**inputs).counts
    except Exception as error:
        result.failure = coverage.said(error)
    return result


BLOCKS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "qwen3": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
"""Llama-3-8B's block and Qwen3-0.6B's."""


def per_layer(family: str) -> dict[str, float]:
    """Bytes for each token of a layer of the real size, by policy: what two layers keep more than one."""
    inputs = coverage.batch_of(ROWS, LENGTH)
    backends = {"Inductor": without_code} | {policy: ours(memory=policy) for policy in CHOICES["memory"]}
    kept = []
    for layers in (1, 2):
        model = coverage.tiny(family, **BLOCKS[family], num_hidden_layers=layers, layer_types=None).to(torch.bfloat16)
        kept.append([activations(model, backend, inputs)[0] for backend in backends.values()])
    return {name: (two - one) / (ROWS * LENGTH) for name, one, two in zip(backends, *kept, strict=True)}


# ---- all of them --------------------------------------------------------------------------------------------------


def families() -> list[str]:
    found = json.loads((common.RESULTS / "coverage.json").read_text())["results"]
    return [f["family"] for f in found if any(f["runs"].get("float32", {}).get("rewritten", {}).values())]


def row(r: Kept) -> dict[str, Any]:
    sizes = {"Inductor KiB": r.inductor[0], "liger_compile KiB": r.ours[0]}
    measured = {name: round(n / 1024) if n else "" for name, n in sizes.items()}
    return {"family": r.family, **measured, "ratio": "" if r.failure else round(r.ratio, 2), "": r.failure}


def main() -> None:
    def told(found: dict[str, Any]) -> Any:
        return round(Kept(**found).ratio, 3)

    arguments, found = common.sweep("bench.kept", __doc__, check, families, told)
    results = [Kept(**f) for f in found]
    ran = sorted((r for r in results if not r.failure), key=lambda r: r.ratio)
    print(common.table([row(r) for r in (*ran, *(r for r in results if r.failure))]))
    totals = {
        "families": len(ran),
        "rewritten": sum(bool(r.rewritten) for r in ran),
        "median ratio": ran[len(ran) // 2].ratio,
        "more than Inductor": [r.family for r in ran if r.ratio > 1],
    }
    print(totals)
    if not arguments.families:
        blocks = {family: per_layer(family) for family in BLOCKS}
        print(blocks)
        everything = {"totals": totals, "per token and layer": blocks, "families": [asdict(r) for r in results]}
        print(common.save("kept", everything, arguments.out))


if __name__ == "__main__":
    main()
