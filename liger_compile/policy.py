"""What a rewrite may keep in memory for the backward."""

from __future__ import annotations

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy


def tag(node: fx.Node, recompute: bool) -> None:
    """Marks a replacement whose result the backward computes again instead of keeping.

    The partitioner never recomputes a custom op of its own accord, so without the mark an op could keep a result that
    Inductor would have recomputed. In a checkpointed region the user's own policy overwrites the mark.
    """
    if recompute:
        node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
