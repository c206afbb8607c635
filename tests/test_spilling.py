"""What has to be unpacked before it can be read: compressed NumPy archives, from plan to trash."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact import tensorflow_coefficient
from helpers import Failing, bits_equal, cmd, read_checkpoint

import ema_cli
from ema_cli import durable
from ema_cli.errors import DamagedFile, StorageError

Array = np.ndarray[Any, Any]
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
COMPRESSED, STORED = FIXTURES / "npz" / "compressed", FIXTURES / "npz" / "run"
SUFFIX = "/ExponentialMovingAverage"


@pytest.fixture(autouse=True)
def temporaries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where temporary directories are made; nothing may be left there."""
    folder = tmp_path_factory.mktemp("temporaries")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        yield folder
    assert list(folder.iterdir()) == []


def arrays(k: int) -> dict[str, Array]:
    rng = np.random.default_rng(k)
    return {
        "w": rng.normal(size=(40, 30)).astype(np.float32),
        "turned": np.asfortranarray(rng.normal(size=(7, 9))),
        "half": rng.normal(size=11).astype(np.float16),
        "empty": np.zeros((0, 3), np.float32),
        "count": np.arange(5) + k,
    }


def write_npz(path: Path, tensors: dict[str, Array], stored: tuple[str, ...] = ()) -> Path:
    """Write arrays deflated, but for some of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in tensors.items():
            method = zipfile.ZIP_STORED if name in stored else zipfile.ZIP_DEFLATED
            info = zipfile.ZipInfo(f"{name}.npy")
            info.compress_type = method
            with archive.open(info, "w") as member:
                np.lib.format.write_array(member, array)
    return path


def run_of(folder: Path, stored: tuple[str, ...] = ()) -> Path:
    for k in (1, 2, 3):
        write_npz(folder / f"m-{k}.npz", arrays(k), stored)
    return folder


def expected(name: str, decay: float = 0.9) -> Array:
    values = [arrays(k)[name] for k in (1, 2, 3)]
    wide = np.dtype(np.float32) if values[0].itemsize == 2 else values[0].dtype
    c = wide.type(float(tensorflow_coefficient(decay, None)))
    shadow = values[0].astype(wide)
    for value in values[1:]:
        shadow = np.asarray(shadow - np.asarray(shadow - value.astype(wide)) * c)
    return shadow.astype(values[0].dtype)


def tensors_in(path: Path) -> dict[str, Array]:
    if path.suffix == ".npz":
        with np.load(path) as archive:
            return dict(archive)
    return read_checkpoint(path)


# ---------------------------------------------------------------------------- values


@pytest.mark.parametrize("stored", [(), ("w",), ("turned", "count")], ids=["none", "w", "others"])
@pytest.mark.parametrize("names", ["variable", "shadow"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_deflated_arrays_are_averaged(
    tmp_path: Path, suffix: str, names: str, stored: tuple[str, ...]
) -> None:
    """All of an archive deflated, or some: the same values, in new files of stored arrays."""
    run = run_of(tmp_path / "run", stored)
    out = tmp_path / f"out{suffix}"
    ema_cli.average_run(run, out, decay=0.9, names=names)
    found = tensors_in(out)
    for name in ("w", "turned", "half", "empty"):
        shadow = found[name + SUFFIX if names == "shadow" else name]
        assert bits_equal(np.ascontiguousarray(shadow), np.ascontiguousarray(expected(name))), name
    assert bits_equal(found["count"], arrays(3)["count"])
    assert {path.name for path in tmp_path.iterdir()} == {"run", out.name, f"{out.name}.ema.json"}
    assert cmd("run", run, "-o", out, "--decay", "0.9", "--names", names).code == 0


def test_compressed_and_stored_fixtures_average_alike(tmp_path: Path) -> None:
    """The same training, saved by savez and by savez_compressed."""
    for folder in (COMPRESSED, STORED):
        ema_cli.average_run(folder, tmp_path / f"{folder.name}.safetensors", decay=0.9)
    one, other = (read_checkpoint(tmp_path / f"{f.name}.safetensors") for f in (COMPRESSED, STORED))
    assert one.keys() == other.keys()
    assert all(bits_equal(one[name], other[name]) for name in one)


def test_mixed_runs_unpack_only_what_they_must(tmp_path: Path) -> None:
    """One checkpoint of three is compressed, and only its averaged arrays are unpacked."""
    for k in (1, 2, 3):
        stored = ("w", "turned", "half", "count") if k != 2 else ()
        write_npz(tmp_path / "run" / f"m-{k}.npz", arrays(k), stored)
    plan = ema_cli.plan_run(tmp_path / "run", tmp_path / "out.npz", decay=0.9, names="variable")
    averaged = ("w", "turned", "half")
    assert plan.costs.spill == sum(arrays(2)[name].nbytes for name in averaged)
    assert [sorted(names) for names in plan.work.spilled] == [[], sorted(averaged), []]
    assert plan.outcomes[0].layout.template
    ema_cli.average_run(tmp_path / "run", tmp_path / "out.npz", decay=0.9, names="variable")
    for name in averaged:
        assert bits_equal(tensors_in(tmp_path / "out.npz")[name], expected(name))


def test_the_plan_says_what_is_unpacked(tmp_path: Path) -> None:
    """In words and as a number; without anything to unpack, nothing of the kind."""
    words = cmd("plan", COMPRESSED, "-o", tmp_path / "out.npz").out
    assert "unpacks 7.4 KiB to a temporary file first" in words
    assert "unpacks" not in cmd("plan", STORED, "-o", tmp_path / "out.npz").out
    assert ema_cli.plan_run(COMPRESSED).costs.spill == 3 * 2536 + 8


def test_diff_reads_compressed_arrays(tmp_path: Path) -> None:
    """On either side, and tells a difference to the element."""
    packed = write_npz(tmp_path / "packed.npz", arrays(1))
    plain = write_npz(tmp_path / "plain.npz", arrays(1), tuple(arrays(1)))
    assert not ema_cli.diff(packed, plain) and not ema_cli.diff(plain, packed)
    changed = arrays(1)
    changed["turned"][3, 4] += 1
    [difference] = ema_cli.diff(write_npz(tmp_path / "changed.npz", changed), packed).differences
    assert (difference.tensor, difference.count) == ("turned", 1)
    assert difference.max_abs == pytest.approx(1)
    cmd("diff", tmp_path / "changed.npz", plain, code=13)


def test_the_class_reads_compressed_arrays(temporaries: Path) -> None:
    """Its temporary files go with what was read, and with the object."""
    by_path, by_array = (ema_cli.ExponentialMovingAverage(0.9) for _ in range(2))
    for k in (1, 2, 3):
        path = COMPRESSED / f"epoch-{k}.npz"
        by_path.apply(path)
        with np.load(path) as archive:
            by_array.apply(dict(archive))
    for name in ("digits/hidden/kernel", "digits/logits/bias"):
        assert bits_equal(np.asarray(by_path.average(name)), np.asarray(by_array.average(name)))
    assert len(list(temporaries.iterdir())) == 2  # the stores of the two objects
    del by_path, by_array


def test_renaming_unpacks(tmp_path: Path) -> None:
    """A renamed copy of a compressed archive has its values."""
    packed = write_npz(tmp_path / "packed.npz", arrays(1))
    ema_cli.rename(packed, tmp_path / "out.npz", rule=[("^w$", "kernel")])
    found = tensors_in(tmp_path / "out.npz")
    assert bits_equal(found["kernel"], arrays(1)["w"])
    assert bits_equal(
        np.ascontiguousarray(found["turned"]), np.array(arrays(1)["turned"], order="C")
    )


# ---------------------------------------------------------------------------- damage


def flip_crc(path: Path, name: str) -> None:
    """Change the CRC of a member at both places that tell it."""
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        crc = archive.getinfo(f"{name}.npy").CRC.to_bytes(4, "little")
    assert raw.count(crc) == 2
    path.write_bytes(raw.replace(crc, bytes([crc[0] ^ 1]) + crc[1:]))


def test_a_wrong_crc_in_a_deflated_member_is_found(tmp_path: Path) -> None:
    """By a run, diff and the class; nothing is left behind."""
    run = run_of(tmp_path / "run")
    flip_crc(run / "m-2.npz", "w")
    done = cmd("run", run, "-o", tmp_path / "out.npz", "--decay", "0.9", code=12)
    assert "m-2.npz: " in done.err
    assert "w.npy': expected CRC-32" in done.err
    cmd("diff", run / "m-1.npz", run / "m-2.npz", code=12)
    ema = ema_cli.ExponentialMovingAverage(0.9)
    with pytest.raises(DamagedFile, match="expected CRC-32"):
        ema.apply(run / "m-2.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_member_that_is_not_needed_is_not_unpacked(tmp_path: Path) -> None:
    """Of another checkpoint than the last only what is averaged is read."""
    run = run_of(tmp_path / "run")
    flip_crc(run / "m-2.npz", "count")
    cmd("run", run, "-o", tmp_path / "out.npz", "--decay", "0.9")
    flip_crc(run / "m-3.npz", "count")
    cmd("run", run, "-o", tmp_path / "other.npz", "--decay", "0.9", code=12)


def test_a_nan_in_a_deflated_member_is_traced(tmp_path: Path) -> None:
    """To the archive, not to the temporary file."""
    run = run_of(tmp_path / "run")
    tensors = arrays(2)
    tensors["turned"][2, 3] = np.nan
    write_npz(run / "m-2.npz", tensors)
    done = cmd("run", run, "-o", tmp_path / "out.npz", "--decay", "0.9", code=17)
    assert "m-2.npz: tensor 'turned' holds nan" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ---------------------------------------------------------------------------- full disks


@pytest.mark.parametrize("nth", [1, 2, 4, 9])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, code: int
) -> None:
    """While unpacking as while writing the output: exit 15."""
    run = run_of(tmp_path / "run")
    failing = Failing(os.pwrite, nth, code)
    monkeypatch.setattr(os, "pwrite", failing)
    done = cmd("run", run, "-o", tmp_path / "new" / "out.npz", "--decay", "0.9", code=15)
    assert len(failing.calls) >= nth
    assert os.strerror(code) in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_disk_without_room_to_unpack_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is needed and what there is; by diff and the class for their temporary files too."""
    run = run_of(tmp_path / "run")
    monkeypatch.setattr(durable, "free_bytes", lambda _: 100)
    done = cmd("run", run, "-o", tmp_path / "out.npz", "--decay", "0.9", code=15)
    assert "for what cannot be read in place, the disk has 100 bytes free" in done.err
    assert "hint: free some space, or save the checkpoints without compression" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    done = cmd("diff", run / "m-1.npz", run / "m-2.npz", code=15)
    assert "the disk has 100 bytes free" in done.err
    with pytest.raises(StorageError, match="100 bytes free"):
        ema_cli.ExponentialMovingAverage(0.9).apply(run / "m-1.npz")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_no_temporary_directory_is_an_error_of_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Where not even that can be made."""
    run = run_of(tmp_path / "run")

    def refuse(*_: Any, **__: Any) -> str:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    done = cmd("diff", run / "m-1.npz", run / "m-2.npz", code=15)
    assert os.strerror(code) in done.err


# ---------------------------------------------------------------------------- interruptions


LARGE = 1 << 25


@pytest.fixture(scope="module")
def large_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three archives of 128 MiB of zeros: small on disk, and some time to unpack."""
    folder = tmp_path_factory.mktemp("large")
    first = write_npz(folder / "m-1.npz", {"w": np.zeros(LARGE, np.float32)})
    for k in (2, 3):
        os.link(first, folder / f"{k}.tmp")
        (folder / f"m-{k}.npz").write_bytes((folder / f"{k}.tmp").read_bytes())
        (folder / f"{k}.tmp").unlink()
    return folder


