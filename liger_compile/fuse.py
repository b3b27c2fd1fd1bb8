"""Our ops and their neighbours in one: a norm with the residual sum beside it, a gradient with what is made again.

This happens in the ATen graphs that AOTAutograd has split into forward and backward, before Inductor compiles them.
What the backward keeps is settled there, so that a fusion cannot change it: matched before, a sum and its norm would be
one op, which the partitioner could only keep or compute again as a whole. Also, every spelling has become one of our
ops by then, so that a rule is about two or three nodes, whatever the model looks like.

A fusion is made where it saves reads and writes of memory: what it takes is in memory anyway.
"""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from . import _torch, ops  # noqa: F401  (defines the ops)

aten, ours = torch.ops.aten, torch.ops.liger_compile
VIEWS = {
    *(aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.permute.default, aten.t.default),
    *(aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor),
}
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}

Rule = Callable[[fx.Node], bool]
RULES: list[tuple[str, Any, Rule]] = []
"""(what is fused, the op that it is looked for at, the function that fuses it there), in the order they are tried."""


def rule(name: str, *targets: Any) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        RULES.extend((name, target, function) for target in targets)
        return function

    return add


def fuse(graph: fx.Graph) -> collections.Counter[str]:
    """Fuses what it can in an ATen graph whose nodes have their values in `meta["val"]`; how often, by name."""
    made: collections.Counter[str] = collections.Counter()
    for name, target, apply in RULES:
        for node in graph.find_nodes(op="call_function", target=target):
            made[name] += apply(node)
    return +made


# ---- reading ------------------------------------------------------------------------------------------------------


def value_of(node: fx.Node) -> Any:
    return node.meta["val"]


def _operands(node: fx.Node) -> dict[str, Any]:
    """A call's operands by name, with defaults."""
    schema = node.target._schema.arguments
    given = dict(zip([a.name for a in schema], node.args, strict=False))
    return {a.name: given.get(a.name, node.kwargs.get(a.name, a.default_value)) for a in schema}


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _result(node: fx.Node, index: int) -> fx.Node | None:
    """The node that takes one of several results, if there is just one."""
    found = [u for u in node.users if u.target is operator.getitem and u.args[1] == index]
    return found[0] if len(found) == 1 else None


