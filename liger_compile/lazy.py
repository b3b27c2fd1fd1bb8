"""Results that are computed when somebody first reads them.

A model that returns its logits next to the loss would force them into memory although a training step never looks at
them. A rewritten graph returns a `LazyTensor` in their place: it knows how to compute them (`Recipe`), has their shape,
dtype and device, and computes them once, the first time their values are needed. `.float()`, `.to(dtype)` and
`.clone()` stay lazy. `deferral.py` puts recipes into graphs.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .log import tell_once

REMEMBERED = 256
"""Shapes that a recipe remembers."""


def autocast_state(device: str) -> dict[str, Any] | None:
    """The arguments of a `torch.autocast` that restores what holds now; None on a device without one (meta)."""
    if not torch.amp.is_autocast_available(device):
        return None
    enabled = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if enabled else None
    return {"device_type": device, "dtype": dtype, "enabled": enabled}


class Recipe(nn.Module):
    """Computes a returned value from values that the graph has anyway.

    In a graph it is called as a module. On ordinary tensors it returns a `LazyTensor`; while a compiler is tracing, it
    computes the value at once, so that a rewritten graph means the same to any backend.
    """

    def __init__(self, body: fx.GraphModule, example: Tensor) -> None:
        super().__init__()
        self.body = body
        self.dtype, self.requires_grad = example.dtype, example.requires_grad
        self.autocast = autocast_state(example.device.type)
        self.shapes: dict[tuple[Any, ...], Tensor] = {}

    def forward(self, *inputs: Any) -> Tensor:
        if all(type(i) in (Tensor, nn.Parameter) or not isinstance(i, Tensor) for i in inputs):
            return _Defer.apply(_State.of(self, inputs), *inputs)
        return self.compute(inputs)

    def compute(self, inputs: Sequence[Any]) -> Tensor:
        with torch.autocast(**self.autocast) if self.autocast else contextlib.nullcontext():
            return self.body(*inputs)

    def shape_of(self, inputs: Sequence[Any]) -> Tensor:
        """The value's shape and strides, on the meta device. Remembered, since finding it takes longer than all else
        that a step does here."""
        key = tuple((i.shape, i.stride(), i.dtype) if isinstance(i, Tensor) else i for i in inputs)
        if key not in self.shapes:
            if len(self.shapes) >= REMEMBERED:
                self.shapes.clear()
            meta = [i.detach().to("meta") if isinstance(i, Tensor) else i for i in inputs]
            with torch.no_grad():
                self.shapes[key] = self.body(*meta)
        return self.shapes[key]


@dataclass(frozen=True)
class _Computed:
    """A tensor, and its version when it was computed. Tensors of the value are written to in place; what is converted
    from it before that, and computed later, is not of that."""

    tensor: Tensor
    version: Any

    @classmethod
    def of(cls, tensor: Tensor) -> _Computed:
        return cls(tensor, _version(tensor))

    @property
    def is_unchanged(self) -> bool:
        return self.version == _version(self.tensor)


@dataclass
class _State:
    """One value: what it is computed from, and once that is done, itself."""

    recipe: Recipe
    inputs: tuple[Any, ...]
    versions: tuple[Any, ...]
    with_grad: bool
    value: _Computed | None = None
    plain: _Computed | None = None
    """The value without a gradient history: all there is below autograd."""
    steps: int | None = None
    """How many steps optimizers had made, for weights that FSDP writes without a change of their version."""

    @classmethod
    def of(cls, recipe: Recipe, inputs: tuple[Any, ...]) -> _State:
        return cls(recipe, inputs, tuple(map(_version, inputs)), torch.is_grad_enabled())

    def compute(self) -> Tensor:
        """The value with its gradient history, computed once."""
        if self.value is None or not self.value.is_unchanged:
            self.check()
            with torch.set_grad_enabled(self.with_grad):
                self.value = _Computed.of(self.recipe.compute(self.inputs))
        return self.value.tensor

    def compute_plain(self) -> Tensor:
        """The value without its history, for code that runs below autograd."""
        if self.plain is None or not self.plain.is_unchanged:
            if self.value is not None and self.value.is_unchanged:
                self.plain = _Computed.of(self.value.tensor.detach())
            else:
                self.check()
                with torch.no_grad():
                    self.plain = _Computed.of(self.recipe.compute(self.inputs))
        return self.plain.tensor

    def check(self) -> None:
        if any(map(_is_freed, self.inputs)):
            raise RuntimeError(
                "these logits were never read, and the weights they are computed from have been freed since, as FSDP "
                'does after backward(). Read them before, or compile with options={"liger.logits": "keep"}.'
            )
        now = tuple(map(_version, self.inputs))
        if self.steps is None:
            changed = now != self.versions
        else:  # FSDP gives weights other memory, and writes to them, without changing them
            changed = self.steps != _steps()[0] or _counts(now) != _counts(self.versions)
        if changed:
            raise RuntimeError(
                "these logits were never read, and the weights they are computed from have changed since. Read them "
                'before optimizer.step(), or compile with options={"liger.logits": "keep"}.'
            )


@dataclass
class _Own:
    """What tells the tensors of one value apart."""

    casts: tuple[torch.dtype, ...]
    """The conversions a tensor has gone through; each may round. One to the dtype it had is a copy."""
    value: Tensor | None = None
    """What it has become. Changes in place are made to this, and stay."""
    origin: int | None = None
    """The value's place in the autograd graph when it was computed. Writing to it, or to a view of it, moves it."""
    node: int | None = None
    """The tensor's place in the autograd graph when the value had the same history."""
    plain: Tensor | None = None
    """The value without its history, where nothing asked for that."""
    inner: Tensor | None = None
    """What compilers are given in the tensor's place."""
    hooks: dict[int, Callable[[Tensor], Any]] = field(default_factory=collections.OrderedDict)
    """What was asked to see the gradient before there was a value."""


