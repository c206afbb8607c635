"""``run --stats``: distances of checkpoints from the averages, held against float64 arithmetic."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BF16, cmd, write_run

import ema_cli
from ema_cli import distances as measures
from ema_cli import engine, kernel, reading
from ema_cli.distances import Distances
from ema_cli.grouping import grouped
from ema_cli.measuring import Measured
from ema_cli.progress import Log
from ema_cli.running import RunResult
from ema_cli.states import sealed
from ema_cli.tasks import Done, Sum

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
DIGITS = FIXTURES / "digits" / "run"
Values = Mapping[str, Any]


def exact(
    values: Sequence[Values],
    coefficients: Sequence[float],
    divisor: float = 1.0,
    groups: Mapping[str, str] | None = None,
) -> tuple[list[list[float | None]], list[float], list[str]]:
    """Return the gaps and norms by group in float64, for float32 coefficients, and the groups."""
    groups = groups or grouped(list(values[0]))
    names = list(dict.fromkeys(groups[name] for name in values[0]))
    shadow = {name: np.zeros(np.shape(value)) for name, value in values[0].items()}
    gaps: list[list[float | None]] = [[] for _ in names]
    for value, c in zip(values, coefficients, strict=True):
        sums = dict.fromkeys(names, 0.0)
        for name, array in value.items():
            wide = np.asarray(array).astype(np.float64)
            sums[groups[name]] += float(((shadow[name] - wide) ** 2).sum())
            c32 = float(np.float32(c))
            shadow[name] = wide if c32 == 1 else shadow[name] - (shadow[name] - wide) * c32
        for row, group in zip(gaps, names, strict=True):
            row.append(math.sqrt(sums[group]) if 0 < c < 1 else None)
    norms = dict.fromkeys(names, 0.0)
    for name, array in shadow.items():
        norms[groups[name]] += float(((array / divisor) ** 2).sum())
    return gaps, [math.sqrt(norms[group]) for group in names], names


def check(found: Distances, expected: tuple[Any, Any, Any], rel: float = 2e-6) -> None:
    """Compare what was measured with float64."""
    gaps, norms, names = expected
    assert set(found.groups) == set(names)
    for group, row, norm in zip(names, gaps, norms, strict=True):
        mine = found.groups.index(group)
        assert [gap is None for gap in found.gaps[mine]] == [gap is None for gap in row]
        known = [gap for gap in found.gaps[mine] if gap is not None]
        assert known == pytest.approx([gap for gap in row if gap is not None], rel=rel, abs=1e-6)
        assert found.norms[mine] == pytest.approx(norm, rel=rel)


def measure(run: Any, out: Path, **given: Any) -> RunResult:
    """Carry out a run that measures."""
    result = ema_cli.average_run(run, out, stats=True, **given)
    assert isinstance(result, RunResult)
    assert all(written.status == "written" for written in result.outputs)
    return result


def coefficients_of(result: RunResult, average: int = 0) -> Sequence[float]:
    """Return the coefficients of an average of a result."""
    return result.plan.schedules[result.plan.outcomes[average].schedule].coefficients


def averaged(result: RunResult) -> list[dict[str, Any]]:
    """Return what a run averages of each checkpoint, read by the package's own reader."""
    found = []
    for checkpoint in result.plan.run.checkpoints:
        values = reading.Values(checkpoint.path)
        model = {}
        for tensor in result.plan.outcomes[0].selection.averaged:
            with values.open(tensor.name) as reader:
                model[tensor.name] = np.array(reader.block(0, tensor.elements))
        found.append(model)
    return found


def made(rng: np.random.Generator, dtype: Any = np.float32, n: int = 5) -> list[dict[str, Any]]:
    """Return a run with several modules, one larger than a block."""
    shapes = {"a.weight": (300, 1000), "a.bias": (7,), "b.weight": (4097,), "c": ()}
    start = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return [
        {
            name: np.asarray(value + 0.1 * k * rng.normal(size=value.shape)).astype(dtype)
            for name, value in start.items()
        }
        for k in range(n)
    ]


