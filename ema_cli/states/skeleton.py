"""The structure of a checkpoint, kept when the checkpoint is gone: its files, with holes.

A state's slot has the bytes of the tensors that are averaged or copied. Everything else of the
last applied checkpoint is kept in files of the same names and sizes, sparse where those tensors
lay, so that the format itself reads them again and can lay out any output after them.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import stat
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from ema_cli import durable, formats
from ema_cli.checksums import crc32c
from ema_cli.errors import (
    DamagedFile,
    Disagreement,
    InputError,
    StorageError,
    UsageError,
    storage_errors,
)
from ema_cli.files import check_unchanged, open_unchanged, page_buffer, read_exact, stamp, stamp_of
from ema_cli.formats import FORMATS
from ema_cli.formats.sidefiles import side_files
from ema_cli.hints import PERMISSION
from ema_cli.states.kept import Kept, Skeleton, Span, Wrong, check, is_bare
from ema_cli.tensors import Checkpoint, Role, Stamp, Tensor
from ema_cli.text import shorten

__all__ = ["Kept", "Skeleton", "keep", "read"]

# Scalars and the like are kept in any case: their holes would save nothing, and formats look at
# some of them for the step.
_ALWAYS_KEPT = 64
_BUFFER = 1 << 20
# Pieces that are no farther apart are read at once, with what lies between them.
_NEAR = 16 << 10
_UNNAMED = "checkpoint"
_PLAIN_NAME = re.compile(r"\w[\w.+=@-]{0,199}")


# ---------------------------------------------------------------------------- keeping


class _Source(NamedTuple):
    """A file to be kept: what it will be called, what it is, and which bytes of it are kept."""

    name: str
    file: Stamp
    pieces: tuple[Span, ...]


def keep(checkpoint: Checkpoint, held: Collection[str], directory: str) -> Skeleton:
    """Write the structure of `checkpoint` into `directory`, durably; what was there is removed.

    Args:
        checkpoint: as it was read; a file of it that is another one now raises `InputChanged`.
        held: its tensors whose bytes need not be kept.
        directory: is made, for its owner only.
    """
    index = checkpoint.index
    path, sources = _sources(checkpoint, held)
    folder = os.path.dirname(sources[0].name)
    with storage_errors(directory, "cannot create"):
        durable.remove(directory)
        os.mkdir(directory, 0o700)
        if folder:
            os.mkdir(os.path.join(directory, folder), 0o700)
    files = tuple(_copied(source, directory) for source in sources)
    if folder:
        durable.sync_directory(os.path.join(directory, folder))
    durable.sync_directory(directory)
    roles = {name: role.name for name, role in index.roles.items()}
    return Skeleton(
        path,
        index.format,
        files,
        roles,
        index.roles_from,
        dict(index.full_names),
        checkpoint.key,
    )


def _sources(checkpoint: Checkpoint, held: Collection[str]) -> tuple[str, list[_Source]]:
    """Return the path that the kept checkpoint will have, and the files it will be made of."""
    row = FORMATS[checkpoint.index.format]
    # What a format spills lies in a file that is none of the checkpoint's, made or not.
    files = checkpoint.files[:1] if row.spill is not None else checkpoint.files
    pieces = _kept_pieces(checkpoint, frozenset(held), files)
    if row.kind == "folder":
        return _folder_sources(checkpoint, pieces)
    if row.kind == "file":
        path = os.path.basename(files[0].path)
        return path, [_Source(path, files[0], pieces[0])]
    path = os.path.basename(checkpoint.path) or _UNNAMED
    names = [path + suffix for suffix in checkpoint.index.names]
    return path, [_Source(*one) for one in zip(names, files, pieces, strict=True)]


def _folder_sources(
    checkpoint: Checkpoint, pieces: Sequence[tuple[Span, ...]]
) -> tuple[str, list[_Source]]:
    """Return the shards of a folder, their index, and the files that make the folder load."""
    index_name = os.path.basename(checkpoint.index_file)
    by_index = bool(index_name) and os.path.basename(checkpoint.path) == index_name
    folder = os.path.dirname(checkpoint.path) if by_index else checkpoint.path
    name = os.path.basename(os.path.abspath(folder))
    if not _PLAIN_NAME.fullmatch(name) or name.endswith(".json") or not is_bare(name):
        name = _UNNAMED
    rows = zip(checkpoint.index.names, checkpoint.files, pieces, strict=True)
    sources = [_Source(f"{name}/{shard}", file, kept) for shard, file, kept in rows]
    whole = {beside: os.path.join(folder, beside) for beside in _side_files(folder)}
    if index_name:
        whole[index_name] = checkpoint.index_file
    for beside, path in whole.items():
        file = stamp_of(path)
        sources.append(_Source(f"{name}/{beside}", file, _outside(file.size, (), ())))
    return (f"{name}/{index_name}" if by_index else name), sources


def _side_files(folder: str) -> list[str]:
    try:
        return side_files(folder or ".")
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise InputError(f"{shorten(folder, 1000)}: cannot list: {reason}", PERMISSION) from error


def _kept_pieces(
    checkpoint: Checkpoint, held: Collection[str], files: Sequence[Stamp]
) -> list[tuple[Span, ...]]:
    """Return the pieces of each file that are kept."""
    held_in: dict[int, list[Span]] = defaultdict(list)
    others_in: dict[int, list[Span]] = defaultdict(list)
    for tensor in checkpoint.index.tensors:
        spans = held_in if tensor.name in held and _may_go(tensor) else others_in
        for file, offset, nbytes in tensor.extents:
            spans[file].append((offset, offset + nbytes))
    return [
        _outside(file.size, held_in[ordinal], others_in[ordinal])
        for ordinal, file in enumerate(files)
    ]


def _may_go(tensor: Tensor) -> bool:
    """Whether the elements are all that lies in the tensor's extents, and worth a hole."""
    return tensor.dense and tensor.dtype.bits > 0 and tensor.nbytes > _ALWAYS_KEPT


