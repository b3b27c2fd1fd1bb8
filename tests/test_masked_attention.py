"""FlexAttention told by an expression what is seen: against attention with the mask itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import Accuracy, relative_error
from torch.nn.attention.flex_attention import create_block_mask

from liger_compile.mask_code import function
from liger_compile.ops import masked_attention
from liger_compile.ops.masked_attention import _block_mask, _flex, _lookup, _mask

CAUSAL = "q - k >= 0"
SEEN = {
    "causal": CAUSAL,
    "window": f"({CAUSAL}) & (k - q + 37 >= 0)",
    "chunks": f"({CAUSAL}) & (((q) // 48) - ((k) // 48) == 0)",
    "prefix": f"({CAUSAL}) | (19 - k >= 0)",
    "padding": f"({CAUSAL}) & (x0[b, k] != 0)",
    "documents": f"({CAUSAL}) & (x1[b, q] - x1[b, k] == 0)",
    "padding alone": "x0[b, k] != 0",
    "other for each head": "q - k + 5 * h >= 0",
}
each_mask = pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)


def tensors_of(rows, queries, keys, device="cpu"):
    """Padding on either side, one row all padding; documents of several lengths."""
    padding = torch.ones(rows, keys, dtype=torch.int64, device=device)
    padding[0, : keys // 5] = 0
    padding[1, -keys // 3 :] = 0
    padding[2:3] = 0
    documents = (torch.arange(max(queries, keys), device=device) * torch.tensor([[3], [5], [2]], device=device)) // 200
    return padding, documents[:rows]


def operands(rows=3, heads=4, groups=2, queries=200, keys=200, width=16, dtype=torch.float32, device="cpu"):
    shapes = (rows, heads, queries, width), (rows, groups, keys, width), (rows, groups, keys, width)
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]


def expected(q, k, v, mask, scale=None):
    repeated = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, *repeated, attn_mask=mask, scale=scale)


def gradients(out, inputs, seed=0):
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad(out, inputs, incoming.to(out.device, out.dtype))


@each_mask
@pytest.mark.parametrize("queries, keys", [(200, 200), (128, 384), (257, 129)])
@pytest.mark.parametrize("implementation", ["op", "flex"])
def test_same_as_with_the_mask(seen, queries, keys, implementation):
    inputs = operands(queries=queries, keys=keys)
    tensors = tensors_of(3, queries, keys)
    call = masked_attention if implementation == "op" else lambda q, k, v, _, *code: _flex(q, k, v, *code, None)
    ours = call(*inputs, None, seen, tensors)
    theirs = expected(*inputs, _mask(seen, tensors, *inputs[:2]))
    assert relative_error(ours, theirs) < 1e-6
    for a, b in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        assert relative_error(a, b) < 2e-6


def test_the_mask_itself():
    q, k, v = operands()
    for mask in (torch.rand(3, 4, 200, 200) > 0.5, torch.rand(3, 1, 200, 200) > 0.5, torch.rand(200, 200) > 0.5):
        assert relative_error(masked_attention(q, k, v, mask), expected(q, k, v, mask)) < 1e-6
        ours = _flex(q, k, v, _lookup(mask), (mask,), 0.7)
        assert relative_error(ours, expected(q, k, v, mask, 0.7)) < 1e-6


@each_mask
@pytest.mark.parametrize("queries, keys", [(200, 200), (128, 384), (257, 129)])
def test_blocks(seen, queries, keys):
    """Those that PyTorch finds when it asks for every pair of positions."""
    q, k, _ = operands(queries=queries, keys=keys)
    tensors = tensors_of(3, queries, keys)
    ours = _block_mask(seen, tensors, q, k)
    call = function(seen, len(tensors))
    heads, rows = ours.kv_indices.shape[1], ours.kv_indices.shape[0]
    theirs = create_block_mask(lambda b, h, q, k: call(b, h, q, k, *tensors), rows, heads, queries, keys, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())


def test_wrong_arguments():
    q, k, v = operands()
    with pytest.raises(ValueError, match="give attn_mask, or"):
        masked_attention(q, k, v)
    with pytest.raises(ValueError, match=r"attn_mask is torch.float32\(200, 200\), needs bool"):
        masked_attention(q, k, v, torch.zeros(200, 200))


# ---- on a GPU: compiled, real sizes --------------------------------------------------------------------------------


@pytest.mark.gpu
@each_mask
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("queries, keys, width", [(1024, 1024, 128), (777, 1333, 64)])
def test_as_accurate_as_eager(seen, dtype, queries, keys, width):
    compiled = torch.compile(lambda q, k, v, x: masked_attention(q, k, v, None, seen, x), fullgraph=True)
    tensors = tensors_of(3, queries, keys, "cuda")
    accuracy = Accuracy()
    for seed in range(2):
        inputs = operands(3, 8, 2, queries, keys, width, dtype, "cuda")
        mask = _mask(seen, tensors, *inputs[:2])
        wide = [x.detach().double().requires_grad_() for x in inputs]
        outs = compiled(*inputs, tensors), expected(*inputs, mask), expected(*wide, mask)
        assert not torch.isnan(outs[0]).any()
        hidden = ~mask.any(-1).expand(3, 8, queries)
        assert (outs[0][hidden] == 0).all(), "a query that sees nothing"
        found = [(o, *gradients(o, i, seed)) for o, i in zip(outs, (inputs, inputs, wide), strict=True)]
        for name, *values in zip(["out", "query", "key", "value"], *found, strict=True):
            accuracy.add(name, *(x.detach() for x in values))
    accuracy.check(rows=3 * 8 * queries)
