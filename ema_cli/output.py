"""Outputs on their way: created under a temporary name, filled, sealed, checked, published.

Nothing half-written ever has a final name. A single file is published by one rename; a folder is
renamed whole, and with ``--overwrite`` the old one waits beside it until the new one stands.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from typing import Any

from ema_cli import durable, provenance
from ema_cli.errors import EmaError, OutputExists, StorageError, storage_errors
from ema_cli.formats import FORMATS, Known, safetensors, sharded
from ema_cli.layout import Layout
from ema_cli.tensors import Stamp
from ema_cli.text import shorten, size

# ---------------------------------------------------------------------------- before the work


def check_destination(layout: Layout, inputs: Iterable[Stamp], *, overwrite: bool) -> None:
    """Raise `OutputExists` unless the output may be written.

    An output that is one of the inputs, or holds one, is refused whatever `overwrite` says; an
    existing one is refused without it. A folder is only replaced when it looks like a checkpoint.
    """
    path = layout.path.rstrip("/")
    shown = shorten(path, 1000)
    _refuse_inputs(path, shown, inputs)
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"{shown}: {os.strerror(error.errno or 0)}") from error
    if stat.S_ISDIR(mode) and not layout.folder:
        raise OutputExists(
            f"{shown}: expected the name of a new file, found a directory",
            f"-o {os.path.join(shown, 'average' + FORMATS[layout.format].suffix)}",
        )
    if not overwrite:
        raise _exists(shown)
    if layout.folder:
        _check_replaceable(path)
    elif not stat.S_ISREG(mode):
        raise OutputExists(f"{shown}: only a regular file can be replaced")


def _exists(shown: str) -> OutputExists:
    return OutputExists(f"{shown}: exists already", "replace it with --overwrite")


def _refuse_inputs(path: str, shown: str, inputs: Iterable[Stamp]) -> None:
    real, exists = os.path.realpath(path), os.path.exists(path)
    for stamp in inputs:
        source = os.path.realpath(stamp.path)
        if (
            source == real
            or source.startswith(real + os.sep)
            or (exists and _same_file(path, stamp))
        ):
            raise OutputExists(
                f"{shown}: is an input, or holds one: {shorten(stamp.path, 1000)}",
                "write to another name with -o",
            )


def _same_file(path: str, stamp: Stamp) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(path, stamp.path)
    return False


def _check_replaceable(path: str) -> None:
    """A folder is deleted when it is replaced: never one that may hold something else."""
    shown = shorten(path, 1000)
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise OutputExists(f"{shown}: expected a folder to replace, found a file")
    with os.scandir(path) as listing:
        entries = list(listing)
    indexes, weights = sharded.contents(path)
    own = {*indexes, *weights, *sharded.side_files(path)}
    foreign = next(
        (e.name for e in entries if e.name not in own or not e.is_file(follow_symlinks=False)), None
    )
    if entries and (foreign is not None or not sharded.is_checkpoint(path)):
        what = f"it holds '{shorten(foreign)}'" if foreign else "it holds no checkpoint"
        raise OutputExists(
            f"{shown}: only a folder with nothing but a checkpoint is replaced, and {what}",
            "write to another name with -o, or remove the folder yourself",
        )


# ---------------------------------------------------------------------------- the work


def repair(layout: Layout) -> None:
    """Put back the folder that a killed replacement of this output had moved aside."""
    destination = layout.path.rstrip("/")
    aside = durable.beside(destination, durable.ASIDE_SUFFIX)
    if not os.path.lexists(aside):
        return
    root = durable.beside(destination, durable.TEMPORARY_SUFFIX)
    lock = durable.create_locked_directory(root)
    try:
        with storage_errors(destination, "cannot repair"):
            _restore(aside, destination)
    finally:
        durable.remove(root)
        os.close(lock)


def _restore(aside: str, destination: str) -> None:
    if os.path.lexists(aside):
        if os.path.lexists(destination):
            durable.remove(aside)
        else:
            os.rename(aside, destination)


class Unpublished:
    """One output under its temporary name; a context that leaves nothing behind on failure.

    Attributes:
        layout: what it will be.
        paths: its files under their temporary names, in the order of ``layout.files``.
        notes: what could not be promised.
    """

    def __init__(self, layout: Layout, *, overwrite: bool) -> None:
        self.layout = layout
        self._overwrite = overwrite
        self.destination = layout.path.rstrip("/")
        self.root = durable.beside(self.destination, durable.TEMPORARY_SUFFIX)
        self._files = provenance.files_of(self.root, [file.name for file in layout.files])
        self.paths = [path for _, path in self._files]
        self.notes: list[str] = []
        self._aside = durable.beside(self.destination, durable.ASIDE_SUFFIX)
        self._lock = -1
        self._published = False

    def __enter__(self) -> Unpublished:
        parent = os.path.dirname(self.destination)
        with storage_errors(parent or ".", "cannot create"):
            os.makedirs(parent or ".", exist_ok=True)
        if self.layout.folder:
            self._lock = durable.create_locked_directory(self.root)
        else:
            self._lock = durable.create_locked(self.root)
        try:
            with storage_errors(self.destination, "cannot repair"):
                self._repair()
            self._create()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self._published:
            durable.remove(self.root)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _repair(self) -> None:
        """Finish what a killed replacement left: the old folder under its waiting name."""
        _restore(self._aside, self.destination)
        if not self._overwrite and os.path.lexists(self.destination):
            # Repaired just now, or published by another process before we had the lock.
            raise _exists(shorten(self.destination, 1000))

    def _create(self) -> None:
        needed, free = self.layout.nbytes, durable.free_bytes(os.path.dirname(self.root))
        if needed > free:
            raise StorageError(
                f"{shorten(self.destination, 1000)}: needs {size(needed)}, "
                f"the disk has {size(free)} free",
                "free some space, or write elsewhere with -o",
            )
        for path, file in zip(self.paths, self.layout.files, strict=True):
            fd = self._lock if path == self.root else durable.create_locked(path)
            try:
                if not durable.reserve(fd, file.nbytes, path):
                    self.notes.append(f"{shorten(path, 1000)}: space could not be reserved")
                for offset, data in file.literals:
                    durable.write_exact(fd, data, offset, path)
            finally:
                if fd != self._lock:
                    os.close(fd)

    def seal(self, executor: Executor) -> list[list[str]]:
        """Check the finished files and make them durable; returns their checksums.

        One CRC-32C per 64 MiB of each file, as eight hex digits.
        """
        checksums = [_checksums(executor, path) for path in self.paths]
        self._check_index()
        for path in self.paths:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                durable.sync(fd, path)
            finally:
                os.close(fd)
        if self.layout.folder:
            durable.sync(self._lock, self.root)
        return checksums

    def _check_index(self) -> None:
        """Read the index back, with our reader and with the reference one."""
        written = FORMATS[self.layout.format].read(self.root, self._known())
        found = {t.name: (t.dtype, t.shape, t.extent) for t in written.index.tensors}
        names = [file.name for file in self.layout.files]
        order = [names.index(name) for name in written.index.names]
        expected = {
            e.name: (e.dtype, e.shape, self.layout.places[e.name]) for e in self.layout.entries
        }
        for name, (dtype, shape, extent) in found.items():
            place = extent._replace(file=order[extent.file])
            if expected.pop(name, None) != (dtype, shape, place):
                raise EmaError(f"internal error: tensor '{shorten(name)}' was written elsewhere")
        if expected:
            raise EmaError(f"internal error: tensor '{shorten(min(expected))}' was not written")
        _reference_check(path for path in self.paths if _is_weights(path, self.root))

    def _known(self) -> Known:
        """Return the index of a header that was parsed already and must come back unchanged."""
        like = self.layout.like
        if like is None or self.layout.folder:
            return {}
        key = safetensors.known_as(like.header_digests[0], self.layout.files[0].nbytes)
        return {key: like}

    def publish(self, document: Mapping[str, Any]) -> None:
        """Give the output its name, the point after which it exists, and its provenance too."""
        staged = provenance.stage(self.destination, document)
        try:
            with storage_errors(self.destination, "cannot publish"):
                self._rename()
        except BaseException:
            durable.remove(staged)
            raise
        self._published = True
        try:
            # If this fails, the staged document stays: the next run recovers it.
            provenance.publish(staged, self.destination)
            durable.sync_directory(os.path.dirname(self.destination))
        finally:
            durable.remove(self._aside)

    def _rename(self) -> None:
        if not self._overwrite:
            try:
                durable.rename_new(self.root, self.destination)
            except FileExistsError:  # it appeared while we worked
                raise _exists(shorten(self.destination, 1000)) from None
            return
        if not self.layout.folder or not os.path.lexists(self.destination):
            os.replace(self.root, self.destination)
            return
        _check_replaceable(self.destination)  # again: something may have been put there
        os.rename(self.destination, self._aside)
        try:
            os.rename(self.root, self.destination)
        except BaseException:
            os.rename(self._aside, self.destination)
            raise

    def fingerprint(self) -> str:
        """Return the fingerprint the published output will have."""
        return provenance.fingerprint(self._files)


def _is_weights(path: str, root: str) -> bool:
    return path == root or path.endswith(safetensors.SUFFIX)


def _reference_check(paths: Iterable[str]) -> None:
    """Open each file with the safetensors library: whoever loads it will do the same."""
    from safetensors import SafetensorError, safe_open

    for path in paths:
        try:
            with safe_open(path, framework="np") as reader:
                reader.keys()
        except SafetensorError as error:
            raise EmaError(
                f"internal error: the safetensors library refuses what was written: {error}"
            ) from error


def _checksums(executor: Executor, path: str) -> list[str]:
    parts = provenance.checksum_parts(path, os.path.getsize(path))
    futures = [executor.submit(provenance.checksum, part) for part in parts]
    return [f"{future.result():08x}" for future in futures]
