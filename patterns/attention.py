"""Attention whose mask is index arithmetic, or whose keys and values are repeated for groups of heads.

There is no kernel of ours in this file: the replacement is PyTorch's own attention, told what the mask says. It can
then run the flash kernels, which skip what a causal mask hides, and neither mask nor repeated keys are stored.
"""

from functools import partial

import torch

from liger_compile.elements import attended, positions
from liger_compile.match import Match
from liger_compile.predicate import Unread, at_least_zero, plus
from liger_compile.registry import pattern
from liger_compile.terms import same

attention = torch.ops.aten.scaled_dot_product_attention.default


def check_causal(match: Match) -> str | None:
    mask = match.captures["attn_mask"]
    try:
        found = attended(match.view, mask)
    except Unread as error:
        return f"the mask cannot be read: {error}"
    query, key = positions(mask.shape[-2:], "qk")
    if found != at_least_zero(plus(query, key, -1)):
        return f"attends where {found!r}, which needs an explicit mask"
    if not same(match.shape("query")[-2], match.shape("key")[-2]):
        return "there are not as many keys as queries"
    return None


def check_groups(match: Match) -> str | None:
    """On a GPU only flash attention knows of groups of heads; the other kernels would repeat the keys, or be slow."""
    device = match.device("query")
    if device.type != "cuda":
        return None
    if match.dtype("query").itemsize != 2 or not _has_flash(device):
        return f"flash attention does not take {match.dtype('query')} on this device"
    widths = {match.shape(name)[-1] for name in ("query", "key", "value")}
    if len(widths) > 1 or not all(isinstance(w, int) and w <= 256 for w in widths):
        return f"flash attention does not take heads of {widths} elements"
    return None


def _has_flash(device: torch.device) -> bool:
    known = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return known and torch.backends.cuda.flash_sdp_enabled()


def check_causal_groups(match: Match) -> str | None:
    return check_causal(match) or check_groups(match)


def repeated(query, key, value):
    groups = query.shape[-3] // key.shape[-3]
    return key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)


def examples(make, rows):
    for heads, groups in ((4, 4), (4, 2)):
        yield {
            "query": make(2, heads, rows, 16),
            "key": make(2, groups, rows, 16),
            "value": make(2, groups, rows, 16),
            "attn_mask": torch.ones(rows, rows, dtype=torch.bool, device=make.device).tril(),
            "dropout_p": 0.0,
            "scale": 0.3,
            "is_causal": True,
        }


def attention_pattern(check, **fixed):
    return pattern(replace=partial(attention, **fixed), check=check, name="attention", examples=examples)


@attention_pattern(check_causal, attn_mask=None, is_causal=True)
def masked(query, key, value, attn_mask: torch.Tensor, dropout_p, scale):
    return attention(query, key, value, attn_mask, dropout_p, scale=scale)


@attention_pattern(check_causal_groups, attn_mask=None, is_causal=True, enable_gqa=True)
def masked_groups(query, key, value, attn_mask: torch.Tensor, dropout_p, scale):
    return attention(query, *repeated(query, key, value), attn_mask, dropout_p, scale=scale)


@attention_pattern(check_groups, enable_gqa=True)
def groups(query, key, value, dropout_p, is_causal, scale):
    return attention(query, *repeated(query, key, value), None, dropout_p, is_causal, scale=scale)
