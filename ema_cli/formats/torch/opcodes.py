"""The opcodes of pickle protocols 2 to 5, one handler each.

Layouts and meanings: the module ``pickletools`` of Python. The opcodes of protocols 0 and 1 that
later protocols never write are refused by name.
"""

from __future__ import annotations

import struct
from typing import Any

from ema_cli.formats.torch.data import DATA_BUILDERS
from ema_cli.formats.torch.literals import (
    Handler,
    binbytearray,
    binbytes,
    binfloat,
    binint,
    binint1,
    binint2,
    constant,
    long,
    string,
    unicode,
)
from ema_cli.formats.torch.nodes import Global, Opaque, Ordered, TensorRef
from ema_cli.formats.torch.rebuild import (
    PARAMETER,
    TENSOR_BUILDERS,
    new_parameter,
    set_parameter,
    storage,
)
from ema_cli.formats.torch.state import State

STOP = ord(".")
# How far a line with a module or a name may reach.
_LINE_LIMIT = 1000

_u4 = struct.Struct("<I").unpack_from

_BUILDERS = {**TENSOR_BUILDERS, **DATA_BUILDERS}
_DTYPE = Global("numpy", "dtype")
_ORDERED = Global("collections", "OrderedDict")
_MISSING = object()


# ---------------------------------------------------------------------------- containers


def _mark(state: State) -> None:
    state.make()
    state.marks.append(state.stack)
    state.stack = []


def _pop(state: State) -> None:
    # A mark is popped like an object where nothing was pushed since.
    if state.stack:
        state.stack.pop()
    else:
        state.pop_mark()


def _pop_mark(state: State) -> None:
    state.pop_mark()


def _empty_list(state: State) -> None:
    state.make()
    state.stack.append([])


def _empty_dict(state: State) -> None:
    state.make()
    state.stack.append({})


def _empty_set(state: State) -> None:
    state.make(4)
    state.stack.append(set())


def _tuple(state: State) -> None:
    state.make()
    items = state.pop_mark()
    state.stack.append(tuple(items))


def _tuple1(state: State) -> None:
    state.make()
    state.stack[-1] = (state.stack[-1],)


def _tuple2(state: State) -> None:
    state.make()
    last = state.stack.pop()
    state.stack[-1] = (state.stack[-1], last)


def _tuple3(state: State) -> None:
    state.make()
    last = state.stack.pop()
    middle = state.stack.pop()
    state.stack[-1] = (state.stack[-1], middle, last)


def _append(state: State) -> None:
    item = state.stack.pop()
    _extend(state, [item])


def _appends(state: State) -> None:
    _extend(state, state.pop_mark())


def _extend(state: State, items: list[Any]) -> None:
    target = state.stack[-1]
    if type(target) is list:
        target.extend(items)
    elif type(target) is Opaque:
        target.items.extend(items)
    else:
        state.fail(f"expected a list to append to, found a {type(target).__name__}")


def _additems(state: State) -> None:
    items = state.pop_mark()
    target = state.stack[-1]
    if type(target) is set:
        state.check_keys(items, len(target))
        target.update(items)
    elif type(target) is Opaque:
        target.items.extend(items)
    else:
        state.fail(f"expected a set to add to, found a {type(target).__name__}")


def _frozenset(state: State) -> None:
    state.make(4)
    items = state.pop_mark()
    state.check_keys(items, 0)
    state.stack.append(frozenset(items))


def _setitem(state: State) -> None:
    value = state.stack.pop()
    key = state.stack.pop()
    state.set_pairs(state.stack[-1], [key, value])


def _setitems(state: State) -> None:
    flat = state.pop_mark()
    state.set_pairs(state.stack[-1], flat)


# ---------------------------------------------------------------------------- memo


def _binput(state: State) -> None:
    state.memo[state.data[state.pos]] = state.stack[-1]
    state.pos += 1


def _long_binput(state: State) -> None:
    state.memo[_u4(state.data, state.pos)[0]] = state.stack[-1]
    state.pos += 4


def _memoize(state: State) -> None:
    state.memo[len(state.memo)] = state.stack[-1]


def _binget(state: State) -> None:
    _get(state, state.data[state.pos])
    state.pos += 1


def _long_binget(state: State) -> None:
    _get(state, _u4(state.data, state.pos)[0])
    state.pos += 4


def _get(state: State, place: int) -> None:
    found = state.memo.get(place, _MISSING)
    if found is _MISSING:
        state.fail(f"expected an object kept under number {place:,}, found none")
    state.stack.append(found)


# ---------------------------------------------------------------------------- names, objects


def _line(state: State) -> str:
    end = state.data.find(b"\n", state.pos, state.pos + _LINE_LIMIT)
    if end < 0:
        state.fail("expected the line of a name to end")
    raw = state.take(end - state.pos)
    state.pos += 1
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        state.fail("expected a name in UTF-8, found other bytes")


def _global(state: State) -> None:
    module = _line(state)
    state.stack.append(state.name(module, _line(state)))


def _stack_global(state: State) -> None:
    name = state.stack.pop()
    module = state.stack.pop()
    if type(name) is not str or type(module) is not str:
        state.fail("expected a module and a name, found something else")
    state.stack.append(state.name(module, name))


