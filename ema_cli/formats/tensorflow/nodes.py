"""The variables among the nodes of a graph: their dtypes and shapes, which no collection tells.

MetaGraphDef: 2 GraphDef {1 NodeDef}. NodeDef: 1 name, 2 op, 5 attr {1 key, 2 AttrValue}. AttrValue:
6 type, 7 TensorShapeProto. Source: ``node_def.proto`` and ``attr_value.proto``. Other nodes hold
constants as large as the model; they are walked over.
"""

from __future__ import annotations

from typing import NamedTuple

from ema_cli.formats.tensorflow import shapes, wire
from ema_cli.formats.tensorflow.spans import Read, Span, Walker, delimited
from ema_cli.formats.tensorflow.wire import Malformed

_OPERATIONS = (b"VarHandleOp", b"VariableV2", b"Variable")
_LONGEST = 4096


class Declared(NamedTuple):
    """What a graph says of a variable: the number of its dtype, and its shape if that is known."""

    dtype: int
    shape: tuple[int, ...] | None


def read_declared(read: Read, size: int) -> dict[str, Declared]:
    """Return what a MetaGraphDef declares of each variable, by the name of its operation.

    `read` is called as ``read(offset, count)``. Raises `Malformed`.
    """
    walker = Walker(read, size)
    found: dict[str, Declared] = {}
    for graph in walker.messages(walker.whole, 2):
        for node in walker.messages(graph, 1):
            name, operation, attributes = b"", b"", []
            for span in walker.fields(node):
                if span.number == 1:
                    name = _short(walker, span)
                elif span.number == 2:
                    operation = _short(walker, span)
                elif span.number == 5:
                    attributes.append(delimited(span))
            if operation in _OPERATIONS:
                found[name.decode("utf-8", "surrogateescape")] = _declared(walker, attributes)
    return found


def _short(walker: Walker, span: Span) -> bytes:
    return walker.fetch(delimited(span), _LONGEST)


def _declared(walker: Walker, attributes: list[Span]) -> Declared:
    dtype, shape = 0, None
    for attribute in attributes:
        key, value = b"", b""
        for span in walker.fields(attribute):
            if span.number == 1:
                key = _short(walker, span)
            elif span.number == 2 and key in (b"dtype", b"shape"):
                value = _short(walker, span)
        for field in wire.fields(value):
            if key == b"dtype" and field[0] == 6:
                dtype = wire.unsigned(field)
            elif key == b"shape" and field[0] == 7:
                shape = _shape(wire.message(field))
    return Declared(dtype, shape)


def _shape(value: memoryview) -> tuple[int, ...] | None:
    """Return the shape, or None when a dimension is not known."""
    try:
        return shapes.parse_shape(value)
    except Malformed:
        return None
