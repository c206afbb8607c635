"""Documents that tell of a skeleton: they come back as they were; those that lie are refused."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_cli.errors import DamagedFile
from ema_cli.states.kept import Kept
from ema_cli.states.skeleton import Skeleton, read

Document = dict[str, Any]

PLAIN = Skeleton(
    "c-1",
    "tensorflow",
    (
        Kept("c-1.data-00000-of-00001", 1000, ((0, 10), (20, 30), (990, 10)), 7),
        Kept("c-1.index", 50, ((0, 50),), 1 << 31),
    ),
    {"w": "VARIABLE", "m": "OPTIMIZER", "\udcff": "COUNTER"},
    "its object graph",
    {"w": "dense/w"},
    "",
)
IN_FOLDER = PLAIN._replace(
    path="c-1",
    format="safetensors-folder",
    files=(Kept("c-1/a.safetensors", 9, ((0, 9),), 0), Kept("c-1/b.json", 0, (), 0)),
)
SINGLE = PLAIN._replace(path="a", format="torch", files=(Kept("a", 9, (), 0),), key="netG")

Change = Callable[[Document], object]


def _set(field: str, value: object) -> tuple[str, Change]:
    return f"{field} {json.dumps(value)[:40]}", lambda d: d.update({field: value})


def _file(field: str, value: object) -> tuple[str, Change]:
    name = f"file {field} {json.dumps(value)[:40]}"
    return name, lambda d: d["files"][0].update({field: value})


def _renamed(*names: str) -> tuple[str, Change]:
    def change(document: Document) -> None:
        one = document["files"][0]
        document["files"] = [{**one, "name": name} for name in names]

    return f"named {names}"[:60], change


_ANY = (None, True, 1, -1, 1.5, "", "x", [], ["x"], {}, {"x": 1}, [[]], [None])
HOSTILE: list[tuple[str, Change]] = [
    *(_set("path", v) for v in _ANY if v != "x"),
    *(_set("path", v) for v in ("..", "../c-1", "/c-1", "c-1/", "/", ".", "c-1\0", "c-1/x", "c-2")),
    *(_set("format", v) for v in _ANY),
    *(_set("format", v) for v in ("torch", "safetensors-folder", "Tensorflow", "tensorflow ")),
    *(_set("files", v) for v in _ANY),
    *(_set("roles", v) for v in (*_ANY, {"w": "variable"}, {"w": ["VARIABLE"]}) if v != {}),
    *(_set("roles_from", v) for v in _ANY if not isinstance(v, str)),
    *(_set("full_names", v) for v in _ANY if v != {}),
    *(_set("key", v) for v in _ANY if v != ""),
    *(_file("name", v) for v in _ANY),
    *(_file("size", v) for v in _ANY),
    *(_file("size", v) for v in (999, 1 << 63, 1 << 64, 1000.0, "1000", 10**4000)),
    *(_file("pieces", v) for v in _ANY if v != []),
    *(
        _file("pieces", v)
        for v in (
            [[0, 0]],
            [[0, -1]],
            [[-1, 2]],
            [[0, 1001]],
            [[1000, 1]],
            [[999, 2]],
            [[0, 10], [9, 5]],
            [[0, 10], [10, 5]],
            [[20, 5], [0, 5]],
            [[0, 5], [0, 5]],
            [[0]],
            [[0, 1, 2]],
            [["0", "1"]],
            [[0.0, 1.0]],
            [[False, True]],
            [{"0": 1}],
            [[0, 1 << 64]],
            [[1 << 64, 1]],
            [[1 << 63, 1 << 63]],
        )
    ),
    *(_file("crc", v) for v in _ANY if v != 1),
    *(_file("crc", v) for v in (1 << 32, "7", 7.0)),
    _renamed(),
    _renamed("c-1.data-00000-of-00001"),
    _renamed("c-1.index", "c-1.index"),
    _renamed("c-1.index", "../c-1.data"),
    _renamed("c-1.index", "c-1/../../x"),
    _renamed("c-1.index", "/c-1.data"),
    _renamed("c-1.index", "x/c-1.data"),
    _renamed("c-1.index", "c-1.x/c-1.data"),
    _renamed("c-1.index", "c-2.data"),
    _renamed("c-1.index", "c-1\0"),
    _renamed("c-1.index", "c-1" + "x" * 253),
    _renamed("c-1.index", "c-1" + "ü" * 127),
    _renamed("c-1.index", "c-1\ud800"),
    _renamed("c-1.index", ""),
    _renamed("c-1.index", "."),
    _renamed("c-1.index", ".."),
    ("an unknown field", lambda d: d.update({"more": 1})),
    ("a field is missing", lambda d: d.pop("key")),
    ("no path", lambda d: d.pop("path")),
    ("an unknown field of a file", lambda d: d["files"][0].update({"more": 1})),
    ("a file without a crc", lambda d: d["files"][0].pop("crc")),
    ("a file twice", lambda d: d["files"].append(d["files"][0])),
    ("a file that is none", lambda d: d["files"].append("c-1.x")),
    ("a file without a name", lambda d: d["files"].append({})),
]
HOSTILE_IN_FOLDER = [
    ("c-1/..", ["c-1/.."]),
    ("..", ["../a"]),
    (".", ["./a"]),
    ("", ["/a"]),
    ("c-1/", ["c-1/"]),
    ("c-1", ["c-1"]),
    ("c-1", ["c-1/"]),
    ("c-1", ["c-1//a"]),
    ("c-1", ["c-1/a/b"]),
    ("c-1", ["c-1/a", "c-1"]),
    ("c-1", ["c-1/a", "c-2/a"]),
    ("c-1", ["c-1/a", "a"]),
    ("c-1", ["c-1/a", "c-1/.."]),
    ("c-1", ["c-1/a", "c-1/."]),
    ("c-1", ["c-1/a", "c-1/../../x"]),
    ("c-1", ["/c-1/a"]),
    ("c-1", ["c-1/a\0"]),
    ("c-1", []),
    ("c-1/b", ["c-1/a"]),
    ("c-1/a", ["c-1/a", "c-2/b"]),
    ("c-1/a/b", ["c-1/a/b"]),
    ("/c-1", ["/c-1/a"]),
    ("c-1\0", ["c-1\0/a"]),
    ("x" * 256, ["x" * 256 + "/a"]),
]


@pytest.mark.parametrize("skeleton", [PLAIN, IN_FOLDER, SINGLE])
def test_a_document_comes_back(skeleton: Skeleton) -> None:
    """As it was, through JSON in ASCII."""
    text = json.dumps(skeleton.to_json())
    assert Skeleton.from_json(json.loads(text), "where") == skeleton


def test_there_are_many_hostile_documents() -> None:
    """And each is another one."""
    assert len(dict(HOSTILE)) == len(HOSTILE) >= 50


@pytest.mark.parametrize("change", [change for _, change in HOSTILE], ids=dict(HOSTILE))
def test_a_hostile_document_is_refused(change: Change, tmp_path: Path) -> None:
    """As the file it stands in, whatever is wrong with it."""
    document = copy.deepcopy(PLAIN.to_json())
    change(document)
    with pytest.raises(DamagedFile) as caught:
        Skeleton.from_json(document, "STATE/manifest-1")
    assert caught.value.args[0] == "STATE/manifest-1"
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("document", _ANY)
def test_what_is_no_document_is_refused(document: object) -> None:
    """Any other thing that JSON has words for."""
    with pytest.raises(DamagedFile):
        Skeleton.from_json(document, "where")


@pytest.mark.parametrize(("path", "names"), HOSTILE_IN_FOLDER)
def test_a_hostile_folder_is_refused(path: str, names: list[str], tmp_path: Path) -> None:
    """By the document, and by whoever would read what it says."""
    document = IN_FOLDER.to_json()
    document["path"] = path
    document["files"] = [{**document["files"][0], "name": name} for name in names]
    with pytest.raises(DamagedFile):
        Skeleton.from_json(document, "where")
    files = tuple(IN_FOLDER.files[0]._replace(name=name) for name in names)
    with pytest.raises(DamagedFile):
        read(IN_FOLDER._replace(path=path, files=files), os.fspath(tmp_path))


def test_a_file_alone_has_its_own_name() -> None:
    """A format of one file takes no second one, and no folder."""
    for path, names in (("a", ["a", "b"]), ("a", ["b"]), ("d/a", ["d/a"]), ("..", [".."])):
        files = tuple(SINGLE.files[0]._replace(name=name) for name in names)
        document = SINGLE._replace(path=path, files=files).to_json()
        with pytest.raises(DamagedFile):
            Skeleton.from_json(document, "where")


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of how many files, pieces and names there can be."""
    document = PLAIN.to_json()
    for name, limit in (("FILE_LIMIT", 1), ("PIECE_LIMIT", 3), ("NAME_LIMIT", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(f"ema_cli.states.kept.{name}", limit)
            with pytest.raises(DamagedFile, match="at most"):
                Skeleton.from_json(document, "where")
    assert Skeleton.from_json(document, "where") == PLAIN


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.sampled_from([PLAIN, IN_FOLDER, SINGLE]), st.data())
def test_any_other_value_is_sound_or_refused(skeleton: Skeleton, data: st.DataObject) -> None:
    """Nothing but a `DamagedFile`, and what is taken says the same again."""
    document = skeleton.to_json()
    place = data.draw(st.sampled_from([document, document["files"][0]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(_JSON)
    try:
        found = Skeleton.from_json(document, "where")
    except DamagedFile:
        return
    assert found.to_json() == document
    with pytest.raises(DamagedFile):
        read(found, os.devnull)
