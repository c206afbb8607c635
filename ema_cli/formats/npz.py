"""NumPy's .npz files: zip archives whose members are .npy arrays, one for each tensor.

A stored array is read where it lies. A deflated one cannot be, nor one whose byte order differs
from the others': these are spilled to a file first, uncompressed and little-endian.

The archive has a CRC-32 of each member, header and data together; that of the data alone follows
from it, since ``crc(header + data) = shift(crc(header), n) ^ crc(data)``.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ema_cli import durable
from ema_cli.blueprint import Draft, Entry, File, Layout, Patch
from ema_cli.checksums import CRC32, crc32_of, shift_all
from ema_cli.errors import DamagedFile, storage_errors
from ema_cli.files import open_input, open_unchanged, stamp
from ema_cli.formats import npy, zips
from ema_cli.formats.known import Known
from ema_cli.formats.zips import Archive, Member, NewMember
from ema_cli.tensors import Checkpoint, DType, Extent, Index, Stamp, Tensor, swap_width
from ema_cli.text import encodable

NAME = "npz"
SUFFIX = ".npz"

_MEMBER_SUFFIX = ".npy"
_WHAT = "a NumPy .npz file"
# As long as nearly all headers are.
_USUAL_HEADER = 128
# What a zip header has for the length of a name.
_NAME_LIMIT = 0xFFFF
_SPILLED = 1


class Stored(NamedTuple):
    """How an array lies in its archive.

    Attributes:
        extent: of the member, its header included.
        header: bytes of the .npy header, uncompressed.
        crc_at: the offsets where the CRC of the member stands.
        swap: bytes that change places together on the way to the spill file; 0 for none.
    """

    extent: Extent
    header: int
    crc_at: tuple[int, ...]
    swap: int


# ---------------------------------------------------------------------------- reading


def sniff(start: bytes) -> bool:
    """Whether a file beginning with `start` is a zip archive, of whatever."""
    return start.startswith((b"PK\3\4", b"PK\5\6"))


def read(path: str, known: Known, key: str = "") -> Checkpoint:
    """Return the checkpoint in the file `path`: its checked headers, no tensor data.

    Raises `DamagedFile` for each broken invariant, `InputError` when it cannot be opened or read.
    """
    del key  # nothing is nested in it
    fd = open_input(path)
    try:
        file = stamp(fd, path)
        archive = zips.read_archive(fd, path, 0, file.size, what=_WHAT)
        raw = _raw_headers(fd, path, archive)
    finally:
        os.close(fd)
    headers = b"".join(raw)
    digest = hashlib.sha256(archive.directory + headers).hexdigest()
    identity = (NAME, archive.structure(), hashlib.sha256(headers).hexdigest())
    if identity not in known:
        known[identity] = _index(path, archive, raw)
    index: Index = known[identity]
    sums = _checksums(index, archive, raw)
    spilled = sum(t.extent.nbytes for t in index.tensors if t.extent.file == _SPILLED)
    if not spilled:
        return Checkpoint(path, (file,), index, (digest,), checksums=sums)
    files = (file, Stamp("", spilled, 0, 0))
    return Checkpoint(path, files, index, (digest, ""), checksums=sums)


def _raw_headers(fd: int, path: str, archive: Archive) -> list[bytes]:
    """Return the .npy header of each member."""
    headers = []
    starts = zips.member_starts(fd, path, archive, _USUAL_HEADER)
    for member, start in zip(archive.members, starts, strict=True):
        name = _tensor_name(path, member)
        nbytes = npy.length(path, name, start[:12])
        whole = start if nbytes <= len(start) else zips.member_start(fd, path, member, nbytes)
        if len(whole) < nbytes:
            raise DamagedFile(path, "its .npy header is truncated", name)
        headers.append(whole[:nbytes])
    return headers


def _tensor_name(path: str, member: Member) -> str:
    if not member.name.endswith(_MEMBER_SUFFIX):
        raise DamagedFile(path, "expected zip members called NAME.npy, found another", member.name)
    return member.name.removesuffix(_MEMBER_SUFFIX)


def _index(path: str, archive: Archive, raw: Sequence[bytes]) -> Index:
    names = [_tensor_name(path, member) for member in archive.members]
    headers = [npy.parse(path, name, one) for name, one in zip(names, raw, strict=True)]
    orders = {one.big_endian for one in headers if one.dtype.bits > 8 and 0 not in one.shape}
    own: dict[str, Stored] = {}
    tensors: list[Tensor] = []
    records: list[Extent] = []
    spilled = 0
    for name, member, header in zip(names, archive.members, headers, strict=True):
        odd = header.big_endian and len(orders) > 1
        swap = swap_width(header.dtype.name) if odd else 0
        tensor = _tensor(path, name, member, header)
        deflated = member.method == zips.DEFLATED
        if tensor.extent.nbytes and not deflated:
            records.append(tensor.extent)
        if tensor.extent.nbytes and (swap or deflated):
            tensor = tensor._replace(extent=Extent(_SPILLED, spilled, tensor.extent.nbytes))
            spilled += tensor.extent.nbytes
        tensors.append(tensor)
        extent = Extent(0, member.offset, member.nbytes)
        own[name] = Stored(extent, header.nbytes, member.crc_at, swap)
    listed = tuple(names)
    tensors.sort(key=_position)
    return Index(
        NAME,
        tuple(tensors),
        ("", "") if spilled else ("",),
        big_endian=orders == {True},
        own=own,
        records=tuple(records),
        checksum=CRC32,
        listed=listed if listed != tuple(tensor.name for tensor in tensors) else (),
    )


def _position(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.extent


def _tensor(path: str, name: str, member: Member, header: npy.Header) -> Tensor:
    """Return a tensor as if it were stored."""
    dtype, shape = header.dtype, header.shape
    tensor = Tensor(name, dtype, shape, Extent(0, member.offset + header.nbytes, 0))
    if tensor.nbytes != member.size - header.nbytes:
        raise DamagedFile(
            path,
            f"shape {list(shape)} of {dtype} needs {tensor.nbytes:,} bytes, "
            f"but {member.size - header.nbytes:,} follow its header",
            name,
        )
    strides = _fortran_strides(shape) if header.fortran else ()
    return tensor._replace(extent=tensor.extent._replace(nbytes=tensor.nbytes), strides=strides)


def _fortran_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of an array in Fortran order, () where that is C order as well."""
    if 0 in shape or sum(n > 1 for n in shape) < 2:
        return ()
    return tuple(itertools.accumulate(shape[:-1], initial=1, func=int.__mul__))


