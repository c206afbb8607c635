"""How much checkpoints differ: relative change by decade, and the tensors that changed most."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cmd, raw_safetensors, write_checkpoint
from terminal import COLOR, held

import ema_cli
from ema_cli import comparison
from ema_cli.comparison import Comparison

NAN, INF = math.nan, math.inf


def compared(folder: Path, a: dict[str, Any], b: dict[str, Any], **how: float) -> Comparison:
    """Compare two checkpoints that hold these."""
    paths = [write_checkpoint(folder / n, values) for n, values in (("a", a), ("b", b))]
    return ema_cli.diff(*paths, **how)


def counts(found: Comparison) -> dict[float | None, int]:
    """Return the bins that are not empty."""
    return {one.below: one.count for one in found.histogram if one.count}


def test_every_element_is_counted_once_in_its_decade(tmp_path: Path) -> None:
    """Bounds belong to the bin above; zero stands for equal."""
    b = np.ones(11)
    a = b + np.float64([0, 1e-7, 5e-6, 5e-5, 5e-4, 5e-3, 0.05, 0.5, 1, 7, -3])
    found = compared(tmp_path, {"v": a}, {"v": b})
    assert [one.below for one in found.histogram] == [0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, None]
    assert [one.count for one in found.histogram] == [1, 1, 1, 1, 1, 1, 1, 1, 3]
    assert found.tensors[0].counts == tuple(one.count for one in found.histogram)


@pytest.mark.parametrize(
    ("a", "b", "below"),
    [
        (NAN, NAN, 0),
        (INF, INF, 0),
        (0.0, -0.0, 0),
        (NAN, 1.0, None),
        (1.0, NAN, None),
        (INF, 1.0, None),
        (1.0, INF, None),
        (INF, -INF, None),
        (1.0, 0.0, None),
        (0.0, 1.0, None),
    ],
)
def test_what_is_not_finite_is_counted_too(
    tmp_path: Path, a: float, b: float, below: float | None
) -> None:
    """Equal is equal; a change from or to it, or from zero, is beyond every bound."""
    assert counts(compared(tmp_path, {"v": np.float64([a])}, {"v": np.float64([b])})) == {below: 1}


@pytest.mark.parametrize(
    ("a", "b", "norm"),
    [
        ([1, 2], [1, 2], 0.0),
        ([4, 4], [1, 0], 5.0),
        ([0, 0], [3, 4], 1.0),
        ([1, 0], [0, 0], INF),
        ([NAN, 1], [NAN, 2], 0.5),
        ([INF, 1], [INF, 2], 0.5),
        ([NAN, 1], [1, 1], NAN),
        ([INF, 1], [1, 1], INF),
        ([3e200, 0], [1e200, 0], 2.0),
        ([3e-200, 0], [1e-200, 0], 2.0),
    ],
)
def test_the_relative_norm(tmp_path: Path, a: list[float], b: list[float], norm: float) -> None:
    """That of the difference over that of B, without overflow; equal NaNs are no difference."""
    found = compared(tmp_path, {"v": np.float64(a)}, {"v": np.float64(b)})
    assert found.tensors[0].rel_norm == pytest.approx(norm, rel=1e-12, nan_ok=True)
    assert [d.rel_norm for d in found.differences] == pytest.approx(
        [norm] if found else [], rel=1e-12, nan_ok=True
    )


def test_blocks_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers however small the blocks, some of which are equal in both."""
    rng = np.random.default_rng(7)
    b = rng.normal(size=1000)
    a = np.where(np.arange(1000) < 300, b, b * (1 + 10.0 ** rng.uniform(-8, 1, 1000)))
    whole = compared(tmp_path, {"v": a}, {"v": b})
    monkeypatch.setattr(comparison, "_BLOCK_ELEMENTS", 37)
    parts = compared(tmp_path, {"v": a}, {"v": b})
    assert parts.histogram == whole.histogram
    assert sum(one.count for one in parts.histogram) == 1000
    exact = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    for found in (whole, parts):
        assert found.tensors[0].rel_norm == pytest.approx(exact, rel=1e-12)


