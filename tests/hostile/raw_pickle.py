"""Pickles and torch files assembled from opcodes, so that no unpickler is needed to make them."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from raw_zip import Part, archive

PROTO, STOP, MARK = b"\x80\x02", b".", b"("
NONE, TRUE, FALSE = b"N", b"\x88", b"\x89"
EMPTY_TUPLE, EMPTY_LIST, EMPTY_DICT, EMPTY_SET = b")", b"]", b"}", b"\x8f"
REDUCE, BUILD, APPEND, APPENDS, SETITEM, SETITEMS = b"R", b"b", b"a", b"e", b"s", b"u"
POP, POP_MARK, DUP, PERSID = b"0", b"1", b"2", b"Q"
NEWOBJ, NEWOBJ_EX, STACK_GLOBAL, MEMOIZE = b"\x81", b"\x92", b"\x93", b"\x94"


def glob(module: str, name: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def stack_glob(module: str, name: str) -> bytes:
    """STACK_GLOBAL, of protocol 4."""
    return short(module) + short(name) + STACK_GLOBAL


def text(value: str | bytes) -> bytes:
    """BINUNICODE."""
    raw = value if isinstance(value, bytes) else value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def short(value: str) -> bytes:
    """SHORT_BINUNICODE."""
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


def number(value: int) -> bytes:
    """BININT, or LONG1 where that has no room."""
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def real(value: float) -> bytes:
    """BINFLOAT."""
    return b"G" + struct.pack(">d", value)


def items(*parts: bytes) -> bytes:
    """A tuple."""
    return MARK + b"".join(parts) + b"t"


def listed(*parts: bytes) -> bytes:
    """A list."""
    return EMPTY_LIST + MARK + b"".join(parts) + APPENDS


def mapping(*pairs: tuple[bytes, bytes]) -> bytes:
    """A dict."""
    return EMPTY_DICT + MARK + b"".join(key + value for key, value in pairs) + SETITEMS


def ints(*values: int) -> bytes:
    """A tuple of integers."""
    return items(*(number(value) for value in values))


def reduce(function: bytes, *args: bytes) -> bytes:
    """A call."""
    return function + items(*args) + REDUCE


ORDERED = glob("collections", "OrderedDict")
HOOKS = reduce(ORDERED)
REBUILD = glob("torch._utils", "_rebuild_tensor_v2")


def storage(
    key: bytes | str = "0",
    numel: int | bytes = 6,
    kind: bytes = glob("torch", "FloatStorage"),
    *more: bytes,
    location: bytes = text("cpu"),
) -> bytes:
    """A persistent id of a storage; `key` and `numel` may be any opcodes."""
    named = text(key) if isinstance(key, str) else key
    count = number(numel) if isinstance(numel, int) else numel
    return items(text("storage"), kind, named, location, count, *more) + PERSID


def tensor(
    stored: bytes = storage(),
    offset: int | bytes = 0,
    shape: bytes = ints(2, 3),
    strides: bytes = ints(3, 1),
    *more: bytes,
    hooks: bytes = HOOKS,
) -> bytes:
    """A tensor over a storage."""
    at = number(offset) if isinstance(offset, int) else offset
    return reduce(REBUILD, stored, at, shape, strides, FALSE, hooks, *more)


def checkpoint(*more: tuple[bytes, bytes], model: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """The pickle of a run: a model of ``b`` and `model`, the step, and `more`."""
    bias = tensor(storage("1", 3), 0, ints(3), ints(1))
    entries = ((text("b"), bias), *(model or ((text("w"), tensor()),)))
    pairs = ((text("model"), mapping(*entries)), (text("step"), number(300)), *more)
    return PROTO + mapping(*pairs) + STOP


W_BYTES = struct.pack("<6f", 1, 2, 3, 4, 5, 6)
B_BYTES = struct.pack("<3f", 0.5, -2, 8)
RECORDS: Mapping[str, bytes] = {"0": W_BYTES, "1": B_BYTES}


def members(
    pickle: bytes,
    records: Mapping[str, bytes] = RECORDS,
    *,
    root: str = "archive",
    byteorder: bytes | None = b"little",
) -> list[Part]:
    """The members of a torch file, in torch's order."""
    made = [Part(f"{root}/data.pkl".encode(), pickle)]
    if byteorder is not None:
        made.append(Part(f"{root}/byteorder".encode(), byteorder))
    made += [Part(f"{root}/data/{key}".encode(), data) for key, data in records.items()]
    return [*made, Part(f"{root}/version".encode(), b"3\n")]


def torch_file(
    pickle: bytes, records: Mapping[str, bytes] = RECORDS, *, byteorder: bytes | None = b"little"
) -> bytes:
    """A torch file."""
    return archive(members(pickle, records, byteorder=byteorder))


LEGACY_MAGIC = PROTO + b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19" + STOP
LEGACY_PROTOCOL = PROTO + b"M\xe9\x03" + STOP


def legacy_system(*, little: bytes = TRUE) -> bytes:
    """The third pickle of the stream format."""
    sizes = mapping((text("short"), number(2)), (text("int"), number(4)), (text("long"), number(4)))
    pairs = (
        (text("protocol_version"), number(1001)),
        (text("little_endian"), little),
        (text("type_sizes"), sizes),
    )
    return PROTO + mapping(*pairs) + STOP


def legacy_file(
    pickle: bytes,
    *,
    magic: bytes = LEGACY_MAGIC,
    protocol: bytes = LEGACY_PROTOCOL,
    system: bytes = legacy_system(),
    keys: bytes | None = None,
    storages: Sequence[tuple[int, bytes]] = ((6, W_BYTES), (3, B_BYTES)),
    tail: bytes = b"",
) -> bytes:
    """A torch file in the stream format of torch before 1.6."""
    named = PROTO + listed(text("0"), text("1")) + STOP if keys is None else keys
    data = b"".join(count.to_bytes(8, "little", signed=True) + raw for count, raw in storages)
    return magic + protocol + system + pickle + named + data + tail


def legacy_checkpoint(*more: tuple[bytes, bytes], weight: bytes | None = None) -> bytes:
    """`checkpoint`, with the persistent ids of the stream format."""
    first = tensor(storage("0", 6, glob("torch", "FloatStorage"), NONE))
    second = tensor(storage("1", 3, glob("torch", "FloatStorage"), NONE), 0, ints(3), ints(1))
    model = mapping((text("b"), second), (text("w"), first if weight is None else weight))
    return PROTO + mapping((text("model"), model), (text("step"), number(300)), *more) + STOP
