"""What a state makes of a run that grows, moves, loses and rewrites its checkpoints."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conformance import contents
from helpers import cmd, write_checkpoint
from stores import (
    FIXTURES,
    document,
    documents,
    files_of,
    slot_of,
    tree,
    update,
    values,
    what_counts,
    without_barriers,
    write_steps,
)
from tensorflow_bundles import strings, write_bundle
from torch_files import ref, saved, state_of
from torch_views import View, write_views

import ema_cli
from ema_cli import formats
from ema_cli.errors import Disagreement, EmaError, NothingToAverage, OutputExists, UsageError

STEPS = [100, 200, 300, 400, 500]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about power cuts."""
    without_barriers(monkeypatch)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Five checkpoints."""
    return write_steps(tmp_path / "run", STEPS)


def steps_in(state: Path) -> list[int]:
    """Return the steps of the ledger."""
    return [row["step"] for row in documents(state, "ledger")]


def same_as_a_run(state: Path, runs: Any, folder: Path, **given: Any) -> None:
    """Check that a state exports what a run without one writes."""
    look = {k: given.pop(k) for k in ("names", "format") if k in given}
    folder.mkdir(exist_ok=True)
    a, b = (folder / f"{len(list(folder.iterdir()))}-{k}" / "out" for k in "ab")
    for path in (a, b):
        path.parent.mkdir()
    ema_cli.export(state, a, **look)
    ema_cli.average_run(runs, b, **given, **look)
    assert files_of(a) == files_of(b)


# ---------------------------------------------------------------------------- which are taken


def test_late_checkpoints_are_passed_over(paths: list[Path], tmp_path: Path) -> None:
    """What is no newer than the last one comes too late, and is told."""
    state = tmp_path / "S"
    update(state, [paths[1], paths[3]], decay=0.5)
    done = update(state, paths[0].parent, decay=0.5)
    assert [row.step for row in done.applied] == [500]
    late = {entry.path: entry.reason for entry in done.run.passed_over}
    assert late == {
        str(paths[k]): "not newer than step 400, the last one in the state" for k in (0, 2)
    }
    assert done.notes == ()
    # What is older than the first one of the state was never asked for.
    assert [entry.path for entry in done.unusable] == [str(paths[2])]
    told = cmd("run", tmp_path / "run", "--state", state, "--decay", "0.5", code=3)
    assert told.out.startswith("unchanged  step 500")
    assert "model-100.safetensors" in told.err and "not newer than step 500" in told.err
    same_as_a_run(state, [paths[1], *paths[3:]], tmp_path / "out", decay=0.5)


@pytest.mark.parametrize("how", ["rewritten", "touched", "of another size"])
def test_a_checkpoint_that_was_averaged_and_is_another_now(
    how: str, paths: list[Path], tmp_path: Path
) -> None:
    """It is not averaged twice, and there is a note: the training may have begun anew."""
    state = tmp_path / "S"
    update(state, paths[:3], decay=0.5)
    if how == "touched":
        os.utime(paths[1], ns=(1, 1))
    else:
        extra = {"more": np.float32([1])} if how == "of another size" else {}
        write_checkpoint(paths[1], {**values(7), **extra})
        os.utime(paths[1], ns=(1, 1))
    done = update(state, paths, decay=0.5)
    assert [row.step for row in done.applied] == [400, 500]
    [note] = done.notes
    assert "model-200.safetensors" in note and "averaged already" in note
    assert update(state, paths, decay=0.5).notes == (note,)


def test_old_checkpoints_may_go(paths: list[Path], tmp_path: Path) -> None:
    """Rotation takes what was averaged; only an empty run is an error."""
    state = tmp_path / "S"
    update(state, tmp_path / "run", decay=0.5)
    for path in paths:
        path.unlink()
    before = tree(state)
    with pytest.raises(NothingToAverage):
        update(state, tmp_path / "run", decay=0.5)
    assert tree(state) == before
    write_steps(tmp_path / "run", [600])
    assert update(state, tmp_path / "run", decay=0.5).checkpoints == 6
    shutil.rmtree(tmp_path / "run")
    write_steps(tmp_path / "run", [*STEPS, 600])
    same_as_a_run(state, tmp_path / "run", tmp_path / "out", decay=0.5)


def test_damaged_checkpoints(paths: list[Path], tmp_path: Path) -> None:
    """In a directory they are passed over, exit 3 when it is the newest; named, an error."""
    state = tmp_path / "S"
    update(state, paths[:2], decay=0.5)
    paths[3].write_bytes(paths[3].read_bytes()[:-1])
    paths[4].write_bytes(b"")
    done = cmd("run", tmp_path / "run", "--state", state, "--decay", "0.5", code=3)
    assert steps_in(state) == [100, 200, 300] and "model-400" in done.err
    cmd("run", *paths, "--state", state, "--decay", "0.5", code=12)
    cmd("run", tmp_path / "run", "--state", state, "--decay", "0.5", "--strict", code=12)
    assert steps_in(state) == [100, 200, 300]


def test_named_one_by_one_in_any_order(paths: list[Path], tmp_path: Path) -> None:
    """In the order of their steps; a list and a directory are the same to a state."""
    state = tmp_path / "S"
    update(state, [paths[2], paths[0]], decay=0.5)
    update(state, [paths[4], paths[3]], decay=0.5)
    assert steps_in(state) == [100, 300, 400, 500]
    same_as_a_run(state, [paths[k] for k in (0, 2, 3, 4)], tmp_path / "out", decay=0.5)
    assert update(state, [paths[4]], decay=0.5).applied == ()


def test_a_choice_of_steps(paths: list[Path], tmp_path: Path) -> None:
    """`steps` and `glob` choose as they do without a state, and may be others the next time."""
    ways = {"steps": ({"steps": "100::200"}, [700]), "glob": ({"glob": "*[135]00*"}, [])}
    for name, (given, more) in ways.items():
        state = tmp_path / name
        update(state, tmp_path / "run", decay=0.5, **given)
        write_steps(tmp_path / "run", [600, 700])
        update(state, tmp_path / "run", decay=0.5, **given)
        assert steps_in(state) == [100, 300, 500, *more]
        same_as_a_run(state, tmp_path / "run", tmp_path / "out", decay=0.5, **given)
        for path in (tmp_path / "run").glob("model-[67]00*"):
            path.unlink()
        # What was left out then comes too late now.
        cmd("run", tmp_path / "run", "--state", state, "--decay", "0.5", code=3)


def test_steps_told_by_names(tmp_path: Path) -> None:
    """`step_from` tells the steps of the new ones too."""
    run, state = tmp_path / "run", tmp_path / "S"
    for k in (1, 2, 3):
        write_checkpoint(run / f"v{k * 7}_of_99.safetensors", values(k))
    given = {"decay": 0.5, "step_from": r"v(\d+)_"}
    update(state, run, **given)
    write_checkpoint(run / "v28_of_99.safetensors", values(4))
    assert [row.step for row in update(state, run, **given).applied] == [28]
    same_as_a_run(state, run, tmp_path / "out", **given)


def test_checkpoints_without_steps(tmp_path: Path) -> None:
    """Their places in a list cannot tell new ones from old ones: refused, never left out."""
    paths = [
        write_checkpoint(tmp_path / f"{c}.safetensors", values(k)) for k, c in enumerate("abc")
    ]
    for group in (paths, paths[:1]):
        with pytest.raises(EmaError, match="step") as caught:
            update(tmp_path / "S", group, decay=0.5)
        assert caught.value.exit_code in (2, 13)
    state = tmp_path / "T"
    update(state, write_steps(tmp_path / "run", [1, 2]), decay=0.5)
    before = what_counts(state)
    for group in (paths, paths[:1]):
        with pytest.raises(EmaError, match="step"):
            update(state, group, decay=0.5)
    assert what_counts(state) == before


def test_a_step_twice_is_refused(paths: list[Path], tmp_path: Path) -> None:
    """As without a state."""
    update(tmp_path / "S", paths[:3], decay=0.5)
    other = write_checkpoint(tmp_path / "other-400.safetensors", values(1))
    with pytest.raises(Disagreement, match="twice"):
        update(tmp_path / "S", [*paths, other], decay=0.5)
    assert steps_in(tmp_path / "S") == [100, 200, 300]


def test_step_zero_counts(tmp_path: Path) -> None:
    """It is a step like any other."""
    run = tmp_path / "run"
    write_steps(run, [0])
    given = {"average": ["half-life:10"]}
    assert update(tmp_path / "S", run, **given).step == 0
    assert update(tmp_path / "S", run, **given).applied == ()
    write_steps(run, [5, 20])
    assert update(tmp_path / "S", run, **given).checkpoints == 3
    same_as_a_run(tmp_path / "S", run, tmp_path / "out", **given)


# ---------------------------------------------------------------------------- what changes


def test_copied_tensors_come_and_go(tmp_path: Path) -> None:
    """Slots of another layout: what the last checkpoint has is there, nothing else."""
    run, state = tmp_path / "run", tmp_path / "S"
    others: list[dict[str, Any]] = [
        {},
        {"n": np.int64([1, 2, 3])},
        {"n": np.int64([5]), "flag": np.array([True])},
        {"kernel/Momentum": np.ones((3, 5), np.float32)},
        {"large": np.zeros(3 << 20, np.uint8)},
        {"kernel/Momentum": np.ones((3, 5), np.float32), "scale": np.float16([2])},
        {},
    ]
    chosen = [("exclude", "*"), ("include", "kernel"), ("include", "bias")]
    given = {"decay": 0.5, "optimizer": "keep", "select": chosen}
    before: list[Path] = []
    for k, other in enumerate(others):
        before.append(write_checkpoint(run / f"m-{k}.safetensors", {**values(k), **other}))
        update(state, run, **given)
        assert contents(slot_of(state)).keys() == {*values(k), *other}
        same_as_a_run(state, before, tmp_path / "out", names="variable", **given)
        same_as_a_run(state, before, tmp_path / "out", format="npz", **given)


def test_a_rule_for_a_tensor_that_comes_and_goes(tmp_path: Path) -> None:
    """A rule that matched when the state was begun is no slip of the pen later."""
    run, state = tmp_path / "run", tmp_path / "S"
    given = {"decay": 0.5, "select": [("exclude", "extra")]}
    for k in range(4):
        extra = {"extra": np.float32([k])} if k % 2 == 0 else {}
        write_checkpoint(run / f"m-{k}.safetensors", {**values(k), **extra})
        update(state, run, **given)
        same_as_a_run(state, run, tmp_path / "out", **given)
    with pytest.raises(Disagreement, match="matches no tensor"):
        update(tmp_path / "T", run, decay=0.5, select=[("exclude", "extar")])


def test_strings_of_another_size(tmp_path: Path) -> None:
    """They stay in the structure of the last checkpoint."""
    run, state = tmp_path / "run", tmp_path / "S"
    run.mkdir()
    for k, text in enumerate((b"x", b"y" * 100_000, b"", b"z" * 70), start=1):
        weights = np.arange(100, dtype=np.float32) * k
        write_bundle(run / f"c-{k}", {"text": strings([text, b"q"]), "w": weights})
        update(state, run, decay=0.5)
        same_as_a_run(state, run, tmp_path / "out", decay=0.5)


def write_torch(folder: Path, step: int, tied: bool = True, **more: Any) -> Path:
    """Write a PyTorch file with two tied tensors, or apart with equal bytes."""
    one, other = ref(f"t{step}", (2, 3)), ref(f"t{step}" if tied else f"u{step}", (2, 3))
    folder.mkdir(exist_ok=True)
    path = folder / f"m-{step}.pt"
    path.write_bytes(saved(state_of(head=one, body=ref(f"b{step}", (4,)), tail=other, **more)))
    return path


def test_ties_stay(tmp_path: Path) -> None:
    """In PyTorch's files and folders tied tensors are stored once, here and in the slot."""
    for step in (1, 2, 3):
        write_torch(tmp_path / "run", step)
    for k, run in enumerate((tmp_path / "run", FIXTURES / "torch" / "run")):
        state, out = tmp_path / f"S{k}", tmp_path / f"{k}.pt"
        update(state, run, decay=0.5)
        ema_cli.export(state, out)
        tied = ties(sorted(run.iterdir())[-1])
        assert ties(out) == tied and len(tied) == 1
        held = {tuple(one[5]) for one in document(state, "manifest-1")["held"] if len(one) == 6}
        assert {tuple(sorted(names)) for names in held} == tied


