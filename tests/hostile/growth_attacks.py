"""Attacks 77-79 on torch files: growth, lengths that lie, and pickles that are none."""

from __future__ import annotations

from attacks import READ
from pickle_attacks import of_pickle, of_value
from raw_pickle import (
    APPEND,
    APPENDS,
    BUILD,
    DUP,
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_TUPLE,
    MARK,
    NEWOBJ,
    NONE,
    PERSID,
    POP,
    POP_MARK,
    PROTO,
    REDUCE,
    SETITEM,
    SETITEMS,
    STOP,
    checkpoint,
    glob,
    items,
    listed,
    mapping,
    number,
    tensor,
    text,
)

_COUNT = 30_000
_MODULUS = (1 << 61) - 1  # integers that differ by it hash alike


def laughs(levels: int) -> bytes:
    """Lists of two times the same list, so many deep."""
    opcodes = EMPTY_LIST + b"r\0\0\1\0"
    for level in range(1, levels):
        before = (0x10000 + level - 1).to_bytes(4, "little")
        here = (0x10000 + level).to_bytes(4, "little")
        opcodes += POP + EMPTY_LIST + b"r" + here + MARK + (b"j" + before) * 2 + APPENDS
    return opcodes


def laughing(levels: int) -> bytes:
    """The same of tuples, which have hashes: each takes twice as long as the one inside."""
    opcodes = EMPTY_TUPLE + b"r\0\0\2\0"
    for level in range(1, levels):
        before = (0x20000 + level - 1).to_bytes(4, "little")
        here = (0x20000 + level).to_bytes(4, "little")
        opcodes += POP + (b"j" + before) * 2 + b"\x86r" + here
    return opcodes


def nested(opening: bytes, closing: bytes, depth: int, kernel: bytes = NONE) -> bytes:
    """One thing within another, so many deep."""
    return opening * depth + kernel + closing * depth


_CYCLE = EMPTY_LIST + b"q\x09h\x09a"
_COLLIDING = b"".join(number(k * _MODULUS) + NONE for k in range(1, _COUNT))
DEEP = 100_000
_SYSTEM = glob("os", "system") + b"q\x09" + POP
GROWTH = (
    of_value("40 lists of lists", 77, "2^40 paths to nothing", laughs(40), READ),
    of_value("a key of 2^40 parts", 77, "a hash without end", mapping((laughing(40), NONE))),
    of_value(
        "a set of 2^40 parts", 77, "a hash without end", b"\x8f" + MARK + laughing(40) + b"\x90"
    ),
    of_value("an id of 2^40 parts", 77, "words without end", laughing(40) + PERSID),
    of_value("a call of 2^40 parts", 77, "words without end", laughing(40) + EMPTY_TUPLE + REDUCE),
    of_value("a tensor of 2^40 parts", 77, "words without end", tensor(shape=laughing(40))),
    of_value(
        "a tensor in 40 lists of lists",
        77,
        "2^40 paths to a tensor",
        laughs(40).replace(EMPTY_LIST, listed(tensor()), 1),
    ),
    of_value("a list that holds itself", 77, "a path without end", _CYCLE, READ),
    of_value(
        "a mapping that holds itself",
        77,
        "a path without end",
        EMPTY_DICT + b"q\x09" + text("x") + b"h\x09" + SETITEM,
        READ,
    ),
    of_value("10^5 lists deep", 77, "depth", nested(EMPTY_LIST, APPEND, DEEP)),
    of_value("10^5 tuples deep", 77, "depth", NONE + b"\x85" * DEEP),
    of_value("10^5 mappings deep", 77, "depth", nested(EMPTY_DICT + text("x"), SETITEM, DEEP)),
    of_value(
        "10^5 states deep",
        77,
        "depth",
        nested(glob("argparse", "Namespace") + EMPTY_TUPLE + NEWOBJ, BUILD, DEEP, EMPTY_DICT),
    ),
    of_value(
        "10^5 calls deep", 77, "depth", _SYSTEM + b"h\x09" * DEEP + NONE + (b"\x85" + REDUCE) * DEEP
    ),
    of_value("201 lists deep", 77, "depth", nested(EMPTY_LIST, APPEND, 2001)),
    of_value("200,000 tuples", 77, "much of nothing", MARK + EMPTY_TUPLE * 200_000 + b"t", READ),
    of_value("a million marks", 77, "marks without end", MARK * 1_000_000),
    of_value("a million DUPs", 77, "copies without end", NONE + DUP * 1_000_000 + POP * 1_000_000),
    of_value("a memo index of 2^28", 77, "a memo that is an array", b"Nr\0\0\0\x10", READ),
    of_value(
        "a memo index of 2^32 - 1", 77, "a memo that is an array", b"Nr\xff\xff\xff\xff", READ
    ),
    of_value(
        "30,000 keys of one hash",
        77,
        "a mapping whose keys all collide: quadratic time",
        EMPTY_DICT + MARK + _COLLIDING + SETITEMS,
    ),
    of_value(
        "an integer of 1 MB",
        77,
        "a number of 2.5 million digits",
        b"\x8b" + (1 << 20).to_bytes(4, "little") + b"\x7f" * (1 << 20),
    ),
    of_pickle(
        "a step of 255 bytes",
        77,
        "a step of 600 digits",
        PROTO + mapping((text("step"), number(1 << 2030))) + STOP,
    ),
)

