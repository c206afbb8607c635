"""Attacks 69-71, 73, 77-79 and 81 on torch files: what their pickles say and do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from attacks import NOT_PASSED_ON, REFUSED, Attack, Ends, Values, canary, made
from raw_pickle import (
    APPEND,
    APPENDS,
    BUILD,
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_SET,
    EMPTY_TUPLE,
    FALSE,
    HOOKS,
    MARK,
    MEMOIZE,
    NEWOBJ,
    NEWOBJ_EX,
    NONE,
    ORDERED,
    POP,
    POP_MARK,
    PROTO,
    REBUILD,
    REDUCE,
    SETITEM,
    SETITEMS,
    TRUE,
    checkpoint,
    glob,
    ints,
    items,
    listed,
    mapping,
    number,
    real,
    reduce,
    short,
    stack_glob,
    storage,
    tensor,
    text,
    torch_file,
)

PT = ".pt"
W = np.float32([[1, 2, 3], [4, 5, 6]])
B = np.float32([0.5, -2, 8])
SOUND: Values = {"w": W, "b": B}
Opcodes = Callable[[str], bytes]  # of a shell command


def of_pickle(
    name: str,
    item: int,
    what: str,
    pickle: bytes | Opcodes,
    ends: Ends = REFUSED,
    *words: str,
    values: Values | None = SOUND,
) -> Attack:
    """Return an attack that is a torch file of this pickle, which may hold a command."""

    def content(folder: Path) -> bytes:
        command = f"touch {canary(folder)}/pwned"
        return torch_file(pickle if isinstance(pickle, bytes) else pickle(command))

    return Attack(name, (item,), what, made(PT, content), ends, words, values)


def of_value(
    name: str,
    item: int,
    what: str,
    value: bytes | Opcodes,
    ends: Ends = REFUSED,
    *words: str,
) -> Attack:
    """Return an attack that is a sound run with one more entry."""

    def pickle(command: str) -> bytes:
        made_of = value if isinstance(value, bytes) else value(command)
        return checkpoint((text("x"), made_of))

    return of_pickle(name, item, what, pickle, ends, *words)


def of_weight(
    name: str, item: int, what: str, weight: bytes, ends: Ends = REFUSED, *words: str
) -> Attack:
    """Return an attack whose tensor ``w`` is made by these opcodes."""
    values = SOUND if ends is not REFUSED else None
    pickle = checkpoint(model=((text("w"), weight),))
    return of_pickle(name, item, what, pickle, ends, *words, values=values)


def calling(module: str, name: str, *args: bytes) -> Opcodes:
    """Return a call with these arguments, or with the command where there are none."""
    return lambda command: reduce(glob(module, name), *(args or (text(command),)))


# ---------------------------------------------------------------------------- 69, 70: calls

_CALLS: Sequence[tuple[str, str, tuple[bytes, ...]]] = (
    ("os", "system", ()),
    ("posix", "system", ()),
    ("nt", "system", ()),
    ("os", "popen", ()),
    ("os", "execv", (text("/bin/true"), listed(text("true")))),
    ("subprocess", "Popen", ()),
    ("subprocess", "check_output", ()),
    ("builtins", "eval", (text("__import__('os').getpid()"),)),
    ("builtins", "exec", (text("import antigravity"),)),
    ("builtins", "getattr", (glob("os", "path"), text("os"))),
    ("builtins", "__import__", (text("antigravity"),)),
    ("builtins", "open", (text("/etc/passwd"),)),
    ("builtins", "breakpoint", (number(1),)),
    ("__builtin__", "eval", (text("1"),)),
    ("_io", "open", (text("/etc/passwd"),)),
    ("io", "FileIO", (text("/etc/passwd"),)),
    ("shutil", "rmtree", (text("/nonexistent"),)),
    ("pathlib", "Path.unlink", (text("/nonexistent"),)),
    ("importlib", "import_module", (text("antigravity"),)),
    ("runpy", "run_path", (text("/nonexistent"),)),
    ("socket", "create_connection", (items(text("localhost"), number(9)),)),
    ("ctypes", "CDLL", (text("libc.so.6"),)),
    ("webbrowser", "open", (text("http://localhost/"),)),
    ("pickle", "loads", (text("x"),)),
    ("numpy", "load", (text("/nonexistent"), NONE, TRUE)),
    ("numpy.testing._private.utils", "runstring", (text("1"), EMPTY_DICT)),
    ("torch", "load", (text("/nonexistent"),)),
    ("torch.hub", "load", (text("nobody/nothing"), text("x"))),
    ("torch.jit", "load", (text("/nonexistent"),)),
    ("torch.serialization", "load", (text("/nonexistent"),)),
    ("transformers.dynamic_module_utils", "get_class_from_dynamic_module", (text("x"),)),
    ("lightning.fabric.utilities.cloud_io", "_load", (text("/nonexistent"),)),
    ("nobody_has_this_package", "anything", (number(1),)),
)
CALLS = tuple(
    of_value(
        f"REDUCE of {module}.{name}",
        69,
        "a call while unpickling",
        calling(module, name, *args),
        NOT_PASSED_ON,
        f"{module}.{name}",
    )
    for module, name, args in _CALLS
)


def _posix(command: str) -> bytes:
    return reduce(glob("posix", "system"), text(command))


HIDDEN = tuple(
    of_pickle(name, 69, "a call that leaves no trace", pickle, NOT_PASSED_ON, "posix.system")
    for name, pickle in (
        (
            "a call that is popped",
            lambda c: checkpoint().replace(PROTO, PROTO + _posix(c) + POP, 1),
        ),
        (
            "a call that is popped with its mark",
            lambda c: checkpoint().replace(PROTO, PROTO + MARK + _posix(c) + POP_MARK, 1),
        ),
        (
            "a call for a key",
            lambda c: checkpoint((_posix(c), number(1))),
        ),
        (
            "a call in the state of a mapping",
            lambda c: checkpoint(
                (text("x"), HOOKS + mapping((text("_metadata"), _posix(c))) + BUILD)
            ),
        ),
        (
            "a call in the memo only",
            lambda c: checkpoint((text("x"), items(_posix(c) + b"q\x09" + POP, number(1)))),
        ),
        (
            "a function that is never called",
            lambda c: checkpoint((text("x"), glob("posix", "system"))),
        ),
        (
            "a call in a set",
            lambda c: checkpoint((text("x"), reduce(glob("builtins", "set"), listed(_posix(c))))),
        ),
    )
)
REFUSED_CALLS = (
    of_pickle(
        "a call that is overwritten",
        69,
        "a call that leaves no trace",
        lambda c: checkpoint((text("x"), _posix(c)), (text("x"), number(1))),
        REFUSED,
        "twice",
    ),
    of_value("a call for hooks", 69, "a call in a tensor", lambda c: tensor(hooks=_posix(c))),
)
_DOTTED = (
    ("pathlib", "os.system"),
    ("argparse", "_sys.exit"),
    ("collections", "_sys.exit"),
    ("collections", "OrderedDict.__init_subclass__"),
    ("torch", "serialization.os.system"),
    ("torch", "FloatStorage.__reduce__"),
    ("torch._utils", "_import_dotted_name"),
    ("numpy", "core.multiarray.os.system"),
    ("enum", "sys.exit"),
    ("omegaconf.dictconfig", "sys.exit"),
    ("transformers.trainer_utils", "os.system"),
    ("accelerate.utils.dataclasses", "os.system"),
)
DOTTED = tuple(
    of_value(
        f"{module} and {name}",
        70,
        "a name that leaves a module that is let pass",
        lambda command, module=module, name=name: reduce(stack_glob(module, name), text(command)),
        NOT_PASSED_ON,
        module,
    )
    for module, name in _DOTTED
)
_TOUCH = glob("os", "system")
MAKERS = (
    of_value(
        "STACK_GLOBAL",
        70,
        "a name from the stack",
        lambda c: reduce(stack_glob("os", "system"), text(c)),
        NOT_PASSED_ON,
        "os.system",
    ),
    of_value(
        "STACK_GLOBAL from the memo",
        70,
        "a name from the memo",
        lambda c: items(
            *(short("os") + MEMOIZE, short("system") + MEMOIZE),
            b"h\x00h\x01\x93" + text(c) + b"\x85" + REDUCE,
        ),
        NOT_PASSED_ON,
        "os.system",
    ),
    of_value(
        "NEWOBJ",
        70,
        "cls.__new__(cls, …)",
        lambda c: glob("subprocess", "Popen") + items(text(c)) + NEWOBJ,
        NOT_PASSED_ON,
        "subprocess.Popen",
    ),
    of_value(
        "NEWOBJ_EX",
        70,
        "cls.__new__(cls, …, **…)",
        lambda c: glob("subprocess", "Popen") + items(text(c)) + EMPTY_DICT + NEWOBJ_EX,
        NOT_PASSED_ON,
        "subprocess.Popen",
    ),
    of_value(
        "BUILD",
        70,
        "__setstate__ of anything",
        lambda c: reduce(glob("os", "system"), text(c)) + mapping((text("a"), text(c))) + BUILD,
        NOT_PASSED_ON,
        "os.system",
    ),
    of_value(
        "REDUCE of what a REDUCE returned",
        70,
        "a function from a function",
        lambda c: reduce(
            reduce(glob("builtins", "getattr"), glob("os", "path"), text("x")), text(c)
        ),
        NOT_PASSED_ON,
        "getattr",
    ),
    of_value("INST", 70, "protocol 0", lambda c: MARK + text(c) + b"ios\nsystem\n"),
    of_value("OBJ", 70, "protocol 1", lambda c: MARK + _TOUCH + text(c) + b"o"),
    of_value("EXT1", 70, "the registry of copyreg", b"\x82\x01"),
    of_value("EXT2", 70, "the registry of copyreg", b"\x83\x01\x00"),
    of_value("EXT4", 70, "the registry of copyreg", b"\x84\x01\x00\x00\x00"),
    of_value("PERSID in text", 70, "protocol 0", b"Pstorage\n"),
    of_value("REDUCE of a text", 70, "a call of no function", reduce(text("os.system"), number(1))),
    of_value("REDUCE of a tuple", 70, "a call of no function", reduce(EMPTY_TUPLE, number(1))),
    of_value("REDUCE with a list", 70, "arguments that are none", _TOUCH + EMPTY_LIST + REDUCE),
    of_value("REDUCE with a text", 70, "arguments that are none", _TOUCH + text("x") + REDUCE),
    of_value("NEWOBJ of a number", 70, "a class that is none", number(1) + EMPTY_TUPLE + NEWOBJ),
    of_value(
        "NEWOBJ_EX with a list",
        70,
        "keywords that are none",
        glob("argparse", "Namespace") + EMPTY_TUPLE + EMPTY_LIST + NEWOBJ_EX,
    ),
    of_value("STACK_GLOBAL of numbers", 70, "a name that is none", number(1) + number(2) + b"\x93"),
    of_value("a name of 1 MB", 70, "a name without end", glob("a" * (1 << 20), "b")),
    of_value("a name that is no text", 70, "bytes for a name", b"c\xff\xfe\nx\n"),
    of_value(
        "a name of escapes",
        70,
        "a name that rewrites the terminal",
        glob("\x1b[2J", "\x07"),
        NOT_PASSED_ON,
    ),
    of_value("a name without an end", 70, "GLOBAL without its lines", b"cos"),
)

# ---------------------------------------------------------------------------- 71, 73, 81: types

_SIX, _TWO = number(6), ints(2, 3)
_ARGUMENTS = {
    "no arguments": REBUILD + EMPTY_TUPLE + REDUCE,
    "three arguments": reduce(REBUILD, storage(), number(0), _TWO),
    "ten arguments": tensor(storage(), 0, _TWO, ints(3, 1), NONE, NONE, NONE, NONE),
    "a number for a storage": tensor(number(1)),
    "a text for a storage": tensor(text("0")),
    "nothing for a storage": tensor(NONE),
    "a tensor for a storage": tensor(tensor()),
    "a mapping for a storage": tensor(mapping((text("a"), number(1)))),
    "a shape that is a text": tensor(shape=text("23")),
    "a shape that is a number": tensor(shape=_SIX),
    "a shape that is nothing": tensor(shape=NONE),
    "a shape that is a list": tensor(shape=listed(number(2), number(3))),
    "a shape of floats": tensor(shape=items(real(2), real(3))),
    "a shape of booleans": tensor(shape=items(TRUE, TRUE), strides=ints(1, 1)),
    "a shape of texts": tensor(shape=items(text("2"), text("3"))),
    "strides that are nothing": tensor(strides=NONE),
    "strides of one": tensor(strides=ints(1)),
    "strides of floats": tensor(strides=items(real(3), real(1))),
    "an offset that is a text": tensor(offset=text("0")),
    "an offset that is a float": tensor(offset=real(0)),
    "an offset that is False": tensor(offset=FALSE),
    "metadata that are a text": tensor(storage(), 0, _TWO, ints(3, 1), text("conj")),
    "a parameter of a text": reduce(
        glob("torch._utils", "_rebuild_parameter"), text("w"), FALSE, HOOKS
    ),
    "a parameter of nothing": glob("torch._utils", "_rebuild_parameter") + EMPTY_TUPLE + REDUCE,
    "version 3 with a text for a dtype": reduce(
        glob("torch._utils", "_rebuild_tensor_v3"),
        *(storage("0", 24, glob("torch.storage", "UntypedStorage")), number(0), _TWO),
        *(ints(3, 1), FALSE, HOOKS, text("float32")),
    ),
}
ARGUMENTS = tuple(
    of_weight(name, 71, "a tensor of what makes no tensor", opcodes)
    for name, opcodes in _ARGUMENTS.items()
)
DTYPE = of_weight(
    "version 3 with a function for a dtype",
    71,
    "a tensor of what makes no tensor",
    reduce(
        glob("torch._utils", "_rebuild_tensor_v3"),
        *(storage("0", 24, glob("torch.storage", "UntypedStorage")), number(0), _TWO),
        *(ints(3, 1), FALSE, HOOKS, glob("torch", "load")),
    ),
    NOT_PASSED_ON,
    "torch.load",
)._replace(values={"b": B})
_CODECS = glob("_codecs", "encode")
TYPES = tuple(
    of_value(name, 71, "a harmless name with arguments that are none of its", opcodes)
    for name, opcodes in {
        "a mapping of a number": reduce(ORDERED, _SIX),
        "a mapping of triples": reduce(ORDERED, listed(ints(1, 2, 3))),
        "a mapping of texts": reduce(ORDERED, listed(text("abc"))),
        "a mapping of two lists": reduce(ORDERED, EMPTY_LIST, EMPTY_LIST),
        "a mapping with a list for a key": reduce(ORDERED, listed(items(EMPTY_LIST, _SIX))),
        "bytes of a number": reduce(_CODECS, _SIX, text("latin1")),
        "bytes by rot13": reduce(_CODECS, text("x"), text("rot13")),
        "bytes by zlib": reduce(_CODECS, text("x"), text("zlib_codec")),
        "bytes beyond latin1": reduce(_CODECS, text("€"), text("latin1")),
        "a set of a number": reduce(glob("builtins", "set"), _SIX),
        "a set of lists": reduce(glob("builtins", "set"), listed(EMPTY_LIST)),
    }.items()
)
ITEMS = tuple(
    of_value(name, 73, "an item put where there is no room for one", opcodes)
    for name, opcodes in {
        "SETITEM on a list": EMPTY_LIST + text("k") + _SIX + SETITEM,
        "SETITEM on nothing": NONE + text("k") + _SIX + SETITEM,
        "SETITEM on a tuple": EMPTY_TUPLE + text("k") + _SIX + SETITEM,
        "SETITEM on a text": text("t") + text("k") + _SIX + SETITEM,
        "SETITEM on a tensor": tensor() + text("k") + _SIX + SETITEM,
        "SETITEMS on a list": EMPTY_LIST + MARK + text("k") + _SIX + SETITEMS,
        "SETITEMS on a number": _SIX + MARK + text("k") + _SIX + SETITEMS,
        "SETITEMS on a tensor": tensor() + MARK + _SIX + _SIX + SETITEMS,
        "SETITEMS on a storage": storage() + MARK + _SIX + _SIX + SETITEMS,
        "an odd number of SETITEMS": EMPTY_DICT + MARK + text("k") + SETITEMS,
        "APPEND on a dict": EMPTY_DICT + _SIX + APPEND,
        "APPEND on a tuple": EMPTY_TUPLE + _SIX + APPEND,
        "APPEND on a tensor": tensor() + _SIX + APPEND,
        "APPENDS on nothing": NONE + MARK + _SIX + APPENDS,
        "APPENDS on bytes": b"C\x01a" + MARK + _SIX + APPENDS,
        "ADDITEMS on a list": EMPTY_LIST + MARK + _SIX + b"\x90",
        "BUILD on a tuple": EMPTY_TUPLE + EMPTY_DICT + BUILD,
        "BUILD on nothing": NONE + EMPTY_DICT + BUILD,
        "BUILD on a text": text("t") + EMPTY_DICT + BUILD,
        "BUILD on a list": EMPTY_LIST + EMPTY_DICT + BUILD,
    }.items()
)
KEYS = tuple(
    of_value(name, 81, "a key that has no hash", opcodes)
    for name, opcodes in {
        "a list for a key": mapping((EMPTY_LIST, _SIX)),
        "a dict for a key": mapping((EMPTY_DICT, _SIX)),
        "a set for a key": mapping((EMPTY_SET, _SIX)),
        "a tuple of a list for a key": mapping((items(EMPTY_LIST), _SIX)),
        "tuples within tuples of a list for a key": mapping((items(items(EMPTY_LIST)), _SIX)),
        "SETITEM with a list": EMPTY_DICT + EMPTY_LIST + _SIX + SETITEM,
        "a list in a set": EMPTY_SET + MARK + EMPTY_LIST + b"\x90",
        "a list in a frozenset": MARK + EMPTY_LIST + b"\x91",
    }.items()
)
PICKLE_ATTACKS = (
    *CALLS,
    *HIDDEN,
    *REFUSED_CALLS,
    *DOTTED,
    *MAKERS,
    *ARGUMENTS,
    DTYPE,
    *TYPES,
    *ITEMS,
    *KEYS,
)