def ties(path: Path) -> set[tuple[str, ...]]:
    """Return the names of the tensors of a checkpoint that are stored as one."""
    names: dict[Any, list[str]] = {}
    for tensor in formats.read(str(path), {}).index.tensors:
        names.setdefault((tensor.extent, tensor.shape, tensor.strides), []).append(tensor.name)
    return {tuple(sorted(found)) for found in names.values() if len(found) > 1}


def test_ties_that_come_and_go(tmp_path: Path) -> None:
    """What was one and is two, or the other way round: averaged alike or refused."""
    for first, later in ((True, False), (False, True)):
        run, state = tmp_path / f"{first}", tmp_path / f"S{first}"
        paths = [write_torch(run, k, tied) for k, tied in enumerate((first, first, later, later))]
        for k in range(1, 5):
            try:
                update(state, paths[:k], decay=0.5)
            except Disagreement:
                with pytest.raises(Disagreement):
                    ema_cli.average_run(paths[:k], tmp_path / "x.pt", decay=0.5)
                break
            for suffix in (".safetensors", ".npz"):
                out = tmp_path / f"{first}-{k}{suffix}"
                ema_cli.export(state, out, names="variable")
                reference = tmp_path / f"reference-{first}-{k}{suffix}"
                ema_cli.average_run(paths[:k], reference, decay=0.5, names="variable")
                assert files_of(out) == files_of(reference)


