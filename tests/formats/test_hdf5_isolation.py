"""The process that opens HDF5 files: confined, replaceable, and never believed unchecked."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import keras_files
import numpy as np
import pytest

from ema_cli.errors import DamagedFile, InputError
from ema_cli.formats.hdf5 import isolation, messages, reading, structure
from ema_cli.formats.hdf5.structure import structure_of


def base(file: h5py.File) -> None:
    """Put a sound tensor into a file."""
    file["a/w"] = np.arange(4, dtype="f4")


def deep(file: h5py.File) -> None:
    """Put too many groups into each other."""
    file.create_group("/".join("g" * 200))


# ---------------------------------------------------------------------------- the child process


def status(key: str) -> str:
    """Return a line of what the kernel says of the child."""
    text = Path(f"/proc/{isolation.pid()}/status").read_text()
    return next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith(key))


def limit(name: str) -> str:
    """Return a soft limit of the child."""
    text = Path(f"/proc/{isolation.pid()}/limits").read_text()
    return next(line[len(name) :].split()[0] for line in text.splitlines() if line.startswith(name))


def opened_by_the_child() -> list[str]:
    """Return the files that are open in the child."""
    folder = f"/proc/{isolation.pid()}/fd"
    opened = []
    for fd in os.listdir(folder):
        with contextlib.suppress(OSError):
            opened.append(os.readlink(os.path.join(folder, fd)))
    return [name for name in opened if name != "/dev/null" and "socket" not in name]


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="/proc is not here")


@needs_proc
def test_the_child_has_given_everything_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits are set, the environment is bare, and no file is open but the socket."""
    monkeypatch.setenv("SECRET", "x")
    isolation.close()
    keras_files.read(keras_files.make(tmp_path / "x.h5", base))
    assert (limit("Max core file size"), limit("Max file size")) == ("0", "0")
    assert limit("Max open files") == "16"
    assert int(limit("Max cpu time")) < 100
    assert int(limit("Max address space")) < 4 << 30
    environment = Path(f"/proc/{isolation.pid()}/environ").read_bytes()
    assert b"SECRET" not in environment and b"HDF5_PLUGIN_PRELOAD=::" in environment
    for _ in range(100):  # it closes the file after it has answered
        if len(opened_by_the_child()) == 1:
            break
        time.sleep(0.02)
    assert opened_by_the_child() == [f"/proc/{isolation.pid()}/statm"]


@needs_proc
@pytest.mark.skipif(sys.platform != "linux", reason="Landlock is Linux's")
def test_the_child_cannot_open_files(tmp_path: Path) -> None:
    """Where the kernel has Landlock, nothing can be opened any more, whoever takes it over."""
    code = (
        "import sys\nfrom ema_cli.formats.hdf5 import sandbox\n"
        "if not sandbox.confine(): sys.exit(77)\n"
        "for path in ('/etc/passwd', sys.argv[1]):\n"
        "    try: open(path, 'rb')\n"
        "    except OSError: continue\n"
        "    sys.exit(1)\n"
    )
    folder = os.path.dirname(os.path.dirname(reading.__file__.split("formats")[0]))
    command = [sys.executable, "-c", code, keras_files.put(tmp_path / "x", b"")]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": folder}, check=False)
    if ended.returncode == 77:
        pytest.skip("this kernel has no Landlock")
    assert ended.returncode == 0


def test_one_child_serves_many_files(tmp_path: Path) -> None:
    """Refusals do not end it."""
    pids = set()
    for k, fill in enumerate([base, deep, base]):
        with contextlib.suppress(InputError):
            keras_files.read(keras_files.make(tmp_path / f"{k}.h5", fill))
        pids.add(isolation.pid())
    assert len(pids) == 1


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_crash_is_an_error_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Whatever kills the child, the next file gets a new one."""
    path = keras_files.make(tmp_path / "x.h5", base)
    keras_files.read(path)
    real = messages.send

    def crash(*arguments: Any) -> None:
        os.kill(isolation.pid() or 0, number)
        time.sleep(0.1)
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(messages, "send", crash)
        with pytest.raises(DamagedFile, match=r"crashed|too long or too much") as caught:
            keras_files.read(path)
    assert str(path) in caught.value.message
    assert list(keras_files.read(path).index.by_name) == ["a/w"]


def test_a_crash_while_spilling_is_an_error_of_the_file(tmp_path: Path) -> None:
    """Between two boxes of a tensor."""

    def fill(file: h5py.File) -> None:
        file.create_dataset("w", data=np.ones(1 << 20, "f4"), chunks=(1 << 10,))

    path = keras_files.make(tmp_path / "x.h5", fill)
    boxes = [((k << 10,), (1 << 10,)) for k in range(1 << 10)]
    fd = os.open(path, os.O_RDONLY)
    window = isolation.Window(0, path.stat().st_size)
    pieces = isolation.read_boxes(fd, str(path), window, "w", boxes, [4 << 10] * len(boxes), 4096)
    assert len(next(pieces)) == 4096
    os.kill(isolation.pid() or 0, signal.SIGSEGV)
    with pytest.raises(DamagedFile, match="crashed"):
        list(pieces)
    os.close(fd)
    keras_files.read(path)


def test_a_child_that_does_not_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence has an end; a stopped process is silent."""
    path = keras_files.make(tmp_path / "x.h5", base)
    isolation.close()
    monkeypatch.setattr(isolation, "PATIENCE_SECONDS", 2.0)
    keras_files.read(path)
    os.kill(isolation.pid() or 0, signal.SIGSTOP)
    with pytest.raises(DamagedFile, match="does not finish"):
        keras_files.read(path)
    assert isolation.pid() is None


