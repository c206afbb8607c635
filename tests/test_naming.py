"""Names: roles, globs, output names, and TensorFlow's restore maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import read_checkpoint, write_run
from hypothesis import given
from hypothesis import strategies as st

import ema_cli
from ema_cli import naming
from ema_cli.errors import Disagreement, UsageError
from ema_cli.formats.safetensors import can_name
from ema_cli.naming import Rule
from ema_cli.tensors import Role

SHADOW = "ExponentialMovingAverage"
CASES: dict[str, dict[str, Any]] = {
    case["test"].partition(".")[2]: case
    for case in json.loads(
        (Path(__file__).parent / "data" / "tf_test_cases.json").read_text(encoding="utf-8")
    )
}

# ---------------------------------------------------------------------------- roles


@pytest.mark.parametrize(
    ("role", "names"),
    [
        (
            Role.VARIABLE,
            "conv/kernel conv/beta layers.0.weight Variable Adam/kernel momentum/bias "
            "optimizer_head/kernel step_embedding.weight moving_mean_scale local_step "
            "biased ExponentialMovingAverage ln/gamma exp_avg_pool.weight running_mean.weight",
        ),
        (
            Role.STATISTICS,
            "bn/moving_mean bn/moving_variance bn1.running_mean bn1.running_var moving_mean",
        ),
        (
            Role.OPTIMIZER,
            "conv/kernel/Adam conv/kernel/Adam_1 conv/kernel/Momentum fc/w/RMSProp fc/w/RMSProp_1 "
            "w/Adagrad w/Adadelta_1 w/Ftrl beta1_power beta2_power beta1_power_1 scope/beta1_power "
            "optimizer/learning_rate model/optimizer/x optimizer.state.0.step state.0.exp_avg "
            "0.exp_avg_sq opt_state.mu momentum_buffer bn/moving_mean/Momentum",
        ),
        (
            Role.SHADOW,
            "w/ExponentialMovingAverage a/b/w/ExponentialMovingAverage "
            "w/ExponentialMovingAverage/biased w/ExponentialMovingAverage/local_step "
            "bn/moving_mean/ExponentialMovingAverage",
        ),
        (
            Role.OTHER_SHADOW,
            "w/ExponentialMovingAverage_1 w/ExponentialMovingAverage_2/biased "
            "bn/moving_mean/biased bn/moving_mean/local_step",
        ),
        (Role.COUNTER, "global_step step iterations save_counter"),
    ],
)
def test_roles(role: Role, names: str) -> None:
    """What a tensor is for is told by its name, in TensorFlow's and PyTorch's spelling."""
    found = {name: naming.role_of(name, SHADOW) for name in names.split()}
    assert found == dict.fromkeys(names.split(), role)


def test_roles_follow_the_shadow_name() -> None:
    """Shadows of our --name are ours, those of TensorFlow's default name are somebody else's."""
    assert naming.role_of("w/ema", "ema") is Role.SHADOW
    assert naming.role_of("w/ema/biased", "ema") is Role.SHADOW
    assert naming.role_of(f"w/{SHADOW}", "ema") is Role.OTHER_SHADOW
    assert naming.role_of("w/ema", SHADOW) is Role.VARIABLE
    assert naming.role_of("w/my/ema", "my/ema") is Role.SHADOW


@given(st.text(min_size=1), st.text(min_size=1))
def test_shadow_and_variable_are_inverse(variable: str, name: str) -> None:
    """The shadow of a variable is `variable/name`, and from it the variable is found again."""
    assert naming.shadow_of(variable, name) == f"{variable}/{name}"
    assert naming.variable_of(f"{variable}/{name}", name) == variable
    assert naming.variable_of(f"{variable}/{name}x", name) is None


@pytest.mark.parametrize(
    ("name", "taken", "expected"),
    [
        ("w", [], "w"),
        ("w", ["v"], "w"),
        ("w", ["w"], "w_1"),
        ("w", ["W"], "w_1"),
        ("w", ["w", "w_1", "w_3"], "w_2"),
        ("a/" + SHADOW, ["a", "a/" + SHADOW], f"a/{SHADOW}_1"),
        ("w", ["w_1"], "w"),
    ],
)
def test_unique_name(name: str, taken: list[str], expected: str) -> None:
    """The first of name, name_1, name_2 … that no other has, whatever its case."""
    assert naming.unique_name(name, naming.lowered(taken)) == expected


# ---------------------------------------------------------------------------- globs


@pytest.mark.parametrize(
    ("pattern", "tensor", "expected"),
    [
        ("*", "a/b.c", True),
        ("conv*", "conv1/kernel/sub.x", True),
        ("*/kernel", "a/b/kernel", True),
        ("*.weight", "layers.0.mlp.weight", True),
        ("*/kernel", "kernel", False),
        ("kernel", "conv/kernel", False),
        ("conv", "conv1", False),
        ("layers.?.w", "layers.3.w", True),
        ("layers.?.w", "layers.10.w", False),
        ("l[0-3]", "l2", True),
        ("l[!0-3]", "l2", False),
        ("W", "w", False),
        ("a[0]", "a[0]", True),
        ("a[0]", "a0", True),
        ("a\nb*", "a\nbc", True),
        ("*", "two\nlines", True),
    ],
)
def test_globs(pattern: str, tensor: str, expected: bool) -> None:
    """A glob takes whole names, `*` crosses `/` and `.`, and a name is always its own pattern."""
    assert naming.matches(pattern, tensor) is expected


@pytest.mark.parametrize(
    ("rules", "deciding"),
    [
        ([(False, "*"), (True, "conv/*")], 1),
        ([(True, "conv/*"), (False, "*")], 1),
        ([(False, "*"), (True, "conv/*"), (False, "*/kernel"), (True, "dense*")], 2),
        ([(True, "conv/kernel"), (False, "dense")], 0),
        ([(False, "dense")], None),
        ([], None),
    ],
)
def test_last_match_wins(rules: list[tuple[bool, str]], deciding: int | None) -> None:
    """Of all includes and excludes together the last one that matches decides."""
    made = [Rule(*rule) for rule in rules]
    expected = None if deciding is None else made[deciding]
    assert naming.ruling(made, "conv/kernel") is expected


def test_rule_that_matches_nothing_is_refused() -> None:
    """A pattern without a tensor is exit code 13 and offers names that look like it."""
    with pytest.raises(Disagreement, match="--exclude 'conv/kernal' matches no tensor") as caught:
        naming.check_rules([Rule(False, "conv/kernal")], ["conv/kernel", "dense/bias"])
    assert caught.value.exit_code == 13
    assert "conv/kernel" in caught.value.hint
    naming.check_rules([Rule(False, "conv/*")], ["conv/kernel"])


# ---------------------------------------------------------------------------- output names


def test_rules_are_applied_in_order() -> None:
    """Each --rule replaces all matches of its expression, the next one sees the result."""
    rules = naming.compile_rules([(r"layers\.(\d+)", r"h.\1"), (r"h\.", "block_"), ("^", "m/")])
    assert naming.apply_rules("layers.0.layers.12.w", rules) == "m/block_0.block_12.w"
    assert naming.apply_rules("bias", []) == "bias"


@pytest.mark.parametrize(("pattern", "replacement"), [("(", ""), ("a", r"\1"), ("a", r"\g<x>")])
def test_bad_rules_are_refused(pattern: str, replacement: str) -> None:
    """An expression or a group that does not exist is exit code 2."""
    with pytest.raises(UsageError, match="--rule") as caught:
        naming.apply_rules("aaa", naming.compile_rules([(pattern, replacement)]))
    assert caught.value.exit_code == 2


def test_collisions_are_refused() -> None:
    """Two tensors that would get one name are exit code 13, with all three names."""
    naming.check_distinct([("a", "x"), ("b", "y")], can_name)
    with pytest.raises(Disagreement, match=r"'a': 'x' and 'z'") as caught:
        naming.check_distinct([("a", "x"), ("b", "y"), ("a", "z")], can_name)
    assert caught.value.exit_code == 13


def test_collision_of_a_run(tmp_path: Path) -> None:
    """A rule that maps two variables to one name stops the plan, before any output."""
    run = write_run(tmp_path / "run", [{"a1": [1.0], "a2": [2.0]}] * 2)
    with pytest.raises(Disagreement, match=r"two tensors would be called 'a/"):
        ema_cli.plan_run(run, tmp_path / "o.safetensors", rule=[(r"a\d", "a")])
    output = tmp_path / "o.safetensors"
    ema_cli.average_run(run, output, rule=[(r"a(\d)", r"layer\1/w")], name="avg")
    assert set(read_checkpoint(output)) == {"layer1/w/avg", "layer2/w/avg"}


# ---------------------------------------------------------------------------- restore maps


def saved_map(averaged: dict[str, bool], name: str, saved: set[str] | None = None) -> Any:
    """The rows for a checkpoint that has everything, unless it is given."""
    if saved is None:
        saved = {f"{v}/{name}" for v in averaged} | set(averaged)
    return naming.restore_map(saved, averaged, name)


@pytest.mark.parametrize(
    ("case", "averaged"),
    [
        (
            "testAverageVariablesNames",
            {
                "v0": True,
                "v1": True,
                "v2": False,
                "add/foo": False,
                "add/foo/biased": False,
                "add/foo/local_step": False,
                "v0/foo": False,
                "v1/foo": False,
            },
        ),
        (
            "testAverageVariablesNamesNoDebias",
            {"v0": True, "v1": True, "v2": False, "add/foo": False, "v1/foo": False},
        ),
        ("testSubsetAverageVariablesNames", {"v0": True, "add": True, "v1": False, "v2": False}),
    ],
)
def test_restore_map_is_tensorflows(case: str, averaged: dict[str, bool]) -> None:
    """Averaged variables are asked for by shadow name, all others by their own, once each."""
    inputs, actual = CASES[f"{case}"]["inputs"], CASES[f"{case}"]["tf_actual"]
    rows = saved_map(averaged, inputs["name"])
    assert {row.restore_name: row.variable for row in rows} == actual
    assert all(row.source == "shadow" for row in rows if averaged[row.variable])
    assert all(row.source == "plain" for row in rows if not averaged[row.variable])


@pytest.mark.parametrize(
    ("case", "variables"),
    [
        ("testSubsetAverageVariablesNamesEager", ["v0", "v1", "v2"]),
        ("testImportedGraphVariablesToRestore", ["v"]),
    ],
)
def test_restore_names_are_tensorflows(case: str, variables: list[str]) -> None:
    """Where only names were recorded, these are the names."""
    rows = saved_map(dict.fromkeys(variables, True), "foo_avg")
    assert [row.restore_name for row in rows] == CASES[case]["tf_actual"]


def test_restore_map_tells_what_is_missing() -> None:
    """Missing shadows and variables are rows too, with what is saved instead."""
    averaged = {"a": True, "b": True, "c": True, "d": False}
    rows = {r.variable: r for r in saved_map(averaged, "ema", {"a", "b/ema_1"})}
    assert {row.source for row in rows.values()} == {"missing"}
    assert "plain name is saved" in rows["a"].note
    assert "'b/ema_1'" in rows["b"].note
    assert rows["c"].note == rows["d"].note == ""
    assert rows["d"].restore_name == "d"


def test_restore_map_of_nothing_averaged_is_the_identity() -> None:
    """variables_to_restore([]) asks for every variable under its own name."""
    rows = saved_map({"a": False, "b": False}, "ema")
    assert [(row.restore_name, row.variable) for row in rows] == [("a", "a"), ("b", "b")]
