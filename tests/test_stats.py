"""``run --stats``: distances of checkpoints from the averages, held against float64 arithmetic."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BF16, cmd, read_checkpoint, write_checkpoint, write_run

import ema_cli
from ema_cli import distances as measures
from ema_cli import engine, formats, kernel, reading
from ema_cli.distances import Distances
from ema_cli.errors import UsageError
from ema_cli.grouping import grouped
from ema_cli.measuring import Measured
from ema_cli.progress import Log
from ema_cli.running import RunResult
from ema_cli.tasks import Done, Sum

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
DIGITS = FIXTURES / "digits" / "run"
Values = Mapping[str, Any]


def exact(
    values: Sequence[Values], coefficients: Sequence[float], divisor: float = 1.0
) -> tuple[list[list[float | None]], list[float], list[str]]:
    """Return the gaps and norms by group in float64, for float32 coefficients, and the groups."""
    groups = grouped(list(values[0]))
    names = list(dict.fromkeys(groups.values()))
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
    names = [tensor.name for tensor in result.plan.outcomes[0].selection.averaged]
    found = []
    for checkpoint in result.plan.run.checkpoints:
        found.append({name: whole(checkpoint, name) for name in names})
    return found


def whole(checkpoint: Any, name: str) -> Any:
    """Return all elements of a tensor, flat."""
    with reading.Reader(checkpoint) as reader:
        return np.concatenate([np.array(block) for block in reader.blocks(name)])


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
