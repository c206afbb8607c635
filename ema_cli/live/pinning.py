"""Hard links that keep checkpoints while they are averaged, however fast their run rotates.

They lie in the state, in ``pins/<step>/``, and go as soon as the update is committed. What a
killed process left is removed by the next one, so they need not be durable. Where a file cannot
be linked (another file system, somebody else's file) it is read where it lies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

from ema_cli import durable
from ema_cli.errors import EmaError, InputChanged, storage_errors
from ema_cli.files import stamp_of
from ema_cli.formats import FORMATS, tensorflow
from ema_cli.formats.sidefiles import side_files
from ema_cli.states.directory import PINS
from ema_cli.tensors import Checkpoint, Stamp
from ema_cli.text import shorten


class Pins:
    """The checkpoints that one update holds.

    Args:
        state: the directory of the state, whose lock is held.
    """

    def __init__(self, state: str) -> None:
        self._state = state
        self._names: list[tuple[str, str]] = []

    def hold(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint as it lies under its links, or as it is where it has none.

        Raises `InputChanged` when a file of it is not the one that was looked at any more, and
        `InputError` when it is gone.
        """
        base = os.path.dirname(checkpoint.files[0].path)
        place = os.path.join(self._state, PINS, str(checkpoint.step))
        folder = FORMATS[checkpoint.index.format].kind == "folder"
        target = os.path.join(place, os.path.basename(base)) if folder else place
        try:
            durable.remove(place)
            os.makedirs(target, 0o700)
            for path in _files_of(checkpoint, base, folder=folder):
                os.link(os.path.realpath(path), target + path[len(base) :])
        except OSError:
            durable.remove(place)
            _check(checkpoint.files)
            return checkpoint
        pinned = _moved(checkpoint, base, target)
        self._names.append((target, base))
        _check(pinned.files, checkpoint.files)
        return pinned

    def named(self, error: EmaError) -> EmaError:
        """Return an error with the names that the user knows in the place of the links'."""
        words = list(error.args)
        for mine, theirs in self._names:
            words = [w.replace(mine, theirs) if isinstance(w, str) else w for w in words]
        return type(error)(*words) if words != list(error.args) else error

    def release(self) -> None:
        """Remove the links; the files lose nothing but a name."""
        self._names.clear()
        remove_all(self._state)


def remove_all(state: str) -> None:
    """Remove every link in a state whose lock is held."""
    path = os.path.join(state, PINS)
    with storage_errors(path, "cannot remove"):
        durable.remove(path)


def left(state: str) -> dict[int, str]:
    """Return the steps that a killed process had pinned, each with what it called them."""
    path, found = os.path.join(state, PINS), {}
    with contextlib.suppress(OSError):
        for step in filter(str.isdecimal, os.listdir(path)):
            for name in sorted(os.listdir(os.path.join(path, step)))[:1]:
                found[int(step)] = tensorflow.stem_of(name) or name
    return found


def _files_of(checkpoint: Checkpoint, base: str, *, folder: bool) -> Iterator[str]:
    """Yield the paths of a checkpoint's files, and of those that make its folder load."""
    own = [stamp.path for stamp in checkpoint.files if stamp.path]
    beside = [os.path.join(base, name) for name in side_files(base)] if folder else []
    index = [checkpoint.index_file] if checkpoint.index_file else []
    yield from dict.fromkeys([*own, *index, *beside])


def _moved(checkpoint: Checkpoint, base: str, target: str) -> Checkpoint:
    """Return a checkpoint that lies in another directory."""

    def moved(path: str) -> str:
        return target + path[len(base) :] if path else path

    return dataclasses.replace(
        checkpoint,
        path=moved(checkpoint.path),
        files=tuple(stamp._replace(path=moved(stamp.path)) for stamp in checkpoint.files),
        index_file=moved(checkpoint.index_file),
    )


def _check(files: tuple[Stamp, ...], expected: tuple[Stamp, ...] | None = None) -> None:
    """Raise `InputError` unless the files are there and what they were."""
    for file, wanted in zip(files, expected or files, strict=True):
        if file.path and stamp_of(file.path)[1:] != wanted[1:]:
            raise InputChanged(f"{shorten(wanted.path, 1000)}: changed while it was looked at")
