"""The ``checkpoint`` state file by which tf.train.latest_checkpoint finds an output.

A new output directory gets one, with relative paths. That of a training run is never touched:
training would resume from the average.
"""

from __future__ import annotations

import os
import time

from ema_cli import durable, provenance
from ema_cli.blueprint import Layout
from ema_cli.errors import EmaError, Locked, storage_errors
from ema_cli.files import read_small
from ema_cli.formats import tensorflow
from ema_cli.formats.tensorflow import statefile
from ema_cli.text import shorten

_ATTEMPTS = 40
_PAUSE = 0.05


def announce(layout: Layout, *, written: bool = True) -> list[str]:
    """List a published prefix in the state file of its directory; returns what was left undone.

    Only where all checkpoints of the directory, and of its state file, are outputs of ours.
    Elsewhere, and for other kinds of output, nothing happens. What was `written` just now becomes
    the latest; what stood there before keeps its place if it is listed.
    """
    if layout.kind != "prefix" or layout.path.endswith(tensorflow.IN_SAVED_MODEL):
        return []
    folder, name = os.path.split(layout.path)
    path = os.path.join(folder, tensorflow.STATE_FILE)
    for patience in reversed(range(_ATTEMPTS)):
        try:
            return _enlist(folder, name, path, written)
        except Locked:  # another output of this directory is being announced
            if not patience:
                raise
            time.sleep(_PAUSE)
    return []


def _enlist(folder: str, name: str, path: str, written: bool) -> list[str]:
    """Add a name to the state file at `path` unless that is somebody else's."""
    temporary = durable.beside(path, durable.TEMPORARY_SUFFIX)
    lock = durable.create_locked(temporary)
    waiting = True
    try:
        state = tensorflow.state_in(folder)
        if state is not None and name in state.listed and not written:
            return []
        others = _others(folder, name, state)
        foreign = others is None or (state is None and os.path.lexists(path))
        if foreign or not all(_made_by_us(prefix) for prefix in tensorflow.prefixes(folder or ".")):
            return [f"{shorten(path, 1000)}: not touched: it belongs to other checkpoints"]
        text = statefile.encode(name, [*(others or ()), name])
        if not _holds(path, text):
            durable.write_exact(lock, text, 0, temporary)
            durable.sync(lock, temporary)
            with storage_errors(path, "cannot publish"):
                os.replace(temporary, path)
            waiting = False
            durable.sync_directory(folder)
        return []
    finally:
        if waiting:
            durable.remove(temporary)
        os.close(lock)


def _others(folder: str, name: str, state: statefile.State | None) -> list[str] | None:
    """Return the other outputs a state file lists; None when it lists what is not ours.

    What is gone was ours only if something that is listed still is.
    """
    if state is None:
        return []
    entries = list(dict.fromkeys([*state.listed, state.latest]))
    if not all(entry and not set(entry) & set("/\0") for entry in entries):
        return None
    ours = [entry for entry in entries if _made_by_us(os.path.join(folder, entry))]
    rest = [entry for entry in entries if entry not in ours]
    there = [entry for entry in rest if os.path.lexists(_path(folder, entry)) or _v1(folder, entry)]
    if there or (rest and not ours):
        return None
    return [entry for entry in ours if entry != name]


def _v1(folder: str, entry: str) -> bool:
    return os.path.lexists(os.path.join(folder, entry))


def _path(folder: str, entry: str) -> str:
    return os.path.join(folder, entry) + tensorflow.SUFFIX


def _holds(path: str, text: bytes) -> bool:
    try:
        return read_small(path, len(text)) == text
    except EmaError:
        return False


def _made_by_us(prefix: str) -> bool:
    return provenance.load(prefix) is not None
