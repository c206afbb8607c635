"""A damaged byte is found while it is read, and told with the name of its tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BF16, bits_equal, cmd
from tensorflow_bundles import (
    ALL,
    Opaque,
    Sliced,
    read_bundle,
    rewritten,
    rows_of,
    shard_file,
    strings,
    tensorflow_run,
    variants,
    write_bundle,
)

import ema_cli
from ema_cli import engine, verifying, worker
from ema_cli.errors import DamagedFile
from ema_cli.formats import read
from ema_cli.formats.tensorflow import ordered

STEPS = (100, 200, 300)
SHADOW = "/ExponentialMovingAverage"
COLUMNS = [(ALL, (0, 3)), (ALL, (3, 5))]


def tensors(k: int) -> dict[str, Any]:
    """One of everything, different at each step."""
    rng = np.random.default_rng(k)
    made: dict[str, Any] = {
        f"small/{n:02}": rng.normal(size=n % 3 + 1).astype("f4") for n in range(30)
    }
    made |= {
        "huge": rng.normal(size=30_000).astype("f4"),
        "half": rng.normal(size=9).astype(np.float16),
        "brain": rng.normal(size=(3, 3)).astype(BF16),
        "double": rng.normal(size=7),
        "sliced": Sliced(rng.normal(size=(6, 8)).astype("f4"), COLUMNS),
        "sliced/brain": Sliced(rng.normal(size=(6, 8)).astype(BF16), COLUMNS),
        "scalar": np.float32(k),
        "huge/Adam": rng.normal(size=30_000).astype("f4"),
        "count": np.int64([k, k]),
        "counts": Sliced(rng.integers(0, 9, (6, 8)), COLUMNS),
        "complex": np.complex128([k + 1j]),
        "text": strings([b"ab", b"", b"c" * 40]),
        "list": variants([b"abc", b""]),
        "q": Opaque(11, (4,), bytes(range(4))),
    }
    return made


AVERAGED = ["small/00", "small/17", "small/29", "huge", "half", "brain", "double"]
AVERAGED += ["sliced", "sliced/brain", "scalar"]
COPIED = ["count", "counts", "complex", "text", "list", "q"]
ARRAYS = [*AVERAGED, "count", "counts"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints in two shards."""
    return tensorflow_run(tmp_path / "run", [tensors(k) for k in (1, 2, 3)], shards=2, gap=1)


