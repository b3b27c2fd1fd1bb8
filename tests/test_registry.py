"""The table of patterns: which comes first, what is undone, what other packages put in."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from helpers import capture

import liger_compile
from liger_compile import Options, make_pattern, pattern, register_pattern, registry, rewrite, unregister_pattern

registered_block = liger_compile.registered  # `registered` is a fixture here


def same(x):
    return x.clone()


def sine(x):
    return x.sin().exp()


def wide(x):
    return x.sin().exp().cos()


def counts(graph, *args, options=None):
    return rewrite(capture(graph, *(args or (torch.randn(3),))), options).counts


# ---- priority --------------------------------------------------------------------------------------------------------


def two(narrow, broad):
    made = (make_pattern(sine, same, name="narrow", priority=narrow), make_pattern(wide, same, priority=broad))
    return Options(enable=("narrow", "wide"), patterns=made)


@pytest.mark.parametrize(
    "narrow, broad, winner", [(0, 0, "wide"), (1, 0, "narrow"), (1, 2, "wide"), (-1, -2, "narrow")]
)
def test_priority_goes_before_width(narrow, broad, winner):
    assert counts(wide, options=two(narrow, broad)) == {winner: 1}


def test_a_pattern_of_ones_own_wins_over_one_that_is_shipped(registered):
    def gated(gate, up):
        return F.silu(gate) * up

    x, y = torch.randn(2, 3)
    register_pattern(gated, lambda gate, up: gate.clone(), name="mine")
    assert counts(gated, x, y) == {"swiglu": 1}  # equal in width: the one registered first
    register_pattern(gated, lambda gate, up: gate.clone(), name="mine", priority=1)
    assert counts(gated, x, y) == {"mine": 1}


def test_priority_goes_before_exactness(registered):
    """swiglu as written is in bfloat16; a pattern that computes in float32 fits it only by a relaxed match."""

    def gated(gate, up):
        return F.silu(gate.float()) * up.float()

    def graph(gate, up):
        return F.silu(gate) * up

    x, y = torch.randn(2, 3, dtype=torch.bfloat16)
    for priority, winner in ((0, "swiglu"), (1, "mine")):
        made = make_pattern(gated, lambda gate, up: gate.clone(), name="mine", priority=priority)
        assert counts(graph, x, y, options=Options(patterns=(made,))) == {winner: 1}


def test_where_the_first_is_refused_the_next_is_tried():
    first = make_pattern(sine, same, lambda match: "not here", name="first", priority=1)
    second = make_pattern(sine, same, name="second")
    assert counts(sine, options=Options(enable=("first", "second"), patterns=(first, second))) == {"second": 1}


def test_the_decorator_takes_a_priority(registered):
    pattern(replace=same, priority=3)(sine)
    assert registered[-1].priority == 3


# ---- registering again, and undoing ----------------------------------------------------------------------------------


def test_effects_are_told(registered):
    """Each once in the table; one that cannot be told does not prevent the rewrite."""

    def effect(match):
        (width,) = match.shape("x")
        if width == 5:
            raise ValueError("odd")
        return f"{width} bytes" if width > 2 else ""

    register_pattern(sine, same, effect=effect)
    graph = capture(lambda *xs: [x.sin().exp() for x in xs], *map(torch.randn, (2, 3, 3, 4)))
    report = rewrite(graph)
    assert [m.effect for m in report.matches] == ["", "3 bytes", "3 bytes", "4 bytes"]
    assert "what it spares" in str(report) and "3 bytes; 4 bytes" in str(report)
    assert "what it spares" not in str(rewrite(capture(sine, torch.randn(2))))
    (match,) = rewrite(capture(sine, torch.randn(5))).matches
    assert match.effect == "effect= raises ValueError: odd"


def test_registering_a_function_again_replaces_it(registered):
    count = len(registered)
    register_pattern(sine, same, check=lambda match: "no")
    assert not counts(sine)
    register_pattern(wide, same)
    again = register_pattern(sine, same)
    assert len(registered) == count + 2 and registered[count] is again  # in its place
    assert counts(sine) == {"sine": 1}


CELL = """
@liger_compile.pattern(replace=lambda x: x.clone(), name=name)
def of_a_cell(x):
    return getattr(x.sin(), operation)()
