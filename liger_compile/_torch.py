"""Every use of a private torch API, each behind one function that says why and on which versions it was checked."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .log import log


def storage_key(tensor: torch.Tensor) -> int:
    """An identity of the memory behind a (fake) tensor: views of one tensor share it.

    Public torch compares storages only through `data_ptr`, which fake tensors do not have. Tensors inside a functorch
    transform have no storage and count as their own. Checked on 2.11, 2.13.
    """
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:
        return id(tensor)


def autocast_calls() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What Dynamo's graphs call to enter autocast, and to leave what that returns. Checked on 2.11, 2.13."""
    return torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


def bind_schema(name: str, args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """The arguments of an aten operation in its schema's order, defaults filled in; None if no overload takes them.

    Checked on 2.11, 2.13.
    """
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return None
    for overload in packet.overloads():
        schema = getattr(packet, overload)._schema.arguments
        names = [a.name for a in schema]
        if len(args) > sum(not a.kwarg_only for a in schema) or overload.endswith("out"):
            continue
        bound = dict(zip(names, args, strict=False))
        renamed = {"self" if k == "input" else k: v for k, v in kwargs.items()}
        if set(renamed) - set(names) or set(renamed) & set(bound):
            continue
        bound.update(renamed)
        if all(a.name in bound or a.has_default_value() for a in schema):
            return tuple(bound.get(a.name, a.default_value if a.has_default_value() else None) for a in schema)
    return None


def is_pure(name: str) -> bool:
    """Whether an aten operation gives the same result for the same arguments, and writes to none of them.

    Checked on 2.11, 2.13.
    """
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    overloads = [getattr(packet, o) for o in packet.overloads()]
    return not any(torch.Tag.nondeterministic_seeded in o.tags for o in overloads) and not name.endswith("_")


def is_plain_tensor(value: Any) -> bool:
    """Whether a recorded example value stands for an ordinary tensor, not for a subclass such as DTensor.

    Fake tensors have no public name. Checked on 2.11, 2.13.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    return type(value) in (torch.Tensor, torch.nn.Parameter, FakeTensor)


def fake_mode(shape_env: Any = None) -> Any:
    """A mode in which tensors have no data, as those that a graph is compiled with. Checked on 2.11, 2.13."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=shape_env)


def as_fake(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor without its data, of the size it has, in the mode of `like`. Checked on 2.11 to 2.14."""
    return _in_mode(getattr(like, "fake_mode", None), tensor)


def static_example(tensor: torch.Tensor) -> torch.Tensor:
    """What AOTAutograd is given of a tensor that Dynamo does not know: one without data, of the size it has, in the
    mode that it uses itself. It would make symbols of the sizes, and a guard on these, which have no source, fails.

    Checked on 2.11, 2.13.
    """
    context = torch._guards.TracingContext.try_get()
    return _in_mode(context.fake_mode if context is not None else None, tensor)


def _in_mode(mode: Any, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without its data in a mode for such; as it is, if there is none."""
    from torch._subclasses.fake_tensor import FakeTensor

    if mode is None:
        return tensor
    if not isinstance(tensor, FakeTensor):
        return mode.from_tensor(tensor, static_shapes=True)
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def run_on_fakes(node: torch.fx.Node, value_of: Any) -> Any:
    """The example value of a node, computed from those of its arguments.

    Uses the fake tensors' own mode, so that symbolic sizes stay those of the graph. Checked on 2.11, 2.13.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    args = torch.fx.node.map_arg(node.args, value_of)
    kwargs = torch.fx.node.map_arg(node.kwargs, value_of)
    known = [*map(value_of, node.all_input_nodes), node.meta.get("example_value")]
    mode = next((v.fake_mode for v in known if isinstance(v, FakeTensor)), None)
    target = getattr(torch.Tensor, node.target) if node.op == "call_method" else node.target
    with torch.no_grad():
        if mode is None:
            return target(*args, **kwargs)
        with mode:
            return target(*args, **kwargs)


def promised_inputs(node: torch.fx.Node, value_of: Any) -> dict[str, Any]:
    """What the meta of a new node in an ATen graph says of its inputs' layouts: Inductor keeps these where an op needs
    exact strides. Checked on 2.11, 2.13.
    """
    return {"eager_input_vals": torch.fx.node.map_arg((node.args, node.kwargs), value_of)}


def constant(value: Any) -> int | None:
    """The integer a size expression is known to be, without adding a guard. Checked on 2.11, 2.13."""
    if isinstance(value, int):
        return value
    expr = value.node.expr
    return int(expr) if expr.is_number else None


def size_hint(value: Any) -> int | None:
    """The size a graph was captured with, without adding a guard; None if it hangs on data. Checked on 2.11, 2.13."""
    return value if isinstance(value, int) else value.node.hint


def size_terms(value: Any) -> tuple[dict[str, int], int]:
    """A size as a sum of named symbols times whole numbers, and a constant. Checked on 2.13.

    What is no such sum (a product of two sizes) is one symbol, named by its expression.
    """
    if isinstance(value, int):
        return {}, value
    expr = value.node.expr
    parts = expr.expand().as_coefficients_dict()
    if not all(n.is_Integer for n in parts.values()):
        return {str(expr): 1}, 0
    const = int(parts.pop(1, 0))
    return {str(part): int(n) for part, n in parts.items()}, const


def known_true(condition: Any) -> bool:
    """Whether a condition on sizes holds; it becomes a guard, unless it hangs on data, which counts as false.

    Checked on 2.11, 2.13.
    """
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(condition))


def known_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal; it becomes a guard, if neither is known."""
    return known_true(a == b)


def same_sizes(a: Any, b: Any) -> bool:
    """Whether two shapes, or strides, are known to be equal, without adding a guard. Checked on 2.11, 2.13."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def inductor_options() -> frozenset[str]:
    """The names of Inductor's own options. Checked on 2.11, 2.13."""
    from torch._inductor import list_options

    return frozenset(list_options())


def option_type(name: str) -> type | None:
    """The type of one of Inductor's options; None where that says nothing (unions, generics, a plain None).

    torch.compile checks the same for its own backend. Checked on 2.13.
    """
    from torch._inductor import config

    found = config.get_type(name)
    plain = isinstance(found, type) and typing.get_origin(found) is None and found is not type(None)
    return found if plain else None


def mode_options(mode: str | None) -> dict[str, Any]:
    """What a `mode` of torch.compile means in Inductor's options. Checked on 2.11, 2.13."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode)) if mode is not None else {}


def graph_pass(config: dict[str, Any], function: Callable[[torch.fx.Graph], None]) -> dict[str, Any] | None:
    """Inductor's options with a pass over its ATen graphs, forward and backward, before it looks at them.

    None if the user has a pass there. Checked on 2.11, 2.13.
    """
    from torch._inductor import config as current
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Pass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            function(graph)

        def uuid(self) -> str:
            return fingerprint()

    name = "post_grad_custom_pre_pass"
    return None if config.get(name) or getattr(current, name) else {**config, name: Pass()}


STARTED_BEFORE = (2, 14)
"""The first version of torch whose Inductor is given no kernels to start: how it takes them was not looked at."""


def _know_ops() -> None:
    """Tells Inductor of our ops: which are kernels to start (`_lowered`), and that others are called as they are.

    It finds the latter out by itself, but before 2.13 writes a log message first, whether anybody reads it or not, that
    holds all code that an op's operands are computed with: for an op first met behind a few layers that never ends.
    Checked on 2.11, 2.13.
    """
    from torch._inductor import lowering

    from .ops._library import DEFINED, LAUNCHERS

    for op in DEFINED:
        if op not in lowering.lowerings:
            constraint = lowering.tag_to_layout_constraint(torch.Tag.needs_exact_strides)
            lowering.make_fallback(op, constraint, warn=False)
            if op in LAUNCHERS and torch.__version__ < STARTED_BEFORE:
                called = lowering.lowerings[op]
                lowering.register_lowering(op, type_promotion_kind=None)(_lowered(op, LAUNCHERS[op], called))


def _lowered(op: Any, launcher: Callable[..., Any], called: Callable[..., Any]) -> Callable[..., Any]:
    """How Inductor compiles an op: as the kernels that its launcher starts; `called`, as an op, where that cannot be.

    The kernels and their arguments go into the code that Inductor writes, which starts them as it does its own. Checked
    on 2.11, 2.13.
    """

    def lower(*args: Any, **kwargs: Any) -> Any:
        import sympy
        from torch._inductor import ir
        from torch._inductor.virtualized import V
        from torch.utils._pytree import tree_map
        from triton.runtime.jit import JITFunction

        from .inline import NotLaunchesAlone, program

        shape_env = V.graph.sizevars.shape_env
        realized: dict[int, Any] = {}

        def stand_in(value: Any) -> Any:
            """A tensor without data for a buffer, a symbolic number for an expression."""
            if isinstance(value, sympy.Expr):
                if not value.is_integer:
                    raise NotLaunchesAlone(f"{value} is a number that is not known, and no size")
                return int(value) if value.is_number else shape_env.create_symintnode(value, hint=None)
            if not isinstance(value, ir.TensorBox):
                return value
            layout = ir.ExternKernel.realize_input(value).get_layout()
            size, stride = ([stand_in(sympy.sympify(n)) for n in dims] for dims in (layout.size, layout.stride))
            made = torch.empty_strided(size, stride, dtype=layout.dtype, device=layout.device)
            realized[storage_key(made)] = value, layout.offset
            return made

        try:
            with fake_mode(shape_env), _known_only(shape_env, NotLaunchesAlone):
                found = program(launcher, tree_map(stand_in, args), tree_map(stand_in, kwargs))
            if not all(isinstance(each.kernel, JITFunction) for each in found.launches):
                raise NotLaunchesAlone("kernels are interpreted")
        except Exception as reason:  # most often NotLaunchesAlone: then that is how it must be
            log.debug("%s is called as an op: %s: %s", op, type(reason).__name__, reason)
            return called(*args, **kwargs)
        return _started(found, realized)

    return lower


@contextlib.contextmanager
def _known_only(shape_env: Any, error: type[Exception]) -> Any:
    """Within it, a condition on symbolic sizes is decided only if it holds, or fails, for all sizes that there may be:
    else `error` is raised. Checked on 2.11, 2.13."""

    def decided(node: Any, size_oblivious: bool = False, fallback_value: bool | None = None) -> Any:
        found = shape_env._maybe_evaluate_static(node.expr)
        if found is None and fallback_value is None:
            raise error(f"it hangs on {node.expr}")
        return fallback_value if found is None else found

    shape_env.evaluate_sym_node = decided  # of this one alone, in front of the class's
    try:
        yield
    finally:
        del shape_env.evaluate_sym_node


def _started(program: Any, realized: dict[int, Any]) -> Any:
    """A program's buffers and kernels in the graph that Inductor is making; its results there. `realized` has the
    operands: by their storage, what they are there and where they begin. Checked on 2.11, 2.13."""
    import sympy
    from torch._inductor import lowering
    from torch._inductor.virtualized import V
    from torch.utils._pytree import tree_map, tree_map_only

    def there(value: Any) -> Any:
        return value.node.expr if isinstance(value, torch.SymInt) else value

    def same(sizes: Any, others: Any) -> bool:
        known = V.graph.sizevars.statically_known_equals
        return len(sizes) == len(others) and all(known(sympy.sympify(a), b) for a, b in zip(sizes, others, strict=True))

    def place(t: torch.Tensor) -> Any:
        box, start = placed[storage_key(t)]
        size, stride, offset = (tree_map(there, list(n)) for n in (t.shape, t.stride(), [t.storage_offset()]))
        if offset == [0] and same(size, box.get_size()) and same(stride, box.get_stride()):
            return box
        return lowering.lowerings[torch.ops.aten.as_strided.default](box, size, stride, start + offset[0])

    placed = dict(realized)
    made = set()
    for t in program.made:
        size, stride = (tree_map(there, list(n)) for n in (t.shape, t.stride()))
        placed[storage_key(t)] = lowering.empty_strided(size, stride, dtype=t.dtype, device=t.device), 0
        made.add(storage_key(t))
    for each in program.launches:
        tensors = {k: v for k, v in each.arguments.items() if isinstance(v, torch.Tensor)}
        written = [k for k, t in tensors.items() if storage_key(t) in made]
        arguments = {k: place(v) if k in tensors else there(v) for k, v in each.arguments.items()}
        grid = tuple(map(there, each.grid))
        _kernel_class()(_configured(each.kernel, each.num_warps), grid, arguments, written)
    return tree_map_only(torch.Tensor, place, program.results)


@functools.cache
def _configured(kernel: Any, num_warps: int) -> Any:
    """A Triton kernel that is to run with so many warps, as Inductor takes it. Checked on 2.11, 2.13."""
    import triton

    return triton.autotune([triton.Config({}, num_warps=num_warps)], key=[])(kernel)


@functools.cache
def _kernel_class() -> type:
    """Inductor's node for a Triton kernel of the user's, told what it writes.

    To find that out, Inductor would compile the kernel to Triton's IR at each of its places. Checked on 2.11, 2.13.
    """
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    class Kernel(ir.UserDefinedTritonKernel):
        def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], written: list[str]) -> None:
            kwargs = {
                k: ir.InputsKernel.unwrap_storage_for_input(self.realize_input(v)) if isinstance(v, ir.TensorBox) else v
                for k, v in arguments.items()
            }
            inputs = [v for v in kwargs.values() if isinstance(v, ir.IRNode)]
            others = tuple(v for v in kwargs.values() if not isinstance(v, ir.IRNode))
            self.device = inputs[0].get_device()
            nothing = ir.NoneLayout(device=self.device)
            ir.ExternKernel.__init__(self, None, nothing, inputs, others, kwargs)
            self.kernel_idx = kernel_side_table.add_kernel(kernel)  # which Dynamo's reset empties
            self.grid = [(*grid, 1, 1)[:3]]
            self.ordered_kwargs_for_cpp_kernel = [name for name in kernel.fn.arg_names if name in arguments]
            self.mutable_args = list({arguments[k].get_name(): arguments[k] for k in written}.values())
            self.mutation_outputs = [ir.MutationOutput(nothing, box, self) for box in self.mutable_args]
            V.graph.register_operation(self)

        def can_fuse_epilogue(self) -> bool:
            return False

    return Kernel


def compile_fx(gm: torch.fx.GraphModule, example_inputs: Any, config: dict[str, Any]) -> Any:
    """Inductor, as torch.compile calls it. Takes ownership of `gm`. Checked on 2.11, 2.13.

    Its caches on disk know an op by its name, so what they must not outlive is put into their keys.
    """
    from torch._inductor.compile_fx import compile_fx as inductor

    _know_ops()
    compiler = torch.compiler.config
    with compiler.patch(cache_key_tag=f"{compiler.cache_key_tag} liger_compile {fingerprint()}".strip()):
        return inductor(gm, example_inputs, config_patches=config or None)


def is_restart(error: Exception) -> bool:
    """Whether an exception is how a compilation asks Dynamo to trace again, with other assumptions (a float that is
    not symbolic). Checked on 2.11, 2.13.
    """
    from torch._dynamo.exc import RestartAnalysis

    return isinstance(error, RestartAnalysis)


def without_autograd_cache() -> contextlib.AbstractContextManager[None]:
    """AOTAutograd traces again what it compiles in a block; Inductor's own cache stays. Checked on 2.13."""
    from torch._functorch import config

    return config.patch(enable_autograd_cache=False)


def trace(name: str, text: Callable[[], str]) -> None:
    """Adds a text to torch's structured trace (`TORCH_TRACE=folder`), where `tlparse` shows it beside Inductor's.

    Without a trace it costs nothing: `text` is not called. Checked on 2.11, 2.13.
    """
    from torch._logging import trace_structured

    metadata = {"name": name, "encoding": "string"}
    trace_structured("artifact", metadata_fn=lambda: metadata, payload_fn=text, expect_trace_id=False)


@functools.cache
def flex_attention(query: Any, key: Any, value: Any, blocks: Any, tensors: tuple[Any, ...], scale: float) -> Any:
    """FlexAttention as AOTAutograd is to trace it; `blocks` is a BlockMask whose mask_mod takes `tensors` at its end.

    The public function can only be called where Dynamo traces it: anywhere else it starts a compilation of its own.
    Checked on 2.11, 2.13.
    """
    from torch._higher_order_ops.flex_attention import flex_attention as operator
    from torch.nn.attention import flex_attention as module

    options = module._apply_kernel_options(query, key, value, False, None)
    out, _, _ = operator(query, key, value, module._identity, blocks.as_tuple(), scale, options, (), tensors)
    return out


@contextlib.contextmanager
def uncompiled(function: Callable[..., Any]) -> Iterator[None]:
    """Modules on which `.compile()` was called, as they were before: called, they would run what that compiled.

    Checked on 2.11, 2.13.
    """
    modules = function.modules() if isinstance(function, torch.nn.Module) else ()
    compiled = {m: m._compiled_call_impl for m in modules if m._compiled_call_impl is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, implementation in compiled.items():
            module._compiled_call_impl = implementation


def fingerprint() -> str:
    """Another one whenever the code of our ops changes, which AOTAutograd traces through, or that of fusions."""
    here = Path(__file__).parent
    files = [*sorted((here / "ops").glob("*.py")), here / "fuse.py"]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def copy_module(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same module with a graph of its own; parameters and submodules are shared.

    Dynamo keeps notes as plain attributes on its module and on placeholder nodes (`_dynamo_source`), which AOTAutograd
    reads and `Graph.graph_copy` leaves behind. Checked on 2.11, 2.13.
    """
    graph = torch.fx.Graph(tracer_cls=gm.graph._tracer_cls)
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    result = graph.graph_copy(gm.graph, copies)
    graph._codegen = copy.deepcopy(gm.graph._codegen)  # an exported module's takes and returns trees
    output = graph.output(result)
    output.meta = next(n for n in reversed(gm.graph.nodes) if n.op == "output").meta.copy()
    for old, new in copies.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    after = torch.fx.GraphModule(gm, graph, type(gm).__name__)
    after.meta = dict(gm.meta)
    for name, value in vars(gm).items():
        if name not in vars(after):
            after.__dict__[name] = value
    return after
