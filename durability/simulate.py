"""A disk that loses power: which directories a crash can leave behind a list of operations.

The model is stricter than any real file system. What was not synced is lost or kept in any
combination: data in sectors of 4 KiB, sizes, and operations on names. Syncing a file makes its
bytes and its size durable but not its name; syncing a directory makes its names durable and
nothing else.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

SECTOR = 4096
ROOT = 0  # the inode of the directory everything is in


@dataclass(frozen=True)
class Write:
    """Bytes written into a file; its size is an operation of its own."""

    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Size:
    """A file's size set, or only raised to `n_bytes` (`grow`)."""

    inode: int
    n_bytes: int
    grow: bool


@dataclass(frozen=True)
class Link:
    """A name given to a file or directory."""

    directory: int
    name: str
    inode: int


@dataclass(frozen=True)
class Unlink:
    """A name taken away."""

    directory: int
    name: str


@dataclass(frozen=True)
class Rename:
    """A name moved to another, which it replaces; durable with the target's directory."""

    directory: int
    name: str
    inode: int
    source: int
    source_name: str


@dataclass(frozen=True)
class New:
    """A file or directory that nothing names yet."""

    inode: int
    directory: bool


@dataclass(frozen=True)
class Sync:
    """fsync or fdatasync; `path` says of what, for people and for barrier mutation.

    One that `failed` loses the data for good: the kernel counts it as written from then on.
    """

    inode: int
    path: str
    failed: bool = False


@dataclass(frozen=True)
class Said:
    """A whole line that the command printed on standard output."""

    text: str


@dataclass(frozen=True)
class Began:
    """A step of the scenario began."""

    name: str


DataOperation = Write | Size
NameOperation = Link | Unlink | Rename
Operation = DataOperation | NameOperation | New | Sync | Said | Began
Tree = Mapping[str, bytes | None]  # None for a directory


@dataclass
class _File:
    durable: bytes = b""
    pending: list[DataOperation] = field(default_factory=list)


@dataclass
class _Directory:
    durable: dict[str, int] = field(default_factory=dict)
    pending: list[NameOperation] = field(default_factory=list)


class Disk:
    """What is durable, and what is only pending, after some operations."""

    def __init__(self) -> None:
        self._files: dict[int, _File] = {}
        self._directories: dict[int, _Directory] = {ROOT: _Directory()}

    def apply(self, operation: Operation) -> None:
        """Carry out one operation."""
        match operation:
            case New(inode, directory):
                if directory:
                    self._directories[inode] = _Directory()
                else:
                    self._files[inode] = _File()
            case Write() | Size():
                self._files[operation.inode].pending.append(operation)
            case Link() | Unlink() | Rename():
                self._directories[operation.directory].pending.append(operation)
            case Sync(inode, _, failed):
                self._lose(inode) if failed else self._sync(inode)
            case _:
                pass

    def _sync(self, inode: int) -> None:
        if inode in self._files:
            file = self._files[inode]
            file.durable, file.pending = content(file.durable, file.pending), []
            return
        directory = self._directories[inode]
        for operation in directory.pending:
            _change(directory.durable, operation)
            if isinstance(operation, Rename) and operation.source != operation.directory:
                _forget(self._directories[operation.source].durable, operation)
        directory.pending = []

    def _lose(self, inode: int) -> None:
        """Forget what was written: no later fsync will write it, and nobody is told again."""
        if inode in self._files:
            file = self._files[inode]
            file.pending = [o for o in file.pending if not isinstance(o, Write)]

    def settle(self) -> None:
        """Make everything durable, as time does."""
        for inode in (*self._directories, *self._files):
            self._sync(inode)

    def crash(self, chance: random.Random | None, kept: float = 0.0) -> Tree:
        """Return the tree a crash leaves.

        `kept` is the share of pending operations that survive, chosen by `chance`; without it all
        or nothing survives.
        """

        def survives() -> bool:
            return kept >= 1 if chance is None else chance.random() < kept

        tree: dict[str, bytes | None] = {}
        names = {inode: dict(d.durable) for inode, d in self._directories.items()}
        for inode, directory in self._directories.items():
            for operation in directory.pending:
                if survives():
                    _change(names[inode], operation)
                    if isinstance(operation, Rename) and operation.source != inode:
                        _forget(names[operation.source], operation)
        contents: dict[int, bytes] = {}
        todo = [("", ROOT)]
        while todo:
            path, inode = todo.pop()
            for name, child in names[inode].items():
                below = f"{path}/{name}" if path else name
                if child in self._directories:
                    tree[below] = None
                    todo.append((below, child))
                    continue
                if child not in contents:
                    file = self._files[child]
                    pieces = [p for o in file.pending for p in sectors(o) if survives()]
                    contents[child] = content(file.durable, pieces)
                tree[below] = contents[child]
        return tree


def _change(names: dict[str, int], operation: NameOperation) -> None:
    match operation:
        case Link(_, name, inode):
            names[name] = inode
        case Unlink(_, name):
            names.pop(name, None)
        case Rename(directory, name, inode, source, _):
            names[name] = inode
            if source == directory:
                _forget(names, operation)


def _forget(names: dict[str, int], renamed: Rename) -> None:
    if names.get(renamed.source_name) == renamed.inode:
        del names[renamed.source_name]


def sectors(operation: DataOperation) -> Sequence[DataOperation]:
    """Return the parts of an operation that survive or are lost independently."""
    if not isinstance(operation, Write):
        return [operation]
    parts = []
    at, end = operation.offset, operation.offset + len(operation.data)
    while at < end:
        stop = min(end, (at // SECTOR + 1) * SECTOR)
        data = operation.data[at - operation.offset : stop - operation.offset]
        parts.append(Write(operation.inode, at, data))
        at = stop
    return parts


def content(before: bytes, operations: Iterable[DataOperation]) -> bytes:
    """Return what a file holds after some operations; bytes beyond its size do not count."""
    data, size, changed = bytearray(before), len(before), False
    for operation in operations:
        changed = True
        if isinstance(operation, Write):
            end = operation.offset + len(operation.data)
            if len(data) < end:
                data.extend(bytes(end - len(data)))
            data[operation.offset : end] = operation.data
        elif operation.grow:
            size = max(size, operation.n_bytes)
        else:
            size = operation.n_bytes
            del data[size:]
    if not changed:
        return before
    if len(data) < size:
        data.extend(bytes(size - len(data)))
    return bytes(data[:size])


def identity(tree: Tree) -> int:
    """Return a number that is equal for equal trees."""
    return hash(tuple(sorted((path, hash(data)) for path, data in tree.items())))


def build(tree: Tree, where: str) -> None:
    """Make the directory `where` hold exactly this tree."""
    shutil.rmtree(where, ignore_errors=True)
    os.mkdir(where, 0o700)
    for path in sorted(tree):  # a directory comes before what is in it
        data = tree[path]
        whole = f"{where}/{path}"
        if data is None:
            os.mkdir(whole, 0o700)
            continue
        fd = os.open(whole, os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(fd, data)
        os.close(fd)
