"""Masks read back from the graph: what only says "causal" is dropped, anything else is left alone; shared keys."""

from __future__ import annotations

import copy
import importlib
import operator

import pytest
import torch
import torch.nn.functional as F
from helpers import Accuracy, relative_error, report_of, rewritten
from liger_compile.patterns.attention import aligned
from models import FAMILIES, batch, build, step
from torch import nn
from torch.utils.checkpoint import checkpoint

import liger_compile
from bench.reading import Attention, comparing
from liger_compile import Options
from liger_compile.graph_terms import inputs_of

T = 24
LOWEST = torch.finfo(torch.float32).min


def heads(groups=4, length=T, width=16, dtype=torch.float32, device="cpu"):
    """Leaves q [2, 4, T, width], k and v [2, groups, length, width]."""
    shapes = (2, 4, T, width), (2, groups, length, width), (2, groups, length, width)
    return [torch.randn(s, dtype=dtype, device=device).requires_grad_() for s in shapes]


def attend(mask, dropout=0.0):
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q.shape[-2]), dropout_p=dropout)

    return function


# ---- what says "causal" -------------------------------------------------------------------------------------------


def tril_of_ones(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


def tril_made_bool(n):
    return torch.tril(torch.ones(n, n)).bool()


def tril_compared(n):
    return torch.ones(n, n).tril(diagonal=0) == 1


def not_triu(n):
    return ~torch.triu(torch.ones(n, n, dtype=torch.bool), diagonal=1)


def rows_against_columns(n):
    i = torch.arange(n)
    return i[:, None] >= i[None, :]


def columns_against_rows(n):
    return torch.arange(n).unsqueeze(0) <= torch.arange(n).unsqueeze(1)


def strictly_below_the_next(n):
    return torch.arange(n).view(1, n) < torch.arange(1, n + 1).view(n, 1)


def difference(n):
    i = torch.arange(n)
    return (i.view(-1, 1) - i).ge(0)


def not_greater(n):
    i = torch.arange(n)
    return torch.logical_not(i[None] > i[:, None])


def transposed(n):
    i = torch.arange(n)
    return (i[:, None] <= i[None, :]).transpose(0, 1)


def expanded(n):
    i = torch.arange(n)
    return (i[:, None] >= i).reshape(1, 1, n, n).expand(2, -1, n, n)


def cut_from_a_larger_one(n):
    return torch.ones(64, 64, dtype=torch.bool).tril().view(1, 1, 64, 64)[:, :, :n, :n]


def additive_triu(n):
    return torch.full((n, n), float("-inf")).triu(diagonal=1)


def additive_where(n):
    i = torch.arange(n)
    return torch.where(i[:, None] >= i, 0.0, LOWEST)


def additive_fill(n):
    hidden = torch.arange(n) > torch.arange(n)[:, None]
    return torch.zeros(n, n).masked_fill(hidden, float("-inf"))


def additive_product(n):
    return (1.0 - torch.ones(n, n).tril()) * LOWEST


def counted_by_cumsum(n):
    i = torch.ones(n, dtype=torch.int64).cumsum(0) - 1
    return i[:, None] >= i


def repeated_rows(n):
    i = torch.arange(n)
    return i[:, None].repeat(1, n) >= i[None].repeat(2 * n, 1)[n:]


def one_document(n):
    """How transformers finds packed documents in position ids; here there is one."""
    ids = torch.arange(n)[None].expand(2, -1)
    document = (torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    b = torch.arange(2)[:, None, None, None]
    i = torch.arange(n)
    same = document[b, i[None, None, :, None]] == document[b, i[None, None, None, :]]
    return same & (i[:, None] >= i)


def window_as_long_as_the_sequence(n):
    i = torch.arange(n)
    return (i[:, None] >= i) & (i[:, None] - i < n)


def one_chunk(n):
    i = torch.arange(n)
    return (i[:, None] >= i) & (i[:, None] // 64 == i // 64)


def every_pair(function, *extents):
    """`function` of every (batch, head, query, key), as transformers 4.53 to 4.57 make masks."""
    for dim in reversed(range(4)):
        function = torch.vmap(function, in_dims=tuple(0 if d == dim else None for d in range(4)))
    return function(*map(torch.arange, extents))


def mapped(n):
    return every_pair(lambda b, h, q, k: q.new_ones((), dtype=torch.bool) & (k <= q), 2, 1, n, n)


def one_document_mapped(n):
    ids = torch.arange(n)[None].expand(2, -1)
    document = (torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)

    def seen(b, h, q, k):
        same = torch.ops.aten.index(document, [b, q]) == torch.ops.aten.index(document, [b, k])
        return (k <= q) & same

    return every_pair(seen, 2, 1, n, n)


def made_in_place(n):
    """As transformers did before."""
    mask = torch.full((n, n), LOWEST).triu(diagonal=1)
    mask *= torch.arange(n) > torch.arange(n).reshape(-1, 1)
    return mask[None, None, :, :].expand(2, 1, -1, -1)


def written_to(n):
    mask = torch.zeros(n, n, dtype=torch.bool)
    mask[:] = True
    mask &= torch.arange(n) <= torch.arange(n)[:, None]
    return mask


def filled_where_it_is_one(n):
    """As PyTorch's tutorial did, and those who learned from it."""
    mask = torch.triu(torch.ones(n, n), diagonal=1)
    return mask.masked_fill(mask == 1, float("-inf"))


def filled_in_place_where_it_is_one(n):
    mask = torch.triu(torch.ones(n, n), diagonal=1)
    mask.masked_fill_(mask == 1, LOWEST)
    return mask.view(1, 1, n, n)


def filled_twice(n):
    mask = (torch.triu(torch.ones(n, n)) == 1).transpose(0, 1)
    return mask.float().masked_fill(mask == 0, float("-inf")).masked_fill(mask == 1, 0.0)


def logarithm(n):
    return torch.log(torch.tril(torch.ones(n, n)))


def behind_no_cache(n):
    return torch.hstack([torch.zeros(n, 0), torch.full((n, n), float("-inf")).triu_(1)])


def assigned(n):
    i = torch.arange(n)
    mask = torch.ones(n, n)
    mask[i[:, None] < i] = float("-inf")
    mask[i[:, None] >= i] = 0.0
    return mask


def one_chunk_by_distance(n):
    i = torch.arange(n)
    return (torch.abs(i // 64 - i[:, None] // 64) == 0) & (i <= i[:, None])


def unsqueezed_in_place(n):
    return ~(torch.ones(n, n).tril_().unsqueeze_(0) < 0.5)


def looked_up(n):
    return torch.ones(64, 64, dtype=torch.bool).tril()[None, None, torch.arange(n)][..., :n]


CAUSAL = [
    filled_where_it_is_one, filled_in_place_where_it_is_one, filled_twice, logarithm, behind_no_cache, assigned,
    one_chunk_by_distance, unsqueezed_in_place, looked_up,
    tril_of_ones, tril_made_bool, tril_compared, not_triu, rows_against_columns, columns_against_rows,
    strictly_below_the_next, difference, not_greater, transposed, expanded, cut_from_a_larger_one, additive_triu,
    additive_where, additive_fill, additive_product, counted_by_cumsum, repeated_rows, one_document,
    window_as_long_as_the_sequence, one_chunk, mapped, one_document_mapped, made_in_place, written_to,
]  # fmt: skip


def ones(n):
    return torch.ones(n, n, dtype=torch.bool)


def additive_zeros(n):
    return torch.zeros(1, 1, n, n)


def additive_of_no_padding(n):
    """How encoders extend the mask they make when they are given none."""
    return (1.0 - torch.ones(2, n)[:, None, None, :]) * LOWEST


def before_or_after(n):
    i = torch.arange(n)
    return (i[:, None] >= i) | (i[:, None] < i)


EVERYTHING = [ones, additive_zeros, additive_of_no_padding, before_or_after]


@pytest.mark.parametrize("mask", CAUSAL + EVERYTHING, ids=lambda f: f.__name__)
def test_causal_or_no_mask(mask):
    inputs = heads()
    report = report_of(attend(mask), *inputs)
    assert report.counts == {"attention": 1}, report
    (result,) = next(iter(report.graphs[0].after.graph.find_nodes(op="output"))).args[0]
    needed = [result, *inputs_of(result, stop=lambda n: n.op == "placeholder")]
    assert len(needed) == 1, "the mask is still needed"
    assert result.kwargs.get("is_causal", False) == (mask in CAUSAL)
    assert_same(attend(mask), inputs)


def assert_same(function, inputs, tolerance=1e-6):
    """Result and gradients under the rewrite are eager's."""
    ours = torch.compile(function, backend=rewritten())(*inputs)
    eager = function(*inputs)
    gradient = torch.randn_like(eager)
    assert relative_error(ours, eager) <= tolerance
    found, expected = (torch.autograd.grad(r, inputs, gradient) for r in (ours, eager))
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) <= tolerance


# ---- what says something else -------------------------------------------------------------------------------------


def all_but_one(n):
    i = torch.arange(n)
    return (i != n - 1)[None].expand(n, n)


def beside_the_diagonal(n):
    i = torch.arange(n)
    return (i[:, None] >= i + 1) | (i == 0)


def one_step_ahead(n):
    return torch.ones(n, n, dtype=torch.bool).tril(1)


def the_other_way(n):
    i = torch.arange(n)
    return i[:, None] <= i


def window_one_too_short(n):
    i = torch.arange(n)
    return (i[:, None] >= i) & (i[:, None] - i < n - 1)


def two_chunks(n):
    i = torch.arange(n)
    return (i[:, None] >= i) & (i[:, None] // 16 == i // 16)


def prefix(n):
    i = torch.arange(n)
    return (i[:, None] >= i) | (i < 4)


def strided_positions(n):
    i = torch.arange(0, 2 * n, 2)
    return i[:, None] >= torch.arange(n)


def not_so_low(n):
    return torch.full((n, n), -100.0).triu(1)


def raised(n):
    return torch.full((n, n), float("-inf")).triu(1) + 1.0


def other_diagonal_for_odd_rows(n):
    i = torch.arange(n)
    return i[:, None] - i[:, None] % 2 >= i - i % 2


def repeated_along(n):
    i = torch.arange(n // 2)[None].repeat(1, 2)  # 0, 1, .., 0, 1, .., and not 0, 0, 1, 1, ..
    return torch.arange(n)[:, None] >= i


def rounded_positions(n):
    i = torch.arange(n).to(torch.bfloat16)
    return i[:, None] >= i


def changed_in_place(n):
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    mask[3] = True
    return mask


def mapped_one_step_ahead(n):
    return every_pair(lambda b, h, q, k: k <= q + 1, 2, 1, n, n)


def mapped_by_batch(n):
    return every_pair(lambda b, h, q, k: k <= q + b, 2, 1, n, n)


def mapped_the_other_way(n):
    return every_pair(lambda b, h, k, q: k <= q, 2, 1, n, n)


def filled_where_it_is_two(n):
    mask = torch.triu(torch.ones(n, n), diagonal=1)
    return mask.masked_fill(mask == 2, float("-inf"))


def filled_elsewhere(n):
    return torch.triu(torch.ones(n, n), diagonal=1).masked_fill(torch.ones(n, n).triu(2) == 1, float("-inf"))


def filled_the_other_way(n):
    mask = torch.triu(torch.ones(n, n), diagonal=1)
    return mask.masked_fill(mask == 0, float("-inf"))


def logarithm_of_two(n):
    return torch.log(torch.tril(torch.ones(n, n)) * 2)


def behind_a_cache(n):
    return torch.hstack([torch.zeros(n, 2), torch.full((n, n), float("-inf")).triu(1)])[:, :n]


def assigned_one_step_ahead(n):
    mask = torch.zeros(n, n)
    mask[torch.ones(n, n, dtype=torch.bool).triu(2)] = float("-inf")
    return mask


def assigned_rows(n):
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    mask[[0, 2]] = True
    return mask


def transposed_in_place(n):
    return torch.ones(n, n, dtype=torch.bool).tril_().t_()


def next_chunk(n):
    i = torch.arange(n)
    return ((i[:, None] // 16 - i // 16).abs() == 1) & (i[:, None] >= 0)


def two_chunks_by_distance(n):
    i = torch.arange(n)
    return ((i[:, None] // 16 - i // 16).abs() == 0) & (i[:, None] >= i)


def near_either_side(n):
    i = torch.arange(n)
    return (i[:, None] - i).abs() <= 3


NOT_CAUSAL = [
    filled_where_it_is_two, filled_elsewhere, filled_the_other_way, logarithm_of_two, behind_a_cache,
    assigned_one_step_ahead, assigned_rows, transposed_in_place, next_chunk, two_chunks_by_distance, near_either_side,
    mapped_one_step_ahead, mapped_by_batch, mapped_the_other_way,
    all_but_one, beside_the_diagonal, one_step_ahead, the_other_way, window_one_too_short, two_chunks, prefix,
    strided_positions, repeated_along, not_so_low, raised, other_diagonal_for_odd_rows, rounded_positions,
    changed_in_place,
]  # fmt: skip


@pytest.mark.parametrize("mask", NOT_CAUSAL, ids=lambda f: f.__name__)
def test_not_causal(mask):
    report = report_of(attend(mask), *heads())
    assert not report.counts
    assert [m.pattern for m in report.misses] == ["attention"], report
    assert any(words in report.misses[0].reason for words in ("attends where", "cannot be read", "setitem")), report


BY_EXPRESSION = set(NOT_CAUSAL) - {
    *(not_so_low, raised, rounded_positions, filled_where_it_is_two, filled_elsewhere, filled_the_other_way),
    *(logarithm_of_two, assigned_rows),
}


@pytest.mark.parametrize("mask", NOT_CAUSAL, ids=lambda f: f.__name__)
def test_flex_attention_takes_what_is_read(everywhere, mask):
    report = report_of(attend(mask), *heads())
    assert report.counts == ({"attention": 1} if mask in BY_EXPRESSION else {}), report
    assert_same(attend(mask), heads())


def test_data_is_given_to_flex_attention(everywhere):
    def function(q, k, v, padding):
        i = torch.arange(q.shape[-2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(i[:, None] >= i) & padding[:, None, None, :].bool())

    padding = torch.ones(2, T, dtype=torch.int64)
    padding[0, 17:] = padding[1] = 0
    report = report_of(function, *heads(), padding)
    (call,) = [n for n in report.graphs[0].after.graph.nodes if n.op not in ("placeholder", "output")]
    assert call.kwargs["seen"] == "(x0[b, k] != 0) & (q - k >= 0)"
    assert_same(lambda *qkv: function(*qkv, padding), heads())


def window(q, padding):
    i = torch.arange(q.shape[-2], device=q.device)
    return (i[:, None] >= i) & (i[:, None] - i < 9)


def window_in_documents(q, padding):
    document = (torch.arange(q.shape[-2], device=q.device) * 3 // 20 + padding).cumsum(-1)
    return window(q, padding) & (document[:, None, :, None] == document[:, None, None, :])


def window_and_padding(q, padding):
    return window(q, padding) & (padding != 0)[:, None, None, :]


def not_itself(q, padding):
    i = torch.arange(q.shape[-2], device=q.device)
    return (i[:, None] > i) & (i[:, None] - i < 9)


def keys_behind(q, padding):
    i = torch.arange(q.shape[-2], device=q.device)
    return i[:, None] + 8 >= i[8:]


def added(seen):
    """The function whose mask says the same, added to the scores."""

    def function(q, k, v, padding):
        mask = seen(q, padding)
        mask = torch.where(mask, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
        n = mask.shape[-1]
        return F.scaled_dot_product_attention(q, k[..., :n, :], v[..., :n, :], attn_mask=mask)

    return function


@pytest.mark.parametrize("seen", [window, window_in_documents], ids=lambda f: f.__name__)
def test_flex_attention_takes_masks_added_to_scores(everywhere, seen):
    """Where each query sees itself, whatever stands for minus infinity."""
    padding = torch.ones(2, T, dtype=torch.int64)
    assert report_of(added(seen), *heads(), padding).counts == {"attention": 1}
    assert_same(lambda *qkv: added(seen)(*qkv, padding), heads())


@pytest.mark.parametrize("seen", [window_and_padding, not_itself, keys_behind], ids=lambda f: f.__name__)
def test_masks_added_to_scores_of_rows_that_may_see_nothing(everywhere, seen):
    """Softmax then is of scores that all are low: the mean over hidden keys, and not zero."""
    report = report_of(added(seen), *heads(), torch.ones(2, T, dtype=torch.int64))
    assert not report.counts and "rows that see nothing" in report.misses[0].reason, report


def test_data_changed_in_place_after_the_mask(everywhere):
    def function(q, k, v, padding):
        i = torch.arange(q.shape[-2])
        mask = (i[:, None] >= i) & (padding[:, None, None, :] != 0)
        padding.zero_()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    report = report_of(function, *heads(), torch.ones(2, T, dtype=torch.int64))
    assert not report.counts and "changed in place" in report.misses[0].reason, report


def test_keys_written_in_place():
    """As latent attention does: a tensor for both parts of the keys, each copied into its place."""

    def function(q, k, v):
        k = F.rms_norm(k, (16,))
        keys = k.new_empty(k.shape)
        keys[..., :8], keys[..., 8:] = k[..., 8:], k[..., :8]
        return F.scaled_dot_product_attention(q, keys, v, attn_mask=tril_of_ones(q.shape[-2]))

    assert report_of(function, *heads()).counts == {"attention": 1, "rms_norm": 1}
    assert_same(function, heads())


def test_no_flex_attention_on_this_device():
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=two_chunks(q.shape[-2]))

    (miss,) = report_of(function, *heads()).misses
    assert "(k) // 16" in miss.reason and "CUDA alone" in miss.reason


def bidirectional(q, k, v, padding):
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=(padding != 0)[:, None, None, :].expand(-1, 1, q.shape[2], -1)
    )


def causal_alone(q, k, v, padding, **how):
    i = torch.arange(q.shape[2], device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=i[:, None] >= i, **how)


def causal_and_padded(q, k, v, padding, **how):
    i = torch.arange(q.shape[2], device=q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=(i[:, None] >= i) & (padding != 0)[:, None, None, :], **how
    )


@pytest.mark.parametrize(
    "function, length, dtype, width, reason",
    [
        (causal_and_padded, 1024, torch.bfloat16, 64, None),
        (added(window), 1024, torch.bfloat16, 64, None),
        (added(window_and_padding), 1024, torch.bfloat16, 64, "rows that see nothing"),
        (causal_and_padded, 512, torch.bfloat16, 64, None),
        (causal_and_padded, 511, torch.bfloat16, 64, "fewer than 512"),
        (bidirectional, 1024, torch.bfloat16, 64, "causal among others"),
        (causal_and_padded, 1024, torch.float32, 64, "not fast with torch.float32"),
        (causal_and_padded, 1024, torch.bfloat16, 512, "heads of [512, 512, 512]"),
    ],
)
def test_when_flex_attention_is_taken(function, length, dtype, width, reason):
    """As on a GPU; see `on_gpu`."""
    inputs = heads(length=length, dtype=dtype, width=width, device="meta")
    inputs[0] = torch.empty(2, 4, length, width, dtype=dtype, device="meta")
    report = report_of(function, *inputs, torch.ones(2, length, dtype=torch.int64, device="meta"))
    if reason is None:
        assert report.counts == {"attention": 1}, report
    else:
        assert not report.counts and reason in report.misses[0].reason, report


@pytest.mark.parametrize("function", [causal_alone, causal_and_padded])
def test_values_wider_than_queries_on_a_gpu(function):
    """As in DiffLlama. cuDNN's gradient of these fails; narrower ones, as in DeepSeek's, are fine."""
    for width, value_width in ((64, 128), (128, 64)):
        q, k, v = (torch.empty(2, 4, 1024, w, dtype=torch.bfloat16, device="meta") for w in (width, width, value_width))
        report = report_of(function, q, k, v, torch.ones(2, 1024, dtype=torch.int64, device="meta"))
        if width < value_width:
            reasons = [m.reason for m in report.misses]
            assert not report.counts and any("64 elements in queries and 128 in values" in r for r in reasons), report
        else:
            assert report.counts == {"attention": 1}, report


@pytest.mark.parametrize("function", [causal_alone, causal_and_padded])
def test_groups_that_the_model_names_on_a_gpu(function):
    """Flash attention knows of them, and so does FlexAttention."""
    q, *kv = (torch.empty(2, n, 1024, 64, dtype=torch.bfloat16, device="meta") for n in (4, 2, 2))
    padding = torch.ones(2, 1024, dtype=torch.int64, device="meta")
    report = report_of(lambda *operands: function(*operands, enable_gqa=True), q, *kv, padding)
    assert report.counts == {"attention": 1}, report
    assert ("masked_attention" in report.graphs[0].after.code) == (function is causal_and_padded)


@pytest.mark.parametrize("function, length", [(causal_and_padded, 100), (bidirectional, 1024)])
def test_flex_attention_on_request(function, length):
    q, k, v = (torch.empty(2, 4, length, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))
    padding = torch.ones(2, length, dtype=torch.int64, device="meta")
    assert not report_of(function, q, k, v, padding).counts
    assert report_of(function, q, k, v, padding, options=Options(select="always")).counts == {"attention": 1}


@pytest.mark.parametrize("length", [900, 1024])
def test_flex_attention_of_a_length_that_is_not_known(length):
    """It is taken by the length of the first step."""
    q, k, v = (torch.empty(2, 4, length, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))
    padding = torch.ones(2, length, dtype=torch.int64, device="meta")
    for x, dim in ((q, 2), (k, 2), (v, 2), (padding, 1)):
        torch._dynamo.mark_dynamic(x, dim)
    report = report_of(causal_and_padded, q, k, v, padding)
    assert report.counts == ({"attention": 1} if length == 1024 else {}), report
    assert length == 1024 or "fewer than 1000" in report.misses[0].reason, report


def test_no_flex_attention_with_an_unknown_number_of_heads():
    q, k, v = (torch.empty(2, 4, 1024, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))
    padding = torch.ones(2, 1024, dtype=torch.int64, device="meta")
    for x in (q, k, v):
        torch._dynamo.mark_dynamic(x, 1)
    report = report_of(causal_and_padded, q, k, v, padding)
    assert not report.counts and "heads whose number is not known" in report.misses[0].reason, report


def test_flex_attention_of_another_length(everywhere, monkeypatch):
    """Run by FlexAttention's reference, one graph serves all lengths over a block."""
    op_file = importlib.import_module("liger_compile.ops.masked_attention")
    monkeypatch.setattr(op_file, "_has_kernel", lambda query: True)
    reports = []
    compiled = torch.compile(causal_and_padded, backend=rewritten(reports, "aot_eager"))
    for rows, length in ((3, 256), (2, 333), (4, 1000), (5, 130)):
        inputs = [torch.randn(rows, 4, length, 16) for _ in range(3)]
        padding = (torch.arange(length) < length - 40 * torch.arange(rows)[:, None]).long()
        for x, dims in (*((x, (0, 2)) for x in inputs), (padding, (0, 1))):
            torch._dynamo.mark_dynamic(x, dims)
        ours = compiled(*[x.requires_grad_() for x in inputs], padding)
        theirs = causal_and_padded(*inputs, padding)
        assert relative_error(ours, theirs) < 1e-6
        incoming = torch.randn_like(theirs)
        for a, b in zip(*(torch.autograd.grad(out, inputs, incoming) for out in (ours, theirs)), strict=True):
            assert relative_error(a, b) < 2e-6
    assert len(reports) == 1 and reports[0].counts == {"attention": 1}


def test_flash_attention_needs_aligned_rows():
    x = torch.empty(2, 40, 4, 24, dtype=torch.bfloat16)
    assert aligned(x) and aligned(x.transpose(1, 2)) and aligned(x[..., 8:16]) and aligned(x.transpose(-1, -2))
    assert not aligned(x[..., 4:20]) and not aligned(torch.empty(2, 4, 40, 20, dtype=torch.bfloat16))
    assert aligned(torch.empty(2, 4, 40, 20)) and aligned(torch.empty(2, 4, 1, 8, dtype=torch.bfloat16))


def test_more_keys_than_queries():
    def function(q, k, v):
        i, j = torch.arange(q.shape[-2]), torch.arange(k.shape[-2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=i[:, None] >= j)

    (miss,) = report_of(function, *heads(length=T + 8)).misses
    assert "attends where q - k >= 0; FlexAttention" in miss.reason


def test_dropout():
    """Other random numbers, the same distribution: without a mask the mean over many draws is what it was with it."""
    q, k, v = (t.detach() for t in heads())
    compiled = torch.compile(attend(tril_of_ones, dropout=0.5), backend=rewritten(reports := []))
    draws = torch.stack([compiled(q, k, v) for _ in range(600)])
    assert reports[0].counts == {"attention": 1} and draws.std(0)[:, :, 1:].min() > 0
    exact = attend(tril_of_ones)(q, k, v)
    assert relative_error(draws.mean(0), exact) < 4 * float((draws.std(0) / 600**0.5).norm() / exact.norm())
    assert relative_error(draws[0], exact) > 0.1


def test_data_in_the_mask():
    def function(q, k, v, padding):
        i = torch.arange(q.shape[-2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(i[:, None] >= i) & padding[:, None, None, :].bool())

    report = report_of(function, *heads(), torch.ones(2, T, dtype=torch.int64))
    assert not report.counts and "padding" in report.misses[0].reason, report


def test_attention_without_a_mask_is_no_near_miss():
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    report = report_of(function, *heads())
    assert not report.counts and not report.misses


def test_the_mask_is_kept_for_others():
    def function(q, k, v):
        mask = additive_where(q.shape[-2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), mask.sum(0)

    report = report_of(function, *heads())
    assert report.counts == {"attention": 1}
    inputs = heads()
    ours, eager = report.graphs[0].after(*inputs), function(*inputs)
    assert torch.equal(ours[1], eager[1]) and relative_error(ours[0], eager[0]) < 1e-6


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "static"])
def test_another_length(dynamic):
    """A window is told from none where the compiler knows the length, and left alone where it does not."""
    reports = []
    compiled = torch.compile(attend(window_as_long_as_the_sequence), backend=rewritten(reports), dynamic=dynamic)
    for length in (T, T + 5, T + 9):
        q, k, v = (torch.randn(2, 4, length, 16) for _ in range(3))
        assert relative_error(compiled(q, k, v), attend(tril_of_ones)(q, k, v)) < 1e-6
    assert all(r.counts == {"attention": 1} for r in reports)


# ---- groups of heads ----------------------------------------------------------------------------------------------


def by_expand(x, n):
    b, h, t, d = x.shape
    return x[:, :, None, :, :].expand(b, h, n, t, d).reshape(b, h * n, t, d)


def by_expand_and_flatten(x, n):
    return x.unsqueeze(2).expand(-1, -1, n, -1, -1).flatten(1, 2)


def by_repeat_interleave(x, n):
    return x.repeat_interleave(n, dim=1)


def by_function(x, n):
    return torch.repeat_interleave(x, n, dim=-3)


def in_order_of_tokens(x, n):  # reference Llama's: tokens come before heads
    tokens = x.transpose(1, 2)
    b, s, h, d = tokens.shape
    return tokens[:, :, :, None, :].expand(b, s, h, n, d).reshape(b, s, h * n, d).transpose(1, 2)


def by_repeat_of_a_new_dimension(x, n):
    return x[:, :, None].repeat(1, 1, n, 1, 1).flatten(1, 2)


def by_repeat_interleave_of_tokens(x, n):
    return x.transpose(1, 2).repeat_interleave(n, dim=2).transpose(1, 2)


REPEATS = [
    *(by_expand, by_expand_and_flatten, by_repeat_interleave, by_function),
    *(in_order_of_tokens, by_repeat_interleave_of_tokens, by_repeat_of_a_new_dimension),
]


@pytest.mark.parametrize("repeat", REPEATS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["mask", "mask of ones", "is_causal", "none"])
def test_groups(repeat, kind):
    def function(q, k, v):
        made = {"mask": tril_of_ones, "mask of ones": ones}.get(kind)
        mask = made and made(q.shape[-2])
        k, v = repeat(k, 2), repeat(v, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=kind == "is_causal")

    inputs = heads(groups=2)
    report = report_of(function, *inputs)
    assert report.counts == {"attention": 1}, report
    (call,) = [n for n in report.graphs[0].after.graph.nodes if n.op not in ("placeholder", "output")]
    assert call.kwargs["enable_gqa"] and call.kwargs.get("is_causal", False) == (kind in ("mask", "is_causal"))
    assert_same(function, inputs)


def test_one_head_for_all():
    def function(q, k, v):
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = heads(groups=1)
    report = report_of(function, *inputs)
    assert report.counts == {"attention": 1}, report
    (call,) = [n for n in report.graphs[0].after.graph.nodes if n.op not in ("placeholder", "output")]
    assert call.kwargs["enable_gqa"] and call.kwargs["is_causal"]
    assert_same(function, inputs)


@pytest.mark.parametrize("kind", ["mask", "mask of ones"])
def test_groups_that_the_model_names(kind):
    def function(q, k, v):
        mask = (tril_of_ones if kind == "mask" else ones)(q.shape[-2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    inputs = heads(groups=2)
    report = report_of(function, *inputs)
    assert report.counts == {"attention": 1}, report
    (call,) = [n for n in report.graphs[0].after.graph.nodes if n.op not in ("placeholder", "output")]
    assert call.kwargs["enable_gqa"] and call.kwargs.get("is_causal", False) == (kind == "mask")
    assert_same(function, inputs)


def test_other_orders_of_heads_are_not_groups():
    def tiled(q, k, v):
        return F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))

    def only_keys(q, k, v):
        return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat(1, 2, 1, 1))

    def along_the_sequence(q, k, v):
        return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))

    for function in (tiled, only_keys):
        assert not report_of(function, *heads(groups=2)).counts
    assert not report_of(along_the_sequence, *heads()).counts


# ---- models -------------------------------------------------------------------------------------------------------


def packed(inputs):
    rows, length = inputs["input_ids"].shape
    at = torch.arange(length, device=inputs["input_ids"].device)
    return {"position_ids": (at % (length // 3 + 1)).expand(rows, length)}


def padded(side):
    def mask(inputs):
        ones = torch.ones_like(inputs["input_ids"])
        length = ones.shape[1]
        ones[1, slice(length * 5 // 8, None) if side == "right" else slice(0, length // 4)] = 0
        return {"attention_mask": ones}

    return mask


KINDS = {
    "no padding": lambda inputs: {},
    "right": padded("right"),
    "left": padded("left"),
    "packed": packed,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_models(family, kind):
    """The predicate equals the mask that the model built, element by element."""
    found: list[Attention] = []
    inputs = batch(rows=3)
    model = build(family)
    model.set_attn_implementation("sdpa")
    torch.compile(model, backend=comparing(found))(**inputs, **KINDS[kind](inputs))
    assert [m.outcome for m in found] == ["right", "right"], found
    windows = sum("15 >= 0" in m.says for m in found)
    assert windows == {"mistral": 2, "gemma2": 1, "gemma3_text": 2}.get(family, 0), found
    for mask in found:
        assert "q - k >= 0" in mask.says
        assert ("attention_mask" in mask.says) == (kind in ("right", "left")), mask
        assert ("cumsum" in mask.says) == (kind == "packed"), mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_with_masks_of_models(everywhere, family, kind):
    """No mask is left in the graph, and loss and gradients are eager's."""
    inputs = batch(rows=3)
    inputs |= KINDS[kind](inputs)
    model = build(family)
    model.set_attn_implementation("sdpa")
    eager_loss, eager = step(model, model, inputs)
    reports = []
    loss, ours = step(model, torch.compile(model, backend=rewritten(reports)), inputs)
    assert sum(r.counts.get("attention", 0) for r in reports) == 2, reports
    for report in reports:
        graph = report.graphs[0].after.graph
        graph.eliminate_dead_code()  # a model may make masks that it has no layers for
        assert not [n for n in graph.nodes if n.target is operator.le], "the mask is still computed"
    assert relative_error(loss, eager_loss) < 1e-6
    for name in eager:
        assert relative_error(ours[name], eager[name]) < 1e-4, name


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("family, kind", [("mistral", "no padding"), ("gemma3_text", "packed"), ("llama", "left")])
def test_flex_attention_itself_in_models(everywhere, monkeypatch, family, kind, checkpointed):
    """Traced as a GPU's graph is, run by FlexAttention's reference; checkpointed blocks get what the mask reads."""
    op_file = importlib.import_module("liger_compile.ops.masked_attention")  # the op has the name too
    monkeypatch.setattr(op_file, "_has_kernel", lambda query: True)
    inputs = batch(rows=3)
    inputs |= KINDS[kind](inputs)
    model = build(family)
    model.set_attn_implementation("sdpa")
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    eager_loss, eager = step(model, model, inputs)
    reports = []
    loss, ours = step(model, torch.compile(model, backend=rewritten(reports, "aot_eager")), inputs)
    assert sum(r.counts.get("attention", 0) for r in reports) == 2, reports
    assert relative_error(loss, eager_loss) < 1e-6
    for name in eager:
        assert relative_error(ours[name], eager[name]) < 1e-4, name


def test_checkpointed_block_whose_padding_changes(everywhere):
    """What may be another value by the time the block runs is not passed to it."""

    def function(q, k, v, padding):
        i = torch.arange(q.shape[-2])
        mask = (i[:, None] >= i) & (padding[:, None, None, :] != 0)
        padding.zero_()
        return checkpoint(F.scaled_dot_product_attention, q, k, v, attn_mask=mask, use_reentrant=False)

    report = report_of(function, *heads(), torch.ones(2, T, dtype=torch.int64))
    assert not report.counts and "does not hold" in report.misses[0].reason, report


def test_module_with_a_mask_of_its_own():
    """Code that is not from transformers: a buffer holds the mask, whose contents the graph does not show."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(64, 64, dtype=torch.bool).tril())

        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[:T, :T])

    report = report_of(Attention(), *heads())
    assert not report.counts and "mask" in report.misses[0].reason


# ---- on a GPU: compiled, against float64 ---------------------------------------------------------------------------


def causal_window(q, k, v, padding):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=window(q, padding))


def causal_documents(q, k, v, padding):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=window_in_documents(q, padding))


def only_causal(q, k, v, padding):
    i = torch.arange(q.shape[-2], device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=i[:, None] >= i)


def window_added(q, k, v, padding):
    seen = window(q, padding)
    mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def shared_keys(function):
    return lambda q, k, v, padding: function(q, by_expand(k, 2), by_expand(v, 2), padding)


ON_A_GPU = {
    "causal": only_causal,
    "padded": causal_and_padded,
    "window": causal_window,
    "documents": causal_documents,
    "added": window_added,
    "shared keys": shared_keys(causal_and_padded),
    "shared keys, causal": shared_keys(only_causal),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length, width", [(1024, 128), (777, 64), (513, 256)])
def test_as_accurate_as_eager(name, dtype, length, width):
    """From projections as they are laid out, to outputs and gradients; and some rows see nothing at their beginning."""
    as_accurate_as_eager(name, dtype, length, width, "cuda", "liger")


@pytest.mark.parametrize("name", ON_A_GPU)
def test_as_accurate_as_eager_without_a_gpu(everywhere, name):
    as_accurate_as_eager(name, torch.bfloat16, 65, 16, "cpu", rewritten([], "aot_eager"))


def as_accurate_as_eager(name, dtype, length, width, device, backend):
    function, groups = ON_A_GPU[name], 4 if name.startswith("shared") else 8
    compiled = torch.compile(function, backend=backend)
    accuracy = Accuracy()
    for seed in range(2):
        inputs = projected(length, groups, width, dtype, device)
        if seed == 0:
            assert report_of(function, *inputs).counts == {"attention": 1}
        wide = [x.detach().double().requires_grad_() for x in inputs[:3]]
        outs = compiled(*inputs), function(*inputs), function(*wide, inputs[3])
        accuracy.add("out", *(x.detach() for x in outs))
        incoming = torch.randn(outs[0].shape, generator=torch.Generator(device).manual_seed(seed), device=device)
        ways = zip(outs, (inputs, inputs, wide), strict=True)
        gradients = [torch.autograd.grad(out, i[:3], incoming.to(out.dtype)) for out, i in ways]
        for x, *values in zip(("query", "key", "value"), *gradients, strict=True):
            accuracy.add(x, *values)
    accuracy.check(rows=3 * 8 * length)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_models_as_accurate_as_eager(family, kind):
    models_as_accurate_as_eager(family, kind, 640, "cuda", "liger")


def test_models_as_accurate_as_eager_without_a_gpu(everywhere):
    models_as_accurate_as_eager("mistral", "left", 32, "cpu", rewritten([], "aot_eager"))


def models_as_accurate_as_eager(family, kind, length, device, backend):
    """Every gradient of a model whose masks are rewritten."""
    model = build(family, torch.bfloat16, device, max_position_embeddings=1024)
    model.set_attn_implementation("sdpa")
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend=backend)
    accuracy = Accuracy()
    for seed in range(3):
        inputs = batch(3, length, device)
        inputs |= KINDS[kind](inputs)
        if seed == 0:
            assert liger_compile.explain(model)(**inputs).counts["attention"] == 2
        _, ours = step(model, compiled, inputs)
        _, eager = step(model, model, inputs)
        _, right = step(exact, exact, inputs)
        for name in eager:
            accuracy.add(name, ours[name], eager[name], right[name])
    accuracy.check(rows=3 * 3 * length)


def projected(length, groups, width, dtype, device):
    """Leaves q, k and v as views of [rows, length, heads, width], and padding at the beginning and at the end."""
    padding = torch.ones(3, length, dtype=torch.int64, device=device)
    padding[0, : length // 5], padding[1, -length // 3 :] = 0, 0
    made = (torch.randn(3, length, n, width, device=device).to(dtype) for n in (8, groups, groups))
    return *(x.transpose(1, 2).detach().requires_grad_() for x in made), padding
