"""What is found, rewritten and left in every decoder family that transformers knows.

    python -m bench.coverage [families...] [--situations float32 ...] [--out FOLDER]

Each family is made tiny, with random weights, and runs one training step with labels: in eager, and with its Dynamo
graphs rewritten; in float32, and again in other `SITUATIONS`. Sites are counted in the ATen graphs before and after the
rewrite, by what is left of the maths there (`SITES`), with no help from the matcher. The whole sweep also writes
docs/coverage.md. One of float32 alone is kept by the version of transformers, for what is otherwise with another.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import fx

from . import common

TABLE = Path(__file__).parent.parent / "docs" / "coverage.md"
ROWS, LENGTH = 2, 32

# ---- sites --------------------------------------------------------------------------------------------------------

PASSING = {"_to_copy", "clone", "view", "_unsafe_view", "expand", "alias", "unsqueeze", "squeeze", "t", "transpose"}


def op(node: Any) -> str:
    target = getattr(node, "target", None)
    known = isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"
    return target.overloadpacket.__name__ if known else ""


def origin(node: Any) -> Any:
    """The node whose values these are, whatever their dtype and shape."""
    while isinstance(node, fx.Node) and op(node) in PASSING:
        node = node.args[0]
    return node


def is_norm(node: fx.Node) -> bool:
    """1 / sqrt(mean(x^2) + eps), where x is not centred first (that is a LayerNorm)."""
    if op(node) in ("_fused_rms_norm", "rms_norm"):
        return True
    inverse = op(node) == "rsqrt" or (op(node) == "pow" and node.args[1] == -0.5)
    if op(node) in ("reciprocal", "div"):
        inverse = op(origin(node.args[-1])) == "sqrt"
        node = origin(node.args[-1]) if inverse else node
    if not inverse:
        return False
    inner = origin(node.args[0])
    while op(inner) in ("add", "add_", "div", "clamp_min", "clamp"):
        inner = origin(inner.args[0])
    if op(inner) not in ("mean", "sum"):
        return False
    squares = origin(inner.args[0])
    twice = op(squares) == "mul" and origin(squares.args[0]) is origin(squares.args[1])
    if not (twice or (op(squares) == "pow" and squares.args[1] == 2)):
        return False
    centred = origin(squares.args[0])
    return not (op(centred) == "sub" and "mean" in map(op, map(origin, centred.args)))


def is_rotation(node: fx.Node) -> bool:
    """Halves or neighbours put together with one of them negated, or rotated apart; or pairs as complex numbers."""
    if op(node) == "view_as_real":
        product = origin(node.args[0])
        return op(product) == "mul" and "view_as_complex" in map(op, map(origin, product.args))
    if op(node) not in ("cat", "stack"):
        return False
    parts = [origin(p) for p in node.args[0]]
    names = [op(p) for p in parts]
    if names == ["sub", "add"]:
        return all(op(origin(a)) == "mul" for p in parts for a in p.args[:2])
    return len(parts) == 2 and names.count("neg") == 1


def activated(node: Any) -> Any:
    """What an activation is taken of; None if this is no activation."""
    node = origin(node)
    while op(node) in ("clamp", "clamp_max"):
        node = origin(node.args[0])
    if op(node) in ("pow", "mul") and op(origin(node.args[0])) == "relu":  # squared
        x, y = origin(node.args[0]), origin(node.args[1])
        if y == 2 or (op(y) == "relu" and origin(x.args[0]) is origin(y.args[0])):
            node = x
    if op(node) in ("silu", "gelu", "relu"):
        return origin(node.args[0])
    if op(node) == "mul":  # x * sigmoid(alpha * x)
        for x, s in (node.args, node.args[::-1]):
            scaled = origin(origin(s).args[0]) if op(origin(s)) == "sigmoid" else None
            if op(scaled) == "mul" and origin(x) in map(origin, scaled.args):
                return origin(x)
    return None


def is_gated(node: fx.Node) -> bool:
    """An activation of one value times another."""
    if op(node) != "mul" or not all(isinstance(a, fx.Node) for a in node.args):
        return False
    for a, b in (node.args, node.args[::-1]):
        gate = activated(a)
        if gate is not None and gate is not origin(b) and gate is not activated(b):
            return b.meta["val"].shape == a.meta["val"].shape and op(origin(b)) not in ("silu", "gelu", "sigmoid")
    return False


def is_loss(node: fx.Node) -> bool:
    return op(node) == "nll_loss_forward"


def is_masked_attention(node: fx.Node) -> bool:
    return "scaled_dot_product" in op(node) and any(
        isinstance(a, fx.Node) and a.meta["val"].ndim == 4 for a in (*node.args[3:], node.kwargs.get("attn_mask"))
    )


SITES: dict[str, Callable[[fx.Node], bool]] = {
    "norm": is_norm,
    "rope": is_rotation,
    "glu": is_gated,
    "loss": is_loss,
    "mask": is_masked_attention,
}


class Inlined(fx.Interpreter):
    """Runs the bodies of activation checkpoints as a part of the graph."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            body, *operands = args
            return Inlined(body).run(*operands)
        return super().call_function(target, args, kwargs)


