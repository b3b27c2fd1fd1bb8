"""Cross-entropy of a linear layer's outputs: a language model's head and its loss."""

import torch.nn.functional as F

from liger_compile import ops
from liger_compile.match import Match
from liger_compile.registry import pattern


def check(match: Match) -> str | None:
    if match.captures["reduction"] not in ("mean", "sum"):
        return f"reduction {match.captures['reduction']!r}: each row's loss has a gradient of its own"
    if len(match.shape("hidden")) != 2:
        return "the logits are not rows of classes"
    return None


@pattern(replace=ops.linear_cross_entropy, check=check)
def linear_cross_entropy(hidden, weight, bias, target, ignore_index, reduction):
    logits = F.linear(hidden, weight, bias).float()
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)
