"""What is broken or hostile is refused in one clear line, and nothing else happens."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import numpy as np
import pytest
from helpers import cmd, raw_safetensors, read_checkpoint, write_run
from hostile import (
    FILE,
    NOT_FILES,
    OTHER_MAGIC,
    PROCESS_MEMORY,
    SINGLE_FILES,
    Hostile,
    entry,
)
from hostile_folders import FOLDERS

import ema_cli
from ema_cli import formats
from ema_cli.errors import InputError

ALL = (*NOT_FILES, PROCESS_MEMORY, *OTHER_MAGIC, *SINGLE_FILES, *FOLDERS)
each_defect = pytest.mark.parametrize("hostile", ALL, ids=lambda hostile: hostile.name)

VALUES = [
    {"layer/w": np.float32([1, 2]), "layer/b": np.float32([3])},
    {"layer/w": np.float32([5, 8]), "layer/b": np.float32([4])},
]


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return every entry below a folder with its kind, size and inode."""
    found = {}
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            status = (Path(root) / name).lstat()
            kind = stat.S_IFMT(status.st_mode)
            size = 0 if kind == stat.S_IFDIR else status.st_size
            found[os.path.relpath(os.path.join(root, name), folder)] = (kind, size, status.st_ino)
    return found


def refusal(path: Path) -> str:
    """Return the message with which reading `path` is refused."""
    with pytest.raises(InputError) as caught:
        formats.read(str(path), {})
    return caught.value.message


@each_defect
def test_reading_is_refused_in_one_line_that_says_where_and_what(
    tmp_path: Path, hostile: Hostile
) -> None:
    """Reading raises InputError and nothing else; its message names file, tensor and defect."""
    message = refusal(hostile.build(tmp_path))
    assert message.isprintable()
    assert message.startswith(str(tmp_path))
    for word in hostile.words:
        assert word in message


@each_defect
def test_named_on_the_command_line_it_is_an_error_and_nothing_is_written(
    tmp_path: Path, hostile: Hostile
) -> None:
    """An unusable checkpoint that was asked for ends the run before anything is written."""
    path = hostile.build(tmp_path)
    before = listing(tmp_path)
    outcome = cmd("run", path, "-o", tmp_path / "out.safetensors", code=hostile.code)
    assert listing(tmp_path) == before
    assert outcome.out == ""
    assert path.name in outcome.err


@each_defect
def test_looking_at_it_is_the_same_error(tmp_path: Path, hostile: Hostile) -> None:
    """``inspect`` refuses what ``run`` refuses, with the same code, in text and in JSON."""
    path = hostile.build(tmp_path)
    assert path.name in cmd("inspect", path, code=hostile.code).err
    outcome = cmd("inspect", path, "--json", code=hostile.code)
    assert json.loads(outcome.out.splitlines()[-1])["type"] == "error"


@each_defect
def test_beside_good_checkpoints_it_is_passed_over_and_changes_no_bit(
    tmp_path: Path, hostile: Hostile
) -> None:
    """A run directory with an unusable entry gives the result it gives without the entry."""
    clean = write_run(tmp_path / "clean", VALUES)
    mixed = write_run(tmp_path / "mixed", VALUES)
    path = hostile.build(mixed)
    ema_cli.average_run(clean, tmp_path / "expected.safetensors", average=["mean"])
    result = ema_cli.average_run(mixed, tmp_path / "found.safetensors", average=["mean"])
    assert (tmp_path / "found.safetensors").read_bytes() == (
        tmp_path / "expected.safetensors"
    ).read_bytes()
    [passed_over] = result.plan.run.passed_over
    assert passed_over.path == str(path)
    assert passed_over.reason.isprintable()
    assert len(result.unusable) == (1 if hostile.beside == 3 else 0)


@each_defect
def test_beside_good_checkpoints_the_exit_code_tells(tmp_path: Path, hostile: Hostile) -> None:
    """Something that looks like a checkpoint and is none turns a successful run's 0 into 3."""
    run = write_run(tmp_path / "run", VALUES)
    path = hostile.build(run)
    outcome = cmd("run", run, "-o", tmp_path / "out.safetensors", code=hostile.beside)
    assert path.name in outcome.err
    assert set(read_checkpoint(tmp_path / "out.safetensors")) == {
        f"{name}/ExponentialMovingAverage" for name in VALUES[0]
    }


