"""`--like`: runs averaged as PyTorch and Keras do, bit for bit, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden.inputs import Array, variable
from helpers import bits_equal, cmd, dtype_of, read_checkpoint, write_run

import ema_cli
from ema_cli import engine, kernel, likeness
from ema_cli.errors import UsageError

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
NAMES = ("float16", "bfloat16", "float32", "float64")
CHECKPOINTS, ELEMENTS = 6, 5000
TORCH, KERAS = FIXTURES / "torch", FIXTURES / "keras"


def models() -> list[dict[str, Array]]:
    """Six checkpoints with a variable of each dtype, statistics and an integer."""
    found = []
    for k in range(CHECKPOINTS):
        model = {name: variable(3, k, ELEMENTS, dtype_of(name)) for name in NAMES}
        model["norm.running_mean"] = variable(4, k, 7, np.dtype(np.float32))
        model["norm.num_batches_tracked"] = np.asarray(100 * k)
        found.append(model)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 100 to 600."""
    return write_run(tmp_path_factory.mktemp("like") / "run", models())


def torch_ema(values: Sequence[Array], decay: float) -> Array:
    """One update after the other by `ema_cli.likeness`, whole arrays at a time."""
    scratch, shadow = np.empty(likeness.SCRATCH), values[0].copy().reshape(-1)
    with kernel.quiet():
        for value in values[1:]:
            likeness.update_torch(shadow, value.reshape(-1), 1 - decay, scratch)
    return shadow.reshape(values[0].shape)


def torch_mean(values: Sequence[Array]) -> Array:
    scratch, shadow = np.empty(likeness.SCRATCH), values[0].copy().reshape(-1)
    with kernel.quiet():
        for k, value in enumerate(values[1:], start=2):
            likeness.update_torch_mean(shadow, value.reshape(-1), k, scratch)
    return shadow.reshape(values[0].shape)


def keras_ema(values: Sequence[Array], decay: float) -> Array:
    scratch, shadow = np.empty(likeness.SCRATCH), np.zeros_like(values[0]).reshape(-1)
    with kernel.quiet():
        for k, value in enumerate(values):
            likeness.update_keras(shadow, value.reshape(-1), decay if k else 0.0, scratch)
    return shadow.reshape(values[0].shape)


ORACLES = {"torch": torch_ema, "keras": keras_ema}


def check(path: Path, oracle: Any, *args: Any, first: int = 0, statistics: bool = False) -> None:
    """Hold the tensors of an output against whole arrays; copies are the last checkpoint's."""
    found, taken = read_checkpoint(path), models()[first:]
    for name in (*NAMES, "norm.running_mean"):
        values = [model[name] for model in taken]
        made = oracle(values, *args) if name in NAMES or statistics else values[-1]
        assert bits_equal(found.pop(name), made), name
    assert bits_equal(found.pop("norm.num_batches_tracked"), taken[-1]["norm.num_batches_tracked"])
    assert not found


# ---------------------------------------------------------------------------- bits


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.9, 0.999, 0.99999999, 1.0])
@pytest.mark.parametrize("like", ORACLES)
def test_an_ema_is_the_frameworks(run: Path, tmp_path: Path, like: str, decay: float) -> None:
    """Checkpoint by checkpoint the bits of `ema_cli.likeness`, in each variable's own dtype."""
    out = tmp_path / "out.safetensors"
    ema_cli.average_run(run, out, decay=decay, like=like, names="variable")
    check(out, ORACLES[like], decay)


@pytest.mark.parametrize("decay", [1e-9, 3e-8])
def test_a_tiny_momentum_is_keras_too(run: Path, tmp_path: Path, decay: float) -> None:
    """1 - decay is 1 in float32, but Keras adds decay times the shadow all the same."""
    out = tmp_path / "out.safetensors"
    ema_cli.average_run(run, out, decay=decay, like="keras", names="variable")
    check(out, keras_ema, decay)


def test_a_mean_is_pytorchs(run: Path, tmp_path: Path) -> None:
    """As `AveragedModel` without a function does on a CPU."""
    out = tmp_path / "out.safetensors"
    ema_cli.average_run(run, out, average=["mean"], like="torch", names="variable")
    check(out, torch_mean)


@pytest.mark.parametrize("like", ORACLES)
def test_statistics_are_averaged_on_request(run: Path, tmp_path: Path, like: str) -> None:
    """As with use_buffers=True: by the same arithmetic; unasked they are the last ones."""
    out = tmp_path / "out.safetensors"
    ema_cli.average_run(run, out, decay=0.9, like=like, statistics="average", names="variable")
    check(out, ORACLES[like], 0.9, statistics=True)


