"""``ema-avg rename``: the same bits under other names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BF16, CODES, bits_equal, cmd, dtype_of, read_checkpoint, write_checkpoint

import ema_cli
from ema_cli.errors import Disagreement

Array = np.ndarray[Any, Any]
SHADOW = "ExponentialMovingAverage"
TO_SHADOW = ("--names", "shadow")
TO_VARIABLE = ("--names", "variable")


def odd_bits(dtype: str) -> Array:
    """Bits that arithmetic or a conversion would spoil: NaN payloads, -0, subnormals."""
    if dtype == "bool":
        return np.array([True, False])
    width = dtype_of(dtype).itemsize
    raw = np.random.default_rng(width).bytes(40 * width)
    special = b"\x01" + bytes(width - 1) + bytes(width - 1) + b"\x80" + b"\xff" * width
    return np.frombuffer(special + raw, dtype_of(dtype))


def same(found: Mapping[str, Array], expected: Mapping[str, Any]) -> bool:
    """Whether two checkpoints have the same names and bits."""
    return found.keys() == expected.keys() and all(
        bits_equal(found[name], np.asarray(value)) for name, value in expected.items()
    )


def contents(folder: Path) -> dict[str, Array]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: array for file in files for name, array in read_checkpoint(file).items()}


# ---------------------------------------------------------------------------- directions


def test_towards_shadow_renames_what_would_be_averaged(tmp_path: Path) -> None:
    """Variables get the suffix, statistics stand under both names, the rest is kept."""
    one, two = np.float32([1]), np.float32([2])
    plain = {"conv/kernel": one, "conv/bias": BF16.type(3)}
    rest = {"conv/kernel/Momentum": one, "global_step": np.int64(7), "mask": np.array([True])}
    path = write_checkpoint(tmp_path / "a.safetensors", {**plain, **rest, "bn/moving_mean": two})
    out = tmp_path / "out.safetensors"
    outcome = cmd("rename", path, "-o", out, *TO_SHADOW)
    assert outcome.out == f"{out}\n"
    assert "3 tensors renamed, 4 kept" in outcome.err
    expected = {f"{name}/{SHADOW}": value for name, value in plain.items()}
    statistics = {"bn/moving_mean": two, f"bn/moving_mean/{SHADOW}": two}
    assert same(read_checkpoint(out), {**expected, **rest, **statistics})


def test_towards_variable_a_shadow_replaces_its_variable(tmp_path: Path) -> None:
    """The replaced variables are listed; what belongs to the shadow alone is left out."""
    one, average = np.float32([1, 2]), np.float32([5, 6])
    path = write_checkpoint(
        tmp_path / "a.safetensors",
        {
            "a": one,
            f"a/{SHADOW}": average,
            f"b/{SHADOW}": average * 2,
            f"b/{SHADOW}/biased": one,
            f"b/{SHADOW}/local_step": np.float32(3),
            f"c/{SHADOW}_1": one,
            "c": one,
            "global_step": np.int64(9),
        },
    )
    out = tmp_path / "out.safetensors"
    err = cmd("rename", path, "-o", out, *TO_VARIABLE).err.splitlines()
    assert [line for line in err if line.startswith("replaced")] == ["replaced by its shadow: a"]
    assert [line for line in err if line.startswith("left out")] == [
        f"left out: b/{SHADOW}/biased",
        f"left out: b/{SHADOW}/local_step",
    ]
    kept = {f"c/{SHADOW}_1": one, "c": one, "global_step": np.int64(9)}
    assert same(read_checkpoint(out), {"a": average, "b": average * 2, **kept})


def test_another_shadow_name(tmp_path: Path) -> None:
    """`--name` decides what a shadow is called, in both directions."""
    path = write_checkpoint(tmp_path / "a.safetensors", {"a": np.float32([1])})
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    cmd("rename", path, "-o", there, *TO_SHADOW, "--name", "ema")
    assert list(read_checkpoint(there)) == ["a/ema"]
    cmd("rename", there, "-o", back, *TO_VARIABLE, code=13)
    cmd("rename", there, "-o", back, *TO_VARIABLE, "--name", "ema")
    assert list(read_checkpoint(back)) == ["a"]


def test_there_and_back_again(digits_run: Path, tmp_path: Path) -> None:
    """Shadow names to plain names and back: the same names and the same bits."""
    first, plain, again = (tmp_path / f"{name}.safetensors" for name in "abc")
    cmd("run", digits_run, "-o", first, "--decay", "0.9", "-q")
    cmd("rename", first, "-o", plain, *TO_VARIABLE, "-q")
    cmd("rename", plain, "-o", again, *TO_SHADOW, "-q")
    names = read_checkpoint(digits_run / "digits-step-2000.safetensors").keys()
    assert read_checkpoint(plain).keys() == {n for n in names if not n.endswith("/Momentum")}
    assert same(read_checkpoint(again), read_checkpoint(first))


@pytest.mark.parametrize("direction", [TO_SHADOW, TO_VARIABLE], ids=["shadow", "variable"])
def test_every_bit_of_every_dtype_is_kept(tmp_path: Path, direction: tuple[str, ...]) -> None:
    """NaN payloads, signs of zeros, subnormals and dtypes nobody averages are only moved."""
    values = {f"v/{name}": odd_bits(name) for name in CODES}
    values |= {"empty": np.zeros((2, 0, 3), np.float16), "scalar": np.float64(-0.0)}
    saved = {
        (f"{name}/{SHADOW}" if direction == TO_VARIABLE else name): value
        for name, value in values.items()
    }
    path = write_checkpoint(tmp_path / "a.safetensors", saved)
    out = tmp_path / "out.safetensors"
    cmd("rename", path, "-o", out, *direction)
    found = {name.removesuffix(f"/{SHADOW}"): a for name, a in read_checkpoint(out).items()}
    assert same(found, values)


def test_a_tensor_called_like_a_bare_shadow_is_not_lost(tmp_path: Path) -> None:
    """`/ExponentialMovingAverage` is the shadow of no variable: kept, or at least told."""
    values = {f"/{SHADOW}": np.float32([1]), f"a/{SHADOW}": np.float32([2])}
    path = write_checkpoint(tmp_path / "a.safetensors", values)
    done = ema_cli.rename(path, tmp_path / "out.safetensors", names="variable")
    found = read_checkpoint(tmp_path / "out.safetensors")
    assert f"/{SHADOW}" in {*found, *done.left_out}


# ---------------------------------------------------------------------------- disagreements


def refused(path: Path, out: Path, *args: str) -> str:
    """Run a rename that must fail with 13 and leave nothing; return what it says."""
    before = sorted(out.parent.iterdir())
    err = cmd("rename", path, "-o", out, *args, code=13).err
    assert sorted(out.parent.iterdir()) == before
    return err


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    """By a rule, or because the shadow's name is taken: exit 13, both named, nothing written."""
    one = np.float32([1])
    path = write_checkpoint(tmp_path / "a.safetensors", {"x1": one, "x2": one})
    err = refused(path, tmp_path / "out", "--rule", r"\d", "")
    assert "two tensors would be called 'x': 'x1' and 'x2'" in err
    path = write_checkpoint(tmp_path / "b.safetensors", {"a": one, f"a/{SHADOW}": one})
    err = refused(path, tmp_path / "out", *TO_SHADOW)
    assert f"two tensors would be called 'a/{SHADOW}'" in err
    assert "--rule" in err


