"""What a plan reads, byte by byte: each record it touches is read whole, and verified once."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import bits_equal, cmd, read_checkpoint, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_views import View, c_strides, load, shown, storage_place, write_views

import ema_cli
from ema_cli.errors import DamagedFile, Disagreement
from ema_cli.plan import Plan
from ema_cli.ranges import Place
from ema_cli.regions import stretches
from ema_cli.schedules import counting
from ema_cli.tensors import DTYPES, Extent

Array = np.ndarray[Any, Any]
SUFFIX = "/ExponentialMovingAverage"
STATISTICS = "norm.running_mean"


class ByteMap:
    """How often each byte of one file is read: to be verified, and without that."""

    def __init__(self, size: int) -> None:
        self.verified = np.zeros(size, int)
        self.unverified = np.zeros(size, int)
        self.units: set[tuple[int, int]] = set()

    def read(self, place: Place, elements: int, width: int) -> None:
        """Count what is read of a place, in elements of `width` bytes (rows are in elements)."""
        counts = self.unverified if place.unit is None else self.verified
        if place.unit is not None:
            self.units.add((place.unit.start, place.unit.end))
        for at, n in stretches(place.offset, place.grid, width, 0, elements):
            counts[at : at + n * width] += 1


def byte_maps(plan: Plan) -> dict[int, ByteMap]:
    """What is read of each checkpoint of single files, by its ordinal."""
    checkpoints = plan.run.checkpoints
    used = [k for k, first in enumerate(plan.work.first_input) if first >= 0]
    maps = {k: ByteMap(checkpoints[k].files[0].size) for k in used}
    for one in plan.work.averaged:
        width = DTYPES[one.dtype].bits // 8
        for k in counting(plan.schedules):
            place = one.places[plan.work.index_of[k]]
            assert place.file == 0
            maps[k].read(place, one.elements, width)
    ordinals = {plan.work.first_input[k]: k for k in used}
    for copy in plan.work.copies:
        if copy.place.file in ordinals:
            maps[ordinals[copy.place.file]].read(copy.place, copy.nbytes, 1)
    return maps


def check_plan(plan: Plan) -> None:
    """Every byte of every record that is touched is verified once, and no other byte."""
    for k, found in byte_maps(plan).items():
        records = plan.run.checkpoints[k].index.records
        inside = np.zeros_like(found.verified)
        for record in records:
            part = slice(record.offset, record.offset + record.nbytes)
            if record.nbytes and (found.verified[part].any() or found.unverified[part].any()):
                assert (found.verified[part] == 1).all(), (k, record)
                inside[part] = 1
        assert (found.verified == inside).all()
        ends = {(r.offset, r.offset + r.nbytes) for r in records}
        assert found.units <= ends


# ---------------------------------------------------------------------------- random plans


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """Storages with views that may overlap, be the same, leave gaps, or be scattered."""
    sizes = draw(st.lists(st.integers(1, 24), min_size=1, max_size=4))
    tensors: dict[str, View] = {}
    for name in [f"t{k}" for k in range(draw(st.integers(2, 6)))] + [STATISTICS]:
        key = draw(st.integers(0, len(sizes) - 1))
        if tensors and draw(st.integers(0, 4)) == 0:
            tensors[name] = draw(st.sampled_from(sorted(tensors.values())))  # a tie
            continue
        tensors[name] = _view(draw, str(key), sizes[key])
    return {"sizes": sizes, "tensors": tensors}


def _view(draw: st.DrawFn, key: str, size: int) -> View:
    offset = draw(st.integers(0, size - 1))
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    kind = draw(st.sampled_from(["rows", "rows", "any", "columns"]))
    strides = c_strides(shape)
    if kind == "columns":
        strides = tuple(reversed(c_strides(tuple(reversed(shape)))))
    elif kind == "any":
        strides = tuple(draw(st.integers(0, 4)) for _ in shape)
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if offset + reach >= size:
        return View(key, (size - offset,), (1,), offset)
    return View(key, shape, strides, offset)


def storages(sizes: Sequence[int], seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {str(k): rng.normal(size=n).astype(np.float32) for k, n in enumerate(sizes)}


OPTIONS: list[dict[str, Any]] = [
    {"names": "variable"},
    {"names": "variable", "statistics": "copy"},
    {"names": "variable", "select": [("exclude", "t0")]},
    {"names": "shadow", "keep_variables": True, "select": [("exclude", "t1")]},
    {"names": "shadow", "keep_variables": True},
    {"names": "variable", "dtype": "float16"},
]


def moved(model: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors, each in C order in a storage of its own."""
    shapes = {name: view.shape for name, view in model["tensors"].items()}
    sizes = [math.prod(shape) for shape in shapes.values()]
    views = {
        name: View(str(k), shape, c_strides(shape))
        for k, (name, shape) in enumerate(shapes.items())
    }
    return {"sizes": sizes, "tensors": views}