# ---------------------------------------------------------------------------- right


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ({"average": ["ema:0.9"]}, np.float32),
        ({"average": ["mean"]}, np.float64),
        ({"average": ["power:0.1"]}, BF16),
        ({"average": ["lr:1-sqrt"]}, np.float16),
        ({"decay": 0.9, "init": "zeros"}, np.float32),
        ({"average": ["mean@200:400"]}, np.float32),
    ],
    ids=str,
)
def test_distances_are_those_of_float64(given: dict[str, Any], dtype: Any, tmp_path: Path) -> None:
    """Gaps and norms by group, for every family and dtype, also outside of a window."""
    values = made(np.random.default_rng(1), dtype)
    result = measure(write_run(tmp_path / "run", values), tmp_path / "o.safetensors", **given)
    [found] = result.distances
    assert found.steps == (100, 200, 300, 400, 500)
    check(found, exact(values, coefficients_of(result)))


def test_several_averages_are_measured_in_one_pass(tmp_path: Path) -> None:
    """Each has its own distances, one that is debiased its own norm; equal ones share theirs."""
    values = made(np.random.default_rng(2))
    result = measure(
        write_run(tmp_path / "run", values),
        tmp_path / "{average}.safetensors",
        average=["fast=ema:0.5", "slow=ema:0.99", "again=ema:0.5"],
        zero_debias=True,
    )
    assert [one.average for one in result.distances] == ["fast", "slow", "again"]
    for k, one in enumerate(result.distances):
        factor = result.plan.schedules[result.plan.outcomes[k].schedule].debias_factor(
            np.dtype(np.float32)
        )
        check(one, exact(values, coefficients_of(result, k), factor))
    assert result.distances[0].gaps == result.distances[2].gaps != result.distances[1].gaps


RUNS = [
    "digits/run",
    "digits/bf16",
    "tensorflow/graph",
    "tensorflow/partitioned",
    "torch/run",
    "torch/legacy",
    "keras/weights",
    "keras/archive",
    "npz/compressed",
]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("format", ["own", "safetensors"])
def test_every_format_is_measured_right(name: str, format: str, tmp_path: Path) -> None:
    """Also where tensors are cut into slices, scattered, compressed or stored once for several."""
    suffix = {"torch": ".pt", "keras": ".weights.h5", "npz": ".npz", "digits": ".safetensors"}
    own = "{step}" if "tensorflow" in name else "o" + suffix[name.partition("/")[0]]
    own = "folder" if name == "digits/bf16" else "o.keras" if name == "keras/archive" else own
    out = tmp_path / "o.safetensors" if format == "safetensors" else tmp_path / own
    result = measure(FIXTURES / name, out, average=["ema:0.7"], statistics="average")
    stored = averaged(result)
    once = [tensor for tensor in stored[0] if not is_second_name(result, tensor)]
    values = [{tensor: model[tensor] for tensor in once} for model in stored]
    groups = grouped(list(stored[0]))
    check(result.distances[0], exact(values, coefficients_of(result), groups=groups))


def is_second_name(result: RunResult, name: str) -> bool:
    """Whether the bytes of a tensor have an earlier name in every checkpoint."""
    averaged = [tensor.name for tensor in result.plan.outcomes[0].selection.averaged]
    places = [
        tuple(c.index.by_name[other][2:] for c in result.plan.run.checkpoints) for other in averaged
    ]
    return places.index(places[averaged.index(name)]) < averaged.index(name)


