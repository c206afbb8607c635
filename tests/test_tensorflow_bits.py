"""Real runs that TensorFlow averaged while it trained them: the same bits, the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import bits_equal, cmd
from tensorflow_bundles import read_bundle

from ema_cli import ExponentialMovingAverage

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "tensorflow"
GRAPH, PARTITIONED = FIXTURES / "graph", FIXTURES / "partitioned"


def written(run: Path, out: Path, *words: str) -> dict[str, Any]:
    """What a run writes, read back by hand."""
    cmd("run", run, "-o", out, *words)
    return read_bundle(out)


# ---------------------------------------------------------------------------- TensorFlow's bits

HEAD = "head.v2-final>10/kernel"
AS_TENSORFLOW = ["--shadow-dtype", "same", "--statistics", "copy"]
RUNS = {
    "decay": (GRAPH / "digits.ckpt", "ExponentialMovingAverage", ["--decay", "0.9"], 300),
    "ramp": (
        GRAPH / "digits.ckpt",
        "ramp",
        ["--decay", "0.95", "--num-updates", "step", "--name", "ramp"],
        300,
    ),
    "partitioned": (
        PARTITIONED / "model.ckpt",
        "ExponentialMovingAverage",
        ["--decay", "0.9"],
        60,
    ),
}


def saved_shadows(prefix: str, name: str) -> dict[str, np.ndarray]:
    """The averages that TensorFlow computed during the training and saved."""
    saved = read_bundle(prefix)
    return {key: value for key, value in saved.items() if key.endswith(f"/{name}")}


@pytest.mark.parametrize("names", ["shadow", "variable"])
@pytest.mark.parametrize("steps", [20, 60, 300])
@pytest.mark.parametrize("case", RUNS)
def test_averages_are_those_that_tensorflow_computed(
    tmp_path: Path, case: str, steps: int, names: str
) -> None:
    """Every bit of every shadow, after any number of updates, sliced or not, in half types too."""
    base, name, words, last = RUNS[case]
    steps = min(steps, last)
    options = [*words, *AS_TENSORFLOW, "--steps", f"0:{steps}", "--names", names]
    found = written(base.parent, tmp_path / "out", *options)
    expected = saved_shadows(f"{base}-{steps}", name)
    assert len(expected) in (4, 5)
    for shadow, value in expected.items():
        assert bits_equal(found[shadow], value), shadow
        if names == "variable":
            assert bits_equal(found[shadow.removesuffix(f"/{name}")], value), shadow


@pytest.mark.parametrize("case", RUNS)
def test_the_class_computes_the_same(case: str) -> None:
    """Applied to one checkpoint after the other."""
    base, name, words, last = RUNS[case]
    decay = float(words[1])
    ema = ExponentialMovingAverage(decay, "step" if "ramp" in words else None, name=name)
    for step in range(0, last + 1, 20):
        ema.apply(f"{base}-{step}")
        for shadow, value in saved_shadows(f"{base}-{step}", name).items():
            variable = shadow.removesuffix(f"/{name}")
            assert bits_equal(np.asarray(ema.average(variable)), value), (step, shadow)


@pytest.mark.parametrize("name", ["ExponentialMovingAverage", "fresh"])
def test_every_trainable_variable_has_a_shadow(tmp_path: Path, name: str) -> None:
    """One that is not averaged has its last value there, unless the training left its shadow."""
    words = ["--exclude", "conv/*", "--name", name]
    found = written(GRAPH, tmp_path / "out", *words)
    last = read_bundle(GRAPH / "digits.ckpt-300")
    for variable in ("conv/kernel", "conv/batch_norm/gamma", "conv/batch_norm/beta"):
        assert bits_equal(found[variable], last[variable])
        expected = last.get(f"{variable}/{name}", last[variable])
        assert bits_equal(found[f"{variable}/{name}"], expected)
    assert not bits_equal(found[f"{HEAD}/{name}"], last[HEAD])
    words = ["--for", str(GRAPH / "evaluation.meta"), "--name", name]
    assert cmd("map", tmp_path / "out", *words).code == 0


def test_a_keras_checkpoint_keeps_its_structure(tmp_path: Path) -> None:
    """An object graph names variables only: everything is where it was, the average in place."""
    keras = FIXTURES / "keras" / "compiled"
    found = written(keras, tmp_path / "out", "--average", "mean")
    run = [read_bundle(keras / f"ckpt-{k}") for k in (1, 2, 3, 4)]
    assert found.keys() == run[-1].keys()
    roles = json.loads((FIXTURES / "golden.json").read_bytes())["roles"]["keras/compiled/ckpt-4"]
    for key, role in roles.items():
        if role in ("trainable", "statistics"):
            shadow = run[0][key]
            for k, one in enumerate(run[1:], start=2):
                shadow = np.asarray(shadow - (shadow - one[key]) * np.float32(1 / k))
            assert bits_equal(found[key], shadow), key
        elif isinstance(found[key], list):
            assert found[key] == run[-1][key]
        else:
            assert bits_equal(found[key], run[-1][key]), key


# ---------------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    "path",
    [
        "graph/digits.ckpt-300",
        "partitioned/model.ckpt-60",
        "keras/compiled/ckpt-4",
        "keras/uncompiled/digits.ckpt-1",
    ],
)
def test_one_checkpoint_of_tensorflow_comes_back_byte_for_byte(tmp_path: Path, path: str) -> None:
    """Its own index, its own shards; only shadows of the average's name become the average."""
    words = ["--names", "variable", "--name", "none"]
    cmd("run", FIXTURES / path, "-o", tmp_path / "out", "--average", "mean", *words)
    sources = sorted((FIXTURES / path).parent.glob(f"{(FIXTURES / path).name}.[id]*"))
    assert len(sources) > 1
    for source in sources:
        suffix = source.name.removeprefix((FIXTURES / path).name)
        assert Path(f"{tmp_path}/out{suffix}").read_bytes() == source.read_bytes(), suffix


def test_a_savedmodels_variables_come_back(tmp_path: Path) -> None:
    """Under any prefix."""
    model = FIXTURES / "keras" / "savedmodel"
    cmd("run", model, "-o", tmp_path / "out", "--average", "mean")
    source = model / "variables" / "variables"
    assert Path(f"{tmp_path}/out.index").read_bytes() == Path(f"{source}.index").read_bytes()
