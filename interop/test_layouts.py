"""Checkpoints that TensorFlow reads and does not write here: other byte orders, gaps, compression.

They are written by hand, by what the project's own tests use, and TensorFlow says whether rightly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import SHADOW, Array, agreed, differences, latest, moving_average, tool
from tensorflow_bundles import ALL, Sliced, strings, write_bundle

WORDS = [b"zero", b"", b"\0\xff" * 200]


def tensors(step: int, *, big_endian: bool) -> dict[str, Any]:
    """Return what is written at a step, as the writer takes it."""
    rng = np.random.default_rng(step)
    return {
        "w/float32": rng.standard_normal((3, 5), np.float32),
        "w/float64": rng.standard_normal(7),
        "w/float16": rng.standard_normal(5).astype(np.float16),
        "w/bfloat16": rng.standard_normal(5).astype(ml_dtypes.bfloat16),
        "w/sliced": Sliced(
            rng.standard_normal((6, 4), np.float32),
            (((0, 2), ALL), ((2, 4), (0, 3)), ((2, 4), (3, 1))),
        ),
        "w/empty": np.zeros((0, 2), np.float32),
        "int": rng.integers(-9, 9, 5),
        "complex": rng.standard_normal(2) + 1j,
        "strings": strings(WORDS, big_endian=big_endian),
        "global_step": np.int64(step),
    }


def values(step: int) -> dict[str, Array]:
    """Return what must be read from it."""
    made = tensors(step, big_endian=False)
    made["w/sliced"] = made["w/sliced"].value
    return {**made, "strings": np.array(WORDS, object)}


LAYOUTS: dict[str, dict[str, Any]] = {
    "big-endian": {"big_endian": True},
    "big-endian in shards": {"big_endian": True, "shards": 3},
    "compressed index": {"compress": True},
    "gaps": {"gap": 7, "shards": 2},
}


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_other_layouts_are_averaged_as_they_are(tmp_path: Path, options: dict[str, Any]) -> None:
    """TensorFlow reads the inputs as they were meant, and the averages of both layouts."""
    steps = (1, 2, 3)
    for step in steps:
        made = tensors(step, big_endian=options.get("big_endian", False))
        prefix = write_bundle(tmp_path / "run" / f"model.ckpt-{step}", made, **options)
        assert differences(agreed(prefix), values(step)) == []
    averaged = {
        name: moving_average([values(step)[name] for step in steps], 0.9)
        for name in values(1)
        if name.startswith("w/")
    }
    words = ("--decay", "0.9", "--shadow-dtype", "same")
    tool("run", tmp_path / "run", "-o", f"{tmp_path}/same/", *words, "--names", "variable")
    assert differences(agreed(latest(tmp_path / "same")), {**values(3), **averaged}) == []
    tool("run", tmp_path / "run", "-o", f"{tmp_path}/new/", *words)
    copied = {name: value for name, value in values(3).items() if name not in averaged}
    shadows = {f"{name}/{SHADOW}": value for name, value in averaged.items()}
    assert differences(agreed(latest(tmp_path / "new")), {**copied, **shadows}) == []
    tool("rename", latest(tmp_path / "new"), "-o", tmp_path / "out", "--names", "variable")
    assert differences(agreed(tmp_path / "out"), {**values(3), **averaged}) == []
