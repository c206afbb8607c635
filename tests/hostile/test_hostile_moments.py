"""Attacks that are not in a file: it changes while it is read, or its reader dies of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from attacks import STEM, Attack, writing
from hdf5_making import lay_canaries
from helpers import cmd, read_checkpoint
from keras_attacks import KERAS_ATTACKS, keras_file, model
from mutating import CHUNKED, SMALL_HDF5
from npz_attacks import NPZ_ATTACKS, B, W, sound
from raw_pickle import checkpoint, legacy_checkpoint, legacy_file, number, torch_file
from raw_zip import archive, deflated
from torch_attacks import TORCH_ATTACKS
from zip_attacks import ZIP_ATTACKS

from ema_cli import formats, spilling
from ema_cli.errors import InputError
from ema_cli.formats.hdf5 import isolation
from ema_cli.reading import TensorReader

WHOLE = {
    "npz": (".npz", archive(sound())),
    "deflated npz": (".npz", archive([deflated(part.name, part.data) for part in sound()])),
    "torch": (".pt", torch_file(checkpoint())),
    "torch stream": (".pt", legacy_file(legacy_checkpoint())),
    "hdf5": (".weights.h5", SMALL_HDF5),
    "chunked hdf5": (".weights.h5", CHUNKED),
    "keras": (".keras", keras_file(model())),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_file_that_shrinks_after_it_was_looked_at(tmp_path: Path, kind: str) -> None:
    """What is gone is an error of the input; neither zeros nor a signal (item 97)."""
    suffix, content = WHOLE[kind]
    path = writing(suffix, content)(tmp_path)
    found = formats.read(str(path), {})
    assert found.index.tensors
    os.truncate(path, len(content) // 4)
    names = list(found.index.by_name)
    with pytest.raises(InputError), spilling.readable(found, names) as readable:
        for tensor in readable.index.tensors:
            with TensorReader(readable, tensor) as reader:
                reader.block(0, reader.elements)


def _ended_by(number: int) -> None:
    """End the process that reads HDF5 files while it is asked something."""
    pid = isolation.pid()
    assert pid
    os.kill(pid, signal.SIGSTOP)

    def end() -> None:
        time.sleep(0.2)
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)

    threading.Thread(target=end).start()


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_reader_that_dies_is_an_error_of_its_file(tmp_path: Path, number: int) -> None:
    """A crash of the HDF5 library ends a process that is not ours, and the next file is read."""
    path = writing(".weights.h5", SMALL_HDF5)(tmp_path)
    cmd("inspect", path)
    _ended_by(number)
    outcome = cmd("inspect", path, code=12)
    [line] = [line for line in outcome.err.splitlines() if "error:" in line]
    assert path.name in line
    assert "HDF5 library" in line
    assert "layers/dense/vars/0" in cmd("inspect", path).out


def test_a_reader_that_is_gone_is_started_again(tmp_path: Path) -> None:
    """One that died with nothing to do is no error of the file it is asked about next."""
    path = writing(".weights.h5", SMALL_HDF5)(tmp_path)
    cmd("inspect", path)
    first = isolation.pid()
    assert first
    isolation.close()
    cmd("inspect", path)
    assert isolation.pid() != first


def _named(table: tuple[Attack, ...], *names: str) -> list[Attack]:
    return [attack for attack in table if attack.name in names]


BESIDE = (
    *_named(NPZ_ATTACKS, "an array of objects", "a call", "a short member"),
    *_named(ZIP_ATTACKS, "encrypted", "half a file", "a name twice"),
    *_named(TORCH_ATTACKS, "INST", "no STOP", "a short record", "two roots"),
    *_named(KERAS_ATTACKS, "an external link", "external storage", "half a file", "superblock 9"),
)


def good(suffix: str, step: int) -> bytes:
    """Return a sound file of that suffix."""
    if suffix == ".pt":  # which tells its step
        return torch_file(checkpoint().replace(number(300), number(step)))
    return next(content for other, content in WHOLE.values() if other == suffix)


@pytest.mark.parametrize("attack", BESIDE, ids=lambda attack: attack.name)
def test_beside_good_checkpoints_it_is_passed_over(tmp_path: Path, attack: Attack) -> None:
    """The average of the others is what it would be without it, and the code is 3."""
    run, out = tmp_path / "run", tmp_path / "out.safetensors"
    run.mkdir()
    lay_canaries(run)
    path = attack.build(run)
    suffix = path.name.removeprefix(STEM)
    for step in (100, 200):
        (run / f"model-step-{step}{suffix}").write_bytes(good(suffix, step))
    outcome = cmd("run", run, "-o", out, "--average", "mean", code=3)
    assert path.name in outcome.err
    values = [value.tolist() for value in read_checkpoint(out).values()]
    assert W.tolist() in values
    assert B.tolist() in values
