"""A state makes what a run makes: the same bytes, in every format, however it came about.

Batch, one checkpoint at a time, in groups, interrupted, with any workers; exported when the
checkpoints are gone, in their own format and in every other that is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from stores import (
    FIXTURES,
    Files,
    document,
    documents,
    made,
    manifest_of,
    paths_of,
    slot_of,
    tree,
    update,
    without_barriers,
)

import ema_cli
from ema_cli.engine import Progress


class Case(NamedTuple):
    """A run, how it is averaged, and how its outputs look."""

    run: str
    average: Mapping[str, Any]
    look: Mapping[str, Any] = {}
    suffix: str = ""


_EMA = {"decay": 0.9}
_SEVERAL = ["mean", "ema:0.9", "half-life:300", "power:0.1"]
_CHOSEN = [("exclude", "*"), ("include", "hidden*"), ("exclude", "*/bias")]
DIGITS, BF16, GRAPH = "digits/run", "digits/bf16", "tensorflow/graph"

# Every run there is, with the average that suits all of them.
RUNS = {
    DIGITS: Case(DIGITS, _EMA, {}, ".safetensors"),
    BF16: Case(BF16, _EMA),
    GRAPH: Case(GRAPH, _EMA),
    "tensorflow/partitioned": Case("tensorflow/partitioned", _EMA),
    "tensorflow/keras/compiled": Case("tensorflow/keras/compiled", _EMA),
    "torch/run": Case("torch/run", _EMA, {}, ".pt"),
    "torch/hf": Case("torch/hf", _EMA),
    "torch/legacy": Case("torch/legacy", _EMA, {}, ".pt"),
    "torch/lightning": Case("torch/lightning", _EMA, {}, ".ckpt"),
    "torch/lightning-ema": Case("torch/lightning-ema", _EMA, {}, ".ckpt"),
    "torch/gan": Case("torch/gan", {**_EMA, "key": "netG"}, {}, ".pt"),
    "keras/archive": Case("keras/archive", _EMA, {}, ".keras"),
    "keras/bfloat16": Case("keras/bfloat16", _EMA, {}, ".weights.h5"),
    "keras/legacy": Case("keras/legacy", _EMA, {}, ".h5"),
    "keras/weights": Case("keras/weights", _EMA, {}, ".weights.h5"),
    "npz/run": Case("npz/run", _EMA, {}, ".npz"),
    "npz/compressed": Case("npz/compressed", _EMA, {}, ".npz"),
}
# Every way of averaging, with the runs where it means something.
WAYS = {
    "the ramp": Case(DIGITS, {}, {}, ".safetensors"),
    "mean": Case(BF16, {"average": ["mean"]}),
    "mean, shadow dtype": Case(BF16, {"average": ["mean"], "shadow_dtype": "same"}),
    "half-life": Case(GRAPH, {"average": ["half-life:50"]}),
    "power": Case("torch/run", {"average": ["power:0.2"]}, {}, ".pt"),
    "several": Case(DIGITS, {"average": _SEVERAL}, {}, "-{average}.safetensors"),
    "labels": Case(
        BF16, {"average": ["a=mean", "b=mean", "ema:0.5"], "num_updates": "count"}, {}, "-{average}"
    ),
    "per step, ramp of steps": Case(
        DIGITS, {"decay": "0.99/step", "num_updates": "step"}, {"names": "variable"}, ".safetensors"
    ),
    "per step, ramp of updates": Case(
        GRAPH, {"decay": "0.99/step", "num_updates": "count", "init": "zeros"}
    ),
    "ramp of steps": Case(GRAPH, {"decay": 0.95, "num_updates": "step", "name": "ramp"}),
    "debiased": Case(
        DIGITS, {**_EMA, "zero_debias": True}, {"names": "shadow"}, "-{step}.safetensors"
    ),
    "debiased, half types": Case("tensorflow/partitioned", {**_EMA, "zero_debias": True}),
    "several debiased": Case(
        BF16,
        {"average": ["ema:0.9", "ema:0.5", "mean"], "zero_debias": True, "shadow_dtype": "same"},
        {"names": "shadow"},
        "-{average}",
    ),
    "from zeros": Case("npz/run", {**_EMA, "init": "zeros"}, {"dtype": "float64"}, ".npz"),
    "decay 0": Case(DIGITS, {"decay": 0}, {}, ".safetensors"),
    "decay 1": Case(DIGITS, {"decay": 1}, {}, ".safetensors"),
    "half types": Case(BF16, {**_EMA, "shadow_dtype": "same"}),
    "like torch": Case("torch/run", {**_EMA, "like": "torch"}, {}, ".pt"),
    "like torch, bfloat16": Case(BF16, {**_EMA, "like": "torch", "statistics": "average"}),
    "like keras": Case("keras/archive", {**_EMA, "like": "keras"}, {}, ".keras"),
    "statistics": Case("keras/weights", {**_EMA, "statistics": "copy"}, {}, ".weights.h5"),
    "chosen": Case(DIGITS, {**_EMA, "select": _CHOSEN}, {"names": "variable"}, ".safetensors"),
    "optimizer": Case(DIGITS, {**_EMA, "optimizer": "keep"}, {}, ".safetensors"),
    "no optimizer": Case("torch/lightning", {**_EMA, "optimizer": "drop"}, {}, ".pt"),
    "renamed": Case(BF16, _EMA, {"rule": [("^", "model/")], "max_shard_size": "4KiB"}),
    "some steps": Case(GRAPH, {**_EMA, "steps": "40:240:40"}),
}
CASES = {**RUNS, **WAYS}
# Of a run of many checkpoints, a way of averaging needs no more than these.
FEW = 5
# What each case is exported to besides: a suffix, or a format that has none.
TARGETS = (".safetensors", ".npz", ".pt", ".h5", "tensorflow", "safetensors-folder", "torch-folder")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about power cuts."""
    without_barriers(monkeypatch)


