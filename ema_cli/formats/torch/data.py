"""What a call in a pickle stands for, where it makes plain data of Python or of PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ema_cli.formats.torch.nodes import Global, Ordered
from ema_cli.formats.torch.state import Builder, State

_LATIN_1 = ("latin1", "latin-1", "iso-8859-1")


def _ordered(state: State, args: tuple[Any, ...]) -> Any:
    """Return an ordered dict; Python 2 gives its pairs as a list of lists."""
    made = Ordered()
    if not args:
        return made
    if len(args) != 1 or type(args[0]) is not list:
        state.fail("expected an OrderedDict to be made of nothing or of a list of pairs")
    flat: list[Any] = []
    for pair in args[0]:
        if type(pair) not in (list, tuple) or len(pair) != 2:
            state.fail("expected an OrderedDict to be made of pairs")
        flat += pair
    state.set_pairs(made, flat)
    return made


def _size(state: State, args: tuple[Any, ...]) -> Any:
    if len(args) != 1 or type(args[0]) not in (tuple, list):
        state.fail("expected a Size to be made of a tuple")
    return tuple(state.count(size, "elements of a dimension") for size in args[0])


def _set(state: State, args: tuple[Any, ...]) -> Any:
    items = _items(state, args)
    state.check_keys(items, 0)
    return set(items)


def _frozenset(state: State, args: tuple[Any, ...]) -> Any:
    return frozenset(_set(state, args))


def _items(state: State, args: tuple[Any, ...]) -> Sequence[Any]:
    if not args:
        return ()
    if len(args) != 1 or type(args[0]) not in (list, tuple):
        state.fail("expected a set to be made of a list")
    items: Sequence[Any] = args[0]
    return items


def _encode(state: State, args: tuple[Any, ...]) -> Any:
    """Return bytes, which protocol 2 keeps as text."""
    if len(args) != 2 or type(args[0]) is not str or args[1] not in _LATIN_1:
        state.fail("expected bytes to be made of a string and latin1")
    try:
        return args[0].encode("latin-1")
    except UnicodeEncodeError:
        state.fail("expected bytes, found characters above 255")


def _bytes(state: State, args: tuple[Any, ...]) -> Any:
    if args and (len(args) != 1 or type(args[0]) is not bytes):
        state.fail("expected bytes to be made of bytes")
    return args[0] if args else b""


def _bytearray(state: State, args: tuple[Any, ...]) -> Any:
    if len(args) == 2:
        return bytearray(_encode(state, args))
    return bytearray(_bytes(state, args))


def _complex(state: State, args: tuple[Any, ...]) -> Any:
    if len(args) != 2 or type(args[0]) is not float or type(args[1]) is not float:
        state.fail("expected a complex number to be made of two numbers")
    return complex(*args)


def _both(name: str, builder: Builder) -> dict[Global, Builder]:
    """Return a builder under the names that Python 3 and Python 2 give the module."""
    return {Global(module, name): builder for module in ("builtins", "__builtin__")}


DATA_BUILDERS: Mapping[Global, Builder] = {
    Global("torch", "Size"): _size,
    Global("collections", "OrderedDict"): _ordered,
    Global("_codecs", "encode"): _encode,
    **_both("set", _set),
    **_both("frozenset", _frozenset),
    **_both("bytes", _bytes),
    **_both("bytearray", _bytearray),
    **_both("complex", _complex),
}
