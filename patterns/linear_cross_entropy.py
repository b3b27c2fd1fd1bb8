"""Cross-entropy of a linear layer's outputs: a language model's head and its loss."""

import inspect
import itertools
from functools import partial, wraps
from typing import Literal

import torch
import torch.nn.functional as F

from liger_compile import ops
from liger_compile.graph_terms import value_of
from liger_compile.match import Match
from liger_compile.ops.linear_cross_entropy import BUDGET, SMALL_BYTES, is_hopper
from liger_compile.registry import register_pattern
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

TRANSFORMS = {
    "plain": (),
    "scaled": ("scale",),  # Cohere, Falcon-H1
    "divided": ("divisor",),  # Granite, a temperature
    "softcapped": ("softcap",),  # Gemma 2
    "scaled_and_softcapped": ("scale", "softcap"),  # modded-nanogpt, whose sigmoid is written as a tanh
    "divided_and_softcapped": ("divisor", "softcap"),
}
"""What is done to logits, by the numbers that it takes."""


def logits_of(hidden, weight, bias, wide=False, scale=None, divisor=None, softcap=None):
    """Upcast before what follows the product, if `wide`; else that is in its dtype."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.float() if wide else logits
    if scale is not None:
        logits = logits * scale
    if divisor is not None:
        logits = logits / divisor
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def loss_of_logits(replace, transforms=tuple(TRANSFORMS), examples=examples, **how):
    """Registers a function of logits and others for each way to make the logits."""
    spares = effect if replace in WHOLE else None
    how = {"check": check, "on_demand": is_large, "examples": examples, "effect": spares, **how}

    def register(function):
        for name in transforms:
            register_pattern(with_logits(function, name), replace, name="linear_cross_entropy", **how)
        return function

    return register


def with_logits(function, transform):
    """A function of logits as one of what they are made of."""
    made_of = ("hidden", "weight", "bias", *TRANSFORMS[transform])
    others = [p for p in inspect.signature(function).parameters.values() if p.name != "logits"]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in made_of]
    parameters = sorted((*parameters, *others), key=lambda p: p.kind)
    if transform != "plain":  # else the loss upcasts the logits in any case
        parameters.append(inspect.Parameter("wide", inspect.Parameter.KEYWORD_ONLY, annotation=Choice))
    signature = inspect.Signature(parameters)

    @wraps(function)
    def spelling(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        logits = logits_of(**{name: given.pop(name) for name in (*made_of, "wide") if name in given})
        return function(logits, **given)

    spelling.__name__ = spelling.__qualname__ = f"{transform}_{function.__name__}"
    spelling.__signature__ = signature
    spelling.__annotations__ = {p.name: p.annotation for p in parameters if p.annotation is not p.empty}
    return spelling


Choice = Literal[False, True]


@loss_of_logits(ops.linear_cross_entropy)
def loss(logits, target, ignore_index, reduction, label_smoothing):
    how = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return F.cross_entropy(logits.float(), target, **how)


@loss_of_logits(ops.linear_cross_entropy, ["plain"])
def weighted(logits, target, class_weight: torch.Tensor, ignore_index, reduction):
    how = {"ignore_index": ignore_index, "reduction": reduction}
    return F.cross_entropy(logits.float(), target, class_weight.float(), **how)


@loss_of_logits(ops.linear_cross_entropy_rows)
def rows(logits, target, shape, ignore_index, label_smoothing, *, negative: Choice):
    """The losses of tokens in the shape of the labels, or the log-probabilities of these."""
    losses = loss(logits, target, ignore_index, "none", label_smoothing).reshape(shape)
    return -losses if negative else losses


# Before the losses of rows, which hold what these do not.
sum_of_logits = partial(loss_of_logits, priority=1)


@sum_of_logits(ops.linear_cross_entropy_sum)  # a mask of the tokens that count, rewards
def weighted_sum(logits, target, row_weight, factor, ignore_index, label_smoothing):
    return (loss(logits, target, ignore_index, "none", label_smoothing) * row_weight).sum() * factor


def reduced_examples(make, rows):
    return (example for example in examples(make, rows) if example["reduction"] != "none")


def squares(logits, z_weight, z_factor):
    return (torch.logsumexp(logits.float(), -1).square() * z_weight).sum() * z_factor


@sum_of_logits(ops.linear_cross_entropy_z, examples=reduced_examples)  # z-loss, as in PaLM
def with_z_loss(logits, target, ignore_index, reduction, z_weight, z_factor):
    return loss(logits, target, ignore_index, reduction, 0.0) + squares(logits, z_weight, z_factor)


@sum_of_logits(ops.linear_cross_entropy_z)
def sum_with_z_loss(logits, target, ignore_index, row_weight, factor, z_weight, z_factor):
    return weighted_sum(logits, target, row_weight, factor, ignore_index, 0.0) + squares(logits, z_weight, z_factor)


# A z-loss whose parts are returned too, and what else has a log-sum-exp.
beside_logsumexp = partial(loss_of_logits, ops.linear_cross_entropy_lse, ["plain"])


@beside_logsumexp()
def with_lse(logits, target, ignore_index, reduction):
    return loss(logits, target, ignore_index, reduction, 0.0), torch.logsumexp(logits.float(), -1)


@beside_logsumexp()
def with_lse_in_shape(logits, target, shape, ignore_index, reduction):
    return loss(logits, target, ignore_index, reduction, 0.0), torch.logsumexp(logits.float(), -1).reshape(shape)