def _version(value: Any) -> Any:
    """What changes when a tensor is written to, or is given other memory (`p.data = ...`, `model.half()`). Nothing of
    it does where memory is written to behind autograd's back (`p.data.add_(...)`)."""
    if not isinstance(value, Tensor):
        return None
    return None if value.is_inference() else value._version, value.data_ptr()


def _counts(versions: tuple[Any, ...]) -> list[Any]:
    """Of writes alone."""
    return [version and version[0] for version in versions]


@functools.cache
def _steps() -> list[int]:
    """How many steps the optimizers of this process have made since the first call of this; one number."""
    made = [0]

    def count(*_: Any) -> None:
        made[0] += 1

    register_optimizer_step_post_hook(count)
    return made


def _place(x: Tensor) -> int | None:
    """What tells a tensor's place in the autograd graph from others, and keeps none of it alive."""
    return None if x.grad_fn is None else x.grad_fn._sequence_nr()


def _call_hook(hooks: dict[int, Callable[[Tensor], Any]], key: int, gradient: Tensor | None) -> Any:
    return hooks[key](gradient) if key in hooks and gradient is not None else None  # else it was removed


def _is_freed(value: Any) -> bool:
    """Whether a tensor's memory was given back while the tensor stays."""
    return isinstance(value, Tensor) and value.numel() > 0 and value.untyped_storage().nbytes() == 0


