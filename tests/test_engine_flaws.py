"""Non-finite results are traced to their source, and work in flight is bounded and cancelled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BF16, read_checkpoint, write_run

import ema_cli
from ema_cli import engine
from ema_cli.engine import bounded
from ema_cli.errors import NonFinite

SHADOW = "/ExponentialMovingAverage"


def constant(value: float, dtype: Any = np.float32, count: int = 10) -> np.ndarray:
    return np.full(count, value, dtype)


def poisoned(folder: Path, where: dict[int, tuple[str, int, float]], dtype: Any) -> Path:
    """A run of four whose checkpoints hold the given bad elements: {ordinal: (name, at, bad)}."""
    models = []
    for k in range(4):
        tensors = {name: constant(k + 1, dtype, 1000) for name in ("a", "b", "c")}
        if k in where:
            name, at, bad = where[k]
            tensors[name][at] = bad
        models.append(tensors)
    return write_run(folder / "run", models)


def leftovers(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name != "run")


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, np.float64], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("workers", [1, 2])
def test_non_finite_is_traced(tmp_path: Path, dtype: Any, bad: float, workers: int) -> None:
    """The error names the first checkpoint with the bad value and its tensor; nothing is left."""
    run = poisoned(tmp_path, {1: ("b", 999, bad), 2: ("b", 999, np.nan)}, dtype)
    with pytest.raises(NonFinite, match=r"model-step-200\.safetensors: tensor 'b'") as caught:
        ema_cli.average_run(run, tmp_path / "o.safetensors", average=["mean"], workers=workers)
    assert caught.value.exit_code == 17
    assert "--non-finite allow" in caught.value.hint
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, np.float64], ids=str)
def test_non_finite_is_allowed(tmp_path: Path, dtype: Any) -> None:
    """Allowed, NaN and infinity go through the formula; other elements do not change."""
    run = poisoned(tmp_path, {1: ("b", 3, np.nan), 2: ("c", 0, np.inf)}, dtype)
    output = tmp_path / "o.safetensors"
    ema_cli.average_run(run, output, average=["mean@100:300"], non_finite="allow")
    found = {k: v.astype(np.float64) for k, v in read_checkpoint(output).items()}
    assert np.isnan(found[f"b{SHADOW}"]).nonzero()[0].tolist() == [3]
    assert found[f"c{SHADOW}"][0] == np.inf
    assert found[f"a{SHADOW}"].tolist() == [2.0] * 1000


@pytest.mark.parametrize("workers", [1, 2])
def test_infinities_that_meet_are_silent(tmp_path: Path, workers: int) -> None:
    """Infinity minus infinity is NaN when allowed, and traced when not, without a warning."""
    run = poisoned(tmp_path, {0: ("b", 3, np.inf), 1: ("b", 3, np.inf)}, np.float32)
    output = tmp_path / "o.safetensors"
    with pytest.raises(NonFinite, match=r"model-step-100\.safetensors: tensor 'b'"):
        ema_cli.average_run(run, output, average=["mean"], workers=workers)
    options = {"workers": workers, "non_finite": "allow"}
    ema_cli.average_run(run, output, average=["mean"], **options)
    assert np.isnan(read_checkpoint(output)[f"b{SHADOW}"]).nonzero()[0].tolist() == [3]


def test_non_finite_deep_in_a_long_run_of_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad value far into the work names its own tensor, wherever blocks and tasks are cut."""
    monkeypatch.setattr(engine, "BLOCK_ELEMENTS", 64)
    monkeypatch.setattr(engine, "TASK_ELEMENTS", 700)
    run = poisoned(tmp_path, {3: ("c", 0, np.nan)}, np.float32)
    for average in (["mean"], ["x=mean@last=2", "y=ema:0.5"]):
        with pytest.raises(NonFinite, match=r"model-step-400\.safetensors: tensor 'c'"):
            ema_cli.average_run(run, tmp_path / "{average}.safetensors", average=average)
        assert leftovers(tmp_path) == []


def test_non_finite_outside_the_window_is_not_blamed(tmp_path: Path) -> None:
    """Each average is traced among its own checkpoints, though another one reads more of them."""
    run = poisoned(tmp_path, {0: ("b", 7, np.nan), 3: ("b", 7, np.nan)}, np.float32)
    averages = ["late=mean@300:", "all=mean"]
    with pytest.raises(NonFinite, match=r"model-step-400\.safetensors: tensor 'b'"):
        ema_cli.average_run(run, tmp_path / "{average}.safetensors", average=averages)


