"""``ema-avg verify`` when sources are gone, moved or others, and when provenance is hostile."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forging import document_of, edit, flipped, forge, output, provenance_of
from helpers import cmd, write_checkpoint, write_run
from tensorflow_bundles import tensorflow_run

import ema_cli
from ema_cli import files
from ema_cli.errors import InputChanged, InputError
from ema_cli.verification import checking

VALUES = [
    {"a": np.float32([k, 2]), "b": np.float32([3, -k]), "n": np.int32([k])} for k in (1, 2, 3)
]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The average of three small checkpoints."""
    write_run(tmp_path / "run", VALUES)
    path = tmp_path / "o.safetensors"
    ema_cli.average_run(tmp_path / "run", path, decay=0.5)
    return path


def middle(out: Path) -> Path:
    """The second of its sources."""
    return out.parent / "run" / "model-step-200.safetensors"


def reason(out: Path, **options: Any) -> str:
    """Why an output is not recomputed; its checksums are equal."""
    found = ema_cli.verify(out, full=True, **options)
    assert (found.checksums, found.recomputed) == ("equal", 0)
    assert found.not_recomputed is not None
    return found.not_recomputed


# ---------------------------------------------------------------------------- sources


def test_a_source_that_is_gone(out: Path) -> None:
    """Exit 3: the checksums are equal, and the source is named."""
    middle(out).unlink()
    told = cmd("verify", out, code=3).out.splitlines()
    assert told == [
        f"checked  {out}: 1 file, {out.stat().st_size} bytes, checksums equal",
        f"not recomputed: {middle(out)}: no such file",
    ]
    document = json.loads(cmd("verify", out, "--json", code=3).out)
    assert document["blocks"] == {"recomputed": 0, "total": 0}
    assert document["not_recomputed"] == f"{middle(out)}: no such file"
    with flipped(out, 200):
        cmd("verify", out, code=12)


