"""The object graph of a TensorFlow 2 checkpoint as plain numbers: nodes, edges, what is saved.

TrackableObjectGraph: 1 nodes {1 children {1 node_id, 2 local_name}, 2 attributes {1 name,
2 full_name, 3 checkpoint_key}, 3 slot_variables {1 original, 2 slot_name, 3 slot_variable}}. Nodes
are numbered as they come, 0 is the root and is left out on the wire; cycles are common.
Source: ``trackable_object_graph.proto``.

A graph may have millions of nodes, so an edge is two numbers: where it leads and what its name
tells, as far as `objectgraph` asks.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from ema_cli.formats.tensorflow import wire
from ema_cli.formats.tensorflow.wire import Malformed

GRAPH_LIMIT = 256 << 20
# Nodes, edges, attributes and slots together.
PART_LIMIT = 1 << 23

# What the name of an edge tells.
TRAINABLE = 1 << 0  # a list of what is trained
FROZEN = 1 << 1  # a list of what is not
AVERAGES = 1 << 2  # a list of averages that Keras keeps itself
TWINS = 1 << 3  # a list of variables saved a second time
ASIDE = 1 << 4  # metrics, random generators: state that no training moves
OPTIMIZER = 1 << 5
STATISTIC = 1 << 6
SAVES = 1 << 7
STEP = 1 << 8
KERAS_MODEL = 1 << 9  # only Keras 3 models have such edges
# Told by two edges of one node together.
ITERATIONS, KERAS_STATE = 1 << 10, 1 << 11
ITER, HYPER = 1 << 12, 1 << 13
TOTAL, COUNT = 1 << 14, 1 << 15

STATISTICS = ("moving_mean", "moving_variance")

_TOLD = {
    TRAINABLE: "_trainable_variables trainable_variables",
    FROZEN: "_non_trainable_variables non_trainable_variables",
    AVERAGES: "_model_variables_moving_average",
    TWINS: "_all_variables",
    ASIDE: "metrics _metrics _compile_metrics compiled_metrics _loss_tracker compiled_loss "
    "layer_metrics true_positives true_negatives false_positives false_negatives "
    "_seed_generators seed_generator _seed_generator _state_var adapt_mean adapt_variance",
    OPTIMIZER: "optimizer optimizers beta1_power beta2_power",
    STATISTIC: " ".join(STATISTICS),
    SAVES: "save_counter",
    STEP: "step global_step iterations",
    KERAS_MODEL: "_functional _compiled_trainable_state",
    ITERATIONS: "_iterations",
    KERAS_STATE: "_variables _learning_rate",
    ITER: "iter",
    HYPER: "decay learning_rate momentum rho beta_1 beta_2",
    TOTAL: "total",
    COUNT: "count",
}
_NAMES = {name.encode(): told for told, names in _TOLD.items() for name in names.split()}
_LONGEST_NAME = max(map(len, _NAMES))
_SUFFIX = b"_optimizer"


class Saved(NamedTuple):
    """An attribute of a node that has a key in the checkpoint."""

    node: int
    name: str
    full_name: str
    key: str


class Graph:
    """Nodes and edges.

    Attributes:
        targets: of all edges, in the order of the nodes they leave.
        told: what the name of each edge tells.
        kinds: by node, what the names of all its edges tell.
        saved: the attributes with a key.
        owners: the nodes that own slot variables.
        slots: the nodes that are slot variables.
        averages: those slots that hold an average of the variable.
    """

    def __init__(self) -> None:
        self._starts = array("I", (0,))
        self.targets = array("I")
        self.told = array("I")
        self.kinds = array("I")
        self.saved: list[Saved] = []
        self.owners: set[int] = set()
        self.slots: set[int] = set()
        self.averages: set[int] = set()

    def __len__(self) -> int:
        return len(self.kinds)

    def edges(self, node: int) -> range:
        """Return the numbers of the edges that leave `node`."""
        return range(self._starts[node], self._starts[node + 1])

    def is_optimizer(self, node: int) -> bool:
        """Whether only an optimizer has such edges or owns slots."""
        kind = self.kinds[node]
        return node in self.owners or bool(kind & ITERATIONS and kind & (KERAS_STATE | TRAINABLE))

    def add(self, node: memoryview) -> None:
        """Append a TrackableObject."""
        number, kind = len(self.kinds), 0
        for field in wire.fields(node):
            if field[0] == 1:
                target, told = _child(wire.message(field))
                self.targets.append(target)
                self.told.append(told)
                kind |= told
            elif field[0] == 2:
                self._attribute(number, wire.message(field))
            elif field[0] == 3:
                self.owners.add(number)
                self._slot(wire.message(field))
        self.kinds.append(kind)
        self._starts.append(len(self.targets))
        parts = len(self.kinds) + len(self.targets) + len(self.saved) + len(self.slots)
        if parts > PART_LIMIT:
            raise Malformed(f"expected an object graph of at most {PART_LIMIT:,} parts, found more")

    def check(self) -> None:
        """Raise `Malformed` unless there is a root and every edge leads to a node."""
        highest = max(max(self.targets, default=0), max(self.slots, default=0))
        if highest >= len(self.kinds):
            raise Malformed(f"an object graph of {len(self.kinds):,} nodes refers to {highest:,}")

    def _attribute(self, node: int, attribute: memoryview) -> None:
        texts = {1: "", 2: "", 3: ""}
        for field in wire.fields(attribute):
            if field[0] in texts:
                texts[field[0]] = wire.text(field)
        if texts[3]:
            self.saved.append(Saved(node, texts[1], texts[2], texts[3]))

    def _slot(self, slot: memoryview) -> None:
        node, averaged = 0, False
        for field in wire.fields(slot):
            if field[0] == 2:
                averaged = bytes(wire.message(field)) == b"average"
            elif field[0] == 3:
                node = _node(field)
        self.slots.add(node)
        if averaged:
            self.averages.add(node)


def parse(graph: bytes) -> Graph:
    """Return the TrackableObjectGraph in `graph`; raises `Malformed`."""
    if len(graph) > GRAPH_LIMIT:
        raise Malformed(
            f"expected an object graph of at most {GRAPH_LIMIT:,} bytes, found {len(graph):,}"
        )
    parsed = Graph()
    for field in wire.fields(graph):
        if field[0] == 1:
            parsed.add(wire.message(field))
    parsed.check()
    return parsed


def _child(child: memoryview) -> tuple[int, int]:
    """Return the node an edge leads to and what its name tells."""
    node = told = 0
    for field in wire.fields(child):
        if field[0] == 1:
            node = _node(field)
        elif field[0] == 2:
            told = _tells(wire.message(field))
    return node, told


def _node(field: wire.Field) -> int:
    number = wire.signed(field)
    if not 0 <= number < PART_LIMIT:
        raise Malformed(f"an object graph refers to node {number:,}")
    return number


def _tells(name: memoryview) -> int:
    if len(name) <= _LONGEST_NAME:
        told = _NAMES.get(bytes(name))
        if told is not None:
            return told
        if bytes(name).lstrip(b"_") in _STATISTICS:
            return STATISTIC
    return OPTIMIZER if bytes(name[-len(_SUFFIX) :]) == _SUFFIX else 0


_STATISTICS = {name.encode() for name in STATISTICS}
