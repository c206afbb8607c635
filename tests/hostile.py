"""Hostile and broken checkpoints, one defect each: a name, a builder, the words of the refusal."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from helpers import raw_safetensors

FILE = "model-step-300.safetensors"
FOLDER = "checkpoint-300"
MIB = 1 << 20


class Hostile(NamedTuple):
    """One defect.

    Attributes:
        name: the defect.
        build: writes it into a directory and returns its path.
        words: what the refusal must say besides the name of the file.
        code: exit code when it is named on the command line.
        beside: exit code of a run over a directory that holds it and good checkpoints.

    """

    name: str
    build: Callable[[Path], Path]
    words: tuple[str, ...]
    code: int = 12
    beside: int = 3


def of_bytes(name: str, content: bytes, *words: str, sparse: int = 0) -> Hostile:
    """Return a single file of these bytes, extended by a hole to `sparse` bytes."""

    def build(folder: Path) -> Path:
        path = folder / FILE
        path.write_bytes(content)
        if sparse:
            os.truncate(path, sparse)
        return path

    return Hostile(name, build, words)


def of_header(name: str, header: bytes | dict[str, Any], size: int, *words: str) -> Hostile:
    """Return a single file with this header and `size` bytes of data."""
    return of_bytes(name, raw_safetensors(header, bytes(size)), *words)


def entry(
    dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **extra: Any
) -> dict[str, Any]:
    """Return the header entry of one tensor, right or wrong."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **extra}


def of_entry(name: str, size: int, *words: str, **fields: Any) -> Hostile:
    """Return a single file that holds one tensor, called ``layer/w``."""
    return of_header(name, {"layer/w": entry(**fields)}, size, "'layer/w'", *words)


# ---------------------------------------------------------------------------- any file


def _directory(folder: Path) -> Path:
    path = folder / FILE
    path.mkdir()
    return path


def _fifo(folder: Path) -> Path:
    path = folder / FILE
    os.mkfifo(path)
    return path


def _socket(folder: Path) -> Path:
    path = folder / FILE
    with socket.socket(socket.AF_UNIX) as bound:
        before = os.open(".", os.O_RDONLY)
        os.chdir(folder)  # a socket's path may hold no more than about 100 bytes
        try:
            bound.bind(FILE)
        finally:
            os.fchdir(before)
            os.close(before)
    return path


def link_to(target: str) -> Callable[[Path], Path]:
    """Return the builder of a symbolic link."""

    def build(folder: Path) -> Path:
        path = folder / FILE
        path.symlink_to(target)
        return path

    return build


NOT_FILES = (
    # Searching an empty directory finds nothing, which is not damage.
    Hostile("a directory called like a file", _directory, ("expected a checkpoint",), code=10),
    Hostile("a named pipe", _fifo, ("expected a regular file", "a named pipe")),
    Hostile("a socket", _socket, ("cannot open",)),
    Hostile("a link to a device", link_to("/dev/zero"), ("regular file", "a character device")),
    Hostile("a dangling link", link_to("nowhere"), ("cannot open", "No such file")),
    Hostile("a link to itself", link_to(FILE), ("cannot open", "symbolic links")),
)
PROCESS_MEMORY = Hostile("a link to process memory", link_to("/proc/self/mem"), ())

GOOD = {"layer/w": entry()}
GOOD_FILE = raw_safetensors(GOOD, bytes(8))
ZIP = b"PK\x03\x04" + bytes(60)

OTHER_MAGIC = (
    of_bytes("a zip file", ZIP, "expected a safetensors file", "zip"),
    of_bytes("an HDF5 file", b"\x89HDF\r\n\x1a\n" + bytes(90), "expected a safetensors", "HDF5"),
    of_bytes("a pickle", b"\x80\x02}q\x00." + bytes(90), "expected a safetensors", "pickle"),
    of_bytes("a GGUF file", b"GGUF\x03\0\0\0" + bytes(90), "expected a safetensors", "GGUF"),
    of_bytes("zip magic, safetensors brace", b"PK\x03\x04\0\0\0\0{}" + bytes(80), "67,324,752"),
    of_bytes("a zip file behind the data", GOOD_FILE + ZIP, "trailing", "8 bytes", "72"),
)


