"""The ops by themselves: torch's own checks, errors, edge cases, what they must not compute. Walks the namespace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import Accuracy, relative_error, skip_without_interpreter
from torch.utils._python_dispatch import TorchDispatchMode

from liger_compile import ops
from liger_compile.ops._library import AS_GIVEN

OPS = torch.ops.liger_compile


def some(*shape, dtype=torch.float32, grad=True):
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def fixed(*shape, dtype=torch.float32):
    return some(*shape, dtype=dtype, grad=False)


def freqs(*shape):
    return torch.polar(torch.ones(shape), torch.randn(shape))


def labels(n=6, classes=9):
    target = torch.randint(classes, (n,))
    target[1::3] = -100
    return target


def half(*shape, grad=True):
    return some(*shape, dtype=torch.bfloat16, grad=grad)


def head(n=6, grad=True):
    """hidden, weight and bias as the fused loss takes them."""
    return half(n, 8, grad=grad), half(16, 8, grad=grad), half(16, grad=grad)


def transposed(*shape):
    return fixed(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2).requires_grad_()


def norm_rope(k=True, rows=5):
    """q, k, their weights, cos and sin, of three heads and one."""
    q, keys = fixed(2, rows, 3, 8).transpose(1, 2), fixed(2, rows, 1, 8).transpose(1, 2)
    return q, keys if k else None, fixed(8), fixed(8) if k else None, fixed(rows, 6), fixed(rows, 6)


TRANSFORM = (None, -100, 0.5, 3.0, 2.0, True, 0.0)
PLAIN = (None, -100, 1.0, 1.0, 0.0, False, 0.0)
ALL = (True, True, True)
Y6 = torch.tensor([1, 1, 1, 3, 3, 5], dtype=torch.int32)
SMOOTH = (torch.rand(6), -100, 1.0, 1.0, 0.0, False, 0.1)

SAMPLES = {
    # every op of the namespace: functions that make (arguments, keyword arguments)
    "rms_norm": [
        lambda: ((some(4, 8), some(8), 1e-6), {}),
        lambda: ((some(2, 3, 8), None, 1e-6, 0.0, "result"), {}),
        lambda: ((transposed(2, 3, 8), some(8), 1e-5, 1.0, "factor"), {}),
        lambda: ((half(4, 8), some(8), 1e-6), {}),
        lambda: ((half(4, 8), half(8), 1e-6), {"rounding": "result", "offset": 1.0}),
        lambda: ((fixed(4, 8), some(8), 1e-6), {}),
        lambda: ((some(4, 8), fixed(8), 1e-6), {}),
        lambda: ((some(0, 8), some(8), 1e-6), {}),
        lambda: ((some(4, 8), some(8), 1e-6), {"guard": "floor", "divisor": 1.0}),
        lambda: ((half(4, 8), None, 1e-6), {"guard": "outside"}),
    ],
    "rms_norm_backward": [
        lambda: ((fixed(4, 8), fixed(4, 8), fixed(8), 1e-6, 0.0, "normed", True), {}),
        lambda: ((fixed(4, 8), fixed(4, 8), fixed(8), 1e-6, 1.0, "result", False), {}),
        lambda: ((fixed(4, 8), fixed(8, 4).t(), None, 1e-6, 0.0, "factor", False), {}),
        lambda: ((fixed(4, 8), fixed(4, 8), fixed(8), 1e-6, 0.0, "normed", True, "floor", 2.0), {}),
        lambda: ((fixed(8), fixed(8), fixed(8), 1e-6, 0.0, "normed", True), {}),
    ],
    "add_rms_norm": [
        lambda: ((fixed(4, 8), fixed(4, 8), fixed(8), 1e-6, 0.0, "normed"), {}),
        lambda: ((half(2, 3, 8, grad=False), half(2, 3, 8, grad=False), fixed(8), 1e-6, 1.0, "factor"), {}),
        lambda: ((fixed(0, 8), fixed(0, 8), None, 1e-6, 0.0, "result"), {}),
    ],
    "rms_norm_add": [
        lambda: ((fixed(4, 8), fixed(4, 8), fixed(8), 1e-6, 0.0, "normed"), {}),
        lambda: ((half(2, 3, 8, grad=False), fixed(2, 3, 8), fixed(8), 1e-6, 1.0, "normed"), {}),
        lambda: ((fixed(0, 8), fixed(0, 8), None, 1e-6, 0.0, "result"), {}),
    ],
    "rms_norm_backward_add": [
        lambda: (([fixed(4, 8)], fixed(4, 8), fixed(8), None, 1e-6, 0.0, "normed", True, True), {}),
        lambda: (([fixed(4, 8)] * 3, fixed(4, 8), fixed(8), fixed(4, 8), 1e-6, 1.0, "result", False, False), {}),
        lambda: (([fixed(4, 8)] * 2, fixed(4, 8), None, fixed(4, 8), 1e-6, 0.0, "factor", False, True), {}),
        lambda: (([fixed(0, 8)], fixed(0, 8), fixed(8), None, 1e-6, 0.0, "normed", True, True), {}),
    ],
    "norm_rope": [
        lambda: ((*norm_rope(), 1e-6, 0.0, "normed", False, False, False), {}),
        lambda: ((*norm_rope(k=False), 1e-6, 1.0, "result", True, True, True), {}),
        lambda: ((*norm_rope(rows=0), 1e-6, 0.0, "factor", False, False, False), {}),
    ],
    "norm_rope_backward": [
        lambda: ((*norm_rope()[:2], *norm_rope(), 1e-6, 0.0, "normed", False, True), {}),
        lambda: ((*norm_rope(k=False)[:2], *norm_rope(k=False), 1e-6, 1.0, "result", True, False), {}),
        lambda: ((*norm_rope(rows=0)[:2], *norm_rope(rows=0), 1e-6, 0.0, "factor", False, True), {}),
    ],
    "gated_rms_norm": [
        lambda: ((some(4, 8), some(4, 8), some(8), 1e-6), {}),
        lambda: ((half(4, 8), some(4, 8), some(8), 1e-6, "sigmoid", True), {}),
        lambda: ((transposed(2, 3, 8), half(2, 3, 8), half(8), 1e-6, "silu", False, "result"), {"groups": [2, 4]}),
        lambda: ((fixed(4, 8), fixed(4, 8), some(8), 1e-6), {}),
        lambda: ((some(4, 8), fixed(4, 8), fixed(8), 1e-6), {"gate_first": True}),
        lambda: ((some(0, 8), some(0, 8), some(8), 1e-6), {}),
    ],
    "gated_rms_norm_backward": [
        lambda: ((*(fixed(8),) * 4, 1e-6, "silu", False, "normed", None, True), {}),
        lambda: ((*(fixed(4, 8),) * 3, fixed(8), 1e-6, "silu", False, "normed", None, True), {}),
        lambda: (
            (fixed(4, 8), fixed(8, 4).t(), fixed(4, 8), fixed(8), 1e-6, "sigmoid", True, "result", [4, 2], False),
            {},
        ),
    ],
    "masked_attention": [
        lambda: ((some(2, 4, 5, 8), some(2, 2, 7, 8), some(2, 2, 7, 8), torch.rand(2, 1, 5, 7) > 0.3), {}),
        lambda: ((some(2, 2, 5, 8), fixed(2, 2, 5, 8), some(2, 2, 5, 8)), {"seen": "q - k >= 0", "scale": 0.3}),
    ],
    "embedding": [
        lambda: ((torch.tensor([[1, 3, 1]]), some(5, 8)), {}),
        lambda: ((torch.tensor([2, 2, 4]).int(), half(5, 8), 2), {}),
        lambda: ((torch.tensor([1, 3, 1]), fixed(5, 8)), {}),
    ],
    "embedding_backward": [
        lambda: ((some(1, 3, 8), torch.tensor([[1, 3, 1]]), 5, 3), {}),
        lambda: ((half(3, 8, grad=False), torch.tensor([1, 3, 1]).int(), 5, -1), {}),
        lambda: ((transposed(3, 8), torch.tensor([1, 3, 1]), 5, -1), {}),
        lambda: ((some(0, 8), torch.zeros(0, dtype=torch.int64), 5, -1), {}),
    ],
    "glu": [
        lambda: ((some(4, 8), some(4, 8)), {}),
        lambda: ((half(2, 3, 8), half(2, 3, 8), "gelu"), {}),
        lambda: ((transposed(4, 8), some(4, 8), "gelu_tanh"), {}),
        lambda: ((some(4, 8), fixed(4, 8)), {}),
        lambda: ((some(0, 8), some(0, 8)), {}),
        lambda: ((some(4, 8), some(4, 8), "relu2"), {"gate_scale": 0.5}),
        lambda: ((some(4, 8), some(4, 8), "silu", 1.0, 0.9, 1.702, 1.0), {}),
        lambda: ((half(4, 8), some(4, 8)), {}),
        lambda: ((some(4, 8), half(4, 8), "silu", 1.0, 0.9, 1.702, 1.0), {}),
        lambda: ((half(4, 8), half(4, 8), "silu", 0.5, 0.9, 1.702, 1.0, True), {}),
    ],
    "glu_backward": [
        lambda: ((fixed(4, 8), half(4, 8, grad=False), fixed(4, 8), "gelu"), {"again": True}),
        lambda: ((fixed(4, 8), fixed(4, 8), fixed(4, 8), "relu"), {"limit": 0.9}),
        lambda: ((fixed(4, 8), fixed(4, 8), fixed(8, 4).t(), "silu"), {}),
        lambda: ((half(4, 8, grad=False),) * 3 + ("gelu_tanh",), {}),
        lambda: ((fixed(4, 8), fixed(8, 4).t(), fixed(4, 8), "silu"), {"again": True}),
    ],
    "packed_glu": [
        lambda: ((some(4, 8),), {}),
        lambda: ((half(2, 3, 8), "gelu", False), {}),
        lambda: ((transposed(4, 8), "gelu_tanh"), {}),
        lambda: ((some(0, 8),), {}),
        lambda: ((some(4, 8), "relu"), {"limit": 0.9}),
        lambda: ((half(4, 8), "gelu"), {"wide": True}),
        lambda: ((transposed(4, 8), "silu", False, 1.0, 0.9, 1.702, 1.0, False, True), {}),
    ],
    "packed_glu_backward": [
        lambda: ((fixed(4, 8), fixed(16, 4).t(), "silu", True, 1.0, 0.9, 1.702, 1.0, False, True), {}),
        lambda: ((fixed(4, 8), fixed(4, 16), "silu", True), {}),
        lambda: ((fixed(4, 8), fixed(16, 4).t(), "gelu", False), {}),
        lambda: ((fixed(4, 8), fixed(16, 4).t(), "gelu", False), {"again": True}),
        lambda: ((half(4, 8, grad=False), half(4, 16, grad=False), "silu", True), {"wide": True, "again": True}),
    ],
    "rope": [
        lambda: ((some(2, 3, 5, 8), fixed(5, 8), fixed(5, 8)), {}),
        lambda: ((some(2, 5, 3, 8).transpose(1, 2), fixed(2, 1, 5, 6), fixed(2, 1, 5, 6)), {"contiguous": True}),
        lambda: ((half(5, 8), fixed(5, 8), fixed(5, 8)), {"promote": True}),
        lambda: ((half(5, 8), half(5, 8, grad=False), half(5, 8, grad=False)), {"upcast": True}),
        lambda: ((some(0, 8), fixed(0, 8), fixed(0, 8)), {}),
        lambda: ((half(2, 3, 5, 8), fixed(5, 6), fixed(5, 6)), {"layout": "neighbours", "inverse": True}),
        lambda: ((some(5, 8), fixed(5, 4), fixed(5, 4)), {"layout": "neighbours to halves", "per_pair": True}),
    ],
    "complex_rope": [
        lambda: ((some(2, 5, 3, 8), freqs(5, 1, 4)), {}),
        lambda: ((half(2, 5, 3, 8).transpose(1, 2), freqs(2, 1, 5, 4).conj()), {"promote": True}),
    ],
    "complex_rope_pair": [
        lambda: ((some(2, 5, 3, 8), half(2, 5, 1, 8), freqs(5, 1, 4)), {}),
        lambda: ((some(0, 1, 8), some(0, 2, 8), freqs(0, 1, 4)), {}),
    ],
    "rope_backward": [
        lambda: ((fixed(5, 8), fixed(5, 8), fixed(5, 8), [8, 1], torch.float32, False), {}),
        lambda: ((*(fixed(5, 8),) * 3, [8, 1], torch.float32, False, "neighbours", True), {}),
        lambda: ((*(fixed(5, 8),) * 3, [8, 1], torch.float32, False, "neighbours to halves"), {}),
        lambda: ((fixed(5, 8), fixed(5, 6), fixed(5, 6), [1, 5], torch.bfloat16, True), {}),
    ],
    "rope_pair": [
        lambda: ((some(2, 3, 5, 8), some(2, 1, 5, 8), fixed(5, 8), fixed(5, 8)), {}),
        lambda: ((half(2, 3, 5, 8), half(2, 1, 5, 8), fixed(5, 6), fixed(5, 6), True, True, True), {}),
        lambda: ((some(2, 3, 5, 8), fixed(2, 1, 5, 8), fixed(5, 8), fixed(5, 8)), {}),
    ],
    "rope_pair_backward": [
        lambda: (
            (fixed(3, 5, 8), fixed(1, 5, 8), fixed(5, 8), fixed(5, 8), *[[40, 8, 1]] * 2, torch.float32, False),
            {},
        ),
        lambda: (
            (fixed(5, 8), fixed(5, 8), fixed(5, 8), fixed(5, 8), [8, 1], [1, 5], torch.float32, False),
            {},
        ),
        lambda: (
            (*(fixed(5, 8),) * 2, *(fixed(5, 4),) * 2, [8, 1], [1, 5], torch.float32, True, "halves", True, True),
            {},
        ),
    ],
    "linear_cross_entropy": [
        lambda: ((some(6, 8), some(9, 8), some(9), labels()), {}),
        lambda: ((some(6, 8), some(9, 8), None, labels()), {"reduction": "sum", "softcap": 3.0}),
        lambda: ((half(6, 8), half(9, 8), None, labels().abs() % 9, 2), {"scale": 0.5, "divisor": 3.0, "wide": True}),
        lambda: ((some(6, 8), some(9, 8), some(9), labels()), {"reduction": "none", "softcap": 3.0}),
        lambda: ((some(6, 8), some(9, 8), None, labels()), {"class_weight": torch.rand(9), "memory": "lean"}),
        lambda: ((some(6, 8), some(9, 8), None, labels()), {"label_smoothing": 0.1}),
        lambda: ((some(6, 8), fixed(9, 8), None, labels()), {}),
        lambda: ((fixed(6, 8), fixed(9, 8), some(9), labels()), {}),
        lambda: ((fixed(6, 8), fixed(9, 8), None, labels()), {}),
    ],
    "linear_cross_entropy_rows": [
        lambda: ((some(6, 8), some(9, 8), some(9), labels(), [2, 3]), {"softcap": 3.0}),
        lambda: ((half(6, 8), half(9, 8), None, labels().abs() % 9, [6, 1]), {"negative": True, "divisor": 0.7}),
    ],
    "linear_cross_entropy_sum": [
        lambda: ((some(6, 8), some(9, 8), some(9), labels(), fixed(2, 3)), {"softcap": 3.0, "factor": 0.5}),
        lambda: ((half(6, 8), half(9, 8), None, labels().abs() % 9, labels() > 3), {"divisor": 0.7}),
        lambda: ((some(6, 8), some(9, 8), None, labels()), {"factor": -1.0}),
        lambda: ((some(6, 8), some(9, 8), None, labels(), fixed(6)), {"label_smoothing": 0.1, "memory": "lean"}),
    ],
    "linear_cross_entropy_z": [
        lambda: ((some(6, 8), some(9, 8), some(9), labels()), {"z_factor": 0.1, "reduction": "mean"}),
        lambda: ((half(6, 8), half(9, 8), None, labels(), fixed(2, 3), 0.1, labels() > 3), {"divisor": 0.7}),
    ],
    "linear_cross_entropy_lse": [
        lambda: ((some(6, 8), some(9, 8), some(9), labels()), {}),
        lambda: ((some(6, 8), fixed(9, 8), None, labels()), {"reduction": "none", "scale": 0.5}),
        lambda: ((some(6, 8), fixed(9, 8), None, labels()), {"shape": (2, 3)}),
    ],
    "linear_cross_entropy_forward": [
        lambda: ((fixed(6, 8), fixed(9, 8), fixed(9), labels(), *TRANSFORM, True, True, True, "", 99), {}),
        lambda: ((fixed(6, 8), fixed(9, 8), fixed(9), labels(), *PLAIN, True, True, True, "gradient", 99), {}),
        lambda: ((fixed(6, 8), fixed(9, 8), None, labels(), *SMOOTH, True, False, False, "logits", 99), {}),
        lambda: ((fixed(6, 8), fixed(9, 8), None, labels(), *SMOOTH, False, True, False, "", 99), {}),
        lambda: ((fixed(6, 8), fixed(9, 8), None, labels(), *PLAIN, False, False, False, "", 99), {}),
        lambda: ((fixed(0, 8), fixed(9, 8), None, labels(0), *PLAIN, True, True, False, "", 99), {}),
    ],
    "linear_cross_entropy_from_logits": [
        lambda: (
            (fixed(6, 9), labels(), *torch.rand(4, 6), 0.5, 3.0, 2.0, True, 0.1, fixed(6, 8), fixed(9, 8), *ALL),
            {},
        ),
        lambda: (
            (fixed(0, 9), labels(0), *torch.rand(4, 0), *PLAIN[2:], fixed(0, 8), fixed(9, 8), False, True, False),
            {},
        ),
    ],
    "linear_cross_entropy_backward": [
        lambda: ((fixed(6, 9), fixed(6, 8), fixed(9, 8), torch.tensor(0.3), True, True, True), {}),
        lambda: ((fixed(6, 9), fixed(6, 8), fixed(9, 8), torch.tensor(0.3), False, False, False), {}),
    ],
    "fused_loss": [
        lambda: ((*head(grad=False), labels(), -100, 0.5, 3.0, True), {}),
        lambda: ((*head(grad=False), labels(), -100, 1.0, 0.0, False), {}),
        lambda: ((*head(0, grad=False), labels(0), -100, 1.0, 0.0, True), {}),
    ],
    "fused_loss_backward": [
        lambda: (
            (
                half(6, 16, grad=False),
                torch.rand(3, 6),
                torch.arange(6),
                Y6,
                torch.tensor(6).int(),
                *head(grad=False)[:2],
                torch.ones(1),
                *ALL,
            ),
            {},
        ),
    ],
    "fused_loss_and_gradients": [
        lambda: (
            (*head(grad=False), torch.randint(16, (6,)), -100, 0.5, 3.0, torch.ones(1), None, True, True, True, 1),
            {},
        ),
        lambda: (
            (
                *head(grad=False),
                torch.randint(16, (6,)),
                -100,
                1.0,
                0.0,
                torch.rand(6),
                torch.rand(6),
                False,
                True,
                False,
                1,
            ),
            {},
        ),
        lambda: (
            (*head(grad=False), torch.randint(16, (6,)), -100, 1.0, 0.0, torch.ones(1), None, True, False, False, 1),
            {},
        ),
        lambda: ((*head(0, grad=False), labels(0), -100, 1.0, 0.0, torch.ones(1), None, True, True, True, 1), {}),
    ],
    "label_sums": [
        lambda: (
            (
                half(6, 8, grad=False),
                Y6,
                torch.arange(6),
                torch.tensor(6).int(),
                torch.rand(2, 6),
                torch.ones(8),
                torch.tensor([1, -1, -1, 0, -1, -1]).int(),
                torch.randn(2, 8),
            ),
            {},
        ),
    ],
}


SAMPLES |= {
    f"{name}_forward": SAMPLES[name]
    for name in ("rms_norm", "gated_rms_norm", "glu", "packed_glu", "rope", "rope_pair")
}


def test_every_op_has_samples():
    names = {n.partition("::")[2] for n in torch._C._dispatch_get_all_op_names() if n.startswith("liger_compile::")}
    assert names == set(SAMPLES)
    assert set(ops.__all__) <= names


@pytest.mark.parametrize("name, sample", [(n, i) for n, made in SAMPLES.items() for i in range(len(made))])
def test_opcheck(name, sample):
    skip_without_interpreter(name)
    args, kwargs = SAMPLES[name][sample]()
    torch.library.opcheck(getattr(OPS, name).default, args, kwargs)


# ---- errors -------------------------------------------------------------------------------------------------------


Y = torch.tensor([1, 2, -100, 4])
ERRORS = [
    (lambda: ops.rms_norm(some(4, 8), some(7), 1e-6), r"rms_norm: weight has shape \(7,\), x needs \[8\]"),
    (lambda: ops.rms_norm(some(4, 8), some(4, 8), 1e-6), r"rms_norm: weight has shape \(4, 8\), x needs \[8\]"),
    (lambda: ops.rms_norm(some(4, 8), some(8), 1e-6, guard="max"), r"guard is one of .*'floor'.*, not 'max'"),
    (lambda: ops.rms_norm(some(4, 8), some(8), 1e-6, 0.0, "late"), r"rounding is one of .*'normed'.*, not 'late'"),
    (
        lambda: OPS.norm_rope(
            *(fixed(4, 8), fixed(4, 8), fixed(8), None, fixed(4, 8), fixed(4, 8)),
            *(1e-6, 0.0, "normed", False, False, False),
        ),
        r"norm_rope: the weights are torch\.float32 and None; they must be alike",
    ),
    (
        lambda: OPS.add_rms_norm(fixed(4, 8), fixed(8, 4).t(), fixed(8), 1e-6, 0.0, "normed"),
        "rms_norm: tensors that are added must be contiguous and of one shape",
    ),
    (
        lambda: OPS.add_rms_norm(fixed(4, 8), half(4, 8, grad=False), fixed(8), 1e-6, 0.0, "normed"),
        r"x is torch\.float32 and the residual torch\.bfloat16; they must be alike",
    ),
    (
        lambda: OPS.rms_norm_add(fixed(4, 8), half(4, 8, grad=False), fixed(8), 1e-6, 0.0, "normed"),
        r"the norm is torch\.float32 and the residual torch\.bfloat16; they must be alike",
    ),
    (
        lambda: OPS.rms_norm_backward_add([], fixed(4, 8), None, None, 1e-6, 0.0, "normed", False, False),
        r"dy is one to three tensors of a dtype, not \[\]",
    ),
    (lambda: ops.gated_rms_norm(some(4, 8), some(4, 1), some(8), 1e-6), r"gate has shape \(4, 1\), x needs \(4, 8\)"),
    (lambda: ops.gated_rms_norm(some(4, 8), some(4, 8), some(4), 1e-6), r"weight has shape \(4,\), x needs \[8\]"),
    (lambda: ops.gated_rms_norm(some(4, 8), some(4, 8), some(8), 1e-6, "gelu"), r"one of .*'sigmoid'.*, not 'gelu'"),
    (lambda: ops.gated_rms_norm(some(4, 8), some(4, 8), some(8), 1e-6, rounding="factor"), r"one of .*, not 'factor'"),
    (
        lambda: ops.gated_rms_norm(some(4, 8), some(4, 8), some(8), 1e-6, groups=[3, 3]),
        r"groups \[3, 3\] are not the 8",
    ),
    (lambda: ops.glu(some(4, 8), some(4, 7)), r"glu: gate \(4, 8\) and up \(4, 7\) must be of one shape"),
    (lambda: ops.glu(some(4, 8), some(4, 8), "mish"), r"activation is one of .*'silu'.*, not 'mish'"),
    (lambda: ops.glu(some(4, 8), some(4, 8), "relu", alpha=2.0), r"alpha is a factor of silu's .*, which 'relu'"),
    (lambda: ops.glu(some(4, 8), some(4, 8), limit=-1.0), r"limit is -1.0; clamping to \[1.0, -1.0\] leaves nothing"),
    (lambda: ops.packed_glu(some(4, 7)), r"packed_glu: the last dimension, 7, must be even"),
    (lambda: ops.packed_glu(some(4, 8), "mish"), r"activation is one of .*, not 'mish'"),
    (lambda: ops.rope(some(4, 8), fixed(4, 8), fixed(4, 6)), r"rope: cos .*\(4, 8\) and sin .*\(4, 6\) must be alike"),
    (lambda: ops.rope(some(4, 8), fixed(4, 8), half(4, 8, grad=False)), r"cos .*float32.* and sin .*bfloat16"),
    (lambda: ops.rope(some(4, 8), fixed(4, 5), fixed(4, 5)), r"cos has 5 components, which must be even"),
    (lambda: ops.rope(some(4, 8), fixed(4, 10), fixed(4, 10)), r"cos has 10 components, .* at most x's 8"),
    (lambda: ops.rope(some(4, 8), fixed(2, 4, 8), fixed(2, 4, 8)), r"cos \(2, 4, 8\) does not broadcast to x \(4, 8\)"),
    (lambda: ops.rope(some(1, 1, 1, 4, 8), fixed(4, 8), fixed(4, 8)), r"does not broadcast to x \(1, 1, 1, 4, 8\)"),
    (lambda: ops.rope(some(4, 8), fixed(4, 8), fixed(4, 8), layout="pairs"), r"layout is one of .*, not 'pairs'"),
    (lambda: ops.rope(some(4, 8), fixed(4, 8), fixed(4, 8), per_pair=True), r"cos has 16 components, .* at most x's 8"),
    (lambda: ops.complex_rope(some(4, 8), fixed(4, 4)), r"freqs is torch\.float32; it must be complex64"),
    (lambda: ops.rope(some(4, 8), some(4, 8), some(4, 8)), r"cos and sin are constants; detach them"),
    (lambda: ops.rope_pair(some(4, 8), some(4, 8), some(4, 8), fixed(4, 8)), r"cos and sin are constants"),
    (lambda: ops.linear_cross_entropy(some(4, 8), some(7, 9), None, Y), r"hidden \(4, 8\), weight \(7, 9\); needs"),
    (lambda: ops.linear_cross_entropy(some(2, 2, 8), some(7, 8), None, Y), r"hidden \(2, 2, 8\), .* needs \[N, H\]"),
    (lambda: ops.linear_cross_entropy(some(4, 8), half(7, 8), None, Y), r"float32, torch\.bfloat16\]; they must agree"),
    (lambda: ops.linear_cross_entropy(some(4, 8), some(7, 8), half(7), Y), r"bias are .*bfloat16\]; they must agree"),
    (lambda: ops.linear_cross_entropy(some(4, 8), some(7, 8), some(6), Y), r"bias has shape \(6,\), needs \[7\]"),
    (lambda: ops.linear_cross_entropy(some(4, 8), some(7, 8), None, Y[:3]), r"int64\(3,\), needs int64\[4\]"),
    (lambda: ops.linear_cross_entropy(some(4, 8), some(7, 8), None, Y.int()), r"target is torch\.int32.* needs int64"),
    (lambda: ops.linear_cross_entropy(fixed(4, 8), fixed(7, 8), None, Y, reduction="max"), r"one of .*, not 'max'"),
    (lambda: ops.linear_cross_entropy(fixed(4, 8), fixed(7, 8), None, Y, memory="little"), r"one of .*, not 'little'"),
    (lambda: ops.linear_cross_entropy(some(4, 8), some(7, 8), None, Y, label_smoothing=2.0), r"between 0 and 1, not 2"),
    (lambda: ops.linear_cross_entropy(some(4, 8), some(7, 8), None, Y, class_weight=some(7)), r"and no gradient"),
    (lambda: ops.linear_cross_entropy(some(4, 8), some(7, 8), None, Y, class_weight=fixed(6)), r"\(6,\), needs \[7\]"),
    (
        lambda: ops.linear_cross_entropy_sum(some(4, 8), some(7, 8), None, Y, fixed(5)),
        r"row_weight has shape \(5,\), needs 4 elements",
    ),
    (lambda: ops.linear_cross_entropy_sum(some(4, 8), some(7, 8), None, Y, some(4)), r"row_weight .*, and no gradient"),
    (
        lambda: ops.linear_cross_entropy(some(4, 8), some(7, 8), None, Y, class_weight=fixed(7), label_smoothing=0.1),
        r"class_weight and label_smoothing are not taken together",
    ),
    (lambda: ops.linear_cross_entropy_lse(some(4, 8), some(7, 8), None, Y, reduction="max"), r"one of .*, not 'max'"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=[f"{i}" for i in range(len(ERRORS))])
def test_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(ValueError, match=message), torch.device("meta"):  # the fakes refuse the same
        call()


@pytest.mark.parametrize("label", [7, -1, 10**6])
def test_label_out_of_range(label):
    """As eager: an IndexError that names the label."""
    h, w, y = some(4, 8), some(7, 8), torch.tensor([0, 1, -100, label])
    for function in (lambda: ops.linear_cross_entropy(h, w, None, y), lambda: F.cross_entropy(F.linear(h, w), y)):
        with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
            function()


def test_an_ignored_label_may_be_any_number():
    h, w = some(4, 8), some(7, 8)
    for ignored in (-1, 7, 10**6, 3):
        y = torch.tensor([0, 1, ignored, 6])
        eager = F.cross_entropy(F.linear(h, w), y, ignore_index=ignored)
        assert relative_error(ops.linear_cross_entropy(h, w, None, y, ignored).detach(), eager.detach()) < 1e-6


@pytest.mark.parametrize("rows", [0, 4, 40])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_label_counts(rows, reduction):
    """As eager: the mean of nothing is NaN, the sum is 0, and no gradient is NaN."""
    h, w, b = some(rows, 8), some(7, 8), some(7)
    y = torch.full((rows,), -100)
    loss = ops.linear_cross_entropy(h, w, b, y, reduction=reduction)
    eager = F.cross_entropy(F.linear(h, w, b), y, reduction=reduction)
    assert torch.equal(loss.isnan(), eager.isnan()) and loss.isnan() == (reduction == "mean")
    assert loss.isnan() or loss == 0
    for ours, theirs in zip(torch.autograd.grad(loss, (h, w, b)), torch.autograd.grad(eager, (h, w, b)), strict=True):
        assert torch.equal(ours, theirs) and not ours.any()


@pytest.mark.parametrize("rows", [16, 600], ids=["kept", "chunks"])
def test_logits_with_a_large_part_in_common(rows, small_chunks):
    """Embeddings of real models point one way. That part cancels, if a row's gradient sums to nothing."""
    accuracy = Accuracy()
    for _ in range(4):
        h, w, y = torch.randn(rows, 32) + 5, torch.randn(500, 32) * 0.3 + 0.5, torch.randint(500, (rows,))

        def gradients(loss, h, w):
            h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
            return torch.autograd.grad(loss(h, w), (h, w))

        def eager(h, w, y=y):
            return F.cross_entropy(F.linear(h, w), y)

        ours = gradients(lambda h, w, y=y: ops.linear_cross_entropy(h, w, None, y), h, w)
        both = gradients(eager, h, w), gradients(eager, h.double(), w.double())
        for name, o, e, x in zip(("dhidden", "dweight"), ours, *both, strict=True):
            accuracy.add(name, o, e, x)
    accuracy.check(rows=4 * rows)


