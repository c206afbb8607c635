"""Trainers that save checkpoints in all the ways trainers do, while somebody reads them.

Every element of a checkpoint is its step, or says which rewriting it is of: a mixture shows.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable, Iterator

CHUNK = 256 << 10
ELEMENTS = 160_000  # of each of the two tensors
PAUSE = 0.015  # between chunks, so that a file is unfinished for longer than a look at it takes
VERSION = 0.25  # what each rewriting adds to every element


def name_of(step: int) -> str:
    """Return what the checkpoint of a step is called."""
    return f"model-step={step}.safetensors"


def header() -> bytes:
    """Return what precedes the data of every checkpoint."""
    size = 4 * ELEMENTS
    text = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [ELEMENTS], "data_offsets": [0, size]},
            "b": {"dtype": "F32", "shape": [ELEMENTS], "data_offsets": [size, 2 * size]},
            "seen": {"dtype": "I64", "shape": [2], "data_offsets": [2 * size, 2 * size + 16]},
        }
    ).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def pieces(step: int, version: int = 0) -> Iterator[bytes]:
    """Yield the bytes of a checkpoint."""
    yield header()
    data = struct.pack("<f", step + version * VERSION) * (2 * ELEMENTS)
    for start in range(0, len(data), CHUNK):
        yield data[start : start + CHUNK]
    yield struct.pack("<qq", step, version)


def size() -> int:
    """Return the bytes of a checkpoint."""
    return len(header()) + 8 * ELEMENTS + 16


class Trainer:
    """Saves checkpoints into a directory and remembers when.

    Attributes:
        present: for each step, when its final name came, and when it went.
    """

    def __init__(self, directory: str, gap: float) -> None:
        self._directory = directory
        self._gap = gap
        self.present: dict[int, tuple[float, float]] = {}

    def path(self, step: int) -> str:
        """Return where the checkpoint of a step is."""
        return os.path.join(self._directory, name_of(step))

    def _put(self, path: str, step: int, version: int = 0, *, pause: float = PAUSE) -> None:
        with open(path, "wb", buffering=0) as file:
            for piece in pieces(step, version):
                file.write(piece)
                time.sleep(pause)

    def _saved(self, step: int) -> None:
        self.present[step] = (time.monotonic(), float("inf"))
        time.sleep(self._gap)

    def _remove(self, step: int) -> None:
        os.unlink(self.path(step))
        self.present[step] = (self.present[step][0], time.monotonic())

    def rename(self, step: int) -> None:
        """Write under another name and rename into place: what a careful trainer does."""
        self._put(self.path(step) + ".part", step)
        os.rename(self.path(step) + ".part", self.path(step))
        self._saved(step)

    def in_place(self, step: int) -> None:
        """Write under the final name: what most trainers do."""
        self._put(self.path(step), step)
        self._saved(step)

    def allocate(self, step: int) -> None:
        """Allocate the whole file with its header, then fill it: what some copying does."""
        fd = os.open(self.path(step), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        offset = 0
        os.posix_fallocate(fd, 0, size())
        for piece in pieces(step):
            os.pwrite(fd, piece, offset)
            offset += len(piece)
            time.sleep(PAUSE)
        os.close(fd)
        self._saved(step)

    def rotate(self, step: int) -> None:
        """Keep the last two."""
        self.rename(step)
        for old in [s for s, (_, gone) in self.present.items() if gone == float("inf")][:-2]:
            self._remove(old)

    def rewrite(self, step: int) -> None:
        """Write the checkpoint, then write it again with other contents, in place."""
        self.in_place(step)
        before = [s for s in self.present if s < step][-1:]
        for old in (step, *before):
            self._put(self.path(old), old, 1 + (old != step))
            time.sleep(self._gap / 4)

    def truncate(self, step: int) -> None:
        """Cut some checkpoints short, and write some of them anew."""
        self.in_place(step)
        if step % 3 == 0:
            os.truncate(self.path(step), size() // 2)
            time.sleep(self._gap / 4)
        if step % 6 == 0:
            self._put(self.path(step), step)


WAYS: dict[str, Callable[[Trainer, int], None]] = {
    "rename": Trainer.rename,
    "in-place": Trainer.in_place,
    "allocate": Trainer.allocate,
    "rotate": Trainer.rotate,
    "rewrite": Trainer.rewrite,
    "truncate": Trainer.truncate,
}


def train(way: str, directory: str, steps: int, gap: float) -> int:
    """Start a process that saves `steps` checkpoints; returns its id.

    When it ends it has written ``present.json`` beside the directory.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        trainer = Trainer(directory, gap)
        for step in range(1, steps + 1):
            WAYS[way](trainer, step)
        with open(f"{directory}.present.json", "w") as file:
            json.dump(trainer.present, file)
        code = 0
    finally:
        os._exit(code)
    return 0
