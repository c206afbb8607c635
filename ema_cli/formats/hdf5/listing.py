"""Lists what an HDF5 file holds, for the child process: plain rows, no data."""

from __future__ import annotations

import re
from typing import Any

from ema_cli.formats.hdf5 import library
from ema_cli.formats.hdf5.library import Refused, child_of, h5d, h5g, h5s, texts
from ema_cli.formats.hdf5.names import SHADOWS_ATTRIBUTE

OBJECT_LIMIT = 400_000
DEPTH_LIMIT = 64
TEXT_LIMIT = 32 << 20

# Lists that Keras splits where they are long: into `weight_names0`, `weight_names1` and so on.
LISTS = ("layer_names", "weight_names")
_WHOLE = ("name", SHADOWS_ATTRIBUTE)
_GROUP_TEXTS = re.compile(rf"name|{SHADOWS_ATTRIBUTE}|(?:{'|'.join(LISTS)})\d*")
_ROOT_TEXTS = re.compile("keras_version|backend|model_config")


def listed(file: Any) -> dict[str, Any]:
    """Return the document that lists a file; see `ema_cli.formats.hdf5.structure`."""
    return _Listing(file).document()


class _Listing:
    """The rows so far, and which objects they are of."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._groups: list[list[Any]] = []
        self._datasets: list[list[Any]] = []
        self._others: list[list[Any]] = []
        self._seen: dict[int, str] = {}
        self._left = OBJECT_LIMIT
        self._text = 0

    def document(self) -> dict[str, Any]:
        root = h5g.open(self._file, b"/")
        # Addresses in the file count from where its own begin.
        base = self._file.get_create_plist().get_userblock()
        attributes, _ = self._texts(root, _ROOT_TEXTS, "")
        self._seen[library.address_of(root)] = "/"
        pending = [("", root)]
        while pending:
            path, group = pending.pop()
            if path.count("/") + 1 > DEPTH_LIMIT:
                raise Refused(f"expected groups at most {DEPTH_LIMIT} deep, found more", path)
            self._groups.append([path, *self._group_texts(group, path)])
            pending += self._members(path, group)
        return {
            "base": base,
            "root": {name: value[0] for name, value in attributes.items() if value},
            "groups": self._groups,
            "datasets": self._datasets,
            "others": self._others,
        }

    def _members(self, path: str, group: Any) -> list[tuple[str, Any]]:
        """Add the datasets of a group; return the groups in it."""
        groups = []
        found = library.members(group, path, self._left)
        self._left -= len(found)
        for name, address in found:
            inner = f"{path}/{name}" if path else name
            member = child_of(group, name)
            if isinstance(member, h5d.DatasetID):
                self._add(inner, member, address)
            elif isinstance(member, h5g.GroupID):
                before = self._seen.setdefault(address, inner)
                if before != inner:
                    raise Refused(f"this group is also '{before}': groups may not be shared", inner)
                groups.append((inner, member))
            else:
                self._others.append([inner, "a named type"])
        return groups

    def _add(self, path: str, dataset: Any, address: int) -> None:
        space = dataset.get_space()
        stored = library.storage(dataset, path)
        if space.get_simple_extent_type() == h5s.NULL:
            self._others.append([path, "nothing"])
            return
        kind = library.classified(dataset, dataset.get_type(), path)
        if kind.other:
            self._others.append([path, kind.other])
            return
        shape = space.get_simple_extent_dims()
        more = any(name != "dtype" for name, _ in library.attributes(dataset))
        self._datasets.append([path, kind.dtype, kind.big, shape, *stored, address, more])

    def _texts(
        self, holder: Any, wanted: re.Pattern[str], path: str
    ) -> tuple[dict[str, list[str]], bool]:
        """Return the strings of an object's attributes whose names match; and if it has others."""
        found = {}
        more = False
        for name, attribute in library.attributes(holder):
            value = texts(attribute) if wanted.fullmatch(name) else None
            if value is not None:
                found[name] = value
                self._text += sum(map(len, value))
            more = more or value is None
        if self._text > TEXT_LIMIT:
            raise Refused(f"expected at most {TEXT_LIMIT:,} characters in attributes", path)
        return found, more

    def _group_texts(self, group: Any, path: str) -> tuple[dict[str, list[str]], bool]:
        found, more = self._texts(group, _GROUP_TEXTS, path)
        whole = {name: found[name] for name in found if name in _WHOLE}
        return whole | _joined(found), more or any(len(text) != 1 for text in whole.values())


def _joined(found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the lists, put together where they are split over several attributes."""
    lists = {}
    for name in LISTS:
        if name in found:
            lists[name] = found[name]
        number = 0
        while name not in found and f"{name}{number}" in found:
            lists[name] = lists.get(name, []) + found[f"{name}{number}"]
            number += 1
    return lists
