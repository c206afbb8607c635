"""Runs of PyTorch files whose tensors are views: transposed, sliced, expanded, shared."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import bits_equal, read_checkpoint
from torch_views import View, ViewRun, c_strides, load, load_storages, write_views

import ema_cli
from ema_cli.errors import Disagreement

DECAY = 0.9
SUFFIX = "/ExponentialMovingAverage"
FORMATS = [".pt", ".safetensors", ".npz"]

VIEWS: dict[str, View] = {
    "contiguous": View("0", (4, 6), (6, 1)),
    "transposed": View("1", (4, 6), (1, 4)),
    "channels_last": View("2", (5, 4, 3, 2), (24, 1, 8, 4)),
    "permuted": View("3", (2, 3, 4), (1, 8, 2)),
    "rows of a larger one": View("4", (3, 5), (5, 1), 5),
    "columns of a larger one": View("5", (4, 3), (7, 1), 2),
    "every other element": View("6", (6,), (2,), 1),
    "transposed columns": View("7", (3, 4), (1, 7), 2),
    "expanded": View("8", (5, 4), (0, 1)),
    "expanded columns": View("9", (4, 5), (1, 0), 3),
    "a scalar expanded": View("10", (3, 3), (0, 0)),
    "overlapping windows": View("11", (4, 3), (2, 1)),
    "of length one": View("12", (1, 5, 1), (99, 1, 7)),
    "scalar": View("13", (), (), 2),
    "empty": View("14", (3, 0), (1, 1)),
}


# ---------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_views_are_averaged_as_numpy_does(tmp_path: Path, suffix: str, dtype: Any) -> None:
    """Every kind of view in one run; a .pt output is a copy with other storages."""
    run = ViewRun(tmp_path / "run", VIEWS, dtype)
    found = run.averaged(tmp_path / f"out{suffix}")
    assert found.keys() == VIEWS.keys()
    for name in VIEWS:
        assert bits_equal(found[name], run.expected(name)), name


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_alone_is_averaged(tmp_path: Path, name: str) -> None:
    """To every format, and to new PyTorch files with names of shadows."""
    if name == "empty":
        return
    run = ViewRun(tmp_path / "run", {name: VIEWS[name]})
    for suffix in FORMATS:
        found = run.averaged(tmp_path / f"out{suffix}")
        assert bits_equal(found[name], run.expected(name)), suffix
    ema_cli.average_run(run.folder, tmp_path / "new.pt", decay=DECAY, names="shadow")
    assert bits_equal(load(tmp_path / "new.pt")[name + SUFFIX], run.expected(name))


def test_new_files_keep_what_leaves_no_gaps(tmp_path: Path) -> None:
    """Transposed tensors stay transposed, expanded ones small; slices get what they show."""
    run = ViewRun(tmp_path / "run", VIEWS)
    ema_cli.average_run(run.folder, tmp_path / "new.pt", decay=DECAY, names="shadow")
    found = load(tmp_path / "new.pt")
    for name in VIEWS:
        assert bits_equal(found[name + SUFFIX], run.expected(name)), name
    sizes = sum(map(len, load_storages(tmp_path / "new.pt").values()))
    small = {"expanded": 4, "expanded columns": 4, "a scalar expanded": 1, "overlapping windows": 9}
    elements = {
        name: small.get(name, np.prod(view.shape, dtype=int)) for name, view in VIEWS.items()
    }
    assert sizes == 4 * sum(elements.values())


@pytest.mark.parametrize("suffix", FORMATS)
def test_checkpoints_laid_out_differently_are_averaged(tmp_path: Path, suffix: str) -> None:
    """The same shapes in C order, transposed, and in slices of something else, in any order."""
    shapes = {"w": (5, 7), "conv": (4, 3, 2, 2), "b": (6,)}
    plain = {name: View(name, shape, c_strides(shape)) for name, shape in shapes.items()}
    turned = {name: v._replace(strides=c_strides(v.shape[::-1])[::-1]) for name, v in plain.items()}
    sliced = {
        "w": View("w", (5, 7), (20, 2), 1),
        "conv": View("conv", (4, 3, 2, 2), (30, 9, 3, 1), 4),
        "b": View("b", (6,), (3,), 2),
    }
    for place, views in enumerate(itertools.permutations([plain, turned, sliced])):
        run = ViewRun(tmp_path / f"run{place}", views)
        found = run.averaged(tmp_path / f"out{place}{suffix}")
        for name in shapes:
            assert bits_equal(found[name], run.expected(name)), (place, name)


@pytest.mark.parametrize("workers", [1, 3])
def test_large_views_are_gathered_in_blocks(tmp_path: Path, workers: int) -> None:
    """More elements than a block and a task, in rows that blocks cut; the same bits."""
    views = [
        {"w": View("0", (1100, 2001), (1, 1100)), "v": View("1", (60, 80), (801, 2))},
        {"w": View("0", (1100, 2001), (2001, 1)), "v": View("1", (60, 80), (1, 60))},
        {"w": View("0", (1100, 2001), (1, 1100)), "v": View("1", (60, 80), (801, 2))},
    ]
    run = ViewRun(tmp_path / "run", views)
    for suffix in (".pt", ".safetensors"):
        found = run.averaged(tmp_path / f"out{suffix}", workers=workers)
        for name in ("w", "v"):
            assert bits_equal(found[name], run.expected(name)), (suffix, name)


def test_the_class_reads_views_as_the_command_does(tmp_path: Path) -> None:
    """By their strides, from the storages they share."""
    run = ViewRun(tmp_path / "run", VIEWS)
    ema = ema_cli.ExponentialMovingAverage(DECAY)
    for k in range(3):
        ema.apply(run.path(k))
    for name in VIEWS:
        assert bits_equal(np.asarray(ema.average(name)), run.expected(name)), name


def test_diff_compares_views_by_what_they_show(tmp_path: Path) -> None:
    """Transposed against C order: the same values, no difference; one value, one difference."""
    values = np.arange(35, dtype=np.float32).reshape(5, 7)
    rows = write_views(tmp_path / "a.pt", {"0": values.ravel()}, {"w": View("0", (5, 7), (7, 1))})
    turned = {"0": np.ascontiguousarray(values.T).ravel()}
    columns = write_views(tmp_path / "b.pt", turned, {"w": View("0", (5, 7), (1, 5))})
    assert not ema_cli.diff(rows, columns)
    turned["0"][5 * 3 + 2] = 99
    columns = write_views(tmp_path / "b.pt", turned, {"w": View("0", (5, 7), (1, 5))})
    [difference] = ema_cli.diff(rows, columns).differences
    assert (difference.count, difference.total, difference.max_abs) == (1, 35, 99 - values[2, 3])


# ---------------------------------------------------------------------------- shared storages


SHARED: dict[str, dict[str, View]] = {
    "halves": {"a": View("0", (8,), (1,)), "b": View("0", (8,), (1,), 8)},
    "interleaved": {"a": View("0", (8,), (2,)), "b": View("0", (8,), (2,), 1)},
    "columns": {"a": View("0", (4, 2), (4, 1)), "b": View("0", (4, 2), (4, 1), 2)},
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("case", SHARED)
def test_the_excluded_half_of_a_storage_stays(tmp_path: Path, case: str, suffix: str) -> None:
    """It is the last checkpoint's, bit for bit; the other half is averaged."""
    run = ViewRun(tmp_path / "run", SHARED[case])
    found = run.averaged(tmp_path / f"out{suffix}", select=[("exclude", "b")])
    assert bits_equal(found["a"], run.expected("a"))
    assert bits_equal(found["b"], run.values("b")[-1])
    assert not bits_equal(found["a"], run.values("a")[-1])


