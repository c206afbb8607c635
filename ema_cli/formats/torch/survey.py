"""Walks what a pickle holds and keeps the paths that lead to tensors.

Dicts, lists, tuples and objects are followed; a module gives its parameters, buffers and modules
under the names its ``state_dict()`` would. One thing may stand in several places, so what a walk
would meet is counted first, entering each thing once, and the walk enters only what holds tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ema_cli.errors import DamagedFile
from ema_cli.formats.torch.nodes import (
    DEPTH_LIMIT,
    Global,
    Opaque,
    Ordered,
    StorageRef,
    TensorRef,
)
from ema_cli.text import shorten

# As many as an archive may have members.
TENSOR_LIMIT = 100_000
# Of all paths together, in characters: what stands in many places has as many.
PATH_LIMIT = 1 << 26
_STEP = 8

# Where the functions are that make tensors of all kinds.
_MAKERS = ("torch._utils", "torch._tensor")
_HOLDERS = frozenset({dict, Ordered, list, tuple, Opaque})


class Link(NamedTuple):
    """One step of a path.

    Attributes:
        name: the key, index or attribute, as text.
        node: what is there: a `TensorRef`, an `Opaque` tensor, or what leads to such.
        listed: whether ``state_dict()`` would list it; false for other attributes of a module.
    """

    name: str
    node: Any
    listed: bool = True


class Found(NamedTuple):
    """A tensor and a path that leads to it.

    Attributes:
        path: the names of its links, from the root.
        node: a `TensorRef`, or an `Opaque` for a tensor of a kind that is never averaged.
        listed: whether all its links are listed.
    """

    path: tuple[str, ...]
    node: Any
    listed: bool


class _Size(NamedTuple):
    """What a walk below a thing meets: tensors, characters of their paths, levels."""

    tensors: int
    length: int
    height: int


_NOTHING = _Size(0, 0, 0)
_TENSOR = _Size(1, 0, 0)


class Survey:
    """Which of the things in a pickle lead to tensors.

    Raises `DamagedFile` for nesting that is too deep and for paths that are too many.
    """

    def __init__(self, path: str, root: object) -> None:
        self.path = path
        self.root = root
        self._links: dict[int, list[Link]] = {}
        self._sizes: dict[int, _Size] = {}
        if not is_tensor(root):
            self._enter(root, 1)

    def _enter(self, node: Any, depth: int) -> _Size:
        known = self._sizes.get(id(node))
        if known is not None:
            return known
        if depth > DEPTH_LIMIT:
            raise DamagedFile(self.path, f"expected at most {DEPTH_LIMIT} levels of nesting")
        self._sizes[id(node)] = _NOTHING  # what leads back to itself is not followed again
        kept: list[Link] = []
        tensors = length = height = 0
        for link in links_of(node):
            inside = _TENSOR if is_tensor(link.node) else self._enter(link.node, depth + 1)
            if inside.tensors:
                kept.append(link)
                tensors += inside.tensors
                length += inside.length + inside.tensors * (len(link.name) + _STEP)
                height = max(height, inside.height + 1)
        size = _Size(tensors, length, height)
        self._check(size)
        self._links[id(node)] = kept
        self._sizes[id(node)] = size
        return size

    def _check(self, size: _Size) -> None:
        if size.tensors > TENSOR_LIMIT:
            raise DamagedFile(
                self.path, f"expected at most {TENSOR_LIMIT:,} tensors, found {size.tensors:,}"
            )
        if size.length > PATH_LIMIT or size.height > DEPTH_LIMIT:
            raise DamagedFile(self.path, "the paths that lead to its tensors are too long")

    def links(self, node: object) -> list[Link]:
        """Return the links of a node that lead to tensors, in the order of the pickle."""
        return self._links.get(id(node), [])

    def at(self, path: Sequence[str]) -> Any:
        """Return what is at a path from the root and leads to tensors, or None."""
        node: Any = self.root
        for name in path:
            node = next((link.node for link in self.links(node) if link.name == name), None)
        return node

    def passed(self, node: object) -> Iterator[Any]:
        """Yield a node and all below it that lead to tensors, each once."""
        seen: set[int] = set()
        waiting = [node]
        while waiting:
            one = waiting.pop()
            if id(one) not in seen and not is_tensor(one):
                seen.add(id(one))
                yield one
                waiting.extend(link.node for link in self.links(one))

    def tensors(self, node: object) -> Iterator[Found]:
        """Yield the tensors below a node, with paths from there."""
        found: list[Found] = []
        self._walk(node, (), True, found)
        return iter(found)

    def _walk(self, node: Any, path: tuple[str, ...], listed: bool, found: list[Found]) -> None:
        for name, child, own in self._links.get(id(node), ()):
            if is_tensor(child):
                found.append(Found((*path, name), child, listed and own))
            else:
                self._walk(child, (*path, name), listed and own, found)


def is_tensor(node: object) -> bool:
    """Whether this is a tensor, if only one of a kind that stays opaque."""
    if type(node) is not Opaque:
        return type(node) is TensorRef
    name = node.callable
    return type(name) is Global and name.module in _MAKERS and name.name[:9] == "_rebuild_"


def links_of(node: object) -> Iterator[Link]:
    """Yield what a thing holds and how that is called, as far as it may lead to tensors."""
    kind = type(node)
    if isinstance(node, Opaque):
        yield from _links_of_object(node)
    elif isinstance(node, dict):
        for key, child in node.items():
            if type(child) is TensorRef or type(child) in _HOLDERS:
                yield Link(_text(key), child)
    elif isinstance(node, list) or (isinstance(node, tuple) and kind is tuple):
        for place, child in enumerate(node):
            if type(child) is TensorRef or type(child) in _HOLDERS:
                yield Link(str(place), child)


def module_state(node: object) -> dict[Any, Any] | None:
    """Return the attributes of a pickled ``torch.nn.Module``, or None for anything else."""
    state = node.state if isinstance(node, Opaque) else None
    if isinstance(state, dict) and {"_parameters", "_buffers", "_modules"} <= state.keys():
        return state
    return None


def _links_of_object(node: Opaque) -> Iterator[Link]:
    state = module_state(node)
    if state is None:
        yield from links_of(node.items)
        yield from links_of(dict_of(node.pairs))
        parts = node.state if type(node.state) is tuple else (node.state,)
        for part in parts:  # attributes, and those that a class keeps in slots
            yield from links_of(part) if isinstance(part, dict) else ()
        return
    passing = state.get("_non_persistent_buffers_set")
    passing = passing if isinstance(passing, (set, frozenset)) else frozenset()
    for group in ("_parameters", "_buffers", "_modules"):
        for link in links_of(state[group]):
            yield link._replace(listed=group != "_buffers" or link.name not in passing)
    for link in links_of(state):
        if link.name not in ("_parameters", "_buffers", "_modules"):
            yield link._replace(listed=False)


def dict_of(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return pairs of keys and values as a dict, whatever the keys are."""
    return {_text(key): value for key, value in pairs}


