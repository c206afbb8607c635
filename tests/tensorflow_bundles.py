"""TensorFlow checkpoints written by hand, with any single field wrong, and read back by hand."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fastcrc import crc32
from helpers import dtype_of

from ema_cli.formats.tensorflow import entries, ordered, table

Array = np.ndarray[Any, Any]
Range = tuple[int, int]
Extents = tuple[Range, ...]
ALL: Range = (0, -1)

# DataType of types.proto, and how NumPy or ml_dtypes hold a value.
NUMBERS = {
    1: "float32",
    2: "float64",
    3: "int32",
    4: "uint8",
    5: "int16",
    6: "int8",
    8: "complex64",
    9: "int64",
    10: "bool",
    14: "bfloat16",
    17: "uint16",
    18: "complex128",
    19: "float16",
    22: "uint32",
    23: "uint64",
    24: "float8_e5m2",
    25: "float8_e4m3fn",
    26: "float8_e4m3fnuz",
    27: "float8_e4m3b11fnuz",
    28: "float8_e5m2fnuz",
    29: "int4",
    30: "uint4",
    31: "int2",
    32: "uint2",
    33: "float4_e2m1fn",
}
QUANTIZED = {11: "int8", 12: "uint8", 13: "int32", 15: "int16", 16: "uint16"}
NUMBER_OF = {name: number for number, name in NUMBERS.items()}
STRING, VARIANT = 7, 21


class Opaque(NamedTuple):
    """A tensor by its bytes, and the CRC-32C of its entry where that is not theirs."""

    number: int
    shape: tuple[int, ...]
    data: bytes
    crc: int | None = None


class Sliced(NamedTuple):
    """A tensor stored in these slices: (start, length) in each dimension; -1 is all of it."""

    value: Array
    slices: Sequence[Extents]


@dataclass
class Row:
    """One entry of an index; `value` stands for all of it when it is given."""

    dtype: int
    shape: tuple[int, ...]
    shard: int = 0
    offset: int = 0
    size: int = 0
    crc: int = 0
    slices: tuple[Extents, ...] = ()
    value: bytes | None = None

    def encoded(self) -> bytes:
        """The bytes of the entry."""
        if self.value is not None:
            return self.value
        fields = (self.shard, self.offset, self.size, self.crc, self.slices)
        return entries.encode_entry(entries.Entry(self.dtype, self.shape, *fields))


Rows = dict[bytes, Row]
Tensors = Mapping[Any, Any]


def crc32c(data: bytes, previous: int = 0) -> int:
    """The CRC-32C of `data` after bytes with the CRC `previous`."""
    return crc32.iscsi(data, previous) if previous else crc32.iscsi(data)


def masked(crc: int) -> int:
    """A CRC as it is stored."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % (1 << 32)


def key_of(name: str | bytes) -> bytes:
    """The bytes of a name."""
    return name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")


