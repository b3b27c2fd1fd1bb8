"""Every option, valid and not; a wrong one is told by its nearest name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from torch import Tensor

from liger_compile import Options, make_pattern
from liger_compile.options import split_options


def cube(x):
    return x * x * x.sigmoid()


def cube_op(x: Tensor) -> Tensor:
    return x * x * x.sigmoid()


OWN = make_pattern(cube, cube_op, name="own_cube")

VALID = [
    # option, value, field of Options afterwards
    ("enable", ["rms_norm", "swiglu"], ("rms_norm", "swiglu")),
    ("enable", ("rope",), ("rope",)),
    ("enable", {"rope"}, ("rope",)),
    ("enable", "linear_cross_entropy", ("linear_cross_entropy",)),
    ("enable", [], ()),
    ("enable", None, None),
    ("disable", ["rms_norm"], ("rms_norm",)),
    ("disable", "swiglu", ("swiglu",)),
    ("disable", [], ()),
    ("disable", None, ()),
    ("patterns", [OWN], (OWN,)),
    ("patterns", (OWN,), (OWN,)),
    ("patterns", OWN, (OWN,)),
    ("patterns", [], ()),
    ("logits", "lazy", "lazy"),
    ("logits", "keep", "keep"),
    ("loss", "lean", "lean"),
    ("loss", "balanced", "balanced"),
    ("loss", "fast", "fast"),
    ("memory", "balanced", "balanced"),
    ("memory", "lean", "lean"),
    ("select", "auto", "auto"),
    ("select", "always", "always"),
    ("fuse", True, True),
    ("fuse", False, False),
    ("verify", True, True),
    ("verify", False, False),
    ("fuel", None, None),
    ("fuel", 0, 0),
    ("fuel", 7, 7),
    ("debug", True, True),
    ("debug", False, False),
    ("debug", "somewhere", "somewhere"),
    ("debug", Path("somewhere"), Path("somewhere")),
]

INVALID = [
    # option, value, what the message says
    ("enable", ["rmsnorm"], r"liger\.enable: no pattern is called 'rmsnorm'; did you mean 'rms_norm'\?"),
    ("enable", "swigl", r"'swigl'; did you mean 'swiglu'\?"),
    ("enable", ["rope", "cross_entropy"], r"'cross_entropy'; did you mean 'linear_cross_entropy'\?"),
    ("enable", [3], r"no pattern is called 3"),
    ("enable", 3, r"liger\.enable: a list of names of patterns, not 3"),
    ("enable", True, r"liger\.enable: a list of names of patterns, not True"),
    ("disable", ["gegl"], r"liger\.disable: no pattern is called 'gegl'; did you mean 'geglu'\?"),
    ("disable", ["own_cube"], r"no pattern is called 'own_cube'"),  # it is not registered
    ("disable", 3, r"liger\.disable: a list of names of patterns, not 3"),
    (
        "patterns",
        [cube],
        r"liger\.patterns: make patterns with liger_compile\.make_pattern.*not <function cube",
    ),
    ("patterns", "rms_norm", r"make_pattern\(\.\.\.\), not 'rms_norm'"),
    ("patterns", None, r"make_pattern\(\.\.\.\), not None"),
    ("logits", "lazily", r'liger\.logits: "lazy" or "keep", not \'lazily\''),
    ("logits", None, r"not None"),
    ("logits", True, r"not True"),
    ("loss", "quick", r'liger\.loss: "lean" or "balanced" or "fast", not \'quick\''),
    ("loss", None, r"not None"),
    ("memory", "little", r'liger\.memory: "speed" or "balanced" or "lean", not \'little\''),
    ("select", "never", r'liger\.select: "auto" or "always", not \'never\''),
    ("fuse", "no", r"liger\.fuse: True or False, not 'no'"),
    ("verify", None, r"liger\.verify: True or False, not None"),
    ("verify", 1, r"not 1"),
    ("verify", "yes", r"not 'yes'"),
    ("fuel", -1, r"liger\.fuel: how many places to rewrite, a whole number from 0 on, not -1"),
    ("fuel", True, r"not True"),
    ("fuel", 1.5, r"not 1\.5"),
    ("fuel", "7", r"not '7'"),
    ("debug", None, r"liger\.debug: True, False or a folder, not None"),
    ("debug", 1, r"not 1"),
    ("debug", ["folder"], r"not \['folder'\]"),
]

UNKNOWN = [
    # key, nearest
    ("liger.enabel", "liger.enable"),
    ("liger.disabled", "liger.disable"),
    ("liger.pattern", "liger.patterns"),
    ("liger.logit", "liger.logits"),
    ("liger.verified", "liger.verify"),
    ("liger.fuels", "liger.fuel"),
    ("liger.Debug", "liger.debug"),
    ("enable", "liger.enable"),
    ("logits", "liger.logits"),
    ("liger_debug", "liger.debug"),
    ("liger.triton.cudagraphs", "triton.cudagraphs"),
    ("max_autotunee", "max_autotune"),
    ("trition.cudagraphs", "triton.cudagraphs"),
    ("max autotune", "max_autotune"),
]


def test_the_tables_cover_every_option():
    names = {f.name for f in dataclasses.fields(Options)}
    assert {name for name, *_ in VALID} == names == {name for name, *_ in INVALID}


def readable(value):
    """Without addresses, which differ among processes that share out the tests."""
    return re.sub(r" at 0x\w+", "", repr(value))[:30]


@pytest.mark.parametrize("name, value, expected", VALID, ids=readable)
def test_valid(name, value, expected):
    ours, inductor = split_options({f"liger.{name}": value})
    assert ours == dataclasses.replace(Options(), **{name: expected})
    assert inductor == {}


@pytest.mark.parametrize("name, value, message", INVALID, ids=readable)
def test_invalid(name, value, message):
    with pytest.raises(ValueError, match=message):
        split_options({f"liger.{name}": value})


def test_a_key_that_is_no_name():
    with pytest.raises(ValueError, match="names of options are strings, not 3"):
        split_options({3: 1})


@pytest.mark.parametrize("key, nearest", UNKNOWN)
def test_unknown_key(key, nearest):
    with pytest.raises(ValueError) as error:
        split_options({"liger.logits": "keep", key: 1})
    assert f"unknown option {key!r}; did you mean {nearest!r}?" in str(error.value)
    for field in dataclasses.fields(Options):  # and what there is
        assert f"liger.{field.name}" in str(error.value)


@pytest.mark.parametrize("options", [None, {}])
def test_no_options(options):
    assert split_options(options) == (Options(), {})


def test_a_pattern_of_this_compilation_can_be_named():
    ours, _ = split_options({"liger.patterns": [OWN], "liger.enable": ["own_cube"]})
    assert ours.wants("own_cube") and not ours.wants("rms_norm")


def test_wants():
    assert Options().wants("rope")
    assert not Options(disable=("rope",)).wants("rope")
    assert not Options(enable=()).wants("rope")
    assert not Options(enable=("rope",), disable=("rope",)).wants("rope")


def test_inductors_options_are_passed_on():
    given = {"max_autotune": True, "triton.cudagraphs": False, "joint_graph_constant_folding": False, "debug": True}
    ours, inductor = split_options({**given, "liger.disable": "rope"})
    assert inductor == given  # `debug` without a prefix is Inductor's
    assert ours == Options(disable=("rope",))


def test_inductors_options_may_be_spelled_with_dashes():
    """As torch.compile takes them for its own backend."""
    assert split_options({"max-autotune": True})[1] == {"max_autotune": True}


def test_inductors_options_have_types():
    with pytest.raises(ValueError, match="max-autotune: a value of type bool, not 'yes'"):
        split_options({"max-autotune": "yes"})
    assert split_options({"post_grad_custom_post_pass": cube})[1]  # None or a function: no type to check