def check_random(
    model: Mapping[str, Any], apart: bool, options: Mapping[str, Any], suffix: str, last: int
) -> None:
    """Plan and carry out a run of three, the last of this weight; and look at the result."""
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / f"out{suffix}"
        made = [model, moved(model) if apart else model, model]
        for k, one in enumerate(made, start=1):
            write_views(folder / f"m-{k}.pt", storages(one["sizes"], k), one["tensors"])
        (folder / "w.txt").write_text(f"1 1\n2 1\n3 {last}\n")
        wanted = {"average": [f"weights:{folder / 'w.txt'}"], "glob": "m-*.pt", **options}
        try:
            check_plan(ema_cli.plan_run(folder, out, **wanted))
        except Disagreement:  # two averages for one place
            assert apart
            assert suffix == ".pt"
            return
        ema_cli.average_run(folder, out, **wanted)
        files = [(one["tensors"], storages(one["sizes"], k)) for k, one in enumerate(made, start=1)]
        found = tensors_in(out)
        for name in model["tensors"]:
            values = [shown(views[name], stored) for views, stored in files]
            copied = name == options.get("select", [("", "")])[0][1]
            copied = copied or (name == STATISTICS and options.get("statistics") == "copy")
            made_of = values[-1] if copied else mixed(values[: 2 + last])
            dtype = options.get("dtype", "float32") if not copied else "float32"
            made_as = found.get(name if copied else name + SUFFIX, found[name])
            assert bits_equal(made_as, made_of.astype(dtype)), name


def mixed(values: Sequence[Array]) -> Array:
    """The mean, as it is formed one checkpoint after the other."""
    shadow = values[0]
    for k, value in enumerate(values[1:], start=2):
        shadow = np.asarray(shadow - np.asarray(shadow - value) * np.float32(1 / k))
    return shadow


def tensors_in(path: Path) -> dict[str, Array]:
    if path.suffix == ".pt":
        return dict(load(path))
    if path.suffix == ".npz":
        with np.load(path) as archive:
            return dict(archive)
    return read_checkpoint(path)


RANDOM: dict[str, Any] = {
    "model": models(),
    "apart": st.booleans(),
    "options": st.sampled_from(OPTIONS),
    "suffix": st.sampled_from([".pt", ".safetensors", ".npz"]),
}


@settings(max_examples=40)
@given(**RANDOM)
def test_every_record_is_verified_once(
    model: dict[str, Any], apart: bool, options: dict[str, Any], suffix: str
) -> None:
    """Ties, overlaps, gaps and scattered views, in checkpoints laid out alike or not."""
    check_random(model, apart, options, suffix, 1)


@settings(max_examples=15)
@given(**RANDOM)
def test_a_checkpoint_of_which_only_copies_are_taken_is_verified_too(
    model: dict[str, Any], apart: bool, options: dict[str, Any], suffix: str
) -> None:
    """The last one, of weight zero: no range reads of it, so copies and what is left do."""
    check_random(model, apart, options, suffix, 0)


# ---------------------------------------------------------------------------- chosen plans

