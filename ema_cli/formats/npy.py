"""The header of a .npy array: what it holds, and in which order.

Layout: ``93 "NUMPY"``, a version, the length of the rest as u16le (version 1) or u32le, and a
Python dict literal of three keys, padded with spaces so that data starts aligned. Source:
numpy.lib.format. The literal is read by a parser of its own, which knows nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from ema_cli.errors import DamagedFile, InputError, UnsupportedInput
from ema_cli.tensors import DTYPES, DType
from ema_cli.text import shorten

# NumPy refuses longer ones.
HEADER_LIMIT = 10_000
# NumPy 1 holds no more than 32 dimensions, NumPy 2 no more than 64.
DIMENSION_LIMIT = 32

_MAGIC = b"\x93NUMPY"
_ALIGNMENT = 64
# Spaces for the first (in Fortran order the last) dimension to grow to 21 digits in place.
_GROWTH = 21
_LENGTH_BYTES: Mapping[tuple[int, ...], int] = {(1, 0): 2, (2, 0): 4, (3, 0): 4}

_NAMES = {
    "b1": "bool",
    "i1": "int8",
    "i2": "int16",
    "i4": "int32",
    "i8": "int64",
    "u1": "uint8",
    "u2": "uint16",
    "u4": "uint32",
    "u8": "uint64",
    "f2": "float16",
    "f4": "float32",
    "f8": "float64",
    "c8": "complex64",
    "c16": "complex128",
}
_CODES = {name: code for code, name in _NAMES.items()}

_REFUSED = {
    "O": ("Python objects", "they would have to be unpickled; save it without them"),
    "U": ("text", "leave it out"),
    "S": ("text", "leave it out"),
    "a": ("text", "leave it out"),
    "M": ("dates", "leave it out"),
    "m": ("dates", "leave it out"),
    "V": (
        "bytes without a type",
        "NumPy forgets what bfloat16 and float8 are: save it as float32, or as safetensors",
    ),
}

_KEY = re.compile(r"""[ \n]*(?:'(\w+)'|"(\w+)")[ \n]*:[ \n]*""", re.ASCII)
# What follows a value: a comma, a brace or both.
_SEPARATOR = re.compile(r"[ \n]*(?:,[ \n]*(\}?)|(\}))")
_INTEGERS = "a tuple of integers from 0 to 2^63 - 1"
# Python 2 wrote its long integers with an L.
_VALUES = {
    "descr": (re.compile(r"""'[^'"\\]*'|"[^'"\\]*\""""), "a dtype in quotes"),
    "fortran_order": (re.compile(r"True|False"), "True or False"),
    "shape": (re.compile(r"\([0-9L, ]*\)"), _INTEGERS),
}
_NUMBER = re.compile(r" *([1-9][0-9]{0,18}|0)L? *")
_DESCR = re.compile(r"([<>|])([a-zA-Z])([0-9]{0,9})(.*)", re.DOTALL)


class Header(NamedTuple):
    """What a .npy header says.

    Attributes:
        dtype: of the elements.
        big_endian: whether they lie in big-endian byte order; False where they have none.
        fortran: whether the first dimension is the fastest, not the last.
        shape: of the array.
        nbytes: of the header itself.
    """

    dtype: DType
    big_endian: bool
    fortran: bool
    shape: tuple[int, ...]
    nbytes: int


# ---------------------------------------------------------------------------- reading


def length(path: str, name: str, start: bytes) -> int:
    """Return how long the header of array `name` says it is; `start` are its first 12 bytes."""
    if not start.startswith(_MAGIC):
        raise DamagedFile(path, "expected a .npy array, found something else", name)
    version = tuple(start[6:8])
    width = _LENGTH_BYTES.get(version)
    if width is None:
        shown = ".".join(map(str, version))
        raise DamagedFile(path, f"expected .npy version 1.0, 2.0 or 3.0, found {shown}", name)
    text = int.from_bytes(start[8 : 8 + width], "little")
    if text > HEADER_LIMIT:
        raise DamagedFile(
            path, f"expected a .npy header of at most {HEADER_LIMIT:,} bytes, found {text:,}", name
        )
    return 8 + width + text


def parse(path: str, name: str, raw: bytes) -> Header:
    """Return what the header `raw` of array `name`, which is complete, says.

    Raises `DamagedFile`, and `UnsupportedInput` for arrays of what is not a number.
    """
    text = raw[8 + _LENGTH_BYTES[raw[6], raw[7]] :].decode("latin-1")
    fields = _fields(path, name, text)
    dtype, big_endian = _dtype(path, name, fields["descr"])
    shape = _shape(path, name, fields["shape"])
    # Also products that only fit because one factor is 0: NumPy overflows on them.
    if math.prod(n for n in shape if n) * dtype.bits >= 1 << 66:
        raise DamagedFile(path, f"the size of shape {list(shape)} overflows 64 bits", name)
    return Header(dtype, big_endian, fields["fortran_order"] == "True", shape, len(raw))


