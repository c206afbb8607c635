"""Bits that rot, files that are gone or something else: told, or of no consequence."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_checkpoint
from stores import (
    document,
    documents,
    exported,
    manifest_of,
    rewrite,
    sealed,
    slot_of,
    tree,
    update,
    without_barriers,
    write_steps,
)

import ema_cli
from ema_cli import ExponentialMovingAverage
from ema_cli.errors import DamagedFile, DamagedState, EmaError, InputError
from ema_cli.states import directory, summary
from ema_cli.states.store import State


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about power cuts."""
    without_barriers(monkeypatch)


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Nothing here may wait for anything: a pipe in the place of a file has no other end."""

    def wake(*given: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, wake)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def verified(state: Path) -> int | None:
    """Return the step of a state all of whose checksums are right."""
    with ThreadPoolExecutor(1) as executor:
        return summary.check(str(state), executor).step


# ---------------------------------------------------------------------------- bits


@pytest.fixture(scope="module", name="small")
def a_small_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state of one tensor and two checkpoints."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        without_barriers(patch)
        patch.chdir(folder)
        for k in (1, 2):
            write_checkpoint(Path("r") / f"{k}.safetensors", {"w": np.float32([k])})
            update(Path("S"), Path("r"), decay=0.5)
    return folder / "S"


@pytest.mark.parametrize("name", ["ROOT", "plan", "ledger", "manifest-2"])
def test_every_flipped_bit_of_a_small_file_is_found(name: str, small: Path, tmp_path: Path) -> None:
    """Whatever it would have said, it is not believed."""
    path = Path(shutil.copytree(small, tmp_path / "S")) / name
    good = path.read_bytes()
    flips = 0
    fd = os.open(path, os.O_WRONLY)
    for at, byte in enumerate(good):
        for bit in range(8):
            os.pwrite(fd, bytes([byte ^ 1 << bit]), at)
            state = State(str(path.parent))
            with pytest.raises(DamagedState):
                state.load()
            assert state.current is None
            flips += 1
        os.pwrite(fd, bytes([byte]), at)
    os.close(fd)
    assert flips == 8 * len(good) > 1000
    State(str(path.parent)).load()


def test_every_flipped_bit_of_the_version_is_found(small: Path, tmp_path: Path) -> None:
    """A state of another version, or none: nothing is read or written of it."""
    state = Path(shutil.copytree(small, tmp_path / "S"))
    good = (state / "FORMAT").read_bytes()
    for at, byte in enumerate(good):
        for bit in range(8):
            (state / "FORMAT").write_bytes(good[:at] + bytes([byte ^ 1 << bit]) + good[at + 1 :])
            before = tree(state)
            for command in (
                lambda: ema_cli.export(state, tmp_path / "x"),
                lambda: update(state, small.parent / "r", decay=0.5),
            ):
                with pytest.raises(EmaError) as caught:
                    command()
                assert caught.value.exit_code in (12, 14)
            assert tree(state) == before
            with pytest.raises(InputError):
                directory.check_format(str(state), create=False)


@pytest.mark.parametrize("name", ["ROOT", "plan", "ledger", "manifest-2", "FORMAT", "slot"])
def test_a_file_cut_anywhere_is_found(name: str, small: Path, tmp_path: Path) -> None:
    """To every length; and one byte more, which counts in the ledger only for the next commit."""
    state = Path(shutil.copytree(small, tmp_path / "S"))
    path = slot_of(state) if name == "slot" else state / name
    good = path.read_bytes()
    for length in range(0, len(good), max(len(good) // 200, 1)):
        path.write_bytes(good[:length])
        with pytest.raises(InputError):
            verified(state)
    path.write_bytes(good + b"\n")
    if name == "ledger":
        assert verified(state) == 2
    else:
        with pytest.raises(InputError):
            verified(state)


# Four chunks: the first average lies in two, the second in two, and copies in two.
PARTS = {
    "head": (10, set()),
    "the first average": (5000, {"ema-0.5"}),
    "a chunk of both": ((5 << 20) + 1, set()),
    "a chunk of the second and of copies": (9 << 20, set()),
    "copies": (-10, set()),
}


@pytest.fixture(scope="module", name="large")
def a_large_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state whose slot has several chunks, and beside it the run with one checkpoint more."""
    folder = tmp_path_factory.mktemp("large")
    with pytest.MonkeyPatch.context() as patch:
        without_barriers(patch)
        for k in (1, 2, 3):
            chance = np.random.default_rng(k)
            tensors = {
                "w": chance.random(1_400_000, np.float32),
                "n": chance.integers(0, 9, 300_000),
            }
            write_checkpoint(folder / "r" / f"{k}.safetensors", tensors)
        for k in (1, 2):
            path = folder / "r" / f"{k}.safetensors"
            update(folder / "S", path, average=["mean", "ema:0.5"])
    assert len(document(folder / "S", "manifest-2")["checksums"]) == 4
    return folder / "S"


