"""Attention whose mask is index arithmetic, or whose keys and values are repeated for groups of heads.

There is no kernel of ours in this file. A mask that says no more than "causal", or nothing, is left out: PyTorch's own
attention, told so, can run the flash kernels, which skip what is hidden. A mask that says more becomes FlexAttention's,
where that was measured to be faster. Neither mask nor repeated keys are stored.
"""

import math
from functools import partial
from typing import Literal

import torch

from liger_compile import mask_code
from liger_compile._torch import known_true, size_hint
from liger_compile.elements import attended, extent_of, positions
from liger_compile.match import Match
from liger_compile.ops import masked_attention
from liger_compile.predicate import (
    All,
    Bool,
    Index,
    Unread,
    at_least_zero,
    known_at_least,
    linear,
    plus,
    substituted,
)
from liger_compile.registry import pattern
from liger_compile.report import size
from liger_compile.terms import same

attention = torch.ops.aten.scaled_dot_product_attention.default

TILE_BYTES = 16
"""Flash kernels load this much at once, from addresses they take for multiples of it."""
FEWEST, FEWEST_UNKNOWN = 512, 1000
"""Queries and keys from which FlexAttention is taken. bench.attention has it faster from 128 on, a block of scores; a
length that does not fill its last block was not measured, and from 512 on costs a quarter more at most. Where the
compiler does not know the length, that of the first step counts; the kernel is slower, and faster than others from 500
or 1,000 on, by the shape of heads."""


def read(match: Match) -> Bool | str:
    """What the mask lets each query see, or why that is not known."""
    try:
        return attended(match.view, match.captures["attn_mask"])
    except Unread as error:
        return f"the mask cannot be read: {error}"


def _causal(match: Match) -> Bool:
    query, key = positions(match.shape("attn_mask")[-2:], "qk")
    return at_least_zero(plus(query, key, -1))


def check_causal(match: Match) -> str | None:
    seen = read(match)
    if isinstance(seen, str):
        return seen
    if seen != _causal(match):
        return f"attends where {seen!r}, which is more than causal"
    if not same(match.shape("query")[-2], match.shape("key")[-2]):
        return "there are not as many keys as queries"
    return check_kernel(match)


def on_gpu(operand: torch.Tensor) -> bool:
    """Or on the meta device: a model without weights is looked at as if it were to run on a GPU."""
    return operand.is_cuda or operand.is_meta


def check_widths(match: Match) -> str | None:
    """Told of no mask, PyTorch takes cuDNN's kernels where values are wider than queries. Their gradient failed, or
    ended in an illegal access, on an H100 and an H200 (heads of 64 and 128 elements, torch 2.11)."""
    query, value = match.example("query"), match.example("value")
    if query is None or value is None or not on_gpu(query) or known_true(value.shape[-1] <= query.shape[-1]):
        return None
    return f"heads have {query.shape[-1]} elements in queries and {value.shape[-1]} in values"


def check_layout(match: Match) -> str | None:
    if reason := check_widths(match):
        return reason
    for name in ("query", "key", "value"):
        operand = match.example(name)
        if operand is not None and on_gpu(operand) and not aligned(operand):
            return f"{name} is not laid out as flash attention needs it"
    return None


def aligned(operand: torch.Tensor) -> bool:
    """Whether every row begins at a multiple of `TILE_BYTES`, or none is contiguous, which flash kernels refuse."""
    *outer, last = operand.stride()
    if not same(last, 1):
        return True
    step = TILE_BYTES // operand.element_size()
    strides = [s for s, n in zip(outer, operand.shape, strict=False) if not same(n, 1)]
    return all(known_true(s % step == 0) for s in (operand.storage_offset(), *strides))


def check_kernel(match: Match) -> str | None:
    """Where the model itself tells attention of groups of heads, its kernel has to know of them."""
    return check_groups(match) if match.spelling.choice.get("enable_gqa") else check_layout(match)