@pytest.mark.parametrize("like", ["torch", "keras"])
@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
def test_other_arithmetics_are_measured_too(like: str, dtype: Any, tmp_path: Path) -> None:
    """The difference is formed apart, from the shadow that this framework has."""
    values = [{**v, "c": v["b.weight"][:64]} for v in made(np.random.default_rng(3), dtype, n=4)]
    out = tmp_path / "o.safetensors"
    result = measure(write_run(tmp_path / "run", values), out, decay=0.9, like=like)
    # A half shadow is rounded after each update, which float64 does not know of.
    rel = 2e-6 if dtype is np.float32 else 0.05
    check(result.distances[0], exact(values, coefficients_of(result)), rel)


@pytest.mark.parametrize("alone", [True, False])
def test_half_shadows_are_measured_in_float32(alone: bool, tmp_path: Path) -> None:
    """A difference of half types is not rounded to one before it is squared."""
    first = np.full(9000, 1.0, np.float16)
    values = [{"w": first}, {"w": (first * np.float16(2.002)).astype(np.float16)}]
    values.append({"w": np.full(9000, 3.0, np.float16)})
    averages = ["ema:0.5"] if alone else ["ema:0.5", "ema:0.9"]
    result = measure(
        write_run(tmp_path / "run", values),
        tmp_path / "{average}.safetensors",
        average=averages,
        shadow_dtype="same",
    )
    gap = result.distances[0].gaps[0][1]
    assert gap == pytest.approx(float(values[1]["w"][0] - 1) * math.sqrt(9000), rel=1e-6)


