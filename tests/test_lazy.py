"""Logits next to a loss are computed when somebody reads them, and are then eager's in every respect."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import capture, relative_error, rewritten

from liger_compile import Options, rewrite
from liger_compile.lazy import LazyTensor, Recipe

SCALE = 3.0


def head(h, w, y):
    logits = F.linear(h, w) * SCALE
    return F.cross_entropy(logits.float(), y), logits


class Case:
    """One set of operands, with results of the rewritten function and of eager on them."""

    def __init__(self, dtype=torch.float32):
        self.h = torch.randn(6, 8).to(dtype).requires_grad_()
        self.w = torch.randn(11, 8).to(dtype).requires_grad_()
        self.y = torch.randint(11, (6,))
        self.reports = []
        self.compiled = torch.compile(head, backend=rewritten(self.reports), fullgraph=True)

    def lazy(self):
        """Fresh logits that nobody has read."""
        _, logits = self.compiled(self.h, self.w, self.y)
        assert self.reports[-1].counts == {"linear_cross_entropy": 1}
        assert isinstance(logits, LazyTensor) and not logits.computed
        return logits

    def eager(self):
        return head(self.h, self.w, self.y)[1]

    def gradients(self, loss):
        return torch.autograd.grad(loss, (self.h, self.w))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def case(request):
    return Case(request.param)


def assert_same_gradients(case, function):
    """A function of (loss, logits) has eager's gradients."""
    ours = case.gradients(function(*case.compiled(case.h, case.w, case.y)))
    eager = case.gradients(function(*head(case.h, case.w, case.y)))
    for o, e in zip(ours, eager, strict=True):
        assert relative_error(o, e) <= (1e-5 if e.dtype is torch.float32 else 2e-2)


# ---- without computing ----------------------------------------------------------------------------------------------