ROWS = View("0", (3, 4), (4, 1))
COLUMNS = View("0", (3, 4), (1, 3))
CASES: dict[str, tuple[dict[str, View], dict[str, Any]]] = {
    "one tensor": ({"a": ROWS}, {}),
    "two in a storage": ({"a": View("0", (6,), (1,)), "b": View("0", (6,), (1,), 6)}, {}),
    "with a gap": ({"a": View("0", (4,), (1,), 1), "b": View("0", (4,), (1,), 7)}, {}),
    "one of two": (
        {"a": View("0", (6,), (1,)), "b": View("0", (6,), (1,), 6)},
        {"select": [("exclude", "b")]},
    ),
    "overlapping": ({"a": View("0", (8,), (1,)), "b": View("0", (8,), (1,), 4)}, {}),
    "one inside another": ({"a": View("0", (12,), (1,)), "b": View("0", (2,), (1,), 5)}, {}),
    "tied": ({"a": ROWS, "b": ROWS}, {}),
    "tied, one copied": ({"a": ROWS, "b": ROWS}, {"select": [("exclude", "b")]}),
    "tied in another shape": ({"a": ROWS, "b": View("0", (12,), (1,))}, {}),
    "tied and transposed": ({"a": ROWS, "b": View("0", (4, 3), (1, 4))}, {}),
    "columns": ({"a": COLUMNS}, {}),
    "interleaved": ({"a": View("0", (6,), (2,)), "b": View("0", (6,), (2,), 1)}, {}),
    "shown often": ({"a": View("0", (7, 12), (0, 1)), "b": View("0", (3,), (0,), 5)}, {}),
    "variables kept": ({"a": ROWS}, {"names": "shadow", "keep_variables": True}),
}