# ---------------------------------------------------------------------------- outputs


def test_an_output_with_every_update(paths: list[Path], tmp_path: Path) -> None:
    """What `run --state -o` writes is what a run over all of it writes; a name for each step."""
    state, out = tmp_path / "S", tmp_path / "out-{step}.safetensors"
    for k, path in enumerate(paths, start=1):
        done = update(state, path, output=out, decay=0.5)
        [written] = done.outputs
        assert (written.status, Path(written.path).name) == ("written", f"out-{k}00.safetensors")
        reference = tmp_path / "reference" / f"{k}"
        ema_cli.average_run(paths[:k], f"{reference}.safetensors", decay=0.5)
        assert files_of(Path(written.path)) == files_of(Path(f"{reference}.safetensors"))
    again = update(state, paths, output=out, decay=0.5)
    assert ([w.status for w in again.outputs], again.applied) == (["unchanged"], ())
    other = update(state, paths, output=tmp_path / "late.npz", decay=0.5)
    assert ([w.status for w in other.outputs], other.applied) == (["written"], ())


def test_an_output_that_is_there_stops_the_update_before_it(
    paths: list[Path], tmp_path: Path
) -> None:
    """Nothing is applied that would not be written."""
    state, out = tmp_path / "S", tmp_path / "out.safetensors"
    update(state, paths[:2], output=out, decay=0.5)
    before = what_counts(state)
    with pytest.raises(OutputExists):
        update(state, paths, output=out, decay=0.5)
    assert what_counts(state) == before
    assert update(state, paths, output=out, overwrite=True, decay=0.5).step == 500