def test_reading_that_does_not_end_is_ended(tmp_path: Path) -> None:
    """A timer counts what the child computes."""
    code = (
        "from ema_cli.formats.hdf5 import sandbox\nsandbox.allow(0.1, 1 << 30)\nwhile True: pass\n"
    )
    folder = os.path.dirname(os.path.dirname(reading.__file__.split("formats")[0]))
    ended = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": folder}, check=False
    )
    assert -ended.returncode in (signal.SIGPROF, signal.SIGXCPU)


# ---------------------------------------------------------------------------- nonsense


ROW = ["w", "float32", False, [2], "contiguous", 96, 8, [], 900, False]


def document(*rows: list[Any], **other: Any) -> dict[str, Any]:
    """Return what the child might send."""
    return {
        "base": 0,
        "root": {},
        "groups": [["", {}, False]],
        "datasets": list(rows),
        "others": [],
    } | other


def changed(**fields: Any) -> list[Any]:
    """Return a row in which fields, by their places, are other ones."""
    row = list(ROW)
    for place, field in fields.items():
        row[int(place[1:])] = field
    return row


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({}, "nonsense"),
        (document(["w"]), "nonsense"),
        (document(changed(_0="../w")), "nonsense"),
        (document(changed(_0="a//w")), "nonsense"),
        (document(changed(_0=7)), "nonsense"),
        (document(changed(_1="string")), "nonsense"),
        (document(changed(_1=["float32"])), "nonsense"),
        (document(changed(_2=1)), "nonsense"),
        (document(changed(_3=[-1])), "nonsense"),
        (document(changed(_3=[True])), "nonsense"),
        (document(changed(_3=[1.0])), "nonsense"),
        (document(changed(_3="12")), "nonsense"),
        (document(changed(_5=-2)), "nonsense"),
        (document(changed(_6=1 << 70)), "nonsense"),
        (document(changed(_7=[0])), "nonsense"),
        (document(ROW, groups=[["..", {}, False]]), "nonsense"),
        (document(ROW, root={"model_config": 3}), "nonsense"),
        (document(ROW, others=[["/", "x"]]), "nonsense"),
        (document(ROW, base="0"), "nonsense"),
        (document(ROW, ROW), "expected different names"),
        (document(changed(_3=[1] * 33, _5=-1)), "at most 32 dimensions"),
        (document(changed(_3=[3])), "needs 12 bytes, found 8"),
        (document(changed(_5=995)), "before the file's end at 1,000"),
        (document(ROW, changed(_0="v", _5=100, _8=901)), "overlaps that of 'w'"),
        (document(changed(_5=896)), "overlaps the file's own records"),
        (document(changed(_5=0)), "overlaps the file's own records"),
        (document(changed(_7=[1, 1], _5=-1)), "expected chunks"),
    ],
)
def test_what_the_child_tells_is_checked_once_more(told: dict[str, Any], words: str) -> None:
    """It may have been taken over by the file it read."""
    with pytest.raises(InputError, match=words) as caught:
        structure_of("x.h5", told, b"", 1000)
    assert caught.value.message.startswith("x.h5: ")


def test_a_sound_document_is_believed() -> None:
    """The row the others are made of."""
    [found] = structure_of("x.h5", document(ROW), b"", 1000).datasets
    assert found.direct and found.nbytes == 8
    assert found == structure.Dataset(*ROW[:3], (2,), *ROW[4:7], (), *ROW[8:])


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"[" * 100_000, b"\xff", b'{"a": NaN'])
def test_an_answer_that_is_none_is_refused(raw: bytes) -> None:
    """Only documents are answers."""
    with pytest.raises(messages.Closed):
        messages.decode(raw)
