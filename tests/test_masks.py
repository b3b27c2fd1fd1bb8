"""The sweep over the masks of model families, on some that other tests do not have: all are read right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench import masks, reading

SAYS = {
    "llama4_text": "// 16",
    "exaone4": "k - q + 15",
    "cohere2": "k - q + 15",
    "gemma3n_text": "k - q + 15",
    "afmoe": "k - q + 15",
    "falcon": "q - k",
}
"""Families, and what one of their masks says: chunks, windows, or no more than causal."""


@pytest.mark.parametrize("family", SAYS)
def test_family(family):
    model, result = masks.tiny(family), masks.Masks(family)
    for kind, rows in (("none", 3), ("left", 1), ("packed", 3)):
        found = masks.run(result, model, kind, rows)
        assert [a.outcome for a in found] == ["right"] * model.config.num_hidden_layers, result
        assert any(SAYS[family] in a.says for a in found), found
        assert all(("attention_mask" in a.says) == (kind == "left") for a in found), found
    assert not result.failure and not result.skipped and result.replaced == result.outcomes["right"], result
    assert result.loss_error < 1e-6 and result.gradient_error < 1e-4, result


def outcome(mask, **arguments):
    """Of attention by a function of the tensor x [4, 6]."""
    found: list[reading.Attention] = []

    def function(x):
        q = torch.ones(1, 1, 4, 8)
        k = torch.ones(1, 1, 6, 8)
        return F.scaled_dot_product_attention(q, k, k, mask(x), **arguments)

    torch.compile(function, backend=reading.comparing(found))(torch.rand(4, 6))
    (attention,) = found
    return attention


def below(x):
    return torch.arange(4)[:, None] >= torch.arange(6)


@pytest.mark.parametrize(
    "mask, expected, says",
    [
        (below, "right", "q - k >= 0"),
        (lambda x: torch.where(below(x), 0.0, -torch.inf), "right", "q - k >= 0"),
        (lambda x: torch.arange(6) < torch.full((4, 1), 9), "right", "True"),
        (lambda x: (x * 3).to(torch.uint8) > 0, "unread", "for every query and key"),
        (lambda x: (x[:1] * 3).to(torch.uint8) > 0, "right", " - 1 >= 0"),
        (lambda x: (x[:1] * 3).to(torch.uint8) * 200 > 100, "right", " - 101 >= 0"),
        (lambda x: x > 0.5, "unread", "for every query and key"),
        (lambda x: x.sqrt(), "unread", "sqrt"),
        (lambda x: x, "unread", "made in another graph"),
        (lambda x: None, "none", ""),
    ],
)
def test_outcomes(mask, expected, says):
    found = outcome(mask)
    assert found.outcome == expected and says in found.says, found


def test_causal_without_a_mask():
    assert outcome(lambda x: None, is_causal=True).outcome == "causal"


@pytest.mark.parametrize("name", ["attended", "mask_code"])
def test_what_is_wrong_is_told(monkeypatch, name):
    """Whether the predicate is wrong or the code that is made of it."""
    if name == "attended":
        monkeypatch.setattr(reading, "attended", lambda view, mask: False)
    else:
        monkeypatch.setattr(reading.mask_code, "function", lambda source, n: lambda b, h, q, k: q > k)
    assert outcome(below).outcome == "wrong"
