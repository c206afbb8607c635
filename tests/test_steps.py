"""The training step: stored inside, else told by the name; numbers, never text order or mtimes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BF16, cmd, dtype_of, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from ema_cli import formats
from ema_cli.errors import Disagreement, UsageError
from ema_cli.runs import find
from ema_cli.search import Choice
from ema_cli.steps import Step, compile_step_from, step_from_name, stored_step
from ema_cli.tensors import Checkpoint

LABELLED = {
    "epoch=3-step=1200.ckpt": 1200,
    "epoch=3-step=1200-v1.ckpt": 1200,
    "epoch=3-step=1200-val_loss=0.12.ckpt": 1200,
    "epoch=0-step=0.ckpt": 0,
    "val_loss=0.12-step=7": 7,
    "step140000-tokens294B": 140000,
    "stage1-step140000-tokens294B": 140000,
    "tokens294B-step140000": 140000,
    "STEP-100": 100,
    "step_001000": 1000,
    "step-100-loss-0.5": 100,
    "global_step12000": 12000,
    "global-step-12000": 12000,
    "digits-step-0100.safetensors": 100,
    "llama-7b-step-1000": 1000,
    "resnet50_epoch3_step100": 100,
    "iter_0000500": 500,
    "iter-500": 500,
    "iteration_12": 12,
    "iterations=12": 12,
    "ckpt_epoch_2_iter_100.pt": 100,
    "ckpt-7": 7,
    "model.ckpt-1000": 1000,
    "model.ckpt-1000.index": 1000,
    "model.ckpt-1000.data-00000-of-00001": 1000,
    "checkpoint-500": 500,
    "checkpoint_500": 500,
    "checkpoint500": 500,
    "checkpoint-0": 0,
    "checkpoint-500-epoch=2": 500,
    "checkpoint-1-step-500": 500,
    "resnet50-checkpoint-300": 300,
    "2024-01-15-checkpoint-500": 500,
    "model-step-100-00001-of-00009.safetensors": 100,
    "model-00001-of-00009-step-5.safetensors": 5,
    "f1=0.9-step=10": 10,
    "wer=12-step=7": 7,
    "model_iter_100_ema_0.999": 100,
}
ONLY_NUMBER = {
    "42": 42,
    "1000.safetensors": 1000,
    "model_0042.safetensors": 42,
    "weights.1000.h5": 1000,
    "opt-1.3b-500": 500,
    "model-v2-100": 100,
    "model-val_loss=0.12-1200": 1200,
    "epoch-2-500": 500,
    "footstep100": 100,
}
EPOCHS = {"epoch=3.ckpt": 3, "epoch_3": 3, "epoch=03-val_loss=0.12.ckpt": 3, "model-epoch12-v1": 12}
NO_STEP = [
    "",
    "model.safetensors",
    "model-v1.safetensors",
    "model-v10",
    "last-v2.ckpt",
    "val_loss=0.12",
    "val_loss=12",
    "accuracy-95",
    "model-ema0.999",
    "model-00001-of-00009.safetensors",
    "gpt2-1000",
    "2024-01-15",
    "run-3-of-7",
]


@pytest.mark.parametrize(("name", "step"), {**LABELLED, **ONLY_NUMBER, **EPOCHS}.items())
def test_the_name_tells_the_step(name: str, step: int) -> None:
    """The labelled number, else the only number, else the epoch is the step."""
    assert step_from_name(name) == step


@pytest.mark.parametrize("name", NO_STEP)
def test_other_numbers_are_no_step(name: str) -> None:
    """Metrics, versions, shard counts and ambiguous numbers are never taken for a step."""
    assert step_from_name(name) is None


@given(st.text(max_size=60))
def test_no_name_breaks_the_parser(name: str) -> None:
    """Any text is either a step or none; never an exception, never negative."""
    found = step_from_name(name)
    assert found is None or found >= 0


@given(st.integers(0, 10**15), st.integers(0, 999), st.integers(0, 99))
def test_the_step_survives_whatever_stands_around_it(step: int, epoch: int, loss: int) -> None:
    """Lightning's names give back the step they were made of."""
    assert step_from_name(f"epoch={epoch}-step={step}-val_loss=0.{loss:02}-v{epoch}.ckpt") == step


# ---------------------------------------------------------------------------- --step-from


@pytest.mark.parametrize(
    ("expression", "name", "step"),
    [
        (r"b(\d+)", "a1-b22-c333", 22),
        (r"\d+$", "a1-b22-c333", 333),
        (r"x(\d+)", "a1", None),
        (r"(\D)", "a1", None),
        (r"a(\d+)?", "a", None),
        (r"(\d+)-(\d+)", "7-8", 7),
    ],
)
def test_step_from_takes_the_first_group_or_the_match(
    expression: str, name: str, step: int | None
) -> None:
    """The user's expression decides alone: its first group, else all of it, if it is a number."""
    assert step_from_name(name, compile_step_from(expression)) == step


def test_a_broken_step_from_is_a_usage_error() -> None:
    """An expression that does not compile is exit code 2 and is shown."""
    with pytest.raises(UsageError, match=r"--step-from '\(': "):
        compile_step_from("(")
    assert compile_step_from(None) is None


# ---------------------------------------------------------------------------- stored


def checkpoint_of(path: Path, tensors: dict[str, Any]) -> Checkpoint:
    """Write tensors as a checkpoint and read it."""
    return formats.read(str(write_checkpoint(path, tensors)), {})