def test_sources_are_looked_for_where_they_were_and_beside(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths from the current directory; and by their names beside the output."""
    monkeypatch.chdir(tmp_path)
    ema_cli.average_run("run", "r.safetensors", decay=0.5)
    assert ema_cli.verify("r.safetensors").not_recomputed is None
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    where = "run/model-step-100.safetensors: no such file"
    assert reason(tmp_path / "r.safetensors") == where
    for path in (tmp_path / "run").iterdir():
        path.rename(tmp_path / path.name)
    assert ema_cli.verify(tmp_path / "r.safetensors").not_recomputed is None
    assert ema_cli.verify(out).not_recomputed is None


def test_a_source_that_is_another(out: Path) -> None:
    """Touched, rewritten, of another size or shape, no checkpoint any more: named, 3."""
    path = middle(out)
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert reason(out) == f"{path}: changed since: its time is not the one recorded"
    write_checkpoint(path, {**VALUES[1], "a": np.float32([7, 7])})
    assert "changed since: its time" in reason(out)
    write_checkpoint(path, {**VALUES[1], "c": np.float32([7, 7])})
    assert f"{path}" in reason(out)
    write_checkpoint(path, {**VALUES[1], "n": np.int32([7, 7])})
    assert f"{path}: changed since: its size" in reason(out)
    path.write_bytes(b"nothing")
    assert f"{path}" in reason(out)
    path.unlink()
    path.mkdir()
    assert f"{path}" in reason(out)


def test_other_values_under_the_same_stamp_are_found(out: Path) -> None:
    """A source of the same size and time with other values: then the output is not its average."""
    path = middle(out)
    before = path.stat()
    write_checkpoint(path, {**VALUES[1], "a": np.float32([7, 7])})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    told = cmd("verify", out, code=12).err
    assert (
        "tensor 'a/ExponentialMovingAverage': element 0: its sources give 3.5, found 2.25" in told
    )


def test_a_damaged_source_does_not_blame_the_output(tmp_path: Path) -> None:
    """Where sources keep checksums they tell whose fault it is."""
    runs = {
        "npz": output("npz", tmp_path / "npz"),
        "tensorflow": tmp_path / "tensorflow" / "out",
    }
    model = {"w": np.float32(range(9)), "n": np.int64(1)}
    bundle = tensorflow_run(tmp_path / "tensorflow" / "run", [model, model])
    ema_cli.average_run(bundle, runs["tensorflow"], decay=0.5)
    for out in runs.values():
        [path] = [
            path
            for path in (out.parent / "run").iterdir()
            if "100" in path.name and ".index" not in path.name
        ]
        index = ema_cli.inspect(document_of(out)["inputs"][0]["path"]).index
        name = document_of(out)["averaged"][0]
        before = path.stat()
        with flipped(path, index.by_name[name].extent.offset):
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            told = reason(out)
            assert str(path) in told
            assert "checksum" in told


def test_other_side_files(digits_bf16: Path, tmp_path: Path) -> None:
    """What a folder brings along belongs to the plan: another one is another output."""
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(digits_bf16, run)
    ema_cli.average_run(run, out, decay=0.5)
    assert ema_cli.verify(out, full=True).not_recomputed is None
    (run / "checkpoint-2000" / "config.json").write_text("{}")
    assert "does not lead to the plan" in reason(out)


def test_a_source_that_vanishes_or_changes_meanwhile(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the plan and the comparison: not recomputed; the output itself: 12."""
    original, path = checking.compare, middle(out)
    held = path.read_bytes(), path.stat()

    def vanishing(task: Any) -> Any:
        path.unlink()
        return original(task)

    monkeypatch.setattr(checking, "compare", vanishing)
    assert f"{path}: cannot open" in reason(out)
    path.write_bytes(held[0])
    os.utime(path, ns=(held[1].st_atime_ns, held[1].st_mtime_ns))

    def changing(task: Any) -> Any:
        done = original(task)
        os.utime(path, ns=(5, 5))
        return done

    monkeypatch.setattr(checking, "compare", changing)
    assert f"{path}: changed while" in reason(out)
    os.utime(path, ns=(held[1].st_atime_ns, held[1].st_mtime_ns))

    def touching(task: Any) -> Any:
        os.utime(out, ns=(5, 5))
        return original(task)

    monkeypatch.setattr(checking, "compare", touching)
    with pytest.raises(InputChanged, match=r"o\.safetensors"):
        ema_cli.verify(out, full=True)


def test_what_is_compressed_needs_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources are unpacked in a temporary directory, of which nothing stays; none is written."""
    run = tmp_path / "run"
    run.mkdir()
    for k in (1, 2, 3):
        np.savez_compressed(run / f"m-{k}.npz", w=np.full(70_000, k, np.float32), n=np.int32([k]))
    out, temporary = tmp_path / "o.npz", tmp_path / "temporary"
    ema_cli.average_run(run, out, decay=0.5)
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = sorted(os.listdir(tmp_path))
    assert ema_cli.verify(out, full=True).not_recomputed is None
    assert (sorted(os.listdir(tmp_path)), os.listdir(temporary)) == (before, [])
    monkeypatch.setattr(files, "handle_limit", lambda workers: 1)
    assert ema_cli.verify(out, full=True).not_recomputed is None


def test_values_in_memory_have_no_sources(tmp_path: Path) -> None:
    """An output of the class's own store: its checksums are all there is."""
    ema = ema_cli.ExponentialMovingAverage(0.5, store=tmp_path / "S")
    ema.apply({"w": np.float32([1])})
    ema_cli.export(tmp_path / "S", tmp_path / "o.safetensors")
    assert "values in memory" in reason(tmp_path / "o.safetensors")


def test_an_output_of_a_state(tmp_path: Path, out: Path) -> None:
    """An export is what a run would have written: its sources can tell."""
    run = tmp_path / "run"
    ema_cli.average_run(run, tmp_path / "p.safetensors", state=tmp_path / "S", decay=0.5)
    ema_cli.export(tmp_path / "S", tmp_path / "q.npz", dtype="float64")
    for name in ("p.safetensors", "q.npz"):
        assert ema_cli.verify(tmp_path / name, full=True).not_recomputed is None
    assert out.read_bytes() == (tmp_path / "p.safetensors").read_bytes()


# ---------------------------------------------------------------------------- provenance


def test_what_earlier_versions_recorded(out: Path) -> None:
    """Without the request there is nothing to recompute by."""
    edit(out, lambda document: document.pop("request"))
    assert reason(out) == f"{out}.ema.json does not tell what was asked for"


def test_another_version_may_have_done_otherwise(out: Path) -> None:
    """Other headers are then no damage, and the version stands beside other values."""
    edit(out, lambda document: put(document, ("tool", "ema-avg"), "0.0.9"))
    assert ema_cli.verify(out).not_recomputed is None
    with flipped(out, -1):
        forge(out)
        told = cmd("verify", out, code=12).err
        assert "element 0: its sources give 3, found" in told
        assert ", which version 0.0.9 wrote" in told
    raw = out.read_bytes()
    out.write_bytes(raw.replace(b"a/Expo", b"c/Expo"))
    forge(out)
    assert reason(out).startswith("version 0.0.9 made it otherwise: ")
    edit(out, lambda document: put(document, ("tool",), 7))
    assert reason(out).startswith("version unknown made it otherwise: ")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"schema": ' + b"9" * 5000 + b"}"],
)
def test_what_is_no_provenance(out: Path, content: bytes) -> None:
    """It stands where one should: damaged, 12."""
    provenance_of(out).write_bytes(content)
    assert f"{out}.ema.json: no provenance" in cmd("verify", out, code=12).err


