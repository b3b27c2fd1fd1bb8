"""An FX graph seen as canonical terms: what each node's value is, where it is read, and what changes it.

Works on Dynamo graphs (`example_value` metadata) and on ATen graphs (`val`). Nothing in the graph is modified.
"""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from . import _torch
from .log import log, warn_once
from .regions import Region, regions
from .rules import RULES, Call, NotCanonical, is_arange
from .terms import Term, Terms, same

_NAMESPACES = (torch, torch.nn.functional, torch._C._nn, operator, torch.special, torch.linalg)
_INPLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem")
)

SAID = "liger_said"
"""In the notes of an input that is a mask: (what it says, the names of the inputs that it reads)."""

_OF_VMAP = frozenset({"_add_batch_dim", "_remove_batch_dim"})
"""The calls between which Dynamo writes out a function that `vmap` maps over tensors, once."""

_WRITES = {
    **{getattr(operator, f"i{name}"): name for name in ("add", "sub", "mul")},
    **{operator.ifloordiv: "floor_divide", operator.imod: "remainder", operator.setitem: "setitem"},
    **{operator.iand: "bitwise_and", operator.ior: "bitwise_or", operator.ixor: "bitwise_xor"},
}
_WRITING_METHODS = {
    f"{name}_": name
    for name in (
        *("add", "sub", "mul", "floor_divide", "remainder", "bitwise_and", "bitwise_or", "bitwise_xor"),
        *("bitwise_not", "logical_and", "logical_or", "logical_not", "fill", "zero", "masked_fill", "tril", "triu"),
        *("abs", "log", "index_put"),
    )
}
"""Calls that change a tensor in place, and those that give the result as another."""

PYTHON_OPERATORS = frozenset({operator.and_, operator.or_, operator.not_, operator.is_})
"""Their names end as those of in-place methods do."""


def value_of(node: Any) -> Any:
    """The example value recorded for a node; the argument itself when it is not a node."""
    if not isinstance(node, fx.Node):
        return node
    return node.meta.get("example_value", node.meta.get("val"))


def call_name(target: Any) -> str | None:
    """The canonical name of a torch call, whichever way it is spelled; None for calls that are not torch's."""
    if isinstance(target, str):
        return target.strip("_") if target.startswith("__") else target
    if target is getattr:
        return "getattr"
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if isinstance(target, torch._ops.OpOverloadPacket):
        namespace, _, name = target._qualified_op_name.partition("::")
        return name if namespace in ("aten", "torch_nn") else None
    name = getattr(target, "__name__", None)
    if not isinstance(name, str):
        return None
    if name in _OF_VMAP and getattr(target, "__module__", "").startswith("torch."):
        return name
    name = name.removeprefix("linalg_").removeprefix("special_")
    if any(getattr(space, name, None) is target for space in _NAMESPACES):
        return name.strip("_") if name.startswith("__") else name
    return None