_4, _8 = b"\xff\xff\xff\x7f", b"\xff" * 7 + b"\x7f"
LENGTHS = tuple(
    of_value(f"{name} of {title}", 78, "a length that the file does not have", opcode + length)
    for name, opcode, sizes in (
        ("LONG1", b"\x8a", {"255 bytes": b"\xff"}),
        ("LONG4", b"\x8b", {"2^31 - 1": _4, "-1": b"\xff" * 4}),
        ("BINUNICODE", b"X", {"2^31 - 1": _4, "2^32 - 1": b"\xff" * 4}),
        ("SHORT_BINUNICODE", b"\x8c", {"255": b"\xff"}),
        ("BINUNICODE8", b"\x8d", {"2^63 - 1": _8, "2^64 - 1": b"\xff" * 8}),
        ("BINBYTES", b"B", {"2^31 - 1": _4}),
        ("SHORT_BINBYTES", b"C", {"255": b"\xff"}),
        ("BINBYTES8", b"\x8e", {"2^63 - 1": _8}),
        ("BYTEARRAY8", b"\x96", {"2^63 - 1": _8}),
        ("BINSTRING", b"T", {"2^31 - 1": _4, "-1": b"\xff" * 4}),
        ("SHORT_BINSTRING", b"U", {"255": b"\xff"}),
        ("FRAME", b"\x95", {"2^63 - 1": _8, "2^64 - 1": b"\xff" * 8}),
    )
    for title, length in sizes.items()
)
TEXTS = (
    of_value("a text that is no text", 78, "bytes for a text", text(b"\xff\xfe")),
    of_value("a text with a surrogate", 78, "what pickle writes", text(b"\xed\xa0\x80"), READ),
    of_value("a number in text", 78, "protocol 0: 10^6 digits", b"I" + b"9" * 1_000_000 + b"\n"),
    of_value("a long in text", 78, "protocol 0: 10^6 digits", b"L" + b"9" * 1_000_000 + b"L\n"),
    of_value("a float in text", 78, "protocol 0", b"Fnone\n"),
    of_value("a string in text", 78, "protocol 0: an expression", b"S'a'+'b'\n"),
    of_value("a text in text", 78, "protocol 0: an escape that is none", b"V\\u12\n"),
)

