"""The operations that replace matched code: functional `torch.library` ops, one file each.

Each has a fake implementation, a registered autograd formula, Triton kernels on CUDA and a reference in plain torch on
every other device. They can also be called directly: `liger_compile.ops.rms_norm(x, weight, 1e-6)`.
"""

from . import norm_rope as _norm_rope  # noqa: F401  (for `fuse.py`)
from .embedding import embedding
from .gated_rms_norm import gated_rms_norm
from .glu import glu, packed_glu
from .linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_lse,
    linear_cross_entropy_rows,
    linear_cross_entropy_sum,
    linear_cross_entropy_z,
)
from .masked_attention import masked_attention
from .rms_norm import rms_norm
from .rope import complex_rope, complex_rope_pair, rope, rope_pair

__all__ = [
    "complex_rope",
    "complex_rope_pair",
    "embedding",
    "gated_rms_norm",
    "glu",
    "linear_cross_entropy",
    "linear_cross_entropy_lse",
    "linear_cross_entropy_rows",
    "linear_cross_entropy_sum",
    "linear_cross_entropy_z",
    "masked_attention",
    "packed_glu",
    "rms_norm",
    "rope",
    "rope_pair",
]
