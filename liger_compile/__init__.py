"""torch.compile(model, backend="liger"): hand-written Triton kernels for any model, found by matching its maths.

The backend needs no import: installing the package registers it with torch. What is here is for looking at what it does
(`explain`, `rewrite`), for finding what is wrong (`bisect`), and for adding to it (`pattern`, `register_pattern`,
`make_pattern`, `registered`, `unregister_pattern`).
"""

from .explain import explain
from .fuel import bisect
from .options import Options
from .registry import make_pattern, pattern, register_pattern, registered, unregister_pattern
from .report import Report
from .rewrite import rewrite
from .terms import PatternError
from .verify import VerificationError

__all__ = [
    "Options",
    "PatternError",
    "Report",
    "VerificationError",
    "bisect",
    "explain",
    "make_pattern",
    "pattern",
    "register_pattern",
    "registered",
    "rewrite",
    "unregister_pattern",
]
__version__ = "0.1.0"
