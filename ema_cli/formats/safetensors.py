"""safetensors files: a JSON header that says where each tensor lies, then the bytes.

Layout: ``u64le N``, N bytes of UTF-8 JSON ``{name: {dtype, shape, data_offsets: [begin, end)}}``
with offsets relative to 8 + N and an optional ``__metadata__`` of strings, then the data. The
offsets tile the data exactly. Specification: the README of github.com/huggingface/safetensors.

The header is parsed here rather than by the reference library because that one accepts duplicate
names, cannot return every dtype to NumPy and maps the file. Each broken invariant is an error of
its own, found before anything of the size the header claims is allocated.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ema_cli.blueprint import Draft, Entry, File, Layout
from ema_cli.errors import DamagedFile, EmaError
from ema_cli.files import open_input, read_exact, stamp
from ema_cli.formats.known import Known
from ema_cli.formats.scanning import Repeated, Scanner
from ema_cli.tensors import DTYPES, Checkpoint, DType, Extent, Index, Stamp, Tensor
from ema_cli.text import encodable, shorten, size

NAME = "safetensors"
SUFFIX = ".safetensors"

# The format allows 100 MB; a header of 16 MiB holds some 200,000 tensors.
HEADER_LIMIT = 16 << 20
TENSOR_LIMIT = 1_000_000
# NumPy 1 holds no more than 32 dimensions, NumPy 2 no more than 64.
DIMENSION_LIMIT = 32
# Writers pad the header with spaces so that data starts aligned.
ALIGNMENT = 8

# In the order in which the reference writer sorts dtypes (then by name), ascending.
_CODES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn",
    "F6_E2M3": "float6_e2m3fn",
    "F6_E3M2": "float6_e3m2fn",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
_DTYPES: Mapping[str, DType] = {code: DTYPES[name] for code, name in _CODES.items()}
_CODE_OF = {name: code for code, name in _CODES.items()}
_ORDER = {name: -place for place, name in enumerate(_CODES.values())}

_FIELDS = {"dtype", "shape", "data_offsets"}


# ---------------------------------------------------------------------------- reading


def sniff(start: bytes, file_size: int) -> bool:
    """Whether a file beginning with `start` (16 bytes) may be a safetensors file."""
    length = int.from_bytes(start[:8], "little")
    return len(start) >= 9 and start[8:9] == b"{" and length <= max(file_size, 1 << 32)


def read(path: str, known: Known, key: str = "") -> Checkpoint:
    """Return the checkpoint in the single file `path`: its checked header, no tensor data.

    Raises `DamagedFile` for each broken invariant, `InputError` when it cannot be opened.
    """
    del key  # nothing is nested in it
    fd = open_input(path)
    try:
        file = stamp(fd, path)
        raw = read_raw_header(fd, file)
    finally:
        os.close(fd)
    digest = hashlib.sha256(raw).hexdigest()
    identity = known_as(digest, file.size)
    if identity not in known:
        tensors, metadata = _parse(path, raw, file.size)
        known[identity] = Index(NAME, tensors, ("",), metadata)
    return Checkpoint(path, (file,), known[identity], (digest,))


def known_as(digest: str, file_size: int) -> tuple[str, ...]:
    """Return the key in `Known` of a single file with this header digest and size."""
    return NAME, digest, str(file_size)


def template_known_as(layout: Layout) -> tuple[str, ...]:
    """Return the key in `Known` of an output with the header of its last checkpoint."""
    return known_as(layout.last.digests[0], layout.files[0].nbytes)


def read_raw_header(fd: int, file: Stamp) -> bytearray:
    """Return the JSON bytes of the header, padding included; the length is checked first."""
    if file.size < 8:
        raise DamagedFile(file.path, f"expected at least 8 bytes, found {file.size}")
    prefix = bytearray(8)
    read_exact(fd, memoryview(prefix), 0, file.path)
    length = int.from_bytes(prefix, "little")
    if length > file.size - 8:
        raise DamagedFile(
            file.path,
            f"the header claims {length:,} bytes, but only {file.size - 8:,} follow its length",
        )
    if length > HEADER_LIMIT:
        raise DamagedFile(
            file.path, f"expected a header of at most {size(HEADER_LIMIT)}, found {size(length)}"
        )
    raw = bytearray(length)
    read_exact(fd, memoryview(raw), 8, file.path)
    return raw


def _parse(
    path: str, raw: bytearray, file_size: int
) -> tuple[tuple[Tensor, ...], Mapping[str, str]]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFile(path, f"the header is not UTF-8: byte {8 + error.start}") from None
    tensors: list[Tensor] = []
    metadata: Mapping[str, str] = {}
    names: set[str] = set()
    start = 8 + len(raw)
    scanner = Scanner(path, text)
    more = scanner.enter()
    while more:
        name = scanner.key()
        if name in names:
            raise DamagedFile(path, "this name stands twice in the header", name)
        names.add(name)
        if name == "__metadata__":
            metadata = _metadata(path, scanner)
        elif len(tensors) < TENSOR_LIMIT:
            tensors.append(_tensor(path, name, scanner.entry(), start))
        else:
            raise DamagedFile(path, f"expected at most {TENSOR_LIMIT:,} tensors, found more")
        more = scanner.next()
    scanner.end()
    tensors.sort(key=_position)
    _check_tiling(path, tensors, start, file_size)
    return tuple(tensors), metadata


def _position(tensor: Tensor) -> tuple[int, int]:
    return tensor.extent[1:]


def _metadata(path: str, scanner: Scanner) -> Mapping[str, str]:
    """Return ``__metadata__``, which maps strings to strings and holds nothing else."""
    if not scanner.at_object():
        raise DamagedFile(path, "__metadata__ must map strings to strings")
    found: dict[str, str] = {}
    more = scanner.enter()
    while more:
        key = scanner.key()
        if key in found:
            raise DamagedFile(path, f"__metadata__ holds '{shorten(key)}' twice")
        if not scanner.at_string():
            raise DamagedFile(path, "__metadata__ must map strings to strings")
        found[key] = scanner.string()
        for text in (key, found[key]):
            _check_unicode(path, text, "__metadata__")
        more = scanner.next()
    return found


def _check_unicode(path: str, text: str, what: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DamagedFile(path, f"{what} holds a lone surrogate: '{shorten(text)}'") from None


def _tensor(path: str, name: str, value: Any, start: int) -> Tensor:
    """Return the tensor, every field checked; its data is counted from byte `start`."""
    _check_unicode(path, name, "a tensor name")
    if type(value) is not dict or value.keys() != _FIELDS:
        raise _wrong_fields(path, name, value)
    code = value["dtype"]
    dtype = _DTYPES.get(code) if type(code) is str else None
    if dtype is None:
        raise DamagedFile(path, f"unknown dtype {shorten(str(code))!r}", name)
    shape = _numbers(path, name, value["shape"], "shape")
    if len(shape) > DIMENSION_LIMIT:
        raise DamagedFile(
            path, f"expected at most {DIMENSION_LIMIT} dimensions, found {len(shape)}", name
        )
    offsets = _numbers(path, name, value["data_offsets"], "data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise DamagedFile(path, f"expected data_offsets [begin, end], found {list(offsets)}", name)
    nbytes = offsets[1] - offsets[0]
    bits = math.prod(shape) * dtype.bits
    if bits != 8 * nbytes or bits == 0:
        _check_size(path, name, dtype, shape, nbytes)
    return Tensor(name, dtype, shape, Extent(0, start + offsets[0], nbytes))


def _wrong_fields(path: str, name: str, value: Any) -> DamagedFile:
    if isinstance(value, Repeated):
        return DamagedFile(path, f"the field '{shorten(value.field)}' stands twice", name)
    found = ", ".join(shorten(str(k), 40) for k in value) if type(value) is dict else value
    expected = ", ".join(sorted(_FIELDS))
    return DamagedFile(path, f"expected the fields {expected}, found {shorten(str(found))}", name)


def _numbers(path: str, name: str, value: Any, field: str) -> tuple[int, ...]:
    numbers = value if type(value) is list else [None]
    for n in numbers:
        if type(n) is not int or not 0 <= n < 1 << 63:
            raise DamagedFile(
                path,
                f"{field}: expected a list of integers from 0 to 2^63 - 1, "
                f"found {shorten(str(value))}",
                name,
            )
    return tuple(numbers)


def _check_size(path: str, name: str, dtype: DType, shape: tuple[int, ...], found: int) -> None:
    bits = math.prod(shape) * dtype.bits
    # Also products that only fit because one factor is 0: other readers overflow on them.
    if math.prod(n for n in shape if n) * dtype.bits >= 1 << 66:
        raise DamagedFile(path, f"the size of shape {list(shape)} overflows 64 bits", name)
    if bits % 8:
        raise DamagedFile(
            path, f"shape {list(shape)} of {dtype} does not fill whole bytes ({bits} bits)", name
        )
    if bits // 8 != found:
        raise DamagedFile(
            path,
            f"shape {list(shape)} of {dtype} needs {bits // 8:,} bytes, "
            f"but data_offsets hold {found:,}",
            name,
        )


def _check_tiling(path: str, tensors: Sequence[Tensor], start: int, file_size: int) -> None:
    """Check that the extents, sorted by offset, cover the data exactly: no hole, no overlap."""
    end = start
    for tensor in tensors:
        _, begin, nbytes = tensor.extent
        if begin != end:
            kind = "a hole before its data" if begin > end else "its data overlaps another tensor's"
            raise DamagedFile(
                path,
                f"{kind}: expected offset {end - start:,}, found {begin - start:,}",
                tensor.name,
            )
        end += nbytes
    if end != file_size:
        kind = "truncated" if end > file_size else "trailing bytes"
        raise DamagedFile(
            path,
            f"{kind}: the tensors need {end - start:,} bytes of data, "
            f"the file holds {file_size - start:,}",
        )


# ---------------------------------------------------------------------------- writing


def writing_order(dtype: str, name: str) -> tuple[int, str]:
    """Sort key of the reference writer: dtype from U64 down to BOOL, then the name."""
    return _ORDER[dtype], name


def can_name(name: str) -> bool:
    """Whether a tensor of a safetensors file can have this name."""
    return name != "__metadata__" and encodable(name)


def representable(dtype: DType) -> bool:
    """Whether a safetensors file can hold this dtype."""
    return dtype.name in _CODE_OF


def template(last: Checkpoint, averaged: Sequence[Tensor], unknown: str) -> Draft:
    """Return the file of `last` with its header, byte for byte, whatever is `averaged`."""
    del averaged, unknown
    return Draft([template_file("", last.files[0])], last.index.by_name)


def template_file(name: str, file: Stamp) -> File:
    """Return one output file with the header of `file`."""
    fd = open_input(file.path)
    try:
        raw = read_raw_header(fd, file)
    finally:
        os.close(fd)
    head = len(raw).to_bytes(8, "little") + bytes(raw)
    return File(name, file.size, ((0, head),))


def fresh(entries: Sequence[Entry], last: Checkpoint, limit: int | None) -> Draft:
    """Return one new file with `entries`; `limit` is for formats with shards."""
    del limit
    file, places = fresh_file("", 0, entries, last.index.metadata)
    return Draft([file], places)


def fresh_file(
    name: str, ordinal: int, entries: Sequence[Entry], metadata: Mapping[str, str]
) -> tuple[File, dict[str, Tensor]]:
    """Return one new file, the `ordinal`-th of its output, and where in it each tensor lies."""
    ordered = sorted(entries, key=lambda entry: writing_order(entry.dtype.name, entry.name))
    head, extents = encode_header([entry[:3] for entry in ordered], metadata)
    places = {
        entry.name: Tensor(*entry[:3], extent._replace(file=ordinal))
        for entry, extent in zip(ordered, extents, strict=True)
    }
    end = len(head) + sum(extent.nbytes for extent in extents)
    return File(name, end, ((0, head),)), places


def reference_check(paths: Iterable[str]) -> None:
    """Open each file with the safetensors library: whoever loads it will do the same."""
    from safetensors import SafetensorError, safe_open

    for path in paths:
        if not path.endswith(".json"):
            try:
                with safe_open(path, framework="np") as reader:
                    reader.keys()
            except SafetensorError as error:
                raise EmaError(
                    f"internal error: the safetensors library refuses what was written: {error}"
                ) from error


def encode_header(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]],
    metadata: Mapping[str, str],
    alignment: int = ALIGNMENT,
) -> tuple[bytes, list[Extent]]:
    """Return the length prefix and header for `tensors` in this order, and where each one lies.

    With the order of `writing_order` the bytes are those the safetensors library writes.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    relative: list[tuple[int, int]] = []
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.bits // 8
        entries[name] = {
            "dtype": _CODE_OF[dtype.name],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
        relative.append((begin, end))
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % alignment)
    start = 8 + len(text)
    extents = [Extent(0, start + begin, end - begin) for begin, end in relative]
    return len(text).to_bytes(8, "little") + text, extents
