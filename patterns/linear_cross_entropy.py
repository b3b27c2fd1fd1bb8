"""Cross-entropy of a linear layer's outputs: a language model's head and its loss."""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from liger_compile import ops
from liger_compile.match import Match
from liger_compile.registry import pattern


def check(match: Match) -> str | None:
    if match.captures["reduction"] not in ("mean", "sum"):
        return f"reduction {match.captures['reduction']!r}: each row's loss has a gradient of its own"
    if len(match.shape("hidden")) != 2:
        return "the logits are not rows of classes"
    softcap = match.captures.get("softcap", 1)
    if isinstance(softcap, (int, float)) and softcap <= 0:
        return f"the softcap {softcap} is not positive"
    return None


def examples(make, rows):
    for reduction in ("mean", "sum"):
        for bias in (make(67), None):
            target = make.integers(67, rows)
            if rows > 2:
                target[1] = -100
            yield {
                "hidden": make(rows, 120),
                "weight": make(67, 120) * 0.2,
                "bias": bias,
                "target": target,
                "ignore_index": -100,
                "reduction": reduction,
                "scale": 0.25,
                "divisor": 3.0,
                "softcap": 5.0,
            }


def loss_pattern(**fixed):
    op = partial(ops.linear_cross_entropy, **fixed)
    return pattern(replace=op, check=check, name="linear_cross_entropy", on_demand=True, examples=examples)


def loss(logits, target, ignore_index, reduction):
    return F.cross_entropy(logits.float(), target, ignore_index=ignore_index, reduction=reduction)


def head(hidden, weight, bias, wide):
    """The logits, upcast before what follows them or after it."""
    logits = F.linear(hidden, weight, bias)
    return logits.float() if wide else logits


@loss_pattern()
def plain(hidden, weight, bias, target, ignore_index, reduction):
    return loss(F.linear(hidden, weight, bias), target, ignore_index, reduction)


@loss_pattern()  # Cohere, Falcon-H1
def scaled(hidden, weight, bias, target, ignore_index, reduction, scale, *, wide: Literal[False, True]):
    return loss(head(hidden, weight, bias, wide) * scale, target, ignore_index, reduction)


@loss_pattern()  # Granite
def divided(hidden, weight, bias, target, ignore_index, reduction, divisor, *, wide: Literal[False, True]):
    return loss(head(hidden, weight, bias, wide) / divisor, target, ignore_index, reduction)


@loss_pattern()  # Gemma 2
def softcapped(hidden, weight, bias, target, ignore_index, reduction, softcap, *, wide: Literal[False, True]):
    capped = torch.tanh(head(hidden, weight, bias, wide) / softcap) * softcap
    return loss(capped, target, ignore_index, reduction)