def _fields(path: str, name: str, text: str) -> dict[str, str]:
    """Return the three values of the literal as they are written."""
    found: dict[str, str] = {}
    at, closed = 1, ""
    while text.startswith("{") and not closed and (key := _KEY.match(text, at)):
        field = key[1] or key[2]
        if field not in _VALUES or field in found:
            break
        found[field] = _value(path, name, field, text[key.end() :])
        separator = _SEPARATOR.match(text, key.end() + len(found[field]))
        if separator is None:
            break
        at, closed = separator.end(), separator[1] or separator[2]
    if not closed or found.keys() != _VALUES.keys() or text[at:].strip(" \n"):
        raise DamagedFile(
            path,
            "expected a .npy header of descr, fortran_order and shape, each once, "
            f"found {shorten(text.strip())}",
            name,
        )
    return found


def _value(path: str, name: str, field: str, text: str) -> str:
    """Return the value that `text` begins with, as it is written."""
    if field == "descr" and text.startswith("["):
        raise _refusal(path, name, "records (a structured dtype)", "save each field alone")
    pattern, expected = _VALUES[field]
    value = pattern.match(text)
    if value is None:
        raise DamagedFile(
            path, f"{field}: expected {expected}, found {shorten(text.strip(), 60)}", name
        )
    return value[0]


def _dtype(path: str, name: str, quoted: str) -> tuple[DType, bool]:
    """Return the dtype and whether it is big-endian."""
    descr = quoted[1:-1]
    parts = _DESCR.fullmatch(descr)
    if parts is not None and parts[2] in _REFUSED:
        what, hint = _REFUSED[parts[2]]
        raise _refusal(path, name, f"{what} (dtype {shorten(descr, 60)})", hint)
    code = parts[2] + parts[3] if parts and not parts[4] else ""
    if code in ("f16", "c32"):
        raise _refusal(path, name, "long doubles, which differ by machine", "save it as float64")
    dtype = DTYPES[_NAMES[code]] if code in _NAMES else None
    if parts is None or dtype is None or (parts[1] == "|" and dtype.bits > 8):
        raise DamagedFile(path, f"unknown dtype '{shorten(descr, 60)}'", name)
    return dtype, parts[1] == ">" and dtype.bits > 8


def _shape(path: str, name: str, text: str) -> tuple[int, ...]:
    """Return the numbers of a tuple literal; ``(3)`` is none, but ``(3,)`` is."""
    parts = text[1:-1].split(",")
    if not parts[-1].strip(" "):
        del parts[-1]
    elif len(parts) == 1:
        parts = [""]
    numbers = [_NUMBER.fullmatch(part) for part in parts]
    shape = tuple(int(number[1]) for number in numbers if number)
    if len(shape) != len(parts) or max(shape, default=0) >= 1 << 63:
        raise DamagedFile(
            path,
            f"shape: expected {_INTEGERS}, found {shorten(text, 100)}",
            name,
        )
    if len(shape) > DIMENSION_LIMIT:
        raise DamagedFile(
            path, f"expected at most {DIMENSION_LIMIT} dimensions, found {len(shape)}", name
        )
    return shape


def _refusal(path: str, name: str, what: str, hint: str) -> InputError:
    return UnsupportedInput(
        f"{shorten(path, 1000)}: tensor '{shorten(name)}': expected numbers, found {what}", hint
    )


# ---------------------------------------------------------------------------- writing


def representable(dtype: DType) -> bool:
    """Whether NumPy itself, without an extension, knows this dtype."""
    return dtype.name in _CODES


def encode(dtype: DType, shape: tuple[int, ...], *, big_endian: bool) -> bytes:
    """Return the header of an array in C order, as `numpy.save` writes it."""
    order = "|" if dtype.bits == 8 else ">" if big_endian else "<"
    text = f"{{'descr': '{order}{_CODES[dtype.name]}', 'fortran_order': False, 'shape': {shape}, }}"
    if shape:
        text += " " * max(_GROWTH - len(str(shape[0])), 0)
    head = 10 + len(text) + 1
    text += " " * (_ALIGNMENT - head % _ALIGNMENT) + "\n"
    return _MAGIC + b"\1\0" + len(text).to_bytes(2, "little") + text.encode("ascii")