@pytest.fixture(params=["as it is", "in tiny pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tasks and blocks as they are, or so small that nearly every tensor is cut."""
    if request.param != "as it is":
        monkeypatch.setattr(engine, "TASK_ELEMENTS", 1000)
        monkeypatch.setattr(engine, "BLOCK_ELEMENTS", 96)
        monkeypatch.setattr(worker, "COPY_BLOCK", 64)
        monkeypatch.setattr(verifying, "_BLOCK", 40)
    return str(request.param)


def place_of(prefix: Path, tensor: str) -> tuple[Path, int, int]:
    """The file of a tensor, or of its last slice, with offset and size in it."""
    _, rows = rows_of(prefix)
    row = rows[tensor.encode()]
    if row.slices:
        row = rows[ordered.slice_key(tensor.encode(), row.slices[-1])]
    return shard_file(prefix, row.shard, 2), row.offset, row.size


def damage(prefix: Path, tensor: str, at: float = 0.5) -> Path:
    """Flip one bit of a tensor; returns the file it lies in."""
    path, offset, size = place_of(prefix, tensor)
    data = bytearray(path.read_bytes())
    data[offset + int(at * (size - 1))] ^= 1
    path.write_bytes(data)
    return path


def refused(path: Path, tensor: str, *words: Any) -> None:
    """Run a command that meets the damage."""
    outcome = cmd(*words, code=12)
    assert f"{path}: tensor '{tensor}'" in outcome.err


# ---------------------------------------------------------------------------- run


@pytest.mark.parametrize("names", ["shadow", "variable"])
def test_a_sound_run_is_averaged(run: Path, tmp_path: Path, pieces: str, names: str) -> None:
    """The mean of three, whatever a tensor is and however it is cut."""
    out = tmp_path / "out"
    cmd("run", run, "-o", out, "--average", "mean", "--names", names)
    found = read_bundle(out)
    last = read_bundle(run / "model.ckpt-300")
    for tensor in AVERAGED:
        values = [read_bundle(run / f"model.ckpt-{step}")[tensor] for step in STEPS]
        wide = np.dtype(np.float64) if values[0].dtype == np.float64 else np.dtype(np.float32)
        shadow = values[0].astype(wide)
        for k, value in enumerate(values[1:], start=2):
            shadow = np.asarray(shadow - (shadow - value.astype(wide)) * wide.type(1 / k))
        name = tensor if names == "variable" else tensor + SHADOW
        assert bits_equal(found[name], shadow.astype(values[0].dtype)), tensor
    for tensor in COPIED:
        expected = last[tensor]
        same = found[tensor] == expected
        assert same if isinstance(same, bool) else same.all(), tensor


@pytest.mark.parametrize("tensor", AVERAGED)
def test_damage_to_an_averaged_tensor_is_found(
    run: Path, tmp_path: Path, pieces: str, tensor: str
) -> None:
    """In any checkpoint of the run, whichever range its bytes are read with."""
    path = damage(run / "model.ckpt-200", tensor)
    refused(path, tensor, "run", run, "-o", tmp_path / "out", "--average", "mean")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("tensor", COPIED)
def test_damage_to_a_copied_tensor_is_found(
    run: Path, tmp_path: Path, pieces: str, tensor: str
) -> None:
    """In the last checkpoint, from which it is copied; what the others hold is not read."""
    damage(run / "model.ckpt-100", tensor)
    cmd("run", run, "-o", tmp_path / "out", "--average", "mean")
    path = damage(run / "model.ckpt-300", tensor)
    for names in ("shadow", "variable"):
        words = ("-o", tmp_path / "other", "--average", "mean", "--names", names)
        refused(path, tensor, "run", run, *words)
    assert not list(tmp_path.glob("*other*"))


@pytest.mark.parametrize("at", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("tensor", ["small/05", "huge", "sliced", "text", "list"])
def test_damage_to_any_byte_is_found(run: Path, tmp_path: Path, tensor: str, at: float) -> None:
    """The first, the last, lengths and checksums of strings."""
    path = damage(run / "model.ckpt-300", tensor, at)
    refused(path, tensor, "run", run, "-o", tmp_path / "out", "--average", "mean")


@pytest.mark.parametrize("tensor", ["small/00", "scalar", "double", "huge", "sliced/brain"])
def test_damage_that_is_no_number_is_damage(run: Path, tmp_path: Path, tensor: str) -> None:
    """A NaN that was not saved is told as what it is: 12, not 17."""
    path, offset, size = place_of(run / "model.ckpt-200", tensor)
    data = path.read_bytes()
    width = 8 if tensor == "double" else 4
    path.write_bytes(data[: offset + size - width] + b"\xff" * width + data[offset + size :])
    refused(path, tensor, "run", run, "-o", tmp_path / "out", "--average", "mean")


def test_damage_to_what_is_not_read_is_no_error(run: Path, tmp_path: Path) -> None:
    """Optimizer state that is left out may hold anything; kept, it is verified."""
    expected, out = tmp_path / "expected", tmp_path / "out"
    cmd("run", run, "-o", expected, "--average", "mean")
    path = damage(run / "model.ckpt-300", "huge/Adam")
    cmd("run", run, "-o", out, "--average", "mean")
    assert shard_file(out).read_bytes() == shard_file(expected).read_bytes()
    for words in (("--optimizer", "keep"), ("--names", "variable")):
        refused(path, "huge/Adam", "run", run, "-o", tmp_path / "o", "--average", "mean", *words)


def test_bytes_between_tensors_may_be_anything(run: Path, tmp_path: Path) -> None:
    """They belong to no tensor, and no checksum tells of them."""
    for step in STEPS:
        for shard in range(2):
            path = shard_file(run / f"model.ckpt-{step}", shard, 2)
            assert path.read_bytes()[0] == 0xAA
            path.write_bytes(b"\0" + path.read_bytes()[1:] + b"more")
    cmd("run", run, "-o", tmp_path / "out", "--average", "mean")


@pytest.mark.parametrize("tensor", ["small/17", "huge", "sliced", "count", "text"])
def test_a_wrong_checksum_in_the_index_is_found(run: Path, tmp_path: Path, tensor: str) -> None:
    """Sound bytes with the checksum of others are refused in the same words."""
    prefix = run / "model.ckpt-300"

    def other(rows: Any) -> None:
        row = rows[tensor.encode()]
        row = rows[ordered.slice_key(tensor.encode(), row.slices[0])] if row.slices else row
        row.crc ^= 1

    rewritten(prefix, other)
    outcome = cmd("run", run, "-o", tmp_path / "out", "--average", "mean", code=12)
    assert f"tensor '{tensor}'" in outcome.err
    assert "checksum" in outcome.err


@pytest.mark.parametrize("words", [["mean@last=2"], ["mean@100:200"], ["ema:1"], ["ema:0"]])
def test_sound_checkpoints_that_are_not_all_used(tmp_path: Path, words: list[str]) -> None:
    """Windows, and decays that skip checkpoints: those that are read have their own checksums."""
    values = [{"w": np.full(4, k, np.float32), "n": np.int32(k)} for k in range(1, 9)]
    run = tensorflow_run(tmp_path / "run", values)
    cmd("run", run, "-o", tmp_path / "out", "--average", *words)
    expected = {"mean@last=2": 7.5, "mean@100:200": 1.5, "ema:1": 1, "ema:0": 8}[words[0]]
    assert set(read_bundle(tmp_path / "out")[f"w{SHADOW}"]) == {np.float32(expected)}
    for step in (300, 400):
        damage_alone(run / f"model.ckpt-{step}")
    cmd("run", run, "-o", tmp_path / "other", "--average", *words)


def damage_alone(prefix: Path) -> None:
    """Change the first byte of a checkpoint in one shard."""
    path = shard_file(prefix)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def test_an_empty_tensor_with_a_wrong_checksum_is_named(tmp_path: Path) -> None:
    """It has no bytes that could be damaged, but an entry that lies."""
    prefix = write_bundle(tmp_path / "m-1", {"none": np.zeros((0, 2), "f4"), "w": np.float32(1)})

    def other(rows: Any) -> None:
        rows[b"none"].crc ^= 1

    outcome = cmd("inspect", rewritten(prefix, other), code=12)
    assert "tensor 'none'" in outcome.err


# ---------------------------------------------------------------------------- diff and the class


@pytest.mark.parametrize("tensor", [*AVERAGED, *COPIED])
def test_diff_finds_the_damage(run: Path, tmp_path: Path, tensor: str) -> None:
    """Damage is no difference: it is an error that names the tensor, whichever side it is on."""
    prefix = run / "model.ckpt-300"
    same = write_bundle(tmp_path / "same", tensors(3))
    cmd("diff", prefix, same)
    path = damage(prefix, tensor)
    refused(path, tensor, "diff", prefix, same)
    refused(path, tensor, "diff", same, prefix)


@pytest.mark.parametrize("tensor", ARRAYS)
def test_the_class_finds_the_damage(run: Path, tensor: str) -> None:
    """And keeps the shadows it had."""
    ema = ema_cli.ExponentialMovingAverage(0.5)
    ema.apply(run / "model.ckpt-100")
    path = damage(run / "model.ckpt-200", tensor)
    with pytest.raises(DamagedFile) as caught:
        ema.apply(run / "model.ckpt-200")
    assert caught.value.message.startswith(f"{path}: tensor '{tensor}'")
    before = read_bundle(run / "model.ckpt-100")
    assert bits_equal(np.asarray(ema.average("huge")), before["huge"])
    ema.apply(run / "model.ckpt-300")
    last = read_bundle(run / "model.ckpt-300")["huge"]
    half = before["huge"] - (before["huge"] - last) * np.float32(0.5)
    assert bits_equal(np.asarray(ema.average("huge")), half)


def test_the_checksums_of_the_fixtures_are_right() -> None:
    """Every extent of what TensorFlow wrote has the checksum its index holds."""
    folder = Path(__file__).resolve().parent.parent.parent / "fixtures" / "tensorflow"
    checked = 0
    for index in sorted(folder.rglob("*.index")):
        checkpoint = read(str(index), {})
        for tensor in checkpoint.index.tensors:
            if tensor.dtype.bits:
                assert verifying.check(checkpoint, tensor) is None
                checked += 1
    assert checked > 500