@pytest.mark.parametrize(("offset", "intact"), PARTS.values(), ids=PARTS)
def test_a_flipped_bit_of_a_slot_is_found(
    offset: int, intact: set[str], large: Path, tmp_path: Path
) -> None:
    """By `verify` wherever it is; by updates and exports wherever they would use it."""
    state = Path(shutil.copytree(large, tmp_path / "S"))
    slot = slot_of(state)
    data = bytearray(slot.read_bytes())
    data[offset] ^= 1
    expected = {
        label: exported(state, tmp_path / "sound", average=[label]) for label in ("mean", "ema-0.5")
    }
    slot.write_bytes(data)
    with pytest.raises((DamagedState, DamagedFile), match=slot.name):
        verified(state)
    found = {}
    for label in expected:
        out = tmp_path / f"{label}.safetensors"
        try:
            ema_cli.export(state, out, average=[label])
            found[label] = {"": out.read_bytes()}
        except InputError as error:
            assert slot.name in str(error)
            assert not out.exists()
    assert all(expected[label] == made for label, made in found.items())
    assert found.keys() == intact


@pytest.mark.parametrize("offset", [offset for offset, _ in PARTS.values()], ids=PARTS)
def test_a_flipped_bit_of_a_slot_is_not_mixed_in(offset: int, large: Path, tmp_path: Path) -> None:
    """An update fails, or makes what it makes of a sound state: copies are not read any more."""
    state, sound = (Path(shutil.copytree(large, tmp_path / name)) for name in ("S", "T"))
    data = bytearray(slot_of(state).read_bytes())
    data[offset] ^= 1
    slot_of(state).write_bytes(data)
    before = tree(state)["ROOT"]
    given: dict[str, Any] = {"average": ["mean", "ema:0.5"]}
    try:
        update(state, large.parent / "r", **given)
    except InputError as error:
        assert slot_of(state).name in str(error)
        assert tree(state)["ROOT"] == before
    else:
        assert offset < 0
        update(sound, large.parent / "r", **given)
        assert slot_of(state).read_bytes() == slot_of(sound).read_bytes()


def test_every_flipped_byte_of_the_structure_is_found(tmp_path: Path) -> None:
    """Of the files that tell how the last checkpoint looked; holes have no bytes."""
    for k in (1, 2):
        tensors = {"w": np.full(100, k, np.float32), "n": np.int64([k])}
        write_checkpoint(tmp_path / "r" / f"{k}.safetensors", tensors)
    state = tmp_path / "S"
    update(state, tmp_path / "r", decay=0.5)
    expected = exported(state, tmp_path / "sound", names="variable")
    path = state / "last-1" / "2.safetensors"
    good = path.read_bytes()
    times = path.stat()
    found = 0
    for at in range(0, len(good), 3):
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        try:
            assert exported(state, tmp_path / "out", names="variable") == expected
        except AssertionError as error:
            assert "Damaged" in str(error)
            found += 1
    held = 100 * 4
    assert abs(found - (len(good) - held) // 3) <= 1


# ---------------------------------------------------------------------------- other files


OTHERS: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: None,
    "empty": lambda path: path.touch(),
    "a directory": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "endless": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 40),
}
NAMES = ["ROOT", "plan", "ledger", "manifest-2", "FORMAT", "slot", "last-2", "last-2/2.safetensors"]


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("name", NAMES)
def test_something_else_in_its_place(
    name: str, other: Callable[[Path], object], small: Path, tmp_path: Path
) -> None:
    """Files that are gone, and what never was one: told at once, by every command that needs it."""
    state = Path(shutil.copytree(small, tmp_path / "S"))
    path = slot_of(state) if name == "slot" else state / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    other(path)
    write_checkpoint(tmp_path / "r" / "3.safetensors", {"w": np.float32([3])})
    out = tmp_path / "out.safetensors"
    commands: list[Callable[[], object]] = [
        lambda: verified(state),
        lambda: ema_cli.export(state, out),
        lambda: ema_cli.inspect(state),
        lambda: ema_cli.plan_run(tmp_path / "r", state=state, decay=0.5),
    ]
    codes = []
    for command in commands:
        try:
            command()
            codes.append(0)
        except EmaError as error:
            assert str(error).isprintable()
            codes.append(error.exit_code)
    assert set(codes) <= {0, 12, 15} and codes[0] and codes[1]
    assert not out.exists()
    if name == "ROOT" and not os.path.lexists(path):
        return  # a creation that never came to its end, as far as it can be seen
    if name.startswith("last"):
        return  # the structure is that of the next checkpoint then
    with pytest.raises(EmaError) as caught:
        update(state, tmp_path / "r", decay=0.5)
    assert caught.value.exit_code in (12, 14, 15)