def varint(value: int) -> bytes:
    """A number as protocol buffers and tables have it."""
    low = [value >> 7 * k & 0x7F for k in range(max(1, (value.bit_length() + 6) // 7))]
    return bytes([digit | 0x80 for digit in low[:-1]] + low[-1:])


# ---------------------------------------------------------------------------- tensors


def strings(
    values: Sequence[bytes], shape: Sequence[int] | None = None, *, big_endian: bool = False
) -> Opaque:
    """A tensor of strings: their lengths, a checksum of these, their bytes."""
    order = ">" if big_endian else "<"
    lengths = crc32c(b"".join(struct.pack(f"{order}I", len(value)) for value in values))
    checksum = struct.pack(f"{order}I", masked(lengths))
    joined = b"".join(values)
    data = b"".join(varint(len(value)) for value in values) + checksum + joined
    shape = (len(values),) if shape is None else tuple(shape)
    return Opaque(STRING, shape, data, crc32c(joined, crc32c(checksum, lengths)))


def variants(values: Sequence[bytes]) -> Opaque:
    """A tensor of variants that are serialised so."""
    data, crc = b"", 0
    for value in values:
        crc = crc32c(value, crc32c(struct.pack("<Q", len(value)), crc))
        checksum = struct.pack("<I", masked(crc))
        crc = crc32c(checksum, crc)
        data += varint(len(value)) + value + checksum
    return Opaque(VARIANT, (len(values),), data, crc)


def raw(value: Array, *, big_endian: bool = False) -> bytes:
    """The bytes of an array; those of a complex number change places by halves."""
    width = value.dtype.itemsize // (2 if value.dtype.kind == "c" else 1)
    data = np.frombuffer(value.tobytes(), f"u{min(width, 8)}")
    return data.byteswap().tobytes() if big_endian else data.tobytes()


def inside(extents: Extents, shape: Sequence[int]) -> tuple[slice, ...]:
    """What NumPy takes for the slice of a tensor of this shape."""
    pairs = zip(extents, shape, strict=True)
    return tuple(slice(start, full if n < 0 else start + n) for (start, n), full in pairs)


# ---------------------------------------------------------------------------- writing


def write_bundle(
    prefix: Path | str,
    tensors: Tensors,
    *,
    shards: int = 1,
    big_endian: bool = False,
    gap: int = 0,
    compress: bool = False,
    change: Callable[[Rows], None] | None = None,
    header: bytes | None = None,
) -> Path:
    """Write a checkpoint and return its prefix.

    The tensors lie in the order given, in one shard after the other, `gap` bytes before each.
    `change` may do anything to the rows of the index before it is written.
    """
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    data = [bytearray() for _ in range(shards)]
    rows: Rows = {}
    placed = 0

    def place(number: int, shape: Sequence[int], content: bytes, crc: int | None) -> Row:
        nonlocal placed
        shard = placed % shards
        placed += 1
        data[shard] += b"\xaa" * gap
        crc = masked(crc32c(content) if crc is None else crc)
        row = Row(number, tuple(shape), shard, len(data[shard]), len(content), crc)
        data[shard] += content
        return row

    for name, value in tensors.items():
        key = key_of(name)
        if isinstance(value, Opaque):
            rows[key] = place(*value)
            continue
        array = np.asarray(value.value if isinstance(value, Sliced) else value)
        number = NUMBER_OF[array.dtype.name]
        if isinstance(value, Sliced):
            rows[key] = Row(number, array.shape, slices=tuple(value.slices))
            for extents in value.slices:
                part = array[inside(extents, array.shape)]
                content = raw(part, big_endian=big_endian)
                rows[ordered.slice_key(key, extents)] = place(number, part.shape, content, None)
        else:
            rows[key] = place(number, array.shape, raw(array, big_endian=big_endian), None)
    if change is not None:
        change(rows)
    for shard, content in enumerate(data):
        shard_file(prefix, shard, shards).write_bytes(content)
    if header is None:
        header = entries.encode_header(entries.Header(shards, big_endian))
    items = {b"": header} | {key: row.encoded() for key, row in rows.items()}
    Path(f"{prefix}.index").write_bytes(index_of(sorted(items.items()), compress=compress))
    return prefix


def shard_file(prefix: Path | str, shard: int = 0, shards: int = 1) -> Path:
    """The path of a data file."""
    return Path(f"{prefix}.data-{shard:05}-of-{shards:05}")


def index_of(items: Iterable[tuple[bytes, bytes]], *, compress: bool = False) -> bytes:
    """The table of these pairs, in one block with whole keys when it is to be compressed."""
    if not compress:
        return table.build(items)
    pairs = list(items)
    out = b""
    handles = []
    blocks = [block(pairs), block([])]
    for content in blocks:
        handles.append(varint(len(out)) + varint(len(snappy(content))))
        out += trailed(snappy(content), 1)
    last = block([(pairs[-1][0] + b"\xff", handles[0])])
    handles.append(varint(len(out)) + varint(len(last)))
    out += trailed(last, 0)
    return out + (handles[1] + handles[2]).ljust(40, b"\0") + table.MAGIC


def block(pairs: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A block of a table in which no key shares bytes with another."""
    out, restarts = b"", []
    for key, value in pairs:
        restarts.append(len(out))
        out += b"\0" + varint(len(key)) + varint(len(value)) + key + value
    restarts = restarts or [0]
    return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def trailed(content: bytes, kind: int) -> bytes:
    """A block with its type and checksum behind it."""
    content += bytes([kind])
    return content + struct.pack("<I", masked(crc32c(content)))


def snappy(content: bytes) -> bytes:
    """A block compressed as snappy does: literals, and copies of five bytes seen before."""
    out, literal, seen, at = varint(len(content)), b"", {}, 0

    def flushed() -> bytes:
        return bytes([len(literal) - 1 << 2]) + literal if literal else b""

    while at < len(content):
        five = content[at : at + 5]
        before = seen.setdefault(five, at) if len(five) == 5 else at
        if 0 < at - before < 1 << 16:
            out += flushed() + bytes([4 << 2 | 2]) + struct.pack("<H", at - before)
            literal, at = b"", at + 5
        else:
            literal, at = literal + content[at : at + 1], at + 1
        if len(literal) == 60:
            out, literal = out + flushed(), b""
    return out + flushed()


def rewritten(prefix: Path, change: Callable[[Rows], None]) -> Path:
    """Write the index of a checkpoint anew after `change`; its data stays."""
    path = Path(f"{prefix}.index")
    items = {key: value for key, value, _ in table.read(path.read_bytes())}
    header = items.pop(b"")
    rows = {key: Row(*entries.parse_entry(value)) for key, value in items.items()}
    change(rows)
    encoded = {b"": header} | {key: row.encoded() for key, row in rows.items()}
    path.write_bytes(table.build(sorted(encoded.items())))
    return prefix


def tensorflow_run(
    folder: Path, values: Sequence[Tensors], every: int = 100, **options: Any
) -> Path:
    """Write one checkpoint per mapping, ``model.ckpt-100`` and so on."""
    for k, tensors in enumerate(values, start=1):
        write_bundle(folder / f"model.ckpt-{k * every}", tensors, **options)
    return folder


# ---------------------------------------------------------------------------- reading


def rows_of(prefix: Path | str) -> tuple[bytes, Rows]:
    """The header and the entries of a checkpoint, by key."""
    items = {k: value for k, value, _ in table.read(Path(f"{prefix}.index").read_bytes())}
    header = items.pop(b"")
    return header, {key: Row(*entries.parse_entry(value)) for key, value in items.items()}


def read_bundle(prefix: Path | str) -> dict[str, Any]:
    """The tensors of a checkpoint: arrays, lists of strings, or bytes; every checksum verified."""
    header, rows = rows_of(prefix)
    shards, big_endian = entries.parse_header(header)
    files = [shard_file(prefix, shard, shards).read_bytes() for shard in range(shards)]
    keys = {(key, extents) for key, row in rows.items() for extents in row.slices}
    hidden = {ordered.slice_key(key, extents) for key, extents in keys}
    found: dict[str, Any] = {}
    for key, row in rows.items():
        name = key.decode("utf-8", "surrogateescape")
        if key in hidden:
            continue
        if not row.slices:
            found[name] = _tensor(row, files, big_endian)
            continue
        whole = np.zeros(row.shape, dtype_of(NUMBERS[row.dtype]))
        covered = np.zeros(row.shape, np.uint8)
        for extents in row.slices:
            place = inside(extents, row.shape)
            whole[place] = _tensor(rows[ordered.slice_key(key, extents)], files, big_endian)
            covered[place] += 1
        assert (covered == 1).all()
        found[name] = whole
    return found


def _tensor(row: Row, files: Sequence[bytes], big_endian: bool) -> Any:
    data = files[row.shard][row.offset : row.offset + row.size]
    assert len(data) == row.size
    if row.dtype == STRING:
        return _strings(data, row, big_endian)
    assert row.dtype == VARIANT or masked(crc32c(data)) == row.crc
    name = NUMBERS.get(row.dtype)
    if name is None:
        return data
    array = np.frombuffer(data, dtype_of(name))
    array = np.frombuffer(raw(array, big_endian=big_endian), array.dtype)
    return array.reshape(row.shape)


def _strings(data: bytes, row: Row, big_endian: bool) -> list[bytes]:
    lengths, at = [], 0
    for _ in range(math.prod(row.shape)):
        length = shift = 0
        while True:
            byte, at = data[at], at + 1
            length, shift = length | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                break
        lengths.append(length)
    ends = [at + 4 + sum(lengths[: k + 1]) for k in range(len(lengths))]
    found = [data[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    again = strings(found, row.shape, big_endian=big_endian)
    assert (again.data, masked(again.crc or 0)) == (data, row.crc)
    return found


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {os.path.relpath(path, folder): path.read_bytes() for path in files}
