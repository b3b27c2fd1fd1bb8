"""Trying patterns on their examples, on tensors without data: no computation, only shapes, dtypes and strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _torch
from .emit import arguments, same_layout
from .pattern import Pattern, Spelling, name_of, where
from .terms import PatternError

DTYPES = (torch.float32, torch.bfloat16)
"""With float32 alone, a fake that says float32 whatever it is given would pass."""
ROWS = 5


class Make:
    """The tensor factory that `examples` are given."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device) -> None:
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int) -> Tensor:
        """Values that need a gradient."""
        return self.constant(*shape).requires_grad_()

    def constant(self, *shape: int) -> Tensor:
        """Values that need none."""
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Whole numbers in [0, high)."""
        return torch.randint(high, shape, device=self.device)


def check_results(pattern: Pattern, device: str | torch.device | None = None) -> None:
    """Compares what the replacement promises with what the pattern's function gives, on the pattern's examples.

    Args:
        pattern: one with `examples`.
        device: of the operands; CUDA if there is one, else the CPU.

    Raises:
        PatternError: a result differs in shape, dtype, device or strides, or the replacement has no fake.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _torch.fake_mode(), torch.no_grad():
        for spelling in pattern.spellings:
            unfit: list[Exception] = []
            if not sum(_try(spelling, Make(dtype, device), unfit) for dtype in DTYPES):
                why = f"{type(unfit[0]).__name__}: {unfit[0]}" if unfit else "there are none"
                raise PatternError(
                    f"{where(pattern.function)}: none of its examples can be computed by it: {why}; yield operands "
                    "that fit, or leave out examples="
                )


def _try(spelling: Spelling, make: Make, unfit: list[Exception]) -> int:
    """Compares on each example of one dtype that the function can compute; returns how many, notes what others raise.

    Several patterns may share one `examples`, so that some are for others.
    """
    function, compared = spelling.pattern.function, 0
    for i, operands in enumerate(_operands(spelling, make)):
        try:
            expected = _tuple(function(*operands.values(), **spelling.choice))
        except Exception as error:
            unfit.append(error)
            continue
        at = f"on its example {i} in {str(make.dtype).removeprefix('torch.')}"
        _compare(spelling, _results(spelling, operands, at), expected, at)
        compared += 1
    return compared


def _operands(spelling: Spelling, make: Make) -> list[dict[str, Any]]:
    """The operands of a spelling in each of its pattern's examples."""
    place = where(spelling.pattern.function)
    try:
        examples = list(spelling.pattern.examples(make, ROWS))
    except Exception as error:
        raise PatternError(
            f"{place}: examples(make, rows) raises {type(error).__name__}: {error}; it is given a tensor factory "
            "make(*shape) and a number of rows, and yields dictionaries of operands by name"
        ) from error
    for example in examples:
        missing = [n for n in spelling.variables if not isinstance(example, dict) or n not in example]
        if missing:
            raise PatternError(
                f"{place}: an example lacks the operand {missing[0]!r}; yield dictionaries of all operands by name"
            )
    return [{n: example[n] for n in spelling.variables} for example in examples]


def _results(spelling: Spelling, operands: dict[str, Any], at: str) -> tuple[Any, ...]:
    target, given = arguments(spelling, operands)
    try:
        return _tuple(target(**given))
    except Exception as error:
        raise PatternError(
            f"{where(spelling.pattern.function)}: the replacement {name_of(target)} cannot be run {at}, on tensors "
            f"without data, as compilation does: {type(error).__name__}: {error}; give the op a fake that takes these "
            "operands (register_fake), or wrap a kernel in torch.library.custom_op or triton_op"
        ) from error


def _compare(spelling: Spelling, results: tuple[Any, ...], expected: tuple[Any, ...], at: str) -> None:
    target, _ = arguments(spelling, {})
    place = f"{where(spelling.pattern.function)}: the replacement {name_of(target)}"
    says = "its fake says" if isinstance(target, torch._ops.OpOverload) else "it gives"
    change = "correct its fake (register_fake), or what it returns"
    if len(results) != len(expected):
        raise PatternError(
            f"{place} has another number of results {at}: {says} {len(results)}, the pattern's function gives "
            f"{len(expected)}; return what the function returns"
        )
    for i, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
        if not isinstance(ours, Tensor):
            raise PatternError(f"{place}: result {i} is {ours!r} {at}; return tensors")
        for what, (read, agree) in _PROPERTIES.items():
            if not agree(ours, theirs):
                raise PatternError(
                    f"{place}: result {i} has another {what} {at}: {says} {read(ours)}, the pattern's function gives "
                    f"{read(theirs)}; {change}"
                )


_PROPERTIES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor, Tensor], bool]]] = {
    "shape": (lambda t: tuple(t.shape), lambda ours, theirs: ours.shape == theirs.shape),
    # a wider dtype is rounded behind the replacement
    "dtype": (lambda t: t.dtype, lambda ours, theirs: torch.promote_types(ours.dtype, theirs.dtype) is ours.dtype),
    "device": (lambda t: t.device, lambda ours, theirs: ours.device == theirs.device),
    "layout": (lambda t: f"strides {t.stride()}", same_layout),
}
"""What is compared: how it is told, and when two results agree."""


def _tuple(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)
