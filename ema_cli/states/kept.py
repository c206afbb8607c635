"""What tells of a skeleton: its files and their bytes, as plain data and as JSON, checked.

A document is hostile until it is checked: its names become paths, its numbers offsets.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ema_cli.errors import DamagedFile
from ema_cli.formats import FORMATS
from ema_cli.tensors import Role
from ema_cli.text import plural, shorten

Span = tuple[int, int]

FILE_LIMIT = 100_000
PIECE_LIMIT = 4_000_000
NAME_LIMIT = 2_000_000

_LONGEST_NAME = 255


class Kept(NamedTuple):
    """One file of a skeleton.

    Attributes:
        name: its path inside the directory; only that of a folder's file has a "/", one.
        size: of the file, holes included.
        pieces: (offset, length) of the bytes that are kept, ascending, joined where adjacent.
        crc: CRC-32C of the kept bytes, one after the other.
    """

    name: str
    size: int
    pieces: tuple[Span, ...]
    crc: int


class Skeleton(NamedTuple):
    """What is needed to read a kept structure again.

    Attributes:
        path: of the checkpoint inside the directory, as its format reads it.
        format: a key of `ema_cli.formats.FORMATS`.
        files: all there is in the directory.
        roles: the name of the `Role` of each tensor the checkpoint recorded one for; what told it,
            such as a graph beside the checkpoint, is not kept.
        roles_from: what recorded them, for people.
        full_names: how the training program calls tensors that are saved under other names.
        key: where the user said that the model is inside the checkpoint.
    """

    path: str
    format: str
    files: tuple[Kept, ...]
    roles: Mapping[str, str]
    roles_from: str
    full_names: Mapping[str, str]
    key: str

    def to_json(self) -> dict[str, Any]:
        """Return it as data that JSON has words for."""
        files = [
            {**file._asdict(), "pieces": [list(piece) for piece in file.pieces]}
            for file in self.files
        ]
        return {
            **self._asdict(),
            "files": files,
            "roles": dict(self.roles),
            "full_names": dict(self.full_names),
        }

    @classmethod
    def from_json(cls, document: Any, where: str) -> Skeleton:
        """Return what `to_json` made, every field checked; `DamagedFile` names `where`."""
        try:
            skeleton = _parsed(document)
            check(skeleton)
        except Wrong as error:
            raise DamagedFile(where, str(error)) from None
        return skeleton


class Wrong(Exception):
    """A document does not tell of a skeleton."""


def check(skeleton: Skeleton) -> None:
    """Raise `Wrong` unless its names are those of a checkpoint of its format, and stay inside."""
    row = FORMATS.get(skeleton.format)
    if row is None:
        raise Wrong(f"expected the name of a format, found '{shorten(skeleton.format)}'")
    if skeleton.key and not row.nested:
        raise Wrong(f"expected no key in a {row.title}, found '{shorten(skeleton.key)}'")
    names = [file.name for file in skeleton.files]
    if not names or len(set(names)) != len(names):
        raise Wrong("expected files of different names, found none, or one name twice")
    bare = names
    if row.kind == "folder":
        folder = skeleton.path.partition("/")[0]
        start = f"{folder}/"
        bare = [name.removeprefix(start) for name in names if name.startswith(start)]
        fits = is_bare(folder) and skeleton.path in (folder, *names)
    elif row.kind == "file":
        fits = names == [skeleton.path]
    else:
        fits = is_bare(skeleton.path) and skeleton.path + row.suffix in names
        fits = fits and all(name.startswith(skeleton.path) for name in names)
    if not fits or len(bare) < len(names) or not all(map(is_bare, bare)):
        raise Wrong(f"expected the files of a {row.title} '{shorten(skeleton.path)}'")


def is_bare(name: str) -> bool:
    """Whether a name cannot lead out of its directory, and a file can have it."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    try:
        return len(os.fsencode(name)) <= _LONGEST_NAME
    except UnicodeEncodeError:
        return False


def _parsed(document: Any) -> Skeleton:
    """Return the skeleton of a document, its fields of the right types and its numbers sound."""
    fields = _fields(document, Skeleton._fields)
    files = tuple(_kept(file) for file in _list(fields["files"], "files", FILE_LIMIT))
    if sum(len(file.pieces) for file in files) > PIECE_LIMIT:
        raise Wrong(f"expected at most {plural(PIECE_LIMIT, 'piece')}, found more")
    roles = _texts(fields["roles"], "roles")
    for role in roles.values():
        if role not in Role.__members__:
            raise Wrong(f"expected the name of a role, found '{shorten(role)}'")
    return Skeleton(
        _text(fields["path"], "path"),
        _text(fields["format"], "format"),
        files,
        roles,
        _text(fields["roles_from"], "roles_from"),
        _texts(fields["full_names"], "full_names"),
        _text(fields["key"], "key"),
    )


def _kept(value: Any) -> Kept:
    fields = _fields(value, Kept._fields)
    size = _number(fields["size"], "size", 1 << 63)
    pieces: list[Span] = []
    end = -1
    for piece in _list(fields["pieces"], "pieces", PIECE_LIMIT):
        offset, length = (_number(n, "piece", size + 1) for n in _pair(piece))
        if offset <= end or not 0 < length <= size - offset:
            raise Wrong("pieces: expected them to ascend, apart from each other, inside the file")
        pieces.append((offset, length))
        end = offset + length
    crc = _number(fields["crc"], "crc", 1 << 32)
    return Kept(_text(fields["name"], "name"), size, tuple(pieces), crc)


def _fields(value: Any, names: Sequence[str]) -> dict[str, Any]:
    if type(value) is not dict or value.keys() != set(names):
        raise Wrong(f"expected an object of {', '.join(names)}")
    return value


def _list(value: Any, what: str, limit: int) -> list[Any]:
    if type(value) is not list or len(value) > limit:
        raise Wrong(f"{what}: expected a list of at most {limit:,}")
    return value


def _pair(value: Any) -> list[Any]:
    if type(value) is not list or len(value) != 2:
        raise Wrong("pieces: expected pairs of an offset and a length")
    return value


def _number(value: Any, what: str, limit: int) -> int:
    if type(value) is not int or not 0 <= value < limit:
        raise Wrong(f"{what}: expected a number from 0 to {limit - 1:,}")
    return value


def _text(value: Any, what: str) -> str:
    if type(value) is not str:
        raise Wrong(f"{what}: expected a text")
    return value


def _texts(value: Any, what: str) -> dict[str, str]:
    if type(value) is not dict or len(value) > NAME_LIMIT:
        raise Wrong(f"{what}: expected at most {NAME_LIMIT:,} texts by name")
    return {_text(name, what): _text(text, what) for name, text in value.items()}