def test_an_output_is_never_one_of_the_checkpoints(paths: list[Path], tmp_path: Path) -> None:
    """Those that were averaged long ago count too."""
    state, before = tmp_path / "S", tree(tmp_path / "run")
    update(state, paths[:3], decay=0.5)
    for path in (paths[0], paths[2], tmp_path / "run" / ".." / "run" / "model-100.safetensors"):
        for overwrite in (True, False):
            with pytest.raises(OutputExists):
                ema_cli.export(state, path, overwrite=overwrite)
            with pytest.raises(OutputExists):
                update(state, paths, output=path, overwrite=overwrite, decay=0.5)
    assert tree(tmp_path / "run") == before


@pytest.mark.parametrize(
    "name",
    ["slot.0", "slot.1", "manifest-1", "ROOT", "new.npz", "last-1/model-100.safetensors", ""],
)
def test_no_output_inside_a_state(name: str, paths: list[Path], tmp_path: Path) -> None:
    """Of this one or another, by export, by run, with or without a state."""
    state, other = tmp_path / "S", tmp_path / "T"
    update(state, paths[:1], decay=0.5)
    update(other, paths[:2], decay=0.5)
    before = tree(state)
    out = state / name
    given: dict[str, Any] = {"overwrite": True, "format": "npz" if name else "safetensors-folder"}
    for source in (state, other):
        with pytest.raises(OutputExists):
            ema_cli.export(source, out, **given)
    with pytest.raises(OutputExists):
        update(state, paths, output=out, decay=0.5, **given)
    with pytest.raises(OutputExists):
        ema_cli.average_run(paths, out, **given)
    assert tree(state) == before