@dataclass
class GraphTerms:
    """The terms of one graph."""

    graph: fx.Graph
    of: dict[fx.Node, Term] = field(default_factory=dict)
    """The term of each tensor-valued node."""
    carriers: dict[Term, list[fx.Node]] = field(default_factory=dict)
    """The nodes that hold a term, in graph order."""
    nodes: list[fx.Node] = field(default_factory=list)
    position: dict[fx.Node, int] = field(default_factory=dict)
    region: dict[fx.Node, Region] = field(default_factory=dict)
    mutations: dict[Any, list[fx.Node]] = field(default_factory=dict)
    """For each storage, the nodes that write to it, in graph order."""
    version: dict[Term, int] = field(default_factory=dict)
    """For a term read after its node was written to: how many writes it had seen."""
    terms: Terms = field(default_factory=Terms)
    given: dict[Term, tuple[GraphTerms, Term]] = field(default_factory=dict)
    """For inputs of a body that is called once: the graph that calls it, and what the input is there."""
    lender: GraphTerms | None = None
    """For such a body, the graph that calls it, if that can pass it further tensors."""
    masks: dict[Term, Any] = field(default_factory=dict)
    """What has been read of attention masks, which all layers share."""
    said: dict[Term, tuple[Any, tuple[fx.Node, ...]]] = field(default_factory=dict)
    """What inputs say that are masks: a value for any graph, and the inputs that it reads; see `handed.py`."""
    borrowed: list[fx.Node] = field(default_factory=list)
    """The nodes of that graph which this one now takes as further inputs, behind those it has."""
    _pieces: dict[fx.Node, tuple[Any, ...]] = field(default_factory=dict)
    _written: dict[fx.Node, tuple[fx.Node, Term]] = field(default_factory=dict)
    """For nodes that write to one tensor, as a whole or to elements that are known: that, and its value afterwards."""

    @classmethod
    def view(cls, graph: fx.Graph, region: Region | None = None) -> GraphTerms:
        """The terms of a graph that is entered with the given modes on."""
        self = cls(graph)
        self.nodes = list(graph.nodes)
        for position, node in enumerate(self.nodes):
            self.position[node] = position
            for written in _written_by(node):
                self.mutations.setdefault(_storage(written), []).append(node)
        self.region = regions(graph, region or Region())
        for node in self.nodes:
            self._visit(node)
        inputs = {node.name: node for node in self.nodes if node.op == "placeholder"}
        for node in inputs.values():
            if SAID in node.meta:
                value, names = node.meta[SAID]
                self.said[self.of[node]] = value, tuple(inputs[name] for name in names)
        return self

    def inputs_from(self, caller: GraphTerms, operands: Sequence[Any]) -> None:
        """Notes what the caller of this graph passes to it; `operands` may have others in front."""
        inputs = [n for n in self.nodes if n.op == "placeholder"]
        for node, operand in zip(inputs, operands[len(operands) - len(inputs) :], strict=True):
            constant = isinstance(operand, fx.Node) and _storage(value_of(operand)) not in caller.mutations
            if constant and node in self.of and operand in caller.of:
                self.given[self.of[node]] = caller, caller.of[operand]

    def own(self, term: Term) -> Term | None:
        """The term of this graph for a tensor read here; it may be the caller's, if it is or can become an input."""
        if term in self.carriers:
            return term
        passed = next((mine for mine, (_, theirs) in self.given.items() if theirs is term), None)
        if passed is not None or self.lender is None or term not in self.lender.carriers:
            return passed
        storage = _storage(value_of(self.lender.carriers[term][0]))
        return None if storage in self.lender.mutations or storage in self.mutations else term

    def borrow(self, term: Term) -> None:
        """Makes a tensor of the caller an input of this graph."""
        node = self.lender.carriers[term][0]
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            made = self.graph.placeholder(f"{node.name}_borrowed")
        made.meta["example_value"] = value_of(node)
        self.borrowed.append(node)
        self.of[made] = term
        self.carriers[term] = [made]
        self.position[made] = -1
        self.region[made] = self.region[last]

    def _visit(self, node: fx.Node) -> None:
        value = value_of(node)
        self.terms.scope = self.region[node]
        if isinstance(value, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in value):
            pieces = self._canonical(node, value)
            self._pieces[node] = pieces if isinstance(pieces, tuple) else ()
            return
        written = self._write(node)
        if not isinstance(value, torch.Tensor):
            return
        term = written or self._canonical(node, value)
        if not isinstance(term, Term):
            term = self._leaf(node, value)
        self.of[node] = term
        self.carriers.setdefault(term, []).append(node)

    def _leaf(self, node: fx.Node, value: torch.Tensor) -> Term:
        """A value that nothing is known of; of an operand that a call has changed, what it was and what changed it."""
        args: tuple[Any, ...] = (node.name,)
        x = node.args[0] if node.args else None
        if isinstance(x, fx.Node) and x in self.of and any(value_of(x) is written for written in _written_by(node)):
            args = f"{x.name} after {node.name}", self.of[x], call_name(node.target)
        return self.terms.make("leaf", args, value.dtype, value.shape)

    def _write(self, node: fx.Node) -> Term | None:
        """The value of a tensor that a call writes to in place, behind the call, if it can be told.

        Its name ends in an underscore, which no pattern's does: such a value may be read, a call that writes is no part
        of a match.
        """
        name = _WRITES.get(node.target) if node.op != "call_method" else _WRITING_METHODS.get(node.target)
        changed = list(_written_by(node))
        if name is None or len(changed) != 1 or changed[0] is not value_of(node.args[0]):
            return None
        try:
            args, kwargs = self._arguments(node)
        except NotCanonical:
            return None
        bound = args if name == "setitem" else _torch.bind_schema(name, args, kwargs)
        if bound is None or (name == "setitem" and isinstance(args[1], list)):  # x[[0, 2]] is not x[0, 2]
            return None
        args = (f"{name}_", *(tuple(b) if isinstance(b, list) else b for b in bound))
        term = self.terms.make("call", args, changed[0].dtype, changed[0].shape)
        self._written[node] = node.args[0], term
        return term

    def _canonical(self, node: fx.Node, value: Any) -> Any:
        """The node's value in canonical form; None where it has none."""
        if node.op not in ("call_function", "call_method") or any(True for _ in _written_by(node)):
            return None
        if node.target is operator.getitem and node.args[0] in self._pieces:
            pieces, index = self._pieces[node.args[0]], node.args[1]
            return pieces[index] if isinstance(index, int) and index < len(pieces) else None
        name = call_name(node.target)
        try:
            args, kwargs = self._arguments(node)
        except NotCanonical:
            return None
        if node.op == "call_method" and name == "where" and len(args) > 1:
            args[:2] = args[1], args[0]  # x.where(condition, y) -> where(condition, x, y)
        if isinstance(value, torch.Tensor):
            if any(_elsewhere(value_of(a), value) and not self._is_position(a, node) for a in node.all_input_nodes):
                return None
            call = Call(self.terms, value.dtype, tuple(value.shape))
        else:
            call = Call(self.terms, parts=tuple(value))
        return canonical(call, name, node.target, args, kwargs, unique=node.name)

    def _is_position(self, index: fx.Node, node: fx.Node) -> bool:
        """Whether a call looks rows up by numbers that count up, which may be on any device."""
        return call_name(node.target) == "getitem" and is_arange(self.of.get(index))

    def _arguments(self, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        """Those of a call, as it sees them."""
        return [self.read(a, node) for a in node.args], {k: self.read(v, node) for k, v in node.kwargs.items()}

    def read(self, arg: Any, reader: fx.Node) -> Any:
        """An argument as the reader sees it: a term, a number, or containers of these."""
        if isinstance(arg, (tuple, list)):
            return (tuple if isinstance(arg, tuple) else list)(self.read(a, reader) for a in arg)
        if isinstance(arg, slice):
            return slice(*(self.read(a, reader) for a in (arg.start, arg.stop, arg.step)))
        if not isinstance(arg, fx.Node):
            return arg
        if arg in self._pieces:
            return self._pieces[arg]
        if arg not in self.of:
            value = value_of(arg)
            if isinstance(value, torch.SymFloat):
                number = self._number(arg)
                self.carriers.setdefault(number, [arg])
                return number
            if value is None or isinstance(value, torch.SymBool):
                raise NotCanonical("reads a value of unknown kind")
            return value
        seen = self.writes_before(arg, reader)
        if seen == self.writes_before(arg, arg, inclusive=True):
            return self.of[arg]
        value = value_of(arg)
        before = self.of[arg]
        writer = self.mutations[_storage(value)][seen - 1]
        changed, term = self._written.get(writer, (None, None))
        if changed is None or not _same_elements(value_of(changed), value):
            text = f"{arg.name} after {writer.name}"
            term = self.terms.make("leaf", (text, before), value.dtype, value.shape)
        self.carriers.setdefault(term, [arg])
        self.version[term] = seen
        return term

    def _number(self, node: fx.Node) -> Term:
        """A number that the graph computes."""
        if node.target is operator.neg:
            return self.terms.make("neg", (self._number(node.args[0]),))
        return self.terms.make("number", (node.name,))

    def sources(self, terms: Iterable[Any]) -> dict[fx.Node, Term]:
        """The nodes that exist in the graph and from which values are read."""
        found: dict[fx.Node, Term] = {}
        todo = [t for t in terms if isinstance(t, Term)]
        while todo:
            term = todo.pop()
            nodes = self.carriers.get(term)
            if nodes:
                found[nodes[0]] = term
            else:  # computed only implicitly (a cast by autocast): its own operands are what is read
                todo.extend(a for a in term.args if isinstance(a, Term))
        return found

    def is_pure(self, node: fx.Node) -> bool:
        """Whether a call can be left out if nobody reads its result: it writes nothing and draws no random numbers."""
        if node.op not in ("call_function", "call_method") or any(True for _ in _written_by(node)):
            return False
        if node in self._pieces or (node in self.of and self.of[node].op not in ("leaf", "call")):
            return True
        if node in self.of and any(self.of.get(i) is self.of[node] for i in node.all_input_nodes):
            return True  # passes its operand on: .float() of a float32 tensor
        name = call_name(node.target)
        return name is not None and (getattr(operator, name, None) is node.target or _torch.is_pure(name))

    def is_written(self, node: fx.Node) -> bool:
        """Whether anything in the graph writes to this tensor."""
        return _storage(value_of(node)) in self.mutations

    def writes_before(self, node: fx.Node, reader: fx.Node, inclusive: bool = False) -> int:
        """How many writes to the node's storage come before the reader."""
        value = value_of(node)
        writes = self.mutations.get(_storage(value), ()) if isinstance(value, torch.Tensor) else ()
        limit = self.position[reader] + inclusive
        return sum(self.position[w] < limit for w in writes)


def canonical(call: Call, name: str | None, target: Any, args: list[Any], kwargs: dict[str, Any], unique: Any) -> Any:
    """The canonical form of a call, or a generic term that only a call of the same function matches.

    `unique` tells apart calls that are not known to give the same result twice.
    """
    if name in RULES:
        renamed = {_FIRST.get(k, k): v for k, v in kwargs.items()}
        first = [renamed.pop("x")] if "x" in renamed else []
        try:
            return RULES[name](call, *first, *args, **renamed)
        except (NotCanonical, TypeError):  # TypeError: arguments the rule does not know
            pass
        except Exception as error:
            if call.shape is None:  # in a pattern
                raise
            warn_once(
                f"the rule of {name} failed, so that its calls are taken as they are: {type(error).__name__}: {error}"
            )
            log.debug("a rule failed", exc_info=True)
    args, kwargs = _complete(target, args, kwargs)
    kwargs = {k: v for k, v in kwargs.items() if not k.startswith("_")}
    bound = _torch.bind_schema(name, args, kwargs) if name is not None else None
    if bound is None:
        bound = (*args, *(v for _, v in sorted(kwargs.items())))
    if name is not None and _torch.is_pure(name):
        unique = None
    args = (name or target, *(tuple(b) if isinstance(b, list) else b for b in bound))
    return call.terms.make("call", args, call.dtype, call.shape, unique)


def _complete(target: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a function of torch.nn.functional with its defaults, all by name.

    When such a function is traced it passes on all of them, in a graph it has those that the model wrote.
    """
    if not isinstance(target, types.FunctionType) or target.__module__ != "torch.nn.functional":
        return args, kwargs
    try:
        bound = _signature(target).bind(*args, **kwargs)
    except TypeError:
        return args, kwargs
    bound.apply_defaults()
    return [], dict(bound.arguments)


_signature = functools.cache(inspect.signature)

_FIRST = {"input": "x", "self": "x", "tensor": "x", "axis": "dim", "keepdims": "keepdim", "size": "shape"}


def _elsewhere(a: Any, b: torch.Tensor) -> bool:
    return isinstance(a, torch.Tensor) and a.device != b.device and a.ndim > 0


def _same_elements(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors on one storage are the same elements of it in the same order."""
    return same((*a.shape, *a.stride(), a.storage_offset()), (*b.shape, *b.stride(), b.storage_offset()))


def _storage(value: Any) -> Any:
    return _torch.storage_key(value) if isinstance(value, torch.Tensor) else None


def _written_by(node: fx.Node) -> Iterator[torch.Tensor]:
    """The tensors a call writes to."""
    if node.op in ("call_function", "call_method"):
        for argument in _written_arguments(node):
            for item in argument if isinstance(argument, (tuple, list)) else (argument,):
                value = value_of(item)
                if isinstance(value, torch.Tensor):
                    yield value


def _written_arguments(node: fx.Node) -> Iterator[Any]:
    target, first = node.target, node.args[0] if node.args else None
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    trailing = name.endswith("_") and not name.endswith("__") and target not in PYTHON_OPERATORS
    yield node.kwargs.get("out")
    if node.op == "call_method":
        if trailing or name in ("__setitem__", "__iadd__", "__imul__"):
            yield first
    elif target in _INPLACE_OPERATORS:
        yield first
    elif isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        overload = target if isinstance(target, torch._ops.OpOverload) else getattr(target, target.overloads()[0])
        schema = overload._schema.arguments
        given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
        yield from (given.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write)
    elif call_name(target) is None:
        # A higher-order operation says whether it mutates; a function that is not torch's may do anything.
        foreign = not getattr(target, "__module__", "torch").startswith(("torch", "_operator", "builtins"))
        if foreign or "mutation" in name:
            yield from node.all_input_nodes
    else:
        flag = node.args[INPLACE_FLAG[name]] if len(node.args) > INPLACE_FLAG.get(name, 99) else False
        if trailing or node.kwargs.get("inplace", flag) is True:
            yield first


INPLACE_FLAG = {"silu": 1, "relu": 1, "mish": 1, "dropout": 3, "leaky_relu": 2, "elu": 2, "hardtanh": 3}
"""Where functions take `inplace` by position."""


_LIKE = frozenset({"type_as", "to", "view_as", "reshape_as", "expand_as"})
"""Calls that take the dtype or the shape of a second tensor, and nothing else of it."""


def _read_by(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a node is computed from."""
    if call_name(node.target) not in _LIKE:
        return node.all_input_nodes
    first = node.args[0] if node.args else None
    return [first] if isinstance(first, fx.Node) else node.all_input_nodes


def inputs_of(node: fx.Node, stop: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The tensor-valued nodes a node is computed from, up to and excluding those `stop` names."""
    seen: dict[fx.Node, None] = {}
    todo = [node]
    while todo:
        for n in _read_by(todo.pop()):
            value = value_of(n)
            tensor_like = isinstance(value, (torch.Tensor, tuple, list))
            if n not in seen and tensor_like and not stop(n):
                seen[n] = None
                todo.append(n)
    return list(seen)