METADATA = {
    "shape": lambda z: z.shape,
    "size": lambda z: (z.size(), z.size(0)),
    "stride": lambda z: z.stride(),
    "dtype": lambda z: z.dtype,
    "device": lambda z: (z.device, z.is_cuda, z.is_cpu, z.get_device()),
    "dimensions": lambda z: (z.ndim, z.dim(), len(z)),
    "numel": lambda z: (z.numel(), z.nelement(), torch.numel(z), z.nbytes, z.itemsize, z.element_size()),
    "requires_grad": lambda z: (z.requires_grad, z.is_leaf, z.grad_fn is None, z.output_nr),
    "views": lambda z: (z._base, z._is_view()),
    "layout": lambda z: (z.layout, z.is_contiguous(), z.is_sparse, z.storage_offset(), z.is_nested),
    "kind": lambda z: (z.is_floating_point(), torch.is_floating_point(z), z.is_complex(), z.is_signed()),
    "type": lambda z: (z.type(), isinstance(z, torch.Tensor), torch.is_tensor(z)),
    "hash": lambda z: {z: 1}[z],
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_without_computing(case, name):
    z = case.lazy()
    assert METADATA[name](z) == METADATA[name](case.eager())
    assert not z.computed


CASTS = {
    "float": lambda z: z.float(),
    "half": lambda z: z.half(),
    "bfloat16": lambda z: z.bfloat16(),
    "double": lambda z: z.double(),
    "to": lambda z: z.to(torch.float16),
    "to(dtype=)": lambda z: z.to(dtype=torch.float64),
    "to the same": lambda z: z.to(z.dtype),
    "to(other)": lambda z: z.to(torch.ones(2, dtype=torch.float64)),
    "to(device)": lambda z: z.to(z.device),
    "type": lambda z: z.type(torch.float64),
    "clone": lambda z: z.clone(),
    "there and back": lambda z: z.bfloat16().float(),
    "through float16": lambda z: z.double().half().float(),
}


@pytest.mark.parametrize("name", CASTS)
def test_casts_stay_lazy(case, name):
    z = case.lazy()
    cast, eager = CASTS[name](z), CASTS[name](case.eager())
    assert isinstance(cast, LazyTensor) and not z.computed and not cast.computed
    assert cast.dtype is eager.dtype and cast.shape == eager.shape and cast.requires_grad
    assert torch.equal(cast, eager)  # every rounding on the way included
    assert z.computed and torch.equal(z, case.eager())
    assert_same_gradients(case, lambda loss, logits: CASTS[name](logits).square().mean())


def test_representation_does_not_compute(case):
    """A debugger that shows variables must not change memory; once there are values they are shown."""
    z = case.lazy()
    name = str(case.h.dtype)
    for text in (repr(z), str(z)):
        assert text == f"LazyTensor(shape=(6, 11), dtype={name}, device=cpu, not computed yet)"
    assert not z.computed
    z.sum()
    assert repr(z) == repr(z.compute()) and "tensor([[" in repr(z)
    assert f"{case.lazy()}" == f"{case.eager()}".replace("UnsafeViewBackward0", "MulBackward0")


# ---- reading ---------------------------------------------------------------------------------------------------------


def through_torch_save(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


READS = {
    "index": lambda z: z[0, 1],
    "slice": lambda z: z[..., :-1, :].contiguous(),
    "none index": lambda z: z[None],
    "mask": lambda z: z[z > 0],
    "iteration": lambda z: torch.stack([row.sum() for row in z]),
    "argmax": lambda z: z.argmax(-1),
    "softmax": lambda z: z.softmax(-1),
    "topk": lambda z: z.topk(3).values,
    "view": lambda z: z.view(-1, 2, 11),
    "detach": lambda z: z.detach(),
    "clone": lambda z: z.clone() + 0,
    "clone in another layout": lambda z: z.clone(memory_format=torch.contiguous_format),
    "cpu": lambda z: z.cpu(),
    "copying cast": lambda z: z.to(torch.float16, copy=True),
    "arithmetic": lambda z: 1 + z * 2 - z / 3,
    "comparison": lambda z: (z == z) & (z < 2),
    "function": lambda z: torch.sin(z),
    "functional": lambda z: F.cross_entropy(z.view(-1, 11), torch.arange(6)),
    "stack": lambda z: torch.stack([z, z]),
    "out": lambda z: torch.add(z.detach(), 1, out=torch.empty(0, dtype=z.dtype)),
    "copied into": lambda z: torch.empty(z.shape, dtype=z.dtype).copy_(z),
    "like": lambda z: torch.zeros_like(z),
    "tolist": lambda z: torch.tensor(z.tolist()),
    "item": lambda z: torch.tensor(z[0, 0].item()),
    "numpy": lambda z: torch.from_numpy(z.detach().float().numpy()),
    "array": lambda z: torch.from_numpy(np.asarray(z.detach().float())),
    "pickle": lambda z: pickle.loads(pickle.dumps(z)),
    "torch.save": through_torch_save,
    "torch.save of a container": lambda z: through_torch_save({"a": [z]})["a"][0],
    "deepcopy": lambda z: copy.deepcopy(z),
    "deepcopy of a container": lambda z: copy.deepcopy({"a": [z]})["a"][0],
    "without torch functions": lambda z: torch._C._VariableFunctions.sin(z),
    "vmap": lambda z: torch.vmap(lambda row: row.softmax(0))(z),
    "torch.func.grad": lambda z: torch.func.grad(lambda q: q.sin().sum())(z.detach()),
    "checkpoint": lambda z: torch.utils.checkpoint.checkpoint(torch.sin, z, use_reentrant=False),
    "inference mode": lambda z: torch.inference_mode()(torch.sin)(z).clone(),
}


@pytest.mark.parametrize("name", READS)
def test_reading(case, name):
    z = case.lazy()
    ours = READS[name](z)
    eager = case.eager()
    # eager copies and pickles only leaves
    eager = READS[name](eager.detach() if name.startswith(("pickle", "torch.save", "deepcopy")) else eager)
    assert z.computed and not isinstance(ours, LazyTensor)
    assert ours.dtype is eager.dtype and ours.stride() == eager.stride() and torch.equal(ours, eager)
    if name not in ("torch.save", "pickle"):
        assert ours.requires_grad == eager.requires_grad


def test_sizes_are_found_once_each():
    body = torch.fx.symbolic_trace(lambda h, w: (h @ w.t())[:, 1:])
    weight = torch.randn(5, 4)
    recipe = Recipe(body, torch.randn(3, 4))
    for rows in (3, 7, 3, 1):
        hidden = torch.randn(rows, 4)
        value = recipe(hidden, weight)
        assert value.shape == (rows, 4) and not value.computed
        torch.testing.assert_close(value + 0, (hidden @ weight.t())[:, 1:])
    assert len(recipe.shapes) == 3


def test_computed_once(case):
    z = case.lazy()
    first = z.compute()
    z.sum(), z.float(), z[0]
    assert z.compute() is first
    y = case.lazy().float()
    assert y.compute() is y.compute()


def test_writing_in_place(case):
    """To the logits, or to a converted copy of them."""

    def mask(z):
        z[:, 0] = -9
        z[:, 1].add_(3)
        z.clamp_(max=2)
        return z

    assert torch.equal(mask(case.lazy()), mask(case.eager()))
    assert torch.equal(mask(case.lazy().double()), mask(case.eager().double()))
    z = case.lazy()
    mask(z.double())
    assert torch.equal(z, case.eager())  # a copy was changed
    z = case.lazy()
    same = z.to(z.dtype)
    mask(z)
    assert torch.equal(same, mask(case.eager()))  # no copy
    assert_same_gradients(case, lambda loss, logits: mask(logits).square().mean())
    assert_same_gradients(case, lambda loss, logits: mask(logits.double()).square().mean())


# ---- gradients -------------------------------------------------------------------------------------------------------

LOSSES = {
    "the loss alone": lambda loss, logits: loss,
    "loss and logits": lambda loss, logits: loss + 0.1 * logits.mean(),
    "loss and converted logits": lambda loss, logits: loss + 0.1 * logits.double().square().mean(),
    "logits alone": lambda loss, logits: logits.square().mean(),
    "logits twice": lambda loss, logits: logits.mean() + logits.float().logsumexp(-1).square().mean(),
    "read before": lambda loss, logits: (logits.argmax(-1), loss)[1],
    "a function below Python": lambda loss, logits: Doubled.apply(logits).square().mean(),
    "another's output": lambda loss, logits: loss + Doubled.apply(logits.clone()).square().mean(),
    "cloned by another, read": lambda loss, logits: sum(part.square().mean() for part in Cloned.apply(loss, logits)),
    "written to, then given to another": lambda loss, logits: Doubled.apply(logits.div_(3)).square().mean(),
    "a view written to, then given to another": lambda loss, logits: (
        logits[:, :3].div_(3),
        Doubled.apply(logits).square().mean(),
    )[1],
    "converted, written to, given to another": lambda loss, logits: Doubled.apply(logits.double().mul_(3)).mean(),
    "cloned, written to": lambda loss, logits: logits.mean() + logits.clone().mul_(logits).mean(),
    "written to by another": lambda loss, logits: (Halved.apply(logits), logits.square().mean())[1],
    "read, written to by another": lambda loss, logits: (logits.sum(), Halved.apply(logits), logits.square().mean())[2],
    "made by another": lambda loss, logits: loss + Passed.apply(logits).square().mean(),
    "converted without gradient": lambda loss, logits: loss + (logits - logits_without_gradient(logits)).square().sum(),
    "z loss": lambda loss, logits: loss + 1e-2 * torch.logsumexp(logits.float(), -1).square().mean(),
}


def logits_without_gradient(logits):
    with torch.no_grad():
        return logits.double().float() * 0.5


class Doubled(torch.autograd.Function):
    """Takes its argument as it is, without Python's dispatch."""

    @staticmethod
    def forward(ctx, z):
        return z * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Cloned(torch.autograd.Function):
    """As DDP does with all outputs of a model, where it looks for parameters without a gradient."""

    @staticmethod
    def forward(ctx, *outputs):
        ctx.set_materialize_grads(False)
        return tuple(z.clone() for z in outputs)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


class Halved(torch.autograd.Function):
    """In place."""

    @staticmethod
    def forward(ctx, z):
        ctx.mark_dirty(z)
        return z.mul_(0.5)

    @staticmethod
    def backward(ctx, g):
        return g * 0.5


class Passed(torch.autograd.Function):
    """Returns what it is given, converted without a history of its own, as a checkpointed model's logits are."""

    @staticmethod
    def forward(ctx, z):
        return z.double()

    @staticmethod
    def backward(ctx, g):
        return g.float() * 7


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(case, name):
    assert_same_gradients(case, LOSSES[name])


def test_converted_under_no_grad_is_a_constant(case):
    z = case.lazy()
    with torch.no_grad():
        target = z.double()
    assert isinstance(target, LazyTensor) and not target.requires_grad
    assert not (target * 2).requires_grad and (z * 2).requires_grad


def test_unread_logits_that_another_clones_are_never_computed(case, monkeypatch):
    """Nor is a gradient of zero sent through their product."""
    monkeypatch.setattr(Recipe, "compute", lambda *_: pytest.fail("computed"))
    loss, z = Cloned.apply(*case.compiled(case.h, case.w, case.y))
    assert isinstance(z, LazyTensor) and z.requires_grad
    ours, eager = case.gradients(loss), case.gradients(head(case.h, case.w, case.y)[0])
    for o, e in zip(ours, eager, strict=True):
        assert relative_error(o, e) <= (1e-5 if e.dtype is torch.float32 else 2e-2)


def test_a_model_that_another_calls(case):
    """A reentrant checkpoint: the model runs without gradients, and its outputs get a history from outside."""

    class Around(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h, model):
            return model(h, case.w, case.y)[1]

        @staticmethod
        def backward(ctx, g):
            return g @ case.w.detach(), None

    gradients = []
    for model in (case.compiled, head):
        z = Around.apply(case.h, model)
        assert z.requires_grad
        gradients += torch.autograd.grad(z.square().mean(), case.h)
    assert relative_error(*gradients) <= (1e-5 if case.h.dtype is torch.float32 else 2e-2)


def test_converted_before_the_original_is_written_to(case):
    ours, eager = case.lazy(), case.eager()
    copies = [(z.double(), z.clone()) for z in (ours, eager)]
    for z in (ours, eager):
        z.mul_(2)
    for o, e in zip(*copies, strict=True):
        assert torch.equal(o, e)
    assert torch.equal(ours, eager)


def test_history_in_place(case):
    z = case.lazy()
    assert z.detach_() is z and not z.requires_grad and not z.computed
    assert torch.equal(z.requires_grad_(), case.eager()) and z.is_leaf
    (z * 3).sum().backward()
    assert torch.equal(z.grad, torch.full_like(case.eager(), 3))
    z = case.lazy()
    z.sum()
    z.detach_()
    assert not z.requires_grad and not (z * 2).requires_grad


@pytest.mark.parametrize("change", [lambda z: z.unsqueeze_(0), lambda z: z.t_(), lambda z: z.resize_(2, 11)])
def test_another_shape_in_place_is_an_error(case, change):
    with torch.no_grad():
        z = case.lazy()
        with pytest.raises(RuntimeError, match=r"do not take another shape .* in place.*\"liger.logits\": \"keep\""):
            change(z)


def test_incoming_gradient(case):
    z, incoming = case.lazy(), torch.randn(6, 11).to(case.h.dtype)
    for ours, eager in zip(
        torch.autograd.grad(z, (case.h, case.w), incoming),
        torch.autograd.grad(case.eager(), (case.h, case.w), incoming),
        strict=True,
    ):
        assert torch.equal(ours, eager)


def test_hooks_and_retained_gradients(case):
    for convert in (lambda z: z, lambda z: z.double()):
        seen = []
        results = []
        for z in (convert(case.lazy()), convert(case.eager())):
            z.register_hook(seen.append)
            z.retain_grad()
            z.square().mean().backward()
            results.append(z.grad)
        assert torch.equal(*seen) and torch.equal(*results)


def test_hooks_and_retained_gradients_where_another_reads(case):
    seen, results = [], []
    for make in (case.lazy, case.eager):
        z = make()
        z.register_hook(lambda g: g * 2)
        z.register_hook(seen.append)
        Doubled.apply(z).sum().backward()
        z = make()
        z.retain_grad()
        Doubled.apply(z).sum().backward()
        results.append(z.grad)
    assert torch.equal(*seen) and torch.equal(*results)


def test_hooks_of_what_is_not_read(case):
    """FSDP registers a hook on each output of a model."""
    seen = []
    results = []
    for z in (case.lazy(), case.eager()):
        z.register_hook(seen.append)
        z.register_hook(lambda g: seen.append("removed")).remove()
        z.register_hook(lambda g: g * 2)
        z.register_hook(seen.append)
        assert not isinstance(z, LazyTensor) or not z.computed
        results.append(torch.autograd.grad(z.square().sum(), (case.h, case.w)))
    assert len(seen) == 4 and torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert torch.equal(seen[1], 2 * seen[0])
    for ours, eager in zip(*results, strict=True):
        assert torch.equal(ours, eager)


def test_a_hook_on_a_constant(case):
    with torch.no_grad():
        z = case.lazy().float()
    with pytest.raises(RuntimeError, match="doesn't require gradient"):
        z.register_hook(print)


def test_backward_twice(case):
    loss, z = case.compiled(case.h, case.w, case.y)
    total = loss + z.mean()
    first = torch.autograd.grad(total, (case.h, case.w), retain_graph=True)
    second = torch.autograd.grad(total, (case.h, case.w))
    assert all(map(torch.equal, first, second))


def test_reading_after_backward(case):
    loss, z = case.compiled(case.h, case.w, case.y)
    loss.backward()
    assert torch.equal(z, case.eager())
    z.mean().backward()


def test_second_derivative_through_logits():
    case = Case()

    def penalty(z):
        gradient = torch.autograd.grad(z.square().mean(), case.w, create_graph=True)[0]
        return torch.autograd.grad(gradient.square().sum(), (case.h, case.w))

    for ours, eager in zip(penalty(case.lazy()), penalty(case.eager()), strict=True):
        assert relative_error(ours, eager) < 1e-5


def test_second_derivative_through_anothers_function():
    """Whose incoming gradient is a constant."""
    case = Case()

    def penalty(z):
        gradient = torch.autograd.grad(Doubled.apply(z).sum(), case.h, create_graph=True)[0]
        return torch.autograd.grad(gradient.square().sum(), case.w)[0]

    assert relative_error(penalty(case.lazy()), penalty(case.eager())) < 1e-5


# ---- when the weights change -----------------------------------------------------------------------------------------

CHANGED = r"these logits were never read, and the weights .* have changed since.*before optimizer\.step\(\)"


@pytest.mark.parametrize("read", [torch.sum, lambda z: z.float().sum(), lambda z: z.tolist(), pickle.dumps])
def test_reading_after_the_optimizer_step(case, read):
    optimizer = torch.optim.SGD([case.w], lr=0.1)
    loss, z = case.compiled(case.h, case.w, case.y)
    loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=CHANGED):
        read(z)
    assert z.shape == (6, 11) and "not computed" in repr(z)  # looking is still allowed


def test_read_before_the_optimizer_step(case):
    optimizer = torch.optim.SGD([case.w], lr=0.1)
    loss, z = case.compiled(case.h, case.w, case.y)
    expected = case.eager().detach()
    predictions = z.argmax(-1)
    loss.backward()
    optimizer.step()
    assert torch.equal(predictions, expected.argmax(-1)) and torch.equal(z, expected)


def test_gradient_of_unread_logits_after_a_change():
    """Below Python too: `_Defer`'s own backward would compute from changed weights."""
    case = Case()
    _, z = case.compiled(case.h, case.w, case.y)
    with torch._C.DisableTorchFunctionSubclass():
        total = (z * 2).mean()
        with torch.no_grad():
            case.w.add_(1)
        with pytest.raises(RuntimeError, match=CHANGED):
            total.backward()


def test_weights_in_other_memory(case):
    """As after `model.half()`, or of an optimizer that replaces them."""
    _, z = case.compiled(case.h, case.w, case.y)
    case.w.data = case.w.data * 2
    with pytest.raises(RuntimeError, match=CHANGED):
        z.sum()


@pytest.mark.parametrize("place", ["weight", "hidden"])
def test_a_graph_that_writes_to_operands_after_the_loss(place):
    """What is returned would be computed from what they become."""

    def function(h, w, y):
        h = h.sin()
        loss, logits = head(h, w, y)
        with torch.no_grad():
            (w if place == "weight" else h).mul_(0.5)
        return loss, logits

    case, reports = Case(), []
    with torch.no_grad():
        ours = torch.compile(function, backend=rewritten(reports))(case.h, case.w.clone(), case.y)
        eager = function(case.h, case.w.clone(), case.y)
    if place == "weight":
        assert reports[0].counts == {} and "is changed in place by" in str(reports[0])
    for o, e in zip(ours, eager, strict=True):
        assert relative_error(o, e) < 1e-5


# ---- modes -----------------------------------------------------------------------------------------------------------


def test_no_grad(case):
    with torch.no_grad():
        z = case.lazy()
        assert not z.requires_grad
    assert torch.equal(z, case.eager()) and not (z * 2).requires_grad


def test_inference_mode(case):
    with torch.inference_mode():
        _, z = case.compiled(case.h, case.w, case.y)
        assert torch.equal(z, case.eager())


def test_read_under_no_grad_first(case):
    """The first reader does not decide about the history."""
    _, z = case.compiled(case.h, case.w, case.y)
    with torch.no_grad():
        z.sum()
    for ours, eager in zip(case.gradients(z.mean()), case.gradients(case.eager().mean()), strict=True):
        assert torch.equal(ours, eager)


def test_made_under_autocast():
    h, w, y = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True), torch.randint(11, (6,))
    compiled = torch.compile(head, backend=rewritten(reports := []))
    with torch.autocast("cpu", torch.bfloat16):
        _, z = compiled(h, w, y)
        _, eager = head(h, w, y)
    assert reports[0].counts == {"linear_cross_entropy": 1}
    assert isinstance(z, LazyTensor) and z.dtype is torch.bfloat16
    assert torch.equal(z, eager)  # read outside of autocast
    for ours, theirs in zip(
        torch.autograd.grad(z.float().mean(), (h, w)), torch.autograd.grad(eager.float().mean(), (h, w)), strict=True
    ):
        assert torch.equal(ours, theirs)


