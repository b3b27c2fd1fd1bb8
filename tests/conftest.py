"""Settings every test needs before anything else is imported."""

import os
import zlib

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run, interpreted, on CPU tensors
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.complete()


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="other random numbers in every test")


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fresh(request):
    """Every test compiles from scratch, and sees random numbers of its own, whatever ran before it."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) + request.config.getoption("seed"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def ops_are_whole(monkeypatch):
    """Compilers see ops on this device as on a GPU, so that what happens there is tested here. `test_cpu.py` is
    about what happens on a CPU."""
    from liger_compile.ops import _library

    monkeypatch.setattr(_library, "WHOLE_ON", {*_library.WHOLE_ON, "cpu"})


@pytest.fixture
def small_chunks(monkeypatch):
    """The loss holds few logits at a time: 128 rows of them, if there are more, and more than hidden is wide."""
    import importlib

    module = importlib.import_module("liger_compile.ops.linear_cross_entropy")
    monkeypatch.setitem(module.BUDGET, "balanced", 1)


@pytest.fixture
def registered():
    """The list of registered patterns, put back afterwards."""
    from liger_compile import registry

    registry.load_builtin()
    before = list(registry._PATTERNS)
    yield registry._PATTERNS
    registry._PATTERNS[:] = before


@pytest.fixture
def process_group():
    """Of this process alone."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without distributed")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def reports(monkeypatch):
    """The reports of every graph that the backend rewrites from now on."""
    from liger_compile import backend, rewrite

    seen = []

    def recording(gm, options=None):
        report = rewrite(gm, options)
        seen.append(report)
        return report

    monkeypatch.setattr(backend, "rewrite", recording)
    return seen


@pytest.fixture
def everywhere(monkeypatch):
    """FlexAttention also where it is not fast: small, and on the CPU, where the op makes the mask again."""
    monkeypatch.setattr("liger_compile.patterns.attention._unfit", lambda match, seen: None)