"""


def test_a_cell_of_a_notebook_can_be_run_twice(registered):
    """Its function is another object then, with the same names."""
    count = len(registered)
    for operation in ("exp", "cos"):
        exec(CELL, {"liger_compile": liger_compile, "__name__": "__main__", "operation": operation, "name": "cell"})
    assert len(registered) == count + 1
    assert counts(lambda x: (x.sin().exp(), x.sin().cos().sin())) == {"cell": 1}
    exec(CELL, {"liger_compile": liger_compile, "__name__": "__main__", "operation": "exp", "name": "other"})
    exec(CELL, {"liger_compile": liger_compile, "__name__": "elsewhere", "operation": "exp", "name": "cell"})
    assert len(registered) == count + 3


def test_functions_made_in_a_loop_stay_apart(registered):
    """They have one name, and are told apart by what they close over."""

    def made(operation):
        return lambda x: operation(x.sin())

    count = len(registered)
    for operation in (torch.exp, torch.cos):
        register_pattern(made(operation), same, name="looped")
    assert len(registered) == count + 2
    assert counts(lambda x: (x.sin().exp(), (x + 1).sin().cos())) == {"looped": 2}


def test_unregister_by_name(registered):
    before = list(registered)
    first = register_pattern(sine, same, name="mine")
    second = register_pattern(wide, same, name="mine")
    assert counts(sine) == {"mine": 1}
    assert unregister_pattern("mine") == [first, second]
    assert registered == before and not counts(sine)


def test_unregister_one_of_several_spellings(registered):
    first = register_pattern(sine, same, name="mine")
    second = register_pattern(wide, same, name="mine")
    assert unregister_pattern(first) == [first]
    assert registered[-1] is second
    assert not counts(sine) and counts(wide) == {"mine": 1}


def test_unregister_what_is_shipped(registered):
    def gated(x, y):
        return F.silu(x) * y

    x, y = torch.randn(2, 3)
    before = list(registered)
    with registered_block():
        removed = unregister_pattern("swiglu")
        assert {p.name for p in removed} == {"swiglu"} and not counts(gated, x, y)
    assert registered == before and counts(gated, x, y) == {"swiglu": 1}


UNKNOWN = [
    ("swigl", r"no pattern is called 'swigl'; did you mean 'swiglu'\?"),
    ("rmsnorm", r"no pattern is called 'rmsnorm'; did you mean 'rms_norm'\?"),
    (sine, r"no pattern is called '<function sine"),
    (make_pattern(sine, same, name="rop"), r"the pattern 'rop' is not registered; did you mean 'rope'\?"),
    (make_pattern(sine, same, name="rope"), r"the pattern 'rope' is not registered$"),
]


@pytest.mark.parametrize("what, message", UNKNOWN, ids=range(len(UNKNOWN)))
def test_unregister_what_is_not_there(what, message, registered):
    before = list(registered)
    with pytest.raises(ValueError, match=message):
        unregister_pattern(what)
    assert registered == before


def test_registered_for_a_block(registered):
    before = list(registered)
    first, second = make_pattern(sine, same, name="first"), make_pattern(torch_cube, same, name="second")
    with registered_block(first, second):
        assert registered == [*before, first, second]
        assert counts(lambda x: (x.sin().exp(), x.cos().exp())) == {"first": 1, "second": 1}
        register_pattern(wide, same)
    assert registered == before
    assert not counts(lambda x: (x.sin().exp(), x.cos().exp()))


def torch_cube(x):
    return x.cos().exp()


def test_a_block_that_raises_is_undone(registered):
    before = list(registered)
    with pytest.raises(KeyError), registered_block(make_pattern(sine, same)):
        raise KeyError
    assert registered == before


@pytest.mark.parametrize("what", [sine, "swiglu", None])
def test_registered_takes_patterns_alone(what, registered):
    before = list(registered)
    with pytest.raises(ValueError, match=r"make patterns with liger_compile\.make_pattern"), registered_block(what):
        pass
    assert registered == before


# ---- other packages --------------------------------------------------------------------------------------------------

PLUGIN = """
import liger_compile, torch

def {name}(x):
    return x.{operation}().exp().{operation}()

def register():
    liger_compile.register_pattern({name}, lambda x: x.clone())
"""


def package(folder, name, entry_points, **modules):
    """A distribution as pip leaves it in a folder on sys.path."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[liger_compile.patterns]\n" + "".join(f"{e}\n" for e in entry_points))
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(textwrap.dedent(source))


