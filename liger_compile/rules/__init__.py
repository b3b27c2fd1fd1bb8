"""The canonical form of each call, as a table of small functions.

A rule is named after the operation, takes the call's arguments as torch does, and returns a Term, or a tuple of Terms
for calls with several results. Equations are in the comments: `left -> right` reads "left is written as right".
Rules only look at values; no graph is changed by them.
"""

from . import arithmetic, casts, indexing, joins, layers, losses, views  # noqa: F401  (each adds its rules)
from .arithmetic import mul
from .base import RULES, Call, NotCanonical, negated, widens
from .losses import is_arange
from .sums import leads_to_rows

__all__ = ["RULES", "Call", "NotCanonical", "is_arange", "leads_to_rows", "mul", "negated", "widens"]
