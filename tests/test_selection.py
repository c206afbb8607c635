"""Which tensors are averaged, copied, replaced or refused, and what a disagreement says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BF16, dtype_of, read_checkpoint, write_checkpoint, write_run

import ema_cli
from ema_cli.errors import Disagreement, NothingToAverage, UnsupportedInput

SHADOW = "/ExponentialMovingAverage"
F4 = np.zeros(2, np.float32)
NETWORK: dict[str, Any] = {
    "conv/kernel": F4,
    "conv/kernel/Adam": F4,
    "conv/kernel/Adam_1": F4,
    "conv/kernel" + SHADOW: F4,
    "conv/kernel" + SHADOW + "_1": F4,
    "bn/gamma": np.zeros(3, BF16),
    "bn/moving_mean": np.zeros(3, np.float64),
    "bn/moving_mean" + SHADOW: np.zeros(3, np.float64),
    "bn/num_batches": np.zeros((), np.int64),
    "beta1_power": np.zeros((), np.float32),
    "optimizer/iterations": np.zeros((), np.int64),
    "global_step": np.zeros((), np.int64),
}


def selection(folder: Path, tensors: Mapping[str, Any], *select: str, **options: Any) -> Any:
    """The selection for a checkpoint; rules are written `+glob` and `-glob`."""
    path = write_checkpoint(folder / "step-1.safetensors", tensors)
    kinds = {"+": "include", "-": "exclude"}
    rules = [(kinds[rule[0]], rule[1:]) for rule in select]
    return ema_cli.plan_run(path, select=rules, **options).outcomes[0].selection


def names(tensors: Any) -> set[str]:
    return {tensor.name for tensor in tensors}


# ---------------------------------------------------------------------------- what is averaged


def test_default(tmp_path: Path) -> None:
    """Variables and statistics are averaged, own shadows replaced, the rest copied or optimizer."""
    found = selection(tmp_path, NETWORK)
    assert names(found.averaged) == {"conv/kernel", "bn/gamma", "bn/moving_mean"}
    assert names(found.replaced) == {"conv/kernel" + SHADOW, "bn/moving_mean" + SHADOW}
    assert names(found.optimizer) == {
        "conv/kernel/Adam",
        "conv/kernel/Adam_1",
        "beta1_power",
        "optimizer/iterations",
    }
    reasons = {choice.tensor.name: choice.reason for choice in found.copied}
    assert reasons == {
        "conv/kernel" + SHADOW + "_1": "shadow of another name",
        "bn/num_batches": "int64 is never averaged",
        "global_step": "int64 is never averaged",
    }


def test_statistics_copy(tmp_path: Path) -> None:
    """With statistics="copy" they come from the last checkpoint, as TensorFlow has it."""
    found = selection(tmp_path, NETWORK, statistics="copy")
    assert names(found.averaged) == {"conv/kernel", "bn/gamma"}
    assert "bn/moving_mean" in {choice.tensor.name for choice in found.copied}


def test_shadow_name_decides_what_is_replaced(tmp_path: Path) -> None:
    """With another --name TensorFlow's shadows are somebody else's and are copied."""
    found = selection(tmp_path, NETWORK, name="ema")
    assert names(found.replaced) == set()
    copied = {choice.tensor.name for choice in found.copied}
    assert {"conv/kernel" + SHADOW, "bn/moving_mean" + SHADOW} <= copied


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (["-*", "+conv/*"], "conv/kernel conv/kernel/Adam conv/kernel/Adam_1 @_1"),
        (["-*", "+conv/*", "-*Adam*", "-*Average*"], "conv/kernel"),
        (["+conv/*", "-*", "+bn/gamma"], "bn/gamma"),
        (["-bn/*"], "conv/kernel"),
        (["+*Adam"], "conv/kernel bn/gamma bn/moving_mean conv/kernel/Adam"),
        (["-b*", "+*moving_mean"], "conv/kernel bn/moving_mean"),
    ],
)
def test_last_match_wins(tmp_path: Path, select: list[str], expected: str) -> None:
    """Globs in command-line order override the default, the last that matches decides."""
    wanted = expected.replace("@", "conv/kernel" + SHADOW).split()
    assert names(selection(tmp_path, NETWORK, *select).averaged) == set(wanted)


def test_excluded_tensors_are_copied_with_the_rule_as_reason(tmp_path: Path) -> None:
    """What a rule takes out is copied, and the plan says which rule it was."""
    found = selection(tmp_path, {"a": F4, "b": F4}, "-b")
    assert [(c.tensor.name, c.reason) for c in found.copied] == [("b", "--exclude 'b'")]


def test_nothing_to_average(tmp_path: Path) -> None:
    """A selection without any averaged tensor is exit code 10."""
    for tensors, rules in (({"a": F4}, ["-*"]), ({"n": np.zeros(3, np.int32)}, [])):
        with pytest.raises(NothingToAverage) as caught:
            selection(tmp_path, tensors, *rules)
        assert caught.value.exit_code == 10


# ---------------------------------------------------------------------------- refused dtypes


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "bool", "complex64", "float8_e5m2"])
def test_naming_what_cannot_be_averaged(tmp_path: Path, dtype: str) -> None:
    """An include without wildcard of another dtype is exit code 13 and tells the dtype."""
    tensors = {"w": F4, "n": np.zeros(2, dtype_of(dtype))}
    with pytest.raises(Disagreement, match=f"--include 'n'.*found {dtype}") as caught:
        selection(tmp_path, tensors, "+n")
    assert caught.value.exit_code == 13


def test_wildcards_pass_over_integers(tmp_path: Path) -> None:
    """An include with a wildcard averages what can be averaged and copies the rest."""
    found = selection(tmp_path, {"a.w": F4, "a.n": np.zeros(2, np.int64)}, "+a.*")
    assert names(found.averaged) == {"a.w"}
    assert [choice.tensor.name for choice in found.copied] == ["a.n"]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_float8_is_refused_unless_excluded(tmp_path: Path, dtype: str) -> None:
    """Eight-bit floats are exit code 12 with the option that copies them instead."""
    tensors = {"w": F4, "small": np.zeros(2, dtype_of(dtype))}
    with pytest.raises(UnsupportedInput, match=f"'small'.*found {dtype}") as caught:
        selection(tmp_path, tensors)
    assert caught.value.exit_code == 12
    assert "--exclude small" in caught.value.hint
    found = selection(tmp_path, tensors, "-small")
    assert [choice.tensor.name for choice in found.copied] == ["small"]


def packed(*scales: str, weight: str = "l.weight", dtype: str = "int8") -> dict[str, Any]:
    return {
        weight: np.zeros(4, dtype_of(dtype)),
        "norm": F4,
        **{scale: np.ones(1, np.float32) for scale in scales},
    }


@pytest.mark.parametrize(
    "tensors",
    [
        packed("l.scales", "l.qzeros", "l.g_idx", weight="l.qweight", dtype="int32"),
        packed("l.weight_scale", weight="l.weight_packed", dtype="int32"),
        packed("l.weight_scale_inv", dtype="float8_e4m3fn"),
        packed("l.weight_scale", dtype="float8_e4m3fn"),
        packed("l.weight_scale", dtype="int8"),
        packed("l.weight.absmax", "l.weight.quant_map", dtype="uint8"),
    ],
    ids=["gptq", "packed", "float8-blocks", "float8", "int8", "nf4"],
)
def test_quantised_models_are_refused(tmp_path: Path, tensors: dict[str, Any]) -> None:
    """Packed integers or float8 with scales beside them are exit code 12: dequantise first."""
    with pytest.raises(UnsupportedInput, match="quantised") as caught:
        selection(tmp_path, tensors)
    assert "dequantise" in caught.value.hint


def test_scales_alone_are_no_quantised_model(tmp_path: Path) -> None:
    """A float parameter called like a scale, or an index table, is nothing special."""
    tensors = {"l.weight": F4, "l.scales": F4, "l.position_ids": np.zeros(3, np.int64)}
    assert names(selection(tmp_path, tensors).averaged) == {"l.weight", "l.scales"}


def test_quantisation_config_is_refused(tmp_path: Path) -> None:
    """A folder whose config.json has a quantization_config is exit code 12, whatever it holds."""
    for step in (1, 2):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        write_checkpoint(folder / "model.safetensors", {"w": F4})
        config = {"quantization_config": {"quant_method": "bitsandbytes"}}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedInput, match="quantization_config") as caught:
        ema_cli.plan_run(tmp_path / "run", average=["mean"])
    assert caught.value.exit_code == 12


# ---------------------------------------------------------------------------- agreement


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (np.zeros(3, np.float32), ["float32 [2]", "float32 [3]"]),
        (np.zeros((1, 2), np.float32), ["float32 [2]", "float32 [1, 2]"]),
        (np.zeros(2, np.float64), ["float32 [2]", "float64 [2]"]),
        (np.zeros(2, np.int32), ["float32 [2]", "int32 [2]"]),
        (None, ["float32 [2]", "missing", "layer.bia5"]),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_disagreement_names_everything(
    tmp_path: Path, odd: np.ndarray | None, words: list[str], place: int
) -> None:
    """A tensor that differs is exit code 13 with checkpoint, tensor, expected and found."""
    models: list[dict[str, Any]] = [{"w": F4, "layer.bias": F4} for _ in range(3)]
    models[place] = {"w": F4, "layer.bias": odd} if odd is not None else {"w": F4, "layer.bia5": F4}
    run = write_run(tmp_path / "run", models)
    with pytest.raises(Disagreement) as caught:
        ema_cli.plan_run(run, average=["mean"])
    assert caught.value.exit_code == 13
    for word in (f"model-step-{place + 1}00.safetensors", "'layer.bias'", *words):
        assert word in caught.value.message
    assert "--exclude layer.bias" in caught.value.hint


def test_tensor_that_vanished_is_told(tmp_path: Path) -> None:
    """A variable the last checkpoint lacks is exit code 13, not silently left out."""
    run = write_run(tmp_path / "run", [{"w": F4, "gone": F4}, {"w": F4}])
    with pytest.raises(Disagreement, match="'gone' is missing") as caught:
        ema_cli.plan_run(run, average=["mean"])
    assert "model-step-200.safetensors" in caught.value.message
    assert "--exclude gone" in caught.value.hint


def test_hint_about_a_vanished_tensor_helps(tmp_path: Path) -> None:
    """Excluding the tensor that only earlier checkpoints hold, as the hint says, is accepted."""
    run = write_run(tmp_path / "run", [{"w": F4, "gone": F4}, {"w": F4}])
    plan = ema_cli.plan_run(run, average=["mean"], select=[("exclude", "gone")])
    assert names(plan.outcomes[0].selection.averaged) == {"w"}


def test_copied_tensors_may_differ(tmp_path: Path) -> None:
    """Only what is averaged must agree; the rest is the last checkpoint's."""
    models = [
        {"w": F4, "n": np.zeros(k, np.int32), "kept": np.zeros(k, np.float32)} for k in (1, 2, 3)
    ]
    output = tmp_path / "o.safetensors"
    run = write_run(tmp_path / "run", models)
    ema_cli.average_run(run, output, average=["mean"], select=[("exclude", "kept")])
    found = read_checkpoint(output)
    assert found["n"].shape == found["kept"].shape == (3,)


