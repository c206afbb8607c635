"""What the small files of a state say, as frozen data, every field checked when it is read.

Nothing in them is ever a path: slots and manifests are called by numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from ema_cli.errors import DamagedState
from ema_cli.states.skeleton import Skeleton
from ema_cli.tensors import DTYPES, Checkpoint, DType

VERSION = 1
# Shadows, shadows before zero-debias, counters of updates, and copies of the last checkpoint.
AVERAGE, BIASED, LOCAL_STEP, COPY = "average", "biased", "local_step", "copy"
_PARTS = (AVERAGE, BIASED, LOCAL_STEP, COPY)
_LONGEST = 1 << 62

T = TypeVar("T")


class Root(NamedTuple):
    """The one file that decides which generation counts.

    Attributes:
        uuid: of the state, made once.
        epoch: how many processes opened it for writing.
        generation: how many commits there were.
        slot: the number of the slot that holds the generation.
        plan: CRC-32C of the file ``plan``.
        manifest: CRC-32C of the file ``manifest-<generation>``.
        ledger: valid bytes of the file ``ledger``, and their CRC-32C.
    """

    uuid: str
    epoch: int
    generation: int
    slot: int
    plan: int
    manifest: int
    ledger: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """Return the document of the file ``ROOT``."""
        return {"state": VERSION, **self._asdict()}

    @classmethod
    def from_json(cls, document: Any, where: str) -> Root:
        """Check a document; raises `DamagedState`."""
        take = Fields(document, where)
        version = take.count("state")
        if version != VERSION:
            raise DamagedState(where, f"expected version {VERSION} of a state, found {version}")
        ledger = take.items("ledger", _count)
        if len(ledger) != 2:
            raise DamagedState(where, "'ledger': expected a length and a checksum")
        return cls(
            take.text("uuid"),
            take.count("epoch"),
            take.count("generation"),
            take.count("slot"),
            take.count("plan"),
            take.count("manifest"),
            (ledger[0], ledger[1]),
        )


class Held(NamedTuple):
    """One tensor of a slot: `part` of what, of which average, and the tensors it stands for."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    part: str
    average: int
    variables: tuple[str, ...]

    def to_json(self) -> list[Any]:
        """Return it as a list, names last."""
        head = [self.name, self.dtype.name, list(self.shape), self.part, self.average]
        return head if self.variables == (self.name,) else [*head, list(self.variables)]

    @classmethod
    def from_json(cls, document: Any, where: str) -> Held:
        """Check a list; raises `DamagedState`."""
        if not isinstance(document, list) or len(document) not in (5, 6):
            raise DamagedState(where, "expected a tensor of the slot")
        name, dtype, shape, part, average, *rest = document
        variables = rest[0] if rest else [name]
        good = (
            _is_text(name)
            and _is_text(dtype)
            and dtype in DTYPES
            and DTYPES[dtype].bits >= 8
            and isinstance(shape, list)
            and all(map(_is_count, shape))
            and math.prod(shape) < _LONGEST
            and _is_text(part)
            and part in _PARTS
            and _is_count(average)
            and isinstance(variables, list)
            and variables
            and all(map(_is_text, variables))
        )
        if not good:
            raise DamagedState(where, "expected a tensor of the slot, found something else")
        return cls(name, DTYPES[dtype], tuple(shape), part, average, tuple(variables))


