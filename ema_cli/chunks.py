"""What was written to files, as contributions to the checksum of each chunk of them.

Tasks write to many places in any order. The contributions of all that was ever written to a chunk,
combined by exclusive or, are its CRC-32C, whoever wrote what and when (`checksums`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ema_cli.blueprint import CHUNK_BYTES
from ema_cli.checksums import crc32c, shift, shift_all

# Stretches that wait for their places to be counted in, which is cheap for many at once only.
_WAITING = 1 << 14
# From how many on NumPy is faster, whose calls take a millisecond in all.
_MANY = 32

# (file, chunk) and what was written there, as part of the bytes up to the end of the chunk.
Made = dict[tuple[int, int], int]


class Chunks:
    """Sums up what is written; stretches that follow each other in a chunk are summed as one.

    Args:
        size_of: returns the size of a file; the last chunk ends there.
    """

    def __init__(self, size_of: Callable[[int], int]) -> None:
        self._size_of = size_of
        self._made: Made = {}
        # For each chunk the stretch that may go on: its checksum so far, and where it ends.
        self._open: dict[tuple[int, int], tuple[int, int]] = {}
        self._waiting: list[tuple[tuple[int, int], int, int]] = []

    def add(self, file: int, offset: int, data: memoryview) -> None:
        """Count the bytes in that are written at `offset` of a file."""
        done = 0
        while done < len(data):
            chunk, inside = divmod(offset + done, CHUNK_BYTES)
            part = data[done : done + CHUNK_BYTES - inside]
            self._add((file, chunk), offset + done, part)
            done += len(part)

    def _add(self, key: tuple[int, int], offset: int, part: memoryview) -> None:
        crc, end = self._open.get(key, (0, offset))
        if end != offset:
            self._waiting.append((key, crc, end))
            if len(self._waiting) >= _WAITING:
                self._count()
            crc = 0
        self._open[key] = crc32c(part, crc), offset + len(part)

    def made(self) -> Made:
        """Return the contributions of all that was added."""
        self._waiting.extend((key, crc, end) for key, (crc, end) in self._open.items())
        self._open.clear()
        self._count()
        return self._made

    def _count(self) -> None:
        ends = {key: self._end(*key) for key, _, _ in self._waiting}
        crcs = [crc for _, crc, _ in self._waiting]
        after = [ends[key] - end for key, _, end in self._waiting]
        if len(crcs) < _MANY:
            shifted = [shift(crc, n_bytes) for crc, n_bytes in zip(crcs, after, strict=True)]
        else:
            shifted = shift_all(np.array(crcs, np.uint32), np.array(after, np.int64)).tolist()
        for (key, _, _), crc in zip(self._waiting, shifted, strict=True):
            self._made[key] = self._made.get(key, 0) ^ crc
        self._waiting.clear()

    def _end(self, file: int, chunk: int) -> int:
        return min((chunk + 1) * CHUNK_BYTES, self._size_of(file))