class _Defer(torch.autograd.Function):
    """Gives a `LazyTensor` a place in the autograd graph, for code that takes its history from it and not from its
    value: autograd functions of others (DDP and activation checkpoints have some), and all below Python's level.

    Python code reads the computed value, which has a history of its own; this one is then not used.
    """

    @staticmethod
    def forward(ctx: Any, state: _State, *inputs: Any) -> Tensor:
        ctx.state = state
        ctx.set_materialize_grads(False)
        like = state.recipe.shape_of(inputs)
        device = next(i.device for i in inputs if isinstance(i, Tensor))
        lazy = LazyTensor(state, like.shape, like.stride(), state.recipe.dtype, device)
        ctx.own = lazy._own
        return lazy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
        state, needed = ctx.state, ctx.needs_input_grad[1:]
        if gradient is None:
            return None, *(None for _ in needed)
        state.check()
        twice, own = torch.is_grad_enabled(), ctx.own
        if own.origin is not None and _place(own.value) != own.origin:  # a view of the value was written to
            wanted = [i for i, n in zip(state.inputs, needed, strict=True) if n]
            found = iter(torch.autograd.grad(own.value, wanted, gradient, retain_graph=True, create_graph=twice))
            return None, *(next(found) if n else None for n in needed)
        with torch.enable_grad():
            # Each is a tensor of its own, should one be given twice.
            apart = (lambda i: i.view_as(i)) if twice else (lambda i: i.detach().requires_grad_())
            inputs = [apart(i) if n else i for i, n in zip(state.inputs, needed, strict=True)]
            value = state.recipe.compute(inputs)
        wanted = [i for i, n in zip(inputs, needed, strict=True) if n]
        found = iter(torch.autograd.grad(value, wanted, gradient, create_graph=twice))
        return None, *(next(found) if n else None for n in needed)


class _Read(torch.autograd.Function):
    """The values of a `LazyTensor`, with its history."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyTensor) -> Tensor:
        return lazy.compute_plain().detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Become(torch.autograd.Function):
    """Gives a `LazyTensor` the history of its value."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyTensor, value: Tensor) -> LazyTensor:
        ctx.mark_dirty(lazy)
        return lazy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def _with_history(function: type[torch.autograd.Function], *args: Tensor) -> Tensor:
    with torch.enable_grad(), torch._C.DisableTorchFunctionSubclass():
        return function.apply(*args)


