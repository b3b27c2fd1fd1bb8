"""Cross-entropy of a linear layer's outputs: a language model's head and its loss."""

import itertools
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from liger_compile import ops
from liger_compile.graph_terms import value_of
from liger_compile.match import Match
from liger_compile.ops.linear_cross_entropy import BUDGET, SMALL_BYTES, is_hopper
from liger_compile.registry import pattern
from liger_compile.report import size
from liger_compile.rules import leads_to_rows
from liger_compile.terms import Term


def check(match: Match) -> str | dict:
    if len(match.shape("hidden")) != 2:
        return "the logits are not rows of classes"
    softcap = match.captures.get("softcap", 1)
    if isinstance(softcap, (int, float)) and softcap <= 0:
        return f"the softcap {softcap} is not positive"
    hidden, weight = match.captures["hidden"], match.captures["weight"]
    if hidden.op == "scaled" and hidden.dtype is not torch.float32:
        return "the logits are scaled by a tensor: hidden states and their gradient would be rounded for it once more"
    if weight.op == "scaled" and _is_rounded_twice(match):
        return "the logits have a scale for each class: the weight would be rounded for it, and the logits are too"
    if "z_factor" in match.captures and match.captures.get("reduction") == "none":
        return "each row has a loss of its own, to which a number is added"
    for name in ("row_weight", "z_weight"):
        if match.captures.get(name) is not None and match.requires_grad(name):
            return "the weights of rows need a gradient"
    return {"memory": match.options.loss}


def _is_rounded_twice(match: Match) -> bool:
    """Whether logits of what was scaled, and rounded, are rounded too: all but those of the fused kernels."""
    (rows, _), weight = match.shape("hidden"), match.captures["weight"]
    if weight.dtype is torch.float32:
        return False
    device = value_of(next(iter(match.view.sources([weight])))).device
    small = isinstance(rows, int) and rows * weight.shape[0] * weight.dtype.itemsize <= SMALL_BYTES
    return weight.dtype is not torch.bfloat16 or small or not (device.type == "meta" or is_hopper(device))


def is_large(returned: Term) -> bool:
    """Logits and the like are computed on demand, and not what is one number for each row: that is a loss again."""
    return not leads_to_rows(returned)


def effect(match: Match) -> str:
    weight, rows = match.example("weight"), match.shape("hidden")[0]
    if weight is None or not (weight.is_cuda or weight.is_meta) or not isinstance(rows, int):
        return ""
    logits, held = rows * weight.shape[0] * weight.element_size(), BUDGET[match.options.loss]
    return f"all but {size(held)} of {size(logits)} of logits" if logits > held else ""


def examples(make, rows):
    for reduction, bias in itertools.product(("mean", "sum", "none"), (make(67), None)):
        target, row_weight = make.integers(67, rows), make.constant(rows).sign()
        if rows > 2:
            target[1], row_weight[2] = -100, 0
        yield {
            "hidden": make(rows, 120),
            "weight": make(67, 120) * 0.2,
            "bias": bias,
            "target": target,
            "shape": (rows, 1),
            "row_weight": row_weight,
            "factor": 0.5,
            "z_weight": row_weight.flip(0),
            "z_factor": 0.1,
            "ignore_index": -100,
            "reduction": reduction,
            "class_weight": make.constant(67).abs(),
            "label_smoothing": 0.1,
            "scale": 0.25,
            "divisor": 3.0,
            "softcap": 5.0,
        }


WHOLE = (ops.linear_cross_entropy, ops.linear_cross_entropy_sum, ops.linear_cross_entropy_z)
"""What makes a number of all losses, so that it need not hold all logits."""


def loss_pattern(replace=ops.linear_cross_entropy, **how):
    spares = effect if replace in WHOLE else None
    how = {"check": check, "on_demand": is_large, "examples": examples, "effect": spares, **how}
    return pattern(replace, name="linear_cross_entropy", **how)


def loss(logits, target, ignore_index, reduction, smoothing=0.0):
    how = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": smoothing}
    return F.cross_entropy(logits.float(), target, **how)


def head(hidden, weight, bias, wide):
    """The logits, upcast before what follows them or after it."""
    logits = F.linear(hidden, weight, bias)
    return logits.float() if wide else logits


