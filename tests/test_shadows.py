"""Where shadows live: which tensors get one, what the slot files hold, what failures leave."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact import tensorflow_coefficient
from helpers import CODES, bits_equal, dtype_of, raw_safetensors, read_checkpoint, write_checkpoint
from safetensors import safe_open

import ema_cli
from ema_cli import ExponentialMovingAverage
from ema_cli.errors import Disagreement, InputError, Locked, OtherSettings, StorageError

Array = np.ndarray[Any, Any]
ONE = {"v": np.float32([1, 2, 3]), "w": np.float32([4])}
TWO = {"v": np.float32([5, 0, -1]), "w": np.float32([-4])}


def mixed(shadow: Array, value: Array, decay: float = 0.5, n: int | None = None) -> Array:
    """One update of TensorFlow's, each operation rounded to the dtype of the variable."""
    omd = value.dtype.type(float(tensorflow_coefficient(decay, n)))
    return np.asarray(shadow - np.asarray(np.asarray(shadow - value) * omd))


def held(ema: ExponentialMovingAverage, name: str) -> Array:
    return np.array(ema.average(name))


def two_steps(**given: Any) -> ExponentialMovingAverage:
    ema = ExponentialMovingAverage(0.5, **given)
    ema.apply(ONE)
    ema.apply(TWO)
    return ema


# ---------------------------------------------------------------------------- var_list


def test_subsets_and_late_variables_have_their_own_history() -> None:
    """A late variable starts by being copied; one that is left out keeps its shadow."""
    ema = ExponentialMovingAverage(0.5)
    ema.apply(ONE, ["v"])
    assert ema.average("w") is None
    ema.apply(TWO, ["w"])
    assert bits_equal(held(ema, "v"), ONE["v"])
    assert bits_equal(held(ema, "w"), TWO["w"])
    ema.apply({"v": TWO["v"]})
    assert bits_equal(held(ema, "v"), mixed(ONE["v"], TWO["v"]))
    assert bits_equal(held(ema, "w"), TWO["w"])
    ema.apply(ONE, ["w", "w"])
    assert bits_equal(held(ema, "w"), mixed(TWO["w"], ONE["w"]))


def test_statistics_and_the_like_are_copied_unless_listed(digits_run: Path, tmp_path: Path) -> None:
    """As in TensorFlow, where they are no trainable variables; the last ones are kept."""
    name = "hidden1/batch_norm/moving_mean"
    paths = sorted(digits_run.iterdir())[:2]
    ema = ExponentialMovingAverage(0.5, store=tmp_path)
    for path in paths:
        ema.apply(path)
    for other in (name, "logits/kernel/Momentum", "global_step", "no such tensor"):
        assert ema.average(other) is None
    slot, first, last = (read_checkpoint(p) for p in (tmp_path / "slot.1", *paths))
    assert slot.keys() == last.keys()
    for other in (name, "logits/kernel/Momentum", "global_step"):
        assert bits_equal(slot[other], last[other])
    listed = ExponentialMovingAverage(0.5)
    for path in paths:
        listed.apply(path, [name])
    assert bits_equal(held(listed, name), mixed(first[name], last[name]))
    assert listed.average("logits/bias") is None


REFUSED = {
    "integer": ({**TWO, "i": np.int32([1])}, ["v", "i"], TypeError, "half, float, or double: i"),
    "missing": (TWO, ["w", "u"], Disagreement, "'u' is missing"),
    "shape": ({"v": np.float32([1, 2])}, ["v"], Disagreement, r"\[3\].*found float32 \[2\]"),
    "dtype": ({"v": np.float64([1, 2, 3])}, ["v"], Disagreement, "float32.*found float64"),
    "shape, by default": ({"v": np.float32([1, 2])}, None, Disagreement, r"found float32 \[2\]"),
    "longer, by default": ({"v": np.float32([1] * 9)}, None, Disagreement, r"found float32 \[9\]"),
    "dtype, by default": ({"v": np.float64([1, 2, 3])}, None, Disagreement, "found float64"),
    "now an integer": ({"v": np.int32([1, 2, 3])}, None, Disagreement, "found int32"),
    "text": ({**TWO, "t": np.array(["a"])}, ["v"], TypeError, "'t'.*<U1"),
}


