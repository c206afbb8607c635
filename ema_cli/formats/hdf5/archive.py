"""Keras's ``.keras`` archives: a zip file of metadata.json, config.json and model.weights.h5.

The HDF5 file is read where it lies in the archive, which keeps one CRC-32 of all of it. An archive
that somebody compressed is inflated to a temporary file without a name first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ema_cli.blueprint import Draft, Entry, File, Layout, Patch
from ema_cli.checksums import CRC32, Running
from ema_cli.errors import DamagedFile, UnsupportedInput, UsageError, storage_errors
from ema_cli.files import open_input, open_unchanged, page_buffer, read_exact, stamp
from ema_cli.formats import zips
from ema_cli.formats.hdf5 import drafting, reading
from ema_cli.formats.hdf5.config import CONFIG_LIMIT, parse
from ema_cli.formats.hdf5.isolation import Window
from ema_cli.formats.hdf5.names import KERAS
from ema_cli.formats.hdf5.reading import Source
from ema_cli.formats.known import Known
from ema_cli.formats.zips import Archive, Member, NewMember
from ema_cli.tensors import Checkpoint, Extent, Stamp, Tensor
from ema_cli.text import shorten, size

WEIGHTS, CONFIG = "model.weights.h5", "config.json"
_OTHER_WEIGHTS = "model.weights.npz"
# What else an archive holds (assets such as vocabularies) is carried over up to this size.
_OTHERS_LIMIT = 64 << 20


class _Opened(NamedTuple):
    """An archive, its member with the weights, and that as an HDF5 file."""

    archive: Archive
    weights: Member
    source: Source


def read(path: str, known: Known) -> Checkpoint:
    """Return the checkpoint in the archive `path`, its structure checked; raises `InputError`."""
    fd = open_input(path)
    try:
        file = stamp(fd, path)
        with _opened(fd, file) as (archive, weights, source):
            structure = reading.listed(source, known)
            config = _member(fd, path, archive, CONFIG)
            inflated = source.fd != fd
            layout = hashlib.sha256(config)
            layout.update(archive.structure().encode("ascii"))
            layout.update(structure.digest.encode("ascii"))
            digest = layout.hexdigest()
            identity = (KERAS, digest, file.size)
            if identity not in known:
                record = Extent(0, weights.offset, weights.nbytes)
                index, told = reading.index_of(
                    KERAS,
                    path,
                    structure,
                    source.window,
                    parse(path, config, CONFIG),
                    CONFIG,
                    inflated=inflated,
                    records=() if inflated else (record,),
                )
                known[identity] = index, told
            index, told = known[identity]
            step = reading.told_step(source, index, told)
    finally:
        os.close(fd)
    checkpoint = reading.checkpoint_of(path, file, index, digest, step)
    if inflated:
        return checkpoint
    return dataclasses.replace(checkpoint, checksums=np.array([weights.crc], np.uint32))


@contextlib.contextmanager
def _opened(fd: int, file: Stamp) -> Iterator[_Opened]:
    """Open the archive in the open file `file`, inflated if need be."""
    path = file.path
    archive = zips.read_archive(fd, path, 0, file.size, what="a .keras archive")
    weights = archive.by_name.get(WEIGHTS)
    if weights is None:
        if _OTHER_WEIGHTS in archive.by_name:
            raise UnsupportedInput(
                f"{shorten(path, 1000)}: expected {WEIGHTS}, found {_OTHER_WEIGHTS}",
                "save the model again with Keras, or unpack that member and average it as .npz",
            )
        raise DamagedFile(path, f"expected a member {WEIGHTS}, found none")
    if weights.method == zips.STORED:
        window = Window(weights.offset, weights.nbytes)
        yield _Opened(archive, weights, Source(fd, path, window))
        return
    with storage_errors(tempfile.gettempdir(), f"cannot inflate {WEIGHTS}"):
        temporary = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # in the next line
    with temporary:
        out = temporary.fileno()

        def write(piece: memoryview) -> None:
            if not os.fstat(out).st_size and not reading.sniff(piece):  # before it inflates more
                raise DamagedFile(path, f"member {WEIGHTS}: expected an HDF5 file")
            with storage_errors(tempfile.gettempdir(), f"cannot inflate {WEIGHTS}"):
                temporary.write(piece)

        zips.inflate_to(fd, path, weights, write)
        yield _Opened(archive, weights, Source(out, path, Window(0, weights.size)))


def _member(fd: int, path: str, archive: Archive, name: str) -> bytes:
    member = archive.by_name.get(name)
    if member is None:
        raise DamagedFile(path, f"expected a member {name}, found none")
    return zips.member_bytes(fd, path, member, CONFIG_LIMIT)


def spill(checkpoint: Checkpoint, names: Collection[str], path: str) -> None:
    """Write the named tensors to their places in the file `path`; the archive's CRC is checked."""
    file = checkpoint.files[0]
    fd = open_unchanged(file)
    try:
        with _opened(fd, file) as (_, weights, source):
            if source.fd == fd and checkpoint.checksums is not None:
                _check(source, weights)
            reading.spill_from(source, checkpoint, names, path)
    finally:
        os.close(fd)