def test_nothing_to_rename_is_refused(tmp_path: Path) -> None:
    """A copy without any change is not what was asked for; the hint shows how to look."""
    path = write_checkpoint(tmp_path / "a.safetensors", {"a": np.float32([1])})
    err = refused(path, tmp_path / "out", *TO_VARIABLE)
    assert f"no tensor is called <variable>/{SHADOW}" in err
    assert "ema-avg inspect" in err


def test_a_shadow_of_another_shape_does_not_replace(tmp_path: Path) -> None:
    """Whoever loads the result would fail much later."""
    values = {"a": np.float32([1, 2]), f"a/{SHADOW}": np.float32([1])}
    path = write_checkpoint(tmp_path / "a.safetensors", values)
    err = refused(path, tmp_path / "out", *TO_VARIABLE)
    assert f"'a/{SHADOW}' is float32 [1], its variable float32 [2]" in err


def test_an_existing_output_and_the_input_are_refused(tmp_path: Path) -> None:
    """Exit 14; --overwrite replaces an output, never the input."""
    path = write_checkpoint(tmp_path / "a.safetensors", {"a": np.float32([1])})
    out = write_checkpoint(tmp_path / "b.safetensors", {"b": np.float32([1])})
    cmd("rename", path, "-o", out, *TO_SHADOW, code=14)
    assert list(read_checkpoint(out)) == ["b"]
    cmd("rename", path, "-o", out, *TO_SHADOW, "--overwrite")
    assert list(read_checkpoint(out)) == [f"a/{SHADOW}"]
    cmd("rename", path, "-o", path, *TO_SHADOW, "--overwrite", code=14)
    assert list(read_checkpoint(path)) == ["a"]


