"""Real model families, tiny: everything is rewritten, and losses and gradients are eager's."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from helpers import Accuracy, misses, relative_error, rewritten

pytest.importorskip("transformers")

from models import FAMILIES, SITES, assert_same_step, batch, build, gradients, step

import liger_compile
from bench import coverage

SPELLED_OUT = re.compile(r"rsqrt\(|silu\(|gelu\(|cross_entropy\(|torch\.cat\(\(neg")
each_family = pytest.mark.parametrize("family", FAMILIES)


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_explain_reports_everything_as_rewritten(family, dtype):
    report = liger_compile.explain(build(family, dtype))(**batch())
    assert report.counts == SITES[family], report
    windows = [m for m in report.misses if m.pattern == "attention" and "k - q + 15 >= 0" in m.reason]
    assert misses(report) == windows and len(windows) == 2 - SITES[family].get("attention", 0), report
    assert len(report.graphs) == 1
    assert not SPELLED_OUT.search(report.graphs[0].after.code)
    assert all(m.source and (m.module or m.pattern == "linear_cross_entropy") for m in report.matches)


@each_family
def test_gradients(family):
    model = build(family)
    assert_same_step(model, torch.compile(model, backend=rewritten()), batch())


@each_family
def test_gradients_with_padding(family):
    model, inputs = build(family), batch()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, -5:] = 0
    assert_same_step(model, torch.compile(model, backend=rewritten()), inputs)


@each_family
def test_gradient_checkpointing(family):
    model, reports = build(family), []
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_step(model, torch.compile(model, backend=rewritten(reports)), batch())
    total = {}
    for report in reports:
        for name, count in report.counts.items():
            total[name] = total.get(name, 0) + count
    assert total == SITES[family]


@each_family
def test_bfloat16_autocast(family):
    model, reports, inputs = build(family), [], batch()
    compiled = torch.compile(model, backend=rewritten(reports))
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = step(model, model, inputs)
        our_loss, our_grads = step(model, compiled, inputs)
    exact = build(family, torch.float64).train()
    exact_loss, exact_grads = step(exact, exact, inputs)
    assert reports[0].counts == SITES[family], reports[0]
    accuracy = Accuracy()
    accuracy.add("loss", our_loss, loss, exact_loss)
    for name, grad in grads.items():
        accuracy.add(name, our_grads[name], grad, exact_grads[name])
    accuracy.check(rows=16)


@each_family
def test_batch_and_length_that_change(family):
    model, reports = build(family), []
    compiled = torch.compile(model, backend=rewritten(reports))
    for rows, length in ((2, 32), (3, 40), (4, 24), (5, 17)):
        assert_same_step(model, compiled, batch(rows, length))
    assert len(reports) <= 3  # static, then dynamic
    assert all(r.counts == SITES[family] for r in reports), reports[-1]


@each_family
def test_eval_without_labels(family):
    model, inputs = build(family).eval(), batch()
    del inputs["labels"]
    with torch.no_grad():
        logits = torch.compile(model, backend=rewritten())(**inputs).logits
        torch.testing.assert_close(logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert type(logits) is torch.Tensor


def test_num_items_in_batch():
    model, inputs = build("llama"), batch()
    for items in (37, torch.tensor(37)):
        assert_same_step(model, torch.compile(model, backend=rewritten()), {**inputs, "num_items_in_batch": items})


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_dynamic_from_the_start(family):
    model, reports = build(family), []
    compiled = torch.compile(model, backend=rewritten(reports), dynamic=True)
    assert_same_step(model, compiled, batch(2, 32))
    assert reports[0].counts == SITES[family], reports[0]


def test_a_warning_of_transformers_between_head_and_loss():
    """On which Dynamo breaks the graph; naming the loss keeps it whole."""
    model, reports = coverage.tiny("gpt2"), []
    assert_same_step(model, torch.compile(model, backend=rewritten(reports)), batch())
    assert len(reports) == 2 and "is an input of this graph" in misses(reports[1])[-1].reason, reports[1]
    model.loss_type = "ForCausalLM"
    reports.clear()
    torch._dynamo.reset()
    assert_same_step(model, torch.compile(model, backend=rewritten(reports)), batch())
    assert len(reports) == 1 and reports[0].counts["linear_cross_entropy"] == 1, reports[0]


def test_frozen_backbone_and_frozen_head():
    for trained in ("lm_head", "layers"):
        model = build("llama")
        for name, p in model.named_parameters():
            p.requires_grad_(trained in name)
        assert_same_step(model, torch.compile(model, backend=rewritten()), batch())


@pytest.mark.parametrize("adapted", ["q_proj", "lm_head"])
def test_lora(adapted):
    """An adapter of the head: its logits are a sum of two products, which is left alone and said; it is trained."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=[adapted], init_lora_weights=False)
    model, reports = peft.get_peft_model(build("llama", tie_word_embeddings=False), config), []
    assert_same_step(model, torch.compile(model, backend=rewritten(reports)), batch())
    (report,) = reports
    assert report.counts.get("linear_cross_entropy", 0) == (adapted != "lm_head")
    assert [("linear(...), mul(...)" in m.reason) for m in misses(report)] == [True] * (adapted == "lm_head"), report
    assert "base_model.model.model.layers.0.mlp" in {m.module for m in report.matches}