def test_checkpoint_without_weight_may_differ(tmp_path: Path) -> None:
    """A checkpoint outside every window is not asked."""
    run = write_run(tmp_path / "run", [{"other": F4}, {"w": F4}, {"w": F4}])
    plan = ema_cli.plan_run(run, average=["mean@last=2"])
    assert plan.outcomes[0].weights == (0.0, 0.5, 0.5)


# ---------------------------------------------------------------------------- what is written


def written(folder: Path, **options: Any) -> set[str]:
    run = folder / "run"
    if not run.exists():
        # global_step would be the step of both.
        network = {name: value for name, value in NETWORK.items() if name != "global_step"}
        write_run(run, [network] * 2)
    output = folder / "o.safetensors"
    ema_cli.average_run(run, output, average=["mean"], overwrite=True, **options)
    return set(read_checkpoint(output))


def test_names_of_the_output(tmp_path: Path) -> None:
    """Shadow names for variables; statistics under both names, so that every restore works."""
    averages = {"conv/kernel" + SHADOW, "bn/gamma" + SHADOW, "bn/moving_mean" + SHADOW}
    rest = {"bn/moving_mean", "bn/num_batches", "conv/kernel" + SHADOW + "_1"}
    optimizer = {"conv/kernel/Adam", "conv/kernel/Adam_1", "beta1_power", "optimizer/iterations"}
    assert written(tmp_path) == averages | rest
    assert written(tmp_path, optimizer="keep") == averages | rest | optimizer
    raw = {"conv/kernel", "bn/gamma"}
    assert written(tmp_path, keep_variables=True) == averages | rest | raw
    assert written(tmp_path, names="variable", optimizer="drop") == raw | rest
    # A template keeps every entry; shadows of the training become this average too.
    shadows = {"conv/kernel" + SHADOW, "bn/moving_mean" + SHADOW}
    assert written(tmp_path, names="variable") == raw | rest | optimizer | shadows
