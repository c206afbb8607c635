"""Hostile and damaged pickles: nothing in them is run, and each is refused by name, in time."""

from __future__ import annotations

import functools
import random
import struct
import subprocess
import sys
import time
from typing import Any

import pytest
from torch_pickles import (
    BYTES,
    HOOKS,
    PICKLES,
    call,
    dict_of,
    list_of,
    mutate,
    name,
    number,
    numbers,
    pickle_of,
    storage,
    tensor,
    text,
    tuple_of,
)

from ema_cli.errors import DamagedFile, InputError, UnsupportedInput
from ema_cli.formats.torch import machine, state
from ema_cli.formats.torch.machine import load
from ema_cli.formats.torch.nodes import Global


def read(raw: bytes) -> Any:
    """Return what a pickle says."""
    return load(raw, "a.pt", "data.pkl")[0]


# ---------------------------------------------------------------------------- nothing is run

AUDITED = """
import sys
from ema_cli.formats.torch import machine, encoding, policy
raw = bytes.fromhex(sys.argv[1])
seen = []
sys.addaudithook(lambda event, args: seen.append(event))
root, end, names = machine.load(raw, "a.pt", "data.pkl")
policy.judge(names)
try:
    encoding.encode(root)
except Exception as error:
    assert type(error).__name__ == "UnsupportedInput", error
encoding.encode(encoding.plain(root)[0])
seen = set(seen) - {"builtins.id"}  # our own walks ask for that
print(sorted(seen), [name.full for name in names])
"""


def test_nothing_is_imported_or_called() -> None:
    """The audit hook of Python sees no event at all while a pickle full of calls is read."""
    raw = pickle_of(
        b"]",
        call("os", "system", text("touch /tmp/never")),
        b"a",
        call("posix", "system", text("touch /tmp/never")),
        b"a",
        call("builtins", "eval", text("__import__('os').system('touch /tmp/never')")),
        b"a",
        b"\x8c\x02os\x8c\x06system\x93",
        tuple_of(text("touch /tmp/never")) + b"R",
        b"a",
        name("subprocess", "Popen") + tuple_of(text("ls")) + b"}\x92a",
        name("antigravity", "x") + b")\x81" + dict_of(text("a"), name("this", "s")) + b"ba",
    )
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, raw.hex()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == (
        "[] ['os.system', 'posix.system', 'builtins.eval', 'subprocess.Popen', "
        "'antigravity.x', 'this.s']\n"
    )


def test_a_call_of_a_system_function_is_a_record() -> None:
    """It can be looked at, like anything else."""
    root = read(pickle_of(call("os", "system", text("ls"))))
    assert (root.callable, root.args, root.where) == (Global("os", "system"), ("ls",), "reduce")


# ---------------------------------------------------------------------------- hostile pickles

