"""Hard links hold what is being read, and never anything else."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import pytest
from conformance import ROWS, contents, files_of, floats, make
from helpers import write_checkpoint

from ema_cli import formats
from ema_cli.errors import DamagedFile, InputChanged, InputError, NonFinite
from ema_cli.live.pinning import Pins, remove_all
from ema_cli.states import skeleton
from ema_cli.tensors import Checkpoint


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The directory of a state."""
    path = tmp_path / "state"
    path.mkdir(0o700)
    return path


def looked_at(path: Path, step: int = 100) -> Checkpoint:
    """The checkpoint at a path, with a step."""
    return dataclasses.replace(formats.read(os.fspath(path), {}), step=step)


@pytest.mark.parametrize("row", ROWS)
def test_a_pinned_checkpoint_is_whole_when_its_run_is_gone(
    row: str, tmp_path: Path, state: Path
) -> None:
    """Read again, kept as a skeleton: everything that an update does works without the source."""
    path = make(row, tmp_path / "run", floats())
    before, names = contents(path), sorted(files_of(path))
    checkpoint = looked_at(path)
    pins = Pins(str(state))
    pinned = pins.hold(checkpoint)
    shutil.rmtree(tmp_path / "run")
    assert all(stamp.path.startswith(f"{state}/pins/100/") for stamp in pinned.files if stamp.path)
    assert contents(Path(pinned.path)) == before
    assert sorted(files_of(Path(pinned.path))) == names
    assert os.path.basename(pinned.path) == path.name
    skeleton.keep(pinned, [], str(state / "last-1"))
    pins.release()
    assert not (state / "pins").exists()


def test_the_files_are_the_same_and_stay(tmp_path: Path, state: Path) -> None:
    """Neither a byte is copied nor a time changed; releasing removes only our names."""
    path = make("safetensors-folder", tmp_path / "run", floats())
    (path / "tokenizer.json").write_text("{}")
    (path / "optimizer.pt").write_text("huge")
    checkpoint, pins = looked_at(path), Pins(str(state))
    pinned = pins.hold(checkpoint)
    for mine, theirs in zip(pinned.files, checkpoint.files, strict=True):
        assert mine[1:] == theirs[1:]
    held = {found.name for found in Path(pinned.path).iterdir()}
    assert held == {"model.safetensors", "tokenizer.json"}
    assert oct((state / "pins").stat().st_mode & 0o77) == "0o0" or os.getuid() == 0
    pins.release()
    assert {found.name for found in path.iterdir()} >= {*held, "optimizer.pt"}
    assert looked_at(path).files == checkpoint.files


def test_a_link_to_a_file_pins_the_file(tmp_path: Path, state: Path) -> None:
    """As in hub caches: the name is the link's, the bytes are the target's."""
    blob = write_checkpoint(tmp_path / "blob", floats())
    path = tmp_path / "run" / "model-step-100.safetensors"
    path.parent.mkdir()
    path.symlink_to(blob)
    pins = Pins(str(state))
    pinned = Path(pins.hold(looked_at(path)).path)
    assert pinned.name == path.name
    assert not pinned.is_symlink()
    assert pinned.samefile(blob)
    pins.release()
    assert blob.exists()


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
@pytest.mark.parametrize("nth", [0, 1])
def test_what_cannot_be_linked_is_read_where_it_is(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch, code: int, nth: int
) -> None:
    """Another file system, somebody else's file: nothing half-linked stays."""
    path = make("tensorflow", tmp_path / "run", floats())
    checkpoint, calls, whole = looked_at(path), [], os.link

    def link(source: str, target: str) -> None:
        calls.append(source)
        if len(calls) > nth:
            raise OSError(code, os.strerror(code))
        whole(source, target)

    monkeypatch.setattr(os, "link", link)
    pins = Pins(str(state))
    assert pins.hold(checkpoint) is checkpoint
    assert not (state / "pins" / "100").exists()


def test_what_is_gone_or_another_one_is_an_input_error(tmp_path: Path, state: Path) -> None:
    """Pinned is what was looked at, or nothing; the message has the run's name."""
    path = write_checkpoint(tmp_path / "run" / "a-100.safetensors", floats())
    checkpoint = looked_at(path)
    other = write_checkpoint(tmp_path / "run" / "other", floats())
    other.replace(path)
    pins = Pins(str(state))
    with pytest.raises(InputChanged, match=r"run/a-100\.safetensors: changed"):
        pins.hold(checkpoint)
    path.unlink()
    with pytest.raises(InputError, match=r"run/a-100\.safetensors: cannot open: No such file"):
        pins.hold(checkpoint)
    pins.release()


def test_errors_have_the_names_the_user_knows(tmp_path: Path, state: Path) -> None:
    """Whatever part of an error holds the name of a link."""
    path = write_checkpoint(tmp_path / "run" / "a-100.safetensors", floats())
    pins = Pins(str(state))
    mine = pins.hold(looked_at(path)).path
    named = pins.named(DamagedFile(mine, "no good", "w"))
    assert isinstance(named, DamagedFile)
    assert named.args == (str(path), "no good", "w")
    assert pins.named(NonFinite(f"{mine}: NaN")).message == f"{path}: NaN"
    other = NonFinite("elsewhere: NaN")
    assert pins.named(other) is other


def test_what_a_killed_process_left_is_replaced_and_removed(tmp_path: Path, state: Path) -> None:
    """Also where it is of another shape; a link out of the state is not followed."""
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "gold").touch()
    (state / "pins" / "100" / "deep").mkdir(parents=True)
    (state / "pins" / "link").symlink_to(treasure)
    path = write_checkpoint(tmp_path / "run" / "a-100.safetensors", floats())
    pins = Pins(str(state))
    pinned = pins.hold(looked_at(path))
    assert [found.name for found in Path(pinned.path).parent.iterdir()] == [path.name]
    remove_all(str(state))
    assert list(state.iterdir()) == []
    assert (treasure / "gold").exists()
    remove_all(str(state))
