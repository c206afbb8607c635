"""One suite for every format: what is written is read back, and damage is told.

It runs over all rows of the table of formats; a new row fails until it has a case, and then has to
pass like the others. Everything goes through the public ways: rename, average_run, diff, reading.
Averages, ties and conversions are in `test_conformance_averages`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import conformance
import numpy as np
import pytest
from conformance import CASES, ROWS, contents, convert, floats, make, make_run

import ema_cli
from ema_cli.errors import DamagedFile, Disagreement, EmaError, UsageError
from ema_cli.formats import FORMATS
from ema_cli.reading import Values
from ema_cli.tensors import AVERAGED_DTYPES, DTYPES

# A limit of a name's length is a format's own; these are what people and programs come up with.
ODD_NAMES = (
    *(
        "ü/ß",
        "模型/层",
        "a b",
        " ",
        "dots.in.it",
        "a/b/c/d/e",
        "w:0",
        "w,x;y",
        "-",
        "~",
        "%s",
        "a'\"b",
    ),
    *("x" * 255, "y" * 256, "z" * 5000, "l/" * 100 + "l", "k" * 70_000, "l/" * 600 + "l"),
    *("", ".", "..", "../up", "/lead", "trail/", "twice//x", "nul\0", "line\nfeed", "\x1b[31m"),
    *("__metadata__", "w.npy", "_metadata", "data.pkl", "\udcff", "\ud800", "global_step/x"),
)

each_row = pytest.mark.parametrize("row", ROWS)
# Only archives become archives, and these hold nothing that others cannot.
each_target = pytest.mark.parametrize("row", [row for row in CASES if not CASES[row].made_like])


def test_every_format_is_in_the_suite() -> None:
    """A new row of the table is tested like the others, or this fails."""
    assert tuple(FORMATS) == ROWS


# ---------------------------------------------------------------------------- round trips


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files that hold every dtype between them, each tensor named by its own."""
    folder = tmp_path_factory.mktemp("dtypes") / "made"
    return conformance.write_source(folder, conformance.every_dtype())


@each_row
def test_every_dtype_comes_back(row: str, sources: list[Path], tmp_path: Path) -> None:
    """Names, dtypes, shapes and bytes of what the row says it holds; the rest is told."""
    seen = set()
    for k, source in enumerate(sources):
        expected = conformance.raw_of(
            {name: v for name, v in conformance.every_dtype().items() if name in contents(source)}
        )
        expected = {f"of/{name}": value for name, value in expected.items()}
        out = tmp_path / str(k) / CASES[row].called.format(1)
        held = {name for name in expected if FORMATS[row].representable(DTYPES[name[3:]])}
        convert(source, row, out, [("^", "of/")])
        assert contents(out) == {name: expected[name] for name in held}
        seen |= held
    assert seen == {f"of/{name}" for name, d in DTYPES.items() if FORMATS[row].representable(d)}


@each_target
def test_a_dtype_that_cannot_be_held_is_told(row: str, sources: list[Path], tmp_path: Path) -> None:
    """By the plan of a run, with the reason, and nothing is written."""
    held = FORMATS[row].representable
    for source in sources:
        out = tmp_path / CASES[row].called.format(1)
        lost = {name for name in contents(source) if not held(DTYPES[name])}
        copied = [name for name in contents(source) if DTYPES[name].floating]
        copied = [name for name in copied if name in lost or not DTYPES[name].averaged]
        select = [("exclude", name) for name in copied]
        plan = ema_cli.plan_run([source], out, format=row, names="variable", select=select)
        left_out = dict(plan.outcomes[0].layout.left_out)
        assert left_out.keys() == lost
        assert all(left_out[name].endswith(f"cannot hold {name}") for name in lost)
        assert conformance.listing(tmp_path) == []


@each_target
def test_rename_tells_what_cannot_be_held(row: str, sources: list[Path], tmp_path: Path) -> None:
    """Before anything is written, when it is asked to write nothing."""
    for source in sources:
        out = tmp_path / CASES[row].called.format(1)
        lost = {name for name in contents(source) if not FORMATS[row].representable(DTYPES[name])}
        told = ema_cli.rename(source, out, format=row, rule=[("^", "of/")], dry_run=True)
        assert set(told.left_out) == lost
        assert conformance.listing(tmp_path) == []


@each_row
@pytest.mark.parametrize("dtype", AVERAGED_DTYPES)
def test_an_average_is_held_or_refused(row: str, dtype: str, tmp_path: Path) -> None:
    """An average that were left out would be none."""
    values = {"w": np.float32([1, 2]), "b": np.float32([1])}
    source = make(row, tmp_path / "in", values)
    out = tmp_path / "out" / CASES[row].called.format(2)
    out.parent.mkdir()
    if FORMATS[row].representable(DTYPES[dtype]):
        ema_cli.average_run([source], out, format=row, names="variable", dtype=dtype)
        assert {name: found[0] for name, found in contents(out).items()} == dict.fromkeys(
            values, dtype
        )
        return
    with pytest.raises(UsageError, match=f"expected another dtype than {dtype}"):
        ema_cli.average_run([source], out, format=row, names="variable", dtype=dtype)
    assert conformance.listing(out.parent) == []


