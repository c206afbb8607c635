"""Flaws and hostile shapes in runs of PyTorch files whose tensors are views of storages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import bits_equal, cmd
from torch_views import View, ViewRun, load_storages, span, storage_place, write_views

import ema_cli
from ema_cli.errors import DamagedFile, EmaError, NonFinite

DECAY = 0.9
FORMATS = [".pt", ".safetensors", ".npz"]


# ---------------------------------------------------------------------------- memory


LARGE = """
import resource, sys
import ema_cli
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ema_cli.average_run(sys.argv[1], sys.argv[2], average=["mean"])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("shape", [(1 << 26,), (1 << 13, 1 << 13)])
def test_one_number_shown_often_takes_little_memory(
    tmp_path: Path, shape: tuple[int, ...], suffix: str
) -> None:
    """256 MiB are shown by four bytes, averaged with what is spread out in another dimension."""
    for k in (1, 2):
        views = {"w": View("0", shape, (0,) * len(shape))}
        write_views(tmp_path / "run" / f"m-{k}.pt", {"0": np.float32([k])}, views)
    out = tmp_path / f"out{suffix}"
    words = [sys.executable, "-c", LARGE, tmp_path / "run", out]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=100)
    assert int(done.stdout) < 150
    if suffix == ".pt":
        assert out.stat().st_size < 2000
        assert np.frombuffer(load_storages(out)["0"], np.float32).tolist() == [1.5]
    else:
        assert out.stat().st_size > 1 << 28
        with out.open("rb") as file:
            file.seek(-(1 << 20), 2)
            assert set(np.frombuffer(file.read(), np.float32)) == {1.5}
    out.unlink()


def test_one_number_shown_without_end_is_refused_where_it_is_written_out(tmp_path: Path) -> None:
    """4 TiB of output from four bytes; a copy in which they stay four bytes is fine."""
    for k in (1, 2):
        views = {"w": View("0", (1 << 20, 1 << 20), (0, 0))}
        write_views(tmp_path / "run" / f"m-{k}.pt", {"0": np.float32([k])}, views)
    done = cmd("run", tmp_path / "run", "-o", tmp_path / "out.safetensors", code=12)
    assert "shows 4 bytes as 4.0 TiB" in done.err
    assert "hint: " in done.err
    cmd("run", tmp_path / "run", "-o", tmp_path / "out.pt", "--average", "mean")
    assert np.frombuffer(load_storages(tmp_path / "out.pt")["0"], np.float32).tolist() == [1.5]


# ---------------------------------------------------------------------------- flaws


