"""What a rewrite may keep in memory for the backward."""

from __future__ import annotations

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

WANTED = {"speed": (), "balanced": (True,), "lean": (True, "lean")}
"""Of patterns, by the policy, which `recompute` has its result computed again."""


def tag(node: fx.Node, recompute: bool | str, memory: str) -> None:
    """Marks a replacement whose result the backward computes again instead of keeping: by `liger.memory`, none
    ("speed"), those whose pattern says so ("balanced"), or those too whose pattern says "lean".

    The partitioner never recomputes a custom op of its own accord, so without the mark an op could keep a result that
    Inductor would have recomputed. In a checkpointed region the user's own policy overwrites the mark.
    """
    if recompute in WANTED[memory]:
        node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