HOSTILE: list[tuple[tuple[Any, ...], Any]] = [
    (("schema",), 2),
    (("output",), []),
    (("output", "files"), {}),
    (("output", "files"), []),
    (("output", "files", 0, "name"), "../o.safetensors"),
    (("output", "files", 0, "name"), "/etc/passwd"),
    (("output", "files", 0, "name"), 5),
    (("output", "files", 0, "bytes"), 10**40),
    (("output", "files", 0, "bytes"), -1),
    (("output", "files", 0, "bytes"), True),
    (("output", "files", 0, "crc32c"), []),
    (("output", "files", 0, "crc32c"), ["00000000"] * 1000),
    (("output", "files", 0, "crc32c"), ["0x00000g"]),
    (("output", "files", 0, "crc32c"), [0]),
    (("output", "fingerprint"), None),
    (("output", "fingerprint"), "0" * 64),
    (("output", "checksum_bytes"), 1),
    (("inputs",), None),
    (("inputs",), []),
    (("inputs",), [[]]),
    (("inputs", 0, "path"), ["a"]),
    (("inputs", 0, "path"), "a\0b"),
    (("request",), []),
    (("request", "average"), None),
    (("request", "average", "spec"), "ema:2"),
    (("request", "average", "spec"), "weights:/etc/passwd"),
    (("request", "average", "label"), "../x"),
    (("request", "average", "weights"), [["1", 1.0]]),
    (("request", "average", "init"), "ones"),
    (("request", "average", "zero_debias"), 1),
    (("request", "rule"), [["a"]]),
    (("request", "select"), [["maybe", "a"]]),
    (("request", "max_shard_size"), 0),
    (("request", "format"), "zip"),
    (("request", "dtype"), "int8"),
    (("request", "statistics"), 5),
    (("request", "key"), {}),
]
ANOTHER: list[tuple[tuple[Any, ...], Any]] = [
    (("plan",), None),
    (("plan",), 10**300),
    (("request", "average", "spec"), "ema:0.25"),
    (("request", "average", "num_updates"), "step"),
    (("request", "select"), [["exclude", "a"]]),
    (("request", "select"), [["exclude", "nosuch"]]),
    (("request", "rule"), [["(", ""]]),
    (("request", "rule"), [["^", "m/"]]),
    (("request", "rule"), [["^", "\\9"]]),
    (("request", "step_from"), "step"),
    (("request", "name"), ""),
    (("request", "step_from"), "("),
    (("request", "key"), "model"),
    (("request", "max_shard_size"), 1),
    (("inputs", 0, "path"), "/etc/passwd"),
    (("inputs", 0, "path"), "/dev/zero"),
    (("inputs", 0, "path"), "/"),
    (("inputs", 0, "path"), "x" * 10_000),
    (("inputs", 0, "path"), "\ud800"),
    (("inputs", 0, "files"), 7),
    (("inputs", 0, "step"), 10**100),
]


def put(document: Any, place: tuple[Any, ...], value: Any) -> None:
    """Change one value of a document."""
    *way, last = place
    for key in way:
        document = document[key]
    document[last] = value


@pytest.mark.parametrize(("place", "value"), HOSTILE, ids=str)
def test_hostile_provenance(out: Path, place: tuple[Any, ...], value: Any) -> None:
    """Other types, huge numbers, paths: refused with its name, 12."""
    edit(out, lambda document: put(document, place, value))
    assert f"{out}.ema.json" in cmd("verify", out, code=12).err


@pytest.mark.parametrize(("place", "value"), ANOTHER, ids=lambda item: str(item)[:60])
def test_provenance_of_another_plan(out: Path, place: tuple[Any, ...], value: Any) -> None:
    """Well formed, but it does not lead to this output, or to nothing at all: 3."""
    before = document_of(out)
    edit(out, lambda document: put(document, place, value))
    if place[:3] == ("inputs", 0, "files") or place[-1] == "step":
        # They are told, but what counts is what the sources are now.
        assert ema_cli.verify(out).not_recomputed is None
    else:
        assert reason(out)
    assert document_of(out) != before


ODD: list[Any] = [
    None,
    True,
    -1,
    10**25,
    1e308,
    "",
    "a\0b",
    "/etc/passwd",
    [],
    {},
    [[]],
    [{}],
    "ä" * 999,
]


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value inside a document."""
    rows = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in rows:
        yield (*way, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*way, key))


def test_any_value_may_be_anything(out: Path) -> None:
    """Each value of a provenance in turn is something else: never an internal error."""
    renamed = out.parent / "renamed.safetensors"
    ema_cli.rename(out, renamed, rule=[("^", "m/")])
    refused = 0
    for path in (renamed, out):
        document = document_of(path)
        for place in places(document):
            for value in random.Random(str(place)).sample(ODD, 4):
                changed = copy.deepcopy(document)
                put(changed, place, value)
                provenance_of(path).write_text(json.dumps(changed))
                try:
                    ema_cli.verify(path, workers=1)
                except InputError:
                    refused += 1
    assert refused > 50
