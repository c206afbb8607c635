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
from ema_cli.formats.known import Known
from ema_cli.formats.tensorflow import graphs, objectgraph, places, strings
from ema_cli.formats.tensorflow.places import NAME
from ema_cli.formats.tensorflow.wire import Malformed
from ema_cli.naming import OBJECT_GRAPH
from ema_cli.tensors import Checkpoint, Index, Role, Tensor
from ema_cli.text import shorten, size

GRAPH_LIMIT = 256 << 20
# Of a run that keeps a graph beside each checkpoint one is enough, unless it is damaged.
_GRAPHS_TRIED = 3
_NUMBER = re.compile(r"-(\d+)$")


class Recorded(NamedTuple):
    """What was recorded, and where; and what could not be read."""

    roles: Mapping[str, Role]
    full_names: Mapping[str, str]
    source: str
    notes: tuple[str, ...] = ()


def recorded(checkpoint: Checkpoint, known: Known) -> Checkpoint:
    """Return the checkpoint with the roles that TensorFlow recorded for its tensors."""
    base = checkpoint.index
    graph = base.by_name.get(OBJECT_GRAPH)
    if graph is not None:
        key = (NAME, "object graph", _checksum_of(checkpoint, graph))
        # Kept with the index it is for, which therefore lives as long as it is compared with.
        kept: tuple[Index, Recorded] | None = known.get(key)
        if kept is None or kept[0] is not base:
            kept = known[key] = (base, _of_objects(checkpoint, graph))
        found = kept[1]
    else:
        found = _of_graphs(checkpoint, known)
    if not found.roles:
        return dataclasses.replace(checkpoint, notes=checkpoint.notes + found.notes)
    # The checkpoints of a run share one index, though each may have a graph file of its own.
    key = (NAME, "with roles", id(base))
    shared: tuple[Index, Index] | None = known.get(key)
    same = shared is not None and (shared[1].roles, shared[1].full_names) == found[:2]
    if shared is None or shared[0] is not base or not same:
        enriched = dataclasses.replace(
            base, roles=found.roles, full_names=found.full_names, roles_from=found.source
        )
        shared = known[key] = (base, enriched)
    return dataclasses.replace(checkpoint, index=shared[1], notes=checkpoint.notes + found.notes)


def _checksum_of(checkpoint: Checkpoint, tensor: Tensor) -> int:
    assert checkpoint.checksums is not None  # noqa: S101  # every TensorFlow checkpoint has them
    return int(checkpoint.checksums[checkpoint.index.ordinals[tensor.extent]])


# ---------------------------------------------------------------------------- object graphs


def _of_objects(checkpoint: Checkpoint, graph: Tensor) -> Recorded:
    path = checkpoint.files[graph.extent.file].path
    untrainable, notes = _untrainable(checkpoint.path)
    try:
        records = objectgraph.read_roles(_graph_bytes(checkpoint, graph), untrainable)
    except Malformed as error:
        raise DamagedFile(path, str(error), graph.name) from None
    saved = checkpoint.index.by_name
    present = {key: record for key, record in records.items() if key in saved}
    return Recorded(
        {key: record.role for key, record in present.items()},
        {key: record.full_name for key, record in present.items() if record.full_name},
        "its object graph",
        notes,
    )


def _untrainable(prefix: str) -> tuple[frozenset[int], tuple[str, ...]]:
    """Return the nodes a SavedModel says are not trainable; a note when that cannot be read."""
    try:
        return graphs.untrainable(prefix), ()
    except InputError as error:
        return frozenset(), (f"{error.message}; every variable counts as trainable",)


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


def graph_files(prefix: str, known: Known) -> list[str]:
    """Return the files that may hold the graph of the checkpoint `prefix`, best first.

    A SavedModel's graph; its own ``.meta``, and those of the other checkpoints of its name, newest
    first: most programs write one, and the newest may still be being written.
    """
    saved_model = graphs.saved_model_of(prefix)
    if saved_model is not None:
        return [saved_model]
    folder, name = os.path.split(prefix)
    key = (NAME, "graph files", folder)
    if key not in known:
        known[key] = _metas(folder)
    others: list[str] = known[key].get(_NUMBER.sub("", name), [])
    own = prefix + places.META_SUFFIX
    return [path for path in others if path == own] + [path for path in others if path != own]


def _metas(folder: str) -> dict[str, list[str]]:
    """Return the ``.meta`` files of each name without its number, highest number first."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name in os.listdir(folder or "."):
        stem, path = name.removesuffix(places.META_SUFFIX), os.path.join(folder, name)
        if stem != name and not name.startswith(".") and os.path.isfile(path):
            match = _NUMBER.search(stem)
            number = int(match[1]) if match and len(match[1]) < 19 else -1
            base = stem[: match.start()] if match else stem
            found.setdefault(base, []).append((number, path))
    return {base: [path for _, path in sorted(rows, reverse=True)] for base, rows in found.items()}


def _of_graphs(checkpoint: Checkpoint, known: Known) -> Recorded:
    """Return what the first graph tells that can be read and knows these variables."""
    notes: list[str] = []
    for path in graph_files(checkpoint.path, known)[:_GRAPHS_TRIED]:
        key = (NAME, "graph", path)
        if key not in known:
            known[key] = _variables(path)
        names, note = known[key]
        roles = {name: Role.VARIABLE for name in names if name in checkpoint.index.by_name}
        if note:
            notes.append(note)
        if roles:
            source = f"the collections in {shorten(os.path.basename(path))}"
            return Recorded(roles, {}, source, tuple(notes))
    return Recorded({}, {}, "", tuple(notes))


def _variables(path: str) -> tuple[list[str], str]:
    """Return the trainable or averaged variables in a graph, or a note why there are none."""
    try:
        found = graphs.collections(path)
    except InputError as error:
        return [], f"{error.message}; another graph or names tell what is a variable"
    names = list(dict.fromkeys(one.key for one in (*found.trainable, *found.moving_average)))
    note = f"{shorten(path, 1000)}: lists no variables; another graph or names tell them"
    saved_model = os.path.basename(path) == places.SAVED_MODEL
    return names, "" if names or saved_model else note