class LazyTensor(torch.Tensor):
    """A tensor that computes itself when its values are first needed. See the module's docstring."""

    _state: _State
    _own: _Own
    _inner: Tensor | None = None

    @staticmethod
    def __new__(
        cls,
        state: _State,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        casts: tuple[torch.dtype, ...] = (),
    ) -> LazyTensor:
        self = torch.Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=dtype, device=device)
        self._state, self._own = state, _Own(casts)
        return self

    @property
    def computed(self) -> bool:
        """Whether the values exist yet."""
        return self._state.value is not None or self._state.plain is not None

    def compute(self) -> Tensor:
        """The values as an ordinary tensor, with their gradient history."""
        own = self._own
        if not self.requires_grad:
            own.value = self.compute_plain() if own.value is None else own.value
        elif own.value is None and own.plain is None and self._history_is_own():
            value = self._state.compute()
            with torch.set_grad_enabled(self._state.with_grad):
                own.value = _cast(value, own.casts)
            own.origin = _place(own.value)
            for key in own.hooks:
                own.value.register_hook(functools.partial(_call_hook, own.hooks, key))
        elif own.value is None or _place(self) != own.node:
            own.value, own.origin = _with_history(_Read, self), None
        own.node = _place(self)
        return own.value

    def _history_is_own(self) -> bool:
        """Whether autograd knows this as the recipe's result, converted, which is what its value then is. It does not
        where somebody's autograd function returned it, or where it was made a leaf."""
        node = self.grad_fn
        while node is not None and node.name() in _PASSING:
            node = node.next_functions[0][0]
        return getattr(node, "state", None) is self._state

    def _set_history(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> LazyTensor:
        """`requires_grad_` and `detach_`, of which the value must know."""
        with torch._C.DisableTorchFunctionSubclass():
            func(self, *args, **kwargs)
        if self._own.value is not None and not self.requires_grad:
            self._own.value = self._own.value.detach()
        return self

    def _changed(self) -> None:
        """After something wrote to the value, or asked for its gradient: its history is the tensor's."""
        value = self.compute()
        if (value.shape, value.stride(), value.dtype) != (self.shape, self.stride(), self.dtype):
            raise RuntimeError(
                "logits that are computed on demand do not take another shape or dtype in place. Write x = "
                'x.unsqueeze(0) and the like, or compile with options={"liger.logits": "keep"}.'
            )
        if not torch.is_grad_enabled():
            return
        if value.requires_grad:
            _with_history(_Become, self, value)
            self._own.node = _place(self)
        elif self.requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                self.detach_()

    def register_hook(self, hook: Callable[[Tensor], Any]) -> Any:
        """Computes nothing: FSDP registers a hook on each output of a model."""
        if self._own.value is not None or not self.requires_grad:
            handle = self.compute().register_hook(hook)
            self._changed()
            return handle
        if str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("torch.distributed.fsdp"):
            self._state.steps = _steps()[0]
        handle = RemovableHandle(self._own.hooks)
        self._own.hooks[handle.id] = hook
        with torch._C.DisableTorchFunctionSubclass():  # gradients come here, or to the value
            super().register_hook(functools.partial(_call_hook, self._own.hooks, handle.id))
        return handle

    def compute_plain(self) -> Tensor:
        """The values without their history, for code that runs below autograd."""
        own = self._own
        if own.value is not None:
            return own.value.detach()
        if own.plain is None:
            own.plain = _cast(self._state.compute_plain(), own.casts)
        return own.plain

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Where a function is compiled that is given this, in Python as it is traced, and below it.
        if torch.compiler.is_dynamo_compiling() or _is_traced(args, kwargs):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__repr__"):
            accessor, name = name, getattr(getattr(func, "__self__", None), "__name__", name)
            name = f"{name}=" if accessor == "__set__" else name
        x = args[0] if args else None
        of_itself = name in ("grad", "grad=") and isinstance(x, LazyTensor) and (x._own.value is None or x.is_leaf)
        if name in _METADATA or of_itself or _stays_lazy(name, args, kwargs):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name in _OF_HISTORY and isinstance(x, LazyTensor):
            return x._set_history(func, *args[1:], **kwargs)
        read: list[tuple[LazyTensor, Any]] = []

        def compute(lazy: LazyTensor) -> Tensor:
            value = lazy.compute()
            read.append((lazy, _version(value)))
            return value

        result = func(*_replace(args, compute), **_replace(kwargs, compute))
        for lazy, version in read:
            if name == "retain_grad" or _version(lazy.compute()) != version:
                lazy._changed()
                result = lazy if result is lazy._own.value else result
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What reaches the tensor without passing through Python first."""
        kwargs = kwargs or {}
        if _is_traced(args, kwargs):
            return _dispatch_traced(func, args, kwargs)
        x = args[0] if args else None
        if func in _STILL_LAZY and isinstance(x, LazyTensor) and x._own.value is None and _only_casts(args, kwargs):
            dtype = kwargs.get("dtype") or x.dtype
            casts = x._own.casts if func is torch.ops.aten.detach.default else (*x._own.casts, dtype)
            return LazyTensor(x._state, x.shape, x.stride(), dtype, x.device, casts)
        changes = func._schema.is_mutable and isinstance(x, LazyTensor)
        if changes and x._own.value is None:
            x._own.value = x.compute_plain().clone()  # its history is what autograd makes of the change
        result = func(*_replace(args, LazyTensor.compute_plain), **_replace(kwargs, LazyTensor.compute_plain))
        return x if changes else result

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """What a compiler takes that is given this as an input."""
        return ["inner_values"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: None, size: Sequence[int], stride: Sequence[int]) -> Tensor:
        return LazyTensor.traced(inner["inner_values"], size, stride)

    @classmethod
    def traced(cls, values: Tensor, size: Sequence[int], stride: Sequence[int]) -> LazyTensor:
        """What stands for such a tensor in a compiler."""
        self = torch.Tensor._make_wrapper_subclass(
            cls, size, strides=stride, dtype=values.dtype, device=values.device, requires_grad=values.requires_grad
        )
        self._inner = values
        return self

    def _stable_hash_for_caching(self) -> str:
        """What a compiler keeps depends on no more than on the kind of values."""
        kind = tuple(self.shape), self.stride(), self.dtype, self.device, self.requires_grad
        return f"liger_compile.LazyTensor{kind}"

    @property
    def inner_values(self) -> Tensor:
        """For a compiler: in a storage of its own over the same memory, since this tensor's storage is known to it as
        that of another tensor."""
        if self._inner is not None:
            return self._inner
        own = self._own
        if not self.computed:
            tell_once("logits on demand are computed: a compiled function is given them, if only to pass them on")
        now = self.compute_plain() if own.value is None else own.value
        if own.inner is None or own.inner.data_ptr() != now.data_ptr():
            own.inner = torch.from_dlpack(now.detach())
        return own.inner

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        if self._inner is not None:
            return f"LazyTensor({self._inner})"
        if self.computed:
            return repr(self.compute())
        return f"LazyTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, not computed yet)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.compute().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.compute().detach().__reduce_ex__(protocol)


def _is_traced(args: Any, kwargs: Any) -> bool:
    return any(type(x) is LazyTensor and x._inner is not None for x in tree_leaves((args, kwargs)))


def _dispatch_traced(func: Any, args: Any, kwargs: Any) -> Any:
    """For a compiler that traces a function of a `LazyTensor`: what is computed of that is ordinary."""
    x = args[0] if args else None
    result = func(*_replace(args, attrgetter("inner_values")), **_replace(kwargs, attrgetter("inner_values")))
    if func in _SAME:  # an input stays what it is
        return LazyTensor.traced(result, result.shape, result.stride())
    return x if func._schema.is_mutable and isinstance(x, LazyTensor) else result


_SAME = frozenset((torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default))
_METADATA = frozenset(
    """shape dtype device ndim layout requires_grad is_leaf names itemsize nbytes is_cuda is_cpu is_meta is_sparse
    is_sparse_csr is_quantized is_nested is_mkldnn is_xpu dim ndimension size stride numel nelement element_size
    storage_offset get_device is_floating_point is_complex is_signed is_contiguous is_inference __len__
    __hash__ _base _is_view grad_fn output_nr""".split()  # noqa: SIM905
)
_CASTS = frozenset(("to", "float", "half", "bfloat16", "double", "type", "type_as"))
_STILL_LAZY = frozenset((torch.ops.aten._to_copy.default, torch.ops.aten.detach.default, torch.ops.aten.clone.default))
_OF_HISTORY = frozenset(("requires_grad_", "requires_grad=", "detach_"))
_PASSING = frozenset(("ToCopyBackward0", "CloneBackward0"))


def _stays_lazy(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if not args or not isinstance(args[0], LazyTensor) or args[0].computed:
        return False
    return _only_casts(args, kwargs) if name in _CASTS else name == "clone" and not (args[1:] or kwargs)


def _cast(value: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    for dtype in dtypes:
        value = value.to(dtype, copy=True)
    return value


def _only_casts(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a conversion of args[0] asks for another dtype and nothing else."""
    x, *rest = args
    if any(isinstance(r, (LazyTensor, str)) for r in rest):
        return False
    asked = [*rest, *kwargs.values()]
    devices = [torch.device(a) for a in asked if isinstance(a, torch.device)] + [
        a.device for a in rest if isinstance(a, Tensor)
    ]
    known = all(a is None or a is False or isinstance(a, (torch.dtype, torch.device, Tensor)) for a in asked)
    return known and all(d == x.device for d in devices)


def _replace(value: Any, by: Callable[[LazyTensor], Tensor]) -> Any:
    """The same arguments with ordinary tensors in the place of lazy ones."""
    if isinstance(value, LazyTensor):
        return by(value)
    if isinstance(value, dict):
        return {k: _replace(v, by) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_replace(v, by) for v in value)
    return value
