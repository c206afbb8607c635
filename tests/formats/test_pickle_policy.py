"""Which names of a pickle may be passed on to whatever loads the output."""

from __future__ import annotations

import _compat_pickle
import importlib
import pickle
import sys
import typing
from typing import Any

import numpy as np
import pytest
from torch_pickles import (
    ACCEPTED,
    PICKLES,
    call,
    dict_of,
    name,
    number,
    pickle_of,
    text,
    tuple_of,
)

from ema_cli.formats.torch import policy
from ema_cli.formats.torch.machine import load
from ema_cli.formats.torch.nodes import Global


def verdict(raw: bytes) -> tuple[list[str], list[str]]:
    """Return the full names of classes (b) and (c) in a pickle."""
    judged = policy.judge(load(raw, "a.pt", "data.pkl")[2])
    return [n.full for n in judged.inert], [n.full for n in judged.unknown]


def test_the_list_of_pytorch_itself() -> None:
    """Class (a) is what the loader of PyTorch 2.13 says it accepts, no more and no less."""
    assert sorted(n.full for n in policy._WEIGHTS_ONLY) == ACCEPTED


@pytest.mark.parametrize(
    "case", ["checkpoint", "checkpoint 4", "views", "dtypes", "parameters", "opaque"]
)
def test_what_loads_with_weights_only_passes(case: str) -> None:
    """State of models and optimizers, all kinds of tensors."""
    assert verdict(PICKLES[case]) == ([], [])


def test_data_classes_pass_with_a_note() -> None:
    """argparse, NumPy, pathlib, defaultdict, under the names of Python 2 and 3."""
    assert verdict(PICKLES["namespace"]) == (["argparse.Namespace"], [])
    for case, builtins in (("numpy", "__builtin__"), ("numpy 4", "builtins")):
        assert verdict(PICKLES[case]) == (
            [
                "numpy._core.multiarray.scalar",
                "numpy.dtype",
                "numpy._core.multiarray._reconstruct",
                "numpy.ndarray",
                "pathlib.PurePosixPath",
                "collections.defaultdict",
                f"{builtins}.list",
            ],
            [],
        )


def test_classes_of_programs_do_not_pass() -> None:
    """A whole module is made of classes, whose code decides what loading does."""
    inert, unknown = verdict(PICKLES["module"])
    assert inert == []
    assert unknown == [
        "torch.nn.modules.container.Sequential",
        "torch.nn.modules.linear.Linear",
        "torch.nn.modules.batchnorm.BatchNorm1d",
    ]


def test_each_name_once_in_order_as_spelled() -> None:
    """Names repeated in other order, and both spellings of a module."""
    spelled = [
        Global("__builtin__", "int"),
        Global("os", "system"),
        Global("numpy.core.multiarray", "scalar"),
        Global("builtins", "eval"),
        Global("numpy._core.multiarray", "scalar"),
        Global("__builtin__", "eval"),
        Global("os", "system"),
        Global("__builtin__", "set"),
        Global("builtins", "set"),
    ]
    assert policy.judge(spelled) == (
        (spelled[0], spelled[2], spelled[4]),
        (spelled[1], spelled[3], spelled[5]),
    )