def _check(source: Source, weights: Member) -> None:
    """Raise `DamagedFile` unless the bytes of the HDF5 file are those that were saved."""
    buffer = page_buffer(min(1 << 20, weights.nbytes))
    running = Running(CRC32)
    for start in range(0, weights.nbytes, 1 << 20):
        piece = buffer[: min(1 << 20, weights.nbytes - start)]
        read_exact(source.fd, piece, weights.offset + start, source.path)
        running.add(start, piece)
    if running.crc != weights.crc:
        raise DamagedFile(
            source.path,
            f"member {WEIGHTS}: expected CRC-32 {weights.crc:#010x}, found {running.crc:#010x}",
        )


# ---------------------------------------------------------------------------- writing


def template(last: Checkpoint, averaged: Sequence[Tensor]) -> Draft | None:
    """Return a copy of the archive of `last`, or None when some tensors do not lie in it."""
    if not drafting.in_place(averaged):
        return None
    file = last.files[0]
    fd = open_unchanged(file)
    try:
        with _opened(fd, file) as (_, weights, _):
            crc_at = weights.crc_at
    finally:
        os.close(fd)
    copy = File("", file.size, copy_of=file.path)
    return Draft([copy], drafting.places_of(last), last.index.records, crc_at)


def fresh_weights(wanted: Sequence[Entry], last: Checkpoint) -> Draft:
    """Return a new HDF5 file with what the one in the archive of `last` holds."""
    file = last.files[0]
    fd = open_unchanged(file)
    try:
        with _opened(fd, file) as (_, _, source):
            return drafting.drafted(*drafting.built(wanted, last, source, big=False))
    finally:
        os.close(fd)


def fresh(wanted: Sequence[Entry], last: Checkpoint) -> Draft:
    """Return a new archive with what the last one holds besides its weights."""
    if last.index.format != KERAS:
        raise UsageError(
            "a .keras archive holds the configuration of a model, which only another one tells",
            "write the weights alone: -o NAME.weights.h5",
        )
    file = last.files[0]
    fd = open_unchanged(file)
    try:
        with _opened(fd, file) as (archive, _, source):
            building, places = drafting.built(wanted, last, source, big=last.index.big_endian)
            members = _members(fd, file.path, archive, building.nbytes)
    finally:
        os.close(fd)
    laid = zips.lay_out(members, torch=False)
    ordinal = [member.name for member in members].index(WEIGHTS)
    start, nbytes = laid.extents[ordinal]
    literals = [*laid.literals, *((start + at, data) for at, data in building.literals)]
    moved = {
        name: tensor._replace(extent=Extent(0, start + tensor.extent.offset, tensor.extent.nbytes))
        for name, tensor in places.items()
    }
    whole = File("", laid.total, tuple(sorted(literals)))
    crc_at = laid.crc_at[ordinal]
    return Draft([whole], moved, (Extent(0, start, nbytes),), crc_at, building.notes)


def _members(fd: int, path: str, archive: Archive, nbytes: int) -> list[NewMember]:
    """Return the members of the new archive: those of the old one, with new weights."""
    others = sum(member.size for member in archive.members if member.name != WEIGHTS)
    if others > _OTHERS_LIMIT:
        raise UnsupportedInput(
            f"{shorten(path, 1000)}: expected at most {size(_OTHERS_LIMIT)} besides the weights, "
            f"found {size(others)}",
            "keep names and dtypes, or write the weights alone: -o NAME.weights.h5",
        )
    members = []
    for member in archive.members:
        if member.name == WEIGHTS:
            members.append(NewMember(WEIGHTS, None, nbytes))
        else:
            data = zips.member_bytes(fd, path, member, _OTHERS_LIMIT)
            members.append(NewMember(member.name, data, len(data)))
    return members


def seal(layout: Layout, checksums: Mapping[Extent, int]) -> Sequence[Patch]:
    """Return the CRC-32 of the weights, to be put where the archive holds it."""
    crc = checksums[layout.sums[0]].to_bytes(4, "little")
    places = layout.own
    assert isinstance(places, tuple)  # noqa: S101  # made by `template` or `fresh`
    return [Patch(0, offset, crc) for offset in places]
