"""Outliers: what does not belong to a run is found, what does is left alone, and the hint works."""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cmd, read_checkpoint, write_checkpoint

import ema_cli
from ema_cli import errors, omitting, outliers
from ema_cli.distances import Distances
from ema_cli.outliers import DUPLICATE, FAR
from ema_cli.running import RunResult

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
DIGITS = sorted((FIXTURES / "digits" / "run").iterdir())
Model = dict[str, np.ndarray[Any, Any]]
MODELS: list[Model] = [read_checkpoint(path) for path in DIGITS]
FLOATS = [name for name, value in MODELS[0].items() if value.dtype == np.float32]

AVERAGES: dict[str, dict[str, Any]] = {
    "ema": {"decay": 0.9},
    "per step": {"decay": "0.999/step"},
    "mean": {"average": ["mean"]},
    "ramp": {"decay": 0.999, "num_updates": "count"},
    "lr": {"average": ["lr:1-sqrt"]},
    "power": {"average": ["power:0.1"]},
}
each_average = pytest.mark.parametrize("average", AVERAGES)


def with_one(folder: Path, k: int, change: Callable[[int], Model]) -> Path:
    """Write the run of digits with checkpoint `k` changed."""
    for number, (path, model) in enumerate(zip(DIGITS, MODELS, strict=True)):
        new = {**model, **change(k)} if number == k else model
        write_checkpoint(folder / path.name, new)
    return folder


def spike(k: int) -> Model:
    """Return a checkpoint with noise five times as large as a step of the training, by tensor."""
    rng = np.random.default_rng(k)
    spoilt = {}
    for name in FLOATS:
        pairs = itertools.pairwise(MODELS)
        step = np.median([np.linalg.norm(b[name] - a[name]) for a, b in pairs])
        noise = rng.normal(size=MODELS[k][name].shape)
        noise *= 5 * step / np.linalg.norm(noise)
        spoilt[name] = (MODELS[k][name] + noise).astype(np.float32)
    return spoilt


def other_run(k: int) -> Model:
    """Return a checkpoint with nothing in common but the spread of its values."""
    rng = np.random.default_rng(k)
    return {
        name: rng.permutation(MODELS[k][name].reshape(-1)).reshape(MODELS[k][name].shape)
        for name in FLOATS
    }


def saved_twice(k: int) -> Model:
    """Return the values of the checkpoint before."""
    return {name: MODELS[k - 1][name] for name in FLOATS}


def measured(run: Any, out: Path, **given: Any) -> RunResult:
    """Carry out a run that warns."""
    result = ema_cli.average_run(run, out, outliers="warn", **given)
    assert isinstance(result, RunResult)
    return result


# ---------------------------------------------------------------------------- found, or not


@each_average
@pytest.mark.parametrize("k", [4, 10, 17])
@pytest.mark.parametrize("change", [spike, other_run])
def test_what_does_not_belong_is_far(
    change: Callable[[int], Model], k: int, average: str, tmp_path: Path
) -> None:
    """It is found in every kind of average, and no neighbour is."""
    run = with_one(tmp_path / "run", k, change)
    found = measured(run, tmp_path / "o.safetensors", **AVERAGES[average]).outliers
    assert [(one.path, one.step, one.kind) for one in found] == [
        (str(run / DIGITS[k].name), (k + 1) * 100, FAR)
    ]
    assert found[0].ratio > outliers.TOGETHER
    assert found[0].group in {name.rpartition("/")[0] for name in FLOATS}


@each_average
@pytest.mark.parametrize("k", [1, 2, 9, 19])
def test_what_was_saved_twice_is_a_duplicate(k: int, average: str, tmp_path: Path) -> None:
    """Also right after the first checkpoint, which is copied, and at the end."""
    run = with_one(tmp_path / "run", k, saved_twice)
    found = measured(run, tmp_path / "o.safetensors", **AVERAGES[average]).outliers
    assert [(one.step, one.kind, one.group) for one in found] == [((k + 1) * 100, DUPLICATE, "")]


def test_a_duplicate_is_told_from_zeros_too(tmp_path: Path) -> None:
    """The rule is the same where the average starts from zeros."""
    run = with_one(tmp_path / "run", 5, saved_twice)
    for zeros in ({"init": "zeros"}, {"zero_debias": True}):
        out = tmp_path / f"{next(iter(zeros))}.safetensors"
        found = measured(run, out, decay=0.9, **zeros).outliers
        assert [(one.step, one.kind) for one in found] == [(600, DUPLICATE)]