@pytest.mark.parametrize("average", ["mean@100:100", "ema:0@100:400", "mean@300:"])
def test_non_finite_that_does_not_count_passes(tmp_path: Path, average: str) -> None:
    """A bad value in a checkpoint without weight, or in a copied tensor, is no error."""
    run = poisoned(tmp_path, {1: ("b", 5, np.nan), 3: ("c", 5, np.inf)}, np.float32)
    output = tmp_path / "o.safetensors"
    ema_cli.average_run(run, output, average=[average], select=[("exclude", "c")])
    assert np.isfinite(read_checkpoint(output)[f"b{SHADOW}"]).all()


def test_overflow_of_the_output_dtype(tmp_path: Path) -> None:
    """A finite average that float16 cannot hold is exit code 17 and names tensor and dtype."""
    run = write_run(tmp_path / "run", [{"a": constant(1), "w": constant(65520.0)}] * 2)
    with pytest.raises(NonFinite, match=r"tensor 'w'.*float16") as caught:
        ema_cli.average_run(run, tmp_path / "o.safetensors", average=["mean"], dtype="float16")
    assert caught.value.exit_code == 17
    assert leftovers(tmp_path) == []
    output = tmp_path / "o.safetensors"
    ema_cli.average_run(run, output, average=["mean"], dtype="float16", non_finite="allow")
    assert np.isposinf(read_checkpoint(output)[f"w{SHADOW}"]).all()


# ---------------------------------------------------------------------------- in flight


class Counting(ThreadPoolExecutor):
    """Threads that note how many unfinished futures each submission leaves."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.futures: list[Future[Any]] = []
        self.most = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(fn, *args, **kwargs)
        self.futures.append(future)
        self.most = max(self.most, sum(not other.done() for other in self.futures))
        return future


def numbered(count: int) -> Iterator[tuple[int, Any]]:
    """Tasks that are their ordinals."""
    return ((number, number) for number in range(count))


def never(ordinal: int, result: Any) -> None:
    raise AssertionError(f"task {ordinal} was late")


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_bounded_never_exceeds_its_limit(limit: int) -> None:
    """At most `limit` tasks are unfinished at any time, and every result comes out once."""

    def slowly(number: Any) -> Any:
        time.sleep(0.001)
        return number

    with Counting(8) as pool:
        found = sorted(bounded(pool, slowly, numbered(40), limit, never))
    assert found == [(number, number) for number in range(40)]
    assert pool.most <= limit


@pytest.mark.parametrize("how", ["error", "close"])
def test_bounded_cancels_what_is_left(how: str) -> None:
    """After an error, or when the caller stops, nothing more starts and nothing is running."""
    gate = threading.Event()

    def work(number: Any) -> Any:
        if number == 1 and how == "error":
            raise ValueError("task 1")
        if number > 1:
            gate.wait(0.05)
        return number

    with Counting(1) as pool:
        results = bounded(pool, work, numbered(1000), 4, lambda number, result: None)
        if how == "error":
            with pytest.raises(ValueError, match="task 1"):
                list(results)
        else:
            next(results)
            results.close()  # type: ignore[attr-defined]
        assert all(future.done() for future in pool.futures)
        assert any(future.cancelled() for future in pool.futures)
        assert len(pool.futures) < 10


def test_what_was_running_when_it_ended_is_told(tmp_path: Path) -> None:
    """Tasks that were begun are waited for, and what they did is not lost; others are not begun."""
    gate = threading.Event()

    def work(number: Any) -> Any:
        if number:
            gate.wait(60)
        return 10 * number

    told: dict[int, int] = {}
    with Counting(2) as pool:
        results = bounded(pool, work, numbered(100), 8, told.__setitem__)
        assert next(results) == (0, 0)
        threading.Timer(0.05, gate.set).start()
        results.close()  # type: ignore[attr-defined]
        ran = {n for n, future in enumerate(pool.futures) if not future.cancelled()} - {0}
    assert told == {number: 10 * number for number in ran}
    assert 1 in told