BEGIN = PROTO + EMPTY_DICT
_BARE = {
    "REDUCE on nothing": PROTO + REDUCE + STOP,
    "REDUCE on one": PROTO + NONE + REDUCE + STOP,
    "TUPLE1 on nothing": PROTO + b"\x85" + STOP,
    "TUPLE3 on two": PROTO + NONE * 2 + b"\x87" + STOP,
    "SETITEM on one": PROTO + NONE + SETITEM + STOP,
    "APPEND on nothing": PROTO + APPEND + STOP,
    "BUILD on nothing at all": PROTO + BUILD + STOP,
    "BUILD on one": PROTO + NONE + BUILD + STOP,
    "NEWOBJ on one": PROTO + NONE + NEWOBJ + STOP,
    "NEWOBJ_EX on two": PROTO + NONE * 2 + b"\x92" + STOP,
    "STACK_GLOBAL on one": PROTO + text("os") + b"\x93" + STOP,
    "POP of nothing": PROTO + POP + STOP,
    "DUP of nothing": PROTO + DUP + STOP,
    "BINPERSID of nothing": PROTO + PERSID + STOP,
    "BINPUT of nothing": PROTO + b"q\0" + STOP,
    "MEMOIZE of nothing": PROTO + b"\x94" + STOP,
    "a BINGET of nothing": BEGIN + b"h\7" + STOP,
    "a LONG_BINGET of nothing": BEGIN + b"j\0\0\0\x10" + STOP,
    "a GET of nothing": BEGIN + b"g7\n" + STOP,
    "a GET of no number": BEGIN + b"gx\n" + STOP,
    "a PUT of no number": BEGIN + b"p-1\n" + STOP,
    "TUPLE without MARK": BEGIN + b"t" + STOP,
    "SETITEMS without MARK": BEGIN + SETITEMS + STOP,
    "APPENDS without MARK": PROTO + EMPTY_LIST + APPENDS + STOP,
    "LIST without MARK": PROTO + b"l" + STOP,
    "DICT without MARK": PROTO + b"d" + STOP,
    "FROZENSET without MARK": PROTO + b"\x91" + STOP,
    "POP_MARK without MARK": BEGIN + POP_MARK + STOP,
    "SETITEMS onto a MARK": PROTO + MARK * 2 + SETITEMS + STOP,
    "REDUCE over a MARK": PROTO + glob("os", "system") + MARK + REDUCE + STOP,
    "no STOP": checkpoint()[:-1],
    "STOP on nothing": PROTO + STOP,
    "STOP on two": PROTO + EMPTY_DICT * 2 + STOP,
    "STOP over a MARK": PROTO + MARK + EMPTY_DICT + STOP,
    "bytes behind STOP": checkpoint() + b"junk",
    "a second pickle behind STOP": checkpoint() * 2,
    "protocol 255": b"\x80\xff" + checkpoint()[2:],
    "protocol 6": b"\x80\x06" + checkpoint()[2:],
    "half a PROTO": b"\x80",
    "no bytes": b"",
    "only STOP": STOP,
    "an opcode that is none": BEGIN + b"\xff" + STOP,
    "opcode 0": BEGIN + b"\0" + STOP,
    "a buffer that is elsewhere": PROTO + b"\x97" + STOP,
    "a buffer made read-only": BEGIN + b"\x98" + STOP,
    "half a number": PROTO + b"J\0\0",
    "half a float": PROTO + b"G\0\0",
    "a number for a root": PROTO + number(1) + STOP,
    "nothing for a root": PROTO + NONE + STOP,
    "a tuple for a root": PROTO + items(number(1), text("a")) + STOP,
    "an empty mapping for a root": PROTO + EMPTY_DICT + STOP,
}
BARE = tuple(
    of_pickle(name, 79, "a pickle that is none", opcodes, values=None)
    for name, opcodes in _BARE.items()
)
GROWTH_ATTACKS = (*GROWTH, *LENGTHS, *TEXTS, *BARE)
