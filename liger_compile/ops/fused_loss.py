"""Linear + cross-entropy in bfloat16 on Hopper: the ops behind `linear_cross_entropy` there.

`kernels/loss_rows.py` has the formulas. `fused_loss_and_gradients` goes through the rows in chunks and makes the
gradients at once, for row weights that are known. Where they are not, `fused_loss` keeps the exponentials of all rows,
and `fused_loss_backward` makes the logits' gradients of them, some columns at a time, and multiplies them. What packed
gradients still lack are the labels' terms: `whole_dhidden` and `whole_dweight` add them in the backward,
and multiply with the gradient of the loss, in float32, and round once.

Until then dweight is packed: float16 with a scale for each column, so that sums over chunks are rounded to 11 bits, but
for the rows of the most frequent labels, which are added in float32. A column's scale keeps it from overflow: no
logit's gradient is larger than its row's weight, so no sum is larger than the column's weighted sum of magnitudes in
hidden. It passes for bfloat16, the dtype of the result: Inductor then writes that over it.

There is no reference: on other devices `linear_cross_entropy` takes its other road. These ops run interpreted there.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import define, is_traced, once_differentiable
from .chunked_loss import TILE, empty_gradients, equal_chunks, tiled

LOSS_ROWS = 2048
"""Rows of a chunk where only the loss is wanted: they and as much of the weight stay in L2."""
SAMPLE = 128
"""Classes whose logits are computed beforehand, to know how large a row's logits are."""
FEW = 66
"""Blocks of dhidden, 128 x 256, with which half of an H100's multiprocessors are busy."""
SLAB_BYTES = 128 << 20
"""Of the logits' gradients, where the backward makes them."""
FREQUENT = 64
"""Labels whose rows of dweight are added in float32."""
LARGEST = 32768.0
"""Packed values are at most this, half of float16's range."""