def test_what_a_state_cannot_give(paths: list[Path], tmp_path: Path) -> None:
    """Averages it has not, optimizer state it was made without, values it has not kept."""
    state = tmp_path / "S"
    for k, path in enumerate(paths):
        write_checkpoint(path, {**values(k), "kernel/Momentum": np.ones((3, 5), np.float32)})
    update(state, paths, average=["a=mean", "b=ema:0.5"])
    out = tmp_path / "{average}.safetensors"
    with pytest.raises(UsageError, match="expected one of a, b"):
        ema_cli.export(state, out, average=["c"])
    with pytest.raises(UsageError, match="average"):
        ema_cli.export(state, tmp_path / "out.safetensors")
    with pytest.raises(Disagreement, match="without optimizer state"):
        ema_cli.export(state, out, optimizer="keep")
    assert [o.path for o in ema_cli.export(state, out, average=["b"]).outputs] == [
        str(tmp_path / "b.safetensors")
    ]
    single = tmp_path / "single.safetensors"
    ema_cli.export(state, single, average=["b"])
    assert files_of(single) == files_of(tmp_path / "b.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("excluded", [False, True])
def test_what_is_copied_and_tied_is_written_once(tmp_path: Path, excluded: bool) -> None:
    """Two names of one storage: the checksums of the slot are those of its bytes."""
    numbers = np.arange(12, dtype=np.float32 if excluded else np.int64)
    for step in (1, 2, 3):
        held = {"0": np.float32([step] * 4), "1": numbers}
        ids = View("1", (12,), (1,))
        tensors = {"w": View("0", (4,), (1,)), "ids": ids, "again": ids}
        write_views(tmp_path / "run" / f"m-{step}.pt", held, tensors)
    given: dict[str, Any] = {"decay": 0.5}
    if excluded:
        given["select"] = [("exclude", "ids"), ("exclude", "again")]
    for step in (1, 2, 3):
        update(tmp_path / "S", [tmp_path / "run" / f"m-{step}.pt"], **given)
        ema_cli.verify(tmp_path / "S")
    same_as_a_run(tmp_path / "S", tmp_path / "run", tmp_path / "out", **given)