# ---- what nobody needs is not computed -----------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """The ops of ours that run, with their arguments by name and their results."""

    def __enter__(self):
        self.seen = {}
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "liger_compile":
            names = [a.name for a in func._schema.arguments]
            self.seen[func._opname] = dict(zip(names, args, strict=False)), result
        return result


@pytest.mark.parametrize("rows", [4, 300], ids=["kept", "chunks"])
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden bias", "hidden weight bias", ""])
def test_loss_computes_only_the_gradients_of_what_is_trained(trained, rows, small_chunks):
    given = {"hidden": fixed(rows, 8), "weight": fixed(7, 8), "bias": fixed(7)}
    for name in trained.split():
        given[name].requires_grad_()
    y = labels(rows, 7)
    with Calls() as calls:
        loss = ops.linear_cross_entropy(*given.values(), y)
    args, (_, _, _, dlogits, *gradients) = calls.seen["linear_cross_entropy_forward"]
    kept = rows == 4 and "weight" in trained
    assert bool(args["keep"]) == kept and bool(dlogits.numel()) == kept
    for name, gradient in zip(given, gradients, strict=True):
        assert args[f"need_d{name}"] == (name in trained)
        assert bool(gradient.numel()) == (name in trained and not kept), name
    if trained:
        eager = F.cross_entropy(F.linear(*given.values()), y)
        wanted = [given[name] for name in trained.split()]
        for o, e in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(eager, wanted), strict=True):
            assert relative_error(o, e) < 1e-5
    else:
        assert not loss.requires_grad