def write_case(folder: Path, tensors: Mapping[str, View], count: int = 3) -> Path:
    for k in range(1, count + 1):
        write_views(folder / f"m-{k}.pt", storages([12], k), tensors)
    return folder


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("case", CASES)
def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path, case: str, suffix: str) -> None:
    """Also in the gaps between the tensors of a storage: its checksum is that of all of it."""
    tensors, options = CASES[case]
    run = write_case(tmp_path / "run", tensors)
    check_plan(ema_cli.plan_run(run, tmp_path / f"out{suffix}", average=["mean"], **options))
    rng = random.Random(case + suffix)
    k = rng.choice([1, 3])
    path = run / f"m-{k}.pt"
    whole = path.read_bytes()
    start, n_bytes = storage_place(path, "0")
    at = start + rng.randrange(n_bytes)
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
    with pytest.raises(DamagedFile, match=f"m-{k}.pt: .*expected bytes with checksum"):
        ema_cli.average_run(run, tmp_path / f"out{suffix}", average=["mean"], **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("case", CASES)
def test_a_last_checkpoint_of_weight_zero_is_verified(
    tmp_path: Path, case: str, suffix: str
) -> None:
    """Only what is copied is taken from it, and the record around that is read."""
    tensors, options = CASES[case]
    run = write_case(tmp_path / "run", tensors)
    (tmp_path / "w.txt").write_text("1 1\n2 1\n3 0\n")
    average = [f"weights:{tmp_path / 'w.txt'}"]
    check_plan(ema_cli.plan_run(run, tmp_path / f"out{suffix}", average=average, **options))
    ema_cli.average_run(run, tmp_path / f"out{suffix}", average=average, **options)


def test_ties_are_read_once(tmp_path: Path) -> None:
    """Three names of one tensor cost what one costs, and the progress says so."""
    one = write_case(tmp_path / "one", {"a": ROWS})
    three = write_case(tmp_path / "three", {"a": ROWS, "b": ROWS, "c": ROWS})
    costs = [ema_cli.plan_run(run, tmp_path / "o.pt").costs.read for run in (one, three)]
    events: list[Any] = []
    result = ema_cli.average_run(three, tmp_path / "o.pt", on_event=events.append)
    state = load(tmp_path / "o.pt")
    assert state["a"].tobytes() == state["b"].tobytes() == state["c"].tobytes()
    assert events[-1].read == events[-1].total == result.read == costs[1]
    framing = [(run / "m-3.pt").stat().st_size for run in (one, three)]
    assert costs[1] - costs[0] == framing[1] - framing[0]


def test_a_scattered_place_is_read_besides(tmp_path: Path) -> None:
    """A transposed tensor on its way to C order is gathered, and its record read to be verified."""
    run = write_case(tmp_path / "run", {"a": COLUMNS})
    plan = ema_cli.plan_run(run, tmp_path / "out.safetensors")
    maps = byte_maps(plan)
    assert [one.unverified.sum() for one in maps.values()] == [48, 48, 48]
    assert [one.verified.sum() for one in maps.values()] == [48, 48, 48]
    alike = ema_cli.plan_run(run, tmp_path / "out.pt")
    maps = byte_maps(alike)
    assert [one.verified.sum() for one in maps.values()] == [48, 48, 48]
    assert [one.unverified.sum() for one in maps.values()][:2] == [0, 0]


def test_a_record_that_nobody_needs_is_not_read(tmp_path: Path) -> None:
    """An optimizer's storages, of a checkpoint whose weights alone are averaged."""
    folder = tmp_path / "run"
    for k in (1, 2):
        some = {"w": View("0", (12,), (1,)), "layer/Momentum": View("1", (500,), (1,))}
        write_views(folder / f"m-{k}.pt", storages([12, 500], k), some)
    plan = ema_cli.plan_run(folder, tmp_path / "out.safetensors")
    assert [one.verified.sum() for one in byte_maps(plan).values()] == [48, 48]
    assert plan.costs.read == 96


# ---------------------------------------------------------------------------- other containers


def npz_run(folder: Path, compressed: bool = False) -> Path:
    folder.mkdir()
    for k in (1, 2, 3):
        rng = np.random.default_rng(k)
        arrays = {
            "w": np.asfortranarray(rng.normal(size=(5, 7)).astype(np.float32)),
            "norm/moving_mean": rng.normal(size=6),
            "step": np.int64(k),
        }
        (np.savez_compressed if compressed else np.savez)(folder / f"m-{k}.npz", **arrays)
    return folder


@pytest.mark.parametrize("options", OPTIONS[:2] + OPTIONS[4:])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_members_of_an_npz_file(tmp_path: Path, options: dict[str, Any], suffix: str) -> None:
    """Records are the arrays without their headers, whose CRCs follow from the members'."""
    run = npz_run(tmp_path / "run")
    check_plan(ema_cli.plan_run(run, tmp_path / f"out{suffix}", average=["mean"], **options))
    ema_cli.average_run(run, tmp_path / f"out{suffix}", average=["mean"], **options)


def test_files_beside_the_weights_are_copied_unverified(tmp_path: Path) -> None:
    """Nothing tells what a config.json has to be; the weights around it are verified."""
    for k in (1, 2):
        folder = tmp_path / "run" / f"checkpoint-{k}"
        write_views(folder / "pytorch_model.bin", storages([12], k), {"a": ROWS})
        (folder / "config.json").write_text('{"model_type": "none"}')
    plan = ema_cli.plan_run(tmp_path / "run", tmp_path / "out", average=["mean"])
    last = plan.work.first_input[-1]
    beside = [c for c in plan.work.copies if c.place.file > last]
    assert [(copy.nbytes, copy.place.unit) for copy in beside] == [(22, None)]
    for found in byte_maps(plan).values():
        assert found.verified.sum() == 48
        assert found.verified.max() == 1
    ema_cli.average_run(tmp_path / "run", tmp_path / "out", average=["mean"])
    assert (tmp_path / "out" / "config.json").read_text() == '{"model_type": "none"}'


def test_formats_without_checksums_are_read_unverified(tmp_path: Path) -> None:
    """safetensors keeps none: no unit, and nothing is read only to be verified."""
    for k in (1, 2):
        write_checkpoint(tmp_path / "run" / f"m-{k}.safetensors", {"w": np.float32([k, 1])})
    plan = ema_cli.plan_run(tmp_path / "run", tmp_path / "out.safetensors", average=["mean"])
    assert plan.costs.read == 16
    assert not [copy for copy in plan.work.copies if not copy.targets]


def test_archives_without_checksums_are_read_unverified(tmp_path: Path) -> None:
    """torch.serialization.set_crc32_options(False) leaves zeros: nothing is held against them."""
    run = tmp_path / "run"
    for k in (1, 2, 3):
        write_views(run / f"m-{k}.pt", storages([12], k), {"a": ROWS}, checked=False)
    plan = ema_cli.plan_run(run, tmp_path / "out.safetensors", average=["mean"])
    assert all(checkpoint.checksums is None for checkpoint in plan.run.checkpoints)
    assert plan.costs.read == 3 * 48
    cmd("run", run, "-o", tmp_path / "out.safetensors", "--average", "mean")
    assert plan.run.checkpoints[0].index.records == ()
    assert Extent(0, *storage_place(run / "m-1.pt", "0")) in [
        t.extent for t in plan.run.checkpoints[0].index.tensors
    ]