STRANGE = {
    "transposed": {"w": View("0", (4, 6), (1, 4))},
    "channels last": {"w": View("0", (5, 4, 3, 2), (24, 1, 8, 4))},
    "columns of a larger one": {"w": View("0", (4, 3), (7, 1), 2)},
    "transposed columns": {"w": View("0", (3, 4), (1, 7), 2)},
    "expanded": {"w": View("0", (5, 4), (0, 1))},
    "overlapping windows": {"w": View("0", (4, 3), (2, 1))},
    "strides that do not nest": {"w": View("0", (2, 3), (3, 2))},
    "halves of one storage": {"a": View("0", (8,), (1,)), "b": View("0", (8,), (1,), 8)},
    "interleaved in one storage": {"even": View("0", (8,), (2,)), "odd": View("0", (8,), (2,), 1)},
    "columns of one storage": {"a": View("0", (4, 2), (4, 1)), "b": View("0", (4, 2), (4, 1), 2)},
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("case", STRANGE)
def test_a_nan_is_traced_to_its_tensor_and_checkpoint(
    tmp_path: Path, case: str, suffix: str
) -> None:
    """The last element of each tensor, in the second checkpoint."""
    views = STRANGE[case]
    run = ViewRun(tmp_path / "run", views)
    for name, view in views.items():
        good = run.storages[1][view.storage].copy()
        run.storages[1][view.storage][span(view) - 1] = np.nan
        run.write(1)
        with pytest.raises(NonFinite, match=f"model-2.pt: tensor '{name}' holds nan"):
            run.averaged(tmp_path / f"out{suffix}")
        run.storages[1][view.storage] = good
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_every_element_of_strides_that_do_not_nest_is_traced(tmp_path: Path) -> None:
    """Distances that can be made of strides in one way only, and not the greedy one."""
    view = View("0", (2, 3, 2), (5, 4, 3))
    run = ViewRun(tmp_path / "run", {"w": view})
    good = run.storages[1]["0"].copy()
    places = {
        sum(i * s for i, s in zip(at, view.strides, strict=True)) for at in np.ndindex(view.shape)
    }
    for place in sorted(places):
        run.storages[1]["0"] = good.copy()
        run.storages[1]["0"][place] = np.inf
        run.write(1)
        with pytest.raises(NonFinite, match=r"model-2\.pt: tensor 'w' holds inf"):
            run.averaged(tmp_path / "out.safetensors")


def test_a_nan_that_no_tensor_shows_does_not_matter(tmp_path: Path) -> None:
    """Between the elements of a view anything may lie."""
    run = ViewRun(tmp_path / "run", {"w": View("0", (6,), (2,))})
    for storages in run.storages:
        storages["0"][1::2] = np.nan
    for k in range(3):
        run.write(k)
    for suffix in FORMATS:
        found = run.averaged(tmp_path / f"out{suffix}")
        assert bits_equal(found["w"], run.expected("w"))


@pytest.mark.parametrize("place", ["first", "gap", "last"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_flipped_bit_in_a_shared_storage_is_found(
    tmp_path: Path, suffix: str, place: str
) -> None:
    """In the excluded tensor, the averaged one, or the gap: what shares the storage is named."""
    views = {"a": View("0", (4,), (2,)), "b": View("0", (4,), (1,), 10)}
    run = ViewRun(tmp_path / "run", views)
    path = run.path(1)
    start, n_bytes = storage_place(path, "0")
    raw = bytearray(path.read_bytes())
    raw[{"first": start, "gap": start + 36, "last": start + n_bytes - 1}[place]] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DamagedFile, match=r"model-2\.pt: expected bytes with checksum .* 'a', 'b'"):
        run.averaged(tmp_path / f"out{suffix}", select=[("exclude", "b")])
    assert cmd("run", run.folder, "-o", tmp_path / f"out{suffix}", code=12).out == ""
    assert sorted(one.name for one in tmp_path.iterdir()) == ["run"]


def test_a_flipped_bit_is_found_by_diff_and_by_the_class(tmp_path: Path) -> None:
    """Also where the tensor that is read is not the one whose byte it is."""
    views = {"a": View("0", (4,), (2,)), "b": View("0", (4,), (1,), 10)}
    run = ViewRun(tmp_path / "run", views)
    start, _ = storage_place(run.path(1), "0")
    raw = bytearray(run.path(1).read_bytes())
    raw[start + 36] ^= 1
    run.path(1).write_bytes(raw)
    with pytest.raises(DamagedFile, match="checksum"):
        ema_cli.diff(run.path(0), run.path(1))
    ema = ema_cli.ExponentialMovingAverage(DECAY)
    ema.apply(run.path(0))
    with pytest.raises(DamagedFile, match="checksum"):
        ema.apply(run.path(1), ["a"])


def test_more_pieces_than_a_copy_may_have_are_refused(tmp_path: Path) -> None:
    """Every other of many elements: written contiguous they are fine."""
    views = {"w": View("0", (70_000,), (2,))}
    run = ViewRun(tmp_path / "run", views)
    with pytest.raises(EmaError, match="more than 65,536 pieces") as caught:
        run.averaged(tmp_path / "out.pt")
    assert caught.value.exit_code == 12
    found = run.averaged(tmp_path / "out.safetensors")
    assert bits_equal(found["w"], run.expected("w"))
