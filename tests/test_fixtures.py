"""The committed training run: its bytes, what averaging it is worth, and its exact averages."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from exact import tensorflow_coefficient
from helpers import bits_equal, dtype_of, read_checkpoint

import ema_cli
from ema_cli import ExponentialMovingAverage

Array = np.ndarray[Any, Any]
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
DIGITS = FIXTURES / "digits"
SUFFIX = "/ExponentialMovingAverage"
STEPS = range(100, 2001, 100)
# Told apart by name, as the run was made: neither statistics nor slots nor counters.
NO_VARIABLES = ("mean", "variance", "var", "Momentum", "global_step", "num_batches_tracked")


def paths(run: Path) -> list[Path]:
    """The checkpoints of a run in the order of their steps."""
    return sorted(run.iterdir(), key=lambda path: int(path.stem.rpartition("-")[2]))


def tensors(checkpoint: Path) -> dict[str, Array]:
    """All tensors of a file or folder."""
    files = sorted(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else [checkpoint]
    return {name: array for file in files for name, array in read_checkpoint(file).items()}


def is_variable(name: str) -> bool:
    return not name.endswith(NO_VARIABLES)


def mixed(values: list[Array], coefficients: list[float]) -> Array:
    """Copy the first value, then mix in the others; each operation rounds to their dtype."""
    shadow, *rest = values
    for value, c in zip(rest, coefficients, strict=True):
        shadow = shadow - (shadow - value) * value.dtype.type(c)
    return shadow


@pytest.fixture(scope="module")
def judge() -> ModuleType:
    """`accuracy.py`, which shares no code with the package."""
    spec = importlib.util.spec_from_file_location("accuracy", DIGITS / "accuracy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------- bytes


def listed() -> dict[str, str]:
    lines = (FIXTURES / "SHA256SUMS").read_text().splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def data_files() -> dict[str, Path]:
    """Every file that is neither program nor text about the fixtures."""
    found = {path.relative_to(FIXTURES).as_posix(): path for path in FIXTURES.rglob("*")}
    return {
        name: path
        for name, path in found.items()
        if path.is_file()
        and path.suffix not in (".py", ".pyc", ".md", ".sh")
        and name != "SHA256SUMS"
    }


def test_every_data_file_has_the_bytes_it_was_made_with() -> None:
    """SHA256SUMS lists all data files, no others, each with its digest."""
    digests = {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in data_files().items()
    }
    assert len(digests) > 100
    assert digests == listed()


def test_the_fixtures_stay_small() -> None:
    """A clone carries them for ever: 3 MB at most."""
    assert sum(path.stat().st_size for path in data_files().values()) < 3_000_000


def test_the_run_is_what_its_readme_says(digits_run: Path, digits_bf16: Path) -> None:
    """Twenty checkpoints a hundred steps apart, in float32 files and bfloat16 folders."""
    for run, kinds in ((digits_run, {"float32", "int64"}), (digits_bf16, {"bfloat16", "int64"})):
        assert [int(path.stem.rpartition("-")[2]) for path in paths(run)] == list(STEPS)
        for path in paths(run):
            assert {array.dtype.name for array in tensors(path).values()} == kinds


# ---------------------------------------------------------------------------- worth


@pytest.mark.parametrize("kind", ["run", "bf16"])
def test_the_mean_of_all_is_better_than_the_last_checkpoint(
    judge: ModuleType, tmp_path: Path, kind: str
) -> None:
    """781 of 797 held-out digits instead of 763, and a far lower loss, as documented."""
    out = tmp_path / "mean.safetensors"
    ema_cli.average_run(DIGITS / kind, out, average=["mean"])
    right, total, loss = judge.accuracy(out)
    last_right, _, last_loss = judge.accuracy(paths(DIGITS / kind)[-1])
    assert (right, last_right, total) == (781, 763, 797)
    assert loss == pytest.approx(0.0584, abs=1e-4)
    assert last_loss == pytest.approx(0.1467, abs=5e-4)


@pytest.mark.parametrize(
    "options, right",
    [
        ({"average": ["mean"], "last": 5}, 777),
        ({"average": ["mean"], "last": 5, "statistics": "copy"}, 753),
        ({"average": ["mean"], "statistics": "copy"}, 751),
    ],
    ids=["last 5", "last 5, statistics copied", "statistics copied"],
)
def test_other_means_are_worth_what_the_readme_says(
    judge: ModuleType, tmp_path: Path, options: dict[str, Any], right: int
) -> None:
    """Averaged weights need averaged statistics: copied ones undo the gain."""
    out = tmp_path / "mean.safetensors"
    ema_cli.average_run(DIGITS / "run", out, **options)
    assert judge.accuracy(out)[0] == right


# ---------------------------------------------------------------------------- bits


@pytest.mark.parametrize("spec", ["mean", "ema:0.9"])
@pytest.mark.parametrize("kind", ["run", "bf16"])
def test_averages_are_numpys_bit_for_bit(tmp_path: Path, kind: str, spec: str) -> None:
    """Float32 shadows, one rounding at the end; everything else is the last checkpoint's."""
    out = tmp_path / "out.safetensors"
    ema_cli.average_run(DIGITS / kind, out, average=[spec], names="variable", optimizer="keep")
    run = [tensors(path) for path in paths(DIGITS / kind)]
    decay = float(tensorflow_coefficient(0.9, None))
    coefficients = [1 / k if spec == "mean" else decay for k in range(2, 21)]
    found = read_checkpoint(out)
    assert found.keys() == run[-1].keys()
    for name, last in run[-1].items():
        if last.dtype == np.int64 or name.endswith("Momentum"):
            assert bits_equal(found[name], last), name
            continue
        wide = mixed([one[name].astype(np.float32) for one in run], coefficients)
        assert bits_equal(found[name], wide.astype(last.dtype)), name