def test_inductor():
    """Through the real backend, found by its name."""
    for family in ("qwen3", "gemma2"):
        model = build(family)
        assert_same_step(model, torch.compile(model, backend="liger"), batch())


@pytest.mark.gpu
@each_family
def test_bfloat16_on_gpu(family):
    """The error against float64 of every gradient is no more than 1.05 times eager's."""
    model = build(family, torch.bfloat16, "cuda", num_hidden_layers=4, hidden_size=256, intermediate_size=512)
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="liger")
    accuracy = Accuracy()
    for _ in range(4):
        inputs = batch(8, 256, "cuda")
        exact_loss, exact_grads = step(exact, exact, inputs)
        loss, grads = step(model, model, inputs)
        our_loss, our_grads = step(model, compiled, inputs)
        assert abs(our_loss - exact_loss) <= 1.05 * abs(loss - exact_loss) + 1e-3
        for name, grad in grads.items():
            accuracy.add(name, our_grads[name], grad, exact_grads[name])
    accuracy.check(rows=8192)


@pytest.mark.gpu
def test_reduce_overhead():
    model = build("llama", torch.bfloat16, "cuda")
    compiled = torch.compile(model, backend="liger", mode="reduce-overhead")
    for _ in range(5):
        inputs = batch(4, 64, "cuda")
        torch.compiler.cudagraph_mark_step_begin()
        our_loss, our_grads = step(model, compiled, inputs)
        loss, grads = step(model, model, inputs)
        assert relative_error(our_loss, loss) < 1e-2
        for name, grad in grads.items():
            assert relative_error(our_grads[name], grad) < 5e-2, name


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    [
        "from liger_compile import ops; ops.linear_cross_entropy(h, w, None, y)",
        "torch.compile(lambda h: F.cross_entropy(F.linear(h, w).float(), y), backend='liger')(h)",
    ],
    ids=["op", "compiled"],
)
def test_target_out_of_range_on_gpu(call):
    """A label that is no class raises on the device, as in eager. In a process of its own: it ends the context."""
    import subprocess
    import sys

    code = (
        "import torch, torch.nn.functional as F; h = torch.randn(4, 64, device='cuda', requires_grad=True)\n"
        f"w, y = h.detach(), torch.tensor([0, 1, 2, 9], device='cuda')\n{call}\ntorch.cuda.synchronize()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0 and "out of range" in result.stderr + result.stdout


@pytest.mark.gpu
def test_fifty_steps():
    """The loss curve stays within what rounding alone does to it.

    The yardstick is eager against eager: once as it is, once with the same maths in kernels that round differently
    (`F.rms_norm` in place of the model's own norm, "math" attention in place of flash).
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def train(call, model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        generator = torch.Generator("cuda").manual_seed(1)
        losses = []
        for _ in range(50):
            ids = torch.randint(5, 250, (8, 128), device="cuda", generator=generator) // 5 * 5
            loss = call(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return torch.tensor(losses)

    def model():
        return build("llama", torch.bfloat16, "cuda")

    eager = train(first := model(), first)
    with sdpa_kernel(SDPBackend.MATH):
        other = train(second := model(), second)
    third = model()
    ours = train(torch.compile(third, backend="liger"), third)
    spread = (eager - other).abs().max()
    assert (ours - eager).abs().max() <= 2 * spread + 1e-3, (eager, other, ours)
    assert ours[-1] < ours[0]


def test_gradients_helper_sees_every_parameter():
    model = build("llama")
    step(model, model, batch())
    model(**batch()).loss.backward()
    assert len(gradients(model)) == len(list(model.parameters()))
