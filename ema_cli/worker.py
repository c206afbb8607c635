"""Works on the pieces of a task: each checkpoint's block in turn, the accumulators in cache."""

from __future__ import annotations

import errno
import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ema_cli import gathering, kernel
from ema_cli.blueprint import BIASED, COPY
from ema_cli.checksums import CRC32C, Running
from ema_cli.chunks import Chunks
from ema_cli.durable import start_writing, write_exact
from ema_cli.errors import storage_errors
from ema_cli.files import Handles, open_unchanged, page_buffer, read_exact
from ema_cli.measuring import Sums
from ema_cli.ranges import Target
from ema_cli.regions import stretches
from ema_cli.tasks import Accumulator, Cloned, Done, Flaw, Part, Piece, Source, Task, Unit
from ema_cli.tensors import NumpyDType, numpy_dtype

COPY_BLOCK = 1 << 20
Update = Callable[[kernel.Array, kernel.Array, Any, kernel.Array], None]
# What copy_file_range(2) answers where the kernel cannot copy between these two files.
_CANNOT_COPY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def run_task(task: Task) -> Done:
    """Work on all pieces of a task; running it again writes the same bytes again."""
    read = written = 0
    with (
        Handles(lambda k: open_unchanged(task.inputs[k]), task.handles) as inputs,
        Handles(lambda k: _open_output(task.outputs[k]), task.handles) as outputs,
    ):
        work = Worker(task, inputs, outputs)
        for work.ordinal, piece in enumerate(task.pieces):
            method = work.copy if piece.shadow == COPY else work.average
            more_read, more_written, flaw = method(piece)
            read, written = read + more_read, written + more_written
            if flaw is not None:
                break
        made, cloned = work.made.made(), tuple(work.cloned)
        return Done(read, written, work.parts, made, flaw, cloned, work.sums.made)


def _open_output(path: str) -> int:
    with storage_errors(path, "cannot open"):
        return os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def size_of(path: str) -> int:
    """Return the size of an output file, which has its final one from the beginning."""
    with storage_errors(path, "cannot open"):
        return os.stat(path, follow_symlinks=False).st_size