# ---------------------------------------------------------------------------- headers

_LENGTHS = (
    of_bytes("an empty file", b"", "at least 8 bytes", "found 0"),
    of_bytes("seven bytes", bytes(7), "at least 8 bytes", "found 7"),
    of_bytes("a header longer than the file", GOOD_FILE[:40], "header claims", "only 32"),
    of_bytes("a header of 2^63 bytes", b"\0" * 7 + b"\x80{}", "9,223,372,036,854,775,808"),
    of_bytes(
        "a header of 17 MiB",
        (17 * MIB).to_bytes(8, "little") + b"{",
        "at most 16.0 MiB",
        "17.0 MiB",
        sparse=18 * MIB,
    ),
    of_bytes("a truncated tensor", GOOD_FILE[:-1], "truncated", "8 bytes", "holds 7"),
    of_bytes("trailing bytes", GOOD_FILE + b"x", "trailing bytes", "8 bytes", "holds 9"),
)

_DEEP = b"[" * 5000 + b"]" * 5000
_ENTRY = json.dumps(entry()).encode()


def _with_shape(text: bytes) -> bytes:
    return b'{"layer/w":{"dtype":"F32","shape":%b,"data_offsets":[0,8]}}' % text


_JSON = (
    of_header("bytes that are not UTF-8", b'{"\xff":1}', 0, "not UTF-8", "byte 10"),
    of_header("a header that is no JSON", b"{hello}", 0, "not JSON"),
    of_header("an array for a header", b"[1, 2]", 0, "'{'", "'['"),
    of_header("an empty header", b"", 0, "'{'"),
    of_header("spaces before the brace", b"  {}", 0, "'{'"),
    of_header("a header cut short", b'{"layer/w":', 0, "not JSON"),
    of_header("a second object behind the header", b"{}{}", 0, "closing brace"),
    of_header("a comma before the brace", b'{"layer/w":%b,}' % _ENTRY, 8, "not JSON"),
    of_header("a number for a name", b"{1:2}", 0, "not JSON"),
    of_header("5,000 brackets", b'{"layer/w":' + _DEEP + b"}", 0, "an entry is longer"),
    of_header("a NaN for a dimension", _with_shape(b"[NaN]"), 8, "not JSON", "NaN"),
    of_header("an infinite dimension", _with_shape(b"[Infinity]"), 8, "not JSON", "Infinity"),
    of_header("a number of 5,000 digits", _with_shape(b"[" + b"9" * 5000 + b"]"), 8, "not JSON"),
    of_header(
        "one name twice, two dtypes",
        b'{"layer/w":%b,"layer/w":%b}' % (_ENTRY, _ENTRY.replace(b"F32", b"U32")),
        8,
        "'layer/w'",
        "stands twice",
    ),
    of_header(
        "one field twice",
        b'{"layer/w":%b}' % _ENTRY.replace(b"{", b'{"dtype":"F32",'),
        8,
        "'layer/w'",
        "'dtype' stands twice",
    ),
    of_header("a lone surrogate in a name", b'{"w\\ud800":%b}' % _ENTRY, 8, "surrogate", "ud800"),
)

_TILING = (
    of_header(
        "overlapping tensors",
        {"a": entry(), "layer/w": entry(offsets=(4, 12))},
        12,
        "'layer/w'",
        "overlaps",
        "expected offset 8",
        "found 4",
    ),
    of_header(
        "a hole",
        {"a": entry(), "layer/w": entry(offsets=(12, 20))},
        20,
        "'layer/w'",
        "hole",
        "expected offset 8",
        "found 12",
    ),
    of_header(
        "two tensors in one range", {"a": entry(), "b": entry("U32")}, 8, "overlaps", "found 0"
    ),
    of_header("a hole at the start", {"layer/w": entry(offsets=(8, 16))}, 16, "'layer/w'", "hole"),
    of_header("no tensors but data", {}, 4, "trailing bytes", "holds 4"),
)