@pytest.fixture
def plugins(tmp_path, monkeypatch, registered):
    """A folder for packages whose entry points nobody has loaded yet."""
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._entry_points.cache_clear()
    yield tmp_path
    registry._entry_points.cache_clear()
    monkeypatch.undo()
    registry.load_entry_points()


def added(registered, before):
    return [p.name for p in registered[before:]]


def test_entry_points(plugins, registered):
    """A module is imported, a function is called; in the order of names, behind what is shipped."""
    package(plugins, "ship-b", ["b = ship_b:register"], ship_b=PLUGIN.format(name="by_function", operation="sin"))
    source = PLUGIN.format(name="by_module", operation="cos") + "\nregister()\n"
    package(plugins, "ship-a", ["a = ship_a"], ship_a=source)
    before = len(registered)
    assert counts(lambda x: (x.sin().exp().sin(), x.cos().exp().cos())) == {"by_function": 1, "by_module": 1}
    assert added(registered, before) == ["by_module", "by_function"]
    assert registry.patterns() == registered  # once
    assert added(registered, before) == ["by_module", "by_function"]


def test_names_of_shipped_patterns_are_options(plugins, registered):
    package(plugins, "ship-c", ["c = ship_c:register"], ship_c=PLUGIN.format(name="by_package", operation="sin"))
    from liger_compile.options import split_options

    assert split_options({"liger.disable": ["by_package"]})[0].disable == ("by_package",)
    assert [p.name for p in unregister_pattern("by_package")] == ["by_package"]


FAILING = {
    "no_module = ship_nowhere": r"package ship-broken \(entry point no_module = ship_nowhere\).*ModuleNotFoundError",
    "no_name = ship_good:nothing": r"entry point no_name = ship_good:nothing\).*AttributeError",
    "no_call = ship_good:number": r"entry point no_call = ship_good:number\).*TypeError: 'int' object is not callable",
    "argument = ship_good:takes": r"entry point argument = ship_good:takes\).*TypeError: takes\(\) missing 1 required",
    "raises = ship_bad": r"entry point raises = ship_bad\).*ZeroDivisionError: division by zero",
    "refused = ship_good:refused": r"entry point refused.*PatternError: pattern 'refused_pattern'.*unchanged",
}


@pytest.mark.parametrize("entry, message", FAILING.items(), ids=range(len(FAILING)))
def test_a_failing_entry_point_is_a_warning(plugins, registered, caplog_of_ours, entry, message):
    source = PLUGIN.format(name="good", operation="sin")
    source += "\nnumber = 3\ndef takes(x): pass\ndef refused_pattern(x): return x\n"
    source += "def refused(): liger_compile.register_pattern(refused_pattern, lambda x: x)\n"
    package(plugins, "ship-broken", [entry], ship_bad="1 / 0\n")
    package(plugins, "ship-good", ["zzz = ship_good:register"], ship_good=source)
    for module in ("ship_good", "ship_bad"):
        sys.modules.pop(module, None)
    torch._dynamo.reset()

    def graph(x):
        return x.sin().exp().sin()

    x = torch.randn(3)
    assert torch.equal(torch.compile(graph, backend="liger")(x), x)  # the good one is used all the same
    (warning,) = [r.getMessage() for r in caplog_of_ours if r.levelno == logging.WARNING]
    assert "are not used" in warning
    assert re.search(message, warning, re.S), warning


@pytest.fixture
def caplog_of_ours():
    """What the package's logger says; pytest's own capture of logs is switched off here."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("liger_compile")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def test_an_entry_point_may_look_at_the_table(plugins, registered):
    source = "import liger_compile\ndef narrow(): liger_compile.unregister_pattern('geglu')\n"
    package(plugins, "ship-d", ["d = ship_d:narrow"], ship_d=source)
    assert "geglu" not in [p.name for p in registry.patterns()]


def test_entry_points_in_a_fresh_process(tmp_path):
    """Without any import of ours but the one that torch.compile makes."""
    package(tmp_path, "ship-e", ["e = ship_e:register"], ship_e=PLUGIN.format(name="fresh", operation="sin"))
    script = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import torch
        x = torch.randn(3)
        print(torch.equal(torch.compile(lambda x: x.sin().exp().sin(), backend="liger")(x), x))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr[-2000:]