class Worker:
    """The open files of a task, and the checksums of what is read from and written to them."""

    def __init__(self, task: Task, inputs: Handles, outputs: Handles) -> None:
        self.task = task
        self.inputs = inputs
        self.outputs = outputs
        self.parts: dict[Unit, Part] = {}
        self.made = Chunks(functools.cache(lambda file: size_of(task.outputs[file])))
        self.cloned: list[Cloned] = []
        self.sums = Sums(_reused)
        self.ordinal = 0  # of the piece at hand

    def copy(self, piece: Piece) -> tuple[int, int, None]:
        """Copy one piece; returns the bytes read and written."""
        source, targets = piece.sources[0], piece.accumulators[0].targets
        seen = self.task.summed or not _as_it_lies(source, targets)
        if not seen and self._clone(piece, source, targets[0]):
            self.cloned.append(Cloned(self.ordinal, targets[0].file))
            return piece.elements, piece.elements, None
        buffer = _reused("copy", np.dtype(np.uint8), min(COPY_BLOCK, piece.elements))
        running = Running(source.checksum or CRC32C)
        written = 0
        for start in range(0, piece.elements, COPY_BLOCK):
            block = buffer[: min(COPY_BLOCK, piece.elements - start)]
            self.fetch(source, piece, start, block, running)
            for target in targets:
                self.put(target, piece, start, block)
                written += len(block)
        self.count(source, running)
        return piece.elements, written, None

    def _clone(self, piece: Piece, source: Source, target: Target) -> bool:
        """Let the kernel copy, or share, the bytes of a piece; False when it cannot."""
        done = 0
        while done < piece.elements:
            fds = self.inputs.fd(source.file), self.outputs.fd(target.file)
            places = [one.offset + piece.start + done for one in (source, target)]
            try:
                got = os.copy_file_range(*fds, piece.elements - done, *places)
            except OSError as error:
                if error.errno in _CANNOT_COPY:
                    return False
                with storage_errors(self.task.outputs[target.file], "cannot copy"):
                    raise
            if got == 0:
                return False  # truncated: reading says so
            done += got
        return True

    def average(self, piece: Piece) -> tuple[int, int, Flaw | None]:
        """Average one piece block by block; returns the bytes read and written."""
        block = min(self.task.block, piece.elements)
        sums = self.sums if piece.segments else None
        buffers = _Buffers(piece, block, self.task.like, sums)
        read = written = 0
        with kernel.quiet():
            for start in range(0, piece.elements, block):
                count = min(block, piece.elements - start)
                if sums is not None:
                    sums.begin(piece, start, count)
                read += self._mix(piece, buffers, start, count)
                for ordinal, accumulator in enumerate(piece.accumulators):
                    if sums is not None:
                        sums.finish(accumulator, buffers.shadows[ordinal][:count])
                    for target in accumulator.targets:
                        out = buffers.finished(ordinal, accumulator, target, count)
                        bad = kernel.first_non_finite(out) if self.task.check else None
                        if bad is not None:
                            return read, written, Flaw(piece, ordinal, start + bad, target.dtype)
                        self.put(target, piece, start, out)
                        written += out.nbytes
        for source, _, _, running in buffers.steps.values():
            self.count(source, running)
        return read, written, None

    def _mix(self, piece: Piece, buffers: _Buffers, start: int, count: int) -> int:
        """Pass the checkpoints through one block; returns the bytes read.

        Between any two of these calls another thread may hold the interpreter: few calls on large
        blocks are what makes several threads pay.
        """
        read = 0
        shadows = [shadow[:count] for shadow in buffers.shadows]
        value, scratch = buffers.value[:count], buffers.scratch[:count]
        alone = len(shadows) == 1
        for ordinal in buffers.from_zero:
            shadows[ordinal].fill(0)
        for k, (source, buffer, mixed, running) in buffers.steps.items():
            # A single average that is copied is read, or widened, straight into its accumulator.
            into = shadows[0] if alone and mixed[0][1] == 1 else value
            raw = into if buffer.dtype == value.dtype else buffer[:count]
            self.fetch(source, piece, start, raw, running)
            read += raw.nbytes
            if raw is not into:
                kernel.widen(raw, into)
            if into is not value:
                continue
            for ordinal, c in mixed:
                spare = value if alone else scratch
                if buffers.sums is not None:
                    buffers.sums.turn(piece.accumulators[ordinal].schedule, k)
                buffers.updates[ordinal](shadows[ordinal], value, c, spare)
        return read

    def fetch(
        self, source: Source, piece: Piece, start: int, block: kernel.Array, running: Running
    ) -> None:
        """Fill `block` with the elements of a source from `start` on, in little-endian order."""
        fd, path = self.inputs.fd(source.file), self.task.inputs[source.file].path
        view, width, done = block.view(np.uint8).data, block.itemsize, 0
        first = piece.start + start
        if source.grid and source.unit is None and gathering.is_scattered(source.grid, width):

            def read(part: memoryview, offset: int) -> None:
                read_exact(fd, part, offset, path)

            gathering.fetch(source.grid, source.offset, first, block, read)
        else:
            for offset, n in stretches(source.offset, source.grid, width, first, len(block)):
                part = view[done : done + n * width]
                read_exact(fd, part, offset, path)
                if source.unit is not None:
                    running.add(offset, part)
                done += n * width
        if source.swap:
            block.view(f"u{source.swap}").byteswap(inplace=True)

    def put(self, target: Target, piece: Piece, start: int, block: kernel.Array) -> None:
        """Write a block to where a target has the elements of a piece from `start` on."""
        fd, path = self.outputs.fd(target.file), self.task.outputs[target.file]
        if target.swap:
            block = block.view(f"u{target.swap}").byteswap().view(block.dtype)

        def write(part: memoryview, offset: int) -> None:
            write_exact(fd, part, offset, path)
            self.made.add(target.file, offset, part)
            if target.grid is None:
                start_writing(fd, offset, len(part))

        place(target, piece.start + start, block, write)

    def count(self, source: Source, running: Running) -> None:
        """Add what was read of a source to the checksum of its unit."""
        if source.unit is not None:
            unit = Unit(source.file, *source.unit)
            crc, n_bytes = self.parts.get(unit, (0, 0))
            crc ^= running.contribution(unit.end)
            self.parts[unit] = Part(crc, n_bytes + running.nbytes)


def place(
    target: Target, first: int, block: kernel.Array, move: Callable[[memoryview, int], None]
) -> None:
    """Call `move` with each part of a block and the offset where a target has it.

    The block holds the elements of the target's range from `first` on.
    """
    if target.grid and gathering.is_scattered(target.grid, block.itemsize):
        gathering.put(target.grid, target.offset, first, block, move)
        return
    view, width, done = block.view(np.uint8).data, block.itemsize, 0
    for offset, n in stretches(target.offset, target.grid, width, first, len(block)):
        move(view[done : done + n * width], offset)
        done += n * width


_KEPT = threading.local()


def _reused(purpose: str, dtype: NumpyDType, elements: int) -> kernel.Array:
    """Return this thread's array for one purpose, kept from task to task.

    Memory the kernel gives anew is cleared page by page, which costs as much as averaging in it.
    """
    n_bytes = elements * dtype.itemsize
    kept: kernel.Array | None = getattr(_KEPT, purpose, None)
    if kept is None or len(kept) < n_bytes:
        kept = np.frombuffer(page_buffer(n_bytes), np.uint8)
        setattr(_KEPT, purpose, kept)
    return kept[:n_bytes].view(dtype)


