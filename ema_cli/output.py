"""Outputs on their way: created under a temporary name, filled, sealed, checked, published.

Nothing half-written ever has a final name.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

from ema_cli import destination, durable, provenance
from ema_cli.blueprint import Layout, Patch
from ema_cli.checksums import CRC32C
from ema_cli.errors import EmaError, Locked, StorageError, storage_errors
from ema_cli.formats import FORMATS, Known
from ema_cli.tensors import NO_FILE, Extent
from ema_cli.text import shorten, size


def is_interrupted(layout: Layout) -> bool:
    """Whether there is a log of interrupted work whose first output is this one."""
    return os.path.lexists(durable.beside(layout.path, durable.PROGRESS_SUFFIX))


def forget(layout: Layout) -> None:
    """Remove what a process left that was killed when the output stood already."""
    if is_interrupted(layout):
        with contextlib.suppress(Locked), Unpublished(layout, overwrite=True) as left:
            left.discard()


class Unpublished:
    """One output under its temporary name; a context that leaves nothing behind on failure.

    Entering locks the name and changes nothing of what a killed process left there: either `begin`
    or `go_on` comes next.

    Attributes:
        layout: what it will be.
        paths: its files under their temporary names, in the order of ``layout.files``.
        log: where the log of the work lies that fills this output first.
        left: whether a killed process left something here.
        kept: what is made so far is for another process to go on with; set after an interruption.
        notes: what could not be promised.
    """

    def __init__(self, layout: Layout, *, overwrite: bool) -> None:
        self.layout = layout
        self._overwrite = overwrite
        self.destination = layout.path.rstrip("/")
        self.root = durable.beside(self.destination, durable.TEMPORARY_SUFFIX)
        self.log = durable.beside(self.destination, durable.PROGRESS_SUFFIX)
        # Where a reader finds the output as long as it has no name.
        self._readable = self.root
        if layout.kind == "prefix":
            self._readable = os.path.join(self.root, os.path.basename(self.destination))
        self._files = provenance.files_of(self._readable, [file.name for file in layout.files])
        self.paths = [path for _, path in self._files]
        self.notes = list(layout.notes)
        self.left = False
        self.kept = False
        self._lock = -1
        self._made: list[str] = []
        # CRC-32C for each 64 MiB of the files that the seal made known already.
        self._summed: dict[int, list[int]] = {}
        self._published = False

    def __enter__(self) -> Unpublished:
        parent = os.path.dirname(self.destination)
        with storage_errors(parent or ".", "cannot create"):
            self._made = durable.make_directories(parent or ".")
        # A signal may come at any moment: what was there before is not ours to remove.
        self.left = self.kept = os.path.lexists(self.root) or os.path.lexists(self.log)
        if self.layout.kind == "file":
            self._lock = durable.create_locked(self.root, empty=False)
        else:
            self._lock = durable.create_locked_directory(self.root, empty=False)
        try:
            with storage_errors(self.destination, "cannot repair"):
                self._repair()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self._published and not self.kept:
            durable.remove(self.root)
            durable.remove_empty(self._made)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def discard(self) -> None:
        """Give up what a killed process left; its log goes first, so that nobody believes it."""
        self.kept = False
        if os.path.lexists(self.log):
            with storage_errors(self.log, "cannot remove"):
                os.unlink(self.log)
            durable.sync_directory(os.path.dirname(self.log))

    def _repair(self) -> None:
        """Finish what a killed replacement left, now that the lock says nobody else does."""
        destination.restore(self.layout)
        if not self._overwrite and destination.standing(self.layout):
            # Repaired just now, or published by another process before we had the lock.
            raise destination.exists(shorten(self.destination, 1000))

    def begin(self) -> None:
        """Make the files anew, at their sizes and with what is known of them already."""
        self.discard()
        with storage_errors(self.root, "cannot create"):
            if self.layout.kind == "file":
                os.ftruncate(self._lock, 0)
            else:
                for name in os.listdir(self._lock):
                    os.unlink(name, dir_fd=self._lock)
        self._create(self.layout.nbytes)

    def go_on(self) -> None:
        """Keep what the files hold, but for what is known of them: a seal may have changed it."""
        self._create(self.layout.nbytes - durable.left_bytes(self.destination))

    def _create(self, needed: int) -> None:
        free = durable.free_bytes(os.path.dirname(self.root))
        if needed > free:
            raise StorageError(
                f"{shorten(self.destination, 1000)}: needs {size(needed)}, "
                f"the disk has {size(free)} free",
                "free some space, or write elsewhere with -o",
            )
        for path, file in zip(self.paths, self.layout.files, strict=True):
            fd = self._lock if path == self.root else durable.create_locked(path, empty=False)
            try:
                if os.fstat(fd).st_size > file.nbytes:
                    with storage_errors(path, "cannot truncate"):
                        os.ftruncate(fd, file.nbytes)
                if not durable.reserve(fd, file.nbytes, path):
                    self.notes.append(f"{shorten(path, 1000)}: space could not be reserved")
                for offset, data in file.literals:
                    durable.write_exact(fd, data, offset, path)
            finally:
                if fd != self._lock:
                    os.close(fd)

    def seal(self, executor: Executor) -> list[tuple[int, list[str]]]:
        """Write what only the data decides, check the files and make them durable.

        Returns for each file its size and checksums: one CRC-32C per 64 MiB, as eight hex digits,
        and none of a file copied whole.
        """
        row = FORMATS[self.layout.format]
        if row.seal is not None:
            patches: dict[int, list[Patch]] = defaultdict(list)
            for patch in row.seal(self.layout, self._sums(executor, row.checksum)):
                patches[patch.file].append(patch)
            for ordinal, mine in patches.items():
                self._write(self.paths[ordinal], mine)
                self._summed.pop(ordinal, None)
        sums = [self._checksums(executor, ordinal) for ordinal in range(len(self.paths))]
        self._check_index()
        for path in self.paths:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                durable.sync(fd, path)
            finally:
                os.close(fd)
        if self.layout.kind != "file":
            durable.sync(self._lock, self.root)
        return [(os.path.getsize(path), some) for path, some in zip(self.paths, sums, strict=True)]

    def _write(self, path: str, patches: Sequence[Patch]) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for patch in patches:
                durable.write_exact(fd, patch.data, patch.offset, path)
                if patch.whole:
                    with storage_errors(path, "cannot write"):
                        os.ftruncate(fd, patch.offset + len(patch.data))
        finally:
            os.close(fd)

    def _sums(self, executor: Executor, kind: str) -> dict[Extent, int]:
        """Return the checksum of each extent that the seal needs."""
        wanted: dict[int, list[Extent]] = defaultdict(list)
        for extent in self.layout.sums:
            wanted[extent.file].append(extent)
        found: dict[Extent, int] = {}
        for ordinal, extents in wanted.items():
            path = self.paths[ordinal]
            cut = provenance.cuts(os.path.getsize(path), [extent[1:] for extent in extents])
            summed = self._stretches(executor, path, cut, kind)
            found.update((e, summed.between(e.offset, e.offset + e.nbytes)) for e in extents)
            if kind == CRC32C:
                self._summed[ordinal] = [summed.between(ends[0], ends[-1]) for ends in cut]
        return found

    def _checksums(self, executor: Executor, ordinal: int) -> list[str]:
        """Return the checksums of a file for its provenance."""
        if self.layout.files[ordinal].copy_of and FORMATS[self.layout.format].renamed:
            return []  # of the size of the model, and as good as what it is a copy of
        crcs = self._summed.get(ordinal)
        if crcs is None:
            path = self.paths[ordinal]
            cut = provenance.cuts(os.path.getsize(path))
            crcs = self._stretches(executor, path, cut, CRC32C).crcs
        return [f"{crc:08x}" for crc in crcs]

    def _stretches(
        self, executor: Executor, path: str, cut: Sequence[Sequence[int]], kind: str
    ) -> provenance.Stretches:
        futures = [executor.submit(provenance.checksums, path, ends, kind) for ends in cut]
        crcs = [crc for future in futures for crc in future.result()]
        edges = [end for ends in cut for end in ends[:-1]] + [os.path.getsize(path)]
        return provenance.Stretches(crcs, edges, kind)

    def _check_index(self) -> None:
        """Read the index back, with our reader and with the reference one."""
        row = FORMATS[self.layout.format]
        key = self.layout.last.key if self.layout.template else ""
        written = row.read(self._readable, self._known(), key)
        names = [file.name for file in self.layout.files]
        made = zip(written.index.names, written.files, strict=False)
        order = [names.index(name) if f.path else k for k, (name, f) in enumerate(made)]
        expected = {entry.name: self.layout.places[entry.name] for entry in self.layout.entries}
        for tensor in written.index.tensors:
            moved = tensor
            if tensor.extent.file not in (NO_FILE, order[tensor.extent.file]):
                moved = tensor._replace(
                    extent=tensor.extent._replace(file=order[tensor.extent.file])
                )
            if expected.pop(tensor.name, None) != moved:
                raise EmaError(
                    f"internal error: tensor '{shorten(tensor.name)}' was written elsewhere"
                )
        if expected:
            raise EmaError(f"internal error: tensor '{shorten(min(expected))}' was not written")
        if row.reference_check is not None:
            row.reference_check(self.paths[: len(written.index.names)])

    def _known(self) -> Known:
        """Return the index of a header that was parsed already and must come back unchanged."""
        row = FORMATS[self.layout.format]
        if not self.layout.template or row.known_as is None:
            return {}
        key = row.known_as(self.layout)
        return {} if key is None else {key: self.layout.last.index}

    def publish(self, document: Mapping[str, Any]) -> None:
        """Give the output its name, the point after which it exists, and its provenance too."""
        staged = provenance.stage(self.destination, document)
        try:
            with storage_errors(self.destination, "cannot publish"):
                destination.rename(self.layout, self.root, overwrite=self._overwrite)
        except BaseException:
            provenance.recover(self.destination)  # it may have its name: memory can run out after
            durable.remove(staged)
            raise
        self._published = True
        try:
            # If this fails, the staged document stays: the next run recovers it.
            provenance.publish(staged, self.destination)
            durable.sync_directory(os.path.dirname(self.destination))
        finally:
            durable.remove(destination.aside_of(self.destination))
        if self.layout.kind == "prefix":
            durable.remove(self.root)

    def fingerprint(self) -> str:
        """Return the fingerprint the published output will have."""
        return provenance.fingerprint(self._files)