@pytest.fixture(scope="module", name="runs")
def copies_of_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Case], Path]:
    """Returns the run of a case: a few checkpoints of it are enough for a way of averaging."""
    few: dict[str, Path] = {}

    def run_of(name: str, case: Case) -> Path:
        if name in RUNS or "steps" in case.average:
            return FIXTURES / case.run
        if case.run not in few:
            few[case.run] = tmp_path_factory.mktemp("few") / "run"
            shutil.copytree(FIXTURES / case.run, few[case.run])
            for path in map(Path, paths_of(few[case.run])[FEW:]):
                remove(path)
        return few[case.run]

    return run_of


def remove(path: Path) -> None:
    """Remove a checkpoint: a folder, a file, or those under a prefix."""
    if path.is_dir():
        shutil.rmtree(path)
    for found in [path] if path.exists() else path.parent.glob(f"{path.name}.*"):
        found.unlink()


def ways_to_get_there(run: Path, case: Case, folder: Path) -> dict[str, Path]:
    """Return states that averaged the same checkpoints, which are gone, in different ways."""
    source = Path(shutil.copytree(run, folder / "source"))
    given = {**case.average, **case.look}
    paths = paths_of(source, **case.average)
    alone = {k: v for k, v in given.items() if k != "glob"}
    states = {name: folder / name for name in ("batch", "single", "mixed")}
    update(states["batch"], source, workers=2, **given)
    for path in paths:
        update(states["single"], path, workers=1, **alone)
    for group in (paths[:1], paths[1:3], paths[3:]):
        if group:
            interrupted(states["mixed"], group, workers=4, **alone)
            update(states["mixed"], group, workers=4, **alone)
    shutil.rmtree(source)
    return states


def interrupted(state: Path, runs: list[str], **given: Any) -> None:
    """Begin an update that the user interrupts before its last task is done."""

    def stop(event: Progress) -> None:
        if event.read == event.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update(state, runs, on_event=stop, **given)


def of(state: Path) -> dict[str, Any]:
    """Return what a state holds that does not depend on how it came about."""
    manifest = document(state, manifest_of(state))
    rows = documents(state, "ledger")
    averages = [
        overwritten(column) for column in zip(*(row["coefficients"] for row in rows), strict=True)
    ]
    return {
        "slot": slot_of(state).read_bytes(),
        "last": tree(state / f"last-{manifest['generation']}"),
        "held": (manifest["held"], manifest["complete"], manifest["checksums"]),
        "settings": document(state, "plan")["settings"],
        "ledger": [[row["step"], row["name"]] for row in rows],
        "coefficients": averages,
    }


def overwritten(coefficients: Sequence[str]) -> list[float]:
    """Return the coefficients of an average, 0 where a later checkpoint was copied."""
    numbers = [float.fromhex(number) for number in coefficients]
    start = max((k for k, number in enumerate(numbers) if number == 1), default=0)
    return [0.0] * start + numbers[start:]


@pytest.mark.parametrize(("name", "case"), CASES.items(), ids=CASES)
def test_a_state_makes_what_a_run_makes(
    name: str, case: Case, runs: Callable[[str, Case], Path], tmp_path: Path
) -> None:
    """The slot does not depend on the way there; what is exported is what a run writes."""
    run = runs(name, case)
    states = ways_to_get_there(run, case, tmp_path)
    first, *others = map(of, states.values())
    assert len(first["ledger"]) >= 3
    assert all(other == first for other in others)
    for k, (ending, look) in enumerate(targets(name, case).items()):
        out = f"out{ending}"
        expected = made(writing(run, {**case.average, **look}), tmp_path / "run" / str(k) / out)
        for state in list(states.values())[: 1 if k else 3]:
            found = made(exporting(state, look), tmp_path / f"of {state.name}" / str(k) / out)
            assert kind(found) == kind(expected), (ending, found, expected)
            assert found == expected or isinstance(found, str), ending
        assert k or not isinstance(expected, str), expected


def kind(found: Files | str) -> str:
    """Return what was made: files, or which error."""
    return found.partition(":")[0] if isinstance(found, str) else "files"


def targets(name: str, case: Case) -> dict[str, Mapping[str, Any]]:
    """Return how a case is exported, by what the name of the output ends with; its own is first."""
    optimizer = {k: v for k, v in case.average.items() if k == "optimizer"}
    averages = "-{average}" if len(case.average.get("average", ())) > 1 else ""
    plain = {k: v for k, v in case.look.items() if k != "max_shard_size"}
    found = {case.suffix: {**case.look, **optimizer}}
    # The runs are exported to everything, each way of averaging to something.
    n = list(CASES).index(name) % len(TARGETS)
    for target in TARGETS if name in RUNS else (TARGETS * 2)[n : n + 2]:
        suffix = target if target.startswith(".") else ""
        look = plain if suffix else {**plain, "format": target}
        found[f"-as-{target.strip('.')}{averages}{suffix}"] = {**look, **optimizer}
    return found


def writing(run: Path, given: Mapping[str, Any]) -> Callable[[Path], object]:
    """Return what averages a run without a state."""
    return lambda out: ema_cli.average_run(run, out, **given)


def exporting(state: Path, look: Mapping[str, Any]) -> Callable[[Path], object]:
    """Return what exports a state."""
    return lambda out: ema_cli.export(state, out, **look)
