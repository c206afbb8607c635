"""Which tensors of a checkpoint are variables, as TensorFlow itself recorded it.

In a ``.meta`` file beside the checkpoint or beside another one of its run, in a SavedModel's
graph, or in the object graph that a tf.train.Checkpoint holds as one of its tensors.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from ema_cli.errors import DamagedFile, InputError
from ema_cli.files import stamp_of
from ema_cli.formats.known import Known
from ema_cli.formats.tensorflow import graphs, objectgraph, places, strings
from ema_cli.formats.tensorflow.wire import Malformed
from ema_cli.naming import OBJECT_GRAPH
from ema_cli.tensors import Checkpoint, Index, Role, Tensor
from ema_cli.text import shorten, size

GRAPH_LIMIT = 256 << 20
_NUMBER = re.compile(r"-(\d+)$")


class Recorded(NamedTuple):
    """What was recorded, and where: a note when it could not be read."""

    roles: Mapping[str, Role]
    full_names: Mapping[str, str]
    source: str
    note: str = ""


def recorded(checkpoint: Checkpoint, known: Known) -> Checkpoint:
    """Return the checkpoint with the roles that TensorFlow recorded for its tensors."""
    graph = checkpoint.index.by_name.get(OBJECT_GRAPH)
    path = graph_file(checkpoint.path, known) if graph is None else None
    if graph is not None:
        key: tuple[object, ...] = ("object graph", _checksum_of(checkpoint, graph))
    elif path is not None:
        key = ("graph file", stamp_of(path))
    else:
        return checkpoint
    # Kept with the index it is for, which therefore lives as long as it is compared with.
    kept: tuple[Index, Index, str] | None = known.get(("tensorflow", *key))
    if kept is None or kept[0] is not checkpoint.index:
        found = _of_objects(checkpoint, graph) if graph else _of_graph(path or "", checkpoint)
        index = dataclasses.replace(
            checkpoint.index,
            roles=found.roles,
            full_names=found.full_names,
            roles_from=found.source if found.roles else "",
        )
        kept = (checkpoint.index, index, found.note)
        known["tensorflow", *key] = kept
    notes = (kept[2],) if kept[2] else ()
    return dataclasses.replace(checkpoint, index=kept[1], notes=checkpoint.notes + notes)


def _checksum_of(checkpoint: Checkpoint, tensor: Tensor) -> int:
    assert checkpoint.checksums is not None  # noqa: S101  # every TensorFlow checkpoint has them
    return int(checkpoint.checksums[checkpoint.index.ordinals[tensor.extent]])


# ---------------------------------------------------------------------------- object graphs


def _of_objects(checkpoint: Checkpoint, graph: Tensor) -> Recorded:
    path = checkpoint.files[graph.extent.file].path
    try:
        untrainable = graphs.untrainable(checkpoint.path)
        records = objectgraph.read_roles(_graph_bytes(checkpoint, graph), untrainable)
    except Malformed as error:
        raise DamagedFile(path, str(error), graph.name) from None
    saved = checkpoint.index.by_name
    present = {key: record for key, record in records.items() if key in saved}
    return Recorded(
        {key: record.role for key, record in present.items()},
        {key: record.full_name for key, record in present.items() if record.full_name},
        "its object graph",
    )


def _graph_bytes(checkpoint: Checkpoint, graph: Tensor) -> bytes:
    """Return the serialised object graph, the one string of a scalar tensor, checked."""
    file, offset, n_bytes = graph.extent
    if graph.dtype.name != "string" or graph.shape:
        raise Malformed(f"expected a scalar of strings, found {graph.dtype} {list(graph.shape)}")
    if n_bytes > GRAPH_LIMIT:
        raise Malformed(f"expected at most {size(GRAPH_LIMIT)}, found {size(n_bytes)}")
    path = checkpoint.files[file].path
    with places.reading(path) as read:
        data = read(offset, n_bytes)
    big = checkpoint.index.big_endian
    _, found = strings.string_checksums(
        lambda start, count: data[start : start + count], n_bytes, 1, big_endian=big
    )
    if found != _checksum_of(checkpoint, graph):
        raise Malformed("its checksum does not match its bytes")
    return strings.decode(data, 1)[0]


# ---------------------------------------------------------------------------- graphs


def graph_file(prefix: str, known: Known) -> str | None:
    """Return the file with the graph of the checkpoint `prefix`, or None.

    Its own ``.meta``, that of the newest checkpoint of the same name, a SavedModel's graph. Most
    programs write one ``.meta`` and many checkpoints.
    """
    own = prefix + places.META_SUFFIX
    if os.path.isfile(own):
        return own
    saved_model = graphs.saved_model_of(prefix)
    if saved_model is not None:
        return saved_model
    folder, name = os.path.split(prefix)
    key = ("tensorflow", "graph files", folder)
    if key not in known:
        known[key] = _metas(folder)
    metas: dict[str, str] = known[key]
    return metas.get(_NUMBER.sub("", name))


def _metas(folder: str) -> dict[str, str]:
    """Return the ``.meta`` file with the highest number for each name without its number."""
    newest: dict[str, tuple[int, str]] = {}
    for name in os.listdir(folder or "."):
        stem = name.removesuffix(places.META_SUFFIX)
        if stem == name or name.startswith("."):
            continue
        match = _NUMBER.search(stem)
        number = int(match[1]) if match and len(match[1]) < 19 else -1
        base = stem[: match.start()] if match else stem
        candidate = (number, os.path.join(folder, name))
        newest[base] = max(newest.get(base, candidate), candidate)
    return {base: path for base, (_, path) in newest.items()}


def _of_graph(path: str, checkpoint: Checkpoint) -> Recorded:
    """Return the roles that the collections of a graph tell; trainable or averaged in training."""
    shown = shorten(os.path.basename(path))
    try:
        found = graphs.collections(path)
    except InputError as error:
        note = f"{error.message}; names tell what is a variable instead"
        return Recorded({}, {}, "", note)
    saved = checkpoint.index.by_name
    keys = [listed.key for listed in (*found.trainable, *found.moving_average)]
    roles = {key: Role.VARIABLE for key in keys if key in saved}
    return Recorded(roles, {}, f"the collections in {shown}")