_FIELDS = (
    of_entry("begin after end", 8, "[begin, end]", "[8, 0]", offsets=(8, 0)),
    of_entry("three offsets", 8, "[begin, end]", "[0, 4, 8]", offsets=(0, 4, 8)),
    of_entry("offsets of 2^64", 8, "data_offsets", str(1 << 64), offsets=(0, 1 << 64)),
    of_entry("a negative offset", 8, "data_offsets", "-8", offsets=(-8, 0)),
    of_entry("a negative dimension", 8, "shape", "-2", shape=(-2,)),
    of_entry("two negative dimensions", 8, "shape", "-1", shape=(-1, -2)),
    of_entry("a product that overflows", 8, "overflows", shape=(1 << 32, 1 << 32, 2)),
    of_entry(
        "a product that wraps around to its size", 8, "overflows", shape=(1 << 62, 4, 2), dtype="U8"
    ),
    of_entry("a shape too small for its range", 8, "4 bytes", "hold 8", shape=(1,)),
    of_entry("a shape too large for its range", 8, "12 bytes", "hold 8", shape=(3,)),
    of_entry("a dtype of the wrong width", 8, "16 bytes", "hold 8", dtype="F64"),
    of_entry("an unknown dtype", 8, "unknown dtype", "F31", dtype="F31"),
    of_entry("a dtype that is a list", 8, "unknown dtype", dtype=["F32"]),
    of_entry("4 bits that end inside a byte", 1, "whole bytes", "4 bits", dtype="F4", shape=(1,)),
    of_entry("6 bits that end inside a byte", 1, "whole bytes", dtype="F6_E2M3", shape=(1,)),
    of_entry("a float dimension", 8, "shape", "2.0", shape=(2.0,)),
    of_entry("a bool dimension", 4, "shape", "True", shape=(True,), offsets=(0, 4)),
    of_entry("a string dimension", 8, "shape", "2", shape=("2",)),
    of_entry("a null shape", 4, "shape", "None", shape=None, offsets=(0, 4)),
    of_entry("a huge dimension", 8, "shape", str(1 << 70), shape=(1 << 70,)),
    of_entry("an unknown field", 8, "expected the fields", "strides", strides=[1]),
    of_entry("nothing times 2^62", 0, "overflows", shape=(0, 1 << 62), offsets=(0, 0)),
    of_entry("71 dimensions", 4, "32 dimensions", "71", shape=(1,) * 71, offsets=(0, 4)),
    of_header("a missing field", {"layer/w": {"dtype": "F32", "shape": [2]}}, 8, "data_offsets"),
    of_header("a list for a tensor", {"layer/w": [1, 2]}, 8, "'layer/w'", "expected the fields"),
    of_header("null for a tensor", {"layer/w": None}, 8, "'layer/w'", "expected the fields"),
)

_METADATA = tuple(
    of_header(f"metadata {what}", b'{"__metadata__":%b,"layer/w":%b}' % (text, _ENTRY), 8, *words)
    for what, text, words in (
        ("that is a list", b"[]", ("__metadata__", "strings")),
        ("that is null", b"null", ("__metadata__", "strings")),
        ("with a number", b'{"a":1}', ("__metadata__", "strings")),
        ("with an object", b'{"a":{}}', ("__metadata__", "strings")),
        ("with a key twice", b'{"a":"1","a":"2"}', ("__metadata__", "'a' twice")),
        ("with a lone surrogate", b'{"a":"\\udc00"}', ("__metadata__", "surrogate")),
    )
)

SINGLE_FILES = (*_LENGTHS, *_JSON, *_TILING, *_FIELDS, *_METADATA)


def many_tensors(path: Path, count: int = 900_000) -> Path:
    """Write a well formed file of `count` empty tensors: 60 MB that are nothing but header."""
    one = '"tensor-%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = "{" + ",".join(one % k for k in range(count)) + "}"
    path.write_bytes(raw_safetensors(header.encode()))
    return path