def test_tensorflows_arithmetic_is_another(run: Path, tmp_path: Path) -> None:
    """The default: other bits than both, statistics averaged, half types in float32."""
    outs = {like: tmp_path / f"{like}.safetensors" for like in ("tensorflow", "torch", "keras")}
    for like, out in outs.items():
        ema_cli.average_run(run, out, decay=0.9, like=like, names="variable")
    ema_cli.average_run(run, tmp_path / "unasked.safetensors", decay=0.9, names="variable")
    found = {like: read_checkpoint(out) for like, out in outs.items()}
    assert outs["tensorflow"].read_bytes() == (tmp_path / "unasked.safetensors").read_bytes()
    for name in NAMES:
        assert len({one[name].tobytes() for one in found.values()}) == 3, name
    assert not bits_equal(
        found["tensorflow"]["norm.running_mean"], models()[-1]["norm.running_mean"]
    )


@pytest.mark.parametrize("block", [29, 1 << 11])
@pytest.mark.parametrize("workers", [1, 3])
def test_blocks_and_workers_do_not_matter(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, workers: int
) -> None:
    """Any way of working has the bits of whole arrays."""
    monkeypatch.setattr(engine, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(engine, "TASK_ELEMENTS", 1 << 12)
    options: dict[str, Any] = {"names": "variable", "workers": workers, "last": 3}
    for like, oracle in ORACLES.items():
        out = tmp_path / f"{like}.safetensors"
        ema_cli.average_run(run, out, decay=0.7, like=like, **options)
        check(out, oracle, 0.7, first=CHECKPOINTS - 3)


def test_several_averages_in_one_pass(run: Path, tmp_path: Path) -> None:
    """Each as if it were alone; windows start anew from their first checkpoint."""
    averages = ["mean", "ema:0.9", "slow=ema:0.99@last=4", "late=mean@400:"]
    out = tmp_path / "{average}.safetensors"
    ema_cli.average_run(run, out, average=averages, like="torch", names="variable")
    check(tmp_path / "mean.safetensors", torch_mean)
    check(tmp_path / "ema-0.9.safetensors", torch_ema, 0.9)
    check(tmp_path / "slow.safetensors", torch_ema, 0.99, first=2)
    check(tmp_path / "late.safetensors", torch_mean, first=3)
    averages = ["ema:0.9", "ema:0.5", "late=ema:0.9@400:"]
    out = tmp_path / "keras-{average}.safetensors"
    ema_cli.average_run(run, out, average=averages, like="keras", names="variable")
    check(tmp_path / "keras-ema-0.9.safetensors", keras_ema, 0.9)
    check(tmp_path / "keras-ema-0.5.safetensors", keras_ema, 0.5)
    check(tmp_path / "keras-late.safetensors", keras_ema, 0.9, first=3)


def test_a_dtype_is_that_of_the_output_alone(run: Path, tmp_path: Path) -> None:
    """The arithmetic is in the variables' own; the result is cast once."""
    out = tmp_path / "out.safetensors"
    ema_cli.average_run(run, out, decay=0.9, like="torch", names="variable", dtype="float32")
    found = read_checkpoint(out)
    for name in ("float16", "bfloat16", "float32"):
        made = torch_ema([model[name] for model in models()], 0.9).astype(np.float32)
        assert bits_equal(found[name], made), name


def test_like_is_recorded(run: Path, tmp_path: Path) -> None:
    """The same command changes nothing; another arithmetic is another output."""
    out = tmp_path / "out.safetensors"
    words = ["run", run, "-o", out, "--decay", "0.9"]
    cmd(*words, "--like", "torch")
    before = out.read_bytes()
    assert cmd(*words, "--like", "torch").out.startswith("unchanged")
    cmd(*words, "--like", "keras", code=14)
    assert out.read_bytes() == before
    cmd(*words, "--like", "keras", "--overwrite")
    assert out.read_bytes() != before


# ---------------------------------------------------------------------------- what is refused


REFUSED: dict[str, list[str]] = {
    "torch, ramp": ["torch", "--decay", "0.9", "--num-updates", "count"],
    "torch, step ramp": ["torch", "--decay", "0.9", "--num-updates", "step"],
    "torch, zeros": ["torch", "--decay", "0.9", "--init", "zeros"],
    "torch, debias": ["torch", "--decay", "0.9", "--zero-debias"],
    "torch, per step": ["torch", "--decay", "0.9/step"],
    "torch, half-life": ["torch", "--average", "half-life:100"],
    "torch, power": ["torch", "--average", "power:0.1"],
    "torch, learning rate": ["torch", "--average", "lr:linear"],
    "torch, one of two": ["torch", "--average", "mean", "--average", "lr:cosine"],
    "torch, nothing asked": ["torch"],
    "keras, mean": ["keras", "--average", "mean"],
    "keras, ramp": ["keras", "--decay", "0.9", "--num-updates", "count"],
    "keras, zeros": ["keras", "--decay", "0.9", "--init", "zeros"],
    "keras, per step": ["keras", "--decay", "0.9/step"],
    "keras, nothing asked": ["keras"],
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_what_the_framework_cannot_is_refused(
    run: Path, tmp_path: Path, command: str, case: str
) -> None:
    """Exit 2, with what was found and what can be asked for instead."""
    like, *words = REFUSED[case]
    if len(words) == 4 and words[0] == words[2]:
        words += ["-o", str(tmp_path / "{average}.safetensors")]
    else:
        words += ["-o", str(tmp_path / "out.safetensors")]
    done = cmd(command, run, "--like", like, *words, code=2)
    assert f"--like {like}: expected one decay for all updates, found '" in done.err
    hint = done.err.rpartition("hint: ")[2].strip()
    assert hint == "give --decay D" + (", or --average mean" if like == "torch" else "")
    assert list(tmp_path.iterdir()) == []


def test_another_framework_is_no_choice(run: Path, tmp_path: Path) -> None:
    """By the command and by the function."""
    done = cmd("run", run, "-o", tmp_path / "o.safetensors", "--like", "jax", code=2)
    assert "'tensorflow', 'torch', 'keras'" in done.err
    with pytest.raises(UsageError, match="like: expected one of tensorflow, torch, keras"):
        ema_cli.average_run(run, tmp_path / "o.safetensors", decay=0.9, like="jax")


@pytest.mark.parametrize("like", ORACLES)
def test_hints_fit_the_arithmetic(run: Path, tmp_path: Path, like: str) -> None:
    """No warning sends one to an option that is refused, or that does nothing, with --like."""
    words = ["--like", like, "--decay", "0.999"]
    done = cmd("plan", run, "-o", tmp_path / "out.safetensors", *words)
    assert "first-dominates" in done.err
    assert "frozen-shadow" in done.err
    for word in ("--num-updates", "/step", "half-life"):
        assert word not in done.err, word
    assert done.err.count("--shadow-dtype") == done.err.count("without --like") > 0


# ---------------------------------------------------------------------------- the frameworks' own


def bits_of(checkpoint: Path) -> dict[str, Array]:
    return read_checkpoint(checkpoint)


TORCH_RUNS = {"run": "run", "legacy": "run", "lightning": "lightning", "hf": "hf"}
TORCH_CASES: dict[str, dict[str, Any]] = {
    "ema": {"decay": 0.9, "like": "torch"},
    "ema-buffers": {"decay": 0.9, "like": "torch", "statistics": "average"},
    "mean": {"average": ["mean"], "like": "torch"},
    "mean-buffers": {"average": ["mean"], "like": "torch", "statistics": "average"},
    "tensorflow": {"decay": 0.9, "shadow_dtype": "same"},
}


@pytest.mark.parametrize("case", TORCH_CASES)
@pytest.mark.parametrize("folder", TORCH_RUNS)
def test_pytorchs_own_averages(tmp_path: Path, folder: str, case: str) -> None:
    """`AveragedModel` fed with the same files; counts of batches are the last ones here."""
    expected = bits_of(TORCH / "expected" / TORCH_RUNS[folder] / f"{case}.safetensors")
    out = tmp_path / "out.safetensors"
    options = {"names": "variable", **TORCH_CASES[case]}
    ema_cli.average_run(TORCH / folder, out, **options)
    found = bits_of(out)
    compared = 0
    for name, array in expected.items():
        if array.dtype.kind == "i":  # averaged as well with use_buffers=True, and cut off
            continue
        assert bits_equal(found[name], array), name
        compared += 1
    assert compared >= 7


KERAS_CASES: dict[str, dict[str, Any]] = {
    "keras": {"decay": 0.9, "like": "keras"},
    "tensorflow": {"decay": 0.9, "shadow_dtype": "same"},
}


@pytest.mark.parametrize("case", KERAS_CASES)
def test_keras_own_averages_of_arrays(tmp_path: Path, case: str) -> None:
    """The same values, saved by `numpy.savez`: no other reader is between them and the average."""
    expected = bits_of(KERAS / "expected" / f"{case}.safetensors")
    out = tmp_path / "out.safetensors"
    ema_cli.average_run(FIXTURES / "npz" / "run", out, names="variable", **KERAS_CASES[case])
    found = bits_of(out)
    compared = [name for name in expected if name in found]
    assert len(compared) >= 7
    for name in compared:
        assert bits_equal(found[name], expected[name]), name


@pytest.mark.parametrize("folder", ["archive", "weights", "legacy", "bfloat16"])
@pytest.mark.parametrize("case", KERAS_CASES)
def test_keras_own_averages(tmp_path: Path, folder: str, case: str) -> None:
    """Its optimizer's averages of the same files, value by value, whatever they are called."""
    inner = "bfloat16/" if folder == "bfloat16" else ""
    expected = bits_of(KERAS / "expected" / f"{inner}{case}.safetensors")
    out = tmp_path / "out.safetensors"
    options = {"names": "variable", "optimizer": "drop", **KERAS_CASES[case]}
    ema_cli.average_run(KERAS / folder, out, **options)
    found = {array.tobytes() for array in bits_of(out).values()}
    variables = {name: array for name, array in expected.items() if is_variable(name)}
    assert len(variables) >= 6
    for name, array in variables.items():
        assert array.tobytes() in found, name


def is_variable(name: str) -> bool:
    return not name.startswith(("adam", "optimizer")) and "seed" not in name
