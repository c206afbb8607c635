"""The files of a run as they are at one moment, so that what changes is seen without reading."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from ema_cli.formats import tensorflow

# Of each file its name within the run, size, time in ns and inode.
Signature = tuple[tuple[str, int, int, int], ...]
# Of the folders in a run, how deep files are looked at: a SavedModel has its variables in one.
_DEPTH = 2


class Files:
    """The files and folders of a run as they are at one moment.

    Args:
        found: size, time in ns and inode of each, by its name within the run.
        depth: how many folders down a search looks at entries.

    Attributes:
        entries: the signature of each entry.
    """

    def __init__(self, found: Mapping[str, tuple[int, int, int]], depth: int = 0) -> None:
        groups: dict[str, list[tuple[str, int, int, int]]] = {}
        for name in sorted(found):
            row = (name, *found[name])
            parts = name.split("/")
            own = ["/".join(parts[:k]) for k in range(1, len(parts) + 1)]
            stem = tensorflow.stem_of(name)
            for key in [*own, stem] if stem else own:
                groups.setdefault(key, []).append(row)
        self._groups = groups
        self.entries: Mapping[str, Signature] = {
            name: self.under(name) for name in found if name.count("/") <= depth
        }

    def under(self, name: str) -> Signature:
        """Return the signature of a file, of what a folder holds, or of the files of a prefix."""
        return tuple(self._groups.get(name, ()))


def list_files(root: str, depth: int, state: str) -> Files | None:
    """Return the files of a run, or None where it is not there."""
    found: dict[str, tuple[int, int, int]] = {}
    if not os.path.isdir(root):
        return None
    for name, entry in _walk(root, "", depth + _DEPTH, os.path.realpath(state)):
        status = _status(entry)
        if status is not None:
            found[name] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return Files(found, depth)


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Return what a file is; of a link to nothing, what the link is."""
    for follow in (True, False):
        with contextlib.suppress(OSError):
            return entry.stat(follow_symlinks=follow)
    return None  # gone meanwhile


def _walk(
    folder: str, within: str, depth: int, state: str
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield what lies in a folder and those in it, but for hidden entries and the state."""
    try:
        with os.scandir(folder) as listing:
            entries = list(listing)
    except OSError:
        return  # gone meanwhile, or a search will say why it cannot be listed
    for entry in entries:
        if entry.name.startswith("."):
            continue
        name = within + entry.name
        if not entry.is_dir():
            yield name, entry
        elif entry.name != os.path.basename(state) or os.path.realpath(entry.path) != state:
            yield name, entry
            if depth > 0:
                yield from _walk(entry.path, f"{name}/", depth - 1, state)