def sites(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> collections.Counter[str]:
    """How often each kind of site is in a graph, as PyTorch decomposes it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    places = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and x.ndim]  # others may be sizes and eps

    def run(*tensors: torch.Tensor) -> Any:
        given = dict(enumerate(inputs)) | dict(zip(places, tensors, strict=True))
        return Inlined(gm).run(*given.values())

    # The graph runs: dropout draws numbers that the model is to draw, and what is written in place is a copy.
    with torch.no_grad(), torch.random.fork_rng():
        traced = make_fx(run, _error_on_data_dependent_ops=False)(*(inputs[i].clone() for i in places))
    found: collections.Counter[str] = collections.Counter()
    for node in traced.graph.nodes:
        if node.op == "call_function":
            found.update(kind for kind, is_site in SITES.items() if is_site(node))
    return found


# ---- tiny models --------------------------------------------------------------------------------------------------

SMALL: list[tuple[str, Any]] = [
    (r"vocab_size", 256),
    (r"num_nextn_predict_layers|first_k_dense_replace|num_kv_shared_layers|.*start_index|mtp_num_layers", 0),
    (r"(num_|n_|n)?(hidden_|decoder_|encoder_|de|en)?layers?(_num)?", 2),
    (r"max_position_embeddings|n_positions|max_seq(uence)?_len(gth)?|n_ctx", 128),
    (r".*sliding_window|.*window_size|attention_chunk_size", 16),
    (r"(num_)?experts_per_tok(en)?|.*top_?k(_experts)?|moe_k", 2),
    (r"(num_|n_)shared_experts|n_group|topk_group", 1),
    (r".*num(_local|_routed)?_experts|n_routed_experts|moe_num_experts", 4),
    (r".*(kv_heads|key_value_heads)|n_kv_heads", 2),
    (r".*(num_heads|attention_heads|n_heads?)", 4),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r".*(head_dim|kv_channels|attention_head_size|d_kv)", 16),
    (r"q_lora_rank", 32),
    (r"kv_lora_rank", 16),
    (r"(moe|expert|shared).*(intermediate|ffn).*size", 32),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|n_inner|d_ff)", 128),
    (r"hidden_size|d_model|n_embd|embed_dim|word_embed_proj_dim|dim|embedding_size", 64),
    (
        r"(attention|hidden|embd|resid|attn|activation|classifier)_?(probs_)?(dropout|pdrop)(_prob)?|dropout|.*layerdrop",
        0.0,
    ),
    (r"pad_token_id", 0),
]
"""What a field of a configuration is set to, by its name: the first pattern that fits the whole of it."""


FULL, LINEAR = "full_attention", "linear_attention"
ANGLES = {"rope_type": "default", "rope_theta": 1e4}
BYTES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
"""Each of BLT's parts."""
ALSO: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 300,
        "patch_in_forward": False,
        "patcher_config": BYTES,
        "encoder_config": {**BYTES, "hidden_size_global": 64},
        "decoder_config": {**BYTES, "hidden_size_global": 64},
        "global_config": BYTES,
    },
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": "auto"},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", FULL],
        "rope_parameters": {k: {**ANGLES, "mrope_section": [3, 3, 2]} for k in ("sliding_attention", FULL)},
    },
    "dbrx": {
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "rope_parameters": ANGLES,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_head": 16, "mamba_n_heads": 8, "mamba_d_ssm": 128, "mamba_n_groups": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "layer_types": [LINEAR, "attention"],
        "mamba_d_head": "auto",
        "shared_intermediate_size": 64,
    },
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", FULL]},
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": 4, "qk_head_dim": 24},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "moe"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": (4, 8),
        "axial_pos_embds_dim": (32, 32),
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 2,
        "num_hashes": 1,
        "hash_seed": 0,
        "attention_head_size": 16,
        "feed_forward_size": 128,
    },
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": [LINEAR, "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layer_types": [LINEAR, "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "mamba_headdim": 16,
        "use_mem_rope": True,
    },
    **{f: {"layer_types": [LINEAR, FULL]} for f in ("kimi_linear", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")},
}
"""What else a family's configuration needs so that its sizes fit, or to have a layer of each kind."""


def tiny(family: str, **changes: Any) -> torch.nn.Module:
    """A model of the family's own classes with small sizes, in train mode."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[family]()
    config = type(config)(**{**changed(config), **ALSO.get(family, {}), **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def changed(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        small = next((v for pattern, v in SMALL if re.fullmatch(pattern, name)), None)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if small is not None and (number or (value is None and name in ("head_dim", "num_key_value_heads"))):
            found[name] = min(value, small) if value and value > 0 and name != "pad_token_id" else small
        elif isinstance(value, bool) and name == "use_cache":
            found[name] = False
        elif name.endswith("_token_id") and name != "pad_token_id":
            found[name] = 1
    if "qk_rope_head_dim" in found:  # latent attention: every head has keys of its own, of which a part is rotated
        found["num_key_value_heads"] = found["num_attention_heads"]
        found["head_dim"] = found["qk_rope_head_dim"]
    return found


def families() -> list[str]:
    """Those with a configuration of their own for text; the others are such a one with eyes or ears."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    def is_text(family: str) -> bool:
        try:
            config = CONFIG_MAPPING[family]()
            return config.get_text_config() is config
        except Exception:
            return True

    return [family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if is_text(family)]


# ---- one family ---------------------------------------------------------------------------------------------------


SITUATIONS = ("float32", "checkpointed", "autocast", "dynamic")
"""float32 as it is; with activation checkpoints; under bfloat16 autocast; with sizes that the compiler does not know,
and a larger batch after it."""


@dataclass
class Run:
    """One training step in one situation."""

    found: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    rewritten: dict[str, int] = field(default_factory=dict)
    graphs: int = 0
    reasons: list[str] = field(default_factory=list)
    """Why sites were left, as the report says."""
    loss_error: float | None = None
    gradient_error: float | None = None
    """Against the same graphs not rewritten; under autocast, against eager in float32."""
    plain_error: float | None = None
    """Of the gradients of the graphs not rewritten, against eager in float32."""
    failure: str = ""


@dataclass
class Coverage:
    family: str
    runs: dict[str, Run] = field(default_factory=dict)
    failure: str = ""
    """Why there are no runs."""


def coverage(found: dict[str, Any]) -> Coverage:
    """From JSON."""
    return Coverage(found["family"], {k: Run(**r) for k, r in found.get("runs", {}).items()}, found["failure"])


def cover(family: str, situations: tuple[str, ...] = SITUATIONS) -> Coverage:
    result = Coverage(family)
    try:
        model = tiny(family)
        exact = step(model, model, batch_of(ROWS, LENGTH))
    except Exception as error:
        result.failure = f"does not run in eager: {said(error)}"
        return result
    for situation in situations:
        result.runs[situation] = cover_in(situation, model, exact)
        if result.runs[situation].failure and situation == "float32":
            result.failure = result.runs[situation].failure
            break
    return result


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def batch_of(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 250, (rows, length), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "labels": ids}


def cover_in(situation: str, model: torch.nn.Module, exact: Step) -> Run:
    """A training step of the model in a situation; `exact` is the same one in eager and float32."""
    import liger_compile
    from liger_compile import handed

    result, report = Run(), liger_compile.Report()
    found: collections.Counter[str] = collections.Counter()
    left: collections.Counter[str] = collections.Counter()

    def rewritten(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        one = liger_compile.rewrite(gm)
        report.merge(one)
        after = one.graphs[0].after

        def run(*inputs: Any) -> Any:
            nonlocal found, left
            found += sites(gm, inputs)
            left += sites(after, inputs)
            return after(*inputs)

        return run

    dynamic, autocast = situation == "dynamic", situation == "autocast"
    batches = [batch_of(ROWS, LENGTH), *([batch_of(ROWS + 1, LENGTH + 16)] if dynamic else [])]

    def steps(backend: Callable[..., Any]) -> Iterator[Step]:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, dynamic=True if dynamic else None)
        for batch in batches:
            yield step(model, compiled, batch, autocast)

    try:
        with checkpointed(model) if situation == "checkpointed" else contextlib.nullcontext():
            plain = [*steps(lambda gm, inputs: gm)]
            remaining = steps(functools.partial(handed.compiled, compiler=rewritten))
            ours = [next(remaining)]
            result.found, result.left, result.graphs = dict(found), dict(+left), len(report.graphs)
            ours += remaining
    except Exception as error:
        result.failure = said(error)
        return result
    result.rewritten = report.counts
    result.reasons = sorted({f"{m.pattern}: {m.reason}" for m in report.misses})
    pairs = [errors(a, exact if autocast else b) for a, b in zip(ours, plain, strict=True)]
    result.loss_error, result.gradient_error = (max(each) for each in zip(*pairs, strict=True))
    result.plain_error = errors(plain[0], exact)[1]
    return result


@contextlib.contextmanager
def checkpointed(model: torch.nn.Module) -> Iterator[None]:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


Step = tuple[float, dict[str, torch.Tensor]]
"""A loss, and the gradients of parameters."""


def errors(ours: Step, exact: Step) -> tuple[float, float]:
    """Of the loss, and the largest of a gradient, relative."""
    return abs(ours[0] - exact[0]) / abs(exact[0]), gradient_error(ours[1], exact[1])


def gradient_error(ours: dict[str, torch.Tensor], eager: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a parameter's gradient. Gradients that are nothing but rounding (of a layer that
    does not matter to the loss) have none."""
    largest = max(float(g.norm()) for g in eager.values())
    return max(relative(ours[n], g) for n, g in eager.items() if float(g.norm()) > 1e-6 * largest)


def step(model: torch.nn.Module, call: Any, batch: dict[str, Any], autocast: bool = False) -> Step:
    torch.manual_seed(1)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = call(**batch).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    scale = float(reference.double().norm())
    return float((value.double() - reference.double()).norm()) / scale if scale else float(value.double().norm())


# ---- all of them --------------------------------------------------------------------------------------------------


def totals(runs: list[Run]) -> dict[str, str]:
    found: collections.Counter[str] = collections.Counter()
    left: collections.Counter[str] = collections.Counter()
    for run in runs:
        found.update(run.found)
        left.update(run.left)
    return {kind: f"{found[kind] - left[kind]} / {found[kind]}" for kind in SITES}


def runs_in(situation: str, results: list[Coverage]) -> list[Run]:
    """Those that ran."""
    return [r.runs[situation] for r in results if situation in r.runs and not r.runs[situation].failure]


def cells(run: Run) -> dict[str, str]:
    return {
        k: f"{run.found.get(k, 0) - run.left.get(k, 0)} / {run.found[k]}" if run.found.get(k) else "" for k in SITES
    }


def rows(results: list[Coverage]) -> Iterator[dict[str, Any]]:
    """In float32."""
    for r in results:
        run = r.runs.get("float32", Run())
        measured = {"loss": run.loss_error, "gradients": run.gradient_error}
        yield {
            "family": r.family,
            **cells(run),
            "graphs": run.graphs or "",
            **{f"error of {k}": "" if v is None else f"{v:.0e}" for k, v in measured.items()},
            "": r.failure,
        }


def others(results: list[Coverage]) -> Iterator[dict[str, Any]]:
    """What is otherwise in another situation: sites that are left there alone, failures, errors."""
    for r in results:
        for situation in SITUATIONS[1:]:
            run = r.runs.get(situation)
            if run is None:
                continue
            alone = r.runs["float32"].left if "float32" in r.runs else {}
            more = {k: n for k, n in run.left.items() if n > alone.get(k, 0) and k != "mask"}
            most = 1.05 * (run.plain_error or 0.0) if situation == "autocast" else 1e-4
            wrong = run.gradient_error is not None and run.gradient_error > most
            if more or wrong or run.failure:
                yield {
                    "family": r.family,
                    "situation": situation,
                    **cells(run),
                    "error of gradients": run.gradient_error,
                    "not rewritten": run.plain_error,
                    "": run.failure,
                }


def main() -> None:
    def told(found: dict[str, Any]) -> Any:
        return {situation: run["failure"] or run["left"] for situation, run in found["runs"].items()}

    arguments, found = common.sweep("bench.coverage", __doc__, cover, families, told, situations=SITUATIONS)
    results = [coverage(f) for f in found]
    print(common.table(list(rows(results))))
    if different := list(others(results)):
        print(common.table(different))
    for situation in arguments.situations:
        print(situation, "rewritten / found:", totals(runs_in(situation, results)))
    if arguments.families:
        return
    whole = tuple(arguments.situations) == SITUATIONS
    name = "coverage" if whole else f"coverage-transformers-{version('transformers')}"
    print(common.save(name, [asdict(r) for r in results], arguments.out))
    if arguments.out is None:
        write_page()


PAGE = """# Coverage

`python -m bench.coverage`, {date}, torch {torch}, transformers {transformers}, commit {commit}: every family that
`AutoModelForCausalLM` knows, made tiny, one training step on a CPU. Cells are sites rewritten / found, counted in the
ATen graphs before and after. `mask` is attention with an explicit mask: on a CPU a causal one is taken out, and others
stay, which a GPU would give to FlexAttention. Errors are relative to the same graphs not rewritten, and under autocast
to eager in float32; those of gradients leave out parameters whose gradient is a millionth of the largest, and thus
rounding. A rotation of q and one of k are two sites. Families of images or sound are those of their text model, and not
listed.

{ran} of {known} families ran.

{totals}

## In other situations

With activation checkpoints, under bfloat16 autocast, and with sizes that the compiler does not know, where a larger
batch follows: the families that have sites left there which float32 has not, that do not run
there, or whose gradients differ by more than 1e-4, or under autocast by more than 1.05 times what those of the graphs
not rewritten do. That is the largest of all parameters in a single run, which scatters.

{others}

## With other versions of transformers

`python -m bench.coverage --situations float32` where these are installed, and the families that have sites left, or
fail, where they do not with {transformers}; of those that it does not know, all such:

{versions}

{differences}

## In float32

{table}
"""


def versions(results: list[Coverage]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(totals of each other version that was swept, families that differ)."""
    known = {r.family: r for r in results}
    rows, differences = [], []
    for path in sorted(common.RESULTS.glob("coverage-transformers-*.json")):
        found = json.loads(path.read_text())
        name = found["environment"]["transformers"]
        swept = [coverage(f) for f in found["results"]]
        runs = runs_in("float32", swept)
        rows.append({"transformers": name, "families": f"{len(runs)} of {len(swept)}", **totals(runs)})
        for r in swept:
            run, here = r.runs.get("float32", Run()), known.get(r.family, Coverage(r.family))
            left = here.runs.get("float32", Run()).left
            more = any(n > left.get(k, 0) for k, n in run.left.items() if k != "mask")
            if more or (r.failure and not here.failure):
                differences.append({"family": r.family, "transformers": name, **cells(run), "": r.failure})
    return rows, differences


def write_page() -> None:
    """From the JSON of the sweeps."""
    found = json.loads((common.RESULTS / "coverage.json").read_text())
    TABLE.write_text(page([coverage(f) for f in found["results"]], found["environment"]))


def page(results: list[Coverage], environment: dict[str, Any]) -> str:
    other_versions, differences = versions(results)
    in_all = [{"": s, "families": len(runs_in(s, results)), **totals(runs_in(s, results))} for s in SITUATIONS]
    return PAGE.format(
        **environment,
        ran=sum(not r.failure for r in results),
        known=len(results),
        totals=common.table(in_all),
        others=common.table(list(others(results))),
        versions=common.table(other_versions),
        differences=common.table(differences),
        table=common.table(list(rows(results))),
    )


if __name__ == "__main__":
    main()
