"""Tiny models of real families, and how they are run."""

from __future__ import annotations

from typing import Any

import torch
from helpers import relative_error
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "use_cache": False,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16},
    "phi3": {},
}

SITES = {
    # rewrites in two layers: norms, GLUs, rotations of q and k together, attention without a window, and the loss
    "llama": {"rms_norm": 5, "swiglu": 2, "rope": 2, "attention": 2, "linear_cross_entropy": 1},
    "mistral": {"rms_norm": 5, "swiglu": 2, "rope": 2, "linear_cross_entropy": 1},
    "qwen3": {"rms_norm": 9, "swiglu": 2, "rope": 2, "attention": 2, "linear_cross_entropy": 1},
    "gemma": {"rms_norm": 5, "geglu": 2, "rope": 2, "attention": 2, "linear_cross_entropy": 1},
    "gemma2": {"rms_norm": 9, "geglu": 2, "rope": 2, "attention": 1, "linear_cross_entropy": 1},
    "gemma3_text": {"rms_norm": 13, "geglu": 2, "rope": 2, "linear_cross_entropy": 1},
    "phi3": {"rms_norm": 5, "packed_swiglu": 2, "rope": 2, "attention": 2, "linear_cross_entropy": 1},
}


def build(family: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes: Any) -> torch.nn.Module:
    """A model in train mode, as `from_pretrained(dtype=...)` would make it."""
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family], **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).train()


def batch(rows: int = 2, length: int = 32, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Random tokens, of which the first quarter has no labels."""
    ids = torch.randint(5, 250, (rows, length), device=device)
    labels = ids.clone()
    labels[:, : length // 4] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def step(
    model: torch.nn.Module, call: Any, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of one step, and every parameter's gradient."""
    loss = call(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same_step(
    model: torch.nn.Module, call: Any, inputs: dict[str, torch.Tensor], tolerance: float = 1e-4
) -> None:
    """The loss and every gradient of `call` are those of the model itself, in eager."""
    loss, grads = step(model, model, inputs)
    our_loss, our_grads = step(model, call, inputs)
    assert abs(our_loss - loss) <= tolerance * abs(loss)
    assert our_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert relative_error(our_grads[name], grad) <= tolerance, name
