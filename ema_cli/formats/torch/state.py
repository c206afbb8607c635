"""What a pickle machine holds between opcodes, and the limits on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ema_cli.errors import DamagedFile, UnsupportedInput
from ema_cli.formats.torch.nodes import Global, Opaque, Ordered, StorageRef, TensorRef
from ema_cli.text import shorten

# In units of about 64 bytes: an empty dict or a small tuple is one, a set or an object is four.
# A tensor takes about 11, so this allows for 380,000 of them.
ROOM_LIMIT = 1 << 22
# Python's dicts take quadratic time when many keys were chosen to collide; only the hashes of
# strings are salted. Keys that are neither strings nor count up from zero are therefore limited:
# 65,536 small integers, or 4,096 other keys.
KEY_LIMIT = 1 << 16
_ODD_KEY = 16
_SMALL = 1 << 20
# A key that is a tuple is hashed anew each time it is used, with all that it holds.
_KEY_PARTS = 64

COUNT_LIMIT = 1 << 63

_SCALARS = frozenset({str, int, float, bool, type(None), bytes, complex})
_RECORDS = frozenset({Opaque, TensorRef, Global, StorageRef})


class State:
    """The state of one run.

    Attributes:
        data: the file or member that holds the pickle; `start` and `pos` count its bytes.
        path: the file, for errors; `what` is what the pickle is called in them.
        stack: what was pushed since the last mark; `marks` holds what was pushed before each.
        memo: the numbered objects.
        globals: every name met so far, in order of appearance.
        dtypes: the objects that are NumPy dtypes, whose arguments decide whether they are safe.
        storages: the storages met so far, by key.
        room: units of memory that are left; `keys` is what is left of `KEY_LIMIT`.
    """

    __slots__ = (
        "data",
        "dtypes",
        "globals",
        "keys",
        "marks",
        "memo",
        "path",
        "pos",
        "room",
        "stack",
        "start",
        "storages",
        "what",
    )

    def __init__(self, data: bytes, path: str, what: str, start: int) -> None:
        self.data = data
        self.path = path
        self.what = what
        self.pos = self.start = start
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[Global, None] = {}
        self.dtypes: list[Opaque] = []
        self.storages: dict[str, StorageRef] = {}
        self.room = ROOM_LIMIT
        self.keys = KEY_LIMIT

    def fail(self, reason: str) -> NoReturn:
        """Raise `DamagedFile` with the place in the pickle."""
        place = f"{self.what}, byte {self.pos - self.start:,}"
        raise DamagedFile(self.path, f"{place}: {reason}")

    def refuse(self, reason: str) -> NoReturn:
        """Raise `UnsupportedInput` for what is known, but never written by torch.save."""
        raise UnsupportedInput(
            f"{shorten(self.path, 1000)}: {self.what}: {reason}",
            "load it with the program that wrote it and save it again with torch.save",
        )

    def take(self, length: int) -> bytes:
        """Return the next `length` bytes; fails when fewer are left."""
        end = self.pos + length
        if end > len(self.data):
            left = len(self.data) - self.pos
            self.fail(f"expected {length:,} more bytes, found {left:,}")
        piece = self.data[self.pos : end]
        self.pos = end
        return piece

    def length(self, width: int) -> int:
        """Return the length that the next `width` bytes tell."""
        return int.from_bytes(self.take(width), "little")

    def count(self, number: Any, what: str) -> int:
        """Return a number that must count `what`; fails for others."""
        if type(number) is not int or not 0 <= number < COUNT_LIMIT:
            found = str(number) if type(number) is int else f"a {type(number).__name__}"
            self.fail(f"expected a number of {what} from 0 to 2^63 - 1, found {shorten(found)}")
        return number

    def make(self, units: int = 1) -> None:
        """Account for a container about to be made."""
        self.room -= units
        if self.room < 0:
            self.fail("expected a pickle of fewer lists, tuples, dicts and objects")

    def pop_mark(self) -> list[Any]:
        """Return what was pushed since the last mark."""
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def name(self, module: str, name: str) -> Global:
        """Return an inert name, and remember that it was met."""
        if not module or not name or len(module) + len(name) > 1000:
            self.fail(f"expected a module and a name, found '{shorten(module)}' '{shorten(name)}'")
        found = Global(module, name)
        self.globals[found] = None
        return found

    # ------------------------------------------------------------------------ keys

    def check_keys(self, keys: Sequence[Any], count: int) -> None:
        """Check that `keys` can be hashed, in linear time, into a container of `count` keys."""
        for place, key in enumerate(keys, count):
            kind = type(key)
            if kind is str or (kind is int and key == place):
                continue
            if kind is int and 0 <= key < _SMALL:
                self.keys -= 1
            else:
                self.keys -= _ODD_KEY * self._parts(key, _KEY_PARTS)
            if self.keys < 0:
                self.fail("expected fewer keys that are not strings")

    def _parts(self, key: Any, left: int) -> int:
        """Return of how many parts a key consists, at most `left`."""
        kind = type(key)
        if kind in _SCALARS or kind in _RECORDS:
            return 1
        if kind is not tuple and kind is not frozenset:
            self.fail(f"expected a key that can be hashed, found a {kind.__name__}")
        parts = 1
        for item in key:
            if parts >= left:
                self.fail(f"expected a key of at most {_KEY_PARTS} parts, found more")
            parts += self._parts(item, left - parts)
        return parts

    def set_pairs(self, target: Any, flat: list[Any]) -> None:
        """Put keys and values, which alternate in `flat`, into a mapping or a record."""
        keys, values = flat[::2], flat[1::2]
        if len(keys) != len(values):
            self.fail("expected pairs of keys and values, found a key without a value")
        kind = type(target)
        if kind is Opaque:
            target.pairs.extend(zip(keys, values, strict=True))
            return
        if kind is not dict and kind is not Ordered:
            self.fail(f"expected a dict to put keys into, found a {kind.__name__}")
        count = len(target)
        self.check_keys(keys, count)
        target.update(zip(keys, values, strict=True))
        if len(target) != count + len(keys):
            self.fail("a key stands twice in a dict")


# What makes a record or data of the arguments of a call; None leaves the call opaque.
Builder = Callable[[State, tuple[Any, ...]], Any]