REFUSED = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("sys", "exit"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("__builtin__", "exec"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("builtins", "type"),
    ("builtins", "map"),
    ("builtins", "open"),
    ("functools", "partial"),
    ("functools", "reduce"),
    ("operator", "attrgetter"),
    ("operator", "methodcaller"),
    ("copyreg", "_reconstructor"),
    ("copy_reg", "_reconstructor"),
    ("importlib", "import_module"),
    ("types", "FunctionType"),
    ("types", "CodeType"),
    ("_codecs", "decode"),
    ("collections", "namedtuple"),
    ("torch", "load"),
    ("torch.hub", "load"),
    ("torch.serialization", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.utils.data", "DataLoader"),
    ("numpy", "load"),
    ("numpy", "frompyfunc"),
    ("numpy", "vectorize"),
    ("numpy.testing", "runstring"),
    # Behind listed modules and classes, by a path that protocol 4 follows.
    ("torch", "_utils._rebuild_tensor_v2"),
    ("argparse", "sys.exit"),
    ("argparse", "Namespace.__init__"),
    ("torch._utils", "sys"),
    ("transformers.trainer_utils", "importlib"),
    ("numpy", "ndarray.tofile"),
    # The same letters, put together otherwise.
    ("torch.nn", "parameter.Parameter"),
    ("argparse.Namespace", ""),
    ("", "set"),
    ("Builtins", "set"),
    ("builtins", "Set"),
]


@pytest.mark.parametrize("pair", REFUSED, ids=".".join)
def test_what_can_do_harm_is_unknown(pair: tuple[str, str]) -> None:
    """Nothing that runs, imports, looks up, opens or makes classes is in a list."""
    assert policy.judge([Global(*pair)]) == ((), (Global(*pair),))


def test_a_listed_name_means_the_same_to_python_2() -> None:
    """Loaders translate names in pickles of protocol 2: never from ours into another."""
    for listed in policy._WEIGHTS_ONLY | policy._HARMLESS:
        modules = ["builtins", "__builtin__"] if listed.module == "builtins" else [listed.module]
        for module in modules:
            pair = (module, listed.name)
            moved = (_compat_pickle.IMPORT_MAPPING.get(module, module), listed.name)
            assert _compat_pickle.NAME_MAPPING.get(pair, moved) == listed
        assert "." not in listed.name


# What is listed of Python itself and NumPy; pathlib._local is Python 3.13's.
WITH_TESTS = {*sys.stdlib_module_names, "numpy"}
LISTED = {name.module for name in policy._HARMLESS} - {"pathlib._local"}
HERE = sorted(module for module in LISTED if module.split(".")[0] in WITH_TESTS)


@pytest.mark.parametrize("module", HERE)
def test_names_of_class_b_are_classes(module: str) -> None:
    """Each is a class or `Any`, but for three functions of NumPy."""
    found = importlib.import_module(module)
    for listed in policy._HARMLESS:
        if listed.module == module and listed.name not in ("scalar", "_reconstruct", "_frombuffer"):
            thing = getattr(found, listed.name)
            assert isinstance(thing, type) or thing is typing.Any


# ---------------------------------------------------------------------------- dtypes of NumPy


def dtype_names(thing: Any) -> list[str]:
    """Return the names that a pickle of `thing` by NumPy is refused for."""
    return verdict(pickle.dumps(thing, 2))[1]


@pytest.mark.parametrize(
    "kind", ["?", "i1", "<i4", ">u8", "f2", "f8", "c16", "S5", "U3", "<U12", "V8", "O"]
)
def test_usual_dtypes_pass(kind: str) -> None:
    """As NumPy itself pickles them."""
    assert dtype_names(np.zeros(2, kind)) == []


@pytest.mark.parametrize("kind", ["i4,f8", "M8[s]", "(2,)i4"])
def test_unusual_dtypes_do_not(kind: str) -> None:
    """Fields, units and parts: their state says how memory is read."""
    assert dtype_names(np.dtype(kind)) == ["numpy.dtype (with a layout of its own)"]


def dtype(of: bytes, *state: bytes) -> bytes:
    """Return a pickle of a dtype with any state, which is thrown away afterwards."""
    made = call("numpy", "dtype", of, b"\x89", b"\x88")
    return pickle_of(made, tuple_of(*state), b"b0N")


USUAL = [number(3), text("|"), b"N", b"N", b"N", number(-1), number(-1)]


@pytest.mark.parametrize(
    ("of", "state"),
    [
        (text("O8"), [*USUAL, number(0)]),  # bytes would be taken for pointers
        (text("i8"), [*USUAL, number(63)]),
        (text("S5"), [*USUAL[:5], number(1 << 40), number(1), number(0)]),
        (text("S5"), [*USUAL[:5], number(-5), number(1), number(0)]),
        (text("U3"), [*USUAL[:5], number(5), number(4), number(8)]),
        (text("V8"), [number(3), text("|"), b"N", tuple_of(text("f")), dict_of(), number(8)]),
        (text("i8"), [*USUAL[:1], text("x"), *USUAL[2:], number(0)]),
        (text("i8"), [number(2), *USUAL[1:], number(0)]),
        (text("i8"), [*USUAL, number(0), dict_of()]),
        (text("i8"), []),
        (text("i"), [*USUAL, number(0)]),
        (number(8), [*USUAL, number(0)]),
        (name("numpy", "ndarray"), [*USUAL, number(0)]),
    ],
)
def test_a_dtype_made_up_does_not_pass(of: bytes, state: list[bytes]) -> None:
    """NumPy takes sizes and flags from the state as they are, and reads memory by them."""
    assert "numpy.dtype (with a layout of its own)" in verdict(dtype(of, *state))[1]
    assert verdict(dtype(text("i8"), *USUAL, number(0)))[1] == []
