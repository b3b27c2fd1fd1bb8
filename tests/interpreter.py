"""What Triton's interpreter lacks: products of bfloat16, and adding through a tensor descriptor."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _as_float32(x: TensorHandle) -> TensorHandle:
    """The interpreter holds bfloat16 as the upper halves of float32."""
    if x.dtype.scalar is not tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _dot(self, a, b, d, *rest, plain=InterpreterBuilder.create_dot):
    return plain(self, _as_float32(a), _as_float32(b), d, *rest)


def _reduce(self, kind, desc, value, indices):
    old = self.create_descriptor_load(desc, indices, None, None)
    self.create_descriptor_store(desc, TensorHandle(old.data + value.data, value.dtype.scalar), indices)


def complete() -> None:
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.create_descriptor_reduce = _reduce