def cap(logits, softcap):
    return torch.tanh(logits / softcap) * softcap


@loss_pattern()
def plain(hidden, weight, bias, target, ignore_index, reduction, label_smoothing):
    return loss(F.linear(hidden, weight, bias), target, ignore_index, reduction, label_smoothing)


@loss_pattern()
def weighted(hidden, weight, bias, target, class_weight: torch.Tensor, ignore_index, reduction):
    logits = F.linear(hidden, weight, bias).float()
    return F.cross_entropy(logits, target, class_weight.float(), ignore_index=ignore_index, reduction=reduction)


Wide = Literal[False, True]


@loss_pattern()  # Cohere, Falcon-H1
def scaled(hidden, weight, bias, target, ignore_index, reduction, label_smoothing, scale, *, wide: Wide):
    return loss(head(hidden, weight, bias, wide) * scale, target, ignore_index, reduction, label_smoothing)


@loss_pattern()  # Granite
def divided(hidden, weight, bias, target, ignore_index, reduction, label_smoothing, divisor, *, wide: Wide):
    return loss(head(hidden, weight, bias, wide) / divisor, target, ignore_index, reduction, label_smoothing)


@loss_pattern()  # Gemma 2
def softcapped(hidden, weight, bias, target, ignore_index, reduction, label_smoothing, softcap, *, wide: Wide):
    capped = cap(head(hidden, weight, bias, wide), softcap)
    return loss(capped, target, ignore_index, reduction, label_smoothing)


@loss_pattern()  # modded-nanogpt, whose sigmoid is written as a tanh
def scaled_and_softcapped(
    hidden, weight, bias, target, ignore_index, reduction, label_smoothing, scale, softcap, *, wide: Wide
):
    capped = cap(head(hidden, weight, bias, wide) * scale, softcap)
    return loss(capped, target, ignore_index, reduction, label_smoothing)


def rows(logits, target, shape, ignore_index, smoothing, negative):
    """The losses of tokens in the shape of the labels, or the log-probabilities of these."""
    losses = loss(logits, target, ignore_index, "none", smoothing).reshape(shape)
    return -losses if negative else losses


rows_pattern = partial(loss_pattern, ops.linear_cross_entropy_rows)


@rows_pattern()
def plain_rows(hidden, weight, bias, target, shape, ignore_index, label_smoothing, *, negative: Wide):
    return rows(F.linear(hidden, weight, bias), target, shape, ignore_index, label_smoothing, negative)


@rows_pattern()
def scaled_rows(
    hidden, weight, bias, target, shape, ignore_index, label_smoothing, scale, *, wide: Wide, negative: Wide
):
    return rows(head(hidden, weight, bias, wide) * scale, target, shape, ignore_index, label_smoothing, negative)


@rows_pattern()  # a temperature
def divided_rows(
    hidden, weight, bias, target, shape, ignore_index, label_smoothing, divisor, *, wide: Wide, negative: Wide
):
    return rows(head(hidden, weight, bias, wide) / divisor, target, shape, ignore_index, label_smoothing, negative)


@rows_pattern()
def softcapped_rows(
    hidden, weight, bias, target, shape, ignore_index, label_smoothing, softcap, *, wide: Wide, negative: Wide
):
    capped = cap(head(hidden, weight, bias, wide), softcap)
    return rows(capped, target, shape, ignore_index, label_smoothing, negative)


def weighted_sum(logits, target, row_weight, factor, ignore_index, smoothing):
    return (loss(logits, target, ignore_index, "none", smoothing) * row_weight).sum() * factor


sum_pattern = partial(loss_pattern, ops.linear_cross_entropy_sum, priority=1)
"""Before the losses of rows, which hold what these do not."""


@sum_pattern()  # a mask of the tokens that count, rewards
def plain_sum(hidden, weight, bias, target, row_weight, factor, ignore_index, label_smoothing):
    return weighted_sum(F.linear(hidden, weight, bias), target, row_weight, factor, ignore_index, label_smoothing)