def _checksums(
    index: Index, archive: Archive, raw: Sequence[bytes]
) -> np.ndarray[Any, np.dtype[np.uint32]] | None:
    """Return the CRC-32 of each record, or None without any."""
    if not index.records:
        return None
    crcs = {
        member.offset + len(header): (member.crc, crc32_of(header))
        for member, header in zip(archive.members, raw, strict=True)
        if member.method == zips.STORED
    }
    whole, before = np.array([crcs[one.offset] for one in index.records], np.uint32).T
    after = np.array([one.nbytes for one in index.records], np.int64)
    found: np.ndarray[Any, np.dtype[np.uint32]] = whole ^ shift_all(before, after, CRC32)
    return found


def _stored(index: Index) -> Mapping[str, Stored]:
    assert isinstance(index.own, dict)  # noqa: S101  # made above
    return index.own


# ---------------------------------------------------------------------------- spilling


def spill(checkpoint: Checkpoint, names: Collection[str], path: str) -> None:
    """Write the bytes of those of the tensors that are not read in place to the file `path`.

    Raises `DamagedFile` where a member is not what its CRC-32 tells, `StorageError`.
    """
    index, file = checkpoint.index, checkpoint.files[0]
    fd = open_unchanged(file)
    try:
        archive = zips.read_archive(fd, file.path, 0, file.size, what=_WHAT)
        with storage_errors(path, "cannot open"):
            out = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for name in names:
                tensor, stored = index.by_name[name], _stored(index)[name]
                if tensor.extent.file == _SPILLED:
                    sink = _Sink(out, path, tensor.extent.offset, stored)
                    member = archive.by_name[name + _MEMBER_SUFFIX]
                    zips.inflate_to(fd, file.path, member, sink.write)
        finally:
            os.close(out)
    finally:
        os.close(fd)