def _binpersid(state: State) -> None:
    state.stack.append(storage(state, state.stack.pop()))


def _arguments(state: State) -> tuple[Any, ...]:
    args = state.stack.pop()
    if type(args) is not tuple:
        state.fail(f"expected the arguments of a call, found a {type(args).__name__}")
    return args


def _reduce(state: State) -> None:
    args = _arguments(state)
    function = state.stack.pop()
    builder = _BUILDERS.get(function) if type(function) is Global else None
    made = builder(state, args) if builder is not None else None
    state.make(4)
    state.stack.append(_opaque(state, function, args, "reduce") if made is None else made)


def _newobj(state: State) -> None:
    args = _arguments(state)
    kind = state.stack.pop()
    made = None
    if kind == PARAMETER:
        made = new_parameter(state, args)
    elif kind == _ORDERED and not args:
        made = Ordered()
    state.make(4)
    state.stack.append(_opaque(state, kind, args, "newobj") if made is None else made)


def _newobj_ex(state: State) -> None:
    keywords = state.stack.pop()
    args = _arguments(state)
    if type(keywords) is not dict:
        state.fail(f"expected keyword arguments, found a {type(keywords).__name__}")
    state.make(4)
    kind = state.stack.pop()
    state.stack.append(_opaque(state, kind, (args, keywords), "newobj_ex"))


def _opaque(state: State, function: Any, args: tuple[Any, ...], where: str) -> Opaque:
    if type(function) not in (Global, Opaque):
        state.fail(f"expected something to call, found a {type(function).__name__}")
    made = Opaque(function, args, where)
    if function == _DTYPE:
        state.dtypes.append(made)
    return made


def _build(state: State) -> None:
    value = state.stack.pop()
    target = state.stack[-1]
    kind = type(target)
    if kind is Opaque and target.state is None:
        target.state = value
    elif kind is Ordered and type(value) is dict:
        count = len(target.attributes)
        target.attributes.update(value)
        if len(target.attributes) != count + len(value):
            state.fail("an attribute of an OrderedDict is set twice")
    elif kind is TensorRef:
        set_parameter(state, target, value)
    else:
        state.fail(f"expected an object to set the state of, found a {kind.__name__}")


# ---------------------------------------------------------------------------- framing, refusals


def _proto(state: State) -> None:
    version = state.data[state.pos]
    if state.pos != state.start + 1 or not 2 <= version <= 5:
        state.fail(f"expected pickle protocol 2 to 5 at the start, found {version}")
    state.pos += 1


def _frame(state: State) -> None:
    length = state.length(8)
    left = len(state.data) - state.pos
    if length > left:
        state.fail(f"expected a frame of at most {left:,} bytes, found {length:,}")


def _refused(name: str) -> Handler:
    def refuse(state: State) -> None:
        state.refuse(f"the pickle opcode {name}, which torch.save never writes")

    return refuse


def _unknown(state: State) -> None:
    state.fail(f"expected a pickle opcode, found byte 0x{state.data[state.pos - 1]:02x}")


_HANDLERS: dict[str, Handler] = {
    "(": _mark,
    "0": _pop,
    "1": _pop_mark,
    "B": binbytes(4),
    "C": binbytes(1),
    "G": binfloat,
    "J": binint,
    "K": binint1,
    "M": binint2,
    "N": constant(None),
    "Q": _binpersid,
    "R": _reduce,
    "T": string(4),
    "U": string(1),
    "X": unicode(4),
    "]": _empty_list,
    "a": _append,
    "b": _build,
    "c": _global,
    "e": _appends,
    "h": _binget,
    "j": _long_binget,
    "q": _binput,
    "r": _long_binput,
    "s": _setitem,
    "t": _tuple,
    "u": _setitems,
    ")": constant(()),
    "}": _empty_dict,
    "\x80": _proto,
    "\x81": _newobj,
    "\x85": _tuple1,
    "\x86": _tuple2,
    "\x87": _tuple3,
    "\x88": constant(True),
    "\x89": constant(False),
    "\x8a": long(1),
    "\x8b": long(4),
    "\x8c": unicode(1),
    "\x8d": unicode(8),
    "\x8e": binbytes(8),
    "\x8f": _empty_set,
    "\x90": _additems,
    "\x91": _frozenset,
    "\x92": _newobj_ex,
    "\x93": _stack_global,
    "\x94": _memoize,
    "\x95": _frame,
    "\x96": binbytearray,
}
_REFUSED = {
    "2": "DUP",
    "F": "FLOAT",
    "I": "INT",
    "L": "LONG",
    "P": "PERSID",
    "S": "STRING",
    "V": "UNICODE",
    "d": "DICT",
    "g": "GET",
    "i": "INST",
    "l": "LIST",
    "o": "OBJ",
    "p": "PUT",
    "\x82": "EXT1",
    "\x83": "EXT2",
    "\x84": "EXT4",
    "\x97": "NEXT_BUFFER",
    "\x98": "READONLY_BUFFER",
}

TABLE: tuple[Handler, ...] = tuple(
    _HANDLERS.get(chr(code))
    or (_refused(_REFUSED[chr(code)]) if chr(code) in _REFUSED else _unknown)
    for code in range(256)
)
