"""Graph collections: which variables a TensorFlow 1 graph, or a SavedModel, declares.

``PREFIX.meta`` is a MetaGraphDef, ``saved_model.pb`` a SavedModel, whose field 2 is MetaGraphDef.
Initial values make both as large as the model, up to gigabytes, so nothing is loaded whole: fields
are walked by their lengths, and only what is asked for is fetched.

MetaGraphDef: 4 collection_def {1 key, 2 CollectionDef}, 7 SavedObjectGraph {1 SavedObject}.
CollectionDef: 1 node_list {1 name}, 2 bytes_list {1 VariableDef}. SavedObject: 7 SavedVariable
{3 trainable}. VariableDef: 1 variable_name, 4 SaveSliceInfoDef {1 full_name, 2 full_shape},
7 trainable. Source: ``meta_graph.proto``, ``saved_object_graph.proto`` and ``variable.proto``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ema_cli.formats.tensorflow import spans, wire
from ema_cli.formats.tensorflow.spans import Read as Read
from ema_cli.formats.tensorflow.spans import Span, Walker
from ema_cli.formats.tensorflow.wire import Malformed

TRAINABLE = "trainable_variables"
MOVING_AVERAGE = "moving_average_variables"
VARIABLES = "variables"
_WANTED = {key.encode(): key for key in (TRAINABLE, MOVING_AVERAGE, VARIABLES)}
_LONGEST_KEY = max(map(len, _WANTED))

COLLECTION_LIMIT = 64 << 20
ENTRY_LIMIT = 1_000_000
DIMENSION_LIMIT = 254


class Listed(NamedTuple):
    """One entry of a collection.

    Attributes:
        name: of the variable's operation, without ``:0``.
        key: under which a checkpoint holds it: for a partition that of the whole, else the name.
        trainable: as the entry records it; old writers and plain names record nothing.
        partition: whether it is one slice of a larger variable.
        shape: of the whole variable for a partition, else empty.
    """

    name: str
    key: str
    trainable: bool
    partition: bool
    shape: tuple[int, ...]


class Collections(NamedTuple):
    """The collections that say what is averaged; `variables` is None when the graph has none."""

    trainable: tuple[Listed, ...]
    moving_average: tuple[Listed, ...]
    variables: tuple[Listed, ...] | None


def read_collections(read: Read, size: int, *, saved_model: bool = False) -> Collections:
    """Return the collections of the MetaGraphDef that `read` gives the bytes of.

    Args:
        read: called as ``read(offset, count)``, returns exactly that many bytes.
        size: bytes in all.
        saved_model: whether the bytes are a SavedModel; its graphs then count as one.

    Raises `Malformed`.
    """
    walker = Walker(read, size)
    found: dict[str, dict[str, Listed]] = {}
    for graph in _graphs(walker, saved_model):
        for key, value in _collections(walker, graph).items():
            entries = found.setdefault(key, {})
            for listed in _entries(walker.fetch(value, COLLECTION_LIMIT)):
                entries.setdefault(listed.name, listed)
                if len(entries) > ENTRY_LIMIT:
                    raise Malformed(f"expected at most {ENTRY_LIMIT:,} {key}, found more")
    variables = tuple(found[VARIABLES].values()) if VARIABLES in found else None
    return Collections(
        tuple(found.get(TRAINABLE, {}).values()),
        tuple(found.get(MOVING_AVERAGE, {}).values()),
        variables,
    )


def read_untrainable(read: Read, size: int) -> frozenset[int]:
    """Return the nodes that a ``saved_model.pb`` records as variables with ``trainable=False``.

    The numbers are those of the object graph in the SavedModel's own checkpoint, see
    `objectgraph.read_roles`. Raises `Malformed`.
    """
    walker = Walker(read, size)
    found: set[int] = set()
    for graph in _graphs(walker, saved_model=True):
        for objects in walker.messages(graph, 7):
            for number, node in enumerate(walker.messages(objects, 1)):
                for variable in walker.messages(node, 7):
                    if not _flag(walker, variable, 3):
                        found.add(number)
    return frozenset(found)


def _flag(walker: Walker, message: Span, number: int) -> bool:
    """Return a bool field; an absent one is false."""
    value = 0
    for span in walker.fields(message):
        if span.number == number:
            value = wire.unsigned((number, span.kind, span.value))
    return bool(value)


def _graphs(walker: Walker, saved_model: bool) -> Iterator[Span]:
    return walker.messages(walker.whole, 2) if saved_model else iter((walker.whole,))


def _collections(walker: Walker, graph: Span) -> dict[str, Span]:
    """Return where the values of the wanted collections lie; the last of a key counts."""
    found = {}
    for entry in walker.messages(graph, 4):
        key, value = b"", Span(2, wire.BYTES, entry.end, entry.end)
        for span in walker.fields(entry):
            if span.number == 1:
                length = spans.delimited(span).end - span.start
                key = walker.fetch(span, length) if length <= _LONGEST_KEY else b""
            elif span.number == 2:
                value = spans.delimited(span)
        if key in _WANTED:
            found[_WANTED[key]] = value
    return found


# ---------------------------------------------------------------------------- entries


def _entries(collection: bytes) -> Iterator[Listed]:
    """Yield the entries of a CollectionDef: variables, or plain names."""
    for field in wire.fields(collection):
        if field[0] not in (1, 2):
            continue
        for entry in wire.fields(wire.message(field)):
            if entry[0] == 1:
                yield _plain(wire.text(entry)) if field[0] == 1 else _variable(wire.message(entry))


def _plain(name: str) -> Listed:
    name = _operation(name)
    return Listed(name, name, trainable=False, partition=False, shape=())


def _variable(definition: memoryview) -> Listed:
    name, trainable = "", False
    slices: list[memoryview] = []
    for field in wire.fields(definition):
        if field[0] == 1:
            name = wire.text(field)
        elif field[0] == 4:
            slices.append(wire.message(field))
        elif field[0] == 7:
            trainable = bool(wire.unsigned(field))
    name = _operation(name)
    key, shape = _slice(b"".join(slices)) if slices else (name, ())
    return Listed(name, key, trainable, bool(slices), shape)


def _operation(name: str) -> str:
    """Return the name of the operation whose first output is called `name`."""
    name = name.removesuffix(":0")
    if not name:
        raise Malformed("a variable has no name")
    return name


def _slice(information: bytes) -> tuple[str, tuple[int, ...]]:
    """Return the name and shape of the variable that a partition belongs to."""
    name = ""
    shape: list[int] = []
    for field in wire.fields(information):
        if field[0] == 1:
            name = wire.text(field)
        elif field[0] == 2:
            for dimension in _dimensions(field):
                shape.append(dimension)
                if len(shape) > DIMENSION_LIMIT:
                    raise Malformed(f"expected at most {DIMENSION_LIMIT} dimensions, found more")
    if not name:
        raise Malformed("a partition does not name the variable it belongs to")
    if any(dimension < 0 for dimension in shape):
        raise Malformed("a partition's variable has a negative dimension")
    return name, tuple(shape)


def _dimensions(field: wire.Field) -> Iterator[int]:
    """Yield the numbers of a repeated int64 field, packed or not."""
    if field[1] == wire.VARINT:
        yield wire.signed(field)
        return
    packed, at = wire.message(field), 0
    while at < len(packed):
        value, at = wire.varint(packed, at)
        yield wire.signed((field[0], wire.VARINT, value))