def chunk_rows(n: int, width: int, classes: int, budget: int) -> int:
    """Rows of a chunk, of n rows in all, so that it takes at most `budget` bytes; chunks are about equal.

    A row takes 2 bytes for each class, and 4 for each 256 of them (sums); if there are fewer than FEW blocks of
    dhidden, these are made in parts, which take up to two bytes for each of their elements.
    """
    each = 2 * classes + 4 * -(-classes // 256)
    fit = budget // each // TILE * TILE
    if fit // TILE * -(-width // 256) < FEW:
        fit = (budget - 2 * 2 * FEW * TILE * 256) // each // TILE * TILE
    return equal_chunks(n, max(fit, TILE))


def _products() -> Any:
    return import_module("liger_compile.kernels.loss_products")


def _rows() -> Any:
    return import_module("liger_compile.kernels.loss_rows")


class _Order(NamedTuple):
    """The rows that count, by label, found without waiting for the device."""

    order: Tensor
    """int64 [N]: the row at each place; those that do not count come last."""
    label: Tensor
    """int32 [N]: its label, or -1."""
    total: Tensor
    """int32: how many count."""
    at: Tensor
    """int64 [N]: each row's place, or -1."""

    @classmethod
    def of(cls, target: Tensor, ignore_index: int) -> _Order:
        counted = target != ignore_index
        labels, order = torch.where(counted, target, torch.iinfo(torch.int64).max).sort(stable=True)
        total = counted.sum().to(torch.int32)
        places = torch.arange(target.shape[0], device=target.device)
        at = torch.empty_like(order).scatter_(0, order, places)
        label = torch.where(places < total, labels, -1).to(torch.int32)
        return cls(order, label, total, torch.where(counted, at, -1))

    def first_of(self, classes: int) -> Tensor:
        """int32 [classes]: the place of the first row of each label, or -1."""
        places = torch.arange(self.label.shape[0], device=self.label.device, dtype=torch.int32)
        found = torch.full((classes + 1,), -1, dtype=torch.int32, device=self.label.device)
        return found.scatter_(0, torch.where(self.starts(), self.label, classes).long(), places)[:classes]

    def starts(self) -> Tensor:
        """bool [N]: whether a place is the first of its label's."""
        return (self.label.diff(prepend=self.label.new_full((1,), -1)) != 0) & (self.label >= 0)

    def frequent(self) -> tuple[Tensor, Tensor]:
        """(int32 [FREQUENT]: the most frequent labels, -1 if there are fewer; int32 [N]: at the place of the first row
        of each, where it is among them; -1 elsewhere)."""
        n = self.label.shape[0]
        ascending = torch.where(self.label < 0, torch.iinfo(torch.int32).max, self.label)
        places = torch.arange(n, device=ascending.device)
        rows = torch.where(self.starts(), torch.searchsorted(ascending, ascending, right=True) - places, 0)
        keys = _largest(rows * n + places, min(FREQUENT, n))  # no two are equal: the same ones every run
        at = torch.where(keys >= n, keys % n, n)
        labels = F.pad(self.label, (0, 1), value=-1)[at]
        slot = torch.full((n + 1,), -1, dtype=torch.int32, device=ascending.device)
        slot[at] = torch.arange(at.shape[0], dtype=torch.int32, device=ascending.device)
        return F.pad(labels, (0, FREQUENT - at.shape[0]), value=-1), slot[:n]


def _largest(keys: Tensor, count: int, parts: int = 16) -> Tensor:
    """The largest of int64 [N] that are not negative, descending. Those of each part come first: `topk` has one block
    go through a row, and parts take half the time."""
    rows = F.pad(keys, (0, -keys.shape[0] % parts), value=-1).view(parts, -1)
    return rows.topk(min(count, rows.shape[1])).values.flatten().topk(count).values


def _guess(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The largest of a sample of each row's logits, float32 [N]."""
    step = max(weight.shape[0] // SAMPLE, 1)
    some = hidden @ weight[::step].t()
    return (some if bias is None else some + bias[::step]).amax(1).float()


def _largest_given(loss: _Loss, given: Tensor, squares: Tensor | None) -> Tensor:
    """What no logit's gradient is larger than: the gradients of rows' losses, and of the squares of their log-sum-exp,
    whose size is at most that of the largest logit plus log(classes)."""
    most = given.abs().max()
    if squares is None:
        return most
    logit = torch.full_like(most, loss.softcap)
    if not loss.softcap:
        lengths = (torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).max() for x in (loss.hidden, loss.weight))
        logit = math.prod(lengths) + (0 if loss.bias is None else loss.bias.abs().max().float())
        logit = logit * abs(loss.factor)
    return most + 2 * squares.abs().max() * (logit + math.log(loss.weight.shape[0]))


def _column_scales(hidden: Tensor, most: Tensor) -> Tensor:
    """Powers of two by which no sum of a column's magnitudes, weighted by at most so much, is above LARGEST."""
    sums = torch.linalg.vector_norm(hidden, 1, dim=0, dtype=torch.float32) * most
    return torch.exp2(torch.floor(torch.log2(LARGEST / torch.where(sums > 0, sums, 1.0))))


def _aligned(x: Tensor) -> Tensor:
    """x as the copy engine takes it: rows that are contiguous and begin at multiples of 16 bytes."""
    step = 16 // x.element_size()
    fits = x.stride(1) == 1 and x.stride(0) % step == 0 and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


class _Loss(NamedTuple):
    """What every chunk is computed from."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: _Order
    guess: Tensor
    factor: float
    softcap: float

    def fill(
        self,
        rows: Tensor,
        e: Tensor | None,
        n: int,
        first: int,
        given: Tensor,
        squares: Tensor | None,
        losses: Tensor,
        lse: Tensor,
        terms: Tensor,
    ) -> None:
        """E, losses, log-sum-exp and terms of the n rows from the place `first` on; `rows` is overwritten with them."""
        hidden, weight, bias, (order, label, total, _), guess, factor, softcap = self
        chosen, shift = _rows().gather(
            hidden, weight, bias, label, order, total, guess, factor, softcap, first, n, rows
        )
        sums = _products().exponentials(rows, weight, bias, label, shift, total, first, n, factor, softcap, e)
        _rows().finish(
            *(rows, weight, bias, label, order, total, chosen, shift, sums, given, squares),
            *(factor, softcap, first, e, losses, lse, terms),
        )


def _loss_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    factor: float,
    softcap: float,
) -> _Loss:
    rows = _Order.of(target, ignore_index)
    return _Loss(hidden, _aligned(weight), bias, rows, _guess(hidden, weight, bias), factor, softcap)


def _exponentials_of(n: int, weight: Tensor) -> Tensor:
    """E [n, classes], not written yet. The copy engine takes rows that begin at multiples of 16 bytes."""
    return weight.new_empty((n, -(-weight.shape[0] // 8) * 8))[:, : weight.shape[0]]


# ---- the loss, and what it keeps -----------------------------------------------------------------------------------


class Kept(NamedTuple):
    """Losses, and of what they were computed; only these where no gradient is wanted."""

    losses: Tensor
    """float32 [N], 0 where the label is ignored."""
    lse: Tensor
    """float32 [N]: log(sum_j exp(z_ij)), 0 where the label is ignored."""
    e: Tensor
    """[N, classes rounded up to 8], by place; rows that do not count are not written."""
    terms: Tensor
    """float32 [2, N], by place; see `kernels.loss_rows._finish`."""
    order: Tensor
    label: Tensor
    total: Tensor
    """As in `_Order`."""


def _loss_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    factor: float,
    softcap: float,
    keep: bool,
) -> Kept:
    n = hidden.shape[0] if keep else 0
    return Kept(
        losses=hidden.new_empty(hidden.shape[0], dtype=torch.float32),
        lse=hidden.new_empty(hidden.shape[0], dtype=torch.float32),
        e=hidden.new_empty((n, -(-weight.shape[0] // 8) * 8)),
        terms=hidden.new_empty((2, n), dtype=torch.float32),
        order=target.new_empty(n),
        label=target.new_empty(n, dtype=torch.int32),
        total=target.new_empty((), dtype=torch.int32),
    )


def _loss(*args: Any) -> Kept:
    *operands, keep = args
    made = _loss_fake(*args)
    for sums in (made.losses, made.lse, made.terms):
        sums.zero_()
    loss = _loss_of(*operands)
    n = made.losses.shape[0]
    size = tiled(n) if keep else min(tiled(n), LOSS_ROWS)
    e = _exponentials_of(size, loss.weight) if keep else None
    rows, given = loss.hidden.new_empty((min(size, n), loss.hidden.shape[1])), made.losses.new_ones(1)
    for first in range(0, n, size):
        loss.fill(rows[: n - first], e, size, first, given, None, made.losses, made.lse, made.terms)
    order, label, total, _ = loss.rows
    if e is None:
        return made._replace(total=total)
    return made._replace(e=e.as_strided(made.e.shape, made.e.stride()), order=order, label=label, total=total)


fused_loss = define(
    "fused_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int ignore_index, float factor,"
    f" float softcap, bool keep) -> ({', '.join(['Tensor'] * len(Kept._fields))})",
    _loss,
    _loss_fake,
    _loss,
)


# ---- the gradients of what was kept --------------------------------------------------------------------------------


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, _, *need = args[5:]
    return empty_gradients(hidden, weight, *need)


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    e, terms, order, label, total, hidden, weight, given, need_dhidden, need_dweight, need_dbias = args
    dhidden, dweight, dbias = _backward_fake(*args)
    (n, width), classes = hidden.shape, weight.shape[0]
    dhidden.zero_()  # rows that do not count
    if n == 0:
        return dhidden, dweight.zero_(), dbias.zero_()
    given, weight, ones = given.contiguous(), _aligned(weight), terms.new_ones(max(n, width))
    rows = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if need_dweight:
        _rows().weighted(hidden, order, total, ones, ones, 0, n, rows)
    x = None
    if need_dhidden:
        parts = _products().parts(n, width, hidden.device, beside=need_dweight)
        x = terms.new_empty((parts, tiled(n), width))
    size = max(SLAB_BYTES // (2 * n) // 256 * 256, 256)
    slab = hidden.new_empty((n, min(size, -(-classes // 8) * 8)))
    sums = terms.new_zeros(dbias.shape)
    for column in range(0, classes, size):
        part = slice(column, column + size)
        some = slab[:, : classes - column]
        _rows().dlogits(e, label, order, total, terms, given, column, some)
        if need_dhidden or need_dweight:
            to = dweight[part] if need_dweight else None
            _products().gradients(some, weight[part], rows, ones, total, 0, x, to, add_dhidden=column > 0)
        if need_dbias:
            _rows().column_sums(some, total, ones, 0, sums[part])
    if x is not None:
        _rows().summed(x, order, total, ones, 0, True, dhidden)
    return dhidden, dweight, dbias.copy_(sums)


fused_loss_backward = define(
    "fused_loss_backward(Tensor e, Tensor terms, Tensor order, Tensor label, Tensor total, Tensor hidden,"
    " Tensor weight, Tensor given, bool need_dhidden, bool need_dweight, bool need_dbias)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _backward,
)


# ---- the loss and packed gradients, in chunks ----------------------------------------------------------------------


class Packed(NamedTuple):
    """Gradients of a sum of losses, but for the labels' terms; those that nobody needs are empty."""

    losses: Tensor
    lse: Tensor
    """As in `Kept`."""
    dhidden: Tensor
    """[N, width], by place; rows that do not count have none, and are not written."""
    coefficient: Tensor
    """float32 [N], by place: dhidden lacks so much of its label's row of weight."""
    at: Tensor
    """int64 [N]: each row's place, or -1."""
    dweight: Tensor
    """Packed [classes, width]."""
    columns: Tensor
    """float32 [width]: what hidden's columns were multiplied with in it."""
    first: Tensor
    """int32 [classes]: the place of the first row of each label, or -1."""
    order: Tensor
    label: Tensor
    total: Tensor
    """As in `_Order`."""
    terms: Tensor
    """float32 [2, N], by place; see `kernels.loss_rows._finish`."""
    frequent: Tensor
    """float32 [FREQUENT, width]: rows of dweight that are not packed, those of the most frequent labels."""
    slot: Tensor
    """int32 [N]: at the place of the first row of such a label, its row of `frequent`; -1 elsewhere."""
    dbias: Tensor
    """float32 [classes], whole."""


def _packed_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    factor: float,
    softcap: float,
    given: Tensor,
    squares: Tensor | None,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
    budget: int,
) -> Packed:
    n, width = hidden.shape
    classes = weight.shape[0]
    n_if_dhidden, n_if_dweight = n if need_dhidden else 0, n if need_dweight else 0
    floats, integers = hidden.new_empty(n, dtype=torch.float32), target.new_empty(n, dtype=torch.int32)
    return Packed(
        losses=floats,
        lse=torch.empty_like(floats),
        dhidden=hidden.new_empty((n_if_dhidden, width)),
        coefficient=floats.new_empty(n_if_dhidden),
        at=target.new_empty(n_if_dhidden),
        dweight=hidden.new_empty((classes if need_dweight else 0, width)),
        columns=floats.new_empty(width if need_dweight else 0),
        first=integers.new_empty(classes if need_dweight else 0),
        order=target.new_empty(n_if_dweight),
        label=integers.new_empty(n_if_dweight),
        total=integers.new_empty(()),
        terms=floats.new_empty((2, n_if_dweight)),
        frequent=floats.new_empty((FREQUENT if need_dweight else 0, width)),
        slot=integers.new_empty(n_if_dweight),
        dbias=floats.new_empty(classes if need_dbias else 0),
    )


def _packed(*args: Any) -> Packed:
    *operands, given, squares, need_dhidden, need_dweight, need_dbias, budget = args
    given = given.contiguous()  # an expanded number, where the losses were summed
    made = _packed_fake(*args)
    for sums in (made.losses, made.lse, made.dbias, made.frequent):
        sums.zero_()
    loss = _loss_of(*operands)
    hidden, weight, (order, label, total, at) = loss.hidden, loss.weight, loss.rows
    n, width = hidden.shape
    if n == 0:
        made.first.fill_(-1)
        return made._replace(dweight=made.dweight.zero_(), columns=made.columns.fill_(1), total=total)
    columns = _column_scales(hidden, _largest_given(loss, given, squares)) if need_dweight else made.columns
    frequent, slot = loss.rows.frequent() if need_dweight else (None, made.slot)
    terms, one = made.losses.new_zeros((2, n)), given.new_ones(1)
    scale = terms[1]
    size, e = _allocated(chunk_rows(n, width, weight.shape[0], budget), weight)
    packed = made.dweight.view(torch.float16) if need_dweight else None
    parts = _products().parts(min(n, size), width, hidden.device, beside=need_dweight)
    for first in range(0, n, size):
        own, after = made.dhidden[first : first + size], made.dhidden[first + size : first + 2 * size]
        rows, x = own, own.unsqueeze(0)
        if not need_dhidden:
            rows, x = hidden.new_empty((min(size, n - first), width)), None
        elif parts > 1:
            x = hidden.new_empty((parts, size, width))
        elif after.shape[0] == size:
            rows = after  # so that dhidden can be written while dweight is made of the rows
        loss.fill(rows, e, size, first, given, squares, made.losses, made.lse, terms)
        if need_dweight:
            _rows().weighted(hidden, order, total, scale, columns, first, size, rows)
            _rows().add_columns(e, frequent, rows, total, first, made.frequent)
        chunk = e, weight, rows, scale, total, first
        if x is not None and need_dweight and x.data_ptr() == rows.data_ptr():
            _products().gradients(*chunk, None, packed, add_dweight=first > 0)
            _products().gradients(*chunk, x, None)
        elif need_dhidden or need_dweight:
            _products().gradients(*chunk, x, packed, add_dweight=first > 0)
        if parts > 1 and x is not None:
            _rows().summed(x, order, total, one, first, False, own)
        if need_dbias:
            _rows().column_sums(e, total, scale, first, made.dbias)
    counted = torch.arange(n, device=total.device) < total
    of_label = torch.where(counted, terms[0], 0)
    if need_dbias:
        made.dbias.index_put_((label.clamp(min=0).long(),), of_label, accumulate=True)
    if need_dhidden:
        made = made._replace(coefficient=of_label, at=at)
    if need_dweight:
        # Their rows are in made.frequent. Where there are fewer labels, the first one's is filled again.
        packed.index_fill_(0, torch.where(frequent < 0, frequent[0].clamp(min=0), frequent).long(), 0)
        first = loss.rows.first_of(weight.shape[0])
        made = made._replace(columns=columns, first=first, order=order, label=label, terms=terms, slot=slot)
    return made._replace(total=total)


def _allocated(size: int, weight: Tensor) -> tuple[int, Tensor]:
    """E of `size` rows, or of fewer if the device has no more memory."""
    while True:
        try:
            return size, _exponentials_of(size, weight)
        except torch.OutOfMemoryError:
            if size <= TILE:
                raise
            size = tiled(size // 2)


fused_loss_and_gradients = define(
    "fused_loss_and_gradients(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int ignore_index,"
    " float factor, float softcap, Tensor given, Tensor? squares, bool need_dhidden, bool need_dweight,"
    " bool need_dbias, int budget)"
    f" -> ({', '.join(['Tensor'] * len(Packed._fields))})",
    _packed,
    _packed_fake,
    _packed,
)


# ---- packed gradients made whole -----------------------------------------------------------------------------------


def _sums_fake(hidden: Tensor, *_: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape, dtype=torch.float32)


def _sums(*args: Any) -> Tensor:
    return _rows().label_sums(*args)


label_sums = define(
    "label_sums(Tensor hidden, Tensor label, Tensor order, Tensor total, Tensor terms, Tensor columns, Tensor slot,"
    " Tensor frequent) -> Tensor",
    _sums,
    _sums_fake,
    _sums,
)

for _op in (fused_loss, fused_loss_backward, fused_loss_and_gradients, label_sums):
    once_differentiable(_op)


def _runs_now(x: Tensor) -> bool:
    """Whether x has values, on CUDA. A compiler that traces is shown plain torch instead of a kernel: it fuses that."""
    return not is_traced(x) and x.is_cuda


def whole_dhidden(
    part: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor, at: Tensor, scale: Tensor
) -> Tensor:
    """(part[at] + coefficient[at] * weight[target]) * scale, 0 where `at` is negative.

    What is looked up hangs on the scale, so that it is looked up in the backward: in the forward it would be kept.
    """
    if _runs_now(part):
        out = torch.empty_like(part)
        _rows().whole_dhidden(part, weight, target, coefficient, at, scale, out)
        return out
    counted = at >= 0
    wanted = counted & (scale == scale)
    at, label = torch.where(wanted, at, 0), torch.where(wanted, target, 0)
    x = part[at].float() + coefficient[at].unsqueeze(1) * weight[label].float()
    return torch.where(counted.unsqueeze(1), x * scale, 0).to(part.dtype)


def whole_dweight(packed: Tensor, columns: Tensor, sums: Tensor, first: Tensor, scale: Tensor) -> Tensor:
    """(packed / columns + sums[first], where that is not negative) * scale.

    The sign is changed where the scale is NaN, which changes nothing, so that reading the bits hangs on the gradient:
    read in the forward, they would be kept there as float16, and not be written over.
    """
    if _runs_now(packed):
        out = torch.empty_like(packed)
        _rows().whole_dweight(packed.view(torch.float16), columns, sums, first, scale, out)
        return out
    x = torch.where(scale == scale, packed, -packed).view(torch.float16).float() / columns
    if sums.shape[0]:
        x = x + torch.where((first >= 0).unsqueeze(1), sums[first.clamp(min=0)], 0)
    return (x * scale).to(packed.dtype)


def gradients(
    made: Packed, dloss: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dhidden, dweight, dbias), those that are needed, times dloss, a float32 scalar."""
    need_dhidden, need_dweight, need_dbias = need
    dhidden = dweight = dbias = None
    if need_dhidden:
        dhidden = whole_dhidden(made.dhidden, weight, target, made.coefficient, made.at, dloss)
    if need_dweight:
        of_labels = made.label, made.order, made.total, made.terms, made.columns, made.slot, made.frequent
        sums = label_sums(hidden, *of_labels)
        dweight = whole_dweight(made.dweight, made.columns, sums, made.first, dloss)
    if need_dbias:
        dbias = (made.dbias * dloss).to(hidden.dtype)
    return dhidden, dweight, dbias