SHAPES = {
    "scalar": np.float32(2.5),
    "empty": np.zeros((0,), np.float32),
    "empty_too": np.zeros((3, 0, 2), np.int16),
    "one": np.ones((1, 1, 1), np.float64),
    "deep": np.arange(2**8, dtype=np.int32).reshape((2,) * 8),
    "odd": np.arange(7, dtype=np.uint8),
    "large": np.arange((1 << 18) + 12_345, dtype=np.float16).view(np.uint16).view(np.float16),
    "odd_again": np.arange(3, dtype=np.int64),
}


@each_row
def test_shapes_come_back_whole_and_in_parts(row: str, tmp_path: Path) -> None:
    """Scalars, tensors of nothing, one larger than a block; joined from odd ranges too."""
    with np.errstate(over="ignore"):
        path = make(row, tmp_path / "in", SHAPES)
    whole = contents(path)
    assert whole == conformance.raw_arrays(SHAPES)
    conformance.check_extents(path)
    assert contents(path, 65_537) == whole
    small = {name for name in SHAPES if name != "large"}
    values = Values(path)
    for name in small:
        with values.open(name) as reader:
            for step in (1, 3, 5):
                parts = [
                    reader.block(at, min(step, reader.elements - at))
                    for at in range(0, reader.elements, step)
                ]
                assert b"".join(part.tobytes() for part in parts) == whole[name][2]
            assert reader.block(reader.elements, 0).size == 0


@each_row
def test_names_come_back_or_are_refused(row: str, tmp_path: Path) -> None:
    """A name is read back as it was given, or nothing at all is written."""
    can_name = FORMATS[row].can_name
    possible = [name for name in ODD_NAMES if can_name(name)]
    values = {f"<{k}>": np.float32([k, 0.5]) for k in range(len(possible))}
    source = make(row, tmp_path / "in", values)
    out = tmp_path / "out" / CASES[row].called.format(1)
    convert(source, row, out, [(f"^<{k}>$", name) for k, name in enumerate(possible)])
    expected = {name: np.float32([k, 0.5]) for k, name in enumerate(possible)}
    assert contents(out) == conformance.raw_arrays(expected)
    assert len(possible) >= 12
    shutil.rmtree(out.parent)
    out.parent.mkdir()
    for name in set(ODD_NAMES) - set(possible):
        with pytest.raises(Disagreement, match="no checkpoint of this format can hold"):
            ema_cli.rename(source, out, format=row, rule=[("^<0>$", name)])
        assert conformance.listing(out.parent) == []


# ---------------------------------------------------------------------------- damage


def _small(row: str, folder: Path) -> Path:
    """Return a checkpoint of few bytes; of a folder, one with shards."""
    values = {"w": np.float32([1, 2, 3]), "n": np.int16([4, 5])}
    path = make(row, folder / "in", values)
    if FORMATS[row].kind != "folder":
        return path
    out = folder / "out" / CASES[row].called.format(1)
    out.parent.mkdir()
    ema_cli.average_run([path], out, max_shard_size=12, names="variable")
    assert len(conformance.files_of(out)) == 3
    return out


@each_row
def test_a_cut_file_is_refused_or_says_the_same(row: str, tmp_path: Path) -> None:
    """Each file, at every length; HDF5 files, which another process reads, at every eleventh."""
    path = _small(row, tmp_path)
    whole = contents(path)
    stride = 11 if row in ("hdf5", "keras") else 1
    for name, file in conformance.files_of(path).items():
        raw = file.read_bytes()
        lengths = [*range(len(raw) - 1, 0, -stride), 0]
        same = [length for length in lengths if _same_when_cut(path, file, length, whole)]
        assert len(same) < 3, f"{name} at {same}"
        file.write_bytes(raw)
    assert contents(path) == whole


def _same_when_cut(path: Path, file: Path, length: int, whole: conformance.Contents) -> bool:
    """Whether a checkpoint still says the same; else it has to be refused as damaged."""
    os.truncate(file, length)
    try:
        assert contents(path) == whole, f"{file} at {length}"
    except EmaError as error:
        assert error.exit_code == 12, error
        return False
    return True


@each_row
def test_a_flipped_bit_is_told_where_there_are_checksums(row: str, tmp_path: Path) -> None:
    """Nothing is published then. Formats without checksums average what they find."""
    paths = make_run(row, tmp_path / "in")
    out, sound = (tmp_path / name / CASES[row].called.format(9) for name in ("out", "sound"))
    sound.parent.mkdir()
    ema_cli.average_run(paths, sound, average=["mean"], names="variable")
    flipped = list(conformance.signs(paths[-1]))
    assert {name for name, _, _ in flipped} == floats().keys()
    for name, file, offset in flipped:
        out.parent.mkdir()
        conformance.flip(file, offset)
        if CASES[row].checked:
            with pytest.raises(DamagedFile, match="checksum") as caught:
                ema_cli.average_run(paths, out, average=["mean"], names="variable")
            assert caught.value.args[0] == os.fspath(file)
            assert caught.value.args[2] in (name, None)
            assert conformance.listing(out.parent) == []
        else:
            ema_cli.average_run(paths, out, average=["mean"], names="variable")
            differing = [found.tensor for found in ema_cli.diff(out, sound).differences]
            assert differing == [name]
        conformance.flip(file, offset)
        shutil.rmtree(out.parent)