def test_an_unreadable_file_is_an_error_of_the_input(tmp_path: Path) -> None:
    """A file without read permission is refused with the reason the system gives."""
    path = tmp_path / FILE
    path.write_bytes(raw_safetensors({"layer/w": entry()}, bytes(8)))
    path.chmod(0)
    identity = os.geteuid()
    if identity == 0:  # root may read everything
        os.seteuid(65534)
    try:
        message = refusal(path)
    finally:
        os.seteuid(identity)
    assert message == f"{path}: cannot open: Permission denied"


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model-step-300"])
def test_content_decides_what_a_file_is_not_its_suffix(tmp_path: Path, name: str) -> None:
    """A safetensors file under another name is read as what it is."""
    path = tmp_path / name
    path.write_bytes(raw_safetensors({"layer/w": entry()}, bytes(8)))
    assert list(formats.read(str(path), {}).index.by_name) == ["layer/w"]


def test_a_header_length_that_spells_a_pickle_is_no_pickle(tmp_path: Path) -> None:
    """A header of 640 bytes begins like a pickle and is a sound file all the same."""
    header = json.dumps({"layer/w": entry()}).encode().ljust(640)
    path = tmp_path / FILE
    path.write_bytes(raw_safetensors(header, bytes(8)))
    assert path.read_bytes().startswith(b"\x80\x02")
    assert list(formats.read(str(path), {}).index.by_name) == ["layer/w"]


@pytest.mark.parametrize(
    "name",
    ["new\nline", "\x1b[31mred\x1b[0m", "\x1b]8;;x:y\x07link", os.fsdecode(b"bad\xffutf8")],
)
def test_a_file_name_cannot_reach_the_terminal(tmp_path: Path, name: str) -> None:
    """Control bytes and undecodable bytes in a file name are escaped in every message."""
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(b"")
    assert refusal(path).isprintable()
    outcome = cmd("run", path, "-o", tmp_path / "out.safetensors", code=12)
    assert outcome.err.replace("\n", "").isprintable()


# ---------------------------------------------------------------------------- names of tensors


HOSTILE_NAMES = ["", "a\0b", "../../etc/passwd", "/etc/passwd", "\x1b[31m", "[red]x[/red]", "\n"]


def test_hostile_tensor_names_are_only_names(tmp_path: Path) -> None:
    """Such names are averaged like any other, never used as a path and never printed raw."""
    run = tmp_path / "run"
    write_run(run, [{name: np.float32([k]) for name in HOSTILE_NAMES} for k in (2, 4)])
    before = listing(run)
    out = tmp_path / "out.safetensors"
    cmd("run", run, "-o", out, "--average", "mean", "--keep-variables")
    assert listing(run) == before
    assert sorted(tmp_path.iterdir()) == [out, tmp_path / "out.safetensors.ema.json", run]
    found = read_checkpoint(out)
    for name in HOSTILE_NAMES:
        assert list(found[name]) == [4]
        assert list(found[f"{name}/ExponentialMovingAverage"]) == [3]
    for command in ("inspect", "map"):
        outcome = cmd(command, out)
        assert re.sub(r"[\n\t]", "", outcome.out + outcome.err).isprintable()


def test_a_bool_that_is_2_is_copied(tmp_path: Path) -> None:
    """Bytes that are no legal value of their dtype are carried, not judged."""
    run = tmp_path / "run"
    run.mkdir()
    header = {"layer/w": entry(), "mask": entry("BOOL", [3], [8, 11])}
    for step, first in ((100, 1.0), (200, 2.0)):
        data = np.float32([first, first]).tobytes() + bytes([0, 1, 2])
        (run / f"step-{step}.safetensors").write_bytes(raw_safetensors(header, data))
    ema_cli.average_run(run, tmp_path / "out.safetensors", average=["mean"])
    assert (tmp_path / "out.safetensors").read_bytes().endswith(bytes([0, 1, 2]))


# ---------------------------------------------------------------------------- prefixes and depth


SMALL = raw_safetensors(
    {"__metadata__": {"k": "v"}, "b": entry("BF16", [2, 1], [0, 4]), "w": entry("U8", [3], [4, 7])},
    bytes(range(7)),
)


@pytest.mark.parametrize("name", [FILE, "model-step-300"])
def test_no_prefix_of_a_file_is_a_file(tmp_path: Path, name: str) -> None:
    """A file truncated at any byte is refused, with its suffix or without."""
    path = tmp_path / name
    path.write_bytes(SMALL)
    formats.read(str(path), {})
    for length in range(len(SMALL)):
        path.write_bytes(SMALL[:length])
        assert refusal(path).isprintable()


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets", "strides"])
def test_no_depth_of_nesting_leaks_another_exception(tmp_path: Path, field: str) -> None:
    """Whatever recursion limit is met first, while parsing or while telling, it is told."""
    path = tmp_path / FILE
    for depth in range(600, 1001):
        value = "[" * depth + "]" * depth
        header = '{"layer/w":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"%s":%s}}'
        path.write_bytes(raw_safetensors((header % (field, value)).encode(), bytes(8)))
        assert refusal(path).isprintable()