def test_two_outliers_and_a_duplicate_are_all_found(tmp_path: Path) -> None:
    """Each is held against those that are none."""
    run = with_one(tmp_path / "run", 6, spike)
    for k, change in ((7, spike), (14, saved_twice)):
        write_checkpoint(run / DIGITS[k].name, {**MODELS[k], **change(k)})
    found = measured(run, tmp_path / "o.safetensors", decay=0.9).outliers
    assert [(one.step, one.kind) for one in found] == [(700, FAR), (800, FAR), (1500, DUPLICATE)]


REAL = [
    "digits/run",
    "digits/bf16",
    "tensorflow/graph",
    "tensorflow/partitioned",
    "tensorflow/keras/compiled",
    "torch/run",
    "torch/legacy",
    "torch/hf",
    "torch/lightning",
    "keras/weights",
    "keras/archive",
    "keras/legacy",
    "npz/run",
]
MORE: dict[str, dict[str, Any]] = {
    "0.5": {"decay": 0.5},
    "0.99": {"decay": 0.99},
    "zeros": {"decay": 0.9, "init": "zeros"},
    "debiased": {"decay": 0.9, "zero_debias": True},
}


@pytest.mark.parametrize("name", REAL)
def test_a_run_as_it_was_has_no_outlier(name: str, tmp_path: Path) -> None:
    """Real trainings, warm-up and all: not one false alarm, whatever the average."""
    told = {}
    for label, given in (AVERAGES | MORE).items():
        out = tmp_path / f"{label.replace(' ', '-')}.safetensors"
        result = measured(FIXTURES / name, out, names="variable", **given)
        told[label] = result.outliers
        assert len(result.distances) == 1
    assert told == dict.fromkeys(told, ())


def course(kind: str, n: int = 30) -> Distances:
    """Return the distances of a made-up training from an average with decay 0.9."""
    rng = np.random.default_rng(n)
    rates = {
        "constant": lambda k: 1.0,
        "warm-up": lambda k: min(1.0, (k + 1) / 8),
        "cosine": lambda k: 0.5 * (1 + np.cos(np.pi * k / n)),
        "exponential": lambda k: 0.8**k,
        "vanishing": lambda k: 0.5**k,
        "drop": lambda k: 1.0 if k < n // 2 else 0.1,
        "rise": lambda k: 0.1 if k < n // 2 else 1.0,
    }
    drift = rng.normal(size=(4, 2000))
    value = 3 * rng.normal(size=(4, 2000))
    shadow, gaps = value.copy(), []
    for k in range(n):
        value = value + rates[kind](k) * 0.3 * (drift + rng.normal(size=drift.shape))
        if k:
            gaps.append(np.linalg.norm(shadow - value, axis=1))
            shadow = shadow - (shadow - value) * 0.1
        else:
            shadow = value.copy()
    norms = tuple(float(norm) for norm in np.linalg.norm(shadow, axis=1))
    rows = tuple((None, *(float(gap[g]) for gap in gaps)) for g in range(4))
    return Distances("a", tuple(range(100, 100 * n + 1, 100)), tuple("abcd"), norms, rows)


COEFFICIENTS = [1.0] + [0.1] * 29


@pytest.mark.parametrize(
    "kind", ["constant", "warm-up", "cosine", "exponential", "vanishing", "drop", "rise"]
)
def test_a_trend_is_no_outlier(kind: str) -> None:
    """Nor is a training that hardly moves any more a series of duplicates."""
    assert outliers.find(course(kind), COEFFICIENTS) == []


def changed(distances: Distances, k: int, factors: dict[int, float]) -> Distances:
    """Return distances with those of checkpoint `k` multiplied, by group."""
    rows = [list(row) for row in distances.gaps]
    for group, factor in factors.items():
        rows[group][k] = (rows[group][k] or 0.0) * factor
    return Distances(
        "a", distances.steps, distances.groups, distances.norms, tuple(map(tuple, rows))
    )


def test_one_group_alone_is_held_to_a_stricter_factor() -> None:
    """Seven times as far in one of four groups is none, twelve times is, and is named."""
    steady = course("constant")
    assert outliers.find(changed(steady, 12, {2: 3.0}), COEFFICIENTS) == []
    small = changed(steady, 12, {2: 0.01})
    rows = tuple(
        tuple(gap and gap * (0.05 if g == 2 else 1) for gap in row)
        for g, row in enumerate(small.gaps)
    )
    quiet = Distances("a", small.steps, small.groups, small.norms, rows)
    assert outliers.find(changed(quiet, 12, {2: 700.0}), COEFFICIENTS) == []
    [found] = outliers.find(changed(quiet, 12, {2: 1200.0}), COEFFICIENTS)
    assert (found.checkpoint, found.kind, found.group, found.everywhere) == (12, FAR, "c", False)
    assert found.ratio > outliers.ALONE