@pytest.mark.parametrize("name", ["global_step", "step", "iterations"])
@pytest.mark.parametrize(
    "dtype", ["int64", "int32", "uint8", "uint64", "float32", "float64", "float16", "bfloat16"]
)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_stored_scalar_is_the_step(
    tmp_path: Path, name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    """TensorFlow's, Keras' and PyTorch's counters of any numeric dtype are read."""
    value = np.full(shape, 120).astype(dtype_of(dtype))
    found = stored_step(checkpoint_of(tmp_path / "model.safetensors", {name: value}))
    assert found == Step(120, f"tensor {name}")


@pytest.mark.parametrize(
    "value",
    [
        np.array([1, 2]),
        np.array([], np.int64),
        np.array(True),
        np.array(3 + 0j, np.complex64),
        np.array(-1),
        np.array(1.5),
        np.array(np.nan),
        np.array(np.inf),
        np.array(2**63, np.uint64),
        np.array(1e30),
        np.array(np.nan).astype(BF16),
    ],
    ids=str,
)
def test_a_stored_value_that_cannot_be_a_step_is_ignored(tmp_path: Path, value: Any) -> None:
    """Vectors, truth values, fractions, negative and absurd numbers leave the step to the name."""
    path = tmp_path / "model-step-7.safetensors"
    write_checkpoint(path, {"step": value, "w": np.float32([1])})
    assert stored_step(formats.read(str(path), {})) is None
    assert find([str(path)], Choice()).steps == [7]


def test_the_first_of_the_stored_counters_wins(tmp_path: Path) -> None:
    """``global_step`` goes before ``step``, ``step`` before ``iterations``."""
    tensors = {"iterations": np.array(3), "step": np.array(2), "global_step": np.array(1)}
    for value, name in enumerate(("global_step", "step", "iterations"), start=1):
        path = tmp_path / f"{name}.safetensors"
        assert stored_step(checkpoint_of(path, tensors)) == Step(value, f"tensor {name}")
        del tensors[name]


def test_a_stored_step_wins_and_a_name_that_differs_is_reported(tmp_path: Path) -> None:
    """The number inside beats the one in the name, and people are told."""
    path = tmp_path / "model-step-500.safetensors"
    write_checkpoint(path, {"w": np.float32([1]), "global_step": np.array(510)})
    run = find([str(path)], Choice())
    assert run.steps == [510]
    assert run.notes == (f"{path}: its tensor global_step says step 510, its name says 500",)


def test_a_stored_step_that_agrees_with_the_name_is_not_worth_a_word(tmp_path: Path) -> None:
    """No note when both say the same."""
    path = tmp_path / "model-step-500.safetensors"
    write_checkpoint(path, {"w": np.float32([1]), "global_step": np.array(500)})
    assert find([str(path)], Choice()).notes == ()


def test_the_stored_step_beats_step_from(tmp_path: Path) -> None:
    """--step-from reads the name; a stored step wins, and a name that differs is noted."""
    path = tmp_path / "model-a500.safetensors"
    write_checkpoint(path, {"w": np.float32([1]), "global_step": np.array(510)})
    found = find([str(path)], Choice(step_from=r"a(\d+)"))
    assert found.steps == [510]
    assert "its name says 500" in found.notes[0]


# ---------------------------------------------------------------------------- trainer_state.json


def folder(path: Path, state: str | bytes | None) -> Path:
    """Write a checkpoint folder with this ``trainer_state.json``."""
    write_checkpoint(path / "model.safetensors", {"w": np.float32([1])})
    if state is not None:
        (path / "trainer_state.json").write_bytes(
            state.encode() if isinstance(state, str) else state
        )
    return path


def test_the_trainer_state_of_a_folder_tells_the_step(tmp_path: Path) -> None:
    """A Hugging Face folder's own ``global_step`` is a stored step."""
    path = folder(tmp_path / "final-weights", json.dumps({"global_step": 77, "epoch": 1.5}))
    assert stored_step(formats.read(str(path), {})) == Step(77, "trainer_state.json")
    assert find([str(path)], Choice()).steps == [77]


@pytest.mark.parametrize(
    "state",
    [
        None,
        "",
        "[]",
        "{}",
        '{"global_step": "77"}',
        '{"global_step": true}',
        '{"global_step": -1}',
        '{"global_step": 7.5}',
        '{"global_step": 1e400}',
        "[" * 5000,
        b"\xff\xfe",
    ],
)
def test_a_useless_trainer_state_leaves_the_step_to_the_name(
    tmp_path: Path, state: str | bytes | None
) -> None:
    """A side file is never a reason to refuse the weights."""
    path = folder(tmp_path / "checkpoint-500", state)
    assert find([str(path)], Choice()).steps == [500]


def test_a_stored_tensor_goes_before_the_trainer_state(tmp_path: Path) -> None:
    """The counter beside the weights is the closest to them."""
    path = folder(tmp_path / "checkpoint-500", '{"global_step": 77}')
    tensors = {"w": np.float32([1]), "global_step": np.array(78)}
    write_checkpoint(path / "model.safetensors", tensors)
    assert stored_step(formats.read(str(path), {})) == Step(78, "tensor global_step")


# ---------------------------------------------------------------------------- no step


def test_a_checkpoint_without_a_step_asks_for_step_from(tmp_path: Path) -> None:
    """A run entry that tells no step is exit code 13 and names the option that helps."""
    for name in ("model-step-100", "resnet50-1000-7"):
        write_checkpoint(tmp_path / "run" / f"{name}.safetensors", {"w": np.float32([1])})
    with pytest.raises(Disagreement, match=r"resnet50-1000-7\.safetensors: no step") as caught:
        find([str(tmp_path / "run")], Choice())
    assert "--step-from" in caught.value.hint
    outcome = cmd("run", tmp_path / "run", "-o", tmp_path / "out.safetensors", code=13)
    assert "--step-from" in outcome.err
