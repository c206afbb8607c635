"""Files as the HDF5 library shall see them: a part of an open file, or one in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any


class Window:
    """Part of an open file, as a file: what cannot be read whole is an error, never zeros."""

    def __init__(self, fd: int, offset: int, nbytes: int) -> None:
        self._fd = fd
        self._offset = offset
        self._nbytes = nbytes
        self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to an offset, or with SEEK_END to the end."""
        self._at = self._nbytes + offset if whence == os.SEEK_END else offset
        return self._at

    def tell(self) -> int:
        """Return the offset."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with the bytes from here on."""
        view = memoryview(buffer)
        done = 0
        if self._at + len(view) > self._nbytes:
            raise OSError("it refers to bytes beyond its end")
        while done < len(view):
            got = os.preadv(self._fd, [view[done:]], self._offset + self._at + done)
            if got == 0:
                raise OSError("it was truncated while it was read")
            done += got
        self._at += done
        return done

    def flush(self) -> None:
        """There is nothing to write."""


class Sheet:
    """A file that only exists as the pages that were written to it."""

    PAGE = 4096

    def __init__(self) -> None:
        self.nbytes = 0
        self._pages: dict[int, bytearray] = {}
        self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to an offset, or with SEEK_END to the end."""
        self._at = self.nbytes + offset if whence == os.SEEK_END else offset
        return self._at

    def tell(self) -> int:
        """Return the offset."""
        return self._at

    def _parts(self, n_bytes: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (page, offset in it, offset in the buffer, bytes)."""
        done = 0
        while done < n_bytes:
            page, inside = divmod(self._at + done, self.PAGE)
            count = min(self.PAGE - inside, n_bytes - done)
            yield page, inside, done, count
            done += count

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; what was never written is zero."""
        view = memoryview(buffer)
        empty = bytes(self.PAGE)
        for page, inside, done, count in self._parts(len(view)):
            view[done : done + count] = self._pages.get(page, empty)[inside : inside + count]
        self._at += len(view)
        return len(view)

    def write(self, data: Any) -> int:
        """Keep the bytes."""
        view = memoryview(data)
        for page, inside, done, count in self._parts(len(view)):
            kept = self._pages.setdefault(page, bytearray(self.PAGE))
            kept[inside : inside + count] = view[done : done + count]
        self._at += len(view)
        self.nbytes = max(self.nbytes, self._at)
        return len(view)

    def truncate(self, n_bytes: int) -> None:
        """Make it so long."""
        self.nbytes = n_bytes

    def flush(self) -> None:
        """There is nothing else to do."""

    def outside(self, extents: list[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of what was written outside of (offset, nbytes) `extents`."""
        edges = iter(sorted((offset, offset + n_bytes) for offset, n_bytes in extents if n_bytes))
        start, end = next(edges, (self.nbytes, self.nbytes + 1))
        for first, run in self._runs():
            at, stop = first, min(first + len(run), self.nbytes)
            while at < stop:
                while end <= at:
                    start, end = next(edges, (self.nbytes, self.nbytes + 1))
                if start > at:
                    until = min(start, stop)
                    yield at, bytes(run[at - first : until - first])
                    at = until
                else:
                    at = end

    def _runs(self) -> Iterator[tuple[int, bytearray]]:
        """Yield (offset, bytes) of pages that follow each other."""
        run = bytearray()
        first = 0
        for page in sorted(self._pages):
            if run and first + len(run) != page * self.PAGE:
                yield first, run
                run = bytearray()
            first = first if run else page * self.PAGE
            run += self._pages[page]
        if run:
            yield first, run