def test_nothing_depends_on_who_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers, executors, blocks and tasks: the same digits, and the bytes of a run without."""
    run = write_run(tmp_path / "run", made(np.random.default_rng(4), n=3))
    out = tmp_path / "o.safetensors"
    ema_cli.average_run(run, out, decay=0.9)
    plain = out.read_bytes()
    found = []
    for workers in (1, 2, 4):
        found.append(measure(run, out, decay=0.9, workers=workers, overwrite=True))
        assert out.read_bytes() == plain
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        found.append(measure(run, out, decay=0.9, executor=pool, overwrite=True))
    monkeypatch.setattr(engine, "BLOCK_ELEMENTS", 1 << 14)
    monkeypatch.setattr(engine, "TASK_ELEMENTS", 1 << 17)
    found.append(measure(run, out, decay=0.9, overwrite=True))
    assert out.read_bytes() == plain
    assert len({one.distances for one in found}) == 1


# ---------------------------------------------------------------------------- edges


def test_first_skipped_and_copied_checkpoints_have_no_distance(tmp_path: Path) -> None:
    """No update, no distance: there is nothing to be held against, or it is not read."""
    values = [{"w": np.full(4, k, np.float32)} for k in range(5)]
    run = write_run(tmp_path / "run", values)
    (tmp_path / "w.txt").write_text("100 1\n200 0\n300 1\n400 0\n500 2\n")
    result = measure(run, tmp_path / "o.safetensors", average=[f"weights:{tmp_path / 'w.txt'}"])
    assert result.distances[0].gaps == ((None, None, 4.0, None, 6.0),)
    assert result.distances[0].total(1) is None
    assert result.distances[0].worst(0) is None


def test_what_is_not_finite_has_no_distance(tmp_path: Path) -> None:
    """With --non-finite allow an overflow is null in JSON, and no table breaks on it."""
    values = [{"w": np.full(4, k, np.float32), "v": np.float32(k)} for k in (1, 2, 3)]
    values[1]["w"][1] = np.inf
    run = write_run(tmp_path / "run", values)
    words = ("run", run, "-o", tmp_path / "o.safetensors", "--decay", "0.5", "--stats", "-v")
    told = cmd(*words, "--non-finite", "allow", "--json").out.splitlines()
    [found] = json.loads(told[-1])["distances"]
    w = found["groups"].index("w")
    assert found["gaps"][w] == [None, None, None]
    assert found["norms"][w] is None
    assert found["gaps"][1 - w] == [None, 1.0, 1.5]
    table = cmd(*words, "--non-finite", "allow").out.splitlines()
    assert table[2].split("\t")[:3] == ["model-step-200.safetensors", "200", "-"]


def test_distances_do_not_overflow_when_added() -> None:
    """Sums of tasks are exact in any order; infinite ones stay no distance."""
    numbers = [1e16, 1.0, -0.0, 1e-8, 3.0, 1e16]
    for order in (numbers, numbers[::-1]):
        measured = Measured()
        for number in order:
            measured.add({Sum(0, 0, 0): number})
        assert math.fsum(measured._sums[Sum(0, 0, 0)]) == math.fsum(numbers)
    measured.add({Sum(0, 0, 0): math.inf})
    measured.add({Sum(0, 0, 0): 1.0})
    assert measured._root(0, 0, 0) is None


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize("first", [0, 1, 4000, 4096])
def test_sums_of_squares_are_cut_where_the_whole_is(count: int, first: int) -> None:
    """The sum of two halves is that of the whole, to the last bits of float64."""
    values = np.random.default_rng(count).normal(size=count).astype(np.float32)
    whole = kernel.sum_of_squares(values, first)
    assert whole == pytest.approx(float((values.astype(np.float64) ** 2).sum()), rel=1e-6)
    cut = max(min(count, -first % kernel.CHUNK), 0)
    parts = kernel.sum_of_squares(values[:cut], first) + kernel.sum_of_squares(
        values[cut:], first + cut
    )
    assert parts == pytest.approx(whole, rel=1e-14)


def test_a_tensor_under_two_names_counts_once(tmp_path: Path) -> None:
    """What is stored once belongs to the group of its first name, and others have nothing."""
    given: dict[str, Any] = {"decay": 0.9, "select": [("exclude", "head.bias")]}
    result = measure(FIXTURES / "torch" / "run", tmp_path / "o.pt", **given)
    names = [tensor.name for tensor in result.plan.outcomes[0].selection.averaged]
    assert [name for name in names if is_second_name(result, name)] == ["head.weight"]
    assert set(result.distances[0].groups) == {n.rpartition(".")[0] or n for n in names} - {"head"}
    assert result.distances[0].total(1) is not None


# ---------------------------------------------------------------------------- kept


def test_a_resumed_run_knows_the_distances_of_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log of a killed run holds them; one that measured nothing is not continued by one."""
    monkeypatch.setattr("ema_cli.progress.INTERVAL", 0.001)
    monkeypatch.setattr(engine, "TASK_ELEMENTS", 1 << 16)
    run = write_run(tmp_path / "run", made(np.random.default_rng(5), n=3))
    whole = measure(run, tmp_path / "whole.safetensors", decay=0.9, workers=1)
    out = tmp_path / "o.safetensors"

    def interrupted(**given: Any) -> None:
        seen: list[int] = []

        def stop(event: Any) -> None:
            seen.append(event.read)
            if len(seen) > 3:
                time.sleep(0.05)
            if len(seen) == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ema_cli.average_run(run, out, decay=0.9, workers=1, on_event=stop, **given)

    interrupted(stats=True)
    notes: list[str] = []
    result = measure(
        run, out, decay=0.9, workers=1, on_event=lambda event: notes.append(event.note)
    )
    assert any(note.startswith("resuming") for note in notes)
    assert result.distances == whole.distances
    out.unlink()
    interrupted()
    notes.clear()
    result = measure(
        run, out, decay=0.9, workers=1, on_event=lambda event: notes.append(event.note)
    )
    assert any(note.startswith("starting over") for note in notes)
    assert result.distances == whole.distances


def test_the_log_keeps_every_bit(tmp_path: Path) -> None:
    """Sums come back from the log as they were, infinities and NaNs too."""
    path, out = str(tmp_path / "log"), tmp_path / "out"
    out.touch()
    sums = {Sum(0, -1, 2): 0.1, Sum(1, 3, 0): math.inf, Sum(0, 1, 1): 5e-324}
    log = Log(path, "key", [str(out)])
    log._pending.append((7, Done(1, 2, {}, {}, None, (), sums)))
    log._record()
    log.close()
    found = Log(path, "key", [str(out)]).resume()
    assert found[7].measured == sums