@pytest.mark.parametrize("values, names, error, text", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_whole(
    values: dict[str, Array], names: list[str] | None, error: type[Exception], text: str
) -> None:
    """One wrong tensor refuses the call: no shadow moves, and the next call goes on as before."""
    ema = ExponentialMovingAverage(0.5, "count")
    ema.apply(ONE)
    with pytest.raises(error, match=text):
        ema.apply(values, names)
    assert bits_equal(held(ema, "v"), ONE["v"])
    ema.apply(TWO)
    assert bits_equal(held(ema, "v"), mixed(ONE["v"], TWO["v"], n=1))
    assert bits_equal(held(ema, "w"), mixed(ONE["w"], TWO["w"], n=1))


def test_an_unknown_name_is_answered_with_one_that_looks_like_it(digits_run: Path) -> None:
    """The hint of the error names the tensor that was probably meant."""
    with pytest.raises(Disagreement, match="'logit/kernel' is missing") as caught:
        ExponentialMovingAverage(0.5).apply(sorted(digits_run.iterdir())[0], ["logit/kernel"])
    assert "logits/kernel" in caught.value.hint


def test_scalars_and_empty_tensors_have_shadows() -> None:
    """Shapes without elements or without dimensions are shapes like any other."""
    shapes = {"scalar": (), "empty": (0,), "flat": (3, 0, 2)}
    values = [{n: np.full(s, k, np.float32) for n, s in shapes.items()} for k in (1, 3)]
    ema = ExponentialMovingAverage(0.5)
    for value in values:
        ema.apply(value)
    for name in shapes:
        assert bits_equal(held(ema, name), mixed(values[0][name], values[1][name])), name


# ---------------------------------------------------------------------------- slots


def test_averages_are_read_only_maps_of_the_slots(tmp_path: Path) -> None:
    """Nothing is loaded and nothing can be changed by the reader."""
    ema = two_steps(store=tmp_path)
    found = ema.average("v")
    assert isinstance(found, np.memmap)
    assert Path(str(found.filename)).parent == tmp_path
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 0


def test_an_average_stays_as_it_was_until_the_second_next_apply(tmp_path: Path) -> None:
    """Also when tensors come, go or grow in between, which gives the slots another layout."""
    ema = ExponentialMovingAverage(0.5, store=tmp_path)
    before: tuple[Array, Array] | None = None
    for k, extra in enumerate((0, 0, 5000, 5000, 3, 3, 0, 9000, 0, 0, 1)):
        more = {"a": np.zeros(extra, np.uint8)} if extra else {}
        ema.apply({**more, "v": np.full(3000, k, np.float32)})
        if before is not None:
            assert bits_equal(np.array(before[0]), before[1]), k
        now = ema.average("v")
        assert now is not None
        before = now, np.array(now)


def test_slots_are_safetensors_files_with_aligned_data(tmp_path: Path) -> None:
    """The reference reader opens them; shadows and copied tensors lie in them from 4 KiB on."""
    copied = {"n": np.int64(7), "flag": np.array([True, False]), "z": np.complex64([1j])}
    ema = ExponentialMovingAverage(0.5, store=tmp_path)
    for k, values in enumerate((ONE, TWO)):
        ema.apply({**copied, **values})
        path = tmp_path / f"slot.{k}"
        assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 4096 == 0
        expected = {**copied, "v": held(ema, "v"), "w": held(ema, "w")}
        slot = read_checkpoint(path)
        assert slot.keys() == expected.keys()
        assert all(bits_equal(slot[name], np.asarray(expected[name])) for name in slot)
        with safe_open(path, framework="np") as reader:
            assert set(reader.keys()) == set(expected)
            assert np.array_equal(reader.get_tensor("v"), slot["v"])
    assert sorted(path.name for path in tmp_path.glob("slot*")) == ["slot.0", "slot.1"]


def test_every_dtype_is_carried_along_in_the_slots(tmp_path: Path) -> None:
    """What is not averaged is kept bit for bit, whatever its dtype."""
    raw = np.random.default_rng(3).bytes(48)
    others = {
        name: np.frombuffer(raw if name != "bool" else bytes([0, 1]), dtype_of(name))
        for name in CODES
        if name not in ("float16", "bfloat16", "float32", "float64")
    }
    ema = ExponentialMovingAverage(0.5, store=tmp_path / "store")
    ema.apply(write_checkpoint(tmp_path / "step-1.safetensors", {**ONE, **others}))
    slot = read_checkpoint(tmp_path / "store" / "slot.0")
    assert all(bits_equal(slot[name], value) for name, value in others.items())


def test_a_temporary_store_goes_with_its_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `store` the slots lie in a temporary directory; no file outlives the object."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ema = two_steps()
    average = ema.average("v")
    assert len(list(tmp_path.rglob("slot.*"))) == 2
    del ema
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    assert average is not None
    assert bits_equal(np.array(average), mixed(ONE["v"], TWO["v"]))


def test_a_store_is_written_by_one_object_at_a_time(tmp_path: Path) -> None:
    """Another object is refused as long as the first is there."""
    ema = two_steps(store=tmp_path)
    with pytest.raises(Locked, match="LOCK"):
        ExponentialMovingAverage(0.5, store=tmp_path)
    assert bits_equal(held(ema, "v"), mixed(ONE["v"], TWO["v"]))


@pytest.mark.parametrize("debias", [False, True])
def test_a_store_is_continued_to_the_same_bits(tmp_path: Path, debias: bool) -> None:
    """What one object per checkpoint makes is what one object makes of all of them."""
    once = ExponentialMovingAverage(0.5, "count", debias)
    for values in (ONE, TWO, ONE, TWO):
        once.apply(values)
        again = ExponentialMovingAverage(0.5, "count", debias, store=tmp_path)
        again.apply(values)
        for name in ONE:
            assert bits_equal(held(again, name), held(once, name))
            assert again.average_name(name) == once.average_name(name)
        assert again.variables_to_restore() == once.variables_to_restore()
        del again
        gc.collect()
    with pytest.raises(OtherSettings, match=r"'decay': 0\.5"):
        ExponentialMovingAverage(0.25, "count", debias, store=tmp_path)


def test_a_store_of_the_class_is_a_state(tmp_path: Path) -> None:
    """It can be inspected and exported; `run` does not continue it."""
    ema = two_steps(store=tmp_path / "S")
    out = tmp_path / "out.safetensors"
    ema_cli.export(tmp_path / "S", out, names="variable")
    for name, value in read_checkpoint(out).items():
        assert bits_equal(value, held(ema, name))
    found: Any = ema_cli.inspect(tmp_path / "S")
    assert found.weights == ((0.5, 0.5),)
    del ema
    gc.collect()
    write_checkpoint(tmp_path / "m-1.safetensors", ONE)
    with pytest.raises(OtherSettings, match="ExponentialMovingAverage"):
        ema_cli.average_run(tmp_path / "m-1.safetensors", state=tmp_path / "S", decay=0.5)


# ---------------------------------------------------------------------------- failures


def failing(call: Any, after: int, code: int) -> Any:
    """Return `call` as it is when a disk breaks: the first `after` calls work, no later one."""
    calls = iter(range(after))

    def broken(*args: Any) -> Any:
        if next(calls, None) is None:
            raise OSError(code, os.strerror(code))
        return call(*args)

    return broken


@pytest.mark.parametrize("extra", [{}, {"u": np.float32([1])}], ids=["same", "another layout"])
@pytest.mark.parametrize("after", range(2))
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_broken_disk_leaves_the_generation_before(
    monkeypatch: pytest.MonkeyPatch, code: int, after: int, extra: dict[str, Array]
) -> None:
    """Wherever writing stops, the average is what it was, and applying again works."""
    ema = ExponentialMovingAverage(0.5, "count")
    for values, n in ((ONE, 0), (TWO, 1), (ONE, 2)):
        before = {name: (ema.average(name), held(ema, name)) for name in values if n}
        with monkeypatch.context() as patch, pytest.raises(StorageError) as caught:
            patch.setattr(os, "pwrite", failing(os.pwrite, after, code))
            ema.apply({**extra, **values})
        assert os.strerror(code) in caught.value.message
        assert n or ema.average("v") is None
        for name, (mapped, copy) in before.items():
            assert bits_equal(held(ema, name), copy)
            assert bits_equal(np.array(mapped), copy)
        ema.apply({**extra, **values})
        for name, (_, copy) in before.items():
            assert bits_equal(held(ema, name), mixed(copy, values[name], n=n))


def test_a_checkpoint_that_cannot_be_read_changes_nothing(tmp_path: Path) -> None:
    """Missing or damaged files are errors, and the shadows stay usable."""
    ema = ExponentialMovingAverage(0.5, "count")
    ema.apply(write_checkpoint(tmp_path / "a.safetensors", ONE))
    damaged = write_checkpoint(tmp_path / "b.safetensors", TWO)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for path in (damaged, tmp_path / "none.safetensors"):
        with pytest.raises(InputError, match=path.name):
            ema.apply(path)
    ema.apply(TWO)
    assert bits_equal(held(ema, "v"), mixed(ONE["v"], TWO["v"], n=1))


MEASURED = """
import resource, sys
import numpy as np
import ema_cli
from ema_cli import ExponentialMovingAverage
for checkpoint in ({"v": np.ones(1, np.float32)}, sys.argv[1]):
    ema = ExponentialMovingAverage(0.5)
    ema.apply(checkpoint)
    ema.apply(checkpoint)
    assert ema.average("v").dtype == np.float32
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak >> (20 if sys.platform == "darwin" else 10))
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """Two applies of 192 MiB, sparse and mostly zero, take less than 32 MiB more than of none."""
    n_bytes = 192 << 20
    path = tmp_path / "big.safetensors"
    entry = {"v": {"dtype": "F32", "shape": [n_bytes // 4], "data_offsets": [0, n_bytes]}}
    path.write_bytes(raw_safetensors(entry))
    os.truncate(path, path.stat().st_size + n_bytes)
    command = [sys.executable, "-c", MEASURED, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    small, big = map(int, done.stdout.split())
    assert big - small < 32, done.stdout