@pytest.mark.parametrize("num_updates", [None, "count"])
@pytest.mark.parametrize("decay", [0.5, 0.99, 0.9999])
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64"])
def test_the_class_gives_tensorflows_bits(
    digits_run: Path, kind: str, decay: float, num_updates: str | None
) -> None:
    """Twenty real checkpoints in each dtype: three operations, each rounded to that dtype."""
    run = [
        {name: a.astype(dtype_of(kind)) for name, a in tensors(path).items() if is_variable(name)}
        for path in paths(digits_run)
    ]
    ema = ExponentialMovingAverage(decay, num_updates)
    for one in run:
        ema.apply(one)
    ns = [k if num_updates else None for k in range(1, 20)]
    coefficients = [float(tensorflow_coefficient(decay, n)) for n in ns]
    assert len(run[0]) == 8
    for name in run[0]:
        expected = mixed([one[name] for one in run], coefficients)
        assert bits_equal(np.asarray(ema.average(name)), expected), name


@pytest.mark.parametrize("num_updates", [None, "count", "step"])
@pytest.mark.parametrize("kind", ["run", "bf16"])
def test_class_command_and_arrays_agree(tmp_path: Path, kind: str, num_updates: str | None) -> None:
    """Applying paths, applying mappings and `average_run` are three ways to the same bits."""
    out = tmp_path / "out.safetensors"
    ema_cli.average_run(
        DIGITS / kind,
        out,
        decay=0.9,
        num_updates=num_updates,
        shadow_dtype="same",
        names="variable",
        statistics="copy",
    )
    by_path = ExponentialMovingAverage(0.9, num_updates)
    by_array = ExponentialMovingAverage(0.9, num_updates)
    for path, step in zip(paths(DIGITS / kind), STEPS, strict=True):
        by_path.apply(path)
        by_array.apply({**tensors(path), "global_step": np.int64(step)})
    written = read_checkpoint(out)
    assert sum(map(is_variable, written)) == 8
    for name in filter(is_variable, written):
        assert bits_equal(np.asarray(by_path.average(name)), written[name]), name
        assert bits_equal(np.asarray(by_array.average(name)), written[name]), name


@pytest.mark.parametrize("kind", ["run", "bf16"])
def test_class_and_command_debias_alike(tmp_path: Path, kind: str) -> None:
    """The slots of the class hold what the command writes: shadow, biased, local_step."""
    out = tmp_path / "out.safetensors"
    options: dict[str, Any] = {"names": "shadow", "shadow_dtype": "same", "statistics": "copy"}
    ema_cli.average_run(DIGITS / kind, out, decay=0.9, zero_debias=True, **options)
    ema = ExponentialMovingAverage(0.9, zero_debias=True, store=tmp_path / "store")
    for path in paths(DIGITS / kind):
        ema.apply(path)
    written = read_checkpoint(out)
    slot = read_checkpoint(tmp_path / "store" / "slot.1")
    shadows = [name for name in written if name.endswith(SUFFIX)]
    assert len(shadows) == 8
    for shadow in shadows:
        assert bits_equal(np.asarray(ema.average(shadow.removesuffix(SUFFIX))), written[shadow])
        for part in ("biased", "local_step"):
            assert bits_equal(slot[f"{shadow}/{part}"], written[f"{shadow}/{part}"]), shadow