class _Sink:
    """Writes an array to a file, piece by piece, without its header and little-endian."""

    def __init__(self, fd: int, path: str, offset: int, stored: Stored) -> None:
        self._fd, self._path = fd, path
        self._offset = offset
        self._skip, self._swap = stored.header, stored.swap
        self._left = b""

    def write(self, piece: memoryview) -> None:
        """Write the next bytes of the member; those of half an element wait for the rest."""
        skipped = min(self._skip, len(piece))
        self._skip -= skipped
        data: memoryview | bytes = piece[skipped:]
        if self._swap:
            joined = self._left + data
            whole = len(joined) // self._swap * self._swap
            self._left = joined[whole:]
            data = np.frombuffer(joined[:whole], f"u{self._swap}").byteswap().tobytes()
        durable.write_exact(self._fd, data, self._offset, self._path)
        self._offset += len(data)


# ---------------------------------------------------------------------------- writing


def representable(dtype: DType) -> bool:
    """Whether an array can have this dtype: those NumPy has without an extension."""
    return npy.representable(dtype)


def can_name(name: str) -> bool:
    """Whether an array can have this name and be found under it by `numpy.load`."""
    return (
        encodable(name)
        and "\0" not in name
        and not name.endswith(_MEMBER_SUFFIX)
        and len(name.encode("utf-8")) + len(_MEMBER_SUFFIX) <= _NAME_LIMIT
    )


def template(last: Checkpoint, averaged: Sequence[Tensor], unknown: str) -> Draft | None:
    """Return a copy of the file of `last` with new bytes for what is averaged.

    None where that is not stored in the byte order of the rest, or anything is deflated: what is
    copied as it is would not be verified.
    """
    del unknown  # there is nothing but arrays
    index, file = last.index, last.files[0]
    names = dict.fromkeys(tensor.name for tensor in averaged if tensor.nbytes)
    deflated = sum(1 for tensor in index.tensors if tensor.nbytes) > len(index.records)
    if deflated or any(index.by_name[name].extent.file == _SPILLED for name in names):
        return None
    stored = [_stored(index)[name] for name in names]
    return Draft(
        [File("", file.size, copy_of=file.path)],
        index.by_name,
        tuple(one.extent for one in stored),
        tuple(one.crc_at for one in stored),
    )


def fresh(entries: Sequence[Entry], last: Checkpoint, limit: int | None) -> Draft:
    """Return one new file of stored arrays, as `numpy.savez` writes it."""
    del limit  # there are no shards
    big_endian = last.index.format == NAME and last.index.big_endian
    heads = [npy.encode(one.dtype, one.shape, big_endian=big_endian) for one in entries]
    laid = zips.lay_out(
        [
            NewMember(one.name + _MEMBER_SUFFIX, None, len(head) + one.nbytes)
            for one, head in zip(entries, heads, strict=True)
        ],
        torch=False,
    )
    literals = [*laid.literals]
    places: dict[str, Tensor] = {}
    for entry, head, (offset, _) in zip(entries, heads, laid.extents, strict=True):
        literals.append((offset, head))
        extent = Extent(0, offset + len(head), entry.nbytes)
        places[entry.name] = Tensor(*entry[:3], extent)
    sums = tuple(Extent(0, *extent) for extent in laid.extents)
    return Draft([File("", laid.total, tuple(literals))], places, sums, tuple(laid.crc_at))


def seal(layout: Layout, crc_of: Mapping[Extent, int]) -> list[Patch]:
    """Return the CRC-32 of each member that was written, at both places where it belongs."""
    assert isinstance(layout.own, tuple)  # noqa: S101  # made above
    return [
        Patch(0, offset, crc_of[extent].to_bytes(4, "little"))
        for extent, crc_at in zip(layout.sums, layout.own, strict=True)
        for offset in crc_at
    ]