class Manifest(NamedTuple):
    """What one generation consists of.

    Attributes:
        generation: which.
        held: the tensors of the slot in the order of their bytes.
        checksums: CRC-32C of each chunk of the slot file.
        skeleton: the structure of the last applied checkpoint, or None where there is none.
        complete: whether optimizer state and what stands beside the model are held too.
        own: what the one who averages keeps.
    """

    generation: int
    held: tuple[Held, ...]
    checksums: tuple[int, ...]
    skeleton: Skeleton | None
    complete: bool
    own: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the document of the file ``manifest-<generation>``."""
        return {
            "generation": self.generation,
            "held": [held.to_json() for held in self.held],
            "checksums": list(self.checksums),
            "skeleton": self.skeleton and self.skeleton.to_json(),
            "complete": self.complete,
            "own": dict(self.own),
        }

    @classmethod
    def from_json(cls, document: Any, where: str) -> Manifest:
        """Check a document; raises `DamagedState`."""
        take = Fields(document, where)
        held = take.items("held", Held.from_json)
        if len({one.name for one in held}) < len(held):
            raise DamagedState(where, "two tensors of the slot have one name")
        skeleton = take.any("skeleton")
        return cls(
            take.count("generation"),
            held,
            take.items("checksums", _checksum),
            None if skeleton is None else Skeleton.from_json(skeleton, where),
            bool(take.any("complete")),
            take.mapping("own"),
        )


class Row(NamedTuple):
    """One line of the ledger: a checkpoint that was applied, or that was missed.

    Attributes:
        step: its training step, or None when nothing told one.
        name: what told it from the others.
        path: where it was; for people.
        files: path, size, mtime in ns and SHA-256 of the header of each of its files.
        coefficients: what it was mixed in with, for each average; none where it was missed.
        missed: why it was not applied, or empty.
        generation: the commit that told of it.
    """

    step: int | None
    name: str
    path: str
    files: tuple[tuple[str, int, int, str], ...]
    coefficients: tuple[float, ...]
    missed: str
    generation: int

    def to_json(self) -> dict[str, Any]:
        """Return the document of a line."""
        numbers = [c.hex() for c in self.coefficients]
        return {**self._asdict(), "coefficients": numbers}

    @classmethod
    def from_json(cls, document: Any, where: str) -> Row:
        """Check a document; raises `DamagedState`."""
        take = Fields(document, where)
        step = take.any("step")
        if step is not None and (type(step) is not int or abs(step) >= _LONGEST):
            raise DamagedState(where, "'step': expected a whole number")
        return cls(
            step,
            _path(take.text("name"), where),
            _path(take.text("path"), where),
            take.items("files", _file),
            take.items("coefficients", _hexadecimal),
            take.text("missed"),
            take.count("generation"),
        )


def row_of(
    checkpoint: Checkpoint, generation: int, coefficients: Sequence[float], missed: str = ""
) -> Row:
    """Return the line of the ledger for a checkpoint."""
    name, path, found = checkpoint.name, checkpoint.path, files_of(checkpoint)
    return Row(checkpoint.step, name, path, found, tuple(coefficients), missed, generation)


def files_of(checkpoint: Checkpoint) -> tuple[tuple[str, int, int, str], ...]:
    """Return path, size, mtime in ns and SHA-256 of the header of each file of a checkpoint."""
    return tuple(
        (stamp.path, stamp.size, stamp.mtime_ns, digest)
        for stamp, digest in zip(checkpoint.files, checkpoint.digests, strict=True)
        if stamp.path
    )


class Fields:
    """The members of a JSON document; each is there and of its type, or `DamagedState`."""

    def __init__(self, document: Any, where: str) -> None:
        if not isinstance(document, dict):
            raise DamagedState(where, "expected a JSON object")
        self._document = document
        self._where = where

    def any(self, key: str) -> Any:
        """Return a member."""
        if key not in self._document:
            raise DamagedState(self._where, f"'{key}' is missing")
        return self._document[key]

    def _checked(self, key: str, kind: type[T], what: str) -> T:
        value = self.any(key)
        if not isinstance(value, kind):
            raise DamagedState(self._where, f"'{key}': expected {what}")
        return value

    def text(self, key: str) -> str:
        """Return a string."""
        return self._checked(key, str, "a string")

    def mapping(self, key: str) -> dict[str, Any]:
        """Return an object."""
        return self._checked(key, dict, "an object")

    def count(self, key: str) -> int:
        """Return a whole number from 0."""
        return _count(self.any(key), f"{self._where}: '{key}'")

    def items(self, key: str, check: Callable[[Any, str], T]) -> tuple[T, ...]:
        """Return an array, each item checked."""
        found: Sequence[Any] = self._checked(key, list, "an array")
        return tuple([check(item, f"{self._where}: '{key}'") for item in found])


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LONGEST


def _count(value: Any, where: str) -> int:
    if not _is_count(value):
        raise DamagedState(where, "expected a whole number from 0")
    return int(value)


def _checksum(value: Any, where: str) -> int:
    if not _is_count(value) or value >= 1 << 32:
        raise DamagedState(where, "expected a checksum of 32 bits")
    return int(value)


def _hexadecimal(value: Any, where: str) -> float:
    try:
        return float.fromhex(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise DamagedState(where, "expected a hexadecimal number") from error


def _file(value: Any, where: str) -> tuple[str, int, int, str]:
    kinds = (str, int, int, str)
    if not isinstance(value, list) or [type(item) for item in value] != list(kinds):
        raise DamagedState(where, "expected name, size, time and digest of a file")
    name, size, time, digest = value
    return _path(name, where), size, time, digest


def _path(value: str, where: str) -> str:
    if "\0" in value:
        raise DamagedState(where, "expected a name or a path, found a NUL in it")
    return value