def test_a_long_way_between_checkpoints_is_no_outlier() -> None:
    """What lies ten times as many steps on may lie farther."""
    steady = course("constant")
    far = changed(steady, 12, dict.fromkeys(range(4), 6.0))
    assert [one.checkpoint for one in outliers.find(far, COEFFICIENTS)] == [12]
    steps = tuple(step + (900 if k >= 12 else 0) for k, step in enumerate(range(100, 3001, 100)))
    apart = Distances("a", steps, far.groups, far.norms, far.gaps)
    assert outliers.find(apart, COEFFICIENTS) == []


def test_few_checkpoints_are_not_judged() -> None:
    """Below five distances nothing is far; what is equal is equal even so."""
    gaps = ((None, 1.0, 1.0, 50.0, 1.0),)
    few = Distances("a", (1, 2, 3, 4, 5), ("x",), (10.0,), gaps)
    assert outliers.find(few, [1.0, 0.1, 0.1, 0.1, 0.1]) == []
    twice = Distances("a", (1, 2), ("x", "y"), (1.0, 1.0), ((None, 0.0), (None, 0.0)))
    [found] = outliers.find(twice, [1.0, 0.5])
    assert (found.checkpoint, found.kind, found.ratio) == (1, DUPLICATE, 0.0)


def test_distances_that_are_not_known_judge_nothing() -> None:
    """Overflows and skipped checkpoints are passed by."""
    nothing = Distances("a", (1, 2, 3), ("x",), (float("nan"),), ((None, None, None),))
    assert outliers.find(nothing, [1.0, 0.1, 0.1]) == []
    assert outliers.find(Distances("a", (), (), (), ()), []) == []
    steady = course("constant")
    rows = tuple(tuple(None if k == 7 else gap for k, gap in enumerate(r)) for r in steady.gaps)
    holes = Distances("a", steady.steps, steady.groups, steady.norms, rows)
    assert outliers.find(holes, COEFFICIENTS) == []


# ---------------------------------------------------------------------------- told


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Paste a command into a shell."""
    start = f"{shlex.quote(sys.executable)} -m ema_cli"
    text = line.replace("ema-avg", start, 1)
    return subprocess.run(
        ["/bin/sh", "-c", text], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("k", "kept", "words"),
    [
        (19, 20, ["--steps", ":1900"]),
        (8, 20, []),
        (3, 9, []),
    ],
    ids=["at the end", "patterns", "by name"],
)
@pytest.mark.parametrize("folder", ["run", "my run's"])
def test_the_hint_leaves_it_out_when_pasted(
    k: int, kept: int, words: list[str], folder: str, tmp_path: Path
) -> None:
    """The command replaces the output by the average of all the others, and warns no more."""
    run = with_one(tmp_path / folder, k, spike if k < 19 else saved_twice)
    for path in sorted(run.iterdir())[kept:]:
        path.unlink()
    (run / "notes.txt").write_text("nothing to average")
    out = tmp_path / "o.safetensors"
    told = cmd("run", run, "-o", out, "--decay", "0.9", "--stats", "--json").out.splitlines()
    [warning] = [doc for doc in map(json.loads, told) if doc["type"] == "warning"]
    assert all(word in warning["hint"] for word in words)
    assert len(warning["hint"]) < 1500
    done = shell(warning["hint"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[outlier]" not in done.stderr
    others = [path for path in sorted(run.glob("*.safetensors")) if path.name != DIGITS[k].name]
    ema_cli.average_run([str(path) for path in others], tmp_path / "p.safetensors", decay=0.9)
    assert out.read_bytes() == (tmp_path / "p.safetensors").read_bytes()


@pytest.mark.parametrize("dropped", [[5], [6, 13], [0, 15], [0, 1], [2, 7, 8, 9]])
def test_the_command_works_for_prefixes_and_several(dropped: list[int], tmp_path: Path) -> None:
    """TensorFlow checkpoints are named by their index files where a pattern has to tell them."""
    run = FIXTURES / "tensorflow" / "graph"
    plan = ema_cli.plan_run(run, tmp_path / "o.safetensors", decay=0.9)
    done = shell(omitting.without(plan, dropped), tmp_path)
    assert done.returncode == 0, done.stderr
    kept = [str(c.path) for k, c in enumerate(plan.run.checkpoints) if k not in dropped]
    assert f"of {len(kept)} checkpoints" in done.stderr
    ema_cli.average_run(kept, tmp_path / "p.safetensors", decay=0.9)
    expected = (tmp_path / "p.safetensors").read_bytes()
    assert (tmp_path / "o.safetensors").read_bytes() == expected


def test_what_was_chosen_stays_chosen(tmp_path: Path) -> None:
    """--last and --steps of the run are taken into account, and nothing is left of all."""
    run, out = FIXTURES / "digits" / "run", tmp_path / "o.safetensors"
    last = ema_cli.plan_run(run, out, decay=0.9, last=4)
    assert "--steps 1700:1900 " in omitting.without(last, [3])
    steps = ema_cli.plan_run(run, out, decay=0.9, steps="400:1200:200")
    assert "--steps 600:1200:200 " in omitting.without(steps, [0])
    named = omitting.without(steps, [2])
    assert "--steps" not in named
    assert named.count(".safetensors") == 5
    assert omitting.without(last, range(4)) == ""


def test_a_warning_has_its_code_everywhere(tmp_path: Path) -> None:
    """On stderr, as a JSON document, in the result and in the function's."""
    run = with_one(tmp_path / "run", 6, spike)
    out = tmp_path / "o.safetensors"
    told = cmd("run", run, "-o", out, "--decay", "0.9", "--outliers", "warn", "--json")
    assert "[outlier]" in told.err
    documents = [json.loads(line) for line in told.out.splitlines()]
    [one] = documents[-1]["outliers"]
    assert (one["step"], one["kind"]) == (700, "far")
    assert set(one) == {"average", "step", "path", "group", "ratio", "kind"}
    result = measured(run, tmp_path / "p.safetensors", decay=0.9)
    assert [warning.code for warning in result.warnings] == ["outlier"]
    assert result.outliers[0].ratio == one["ratio"]
    again = cmd("run", run, "-o", out, "--decay", "0.9", "--stats")
    assert "[outlier]" in again.err
    assert "unchanged" in again.out