@pytest.mark.parametrize("name", ["plan", "ledger", "manifest-2"])
def test_a_file_of_another_state_in_its_place(name: str, small: Path, tmp_path: Path) -> None:
    """Sound by itself, and of the same length; but not what ROOT tells of."""
    state = Path(shutil.copytree(small, tmp_path / "S"))
    good = (state / name).read_bytes()
    lines = [json.loads(line[9:]) for line in good.splitlines()]
    if name == "plan":
        lines[0]["settings"] = ["--decay", "0.6"]
    elif name == "ledger":
        lines[1]["path"] = lines[1]["path"][::-1]
    else:
        lines[0]["checksums"] = [lines[0]["checksums"][0] ^ 1]
    (state / name).write_bytes(b"".join(map(sealed, lines)))
    for command in (
        lambda: verified(state),
        lambda: ema_cli.export(state, tmp_path / "x.npz"),
        lambda: update(state, small.parent / "r", decay=0.5),
    ):
        with pytest.raises(DamagedState, match=name):
            command()
    (state / name).write_bytes(b"".join(json_line(line) for line in good.splitlines()))
    assert verified(state) == 2


def json_line(line: bytes) -> bytes:
    """Return a line as it is sealed."""
    return sealed(json.loads(line[9:]))


RAW: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "nesting": b"[" * 200_000,
    "nested objects": b'{"a":' * 100_000,
    "a long number": b"1" * 100_000,
    "not a number": b"NaN",
    "infinity": b'{"state":Infinity}',
    "not ASCII": b'"\xff"',
    "a name twice": b'{"state":1,"state":2}',
    "two lines": b"{}\n{}",
    "zeros": bytes(64),
}


@pytest.mark.parametrize("text", RAW.values(), ids=RAW)
@pytest.mark.parametrize("kind", ["root", "plan", "manifest", "ledger"])
def test_what_is_no_document_is_refused(
    kind: str, text: bytes, small: Path, tmp_path: Path
) -> None:
    """With a checksum that fits."""
    state = Path(shutil.copytree(small, tmp_path / "S"))
    given: dict[str, Any] = {kind: [text] if kind == "ledger" else text}
    rewrite(state, **given)
    with pytest.raises(InputError):
        verified(state)
    with pytest.raises(InputError):
        update(state, small.parent / "r", decay=0.5)


# ---------------------------------------------------------------------------- the class


OWN = ("updates", "local_steps", "shadow_names", "known", "trainable")
VALUES = (None, True, -1, 1.5, "x", [], [1], [[]], {}, {"v": None}, {"v": []}, {"v": "x"}, {"w": 1})


@pytest.fixture(scope="module", name="of_class")
def a_state_of_the_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state of `ExponentialMovingAverage`."""
    state = tmp_path_factory.mktemp("class") / "S"
    with pytest.MonkeyPatch.context() as patch:
        without_barriers(patch)
        ema = ExponentialMovingAverage(0.5, "count", True, store=state)
        ema.apply({"v": np.float32([1, 2]), "n": np.int32(1)})
        ema.apply({"v": np.float32([2, 1]), "n": np.int32(2)})
    return state


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("name", [*OWN, "settings", "averages"])
def test_what_the_class_keeps_may_lie(
    name: str, value: object, of_class: Path, tmp_path: Path
) -> None:
    """It is checked before it is believed."""
    state = Path(shutil.copytree(of_class, tmp_path / "S"))
    if name in OWN:
        manifest = document(state, manifest_of(state))
        manifest["own"][name] = value
        rewrite(state, manifest=manifest)
    else:
        rewrite(state, plan={**document(state, "plan"), name: value})
    for command in (
        lambda: ema_cli.inspect(state),
        lambda: ema_cli.export(state, tmp_path / "x.safetensors", overwrite=True),
        lambda: applied(state),
    ):
        try:
            command()
        except EmaError as error:
            assert error.exit_code in (12, 16), error


def applied(state: Path) -> None:
    """Take up a state by the class, and go on."""
    ema = ExponentialMovingAverage(0.5, "count", True, store=state)
    ema.average("v")
    ema.apply({"v": np.float32([2, 1]), "n": np.int32(2)})
    del ema


def test_a_row_of_the_class_without_a_step(of_class: Path, tmp_path: Path) -> None:
    """Mappings have none; what is told of them is of no use to a run."""
    rows = documents(of_class, "ledger")
    assert [row["step"] for row in rows] == [None, None]
    paths = write_steps(tmp_path, [1])
    with pytest.raises(EmaError) as caught:
        update(of_class, paths, decay=0.5)
    assert caught.value.exit_code == 16
    assert sealed(rows[0]) in (of_class / "ledger").read_bytes()
