"""What each tensor of a TensorFlow 2 checkpoint is for, told by the object graph saved in it.

A key is the shortest path from the root, which says little: a compiled Keras 3 model has its
kernels under ``optimizer/_trainable_variables/0``. So the graph is walked, and what counts is how
a variable can be reached at all:

* by any path that leads not through an optimizer's own state, it belongs to the model; the
  optimizer's ``_trainable_variables`` are the model's;
* else through its ``_model_variables_moving_average``, it is a shadow that Keras keeps;
* else through an optimizer, it is optimizer state, as is every slot;
* else through metrics or random generators, it is not trainable.

No flag says which of a model's variables are trained. A list called ``trainable_variables`` that
holds one says it is, ``non_trainable_variables`` that it is not, and so does a Keras 3 optimizer:
it lists all that it trains, so the other variables of the same model are fixed. Where nothing
tells, it is a variable to average: of what never changes, the average is the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterator, Mapping
from typing import NamedTuple

from ema_cli.formats.tensorflow import trackable
from ema_cli.formats.tensorflow.trackable import Graph, Saved
from ema_cli.tensors import Role

# How a node is reached. Of several ways the first one counts.
_MODEL, _SHADOW, _OPTIMIZER, _ASIDE = 1, 2, 4, 8

# Marks of a node: what its incoming edges tell, and what those of the lists it is in tell.
_LISTS = trackable.TRAINABLE | trackable.FROZEN | trackable.TWINS
_OPTIMIZED = 1 << 10
_COUNTER = 1 << 11
_LISTED = 16

# When several nodes share a key, the role that comes first here counts.
_PREFERRED = {
    role: place
    for place, role in enumerate(
        (
            Role.VARIABLE,
            Role.STATISTICS,
            Role.FIXED,
            Role.COUNTER,
            Role.OTHER_SHADOW,
            Role.OPTIMIZER,
        )
    )
}

_VALUE = "VARIABLE_VALUE"
# A hash table is one attribute and two tensors.
_TENSORS_OF_OTHERS = ("", "-keys", "-values")


class Tracked(NamedTuple):
    """A tensor of the object graph.

    Attributes:
        key: its name in the checkpoint.
        full_name: of the variable in its program; not unique, empty for what is no variable.
        role: what it is for.
    """

    key: str
    full_name: str
    role: Role


def read_roles(graph: bytes, untrainable: Container[int] = ()) -> Mapping[str, Tracked]:
    """Return what each tensor named in a TrackableObjectGraph is for, by its key.

    Args:
        graph: the value of ``_CHECKPOINTABLE_OBJECT_GRAPH``.
        untrainable: nodes that a SavedModel records as variables that are not trainable, see
            `metagraph.read_untrainable`.

    Raises `Malformed`.
    """
    parsed = trackable.parse(graph)
    roles = _Roles(parsed, untrainable)
    found: dict[str, Tracked] = {}
    for saved, role in zip(parsed.saved, roles.all(), strict=True):
        for part in _TENSORS_OF_OTHERS[: 1 if saved.name == _VALUE else None]:
            key = saved.key + part
            known = found.get(key)
            if known is None or _PREFERRED[role] < _PREFERRED[known.role]:
                found[key] = Tracked(key, saved.full_name, role)
    return found


class _Reach:
    """How each node is reached from the root.

    Attributes:
        ways: by node, the ways in which it is reached; none for one that is not reached.
        marks: by node.
        optimizers: where the model's paths enter an optimizer.
        owners: the nodes from which they do.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.ways = bytearray(len(graph))
        self.marks = array("I", bytes(4 * len(graph)))
        self.optimizers: set[int] = set()
        self.owners: set[int] = set()
        self._walk()
        self._mark_members()

    def _walk(self) -> None:
        graph, ways = self._graph, self.ways
        ways[0] = _OPTIMIZER if graph.is_optimizer(0) else _MODEL
        self.optimizers |= {0} if ways[0] == _OPTIMIZER else set()
        pending = [ways[0]]
        while pending:
            node, way = divmod(pending.pop(), 16)
            for edge in graph.edges(node):
                target = graph.targets[edge]
                onward = self._onward(node, way, edge)
                if not ways[target] & onward:
                    ways[target] |= onward
                    pending.append(target * 16 + onward)

    def _onward(self, node: int, way: int, edge: int) -> int:
        """Return the way in which `edge` reaches its target, and mark that."""
        target, told = self._graph.targets[edge], self._graph.told[edge]
        self.marks[target] |= told & (_LISTS | trackable.STATISTIC)
        if told & trackable.SAVES or (told & trackable.STEP and node == 0):
            self.marks[target] |= _COUNTER
        if way == _MODEL:
            return self._from_model(node, target, told)
        if way == _OPTIMIZER and told & trackable.TRAINABLE:
            self.marks[target] |= _OPTIMIZED
            return _MODEL
        return _SHADOW if way == _OPTIMIZER and told & trackable.AVERAGES else way

    def _from_model(self, node: int, target: int, told: int) -> int:
        kind = self._graph.kinds[node]
        if (
            told & trackable.OPTIMIZER
            or self._graph.is_optimizer(target)
            or _one_of_both(trackable.ITER, trackable.HYPER, told, kind)
        ):
            self.optimizers.add(target)
            self.owners.add(node)
            return _OPTIMIZER
        metric = _one_of_both(trackable.TOTAL, trackable.COUNT, told, kind)
        return _ASIDE if told & trackable.ASIDE or metric else _MODEL

    def _mark_members(self) -> None:
        """Mark what the lists hold."""
        graph, marks = self._graph, self.marks
        for node in range(len(graph)):
            listing = marks[node] & (_LISTS | _OPTIMIZED)
            if listing:
                for edge in graph.edges(node):
                    marks[graph.targets[edge]] |= listing << _LISTED