# ---------------------------------------------------------------------------- rules, formats


def test_rules_apply_in_order_after_the_direction(tmp_path: Path) -> None:
    """Regular expressions with groups, each on the result of the one before."""
    values = {f"encoder/layer_{k}/kernel": np.float32([k]) for k in (1, 12)}
    path = write_checkpoint(tmp_path / "a.safetensors", values)
    out = tmp_path / "out.safetensors"
    rules = ("--rule", r"layer_(\d+)", r"block.\1", "--rule", f"/{SHADOW}$", "/ema")
    cmd("rename", path, "-o", out, *TO_SHADOW, *rules, "--rule", "^encoder/block", "enc")
    assert same(read_checkpoint(out), {f"enc.{k}/kernel/ema": np.float32([k]) for k in (1, 12)})


@pytest.mark.parametrize("rule", [("(", "x"), ("a", r"\1"), ("a", r"\g<name>")])
def test_a_rule_that_is_no_expression_is_a_usage_error(
    tmp_path: Path, rule: tuple[str, str]
) -> None:
    """Exit 2 with the pattern, before anything is written."""
    path = write_checkpoint(tmp_path / "a.safetensors", {"a": np.float32([1])})
    outcome = cmd("rename", path, "-o", tmp_path / "out.safetensors", "--rule", *rule, code=2)
    assert f"--rule '{rule[0]}'" in outcome.err
    assert not (tmp_path / "out.safetensors").exists()


def test_file_and_folder_become_each_other(digits_bf16: Path, tmp_path: Path) -> None:
    """The format follows the option or the suffix; names, bits and side files come along."""
    folder = digits_bf16 / "checkpoint-100"
    file, again, by_option = tmp_path / "a.safetensors", tmp_path / "again", tmp_path / "option"
    cmd("rename", folder, "-o", file, *TO_SHADOW)
    renamed = {
        (name if "num_batches" in name or "running" in name else f"{name}/{SHADOW}")
        for name in contents(folder)
    }
    assert renamed <= read_checkpoint(file).keys()
    cmd("rename", file, "-o", again, *TO_VARIABLE, "--format", "safetensors-folder")
    assert [path.name for path in again.iterdir()] == ["model.safetensors"]
    assert same(contents(again), contents(folder))
    cmd("rename", folder, "-o", by_option, *TO_SHADOW, "--format", "safetensors")
    assert same(read_checkpoint(by_option), read_checkpoint(file))


def test_a_folder_keeps_what_makes_it_load(digits_bf16: Path, tmp_path: Path) -> None:
    """From folder to folder the config comes along; a rule renames inside."""
    folder, out = digits_bf16 / "checkpoint-100", tmp_path / "out"
    cmd("rename", folder, "-o", out, "--rule", "^", "model.")
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert same(contents(out), {f"model.{name}": a for name, a in contents(folder).items()})
    ema_cli.rename(out, tmp_path / "back", rule=[("^model.", "")])
    assert same(contents(tmp_path / "back"), contents(folder))


def test_json_tells_what_was_done(tmp_path: Path) -> None:
    """One result line: the path, the pairs, what was replaced and left out."""
    one = np.float32([1])
    values = {"a": one, f"a/{SHADOW}": one, f"a/{SHADOW}/biased": one}
    path = write_checkpoint(tmp_path / "a.safetensors", values)
    out = tmp_path / "out.safetensors"
    (line,) = cmd("rename", path, "-o", out, *TO_VARIABLE, "--json").out.splitlines()
    assert json.loads(line) == {
        "type": "result",
        "schema": 1,
        "command": "rename",
        "path": str(path),
        "outputs": [{"path": str(out), "status": "written", "bytes": out.stat().st_size}],
        "renamed": [{"from": f"a/{SHADOW}", "to": "a"}],
        "replaced": ["a"],
        "left_out": [{"tensor": f"a/{SHADOW}/biased", "reason": "belongs to a shadow"}],
        "kept_count": 0,
        "notes": [],
    }
    with pytest.raises(Disagreement, match="no tensor is called"):
        ema_cli.rename(out, tmp_path / "more.safetensors", names="variable")
