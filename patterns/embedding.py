"""A table of token embeddings, for the sake of its gradient."""

import torch.nn.functional as F

from liger_compile import ops
from liger_compile.match import Match
from liger_compile.registry import pattern

LEAST = 1 << 24
"""Elements of a table from which on sorting the tokens costs less than a float32 table of that size."""


def check(match: Match) -> str | dict:
    classes, width = match.shape("weight")
    if not isinstance(classes, int) or not isinstance(width, int) or classes * width < LEAST:
        return f"the table [{classes}, {width}] is small: Inductor's own gradient is as good below {LEAST} elements"
    padding = match.captures.get("padding_idx")
    return {"padding_idx": -1 if padding is None else padding % classes}


def examples(make, rows):
    ids = make.integers(50, rows)
    yield {"ids": ids.view(1, rows), "weight": make(50, 24), "padding_idx": 7}


@pattern(replace=ops.embedding, check=check, name="embedding", examples=examples)
def lookup(ids, weight):
    return F.embedding(ids, weight)


@pattern(replace=ops.embedding, check=check, name="embedding", examples=examples)
def padded(ids, weight, padding_idx):
    return F.embedding(ids, weight, padding_idx)