def test_what_cannot_be_compared_is_not_counted(tmp_path: Path) -> None:
    """Tensors of one side, other shapes and dtypes, and packed numbers; the rest is."""
    one = np.float32([1, 2])
    a = {"gone": one, "shape": one, "dtype": one, "same": one}
    b = {"shape": one[None], "dtype": one.astype(np.float64), "same": one, "new": one}
    found = compared(tmp_path, a, b)
    assert [change.tensor for change in found.tensors] == ["same"]
    assert counts(found) == {0: 2}
    assert [c.tensor for c in compared(tmp_path, a, b, rtol=1e-9).tensors] == ["dtype", "same"]
    entry = {"v": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    paths = [tmp_path / name for name in "cd"]
    for path, data in zip(paths, (b"\x12\x34", b"\x12\x35"), strict=True):
        path.write_bytes(raw_safetensors(entry, data))
    packed = ema_cli.diff(*paths)
    assert packed and packed.tensors == () and counts(packed) == {}


def test_a_tolerance_does_not_change_how_much_changed(tmp_path: Path) -> None:
    """The histogram tells of all elements, the differences of those beyond the tolerance."""
    a, b = {"v": np.float64([1.001, 2])}, {"v": np.float64([1, 2])}
    exact, tolerant = compared(tmp_path, a, b), compared(tmp_path, a, b, rtol=0.1)
    assert exact and not tolerant
    assert exact.histogram == tolerant.histogram
    assert exact.tensors == tolerant.tensors


def test_the_most_changed_come_first(tmp_path: Path) -> None:
    """What is no number before all others; what did not change is none of them."""
    b = {name: np.float64([1, 1]) for name in "abcdef"}
    a = {"a": b["a"], "b": b["b"] * 1.1, "c": b["c"] * 3, "d": b["d"] * 1.5}
    a |= {"e": np.float64([NAN, 1]), "f": b["f"]}
    found = compared(tmp_path, a, b)
    assert [change.tensor for change in found.most_changed()] == ["e", "c", "d", "b"]
    assert [change.tensor for change in found.most_changed(2)] == ["e", "c"]


def test_json_has_the_histogram(tmp_path: Path) -> None:
    """Bounds as numbers, the last one null; the relative norm with each difference."""
    compared(tmp_path, {"v": np.float32([1, 3])}, {"v": np.float32([1, 1])})
    told = json.loads(cmd("diff", tmp_path / "a", tmp_path / "b", "--json", code=13).out)
    assert told["histogram"][0] == {"below": 0, "count": 1}
    assert told["histogram"][1] == {"below": 1e-6, "count": 0}
    assert told["histogram"][-1] == {"below": None, "count": 1}
    assert told["differences"][0]["rel_norm"] == pytest.approx(math.sqrt(2))


def test_a_terminal_is_shown_what_changed_most(tmp_path: Path) -> None:
    """Ten tensors and the histogram; -v shows all of them, a pipe too and no drawing."""
    b = {f"t{k:02}": np.ones(3) for k in range(15)}
    a = {name: values * (1 + 10.0 ** (k - 15)) for k, (name, values) in enumerate(b.items())}
    a["[red]:x:\x1b[31m" + "n" * 90] = np.ones(1)
    compared(tmp_path, a, b)
    words = ["diff", tmp_path / "a", tmp_path / "b"]
    for more, shown in (([], 10), (["-v"], 15)):
        with held(tmp_path, [*words, *more], columns=80, both=True) as looked_at:
            code, _, told = looked_at.ended()
        assert code == 13
        assert len(re.findall(r"^t\d\d ", COLOR.sub("", told), re.MULTILINE)) == shown
        assert "relative change of 45 elements" in told and "█" in told
        assert "[red]:x" in told and "\x1b[31m" not in told
        assert ("the 10 of 15 tensors that changed most" in told) is (shown == 10)
    piped = cmd(*words, code=13).out
    assert len(piped.splitlines()) == 17 and "relative change" not in piped


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_nothing_is_wider_than_the_terminal(tmp_path: Path, columns: int) -> None:
    """Names are folded; where little fits, the numbers that the bars show are kept."""
    name = "model.layers.0.self_attn.q_proj.weight"
    compared(tmp_path, {name: np.float32([1, 2])}, {name: np.float32([1, 3])})
    words = ["diff", tmp_path / "a", tmp_path / "b", "--no-color"]
    with held(tmp_path, words, columns=columns, both=True) as looked_at:
        _, _, told = looked_at.ended()
    assert max(len(line) for line in told.splitlines()) <= columns
    assert "0.316" in told
    assert ("max abs" in told) is (columns >= 80)