def _outside(size: int, held: Iterable[Span], others: Iterable[Span]) -> tuple[Span, ...]:
    """Return the pieces of a file outside of what is held, and those that others have as well."""
    kept = [*others]
    end = 0
    for start, stop in _merged(held):
        kept.append((end, start))
        end = stop
    kept.append((end, size))
    return tuple((start, stop - start) for start, stop in _merged(kept))


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Return (start, stop) pairs that hold the same bytes, ascending and apart."""
    found: list[Span] = []
    for start, stop in sorted(spans):
        if start >= stop:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


def _copied(source: _Source, directory: str) -> Kept:
    """Write one file of a skeleton: its pieces, and holes between them."""
    name, file, pieces = source
    path = os.path.join(directory, name)
    fd = open_unchanged(file)
    try:
        with storage_errors(path, "cannot create"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            out = os.open(path, flags, 0o600)
        try:
            with storage_errors(path, "cannot write"):
                os.ftruncate(out, file.size)
            crc = 0
            for offset, part in _parts(fd, file.path, pieces):
                crc = crc32c(part, crc)
                durable.write_exact(out, part, offset, path)
            # An output made of this is known as one that is made of the file itself.
            os.utime(out, ns=(file.mtime_ns, file.mtime_ns))
            durable.sync(out, path)
        finally:
            os.close(out)
        check_unchanged(fd, file)
    finally:
        os.close(fd)
    return Kept(name, file.size, pieces, crc)


def _parts(fd: int, path: str, pieces: Iterable[Span]) -> Iterator[tuple[int, memoryview]]:
    """Yield the bytes of pieces in order, in parts that are valid until the next one."""
    buffer = page_buffer(_BUFFER)
    for stretch in _stretches(pieces):
        start, stop = stretch[0][0], stretch[-1][1]
        read_exact(fd, buffer[: stop - start], start, path)
        for begin, end in stretch:
            yield begin, buffer[begin - start : end - start]


def _stretches(pieces: Iterable[Span]) -> Iterator[list[Span]]:
    """Yield (start, stop) pairs that are read at once: small pieces that lie near each other."""
    stretch: list[Span] = []
    for offset, length in pieces:
        for start in range(offset, offset + length, _BUFFER):
            stop = min(start + _BUFFER, offset + length)
            far = bool(stretch) and start - stretch[-1][1] > _NEAR
            if stretch and (far or stop - stretch[0][0] > _BUFFER):
                yield stretch
                stretch = []
            stretch.append((start, stop))
    if stretch:
        yield stretch


# ---------------------------------------------------------------------------- reading


def read(skeleton: Skeleton, directory: str) -> Checkpoint:
    """Return the checkpoint that the files in `directory` tell of, which are verified first.

    It has no checksums: those of its files are about bytes that are gone.
    Raises `DamagedFile` for what is not as it was kept, `StorageError`.
    """
    verified = _verified(skeleton, directory)
    path = os.path.join(directory, skeleton.path)
    try:
        checkpoint = formats.read_as(skeleton.format, path, {}, skeleton.key)
    except (UsageError, Disagreement) as error:  # about what a user may choose elsewhere
        raise DamagedFile(path, error.message) from None
    index = checkpoint.index
    found = {file for file in checkpoint.files if file.path}
    paths = {file.path for file in verified} | {""}
    if not found <= verified or checkpoint.index_file not in paths:
        raise DamagedFile(path, "expected a checkpoint of the files that were kept")
    if index.format != skeleton.format:
        raise DamagedFile(path, f"expected the format {skeleton.format}, found {index.format}")
    index = dataclasses.replace(
        index,
        roles={name: Role[role] for name, role in skeleton.roles.items()},
        roles_from=skeleton.roles_from,
        full_names=dict(skeleton.full_names),
    )
    return dataclasses.replace(checkpoint, index=index, checksums=None)


def _verified(skeleton: Skeleton, directory: str) -> set[Stamp]:
    """Return the files of a skeleton: all that there is, with the bytes that were kept."""
    try:
        check(skeleton)  # before a name becomes a path
    except Wrong as error:
        raise DamagedFile(directory, str(error)) from None
    folder = os.path.dirname(skeleton.files[0].name)
    inside = os.path.join(directory, folder) if folder else directory
    if folder:
        _check_listing(directory, {folder})
    _check_listing(inside, {os.path.basename(file.name) for file in skeleton.files})
    return {_verified_file(os.path.join(directory, file.name), file) for file in skeleton.files}


def _check_listing(directory: str, expected: Collection[str]) -> None:
    """Raise `DamagedFile` unless a directory, which is no link, holds just the expected names."""
    fd = _opened(directory, os.O_DIRECTORY)
    try:
        found = set(os.listdir(fd))
    finally:
        os.close(fd)
    for name in sorted(found.symmetric_difference(expected)):
        reason = "is none of the files that were kept" if name in found else "is missing"
        raise DamagedFile(os.path.join(directory, name), reason)


def _verified_file(path: str, kept: Kept) -> Stamp:
    fd = _opened(path, os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise DamagedFile(path, "expected a regular file")
        file = stamp(fd, path)
        if file.size != kept.size:
            raise DamagedFile(path, f"expected {kept.size:,} bytes, found {file.size:,}")
        crc = 0
        for _, part in _parts(fd, path, kept.pieces):
            crc = crc32c(part, crc)
    finally:
        os.close(fd)
    if crc != kept.crc:
        raise DamagedFile(
            path, f"expected CRC-32C {kept.crc:#010x} of what was kept, found {crc:#010x}"
        )
    return file


def _opened(path: str, flags: int) -> int:
    """Return a descriptor of what is no link."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        if error.errno in (errno.EIO, errno.EMFILE, errno.ENFILE):
            raise StorageError(f"{shorten(path, 1000)}: cannot open: {reason}") from error
        raise DamagedFile(path, f"cannot open: {reason}") from None