def test_loss_without_gradients_at_all():
    h, w, y = some(4, 8), some(7, 8), labels(4, 7)
    with torch.no_grad(), Calls() as calls:
        loss = ops.linear_cross_entropy(h, w, None, y)
    args, results = calls.seen["linear_cross_entropy_forward"]
    assert not any(args[n] for n in ("need_dhidden", "need_dweight", "need_dbias", "keep"))
    assert not any(r.numel() for r in results[3:])
    assert relative_error(loss, F.cross_entropy(F.linear(h, w), y).detach()) < 1e-6


@pytest.mark.parametrize("weight", [None, fixed(8), some(8)], ids=["none", "frozen", "trained"])
def test_norm_computes_the_weights_gradient_only_if_it_is_trained(weight):
    x = some(4, 8)
    y = ops.rms_norm(x, weight, 1e-6)
    with Calls() as calls:
        y.sum().backward()
    args, (_, dweight) = calls.seen["rms_norm_backward"]
    trained = weight is not None and weight.requires_grad
    assert args["need_dweight"] == trained and bool(dweight.numel()) == trained
    assert x.grad is not None


def test_integers_have_no_gradient():
    h, w, y = some(4, 8), some(7, 8), labels(4, 7)
    loss = ops.linear_cross_entropy(h, w, None, y)
    assert [node is None for node, _ in loss.grad_fn.next_functions][:3] == [False, False, True]
    loss.backward()
    assert y.grad is None and h.grad is not None


