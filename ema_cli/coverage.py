"""Sees to it that all of what is averaged or copied is verified, by reading it only once.

Where each tensor has a checksum of its own, the bytes of a range, or the piece of a partitioned
variable, are verified as they are read. Where a format keeps one for each member of a container,
all of a member has to be read: what no range or copy reads of one that is needed is read besides.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Iterator, Sequence

from ema_cli.ranges import Copy, Place, Range, Span
from ema_cli.tensors import DTYPES, Checkpoint, Extent, Index


def cover(
    ranges: Sequence[Range],
    copies: Iterable[Copy],
    file_copies: Iterable[Copy],
    checkpoints: Sequence[Checkpoint],
    indexes: Sequence[Index],
    index_of: Sequence[int],
    first_input: Sequence[int],
    mixed: Collection[int],
) -> tuple[list[Range], list[Copy]]:
    """Return the ranges and copies with the bytes each is verified with, and further copies.

    Args:
        ranges: to average.
        copies: of tensors.
        file_copies: of files, but for what else is written there.
        checkpoints: that may be read.
        indexes: the distinct ones that are mixed.
        index_of: for each checkpoint which of `indexes` it has, or -1.
        first_input: for each checkpoint the ordinal of its first file among the inputs, or -1.
        mixed: the checkpoints of which the ranges are read; others are copied from only.
    """
    records = [_Records(index) for index in indexes]
    covered = [
        one._replace(
            places=tuple(
                _verified(read, place, _nbytes(one, place), group)
                for read, place in zip(records, one.places, strict=True)
            )
        )
        for group, one in enumerate(ranges)
    ]
    sources = _Sources(checkpoints, records, index_of, first_input, mixed)
    return covered, [*sources.verified(copies), *sources.of_files(file_copies), *sources.rest()]


def _nbytes(one: Range, place: Place) -> int:
    return one.elements * DTYPES[place.dtype].bits // 8


class _Sources:
    """The checkpoints that are read, and what is copied of each."""

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        records: Sequence[_Records],
        index_of: Sequence[int],
        first_input: Sequence[int],
        mixed: Collection[int],
    ) -> None:
        self._checkpoints = checkpoints
        self._first_input = first_input
        self._used = [k for k, first in enumerate(first_input) if first >= 0]
        self._firsts = [first_input[k] for k in self._used]
        # What is read of a checkpoint: the ranges of its index, shared by all that have it.
        self._shared = {k: records[index_of[k]] for k in self._used if k in mixed}
        # And copies of its own, of those few that are copied from.
        self._own: dict[int, _Records] = {}

    def _read(self, k: int) -> _Records:
        """Return what is read of a checkpoint that is copied from."""
        if k not in self._own:
            shared = self._shared.get(k)
            index = self._checkpoints[k].index
            self._own[k] = _Records(index) if shared is None else shared.copied()
        return self._own[k]

    def verified(self, copies: Iterable[Copy]) -> Iterator[Copy]:
        """Yield copies of tensors, each with the bytes it is verified with."""
        for group, copy in enumerate(copies):
            k, first = self._source(copy)
            if self._checkpoints[k].checksums is None:
                yield copy
                continue
            inside = copy._replace(place=copy.place._replace(file=copy.place.file - first))
            for part in self._read(k).cut(inside):
                place = _verified(self._read(k), part.place, part.nbytes, -1 - group)
                yield part._replace(place=place._replace(file=copy.place.file))

    def of_files(self, copies: Iterable[Copy]) -> Iterator[Copy]:
        """Yield copies of files, which are verified only where records tell what they hold."""
        for copy in copies:
            k, first = self._source(copy)
            mine = copy.place.file - first < len(self._checkpoints[k].files)
            if mine and not self._read(k).is_empty:
                yield from self.verified([copy])
            else:
                yield copy

    def rest(self) -> Iterator[Copy]:
        """Yield what has to be read besides, to verify what is read."""
        for k in self._used:
            if self._checkpoints[k].checksums is not None:
                read = self._own.get(k) or self._shared.get(k)
                for (file, start, n_bytes), unit in read.unread() if read else ():
                    place = Place(self._first_input[k] + file, start, None, unit)
                    yield Copy(n_bytes, place, ())

    def _source(self, copy: Copy) -> tuple[int, int]:
        """Return the checkpoint a copy is of, and the ordinal of its first file."""
        at = bisect.bisect_right(self._firsts, copy.place.file) - 1
        return self._used[at], self._firsts[at]


def _verified(records: _Records, place: Place, n_bytes: int, group: int) -> Place:
    """Return the place with the bytes it is verified with; what was read before is not again."""
    if records.is_empty:
        own = Span(group, place.offset, place.offset + n_bytes)
        return place if place.unit else place._replace(unit=own)
    return place._replace(unit=records.claim(place, n_bytes))


class _Records:
    """The records of an index, and which bytes of them are read so far; each counts once."""

    def __init__(self, index: Index) -> None:
        self._records = sorted(record for record in index.records if record.nbytes)
        self._read: dict[int, list[tuple[int, int]]] = {}
        self.is_empty = not index.records

    def copied(self) -> _Records:
        """Return another one, to go on from what is read so far."""
        other = object.__new__(_Records)
        other._records, other.is_empty = self._records, self.is_empty
        other._read = {k: list(read) for k, read in self._read.items()}
        return other

    def _find(self, file: int, offset: int) -> int:
        """Return the ordinal of the last record that begins at or before a byte, or -1."""
        return bisect.bisect_right(self._records, Extent(file, offset, 1 << 63)) - 1

    def claim(self, place: Place, n_bytes: int) -> Span | None:
        """Return the record that bytes are read of, or None when they are not to be counted."""
        k = self._find(place.file, place.offset)
        if k < 0 or self._records[k].file != place.file:
            return None
        _, start, length = self._records[k]
        if place.offset >= start + length:
            return None
        read = self._read.setdefault(k, [])
        begin, end = place.offset, place.offset + n_bytes
        at = bisect.bisect_left(read, (begin, end))
        before = at and read[at - 1][1] > begin
        if place.grid or before or (at < len(read) and read[at][0] < end):
            return None  # scattered, or read twice: `unread` counts it
        read.insert(at, (begin, end))
        return Span(0, start, start + length)

    def cut(self, copy: Copy) -> Iterator[Copy]:
        """Yield the parts of a copy: each within one record or outside all."""
        if self.is_empty or copy.place.grid:
            yield copy
            return
        start, end = copy.place.offset, copy.place.offset + copy.nbytes
        while start < end:
            stop = min(end, self._next_edge(copy.place.file, start))
            yield _part(copy, start, stop)
            start = stop

    def _next_edge(self, file: int, offset: int) -> int:
        k = self._find(file, offset)
        if k >= 0 and self._records[k].file == file:
            stop = self._records[k].offset + self._records[k].nbytes
            if offset < stop:
                return stop
        following = self._records[k + 1 : k + 2]
        return following[0].offset if following and following[0].file == file else 1 << 63

    def unread(self) -> Iterator[tuple[Extent, Span]]:
        """Yield what no range or copy reads of the records that one of them reads of."""
        for k, read in self._read.items():
            file, start, n_bytes = self._records[k]
            unit = Span(0, start, start + n_bytes)
            at = start
            for begin, end in [*read, (start + n_bytes, start + n_bytes)]:
                if at < begin:
                    yield Extent(file, at, begin - at), unit
                at = max(at, end)


def _part(copy: Copy, start: int, stop: int) -> Copy:
    skipped = start - copy.place.offset
    return Copy(
        stop - start,
        copy.place._replace(offset=start),
        tuple(target._replace(offset=target.offset + skipped) for target in copy.targets),
    )