def test_what_lies_between_the_tensors_of_a_storage_stays(tmp_path: Path) -> None:
    """In a copy of the last checkpoint the bytes that no tensor shows are copied as well."""
    views = {"a": View("0", (4, 3), (7, 1), 2)}
    run = ViewRun(tmp_path / "run", views)
    run.averaged(tmp_path / "out.pt")
    found = np.frombuffer(load_storages(tmp_path / "out.pt")["0"], np.float32)
    last = run.storages[-1]["0"].copy()
    inside = np.zeros(len(last), bool)
    rows, columns = np.indices((4, 3))
    inside[2 + rows * 7 + columns] = True
    assert bits_equal(found[~inside], last[~inside])
    assert bits_equal(found[inside], run.expected("a").ravel())
    assert (found[inside] != last[inside]).all()


def test_overlapping_views_of_one_storage_agree(tmp_path: Path) -> None:
    """What several tensors show is averaged to the same bits for each."""
    views = {
        "a": View("0", (10,), (1,)),
        "b": View("0", (10,), (1,), 5),
        "c": View("0", (15,), (1,)),
    }
    run = ViewRun(tmp_path / "run", views)
    for suffix in FORMATS:
        found = run.averaged(tmp_path / f"out{suffix}")
        for name in views:
            assert bits_equal(found[name], run.expected(name)), (suffix, name)


def test_a_partly_excluded_overlap_is_written_apart(tmp_path: Path) -> None:
    """One byte cannot be both averaged and the last one's: the tensors get their own."""
    views = {"a": View("0", (10,), (1,)), "b": View("0", (10,), (1,), 5)}
    run = ViewRun(tmp_path / "run", views)
    for suffix in FORMATS:
        found = run.averaged(tmp_path / f"out{suffix}", select=[("exclude", "b")])
        assert bits_equal(found["a"], run.expected("a")), suffix
        assert bits_equal(found["b"], run.values("b")[-1]), suffix