def check_groups(match: Match) -> str | None:
    """On a GPU only flash attention knows of groups of heads; the other kernels would repeat the keys, or be slow."""
    query = match.example("query")
    if query is None or not on_gpu(query):
        return None
    if query.element_size() != 2 or not _has_flash(query.device):
        return f"flash attention does not take {query.dtype} on this device"
    widths = {match.shape(name)[-1] for name in ("query", "key", "value")}
    if len(widths) > 1 or not all(isinstance(w, int) and w <= 256 for w in widths):
        return f"flash attention does not take heads of {widths} elements"
    return check_layout(match)


def _has_flash(device: torch.device) -> bool:
    if device.type == "meta":
        return True
    known = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return known and torch.backends.cuda.flash_sdp_enabled()


def check_causal_groups(match: Match) -> str | None:
    return check_causal(match) or check_groups(match)


def check_everything(match: Match) -> str | None:
    seen = read(match)
    if isinstance(seen, str):
        return seen
    return check_kernel(match) if seen is True else f"attends where {seen!r}, which is not everywhere"


def check_everything_groups(match: Match) -> str | None:
    return check_everything(match) or check_groups(match)


def check_seen(match: Match) -> str | dict:
    """FlexAttention takes any mask that is a function of positions. It is chosen where its kernels are fast."""
    seen = read(match)
    if isinstance(seen, str):
        return seen
    says = f"attends where {seen!r}"
    try:
        code = mask_code.write(match.view, seen)
    except Unread as error:
        return f"{says}, which FlexAttention cannot take: it {error}"
    reason = _unlike(match, seen) or _unfit(match, seen)
    return f"{says}; {reason}" if reason else {"attn_mask": None, "seen": code.source, "tensors": code.tensors}


def _unlike(match: Match, seen: Bool) -> str | None:
    """Why FlexAttention would compute another result."""
    if match.dtype("attn_mask").is_floating_point and not _sees_itself(match, seen):
        return "rows that see nothing are not zero where a mask is added to the scores"
    return None


def _sees_itself(match: Match, seen: Bool) -> bool:
    """Whether each query is certain to see the key at its own position."""
    queries, keys = match.shape("attn_mask")[-2:]
    (query,) = positions((queries,), "q")
    is_key = known_at_least(plus(plus(extent_of(keys), query, -1), linear(-1)), 0)
    return is_key and substituted(seen, Index("k", extent_of(keys)), query) is True


def _unfit(match: Match, seen: Bool) -> str | None:
    """Why FlexAttention cannot run, or is not known to do well and was not asked for all the same."""
    query = match.example("query")
    if query is None or not on_gpu(query):
        return "FlexAttention trains on CUDA alone"
    if reason := check_widths(match):
        return reason
    if query.element_size() != 2 or not _has_flash(query.device):
        return f"FlexAttention is not fast with {query.dtype} on this device"
    shapes = [match.shape(name) for name in ("query", "key", "value")]
    widths = [shape[-1] for shape in shapes]
    if not all(isinstance(w, int) and 16 <= w <= 256 for w in widths):
        return f"FlexAttention is not fast with heads of {widths} elements"
    if any(len(shape) != 4 for shape in shapes):
        return "FlexAttention takes tensors of four dimensions"
    query_and_key = shapes[:2]
    lengths = [size_hint(shape[-2]) for shape in query_and_key]
    if None in lengths or not all(isinstance(shape[-3], int) for shape in query_and_key):
        return "FlexAttention was not tried with a length that hangs on data, or heads whose number is not known"
    if match.options.select == "always":
        return None
    fewest = FEWEST if all(isinstance(shape[-2], int) for shape in query_and_key) else FEWEST_UNKNOWN
    if min(lengths) < fewest:
        return f"FlexAttention was measured to be faster with many queries and keys; here are fewer than {fewest}"
    if _causal(match) not in (seen.of if isinstance(seen, All) else (seen,)):
        return "FlexAttention was measured to be faster with masks that are causal among others"
    return None