def test_an_error_publishes_nothing(tmp_path: Path) -> None:
    """Neither the output nor anything temporary is left, and the hint is for the first time."""
    run = with_one(tmp_path / "run", 6, spike)
    out = tmp_path / "o.safetensors"
    words = ("run", run, "-o", out, "--decay", "0.9")
    for more in (("--outliers", "error"), ("--stats", "--strict")):
        told = cmd(*words, *more, code=13)
        assert "step 700 is" in told.err
        assert "most of all in group" in told.err
        assert "--overwrite" not in told.err
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
    with pytest.raises(errors.Outlier, match="step 700"):
        ema_cli.average_run(run, out, decay=0.9, outliers="error")
    cmd(*words)
    cmd(*words, "--stats", "--overwrite")
    before = out.read_bytes()
    assert "step 700 is" in cmd(*words, "--outliers", "error", code=13).err
    assert out.read_bytes() == before


def test_an_error_comes_as_one_json_document(tmp_path: Path) -> None:
    """It is a disagreement of its own class."""
    run = with_one(tmp_path / "run", 19, saved_twice)
    words = ("-o", tmp_path / "o.safetensors", "--decay", "0.9", "--outliers", "error", "--json")
    last = json.loads(cmd("run", run, *words, code=13).out.splitlines()[-1])
    assert (last["type"], last["error"], last["code"]) == ("error", "Outlier", 13)
    assert issubclass(errors.Outlier, errors.Disagreement)


def test_an_unknown_word_is_a_usage_error(tmp_path: Path) -> None:
    """In the function as on the command line."""
    with pytest.raises(errors.UsageError, match="outliers: expected warn or error"):
        ema_cli.average_run(FIXTURES / "digits" / "run", tmp_path / "o", outliers="ignore")
    cmd("run", FIXTURES / "digits" / "run", "-o", tmp_path / "o", "--outliers", "ignore", code=2)


def test_what_is_refused_is_not_passed_where_nothing_was_measured(tmp_path: Path) -> None:
    """An output that is there already without distances cannot be judged: it is an error."""
    run, out = with_one(tmp_path / "run", 9, spike), tmp_path / "out.safetensors"
    cmd("run", run, "-o", out)
    told = cmd("run", run, "-o", out, "--outliers", "error", code=14).err
    assert "holds no distances" in told
    assert "--overwrite" in told
    assert "no distances" in cmd("run", run, "-o", out, "--stats").err
    cmd("run", run, "-o", out, "--outliers", "error", "--overwrite", code=13)
    cmd("run", run, "-o", out, "--stats", "--overwrite")
    assert "is" in cmd("run", run, "-o", out, "--outliers", "error", code=13).err