@contextmanager
def unpacking(run: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """A child that is in the middle of unpacking."""
    words = [sys.executable, "-m", "ema_cli", "run", run, "-o", out, "--average", "mean"]
    spill = out.parent / f".{out.name}.ema-avg.spill"
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as child:
        try:
            deadline = time.monotonic() + 60
            while not (spill.is_dir() and list(spill.iterdir())):
                assert child.poll() is None, child.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.0005)
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_unpacking_leaves_nothing(
    large_run: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """No output, no unpacked file, one line that says so."""
    with unpacking(large_run, tmp_path / "out.npz") as child:
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (code, "")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_unpacked_is_removed_by_the_next(large_run: Path, tmp_path: Path) -> None:
    """SIGKILL leaves unpacked files, which a search passes over and the same command removes."""
    with unpacking(large_run, tmp_path / "out.npz") as child:
        child.kill()
        child.communicate(timeout=60)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".out.npz.ema-avg.spill", ".out.npz.ema-avg.tmp"]
    found = cmd("run", tmp_path, "-o", tmp_path / "else.npz", code=10)
    assert "left by an interrupted run of ema-avg" in found.err
    small = run_of(tmp_path / "small")
    cmd("run", small, "-o", tmp_path / "out.npz", "--decay", "0.9")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"small", "out.npz", "out.npz.ema.json"}


def test_two_runs_do_not_unpack_to_one_place(large_run: Path, tmp_path: Path) -> None:
    """The second is told that the output is being written."""
    small = run_of(tmp_path / "small")
    with unpacking(large_run, tmp_path / "out.npz") as child:
        done = cmd("run", small, "-o", tmp_path / "out.npz", "--decay", "0.9", code=11)
        assert "another process is writing" in done.err
        assert (tmp_path / ".out.npz.ema-avg.spill").is_dir()
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