def repeated(query, key, value):
    groups = query.shape[-3] // key.shape[-3]
    return key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)


def examples(make, rows, mask=torch.tril):
    for heads, groups in ((4, 4), (4, 2)):
        yield {
            "query": make(2, heads, rows, 16),
            "key": make(2, groups, rows, 16),
            "value": make(2, groups, rows, 16),
            "attn_mask": mask(torch.ones(rows, rows, dtype=torch.bool, device=make.device)),
            "dropout_p": 0.0,
            "scale": 0.3,
            "is_causal": True,
        }


def examples_unmasked(make, rows):
    return examples(make, rows, mask=torch.clone)


def attention_pattern(check, replace, effect, examples=examples, **fixed):
    return pattern(partial(replace, **fixed), check=check, name="attention", examples=examples, effect=effect)


def spares_half(match: Match) -> str:
    return "half of the scores"


def spares_copies(match: Match) -> str:
    query, key, value = (match.shape(name) for name in ("query", "key", "value"))
    sizes = (*query[:-2], key[-2], key[-1] + value[-1], match.dtype("key").itemsize)
    return f"{size(math.prod(sizes))} of repeated keys and values" if all(isinstance(n, int) for n in sizes) else ""


def spares_mask(match: Match) -> str:
    return "the mask"


def spares_mask_and_copies(match: Match) -> str:
    return ", ".join(filter(None, (spares_mask(match), spares_copies(match))))


def spares_half_and_copies(match: Match) -> str:
    return ", ".join(filter(None, (spares_half(match), spares_copies(match))))


def spares_blocks(match: Match) -> str:
    return "blocks of scores that no query sees"


@attention_pattern(check_causal, attention, spares_half, attn_mask=None, is_causal=True)
def masked(query, key, value, attn_mask: torch.Tensor, dropout_p, scale, *, enable_gqa: Literal[False, True]):
    return attention(query, key, value, attn_mask, dropout_p, scale=scale, enable_gqa=enable_gqa)


@attention_pattern(
    check_causal_groups, attention, spares_half_and_copies, attn_mask=None, is_causal=True, enable_gqa=True
)
def masked_groups(query, key, value, attn_mask: torch.Tensor, dropout_p, scale):
    return attention(query, *repeated(query, key, value), attn_mask, dropout_p, scale=scale)


@attention_pattern(check_everything, attention, spares_mask, examples_unmasked, attn_mask=None)
def unmasked(query, key, value, attn_mask: torch.Tensor, dropout_p, scale, *, enable_gqa: Literal[False, True]):
    return attention(query, key, value, attn_mask, dropout_p, scale=scale, enable_gqa=enable_gqa)


@attention_pattern(
    check_everything_groups, attention, spares_mask_and_copies, examples_unmasked, attn_mask=None, enable_gqa=True
)
def unmasked_groups(query, key, value, attn_mask: torch.Tensor, dropout_p, scale):
    return attention(query, *repeated(query, key, value), attn_mask, dropout_p, scale=scale)


@attention_pattern(check_groups, attention, spares_copies, enable_gqa=True)
def groups(query, key, value, dropout_p, is_causal, scale):
    return attention(query, *repeated(query, key, value), None, dropout_p, is_causal, scale=scale)


@attention_pattern(check_seen, masked_attention, spares_blocks)
def seen(query, key, value, attn_mask: torch.Tensor, scale, *, enable_gqa: Literal[False, True]):
    return attention(query, key, value, attn_mask, 0.0, scale=scale, enable_gqa=enable_gqa)


@attention_pattern(check_seen, masked_attention, spares_blocks)
def seen_groups(query, key, value, attn_mask: torch.Tensor, scale):
    return attention(query, *repeated(query, key, value), attn_mask, 0.0, scale=scale)
