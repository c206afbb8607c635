"""The ``checkpoint`` state file by which tf.train.latest_checkpoint finds an output.

A new output directory gets one, with relative paths. That of a training run is never touched:
training would resume from the average.
"""

from __future__ import annotations

import os

from ema_cli import durable, provenance
from ema_cli.blueprint import Layout
from ema_cli.errors import storage_errors
from ema_cli.formats import tensorflow
from ema_cli.formats.tensorflow import statefile
from ema_cli.text import shorten


def announce(layout: Layout) -> list[str]:
    """List a published prefix in the state file of its directory; returns what was left undone.

    Only where all checkpoints of the directory, and of its state file, are outputs of ours.
    """
    folder, name = os.path.split(layout.path)
    if layout.path.endswith(tensorflow.IN_SAVED_MODEL):
        return []  # loaded by its folder
    path = os.path.join(folder, tensorflow.STATE_FILE)
    state = tensorflow.state_in(folder)
    listed = [] if state is None else [entry for entry in state.listed if entry != name]
    foreign = os.path.lexists(path) and (
        state is None or not all(_ours(folder, entry) for entry in listed)
    )
    if foreign or not all(_made_by_us(prefix) for prefix in tensorflow.prefixes(folder or ".")):
        return [f"{shorten(path, 1000)}: not touched: it belongs to other checkpoints"]
    present = [entry for entry in listed if os.path.isfile(_path(folder, entry))]
    staged = durable.stage(path, statefile.encode(name, [*present, name]))
    with storage_errors(path, "cannot publish"):
        os.replace(staged, path)
    durable.sync_directory(folder)
    return []


def _ours(folder: str, entry: str) -> bool:
    """Whether an entry is a bare name, and of an output of ours or of nothing any more."""
    bare = bool(entry) and not set(entry) & set("/\0")
    gone = bare and not os.path.isfile(_path(folder, entry))
    return gone or (bare and _made_by_us(os.path.join(folder, entry)))


def _path(folder: str, entry: str) -> str:
    return os.path.join(folder, entry) + tensorflow.SUFFIX


def _made_by_us(prefix: str) -> bool:
    return provenance.load(prefix) is not None