def test_ties_stay_ties(tmp_path: Path) -> None:
    """Two names of one tensor are one storage in copies and in new files, and one average."""
    tied = View("0", (4, 5), (5, 1))
    run = ViewRun(
        tmp_path / "run", {"embed": tied, "head": tied, "head.bias": View("1", (5,), (1,))}
    )
    run.averaged(tmp_path / "copy.pt")
    ema_cli.average_run(run.folder, tmp_path / "new.pt", decay=DECAY, names="shadow")
    for name in ("copy.pt", "new.pt"):
        assert len(load_storages(tmp_path / name)) == 2, name
    found = load(tmp_path / "new.pt")
    for name in ("embed", "head"):
        assert bits_equal(found[name + SUFFIX], run.expected(name))
    plan = ema_cli.plan_run(run.folder, tmp_path / "apart.safetensors", decay=DECAY)
    assert plan.outcomes[0].layout.notes == (
        "1 tied tensor of the input: each name is stored apart",
    )


def test_big_endian_copies_are_swapped(tmp_path: Path) -> None:
    """With checksums and without, in C order and not: what is copied to a little-endian file."""
    views = {"w": View("0", (3,), (1,)), "n": View("1", (2,), (1,)), "t": View("2", (2, 3), (1, 2))}
    for checked in (True, False):
        folder = tmp_path / f"run{checked}"
        for k in (1, 2):
            stored = {"0": np.float32([k, 2, 3]), "1": np.int64([7, k]), "2": np.arange(6)}
            options = {"big_endian": True, "checked": checked}
            write_views(folder / f"m-{k}.pt", stored, views, **options)
        out = tmp_path / f"{checked}.safetensors"
        ema_cli.average_run(folder, out, average=["mean"], names="variable")
        found = {name: array.tolist() for name, array in read_checkpoint(out).items()}
        assert found == {"w": [1.5, 2, 3], "n": [7, 2], "t": [[0, 2, 4], [1, 3, 5]]}


@pytest.mark.parametrize("second", [View("0", (5,), (1,)), View("0", (5,), (1,), 2)])
def test_tied_in_the_last_only(tmp_path: Path, second: View) -> None:
    """Where an earlier checkpoint has other values for each name, there are two averages.

    One place cannot hold both, or parts of both.
    """
    apart = {"a": View("0", (5,), (1,)), "b": View("1", (5,), (1,))}
    tied = {"a": View("0", (5,), (1,)), "b": second}
    run = ViewRun(tmp_path / "run", [apart, apart, tied])
    with pytest.raises(Disagreement, match="'a' and 'b' share bytes in the last checkpoint"):
        run.averaged(tmp_path / "out.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    for suffix in (".safetensors", ".npz"):
        found = run.averaged(tmp_path / f"out{suffix}")
        for name in apart:
            assert bits_equal(found[name], run.expected(name)), name


@pytest.mark.parametrize("options", [{"names": "shadow"}, {"dtype": "float16"}], ids=str)
def test_tied_in_the_last_only_of_new_files(tmp_path: Path, options: dict[str, str]) -> None:
    """A new file has no place for two averages either: refused, or each has its own."""
    apart = {"a": View("0", (5,), (1,)), "b": View("1", (5,), (1,))}
    tied = {"a": View("0", (5,), (1,)), "b": View("0", (5,), (1,))}
    run = ViewRun(tmp_path / "run", [apart, apart, tied])
    try:
        ema_cli.average_run(run.folder, tmp_path / "out.pt", decay=DECAY, **options)
    except Disagreement:
        return
    found = load(tmp_path / "out.pt")
    for name in apart:
        value = run.expected(name).astype(options.get("dtype", "float32"))
        assert bits_equal(found.get(name, found.get(name + SUFFIX)), value), name


def test_ties_that_are_turned_elsewhere(tmp_path: Path) -> None:
    """The same bytes in every checkpoint, but shown in another order in one."""
    same = {"a": View("0", (3, 4), (4, 1)), "b": View("0", (3, 4), (4, 1))}
    turned = {"a": View("0", (3, 4), (4, 1)), "b": View("0", (3, 4), (1, 3))}
    run = ViewRun(tmp_path / "run", [turned, same, same])
    with pytest.raises(Disagreement, match="'a' and 'b'"):
        run.averaged(tmp_path / "out.pt")
    found = run.averaged(tmp_path / "out.safetensors")
    for name in same:
        assert bits_equal(found[name], run.expected(name)), name


def test_tied_in_the_first_only(tmp_path: Path) -> None:
    """The last tells where averages lie: there each has its own."""
    apart = {"a": View("0", (5,), (1,)), "b": View("1", (5,), (1,))}
    tied = {"a": View("0", (5,), (1,)), "b": View("0", (5,), (1,), 2)}
    run = ViewRun(tmp_path / "run", [tied, apart, apart])
    for suffix in FORMATS:
        found = run.averaged(tmp_path / f"out{suffix}")
        for name in apart:
            assert bits_equal(found[name], run.expected(name)), (suffix, name)
