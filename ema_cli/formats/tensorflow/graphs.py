"""What a program's graph says of its variables: ``.meta`` files and SavedModels."""

from __future__ import annotations

import os

from ema_cli.files import stamp_of
from ema_cli.formats.tensorflow import metagraph, nodes, places
from ema_cli.formats.tensorflow.entries import DTYPE_NAMES
from ema_cli.formats.tensorflow.metagraph import Collections, Listed
from ema_cli.formats.tensorflow.wire import damaged
from ema_cli.tensors import DTYPES, DType

__all__ = [
    "Collections",
    "Listed",
    "collections",
    "declared",
    "is_graph",
    "saved_model_of",
    "untrainable",
]


def is_graph(path: str) -> bool:
    """Whether `path` is called as a graph is, and is there."""
    named = path.endswith(places.META_SUFFIX) or os.path.basename(path) == places.SAVED_MODEL
    return named and os.path.isfile(path)


def collections(path: str) -> Collections:
    """Return the collections of variables in the graph at `path`. Raises `DamagedFile`."""
    saved_model = os.path.basename(path) == places.SAVED_MODEL
    with damaged(path), places.reading(path) as read:
        return metagraph.read_collections(read, stamp_of(path).size, saved_model=saved_model)


def declared(path: str) -> dict[str, tuple[DType, tuple[int, ...] | None]]:
    """Return dtype and shape (None if unknown) of each variable the graph at `path` declares."""
    with damaged(path), places.reading(path) as read:
        found = nodes.read_declared(read, stamp_of(path).size)
    return {
        name: (DTYPES[DTYPE_NAMES[one.dtype]], one.shape)
        for name, one in found.items()
        if one.dtype in DTYPE_NAMES
    }


def untrainable(prefix: str) -> frozenset[int]:
    """Return the nodes that a SavedModel says are not trainable; empty for other checkpoints."""
    path = saved_model_of(prefix)
    if path is None:
        return frozenset()
    with damaged(path), places.reading(path) as read:
        return metagraph.read_untrainable(read, stamp_of(path).size)


def saved_model_of(prefix: str) -> str | None:
    """Return the graph of the SavedModel whose variables have this prefix, or None."""
    folder, name = os.path.split(prefix)
    path = os.path.join(os.path.dirname(folder) or ".", places.SAVED_MODEL)
    return path if name == "variables" and os.path.isfile(path) else None