def _one_of_both(first: int, second: int, told: int, kind: int) -> bool:
    """Whether an edge tells one of two things and its node has edges for both."""
    return bool(told & (first | second) and kind & first and kind & second)


class _Groups:
    """Which variables belong to one model, and whether an optimizer lists what it trains there.

    What is connected is one group, once the root and other objects that merely hold models next
    to optimizers are taken away. A Keras model holds its own optimizer and stays.
    """

    def __init__(self, graph: Graph, reach: _Reach) -> None:
        self._graph, self._reach = graph, reach
        self._parents = array("I", range(len(graph)))
        self._trained: set[int] = set()
        if reach.optimizers and all(map(self._lists, reach.optimizers)):
            self._connect()

    def fixed(self, node: int) -> bool:
        """Whether `node` is in a group with variables that optimizers list, but not listed."""
        if self._reach.marks[node] & _OPTIMIZED << _LISTED:
            return False
        return bool(self._trained) and self._find(node) in self._trained

    def _lists(self, optimizer: int) -> bool:
        """Whether an optimizer lists what it trains: only those of Keras 3 do, once built."""
        graph = self._graph
        return any(
            graph.told[edge] & trackable.TRAINABLE and graph.edges(graph.targets[edge])
            for edge in graph.edges(optimizer)
        )

    def _connect(self) -> None:
        graph = self._graph
        inside = [self._inside(node) for node in range(len(graph))]
        for node in range(len(graph)):
            for edge in graph.edges(node) if inside[node] else ():
                if inside[graph.targets[edge]]:
                    self._parents[self._find(graph.targets[edge])] = self._find(node)
        marks = self._reach.marks
        self._trained = {
            self._find(node) for node in range(len(graph)) if marks[node] & _OPTIMIZED << _LISTED
        }

    def _inside(self, node: int) -> bool:
        if not self._reach.ways[node] & _MODEL:
            return False
        holder = node == 0 or node in self._reach.owners
        return not holder or bool(self._graph.kinds[node] & trackable.KERAS_MODEL)

    def _find(self, node: int) -> int:
        parents = self._parents
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node


class _Roles:
    """The roles of everything saved."""

    def __init__(self, graph: Graph, untrainable: Container[int]) -> None:
        self._graph = graph
        self._untrainable = untrainable
        self._reach = _Reach(graph)
        self._groups = _Groups(graph, self._reach)

    def all(self) -> Iterator[Role]:
        """Yield the role of each of `Graph.saved`; of a variable's twin, that of the variable."""
        saved = self._graph.saved
        roles = [self._role(each) for each in saved]
        twins = [self._is_twin(each) for each in saved]
        by_name: dict[str, set[Role]] = {}
        for each, role, twin in zip(saved, roles, twins, strict=True):
            if not twin:
                by_name.setdefault(each.full_name, set()).add(role)
        for each, role, twin in zip(saved, roles, twins, strict=True):
            fixed = twin and by_name.get(each.full_name) == {Role.FIXED}
            yield Role.FIXED if fixed else role

    def _is_twin(self, saved: Saved) -> bool:
        listed = self._reach.marks[saved.node] >> _LISTED & _LISTS
        return listed == trackable.TWINS and bool(saved.full_name)

    def _role(self, saved: Saved) -> Role:
        node = saved.node
        if node in self._graph.slots:
            return Role.OTHER_SHADOW if node in self._graph.averages else Role.OPTIMIZER
        ways = self._reach.ways[node]
        if ways and not ways & _MODEL:
            if ways & (_SHADOW | _OPTIMIZER):
                return Role.OTHER_SHADOW if ways & _SHADOW else Role.OPTIMIZER
            return Role.FIXED
        return self._of_model(saved) if saved.name == _VALUE else Role.FIXED

    def _of_model(self, saved: Saved) -> Role:
        node, marks = saved.node, self._reach.marks[saved.node]
        listed = marks >> _LISTED
        if marks & _COUNTER:
            return Role.COUNTER
        if listed & trackable.TRAINABLE:
            return Role.VARIABLE
        if marks & trackable.STATISTIC or _last(saved.full_name) in trackable.STATISTICS:
            return Role.STATISTICS
        if listed & trackable.FROZEN or node in self._untrainable or self._groups.fixed(node):
            return Role.FIXED
        return Role.VARIABLE


def _last(full_name: str) -> str:
    return full_name.rpartition("/")[2]
