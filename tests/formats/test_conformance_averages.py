"""What every format makes of averages, ties and each other; see `test_conformance`."""

from __future__ import annotations

from pathlib import Path

import conformance
import pytest
from conformance import CASES, ROWS, bytes_of, contents, floats, make, make_run, read

import ema_cli
from ema_cli.errors import UsageError
from ema_cli.formats import FORMATS
from ema_cli.naming import SHADOW_NAME

each_row = pytest.mark.parametrize("row", ROWS)
each_pair = pytest.mark.parametrize(
    ("source", "target"), [(a, b) for a in ROWS for b in ROWS], ids=lambda row: row
)


# ---------------------------------------------------------------------------- ties


@each_row
def test_tied_tensors_stay_tied_or_it_is_told(row: str, tmp_path: Path) -> None:
    """In a copy of a checkpoint's structure they stay; a new file can say it or notes tell."""
    values = [floats(1 + k / 7) for k in range(3)]
    paths = [conformance.make_tied(row, tmp_path / "in", k + 1, v) for k, v in enumerate(values)]
    plain = [make("safetensors", tmp_path / "plain", v, k + 1) for k, v in enumerate(values)]
    ema_cli.average_run(plain, tmp_path / "mean.safetensors", average=["mean"], names="variable")
    mean = contents(tmp_path / "mean.safetensors")
    tied = _is_tied(paths[0])
    assert tied == (CASES[row].ties or row in ("hdf5", "keras"))
    for dtype in (None, "float64"):
        out = tmp_path / f"out-{dtype}" / CASES[row].called.format(9)
        out.parent.mkdir()
        done = ema_cli.average_run(paths, out, average=["mean"], names="variable", dtype=dtype)
        [layout] = [outcome.layout for outcome in done.plan.outcomes]
        assert layout.template == (dtype is None)
        stays = tied and (layout.template or CASES[row].ties)
        assert _is_tied(out) == stays
        assert any("tied tensor" in note for note in layout.notes) == (tied and not stays)
        found = contents(out)
        assert found["tied"] == found["dense/kernel"]
        if dtype is None:
            assert found == {**mean, "tied": mean["dense/kernel"]}


def _is_tied(path: Path) -> bool:
    by_name = read(path).index.by_name
    return by_name["tied"].extent == by_name["dense/kernel"].extent


# ---------------------------------------------------------------------------- averages


@each_row
@pytest.mark.parametrize("dtype", [None, "float64"])
def test_an_average_is_that_of_the_values(row: str, dtype: str | None, tmp_path: Path) -> None:
    """Bit for bit what the same values give as safetensors; twice the same bytes; then unchanged.

    With another dtype the output is a new file, without it a copy of the last one's structure.
    """
    paths, plain = make_run(row, tmp_path / "in"), make_run("safetensors", tmp_path / "plain")
    outs = [tmp_path / f"out{k}" / CASES[row].called.format(9) for k in range(2)]
    reference = tmp_path / "reference.safetensors"
    options = {"average": ["ema:0.7"], "names": "variable", "dtype": dtype}
    ema_cli.average_run(plain, reference, **options)
    for out in outs:
        out.parent.mkdir()
        done = ema_cli.average_run(paths, out, **options)
        assert [written.status for written in done.outputs] == ["written"]
        assert [o.layout.template for o in done.plan.outcomes] == [dtype is None]
    assert bytes_of(outs[0]) == bytes_of(outs[1])
    again = ema_cli.average_run(paths, outs[0], **options)
    assert [written.status for written in again.outputs] == ["unchanged"]
    assert bytes_of(outs[0]) == bytes_of(outs[1])
    assert not ema_cli.diff(outs[0], reference)
    assert not ema_cli.diff(reference, outs[0])


@each_row
def test_shadows_stand_beside_their_variables(row: str, tmp_path: Path) -> None:
    """Wherever a format has to keep them, they are read back under their names."""
    paths = make_run(row, tmp_path / "in")
    for name in ("shadow", "variable"):
        (tmp_path / name).mkdir()
    both, alone = (tmp_path / name / CASES[row].called.format(9) for name in ("shadow", "variable"))
    ema_cli.average_run(paths, both, average=["mean"], names="shadow", keep_variables=True)
    ema_cli.average_run(paths, alone, average=["mean"], names="variable")
    averaged = {f"{name}/{SHADOW_NAME}": value for name, value in contents(alone).items()}
    del averaged[f"steps_done/{SHADOW_NAME}"]
    assert contents(both) == {**contents(paths[-1]), **averaged}


@each_row
def test_what_has_to_be_unpacked_is_averaged_alike(row: str, tmp_path: Path) -> None:
    """Compressed tensors are spilled, and the output is a new file without compression."""
    if FORMATS[row].spill is None:
        assert all(stamp.path for stamp in read(make(row, tmp_path / "in", floats())).files)
        return
    values = [floats(1 + k / 7) for k in range(3)]
    packed = [conformance.make_packed(row, tmp_path / "p", k + 1, v) for k, v in enumerate(values)]
    assert not all(stamp.path for stamp in read(packed[0]).files)
    assert [contents(path) for path in packed] == [conformance.raw_arrays(v) for v in values]
    out, reference = tmp_path / CASES[row].called.format(9), tmp_path / "reference.safetensors"
    done = ema_cli.average_run(packed, out, average=["mean"], names="variable")
    assert not done.plan.outcomes[0].layout.template
    assert all(stamp.path for stamp in read(out).files)
    plain = make_run("safetensors", tmp_path / "plain")
    ema_cli.average_run(plain, reference, average=["mean"], names="variable")
    assert not ema_cli.diff(out, reference)


# ---------------------------------------------------------------------------- any to any


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Three checkpoints of the same values in every format."""
    return {row: make_run(row, tmp_path_factory.mktemp(row) / "in") for row in ROWS}


@pytest.fixture(scope="module")
def mean(runs: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their mean as safetensors."""
    out = tmp_path_factory.mktemp("mean") / "mean.safetensors"
    ema_cli.average_run(runs["safetensors"], out, average=["mean"], names="variable")
    return out


@each_pair
def test_any_format_becomes_any(
    source: str, target: str, runs: dict[str, list[Path]], mean: Path, tmp_path: Path
) -> None:
    """By rename and by run; only an archive becomes an archive."""
    copy, out = (tmp_path / name / CASES[target].called.format(300) for name in ("copy", "out"))
    for made in (copy, out):
        made.parent.mkdir()
    rules = [("^", "of/")] if source == target else []
    if CASES[target].made_like and source != target:
        with pytest.raises(UsageError, match=r"write the weights alone|configuration"):
            ema_cli.rename(runs[source][2], copy, format=target)
        with pytest.raises(UsageError, match=r"write the weights alone|configuration"):
            ema_cli.average_run(runs[source], out, format=target, names="variable")
        assert conformance.listing(tmp_path) == ["copy", "out"]
        return
    ema_cli.rename(runs[source][2], copy, format=target, rule=rules)
    found = {name.removeprefix("of/"): value for name, value in contents(copy).items()}
    assert found == contents(runs[source][2])
    ema_cli.average_run(runs[source], out, format=target, average=["mean"], names="variable")
    assert [read(path).index.format for path in (copy, out)] == [target, target]
    assert not ema_cli.diff(out, mean)
