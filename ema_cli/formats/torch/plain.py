"""What of a pickle can be written again so that ``torch.load(weights_only=True)`` takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ema_cli.errors import UnsupportedInput
from ema_cli.formats.torch.nodes import DEPTH_LIMIT, Global, Opaque, Ordered, TensorRef
from ema_cli.formats.torch.policy import judge
from ema_cli.text import shorten

# Longer ones take an opcode that the loader refuses.
INTEGER_LIMIT = 255
# No more paths are told: a file may hold millions of objects.
TOLD_LIMIT = 1000

# The keys that lead somewhere, innermost first: ``(key, (key, None))``.
_Path = tuple[Any, Any] | None

_GONE: Any = object()
_SCALARS = frozenset({type(None), bool, float, complex, str, bytes, bytearray})
# Objects that are data: their arguments say all about them.
_DATA = frozenset({Global("torch", "device"), Global("collections", "Counter")})


def integer_length(value: int) -> int:
    """Return in how many bytes of two's complement a pickle holds an integer."""
    return ((value if value >= 0 else ~value).bit_length() >> 3) + 1


def plain(root: Any) -> tuple[Any, list[str]]:
    """Return a copy of `root` that can be encoded, and the paths of what was left out.

    Left out are objects of other classes, frozen sets, huge integers, storages outside of tensors,
    what hangs on tensors as attributes, and what holds itself; a key goes with its value, a tuple
    with any of its parts. Tensors are not copied, and what was shared stays shared. When nothing
    is left the copy is None.
    """
    copier = _Copier()
    made = copier.copy(root, None)
    told = [_text(path) for path in copier.dropped[:TOLD_LIMIT]]
    if len(copier.dropped) > TOLD_LIMIT:
        told.append(f"and {len(copier.dropped) - TOLD_LIMIT:,} more")
    return (None if made is _GONE else made), told


class _Copier:
    """One walk over a tree.

    Attributes:
        dropped: the paths of what was left out.
        memo: what became of each container, by its identity.
        open: the containers that are being copied.
    """

    def __init__(self) -> None:
        self.dropped: list[_Path] = []
        self.memo: dict[int, Any] = {}
        self.open: set[int] = set()
        self._containers: dict[type, Callable[[Any, _Path], Any]] = {
            list: self._list,
            tuple: self._tuple,
            set: self._set,
            dict: self._dict,
            Ordered: self._ordered,
            Opaque: self._opaque,
            TensorRef: self._tensor,
        }

    def copy(self, node: Any, path: _Path) -> Any:
        """Return a copy of any node, or the mark for nothing, which is then on record."""
        container = self._containers.get(type(node))
        if container is None:
            made = node if _is_plain(node) else _GONE
        elif id(node) in self.open:
            made = _GONE
        elif id(node) in self.memo:
            made = self.memo[id(node)]
        else:
            if len(self.open) >= DEPTH_LIMIT:
                raise _too_deep(path)
            self.open.add(id(node))
            made = self.memo[id(node)] = container(node, path)
            self.open.remove(id(node))
        if made is _GONE:
            self.dropped.append(path)
        return made

    def _list(self, items: Sequence[Any], path: _Path) -> Any:
        kept = []
        for place, item in enumerate(items):
            made = self.copy(item, (place, path))
            if made is not _GONE:
                kept.append(made)
        return kept

    def _tuple(self, items: tuple[Any, ...], path: _Path) -> Any:
        count = len(self.dropped)
        kept = self._list(items, path)
        if len(kept) < len(items):
            del self.dropped[count:]
            return _GONE
        same = all(new is old for new, old in zip(kept, items, strict=True))
        return items if same else tuple(kept)

    def _set(self, items: set[Any], path: _Path) -> Any:
        return set(self._list(list(items), path))

    def _dict(self, pairs: dict[Any, Any], path: _Path) -> dict[Any, Any]:
        return self._fill({}, pairs, path)

    def _ordered(self, pairs: Ordered, path: _Path) -> Ordered:
        made = Ordered()
        self._fill(made, pairs, path)
        made.attributes = self._fill({}, pairs.attributes, path)
        return made

    def _fill(self, made: dict[Any, Any], pairs: dict[Any, Any], path: _Path) -> dict[Any, Any]:
        for key, value in pairs.items():
            place = (key, path)
            new = self.copy(key, place)
            if new is not _GONE:
                value = self.copy(value, place)
                if value is not _GONE:
                    made[new] = value
        return made

    def _opaque(self, node: Opaque, path: _Path) -> Any:
        count = len(self.dropped)
        args = _GONE
        if node.callable in _DATA and not (node.items or node.pairs or node.state):
            args = self.copy(node.args, path)
        if args is _GONE or len(self.dropped) != count:
            del self.dropped[count:]
            return _GONE
        return Opaque(node.callable, args, node.where)

    def _tensor(self, tensor: TensorRef, path: _Path) -> Any:
        if tensor.attributes is None:
            return tensor
        self.dropped.append(("(attributes)", path))
        return tensor.but(attributes=None)


def _too_deep(path: _Path) -> UnsupportedInput:
    return UnsupportedInput(
        f"'{_text(path)}' nests deeper than {DEPTH_LIMIT} levels", "leave it out of the output"
    )


def _is_plain(node: Any) -> bool:
    if type(node) is int:
        return integer_length(node) <= INTEGER_LIMIT
    if type(node) is Global:
        return judge([node]) == ((), ())
    return type(node) in _SCALARS


def _text(path: _Path) -> str:
    """Return a path for people: ``optimizer.state.0``."""
    keys: list[str] = []
    while path is not None:
        key, path = path
        if type(key) is Global:
            key = key.full
        known = type(key) in (str, int, float, bool, type(None))
        keys.append(shorten(str(key) if known else f"({type(key).__name__})", 80))
    return shorten(".".join(reversed(keys)), 400) or "(everything)"