@sum_pattern()
def scaled_sum(hidden, weight, bias, target, row_weight, factor, ignore_index, label_smoothing, scale, *, wide: Wide):
    logits = head(hidden, weight, bias, wide) * scale
    return weighted_sum(logits, target, row_weight, factor, ignore_index, label_smoothing)


@sum_pattern()
def divided_sum(
    hidden, weight, bias, target, row_weight, factor, ignore_index, label_smoothing, divisor, *, wide: Wide
):
    logits = head(hidden, weight, bias, wide) / divisor
    return weighted_sum(logits, target, row_weight, factor, ignore_index, label_smoothing)


@sum_pattern()
def softcapped_sum(
    hidden, weight, bias, target, row_weight, factor, ignore_index, label_smoothing, softcap, *, wide: Wide
):
    logits = cap(head(hidden, weight, bias, wide), softcap)
    return weighted_sum(logits, target, row_weight, factor, ignore_index, label_smoothing)


def squares(logits, z_weight, z_factor):
    return (torch.logsumexp(logits, -1).square() * z_weight).sum() * z_factor


def plus_squares(logits, target, ignore_index, reduction, z_weight, z_factor):
    return loss(logits, target, ignore_index, reduction) + squares(logits.float(), z_weight, z_factor)


def sum_plus_squares(logits, target, ignore_index, row_weight, factor, z_weight, z_factor):
    return weighted_sum(logits, target, row_weight, factor, ignore_index, 0.0) + squares(
        logits.float(), z_weight, z_factor
    )


def reduced_examples(make, rows):
    return (example for example in examples(make, rows) if example["reduction"] != "none")


z_pattern = partial(loss_pattern, ops.linear_cross_entropy_z, priority=1, examples=reduced_examples)


@z_pattern()  # z-loss, as in PaLM
def plain_z(hidden, weight, bias, target, ignore_index, reduction, z_weight, z_factor):
    return plus_squares(F.linear(hidden, weight, bias), target, ignore_index, reduction, z_weight, z_factor)


@z_pattern()
def scaled_z(hidden, weight, bias, target, ignore_index, reduction, z_weight, z_factor, scale, *, wide: Wide):
    logits = head(hidden, weight, bias, wide) * scale
    return plus_squares(logits, target, ignore_index, reduction, z_weight, z_factor)


@z_pattern()
def softcapped_z(hidden, weight, bias, target, ignore_index, reduction, z_weight, z_factor, softcap, *, wide: Wide):
    logits = cap(head(hidden, weight, bias, wide), softcap)
    return plus_squares(logits, target, ignore_index, reduction, z_weight, z_factor)


@z_pattern()
def plain_sum_z(hidden, weight, bias, target, ignore_index, row_weight, factor, z_weight, z_factor):
    logits = F.linear(hidden, weight, bias)
    return sum_plus_squares(logits, target, ignore_index, row_weight, factor, z_weight, z_factor)


@z_pattern()
def scaled_sum_z(
    hidden, weight, bias, target, ignore_index, row_weight, factor, z_weight, z_factor, scale, *, wide: Wide
):
    logits = head(hidden, weight, bias, wide) * scale
    return sum_plus_squares(logits, target, ignore_index, row_weight, factor, z_weight, z_factor)


@z_pattern()
def softcapped_sum_z(
    hidden, weight, bias, target, ignore_index, row_weight, factor, z_weight, z_factor, softcap, *, wide: Wide
):
    logits = cap(head(hidden, weight, bias, wide), softcap)
    return sum_plus_squares(logits, target, ignore_index, row_weight, factor, z_weight, z_factor)


@loss_pattern(ops.linear_cross_entropy_lse)  # z-loss whose parts are returned too, and what else has a log-sum-exp
def with_lse(hidden, weight, bias, target, ignore_index, reduction):
    logits = F.linear(hidden, weight, bias).float()
    return loss(logits, target, ignore_index, reduction), torch.logsumexp(logits, -1)


@loss_pattern(ops.linear_cross_entropy_lse)
def with_lse_in_shape(hidden, weight, bias, target, shape, ignore_index, reduction):
    logits = F.linear(hidden, weight, bias).float()
    return loss(logits, target, ignore_index, reduction), torch.logsumexp(logits, -1).reshape(shape)