WRONG_TENSORS = {
    "one element too many": tensor(shape=numbers(2, 3), strides=numbers(4, 1)),
    "offset beyond the end": tensor(offset=number(1)),
    "offset of an empty storage": tensor(
        storage(numel=number(0)), shape=numbers(), strides=numbers()
    ),
    "2^62 elements": tensor(shape=numbers(1 << 62, 3)),
    "negative offset": tensor(offset=number(-1)),
    "negative dimension": tensor(shape=numbers(-2, 3)),
    "negative stride": tensor(strides=numbers(3, -1)),
    "dimension of 2^63": tensor(shape=numbers(1 << 63, 3)),
    "dimension of 600 digits": tensor(shape=numbers(1 << 2000, 3)),
    "true dimension": tensor(shape=tuple_of(b"\x88", number(3))),
    "float dimension": tensor(shape=tuple_of(b"G" + struct.pack(">d", 2.0), number(3))),
    "list for a shape": tensor(shape=list_of(number(2), number(3))),
    "more strides than dimensions": tensor(strides=numbers(3, 1, 1)),
    "65 dimensions": tensor(shape=numbers(*[1] * 65), strides=numbers(*[1] * 65)),
    "number for a storage": tensor(number(1)),
    "number for a gradient": tensor(requires_grad=number(1)),
    "number for hooks": tensor(hooks=number(1)),
    "five arguments": call("torch._utils", "_rebuild_tensor_v2", storage(), *[number(0)] * 4),
    "bytes in version 2": tensor(storage(BYTES)),
    "string for a dtype": tensor(
        storage(BYTES),
        number(0),
        numbers(1),
        numbers(1),
        b"\x89",
        HOOKS,
        text("uint16"),
        version="_v3",
    ),
    "too few bytes in version 3": tensor(
        storage(BYTES),
        number(0),
        numbers(4),
        numbers(1),
        b"\x89",
        HOOKS,
        name("torch", "uint16"),
        version="_v3",
    ),
    "another dtype than the storage": tensor(
        storage(),
        number(0),
        numbers(1),
        numbers(1),
        b"\x89",
        HOOKS,
        name("torch", "uint16"),
        version="_v3",
    ),
    "conj of 1": tensor(
        storage(),
        number(0),
        numbers(1),
        numbers(1),
        b"\x89",
        HOOKS,
        dict_of(text("conj"), number(1)),
    ),
    "metadata in a list": tensor(
        storage(), number(0), numbers(1), numbers(1), b"\x89", HOOKS, list_of(text("conj"))
    ),
    "storage that grows": b"]"
    + tensor()
    + b"a"
    + tensor(storage(numel=number(7)), shape=numbers(7), strides=numbers(1))
    + b"a",
    "storage of a string": tensor(storage(text("FloatStorage"))),
    "storage of another module": tensor(storage(name("evil", "FloatStorage"))),
    "storage key with a path": tensor(storage(key=text("../../x"))),
    "storage key of a number": tensor(storage(key=number(0))),
    "storage of -1 elements": tensor(storage(numel=number(-1))),
    "parameter of a number": call("torch._utils", "_rebuild_parameter", number(1), b"\x88", HOOKS),
    "class without a function": call(
        "torch._tensor", "_rebuild_from_type_v2", number(1), name("torch", "Tensor"), b")", b"N"
    ),
    "class with another function": call(
        "torch._tensor",
        "_rebuild_from_type_v2",
        name("numpy", "dtype"),
        name("numpy", "dtype"),
        tuple_of(text("O")),
        b"N",
    ),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_a_wrong_tensor_is_refused(case: str) -> None:
    """Each broken rule of a tensor or a storage, in one printable line with the place."""
    with pytest.raises(DamagedFile) as caught:
        read(pickle_of(WRONG_TENSORS[case]))
    assert caught.value.message.startswith("a.pt: data.pkl, byte ")
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 700


HOSTILE = {
    "nothing": (b"", "ends in the middle"),
    "no STOP": (b"\x80\x02N", "ends in the middle"),
    "no object": (b"\x80\x02.", "exactly one object"),
    "two objects": (pickle_of(b"NN"), "exactly one object"),
    "open mark": (pickle_of(b"(N"), "exactly one object"),
    "protocol 6": (b"\x80\x06N.", "protocol 2 to 5"),
    "protocol 1": (b"\x80\x01N.", "protocol 2 to 5"),
    "PROTO later": (pickle_of(b"\x80\x02N"), "protocol 2 to 5"),
    "empty stack": (pickle_of(b"R"), "stack"),
    "one argument": (pickle_of(b")R"), "stack"),
    "no mark": (pickle_of(b"Nt"), "stack"),
    "append to nothing": (pickle_of(b"Na"), "stack"),
    "unknown opcode": (pickle_of(b"\xff"), "found byte 0xff"),
    "memo": (pickle_of(b"h\x07"), "number 7"),
    "long memo": (pickle_of(b"j\xff\xff\xff\xff"), "number 4,294,967,295"),
    "LONG4": (pickle_of(b"\x8b\xff\xff\xff\x7f"), "at most 1,024 bytes"),
    "negative LONG4": (pickle_of(b"\x8b\xff\xff\xff\xff"), "at most 1,024 bytes"),
    "LONG1 cut": (b"\x80\x02\x8a\xff\x00.", "255 more bytes"),
    "BINUNICODE": (pickle_of(b"X\xff\xff\xff\xff"), "4,294,967,295 more bytes"),
    "BINUNICODE8": (pickle_of(b"\x8d" + b"\xff" * 8), "18,446,744,073,709,551,615 more"),
    "BINBYTES8": (pickle_of(b"\x8e" + b"\xff" * 8), "more bytes"),
    "BYTEARRAY8": (pickle_of(b"\x96" + b"\xff" * 8), "more bytes"),
    "FRAME": (b"\x80\x04\x95" + b"\xff" * 8 + b"N.", "frame"),
    "float cut": (b"\x80\x02G\x00", "middle of a number"),
    "not UTF-8": (pickle_of(b"X\x01\x00\x00\x00\xff"), "UTF-8"),
    "name without end": (b"\x80\x02cos\nsystem", "line"),
    "name not UTF-8": (pickle_of(b"c\xff\nx\n"), "UTF-8"),
    "name of nothing": (pickle_of(b"c\nx\n"), "a module and a name"),
    "name of numbers": (pickle_of(b"K\x01K\x02\x93"), "a module and a name"),
    "list as a key": (pickle_of(dict_of(b"]", b"N")), "found a list"),
    "dict as a key": (pickle_of(dict_of(tuple_of(b"}"), b"N")), "found a dict"),
    "set in a set": (pickle_of(b"\x8f(\x8f\x90"), "found a set"),
    "a key twice": (pickle_of(dict_of(b"K\x05NK\x05N")), "twice"),
    "a key without a value": (pickle_of(b"}(Nu"), "without a value"),
    "SETITEM on a list": (pickle_of(b"]NNs"), "a dict to put keys into"),
    "SETITEM on a tensor": (pickle_of(tensor(), b"NNs"), "a dict to put keys into"),
    "SETITEMS on a name": (pickle_of(name("os", "environ"), b"(NNu"), "a dict to put keys into"),
    "APPEND to a tuple": (pickle_of(b")Na"), "a list to append to"),
    "APPENDS to a name": (pickle_of(name("sys", "path"), b"(Ne"), "a list to append to"),
    "ADDITEMS to a list": (pickle_of(b"](N\x90"), "a set to add to"),
    "BUILD of a name": (pickle_of(name("a", "B"), b"}b"), "set the state of"),
    "BUILD of a dict": (pickle_of(b"}}b"), "set the state of"),
    "BUILD twice": (pickle_of(call("a", "B"), b"}b}b"), "set the state of"),
    "BUILD of a tensor": (pickle_of(tensor(), b"}b"), "no state"),
    "BUILD of a tensor that is one": (
        pickle_of(tensor(), tuple_of(tensor(), b"N", HOOKS, b"\x88", b"\x89"), b"b"),
        "no state",
    ),
    "arguments in a list": (pickle_of(name("a", "B"), b"]R"), "arguments of a call"),
    "call of a string": (pickle_of(text("os.system"), b")R"), "something to call"),
    "call of a tensor": (pickle_of(tensor(), b")R"), "something to call"),
    "NEWOBJ of a string": (pickle_of(text("os"), b")\x81"), "something to call"),
    "NEWOBJ_EX without keywords": (pickle_of(name("a", "B"), b")N\x92"), "keyword arguments"),
    "bytes by another codec": (
        pickle_of(call("_codecs", "encode", text("a"), text("zip"))),
        "a string and latin1",
    ),
    "bytes above 255": (
        pickle_of(call("_codecs", "encode", text("漢"), text("latin1"))),
        "above 255",
    ),
    "2^40 bytes": (pickle_of(call("builtins", "bytearray", number(1 << 40))), "made of bytes"),
    "set of a number": (pickle_of(call("builtins", "set", number(1))), "made of a list"),
    "complex of strings": (pickle_of(call("builtins", "complex", text("1"), text("2"))), "complex"),
    "Size of strings": (pickle_of(call("torch", "Size", tuple_of(text("1")))), "found a str"),
    "OrderedDict of triples": (
        pickle_of(call("collections", "OrderedDict", list_of(tuple_of(b"N", b"N", b"N")))),
        "made of pairs",
    ),
    "persistent id of a string": (pickle_of(text("0"), b"Q"), "persistent id"),
    "persistent id of another kind": (
        pickle_of(tuple_of(text("file"), text("/etc/passwd"), b"N", b"N", b"N"), b"Q"),
        "persistent id",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_broken_pickle_is_refused(case: str) -> None:
    """Each with its reason, in one printable line."""
    raw, words = HOSTILE[case]
    with pytest.raises(DamagedFile, match=words) as caught:
        load(raw, "a.pt", "data.pkl")
    assert caught.value.message.isprintable()


OLD_OPCODES = {
    "INT": b"I1\n",
    "LONG": b"L1L\n",
    "FLOAT": b"F1\n",
    "STRING": b"S'a'\n",
    "UNICODE": b"Va\n",
    "PERSID": b"P0\n",
    "GET": b"g0\n",
    "PUT": b"Np0\n",
    "DICT": b"(d",
    "LIST": b"(l",
    "DUP": b"N2",
    "INST": b"(ios\nsystem\n",
    "OBJ": b"(cos\nsystem\no",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": b"N\x98",
}


@pytest.mark.parametrize("opcode", OLD_OPCODES)
def test_opcodes_torch_never_writes_are_refused_by_name(opcode: str) -> None:
    """Those of protocols 0 and 1, of the registry of extensions, and of buffers elsewhere."""
    with pytest.raises(UnsupportedInput, match=f"opcode {opcode},") as caught:
        load(pickle_of(OLD_OPCODES[opcode]), "a.pt", "data.pkl")
    assert "torch.save" in caught.value.hint


def doubled(levels: int) -> bytes:
    """Return a list of two lists of two lists …, all of which are one."""
    inner = b"](Neq\x00"
    for level in range(levels):
        place = bytes([level])
        inner += b"0](h" + place + b"h" + place + b"eq" + bytes([level + 1])
    return inner


def colliding(keys: int, step: int) -> bytes:
    """Return a dict with keys that Python hashes alike."""
    return b"}(" + b"".join(number(k * step) + b"N" for k in range(1, keys)) + b"u"


BOMBS: dict[str, tuple[bytes, str]] = {
    "100,000 tuples in each other": (b"N" + b"\x85" * 100_000, "levels of nesting"),
    "100,000 lists in each other": (b"]" * 100_000 + b"a" * 99_999, "levels of nesting"),
    "100,000 objects in each other": (
        name("a", "B") + b"q\x000" + b"h\x00" * 100_000 + b")R" + b"\x85R" * 99_999,
        "levels of nesting",
    ),
    "100,000 marks": (b"(" * 100_000, "exactly one object"),
    "keys with one hash": (colliding(50_000, (1 << 61) - 1), "keys that are not strings"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_are_refused_in_time(case: str) -> None:
    """Nesting and collisions end in an error within two seconds."""
    raw, words = BOMBS[case]
    started = time.monotonic()
    with pytest.raises(DamagedFile, match=words):
        read(pickle_of(raw))
    assert time.monotonic() - started < 2


def test_a_key_that_doubles_is_refused() -> None:
    """Hashing a tuple goes through all its parts again and again: 2^60 of them here."""
    raw = b"Nq\x00"
    for level in range(60):
        place = bytes([level])
        raw += b"0h" + place + b"h" + place + b"\x86q" + bytes([level + 1])
    with pytest.raises(DamagedFile, match="at most 64 parts"):
        read(pickle_of(raw, b"0}h\x3cNs"))


def test_shared_lists_stay_small() -> None:
    """A hundred lists that name 2^100 paths are a hundred lists."""
    root = read(pickle_of(doubled(100)))
    assert root[0] is root[1]


def test_limits_of_work_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle of more opcodes or containers than any real one is refused."""
    monkeypatch.setattr(machine, "STEP_LIMIT", 1000)
    with pytest.raises(DamagedFile, match="at most 1,000 opcodes"):
        read(pickle_of(b"N0" * 600, b"N"))
    monkeypatch.setattr(machine, "STEP_LIMIT", 1 << 20)
    for piece, most in ((b"}", 1000), (b"\x8f", 250), (b"]", 1000), (b"(", 1000), (b"(t", 500)):
        monkeypatch.setattr(state, "ROOM_LIMIT", 1000)
        with pytest.raises(DamagedFile, match="fewer lists"):
            read(pickle_of(piece * (most + 1)))
        with pytest.raises(DamagedFile, match="exactly one object"):
            read(pickle_of(piece * most))


# ---------------------------------------------------------------------------- damage


@functools.cache
def sound() -> list[bytes]:
    """Return the pickles to damage."""
    return [raw for case, raw in PICKLES.items() if case != "stream"]


def test_truncation_at_every_byte() -> None:
    """No prefix of a pickle is a pickle."""
    for raw in sound():
        for length in range(len(raw)):
            with pytest.raises(DamagedFile):
                load(raw[:length], "a.pt", "data.pkl")


def test_mutated_pickles() -> None:
    """2,000 mutated pickles raise our errors and nothing else."""
    rng = random.Random(20260731)
    read_well = 0
    for _ in range(2000):
        raw = mutate(rng, rng.choice(sound()))
        try:
            load(raw, "a.pt", "data.pkl")
            read_well += 1
        except InputError as error:
            assert error.message.isprintable()
    assert 50 < read_well < 1000