def all_under_autocast(h, w):
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(h, w) * SCALE


def upcast_outside_of_autocast(h, w):
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(h, w) * SCALE
    return logits.float()


def autocast_inside_of_autocast(h, w):
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(h, w)
        with torch.autocast("cpu", enabled=False):
            logits = logits.float() * SCALE
        return 5.0 * torch.tanh(logits / 5.0)


@pytest.mark.parametrize(
    "head", [all_under_autocast, upcast_outside_of_autocast, autocast_inside_of_autocast], ids=lambda f: f.__name__
)
def test_made_under_autocast_in_the_graph(head):
    def function(h, w, y):
        logits = head(h, w)
        return F.cross_entropy(logits, y), logits

    h, w, y = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True), torch.randint(11, (6,))
    compiled = torch.compile(function, backend=rewritten(reports := []), fullgraph=True)
    (_, z), (_, eager) = compiled(h, w, y), function(h, w, y)
    assert reports[0].counts == {"linear_cross_entropy": 1}
    assert isinstance(z, LazyTensor) and z.dtype is eager.dtype
    assert torch.equal(z, eager)
    for ours, theirs in zip(
        torch.autograd.grad(z.float().mean(), (h, w)), torch.autograd.grad(eager.float().mean(), (h, w)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_frozen():
    case = Case()
    case.h.requires_grad_(False)
    case.w.requires_grad_(False)
    z = case.lazy()
    assert not z.requires_grad and torch.equal(z, case.eager())


def test_tracing_backends_compute_at_once(case):
    """A rewritten graph means the same to a backend that knows nothing of ours."""
    compiled = torch.compile(head, backend=rewritten(reports := [], "aot_eager"))
    _, logits = compiled(case.h, case.w, case.y)
    assert reports[0].counts == {"linear_cross_entropy": 1}
    assert type(logits) is torch.Tensor and torch.equal(logits, case.eager())
    for o, e in zip(case.gradients(logits.mean()), case.gradients(case.eager().mean()), strict=True):
        assert relative_error(o, e) <= (1e-5 if e.dtype is torch.float32 else 2e-2)


def test_keep(case):
    compiled = torch.compile(head, backend=rewritten(reports := [], options=Options(logits="keep")))
    _, logits = compiled(case.h, case.w, case.y)
    assert type(logits) is torch.Tensor and torch.equal(logits, case.eager())
    assert not reports[0].counts
    assert any("returned" in m.reason for m in reports[0].misses if m.pattern == "linear_cross_entropy")


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize(
    "prepare", [lambda z: z, lambda z: z.double().float(), lambda z: z.mul_(2), lambda z: z.clone()]
)
def test_read_in_another_compiled_function(backend, prepare):
    case = Case()

    def read(z, x):
        return (z * x).softmax(-1).argmax(-1), (z.float() * x).square().mean()

    compiled = torch.compile(read, backend=backend, fullgraph=True)
    for _ in range(2):
        predictions, loss = compiled(prepare(case.lazy()), case.h.sum())
        expected, eager = read(prepare(case.eager()), case.h.sum())
        assert torch.equal(predictions, expected)
        for ours, theirs in zip(case.gradients(loss), case.gradients(eager), strict=True):
            assert relative_error(ours, theirs) < 1e-5


def test_a_graph_that_is_given_them_computes_them_and_says_so(monkeypatch):
    """Only if they are an operand of the graph, or passed on by it."""
    told = []
    monkeypatch.setattr("liger_compile.log._said", set())
    monkeypatch.setattr("liger_compile.log.log.log", lambda level, message: told.append((level, message)))
    case = Case()
    z = case.lazy()
    torch.compile(lambda pair: pair[0] * 2, backend="eager", fullgraph=True)((case.h, z))
    assert not z.computed and not told
    passed = torch.compile(lambda h, z: (h * 2, z), backend="eager", fullgraph=True)
    for _ in range(2):
        z = case.lazy()
        assert passed(case.h, z)[1] is z and z.computed
    assert len(told) == 1 and told[0][0] == logging.INFO and "a compiled function is given them" in told[0][1]


def test_written_to_in_another_compiled_function():
    case = Case()
    halve = torch.compile(lambda z: z.mul_(0.5).sum(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        ours, eager = case.lazy(), case.eager()
        assert relative_error(halve(ours), halve(eager)) < 1e-5
        assert relative_error(ours + 0, eager) < 1e-6


def test_several_outputs_of_one_kind():
    """Two heads, the first one's logits returned twice, and a result between them."""

    def heads(h, v, w, y):
        a, b = F.linear(h, v), F.linear(h, w)
        return F.cross_entropy(a, y) + F.cross_entropy(b, y), a, h * 2, b, a

    h, v, w, y = torch.randn(6, 8), torch.randn(11, 8), torch.randn(12, 8), torch.randint(11, (6,))
    results = torch.compile(heads, backend=rewritten(reports := []))(h, v, w, y)
    assert reports[0].counts == {"linear_cross_entropy": 2}
    assert [isinstance(r, LazyTensor) for r in results] == [False, True, False, True, True]
    for ours, eager in zip(results, heads(h, v, w, y), strict=True):
        assert relative_error(ours.clone(), eager) < 1e-6


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
def test_memory_is_released(read):
    case = Case()
    torch._dynamo.reset()
    gc.collect()
    gc.disable()  # by counting references alone
    try:
        h = case.h * 2
        loss, z = case.compiled(h, case.w, case.y)
        if read:
            value = weakref.ref(z.compute())
        loss.backward()
        kept = weakref.ref(h)
        del h
        assert kept() is not None  # needed as long as somebody may read
        del loss, z
        assert kept() is None
        assert not read or value() is None
    finally:
        gc.enable()


def test_unread_logits_take_no_memory(small_chunks):
    """Nothing of the logits' size is made in a training step that does not read them."""

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for r in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(r, torch.Tensor) and not isinstance(r, LazyTensor) and r.device.type != "meta":
                    largest.append(r.numel())
            return result

    h, w = torch.randn(3000, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    y = torch.randint(50, (3000,))
    graph = rewrite(capture(head, h, w, y)).graphs[0].after  # Dynamo does not compile under a mode
    largest = []
    with Sizes():
        loss, z = graph(h, w, y)
        loss.backward()
        assert max(largest) < z.numel()
        z.sum()
        assert max(largest) >= z.numel()


# ---- models and trainers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_model(family):
    """gemma2 caps its logits: the recipe has that, too."""
    pytest.importorskip("transformers")
    from models import batch, build, gradients

    model, inputs = build(family), batch()
    compiled = torch.compile(model, backend=rewritten())
    results = []
    for call in (model, compiled):
        out = call(**inputs)
        (out.loss + 0.1 * out.logits.square().mean()).backward()
        results.append((out, gradients(model)))
    (eager, grads), (ours, our_grads) = results
    assert isinstance(ours.logits, LazyTensor) and isinstance(ours[1], LazyTensor)
    assert ours.logits.shape == eager.logits.shape and ours.logits.dtype is eager.logits.dtype
    torch.testing.assert_close(ours.logits.compute(), eager.logits)
    for name, grad in grads.items():
        assert relative_error(our_grads[name], grad) <= 1e-4, name


def test_model_in_eval_mode():
    pytest.importorskip("transformers")
    from models import batch, build

    model, inputs = build("llama").eval(), batch()
    compiled = torch.compile(model, backend=rewritten())
    with torch.no_grad():
        out, eager = compiled(**inputs), model(**inputs)
        assert isinstance(out.logits, LazyTensor) and not out.logits.computed
        torch.testing.assert_close(out.logits.compute(), eager.logits)
        del inputs["labels"]
        logits = compiled(**inputs).logits
    assert type(logits) is torch.Tensor
    torch.testing.assert_close(logits, eager.logits)


def test_accelerate_converts_outputs_lazily():
    """Its mixed precision wraps `forward` and converts every half-precision output to float32."""
    pytest.importorskip("transformers")
    operations = pytest.importorskip("accelerate.utils.operations")
    from models import batch, build

    model, inputs = build("llama", torch.bfloat16), batch()
    compiled = torch.compile(model, backend=rewritten())
    out = operations.convert_outputs_to_fp32(lambda **kwargs: compiled(**kwargs))(**inputs)
    assert isinstance(out.logits, LazyTensor) and out.logits.dtype is torch.float32 and not out.logits.computed
    torch.testing.assert_close(out.logits.compute(), model(**inputs).logits.float(), rtol=2e-2, atol=2e-2)


def test_trainer(tmp_path):
    """Training and evaluation with metrics of the logits: the same losses and metrics as in eager."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from models import build

    ids = torch.randint(5, 250, (8, 16))
    data = [{"input_ids": row, "labels": row} for row in ids]
    seen = []

    def preprocess(logits, labels):
        seen.append(tuple(logits.shape))
        return logits.argmax(-1)

    def metrics(prediction):
        return {"accuracy": float((prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]).mean())}

    def train(model):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            report_to=[],
            use_cpu=True,
            max_steps=4,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=data,
            eval_dataset=data[:4],
            compute_metrics=metrics,
            preprocess_logits_for_metrics=preprocess,
        )
        trainer.train()
        kept = [
            {k: v for k, v in entry.items() if "loss" in k or "accuracy" in k} for entry in trainer.state.log_history
        ]
        return [entry for entry in kept if entry]

    eager = train(build("llama"))
    model = build("llama")
    model.compile(backend=rewritten(reports := []))
    ours = train(model)
    assert all(r.counts["linear_cross_entropy"] == 1 for r in reports) and len(reports) >= 2  # train and eval
    assert seen and set(seen) == {(2, 16, 256)}
    assert [entry.keys() for entry in ours] == [entry.keys() for entry in eager] and len(eager) == 7
    for mine, theirs in zip(ours, eager, strict=True):
        for key, value in theirs.items():
            assert abs(mine[key] - value) <= 1e-4 * abs(value), key
    assert abs(eager[-2]["eval_loss"] - eager[2]["eval_loss"]) > 1e-3  # it did train
