"""Broken and hostile TensorFlow checkpoints, one defect each, in the manner of `hostile`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tensorflow_bundles import (
    ALL,
    STRING,
    Rows,
    Sliced,
    Tensors,
    block,
    shard_file,
    strings,
    trailed,
    varint,
    write_bundle,
)

from ema_cli.formats.tensorflow import entries, ordered, table
from ema_cli.formats.tensorflow.wire import put_bytes, put_number

FIRST, SECOND = ((0, 2), ALL), ((2, 1), ALL)
GIB = 1 << 30


def sound() -> Tensors:
    """What every broken checkpoint would hold if it were sound."""
    return {
        "layer/w": np.float32([[1, 2, 3], [4, 5, 6]]),
        "text": strings([b"ab", b"", b"cde"]),
        "v": Sliced(np.arange(12, dtype=np.float32).reshape(3, 4), [FIRST, SECOND]),
        "n": np.int64(7),
    }


class Hostile(NamedTuple):
    """A defect: what it does to a checkpoint, and the words of the refusal."""

    name: str
    build: Callable[[Path], Path]
    words: tuple[str, ...]


def of_rows(name: str, change: Callable[[Rows], None], *words: str, shards: int = 1) -> Hostile:
    """A defect of the index that its checksums do not tell."""

    def build(folder: Path) -> Path:
        return write_bundle(folder / "model.ckpt-300", sound(), change=change, shards=shards)

    return Hostile(name, build, words)


def of_fields(name: str, *words: str, tensor: str = "layer/w", **fields: object) -> Hostile:
    """A defect of the entry of one tensor."""

    def change(rows: Rows) -> None:
        rows[tensor.encode()] = replace(rows[tensor.encode()], **fields)

    return of_rows(name, change, f"'{tensor}'", *words)


def of_slice(name: str, *words: str, **fields: object) -> Hostile:
    """A defect of the entry of one slice."""

    def change(rows: Rows) -> None:
        key = ordered.slice_key(b"v", SECOND)
        rows[key] = replace(rows[key], **fields)

    return of_rows(name, change, "tensor 'v'", *words)


def of_slices(name: str, slices: list[tuple[tuple[int, int], ...]], *words: str) -> Hostile:
    """A tensor of shape [3, 4] that says it is stored in these slices, each with an entry."""

    def change(rows: Rows) -> None:
        rows[b"v"].slices = tuple(slices)
        piece = rows.pop(ordered.slice_key(b"v", SECOND))
        for extents in slices:
            if len(extents) == 2 and min(min(one) for one in extents) >= -1:
                full = tuple(n if n >= 0 else whole for (_, n), whole in zip(extents, (3, 4)))  # noqa: B905
                size = 4 * int(np.prod(full, dtype=object))
                made = replace(piece, shape=full, size=size, offset=4 * len(rows))
                rows.setdefault(ordered.slice_key(b"v", extents), made)

    return of_rows(name, change, "tensor 'v'", *words)


def of_bytes(name: str, change: Callable[[bytes], bytes], *words: str) -> Hostile:
    """A defect of the bytes of the index."""

    def build(folder: Path) -> Path:
        prefix = write_bundle(folder / "model.ckpt-300", sound())
        path = Path(f"{prefix}.index")
        path.write_bytes(change(path.read_bytes()))
        return prefix

    return Hostile(name, build, ("model.ckpt-300.index", *words))


def of_pairs(
    name: str, change: Callable[[list[tuple[bytes, bytes]]], None], *words: str
) -> Hostile:
    """A table of these pairs, in whatever order, in one block."""

    def changed(raw: bytes) -> bytes:
        pairs = [(key, value) for key, value, _ in table.read(raw)]
        change(pairs)
        return table_of([trailed(block(pairs), 0)], pairs[-1][0] + b"\xff")

    return of_bytes(name, changed, *words)


def table_of(blocks: list[bytes], last: bytes) -> bytes:
    """A table of blocks with trailers, of which the first holds the entries."""
    out, handles = b"", []
    for content in [*blocks, trailed(block([]), 0)]:
        handles.append(varint(len(out)) + varint(len(content) - 5))
        out += content
    index = block([(last, handles[0])])
    handles.append(varint(len(out)) + varint(len(index)))
    return out + trailed(index, 0) + b"".join(handles[-2:]).ljust(40, b"\0") + table.MAGIC


def flipped(at: int) -> Callable[[bytes], bytes]:
    """Another bit at a place of the index."""
    return lambda raw: (
        raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :] if at >= 0 else flip_end(raw, at)
    )


def flip_end(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + (raw[at + 1 :] if at + 1 else b"")


# ---------------------------------------------------------------------------- the table

SHAPES = (
    of_fields("a product that overflows", shape=(1 << 32, 1 << 32, 2)),
    of_fields("a product that wraps around to its size", shape=(1 << 62, 4, 6)),
    of_fields("a negative dimension", shape=(-2, 3)),
    of_fields("two negative dimensions", shape=(-2, -3)),
    of_fields("255 dimensions", "32 dimensions", shape=(1,) * 255),
    of_fields("a shape too small", "12 bytes", "24", shape=(3,)),
    of_fields("a shape too large", "28 bytes", "24", shape=(7,)),
    of_fields(
        "2^35 elements in a file of 92 bytes",
        "the file has 92",
        tensor="n",
        dtype=1,
        shape=(1 << 35,),
        size=1 << 37,
    ),
    of_fields("a rank nobody knows", value=put_number(1, 1) + put_bytes(2, b"\x18\x01")),
    of_fields("nothing times 2^62, with bytes", shape=(0, 1 << 62)),
)
NUMBERS = {
    "no dtype": 0,
    "a resource": 20,
    "an unknown dtype": 34,
    "a reference": 101,
    "a huge dtype": (1 << 31) - 1,
    "a negative dtype": -1,
}
DTYPES = tuple(of_fields(name, str(number), dtype=number) for name, number in NUMBERS.items())


def _share(rows: Rows) -> None:
    rows[b"tied"] = replace(rows[b"layer/w"], crc=rows[b"n"].crc)


PLACES = (
    of_rows("one range with two checksums", _share, "checksum"),
    of_fields("a size too small", size=20),
    of_fields("a size too large", size=28),
    of_fields("a size of nothing", size=0),
    of_fields("a negative size", size=-24),
    of_fields("a negative offset", offset=-8),
    of_fields("bytes behind the file", ".data-00000-of-00001", offset=10_000),
    of_fields("bytes that end behind the file", "layer/w", offset=80),
    of_fields("an offset of 2^62", offset=1 << 62),
    of_fields("a shard too many", "shard", shard=1),
    of_fields("a negative shard", shard=-1),
    of_fields("bytes in the middle of another's", "overlap", tensor="n", offset=4),
    of_fields("wire types of another message", value=put_bytes(1, b"\x01") + put_bytes(2, b"")),
    of_fields("a shape that is a number", value=put_number(1, 1) + put_number(2, 6)),
    of_fields("an entry cut short", value=b"\x08\x01\x12\x7f"),
    of_fields("bytes that are no message", value=b"\xff" * 12),
)
SLICES = (
    of_slices("overlapping slices", [((0, 2), ALL), ((1, 2), ALL)], "overlap"),
    of_slices(
        "overlapping slices of the right sum",
        [((0, 2), (0, 2)), ((1, 2), (0, 2)), ((0, 2), (2, 2))],
        "overlap",
    ),
    of_slices("a slice twice", [((0, 2), ALL), ((0, 2), ALL)]),
    of_slices("slices that leave a part out", [((0, 2), ALL)], "8"),
    of_slices("a slice out of bounds", [((0, 2), ALL), ((2, 2), ALL)], "out of shape"),
    of_slices("a slice that begins behind the end", [((0, 2), ALL), ((9, 1), ALL)], "out of"),
    of_slices("slices of another rank", [((0, 2),), ((2, 1),)], "dimensions"),
    of_slices("a negative start", [((0, 2), ALL), ((-1, 1), ALL)]),
    of_slices("a negative length", [((0, 2), ALL), ((2, -3), ALL)]),
    of_slices("a start without a length", [((0, 2), ALL), ((2, -1), ALL)]),
    of_slices("a slice of 2^62", [((0, 2), ALL), ((2, 1 << 62), ALL)], "out of shape"),
    of_fields("the entry of a slice is missing", tensor="v", slices=(FIRST, ((2, 1), (0, 4)))),
    of_fields("a huge whole", "together", tensor="v", shape=(1 << 40, 4)),
    of_fields("a whole of another dtype", tensor="v", dtype=3),
    of_fields("strings in slices", "string", tensor="v", dtype=STRING),
    of_slice("a slice of another shape", shape=(4,)),
    of_slice("a slice of another dtype", dtype=3),
    of_slice("a slice of another size", size=12),
    of_slice("a slice outside the file", offset=4000),
    of_slice("a slice in a shard too many", "shard", shard=9),
)
SLICES = tuple(h._replace(words=tuple(w for w in h.words if w != "covered")) for h in SLICES)
STRINGS = (
    of_fields("2^33 strings in 16 bytes", "elements", tensor="text", shape=(1 << 33,)),
    of_fields("strings outside the file", tensor="text", size=1 << 40),
    of_fields("strings without room for lengths", tensor="text", size=2),
)
HEADERS = tuple(
    of_pairs(name, lambda pairs, value=value: pairs.__setitem__(0, (b"", value)), *words)
    for name, value, *words in (
        ("no data files", put_number(2, 0), "data files"),
        ("too many data files", put_number(1, 100_001), "data files"),
        ("a negative number of data files", put_number(1, -1), "data files"),
        ("an unknown byte order", put_number(1, 1) + put_number(2, 2), "byte order"),
        ("a newer version", put_number(1, 1) + put_bytes(3, put_number(2, 9)), "newer"),
        ("a header that is no message", b"\xff\xff"),
    )
)
# The first entry of a block: no key, and the header of a checkpoint of one shard.
HEADER = b"\0\0\6" + entries.encode_header(entries.Header(1, False))
TABLES = (
    of_bytes("an empty index", lambda raw: b""),
    of_bytes("half an index", lambda raw: raw[: len(raw) // 2]),
    of_bytes("an index without its last byte", lambda raw: raw[:-1], "magic"),
    of_bytes("trailing bytes", lambda raw: raw + b"x", "magic"),
    of_bytes("another magic number", flipped(-1), "magic"),
    of_bytes("a flipped bit in a block", flipped(20), "checksum"),
    of_bytes("a flipped bit in the index block", flipped(-60), "checksum"),
    of_bytes("a flipped bit in a handle", flipped(-48)),
    of_bytes("blocks over the footer", lambda raw: footer(raw, (0, 8), (13, len(raw))), "footer"),
    of_bytes("blocks over each other", lambda raw: footer(raw, (0, 60), (30, 60))),
    of_bytes("a handle of 2^63", lambda raw: footer(raw, (1 << 63, 8), (0, 8))),
    of_bytes("four handles", lambda raw: raw[:-10] + b"xx" + raw[-8:], "handles"),
    of_pairs("no header", lambda pairs: pairs.pop(0), "header"),
    of_pairs("a key twice", lambda pairs: pairs.insert(2, pairs[1]), "not above"),
    of_pairs("keys out of order", lambda pairs: pairs.reverse(), ""),
    of_pairs("two headers", lambda pairs: pairs.insert(1, pairs[0]), "not above"),
    of_bytes(
        "a key that shares more than there was",
        lambda raw: of_block(HEADER + b"\x05\1\1xy" + b"\0\0\0\0\1\0\0\0"),
        "shares",
    ),
    of_bytes(
        "more restarts than bytes", lambda raw: of_block(b"\0\0\0\0\xff\xff\xff\xff"), "restarts"
    ),
    of_bytes("no restart", lambda raw: of_block(b"\0\0\0\0" + b"\0\0\0\0"), "restarts"),
    of_bytes(
        "a value behind its block", lambda raw: of_block(b"\0\0\x7f" + b"\0\0\0\0\1\0\0\0"), "past"
    ),
    of_bytes("a snappy bomb", lambda raw: of_block(varint(1 << 32) + b"\0x", 1), "compressed"),
    of_bytes("a snappy block of 64 MiB", lambda raw: of_block(varint(64 << 20) + b"\0x", 1)),
    of_bytes("an unknown compression", lambda raw: of_block(block([(b"", b"")]), 7), "compression"),
)


def of_block(content: bytes, kind: int = 0) -> bytes:
    """A table whose only block of entries this is."""
    return table_of([trailed(content, kind)], b"\xff")


def footer(raw: bytes, *handles: tuple[int, int]) -> bytes:
    """The index with other handles in its footer."""
    code = b"".join(varint(number) for pair in handles for number in pair)
    return raw[:-48] + code.ljust(40, b"\0") + raw[-8:]


def _missing_shard(folder: Path) -> Path:
    prefix = write_bundle(folder / "model.ckpt-300", sound(), shards=3)
    shard_file(prefix, 1, 3).unlink()
    return prefix


def _short_shard(folder: Path) -> Path:
    prefix = write_bundle(folder / "model.ckpt-300", sound())
    os.truncate(shard_file(prefix), shard_file(prefix).stat().st_size - 1)
    return prefix


def _huge_index(folder: Path) -> Path:
    prefix = write_bundle(folder / "model.ckpt-300", sound())
    os.truncate(f"{prefix}.index", 2 * GIB)
    return prefix


def _hollow_index(folder: Path) -> Path:
    prefix = write_bundle(folder / "model.ckpt-300", sound())
    os.truncate(f"{prefix}.index", GIB)
    return prefix


FILES = (
    Hostile("an index of 1 GiB that is a hole", _hollow_index, (".index", "magic")),
    Hostile("a shard is missing", _missing_shard, (".data-00001-of-00003", "missing")),
    Hostile("a shard was cut short", _short_shard, (".data-00000-of-00001", "'n'")),
    Hostile("an index of 2 GiB", _huge_index, (".index", "1.0 GiB", "2.0 GiB")),
)
EVERY = (*SHAPES, *DTYPES, *PLACES, *SLICES, *STRINGS, *HEADERS, *TABLES, *FILES)