@pytest.mark.parametrize("row", [[0, 0, 0, "0x1p+9999"], [0, 0, "1"], [0, 0, 0, 1], ["a"], [], 7])
def test_a_log_with_other_sums_is_not_believed(row: Any, tmp_path: Path) -> None:
    """It may hold anything: what follows such a line is done again."""
    path, out = tmp_path / "log", tmp_path / "out"
    out.touch()
    log = Log(str(path), "key", [str(out)])
    log._pending.append((7, Done(1, 2, {}, {})))
    log._record()
    log.close()
    line = {"task": 8, "read": 1, "written": 2, "parts": [], "made": [], "cloned": []}
    with path.open("ab") as file:
        file.write(sealed.seal({**line, "measured": [row]}))
    assert list(Log(str(path), "key", [str(out)]).resume()) == [7]


def test_an_unchanged_output_tells_from_its_provenance(tmp_path: Path) -> None:
    """The distances are shown again, reading no tensor; they are no part of what makes a plan."""
    out = tmp_path / "o.safetensors"
    words = ("run", DIGITS, "-o", out, "--decay", "0.9")
    cmd(*words)
    told = cmd(*words, "--stats")
    assert told.out.startswith("unchanged")
    assert "holds no distances; --overwrite measures them" in told.err
    first = cmd(*words, "--stats", "--overwrite", "--json").out.splitlines()
    again = cmd(*words, "--stats", "--json").out.splitlines()
    one, two = json.loads(first[-1]), json.loads(again[-1])
    assert one["distances"] == two["distances"] != []
    assert (two["read_bytes"], two["outputs"][0]["status"]) == (0, "unchanged")
    assert cmd(*words).out.startswith("unchanged")
    assert cmd("verify", out).code == 0


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        {},
        {"groups": ["a"], "norms": [1.0], "gaps": []},
        {"groups": ["a"], "norms": [1.0, 2.0], "gaps": [[None, 1.0]]},
        {"groups": ["a"], "norms": [1.0], "gaps": [[None]]},
        {"groups": ["a"], "norms": [1.0], "gaps": [[None, "x"]]},
        {"groups": ["a"], "norms": [1.0], "gaps": [[None, True]]},
        {"groups": ["a"], "norms": [-1.0], "gaps": [[None, 1.0]]},
        {"groups": ["a"], "norms": [math.nan], "gaps": [[None, 1.0]]},
        {"groups": ["a"], "norms": [math.inf], "gaps": [[None, 1.0]]},
        {"groups": ["a"], "norms": [10**400], "gaps": [[None, 1.0]]},
        {"groups": [1], "norms": [1.0], "gaps": [[None, 1.0]]},
        {"groups": "a", "norms": [1.0], "gaps": [[None, 1.0]]},
        {"groups": ["a"], "norms": {"a": 1}, "gaps": [[None, 1.0]]},
    ],
    ids=repr,
)
def test_hostile_distances_are_none(bad: Any) -> None:
    """A provenance is anybody's: whatever is not what `to_json` made is not believed."""
    assert measures.from_json(bad, "a", [1, 2]) is None


def test_json_data_comes_back() -> None:
    """`from_json` is the inverse of `to_json`, through JSON."""
    one = Distances("x", (1, 2), ("a", "b"), (1.5, 0.0), ((None, 0.25), (None, 3.0)))
    assert measures.from_json(json.loads(json.dumps(one.to_json())), "x", [1, 2]) == one
    assert one.relative(0, 1) == 0.25 / 1.5
    assert one.relative(1, 1) is None
    assert one.total(1) == pytest.approx(math.hypot(0.25, 3.0) / 1.5)
    assert one.worst(1) == 0