def _is_ours(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "liger_compile"


def _in_memory(node: fx.Node) -> bool:
    """Whether a value is written out whatever becomes of it: Inductor does not see into what makes or takes it."""
    source = node
    while source.target in VIEWS:
        source = source.args[0]
    made = source.op == "placeholder" or source.target is operator.getitem or source.target in PRODUCTS
    return made or any(map(_is_ours, (source, *node.users)))


def _operands_of_sum(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The two operands of a sum of tensors of one shape and dtype."""
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor or node.kwargs:
        return None
    if not all(isinstance(a, fx.Node) and isinstance(value_of(a), torch.Tensor) for a in node.args):
        return None
    total = value_of(node)
    alike = all(v.dtype == total.dtype and _torch.same_sizes(v.shape, total.shape) for v in map(value_of, node.args))
    return node.args if alike else None


def _terms(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The two different operands of such a sum, if both are in memory."""
    operands = _operands_of_sum(node)
    if operands is None or operands[0] is operands[1] or not all(map(_in_memory, operands)):
        return None
    return operands


def _summands(node: fx.Node, user: fx.Node, most: int) -> tuple[list[fx.Node], list[fx.Node]]:
    """(values in memory whose sum a node is, at most so many; the sums), if `user` alone takes it; else the node."""
    operands = _operands_of_sum(node)
    if operands is None or most < 2 or len(node.users) > 1 or node not in user.all_input_nodes:
        return [node], []
    first, sums = _summands(operands[0], node, most - 1)
    rest, more = _summands(operands[1], node, most - len(first))
    if not all(map(_in_memory, (*first, *rest))):
        return [node], []
    return [*first, *rest], [*sums, *more, node]


# ---- writing ------------------------------------------------------------------------------------------------------


def _depend(nodes: list[fx.Node], on: list[fx.Node]) -> bool:
    """Whether any of the nodes is computed from one of `on`."""
    first, targets, seen = min(on), set(on), set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node in targets:
            return True
        if node not in seen and first < node:
            seen.add(node)
            todo += node.all_input_nodes
    return False


def _is_alike(value: Any, other: Any) -> bool:
    """Whether one tensor can stand for another, for all who read it."""
    alike = value.dtype == other.dtype and _torch.same_sizes(value.shape, other.shape)
    return alike and _torch.same_sizes(value.stride(), other.stride())


def _run(call: fx.Node) -> Any:
    """The value of a new call; None if its op does not take these operands."""
    try:
        return _torch.run_on_fakes(call, value_of)
    except ValueError:
        return None


def _merge(replaced: list[fx.Node], target: Any, args: tuple[Any, ...], results: dict[fx.Node, int | None]) -> bool:
    """One call in place of several nodes; `results` says which of its results each node's value is, None the only one.

    Nothing is changed if the operands hang on what is replaced, if the op refuses them, or if a result would have
    another dtype or layout than it had.
    """
    start, last = min(replaced).prev, max(replaced)
    graph = last.graph
    with graph.inserting_before(last):
        call = graph.call_function(target, args)
    value = None if _depend(call.all_input_nodes, replaced) else _run(call)
    if value is None or not all(
        _is_alike(value if index is None else value[index], value_of(node)) for node, index in results.items()
    ):
        graph.erase_node(call)
        return False
    call.meta = {**last.meta, "val": value, **_torch.promised_inputs(call, value_of)}
    made = [call]
    for node, index in results.items():
        result = call
        if index is not None:
            with graph.inserting_after(made[-1]):
                result = graph.call_function(operator.getitem, (call, index))
            result.meta = {**node.meta, "val": value[index]}
            made.append(result)
        node.replace_all_uses_with(result)
    for node in sorted(replaced, reverse=True):
        graph.erase_node(node)
    _sink(start, made)
    return True


def _sink(start: fx.Node, made: list[fx.Node]) -> None:
    """Moves nodes behind `start` that use what was made further down to behind it, in their order."""
    moved, last = set(made), made[-1]
    node = start.next
    while node is not made[0]:
        after = node.next
        if any(n in moved for n in node.all_input_nodes):
            last.append(node)
            moved.add(node)
            last = node
        node = after


def _by_mean(norm: dict[str, Any]) -> bool:
    """Whether a norm is by sqrt(mean(x^2) + eps), as the kernels that have more to do know it."""
    return norm["guard"] == "add" and norm["divisor"] is None


# ---- a residual sum and a norm ------------------------------------------------------------------------------------


@rule("RMSNorm + residual", ours.rms_norm_forward.default)
def _norm_then_add(norm: fx.Node) -> bool:
    """residual + norm(x), of which the norm is used nowhere else."""
    total = _only_user(norm)
    terms = _terms(total)
    if terms is None:
        return False
    residual = terms[1] if terms[0] is norm else terms[0]
    o = _operands(norm)
    if not _by_mean(o):
        return False
    args = (o["x"], residual, o["weight"], o["eps"], o["offset"], o["rounding"])
    return _merge([norm, total], ours.rms_norm_add.default, args, {total: None})


@rule("residual + RMSNorm", ours.rms_norm_forward.default)
def _add_then_norm(norm: fx.Node) -> bool:
    """norm(x + residual), and the sum."""
    o = _operands(norm)
    total = o["x"]
    terms = _terms(total)
    if terms is None or not _by_mean(o):
        return False
    args = (*terms, o["weight"], o["eps"], o["offset"], o["rounding"])
    return _merge([total, norm], ours.add_rms_norm.default, args, {norm: 0, total: 1})


@rule("RMSNorm's gradient + its neighbours", ours.rms_norm_backward.default)
def _gradient(backward: fx.Node) -> bool:
    """The gradient of a norm, the sum that it takes, the sum that takes it, and the norm that is made again."""
    o = _operands(backward)
    dx, dweight = _result(backward, 0), _result(backward, 1)
    if dx is None or not _by_mean(o) or len(backward.users) > (dweight is not None) + 1:
        return False
    dys, sums = _summands(o["dy"], backward, 3)
    replaced, total, dresidual = [backward, *backward.users, *sums], dx, None
    after = _only_user(dx)
    terms = _terms(after)
    if terms is not None:
        total, dresidual = after, terms[1] if terms[0] is dx else terms[0]
        replaced.append(after)
    results = {total: 0} if dweight is None else {total: 0, dweight: 1}
    how = [o[name] for name in ("eps", "offset", "rounding", "need_dweight")]
    forward = _made_again(backward, "x", ours.rms_norm_forward.default)
    target = ours.rms_norm_backward_add.default
    args = (dys, o["x"], o["weight"], dresidual, *how)
    if forward is not None and _merge([*replaced, forward], target, (*args, True), {**results, forward: 2}):
        return True
    return len(replaced) > 1 + len(backward.users) and _merge(replaced, target, (*args, False), results)


def _made_again(backward: fx.Node, operand: str, forward: Any) -> fx.Node | None:
    """The forward op of the operands of a backward op, in the same graph."""
    wanted = _operands(backward)
    for node in wanted[operand].users:
        if node.target is forward and all(wanted[name] == value for name, value in _operands(node).items()):
            return node
    return None


# ---- a gated unit -------------------------------------------------------------------------------------------------


@rule("GLU's gradient + its product", ours.glu_backward.default, ours.packed_glu_backward.default)
def _gradient_and_product(backward: fx.Node) -> bool:
    """The gradient of a gated unit, and its product, which the backward makes again for the weights behind it."""
    packed = backward.target is ours.packed_glu_backward.default
    forward = ours.packed_glu_forward.default if packed else ours.glu_forward.default
    product = _made_again(backward, "x" if packed else "gate", forward)
    if product is None:
        return False
    args = tuple({**_operands(backward), "again": True}.values())
    results = {user: user.args[1] for user in backward.users}
    return _merge([backward, product, *results], backward.target, args, {**results, product: 1 if packed else 2})


# ---- a norm of each head, and its rotation ------------------------------------------------------------------------


def _call(before: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A new node in front of another, with its value."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args)
    node.meta = {**before.meta, "val": _torch.run_on_fakes(node, value_of), **_torch.promised_inputs(node, value_of)}
    return node


def _dims(node: fx.Node) -> list[int] | None:
    """How a node permutes its operand, if the last dimension stays the last."""
    if node.target is not aten.permute.default:
        return None
    dims = [d % len(node.args[1]) for d in node.args[1]]
    return dims if dims[-1] == len(dims) - 1 else None


def _norm_of(node: fx.Node) -> fx.Node | None:
    """The norm that a node is, if it is used once. A permutation of it is made one of what it takes."""
    norm = node.args[0] if _dims(node) is not None else node
    if norm.target is not ours.rms_norm_forward.default or len(norm.users) > 1 or len(node.users) > 1:
        return None
    if not _by_mean(_operands(norm)):
        return None
    if norm is node:
        return norm
    o = _operands(norm)
    moved = _call(norm, norm.target, _call(norm, aten.permute.default, o.pop("x"), _dims(node)), *o.values())
    if not _is_alike(value_of(moved), value_of(node)):
        return None  # what was made is used nowhere, so Inductor drops it
    node.replace_all_uses_with(moved)
    node.graph.erase_node(node)
    node.graph.erase_node(norm)
    return moved


def _norm_gradient_of(node: fx.Node | None) -> fx.Node | None:
    """The gradient of a norm that is made of a node, its only use. A permutation of that is made one of the result."""
    user = None if node is None else _only_user(node)
    dims = None if user is None else _dims(user)
    backward = user if dims is None else _only_user(user)
    if backward is None or backward.target is not ours.rms_norm_backward.default:
        return None
    o = _operands(backward)
    if o.pop("dy") is not (node if dims is None else user) or _result(backward, 0) is None or not _by_mean(o):
        return None
    if dims is None:
        return backward
    x = _call(backward, aten.permute.default, o.pop("x"), [dims.index(d) for d in range(len(dims))])
    moved = _call(backward, backward.target, node, x, *o.values())
    dx = _call(backward, aten.permute.default, _call(backward, operator.getitem, moved, 0), dims)
    if not _is_alike(value_of(dx), value_of(_result(backward, 0))):
        return None
    dweight = _call(backward, operator.getitem, moved, 1)
    for result in list(backward.users):
        result.replace_all_uses_with(dweight if result.args[1] else dx)
        node.graph.erase_node(result)
    for old in (backward, user):
        node.graph.erase_node(old)
    return moved


def _how(norm: fx.Node) -> list[Any]:
    """What two norms, or their gradients, must have in common to be made in one."""
    operands = _operands(norm)
    weight = operands.pop("weight")
    rest = [value for name, value in operands.items() if name not in ("dy", "x")]
    return [None if weight is None else value_of(weight).dtype, *rest]


def _of_halves(rope: dict[str, Any]) -> bool:
    """Whether a rotation is the one that `norm_rope` knows."""
    return rope["layout"] == "halves" and not rope["inverse"] and not rope["per_pair"]


@rule("RMSNorm + RoPE", ours.rope_pair_forward.default, ours.rope_forward.default)
def _norm_then_rotate(rope: fx.Node) -> bool:
    """Rotations of norms that are used nowhere else."""
    o = _operands(rope)
    if not _of_halves(o):
        return False
    norms = [_norm_of(o[name]) for name in ("q", "k", "x") if name in o]
    if None in norms or _how(norms[0]) != _how(norms[-1]):
        return False
    (xs, weights), first = _columns(norms, 2), _operands(norms[0])
    how = first["eps"], first["offset"], first["rounding"]
    args = (*xs, *weights, o["cos"], o["sin"], *how, o["upcast"], o["promote"], o["contiguous"])
    results = {u: u.args[1] for u in rope.users} if "q" in o else {rope: 0}
    return _merge([*norms, *dict.fromkeys([rope, *results])], ours.norm_rope.default, args, results)


@rule("RMSNorm + RoPE, gradient", ours.rope_pair_backward.default, ours.rope_backward.default)
def _rotate_back_then_norm(rope: fx.Node) -> bool:
    """Gradients of norms, made of gradients that are rotated back."""
    o = _operands(rope)
    if not _of_halves(o):
        return False
    rotated = [_result(rope, 0), _result(rope, 1)] if "dq" in o else [rope]
    norms = [_norm_gradient_of(node) for node in rotated]
    if None in norms or _how(norms[0]) != _how(norms[-1]):
        return False
    dys = [o[name] for name in ("dq", "dk", "dy") if name in o]
    (_, xs, weights), first = _columns(norms, 3), _operands(norms[0])
    how, need = (first["eps"], first["offset"], first["rounding"]), first["need_dweight"]
    results = {user: i + 2 * user.args[1] for i, norm in enumerate(norms) for user in norm.users}
    args = (*dys, *[None] * (2 - len(dys)), *xs, *weights, o["cos"], o["sin"], *how, o["upcast"], need)
    replaced = dict.fromkeys([rope, *rotated, *norms, *results])
    return _merge(list(replaced), ours.norm_rope_backward.default, args, results)


def _columns(nodes: list[fx.Node], count: int) -> list[list[Any]]:
    """The first operands of one or two calls, by operand, with None for those of a second that is not there."""
    operands = [list(_operands(n).values())[:count] for n in nodes]
    return [[*column, None][:2] for column in zip(*operands, strict=True)]
