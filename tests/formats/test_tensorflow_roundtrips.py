"""Any checkpoint, through a run of one: the same values in every kind of output."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import CODES, bits_equal, cmd, read_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorflow_bundles import (
    ALL,
    NUMBER_OF,
    Extents,
    Sliced,
    read_bundle,
    rows_of,
    shard_file,
    strings,
    write_bundle,
)
from tensorflow_strategies import AVERAGED, Shape, filled, shapes, tilings

from ema_cli.formats.tensorflow import can_name
from ema_cli.formats.tensorflow.entries import parse_header

SHADOW = "/ExponentialMovingAverage"
COPIED = ["bool", "uint8", "int16", "uint32", "int64", "complex64", "complex128", "int4"]

few = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
numbered = itertools.count()


# ---------------------------------------------------------------------------- strategies

names = st.binary(min_size=1, max_size=12).filter(lambda name: can_name(text_of(name)))
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


def text_of(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


@st.composite
def tensors(draw: st.DrawFn, called: Any = names) -> dict[Any, Any]:
    """A checkpoint: at least one tensor to average, some in slices, some to copy."""
    made: dict[Any, Any] = {}
    for k, name in enumerate(draw(st.lists(called, unique=True, min_size=1, max_size=6))):
        dtype = draw(st.sampled_from(AVERAGED if not k else AVERAGED + COPIED))
        shape = draw(shapes)
        value = filled(dtype, shape, k)
        if draw(st.booleans()):
            made[name] = Sliced(value, draw(tilings(shape)))
        else:
            made[name] = value
    return made


def plain(value: Any) -> np.ndarray:
    return value.value if isinstance(value, Sliced) else value


def fresh_folder(tmp_path: Path) -> Path:
    """A folder for one example."""
    folder = tmp_path / str(next(numbered))
    folder.mkdir()
    return folder


def check_shadows(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """What is averaged stands under its shadow's name, the rest under its own."""
    shadows = {n for n, value in expected.items() if value.dtype.name in AVERAGED}
    assert set(found) == {f"{n}{SHADOW}" if n in shadows else n for n in expected}
    for name, value in expected.items():
        assert bits_equal(found[f"{name}{SHADOW}" if name in shadows else name], value), name


# ---------------------------------------------------------------------------- round trips


@few
@given(made=tensors(), shards=st.integers(1, 3), big_endian=st.booleans())
def test_a_template_output_of_one_checkpoint_is_that_checkpoint(
    tmp_path: Path, made: dict[bytes, Any], shards: int, big_endian: bool
) -> None:
    """Byte for byte: data, index, order, slices, shards, byte order, whatever the names."""
    folder = fresh_folder(tmp_path)
    options = {"shards": shards, "big_endian": big_endian}
    prefix = write_bundle(folder / "m-7", made, **options)
    out = folder / "out"
    cmd("run", prefix, "-o", out, "--average", "mean", "--names", "variable")
    for shard in range(shards):
        same = shard_file(prefix, shard, shards).read_bytes()
        assert shard_file(out, shard, shards).read_bytes() == same
    assert Path(f"{out}.index").read_bytes() == Path(f"{prefix}.index").read_bytes()


@few
@given(made=tensors(), shards=st.integers(1, 3), big_endian=st.booleans(), gap=st.integers(0, 3))
def test_a_fresh_output_of_one_checkpoint_holds_its_values(
    tmp_path: Path, made: dict[bytes, Any], shards: int, big_endian: bool, gap: int
) -> None:
    """Shadows under their names, in one shard without gaps, with the slices they had."""
    folder = fresh_folder(tmp_path)
    options = {"shards": shards, "big_endian": big_endian, "gap": gap}
    prefix = write_bundle(folder / "m-7", made, **options)
    out = folder / "out"
    cmd("run", prefix, "-o", out, "--average", "mean")
    expected = {text_of(name): plain(value) for name, value in made.items()}
    check_shadows(read_bundle(out), expected)
    header, rows = rows_of(out)
    assert parse_header(header) == (1, big_endian)
    before = {text_of(key): row.slices for key, row in rows_of(prefix)[1].items()}
    after = {text_of(key).removesuffix(SHADOW): row.slices for key, row in rows.items()}
    for name in expected:
        assert after[name] == before[name], name
    ends = sorted((row.offset, row.size) for row in rows.values() if not row.slices)
    assert sum(size for _, size in ends) == shard_file(out).stat().st_size


