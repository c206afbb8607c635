"""Attacks 44-57 on npz files: what the members say of themselves."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from attacks import (
    LATE,
    LOOKED_AT,
    READ,
    REFUSED,
    STEM,
    Attack,
    Ends,
    Values,
    canary,
    made,
    writing,
)
from raw_pickle import PROTO, STOP, glob, reduce, text
from raw_zip import (
    U32,
    Part,
    archive,
    central_entry,
    deflated,
    local_header,
    stored_block,
    zeros,
)

NPZ = ".npz"
W = np.float32([[1, 2, 3], [4, 5, 6]])
B = np.float32([0.5, -2, 8])
SOUND: Values = {"w": W, "b": B}
GIB = 1 << 30


def npy(header: bytes | str, data: bytes = b"", *, version: bytes = b"\1\0") -> bytes:
    """Return an npy member with this header text, padded as NumPy pads it."""
    raw = header if isinstance(header, bytes) else header.encode("latin-1", "surrogateescape")
    width = 2 if version[:1] == b"\1" else 4
    raw += b" " * (-(len(raw) + 7 + width) % 64) + b"\n"
    return b"\x93NUMPY" + version + len(raw).to_bytes(width, "little") + raw + data


def said(descr: str = "'<f4'", fortran: str = "False", shape: str = "(2, 3)") -> str:
    """Return the text of a header."""
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"


def member(array: np.ndarray) -> bytes:
    """Return the npy member of an array in C order."""
    return npy(said(repr(array.dtype.str), shape=repr(array.shape)), array.tobytes())


def sound() -> list[Part]:
    """Return the members of a sound file."""
    return [Part(b"w.npy", member(W)), Part(b"b.npy", member(B))]


def beside(*parts: Part) -> bytes:
    """Return a file whose other members are sound."""
    return archive([sound()[1], *parts])


def of_member(
    name: str,
    item: int,
    what: str,
    content: bytes,
    *words: str,
    ends: Ends = REFUSED,
    values: Values | None = None,
) -> Attack:
    """Return an attack whose member ``w.npy`` is `content`."""
    build = writing(NPZ, beside(Part(b"w.npy", content)))
    return Attack(name, (item,), what, build, ends, words or ("'w'",), values)


def of_shape(name: str, shape: str, *words: str, data: bytes = W.tobytes()) -> Attack:
    """Return an attack whose shape is this text."""
    return of_member(name, 50, "a shape that is none", npy(said(shape=shape), data), *words)


def of_descr(name: str, item: int, descr: str, *words: str, data: bytes = W.tobytes()) -> Attack:
    """Return an attack whose dtype is this text."""
    return of_member(name, item, "a dtype that is no number", npy(said(descr), data), *words)


def harm(folder: Path) -> bytes:
    """Return a pickle that would touch the canary."""
    return PROTO + reduce(glob("os", "system"), text(f"touch {canary(folder)}/pwned")) + STOP


def of_harm(
    name: str, item: int, what: str, content: Callable[[Path], bytes], *words: str
) -> Attack:
    """Return an attack that names the canary."""
    return Attack(name, (item,), what, made(NPZ, content), REFUSED, words)


def _sparse(folder: Path) -> Path:
    """A member of 8 GiB that is a hole, with honest sizes."""
    data = npy(said(shape=f"({2 * GIB},)"))
    extra = b"\1\0\x10\0" + (len(data) + 8 * GIB).to_bytes(8, "little") * 2
    part = {**Part(b"w.npy", data).fields(), "nbytes": U32, "size": U32, "extra": extra}
    path = folder / f"{STEM}{NPZ}"
    with open(path, "wb") as file:
        file.write(local_header(part) + data)
        file.truncate(file.tell() + 8 * GIB)
        at = file.seek(0, os.SEEK_END)
        entry = central_entry({**part, "offset": 0})
        records = archive(
            [],
            end={"count": 1, "here": 1, "nbytes": len(entry), "offset": U32},
            end64={"count": 1, "here": 1, "nbytes": len(entry), "offset": at},
            locator={"offset": at + len(entry)},
        )
        file.write(entry + records)
    return path


def _bomb(shape: str, size: int, n_mib: int = 1024) -> Part:
    """A member that inflates to its header and many MiB of zeros, whatever it says."""
    packed = stored_block(npy(said(shape=shape))) + zeros(n_mib)
    return Part(b"w.npy", packed, 8, crc=1, size=size)


def _tailed() -> Part:
    part = deflated(b"w.npy", member(W))
    part.data += b"tail"
    return part


HEAD = len(npy(said(shape=f"({256 << 20},)")))
SMALL = len(npy(said(shape="(6,)"))) + 24
BOMBS = (
    Attack(
        "a bomb that says it is small",
        (44,),
        "1 MB that inflates to 1 GiB where 24 bytes are declared",
        writing(NPZ, beside(_bomb("(6,)", SMALL))),
        LATE,
    ),
    Attack(
        "a bomb that says what it is",
        (44,),
        "1 MB of a thousandth, honestly declared as 1 GiB: looked at in no memory",
        writing(NPZ, beside(_bomb(f"({256 << 20},)", GIB + HEAD))),
        LOOKED_AT,
    ),
    Attack(
        "a bomb beyond what deflate can do",
        (44,),
        "a member that says it inflates to a million times what is stored",
        writing(NPZ, beside(_bomb(f"({896 << 20},)", (7 << 29) + HEAD, 1))),
        REFUSED,
    ),
    Attack(
        "a stream that ends early",
        (44, 52),
        "a deflated member that ends before its declared size",
        writing(NPZ, beside(deflated(b"w.npy", member(W)[:-8], size=len(member(W))))),
        LATE,
    ),
    Attack(
        "bytes behind a deflate stream",
        (44, 53),
        "a deflated member whose stream ends before what is stored does",
        writing(NPZ, beside(_tailed())),
        LATE,
    ),
)


CLAIMS = (
    of_member("4 TB in no bytes", 46, "a shape of 4 TB", npy(said(shape=f"({1 << 40},)"))),
    of_member("8 GiB in no bytes", 46, "a shape of 8 GiB", npy(said(shape=f"({2 * GIB},)"))),
    Attack(
        "8 GiB, deflated to nothing",
        (46,),
        "a deflated member that says 8 GiB",
        writing(NPZ, beside(deflated(b"w.npy", npy(said(shape=f"({GIB},)")), size=0xF0000000))),
    ),
    Attack(
        "8 GiB that are a hole",
        (46,),
        "a sparse file with honest sizes: looked at in no memory",
        _sparse,
        LOOKED_AT,
    ),
    Attack(
        "4 TB in its directory",
        (46, 64),
        "a directory that says a member of 100 bytes has 4 TB",
        writing(
            NPZ,
            beside(
                Part(
                    b"w.npy",
                    npy(said(shape=f"({1 << 40},)")),
                    central={
                        "nbytes": U32,
                        "size": U32,
                        "extra": b"\1\0\x10\0" + ((1 << 42) + 128).to_bytes(8, "little") * 2,
                    },
                )
            ),
        ),
    ),
)
OBJECTS = (
    of_harm(
        "an array of objects",
        47,
        "an object array whose pickle runs a command",
        lambda folder: beside(Part(b"w.npy", npy(said("'|O'", shape="(1,)"), harm(folder)))),
        "'w'",
    ),
    of_harm(
        "an array of objects, 8 wide",
        47,
        "the same, in another spelling",
        lambda folder: beside(Part(b"w.npy", npy(said("'|O8'", shape="(1,)"), harm(folder)))),
        "'w'",
    ),
    of_harm("a pickle for a file", 48, "a pickle that runs a command, renamed to npz", harm, STEM),
    of_harm(
        "a pickle for a member",
        48,
        "a pickle that runs a command, called w.npy",
        lambda folder: beside(Part(b"w.npy", harm(folder))),
        "'w'",
    ),
)
MAGICS = (
    of_member("no npy magic", 49, "a member that is no array", bytes(200)),
    of_member("half an npy magic", 49, "a member cut inside its magic", b"\x93NUM"),
    of_member("an empty member", 49, "a member of no bytes", b""),
    of_member("version 9", 49, "a version nobody knows", npy(said(), W.tobytes(), version=b"\t\0")),
    of_member("version 0", 49, "a version nobody knows", npy(said(), W.tobytes(), version=b"\0\0")),
    of_member(
        "a header longer than its member", 49, "a length that lies", b"\x93NUMPY\1\0\xff\xff{"
    ),
    of_member(
        "a header of 4 GiB", 49, "a length that lies", b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(90)
    ),
    Attack(
        "a member that is a text",
        (49,),
        "a member of another name and no magic",
        writing(NPZ, beside(Part(b"w.npy", member(W)), Part(b"readme.txt", b"hello"))),
    ),
)
SHAPES = (
    of_shape("a negative dimension", "(-2, 3)"),
    of_shape("two negative dimensions", "(-2, -3)"),
    of_shape("a dimension that is True", "(True, 6)"),
    of_shape("a dimension of 2^70", f"({1 << 70},)"),
    of_shape("a product that wraps around", f"({1 << 62}, 4, 2)"),
    of_shape("nothing times 2^62", f"(0, {1 << 62}, 4)", data=b""),
    of_shape("a dimension that is a float", "(2.0, 3)"),
    of_shape("a dimension that is a text", "('2', 3)"),
    of_shape("a dimension that is complex", "(2j, 3)"),
    of_shape("no shape", "None"),
    of_shape("a shape that is a number", "6"),
    of_shape("a shape that is a list", "[2, 3]"),
    of_shape("71 dimensions", f"({'1,' * 70} 6)"),
    of_shape("a dimension of 5,000 digits", f"({'9' * 5000},)"),
)
TEXTS = tuple(
    of_member(name, 51, "a header that is no plain mapping", npy(content, W.tobytes()))
    for name, content in (
        ("a call", said(shape="__import__('os').system('true')")),
        ("a call in its dtype", said("open('/etc/passwd').read()")),
        ("a generator", said(shape="(i for i in (1,))")),
        ("a lambda", said("(lambda: 1)()")),
        ("an f-string", said("f'{1}'")),
        ("arithmetic", said(shape="(9**9**9,)")),
        ("20 KB of spaces", said().replace(",", "," + " " * 20_000, 1)),
        ("500 brackets", said(shape="(" * 500 + ")" * 500)),
        ("9,000 brackets", said(shape="[" * 4500 + "]" * 4500)),
        ("9,000 signs", said(shape="-" * 9000 + "1")),
        ("9,000 dots", said(shape="a" + ".a" * 4500)),
        ("nothing", ""),
        ("a list", "[1, 2]"),
        ("a key twice", "{'descr': '<f4', 'descr': '|O', 'fortran_order': False, 'shape': (6,)}"),
        ("a key too many", said()[:-2] + "'x': 1}"),
        ("a key too few", "{'descr': '<f4', 'shape': (2, 3)}"),
        ("a key that is a list", "{[]: 1}"),
        ("a key that is bytes", said().replace("'shape'", "b'shape'")),
        ("an order that is 0", said(fortran="0")),
        ("an order that is a text", said(fortran="'False'")),
        ("a dtype that is None", said("None")),
        ("a dtype that is a number", said("4")),
        ("bytes that are no text", said().encode() + b"\xff\xfe\0"),
        ("a NUL", said().replace("descr", "de\0scr")),
        ("an escape that is none", said(r"'\N{nothing}'")),
        ("two lines", said() + "\nimport os"),
        ("an indent", "  " * 10 + said()),
        ("unfinished", said()[:-4]),
    )
)
LENGTHS = (
    of_member("a short member", 52, "less data than its shape", member(W)[:-4]),
    of_member("a member without data", 52, "no data at all", member(W)[:-24]),
    of_member("trailing data", 53, "more data than its shape", member(W) + bytes(4)),
    of_member("two arrays in a member", 53, "an array behind the array", member(W) * 2),
)


def of_name(name: str, raw: bytes, ends: Ends, flags: int = 0x800, *words: str) -> Attack:
    """Return an attack whose second member has this name."""
    part = Part(raw, member(W), flags=flags)
    values: dict[str, np.ndarray] = {"b": B}
    if ends.other == 0:
        values[raw.decode().removesuffix(".npy")] = W
    return Attack(
        name, (55,), "a name that is a path", writing(NPZ, beside(part)), ends, words, values
    )


NAMES = (
    of_name("a name that climbs", b"../../../../tmp/evil.npy", READ),
    of_name("an absolute name", b"/tmp/evil.npy", READ),
    of_name("a drive", b"C:\\evil.npy", READ),
    of_name("a name of escapes", b"\x1b[31mred\n.npy", READ),
    of_name("a name with a NUL", b"w\0.npy", Ends(0, -1, -1, 0)),
    of_name("no name", b".npy", READ),
    of_name("a name that is no text", b"\xff\xfe.npy", REFUSED),
    of_name("a name that is no ASCII and does not say UTF-8", b"\xc3\xa4.npy", REFUSED, 0),
    of_name("a surrogate", b"\xed\xa0\x80.npy", REFUSED),
)
DTYPES = (
    of_descr("a structure", 56, "[('a', '<f4')]"),
    of_descr("a structure with an object", 47, "[('a', '<f4'), ('b', '|O')]"),
    of_descr("unicode", 56, "'<U1'"),
    of_descr("bytes", 56, "'|S4'"),
    of_descr("a void of 5", 56, "'|V5'", data=bytes(30)),
    of_descr("dates", 56, "'<M8[s]'", data=bytes(48)),
    of_descr("spans", 56, "'<m8[ns]'", data=bytes(48)),
    of_descr("a float of 3 bytes", 56, "'<f3'", data=bytes(18)),
    of_descr("a long double", 56, "'<f16'", data=bytes(96)),
    of_descr("an integer of 2^70 bytes", 56, f"'<i{1 << 70}'"),
    of_descr("a name", 56, "'float32'"),
    of_descr("a subarray", 56, "'(2,)<f4'"),
    of_descr("two types", 56, "'<f4,<f4'", data=bytes(48)),
    of_descr("no byte order", 56, "'f4'"),
    of_descr("a void of none", 56, "'|V0'", data=b""),
)


def of_order(name: str, array: np.ndarray, *, fortran: bool = False) -> Attack:
    """Return what is read all the same: another order of bytes or of elements."""
    head = said(repr(array.dtype.str), str(fortran), repr(array.shape))
    content = npy(head, array.tobytes("F" if fortran else "C"))
    values = {"w": array.astype(array.dtype.newbyteorder("<")), "b": B}
    return of_member(name, 57, "another order", content, ends=READ, values=values)


ORDERS = (
    of_order("big-endian floats", W.astype(">f4")),
    of_order("big-endian doubles", W.astype(">f8")),
    of_order("big-endian halves", W.astype(">f2")),
    of_order("Fortran order", W, fortran=True),
    of_order("Fortran order and big-endian", W.astype(">f4"), fortran=True),
    of_order("Fortran order of three", np.float32(range(24)).reshape(2, 3, 4), fortran=True),
    of_order("a scalar in Fortran order", np.float32(7).reshape(()), fortran=True),
    of_order("Fortran order of nothing", np.zeros((0, 3), np.float32), fortran=True),
)
NPZ_ATTACKS = (
    *BOMBS,
    *CLAIMS,
    *OBJECTS,
    *MAGICS,
    *SHAPES,
    *TEXTS,
    *LENGTHS,
    *NAMES,
    *DTYPES,
    *ORDERS,
)