# ---- beyond the first derivative -----------------------------------------------------------------------------------

C = fixed(5, 8)
TWICE = {
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-6), lambda: (some(5, 8), some(8))),
    "gated_rms_norm": (
        lambda x, g, w: ops.gated_rms_norm(x, g, w, 1e-6),
        lambda: (some(5, 8), some(5, 8), some(8)),
    ),
    "glu": (ops.glu, lambda: (some(5, 8), some(5, 8))),
    "packed_glu": (ops.packed_glu, lambda: (some(5, 8),)),
    "linear_cross_entropy": (lambda h, w: ops.linear_cross_entropy(h, w, None, Y), lambda: (some(4, 8), some(7, 8))),
    "linear_cross_entropy in chunks": (
        lambda h, w: ops.linear_cross_entropy(h, w, None, Y.repeat(10)),
        lambda: (some(40, 8), some(7, 8)),
    ),
}


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("power", [1, 2])
def test_second_derivative_is_an_error(name, power):
    """Not a zero: a penalty on gradients must not be dropped in silence."""
    function, operands = TWICE[name]
    operands = operands()
    loss = function(*operands).pow(power).sum()
    gradients = torch.autograd.grad(loss, operands, create_graph=True)
    penalty = sum(g.square().sum() for g in gradients)
    with pytest.raises(RuntimeError, match="no second derivative; compute this gradient without create_graph=True"):
        torch.autograd.grad(loss + penalty, operands)