@few
@given(made=tensors(texts), shards=st.integers(1, 3), big_endian=st.booleans())
def test_safetensors_of_one_checkpoint_hold_its_values(
    tmp_path: Path, made: dict[str, Any], shards: int, big_endian: bool
) -> None:
    """Whole tensors, equal to NumPy's own slicing, but for dtypes the format does not know."""
    folder = fresh_folder(tmp_path)
    prefix = write_bundle(folder / "m-7", made, shards=shards, big_endian=big_endian)
    out = folder / "out.safetensors"
    cmd("run", prefix, "-o", out, "--average", "mean")
    whole = {name: plain(value) for name, value in made.items()}
    expected = {name: value for name, value in whole.items() if value.dtype.name in CODES}
    check_shadows(read_checkpoint(out), expected)


ONE, TWO = (0, 1), (1, 2)
GRIDS: dict[str, tuple[Shape, list[Extents]]] = {
    "axis 0": ((6, 5), [((0, 2), ALL), ((2, 3), ALL), ((5, 1), ALL)]),
    "axis 1": ((6, 5), [(ALL, (0, 1)), (ALL, (1, 3)), (ALL, (4, 1))]),
    "a grid": ((4, 6), [((a, 2), (b, 2)) for a in (0, 2) for b in (0, 2, 4)]),
    "a grid, last first": ((4, 6), [((a, 2), (b, 3)) for a in (2, 0) for b in (3, 0)]),
    "three dimensions": (
        (2, 4, 3),
        [(ALL, (0, 4), (0, 2)), (ONE, ALL, (2, 1)), ((1, 1), ALL, (2, 1))],
    ),
    "a pinwheel": (
        (3, 3),
        [(ONE, (0, 2)), ((0, 2), (2, 1)), ((2, 1), TWO), (TWO, ONE), ((1, 1), (1, 1))],
    ),
    "one slice": ((3, 2), [(ALL, ALL)]),
    "a scalar": ((), [()]),
    "nothing in it": ((0, 3), [(ALL, (0, 2)), (ALL, (2, 1))]),
    "an empty slice": ((3,), [((0, 2),), ((2, 0),), ((2, 1),)]),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "int64", "complex64"])
@pytest.mark.parametrize("case", GRIDS)
def test_slices_become_the_whole(tmp_path: Path, case: str, dtype: str) -> None:
    """Every kind of tiling, averaged and copied, in every kind of output."""
    shape, slices = GRIDS[case]
    value = filled(dtype, shape, 1)
    made = {"v": Sliced(value, slices), "w": np.float32([1])}
    prefix = write_bundle(tmp_path / "m-7", made, shards=2)
    key = f"v{SHADOW}" if dtype in AVERAGED else "v"
    cmd("run", prefix, "-o", tmp_path / "s.safetensors", "--average", "mean")
    assert bits_equal(read_checkpoint(tmp_path / "s.safetensors")[key], value)
    cmd("run", prefix, "-o", tmp_path / "fresh", "--average", "mean")
    assert bits_equal(read_bundle(tmp_path / "fresh")[key], value)
    cmd("run", prefix, "-o", tmp_path / "copy", "--average", "mean", "--names", "variable")
    assert Path(f"{tmp_path}/copy.index").read_bytes() == Path(f"{prefix}.index").read_bytes()
    assert bits_equal(read_bundle(tmp_path / "copy")["v"], value)


@pytest.mark.parametrize("dtype", sorted(set(NUMBER_OF) - {"float32"}))
def test_each_dtype_is_carried_or_averaged(tmp_path: Path, dtype: str) -> None:
    """Bit for bit through a run of one, whatever else is done with it."""
    value = filled(dtype, (3, 2), 2)
    prefix = write_bundle(tmp_path / "m-7", {"x": value, "w": np.float32([1])})
    out = tmp_path / "out"
    words = ["--exclude", "x"] if dtype.startswith(("float8", "float4")) else []
    cmd("run", prefix, "-o", out, "--average", "mean", "--names", "variable", *words)
    assert bits_equal(read_bundle(out)["x"], value)


def test_strings_are_carried(tmp_path: Path) -> None:
    """Their own checksum goes along, though their place changes."""
    tensors_of_it = {"s": strings([b"ab", b"", b"x" * 500], (3, 1)), "w": np.float32([1])}
    prefix = write_bundle(tmp_path / "m-7", tensors_of_it, gap=9)
    for name, words in (("fresh", []), ("copy", ["--names", "variable"])):
        cmd("run", prefix, "-o", tmp_path / name, "--average", "mean", *words)
        assert read_bundle(tmp_path / name)["s"] == [b"ab", b"", b"x" * 500]
        assert rows_of(tmp_path / name)[1][b"s"].shape == (3, 1)