def _as_it_lies(source: Source, targets: Sequence[Target]) -> bool:
    """Whether a copy only moves bytes from one place to another, unseen."""
    if source.unit is not None or source.grid is not None or len(targets) != 1:
        return False
    return targets[0].grid is None and not targets[0].swap


def _uncast(c: float, dtype: str) -> float:
    del dtype
    return c


def _measured(update: Update, like: str, shadow: str, sums: Sums) -> Update:
    """Return an update that adds to the sums of squares what it changes a shadow by.

    A half type has too few bits to tell the difference, and other frameworks form another one.
    """
    if like == "tensorflow" and numpy_dtype(shadow).itemsize > 2:
        return functools.partial(kernel.update, seen=sums.add)

    def measured(shadow: kernel.Array, value: kernel.Array, c: Any, spare: kernel.Array) -> None:
        if c != 1:
            sums.add_difference(shadow, value)
        update(shadow, value, c, spare)

    return measured


def _update(like: str, accumulator: Accumulator) -> Update:
    """Return the arithmetic of a framework, as `kernel.update`: a coefficient of 1 copies."""
    if like == "tensorflow":
        return kernel.update
    from ema_cli import likeness

    decay = accumulator.decay

    def update(shadow: kernel.Array, value: kernel.Array, c: Any, spare: kernel.Array) -> None:
        del spare
        scratch = _reused("likeness", np.dtype(np.float64), likeness.SCRATCH)
        if c == 1:
            np.copyto(shadow, value)
        elif decay is None:  # the mean, whose coefficient is 1 / count
            likeness.update_torch_mean(shadow, value, round(1 / c), scratch)
        elif like == "torch":
            likeness.update_torch(shadow, value, c, scratch)
        else:
            likeness.update_keras(shadow, value, decay, scratch)

    return update


class _Buffers:
    """The arrays a worker reuses for all blocks of a piece, and what it does with each source.

    Attributes:
        shadows: the accumulators.
        updates: for each accumulator, what mixes a value in.
        sums: of squares, where the piece is measured.
        steps: for each source that counts, by its ordinal: its dtype's read buffer, the
            (accumulator, coefficient) pairs it is mixed in with, and the checksum of what was read.
    """

    def __init__(self, piece: Piece, block: int, like: str, sums: Sums | None) -> None:
        self.sums = sums
        shadow = numpy_dtype(piece.shadow)
        raw = {
            dtype: _reused(f"raw {dtype}", numpy_dtype(dtype), block)
            for dtype in {source.dtype for source in piece.sources}
        }
        self.value = _reused("value", shadow, block)
        self.scratch = _reused("scratch", shadow, block)
        self.shadows = [
            _reused(f"shadow {k}", shadow, block) for k in range(len(piece.accumulators))
        ]
        self.updates = [_update(like, accumulator) for accumulator in piece.accumulators]
        if sums is not None:
            self.updates = [_measured(one, like, piece.shadow, sums) for one in self.updates]
        # The other frameworks' own arithmetic casts where they do.
        cast = kernel.cast_coefficient if like == "tensorflow" else _uncast
        self.steps: dict[int, tuple[Source, kernel.Array, list[tuple[int, Any]], Running]] = {}
        for k, source in enumerate(piece.sources):
            coefficients = [
                (ordinal, cast(accumulator.coefficients[k], piece.shadow))
                for ordinal, accumulator in enumerate(piece.accumulators)
            ]
            mixed = [(ordinal, c) for ordinal, c in coefficients if c != 0]
            if mixed:
                running = Running(source.checksum or CRC32C)
                self.steps[k] = (source, raw[source.dtype], mixed, running)
        copied_first = {
            ordinal
            for ordinal, accumulator in enumerate(piece.accumulators)
            if next((c for c in accumulator.coefficients if c), 0) == 1
        }
        self.from_zero = [k for k in range(len(self.shadows)) if k not in copied_first]
        self._out: dict[str, Any] = {}

    def finished(
        self, ordinal: int, accumulator: Accumulator, target: Target, count: int
    ) -> kernel.Array:
        """Return the result for `target`: debiased unless it is the biased one, then narrowed."""
        shadow = self.shadows[ordinal][:count]
        if accumulator.divisor is not None and target.part != BIASED:
            kernel.divide(shadow, accumulator.divisor, self.scratch[:count])
            shadow = self.scratch[:count]
        wanted = numpy_dtype(target.dtype)
        if wanted == shadow.dtype:
            return shadow
        if target.dtype not in self._out:
            self._out[target.dtype] = _reused(f"out {target.dtype}", wanted, len(self.scratch))
        out: kernel.Array = self._out[target.dtype][:count]
        kernel.narrow(shadow, out)
        return out