def test_second_derivative_of_the_loss_with_a_frozen_side():
    for trained in range(2):
        operands = [fixed(4, 8), fixed(7, 8)]
        operands[trained].requires_grad_()
        loss = ops.linear_cross_entropy(*operands, None, Y)
        (gradient,) = torch.autograd.grad(loss, operands[trained], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            (loss + gradient.square().sum()).backward()


def test_create_graph_alone_gives_the_same_gradients():
    for function, operands in TWICE.values():
        made = operands()
        first = torch.autograd.grad(function(*made).sum(), made)
        second = torch.autograd.grad(function(*made).sum(), made, create_graph=True)
        assert all(map(torch.equal, first, second))


def test_a_rotation_is_linear():
    """Its gradient does not hang on x, so there is nothing to refuse until the incoming gradient needs one."""
    x = some(5, 8)
    (gradient,) = torch.autograd.grad(ops.rope(x, C, C).sum(), x, create_graph=True)
    assert not gradient.requires_grad
    (gradient,) = torch.autograd.grad(ops.rope(x, C, C).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rope_backward has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", TWICE)
def test_transforms_are_an_error(name):
    """torch.library's formulas do not work in torch.func; the graph rewriter leaves such regions alone."""
    function, operands = TWICE[name]
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda *args: function(*args).sum())(*(o.detach() for o in operands()))


def test_vmap_of_elementwise_ops():
    g, u = fixed(3, 4, 8), fixed(3, 4, 8)
    assert torch.equal(torch.vmap(ops.glu)(g, u), ops.glu(g, u))
    assert torch.equal(torch.vmap(lambda x: ops.rms_norm(x, None, 1e-6))(g), ops.rms_norm(g, None, 1e-6))


def test_inference_mode():
    with torch.inference_mode():
        h, w = torch.randn(4, 8), torch.randn(7, 8)
        eager = F.cross_entropy(F.linear(h, w), Y)
        assert relative_error(ops.linear_cross_entropy(h, w, None, Y), eager) < 1e-6
        assert ops.rms_norm(h, None, 1e-6).is_inference()


@pytest.mark.parametrize("name", sorted(op.name().partition("::")[2] for op in AS_GIVEN))
def test_under_autocast_the_ops_compute_as_they_are_given(name):
    """They say which dtypes they take; autocast around them changes nothing."""
    for sample in SAMPLES[name]:
        args, kwargs = sample()
        expected = flat(getattr(OPS, name)(*args, **kwargs))
        with torch.autocast("cpu", torch.bfloat16):
            results = flat(getattr(OPS, name)(*args, **kwargs))
        trained = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
        if any(r.requires_grad for r in expected):
            for found in (expected, results):
                sums = [r.sum() for r in found if r.requires_grad]
                found += torch.autograd.grad(sums, trained, allow_unused=True, materialize_grads=True)
        for result, other in zip(results, expected, strict=True):
            assert result.dtype is other.dtype and torch.equal(result, other)


def flat(results):
    return [r for r in (results if isinstance(results, (tuple, list)) else (results,)) if r is not None]