def _text(key: object) -> str:
    """Return a key as text."""
    if type(key) is str:
        return key
    if isinstance(key, Global):
        return key.full
    if key is None or isinstance(key, (bool, int, float, complex, bytes)):
        return shorten(repr(key))
    if isinstance(key, tuple) and not isinstance(key, StorageRef):
        return ",".join(_text(part) for part in key)
    return shorten(repr(key)) if isinstance(key, (Opaque, TensorRef)) else "?"


def storages(root: object) -> dict[str, StorageRef]:
    """Return every storage that a pickle mentions, by key, in order of first appearance."""
    found: dict[str, StorageRef] = {}
    for node in everything(root):
        if isinstance(node, StorageRef):
            found.setdefault(node.key, node)
    return found


def everything(root: object) -> Iterator[Any]:
    """Yield all that a pickle holds, in its order, and what has parts once only.

    Also objects, keys and attributes, which no path leads to.
    """
    seen: set[int] = set()
    waiting: list[Any] = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, _WITH_PARTS) and not isinstance(node, (StorageRef, Global)):
            if id(node) in seen:
                continue
            seen.add(id(node))
            waiting.extend(reversed(_parts(node)))
        yield node


_WITH_PARTS = (dict, list, tuple, set, frozenset, Opaque, TensorRef)


def _parts(node: Any) -> Sequence[Any]:
    """Return all that a thing is made of, as a pickle has it."""
    if isinstance(node, dict):
        pairs = [part for pair in node.items() for part in pair]
        return [*pairs, node.attributes] if isinstance(node, Ordered) else pairs
    if isinstance(node, TensorRef):
        return [node.storage, node.attributes]
    if isinstance(node, Opaque):
        return [node.callable, node.args, *node.items, *node.pairs, node.state]
    return tuple(node)


def where(root: object, names: set[Global]) -> dict[Global, str]:
    """Return for each name a path to where it stands first, or what it makes, for people."""
    found: dict[Global, str] = {}
    seen: set[int] = set()
    waiting: list[tuple[Any, _Steps]] = [(root, None)]
    while waiting and len(found) < len(names):
        node, steps = waiting.pop()
        if isinstance(node, Global):
            if node in names:
                found.setdefault(node, _path(steps))
            continue
        if id(node) in seen or not isinstance(node, _WITH_PARTS):
            continue
        seen.add(id(node))
        waiting.extend(reversed([(part, (name, steps)) for name, part in _named_parts(node)]))
    return found


# The names that lead somewhere, innermost first: ``(name, (name, None))``.
_Steps = tuple[Any, Any] | None


def _named_parts(node: Any) -> Iterator[tuple[object, Any]]:
    """Yield the parts of a thing and their keys; those of an object have none."""
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, Opaque):
        yield from ((None, part) for part in _parts(node))
    else:
        yield from enumerate(_parts(node))


def _path(steps: _Steps) -> str:
    names: list[str] = []
    while steps is not None:
        name, steps = steps
        if name is not None:
            names.append(shorten(_text(name), 80))
    return shorten("/".join(reversed(names)))
