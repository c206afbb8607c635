"""``ema-avg map``: what a restore asks for, what it finds, and the command that repairs it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import Outcome, cmd, write_checkpoint

import ema_cli

SHADOW = "ExponentialMovingAverage"
ONE = np.float32([1, 2])
MEAN = "layer/moving_mean"


def write(path: Path, *names: str, **others: Any) -> Path:
    """Write a checkpoint with float32 tensors of these names."""
    return write_checkpoint(path, {**dict.fromkeys(names, ONE), **others})


def rows(outcome: Outcome) -> dict[str, tuple[str, str, str]]:
    """The table of a pipe: restore name to variable, source, note."""
    title, *lines = outcome.out.splitlines()
    assert title == "restore name\tvariable\tsource\tnote"
    split = [line.split("\t") for line in lines]
    return {name: (variable, source, note) for name, variable, source, note in split}


def sources(outcome: Outcome) -> dict[str, str]:
    return {name: source for name, (_, source, _) in rows(outcome).items()}


def hint(outcome: Outcome) -> str:
    """The one hint on stderr."""
    (line,) = [text for text in outcome.err.splitlines() if text.startswith("hint: ")]
    return line.removeprefix("hint: ")


def follow(outcome: Outcome, out: Path) -> Path:
    """Run the command of the hint, with `out` for OUT."""
    program, *words = shlex.split(hint(outcome))
    assert program == "ema-avg"
    cmd(*(str(out) if word == "OUT" else word for word in words))
    return out


# ---------------------------------------------------------------------------- rows


def test_an_average_of_ours_restores_by_shadow_names(digits_run: Path, tmp_path: Path) -> None:
    """Variables under their shadows' names, statistics and the step under their own."""
    out = tmp_path / "average.safetensors"
    cmd("run", digits_run, "-o", out, "--decay", "0.9", "-q")
    found = rows(cmd("map", out))
    plain = {f"hidden{k}/batch_norm/moving_{s}" for k in (1, 2) for s in ("mean", "variance")}
    plain.add("global_step")
    assert {name for name, (_, source, _) in found.items() if source == "plain"} == plain
    assert len(found) == len(plain) + 8
    for name, (variable, source, note) in found.items():
        assert note == ""
        assert name == (variable if source == "plain" else f"{variable}/{SHADOW}")


def test_a_row_that_is_missing_makes_the_exit_code_13(tmp_path: Path) -> None:
    """A checkpoint without shadows: the variables miss theirs, the rest is found."""
    path = write(tmp_path / "a.safetensors", "a", "b", MEAN, global_step=np.int64(3))
    outcome = cmd("map", path, code=13)
    note = "only the plain name is saved"
    assert rows(outcome) == {
        f"a/{SHADOW}": ("a", "missing", note),
        f"b/{SHADOW}": ("b", "missing", note),
        MEAN: (MEAN, "plain", ""),
        "global_step": ("global_step", "plain", ""),
    }
    assert "2 restore names missing: this restore would fail" in outcome.err


def test_a_shadow_made_unique_is_named_in_the_note(tmp_path: Path) -> None:
    """TensorFlow called a second average `_1`: the row says where the values are."""
    path = write(tmp_path / "a.safetensors", "a", f"a/{SHADOW}_1", "b", f"b/{SHADOW}")
    found = rows(cmd("map", path, code=13))
    assert found[f"a/{SHADOW}"] == ("a", "missing", f"saved as 'a/{SHADOW}_1'")
    assert found[f"b/{SHADOW}"] == ("b", "shadow", "")


def test_other_names_of_shadows(tmp_path: Path) -> None:
    """`--name` says what shadows are called; others are no shadows of ours."""
    path = write(tmp_path / "a.safetensors", "a/ema", "b/ema")
    assert sources(cmd("map", path, "--name", "ema")) == {"a/ema": "shadow", "b/ema": "shadow"}
    assert set(sources(cmd("map", path, code=13)).values()) == {"missing"}


def test_include_and_exclude_choose_the_moving_average_variables(tmp_path: Path) -> None:
    """The last match wins: what is excluded is asked for plainly, what is included is not."""
    path = write(tmp_path / "a.safetensors", "a", f"b/{SHADOW}", f"{MEAN}/{SHADOW}", MEAN, "c")
    expected = {"a": "plain", f"b/{SHADOW}": "shadow", f"{MEAN}/{SHADOW}": "shadow", "c": "plain"}
    args = ("--exclude", "*", "--include", "b", "--include", "*mean")
    assert sources(cmd("map", path, *args)) == expected
    everything = sources(cmd("map", path, "--include", "*mean", "--exclude", "*", code=13))
    assert everything == {"a": "plain", "b": "missing", MEAN: "plain", "c": "plain"}
    assert "did you mean" in cmd("map", path, "--exclude", "layer/moving_men", code=13).err


# ---------------------------------------------------------------------------- --for


def test_for_a_checkpoint_asks_for_its_variables(tmp_path: Path) -> None:
    """What the program has and the checkpoint lacks is missing; the rest nobody asks for."""
    saved = write(tmp_path / "saved.safetensors", f"a/{SHADOW}", f"z/{SHADOW}", MEAN, "extra")
    program = write(tmp_path / "program.safetensors", "a", MEAN)
    outcome = cmd("map", saved, "--for", program)
    assert sources(outcome) == {f"a/{SHADOW}": "shadow", MEAN: "plain"}
    assert [line for line in outcome.err.splitlines() if "nobody" in line] == [
        f"note: nobody asks for 'z/{SHADOW}'"
    ]
    write(program, "a", MEAN, "b")
    outcome = cmd("map", saved, "--for", program, code=13)
    assert sources(outcome)[f"b/{SHADOW}"] == "missing"


@pytest.mark.parametrize(
    "wanted, text",
    [
        (np.float32([1, 2, 3]), "expected float32 [3], found float32 [2]"),
        (np.float16([1, 2]), "expected float16 [2], found float32 [2]"),
        (np.float32([[1, 2]]), "expected float32 [1, 2], found float32 [2]"),
    ],
    ids=["shape", "dtype", "rank"],
)
def test_a_shape_or_dtype_that_differs_would_fail_to_restore(
    tmp_path: Path, wanted: np.ndarray[Any, Any], text: str
) -> None:
    """TensorFlow checks dtypes and may miss shapes; the map tells both beforehand."""
    saved = write(tmp_path / "saved.safetensors", f"a/{SHADOW}", MEAN)
    program = write_checkpoint(tmp_path / "program.safetensors", {"a": wanted, MEAN: ONE})
    outcome = cmd("map", saved, "--for", program, code=13)
    assert rows(outcome)[f"a/{SHADOW}"] == ("a", "mismatch", text)
    assert "rename" not in hint(outcome)


def test_for_a_list_asks_for_these_names(tmp_path: Path) -> None:
    """One restore name per line, `:0` and blank lines ignored; `-` reads stdin."""
    saved = write(tmp_path / "saved.safetensors", f"a/{SHADOW}", f"b/{SHADOW}", MEAN, "c")
    text = f"a/{SHADOW}:0\n\n  {MEAN}  \nc\na/{SHADOW}\n"
    (tmp_path / "names.txt").write_text(text)
    expected = {f"a/{SHADOW}": "shadow", MEAN: "plain", "c": "plain"}
    for outcome in (
        cmd("map", saved, "--for", tmp_path / "names.txt"),
        cmd("map", saved, "--for", "-", stdin=text),
    ):
        assert sources(outcome) == expected
        assert f"nobody asks for 'b/{SHADOW}'" in outcome.err
    found = ema_cli.restore_map(saved, program=[f"a/{SHADOW}", "d"])
    assert [row.source for row in found.rows] == ["shadow", "missing"]
    assert found.orphans == (f"b/{SHADOW}",)


def test_a_literal_name_that_is_missing_says_what_is_near(tmp_path: Path) -> None:
    """The other name of the same variable, else the name that looks most like it."""
    saved = write(tmp_path / "saved.safetensors", f"a/{SHADOW}", "conv/kernel")
    names = f"a\nconv/kernel/{SHADOW}\nconv/kernle\nqqq\n"
    found = rows(cmd("map", saved, "--for", "-", stdin=names, code=13))
    assert [row[1:] for row in found.values()] == [
        ("missing", f"'a/{SHADOW}' is saved"),
        ("missing", "'conv/kernel' is saved"),
        ("missing", "did you mean 'conv/kernel'"),
        ("missing", ""),
    ]


def test_a_list_that_cannot_be_read_is_an_input_error(tmp_path: Path) -> None:
    """A list that is missing or no text is exit 12, with its name."""
    saved = write(tmp_path / "saved.safetensors", "a")
    (tmp_path / "names.bin").write_bytes(b"a\n\xff\n")
    for name in ("names.bin", "none.txt"):
        assert name in cmd("map", saved, "--for", tmp_path / name, code=12).err


# ---------------------------------------------------------------------------- repairs

Case = tuple[list[str], str | None, list[str]]
REPAIRABLE: Mapping[str, Case] = {
    "plain names only": (["a", "b", MEAN], None, []),
    "another shadow name": (["a", "b"], None, ["--name", "ema"]),
    "plain names asked for": ([f"a/{SHADOW}", f"b/{SHADOW}", MEAN], f"a\nb\n{MEAN}", []),
    "shadow names asked for": (["a", "b", MEAN], f"a/{SHADOW}\nb/{SHADOW}\n{MEAN}", []),
    "statistics by shadow names": (["a", MEAN], f"a/{SHADOW}\n{MEAN}/{SHADOW}", []),
    "some plain names": ([f"a/{SHADOW}", "b"], "a\nb", []),
    "one of each": (["a", f"b/{SHADOW}"], f"a/{SHADOW}\nb", []),
    "made unique": ([f"a/{SHADOW}_1", f"b/{SHADOW}_1"], f"a/{SHADOW}\nb/{SHADOW}", []),
    "made unique beside variables": (["a", f"a/{SHADOW}_1"], None, []),
}


@pytest.mark.parametrize("saved, asked, args", REPAIRABLE.values(), ids=REPAIRABLE)
def test_the_command_of_the_hint_repairs_the_restore(
    tmp_path: Path, saved: list[str], asked: str | None, args: list[str]
) -> None:
    """Run as it is printed, it gives a checkpoint from which everything is found."""
    values = {name: np.float32([k]) for k, name in enumerate(saved)}
    path = write_checkpoint(tmp_path / "it's saved.safetensors", values)
    program = ["--for", "-"] if asked else []
    outcome = cmd("map", path, *program, *args, stdin=asked or "", code=13)
    repaired = follow(outcome, tmp_path / "repaired")
    cmd("map", repaired, *program, *args, stdin=asked or "")


def test_a_repaired_restore_gets_the_averages(tmp_path: Path) -> None:
    """Where an average is saved as `_1`, the repair must not offer the raw variable instead."""
    average = np.float32([7, 7])
    values = {"a": ONE, f"a/{SHADOW}_1": average}
    path = write_checkpoint(tmp_path / "saved.safetensors", values)
    repaired = follow(cmd("map", path, code=13), tmp_path / "repaired.safetensors")
    differences = ema_cli.diff(
        repaired, write_checkpoint(tmp_path / "wanted.safetensors", {f"a/{SHADOW}": average})
    )
    assert f"a/{SHADOW}" not in [d.tensor for d in differences.differences]


def test_a_folder_is_repaired_into_a_folder(digits_bf16: Path, tmp_path: Path) -> None:
    """The hint for a Hugging Face folder works as it stands, too."""
    outcome = cmd("map", digits_bf16 / "checkpoint-100", code=13)
    repaired = follow(outcome, tmp_path / "repaired")
    assert repaired.is_dir()
    cmd("map", repaired)


def test_what_no_renaming_can_repair_is_not_told_to_rename(
    digits_run: Path, tmp_path: Path
) -> None:
    """Optimizer slots or variables that are not there at all need another average."""
    out = tmp_path / "average.safetensors"
    cmd("run", digits_run, "-o", out, "--decay", "0.9", "-q")
    training = digits_run / "digits-step-2000.safetensors"
    slots = cmd("map", out, "--for", training, code=13)
    assert sources(slots)["logits/bias/Momentum"] == "missing"
    unknown = cmd("map", out, "--for", "-", stdin="no such variable", code=13)
    for outcome in (slots, unknown):
        assert hint(outcome)
        assert "ema-avg rename" not in hint(outcome)


# ---------------------------------------------------------------------------- output


def test_json_is_one_document_with_everything(tmp_path: Path) -> None:
    """Rows, orphans, the number of missing names and the hint, nothing else on stdout."""
    path = write(tmp_path / "a.safetensors", "a", f"b/{SHADOW}")
    (line,) = cmd("map", path, "--for", "-", "--json", stdin="a\nc\n", code=13).out.splitlines()
    found = json.loads(line)
    assert {key: found[key] for key in ("type", "schema", "command", "missing_count")} == {
        "type": "result",
        "schema": 1,
        "command": "map",
        "missing_count": 1,
    }
    fields = ("restore_name", "variable", "source")
    assert [[row[f] for f in fields] for row in found["rows"]] == [
        ["a", "a", "plain"],
        ["c", "c", "missing"],
    ]
    assert found["orphans"] == [f"b/{SHADOW}"]
    assert found["hint"]


def test_the_python_code_builds_the_restore_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run in a graph, here a stand-in for one, it maps each restore name to its variable."""
    strange = "quote'\"\\n/ü\n/x"
    path = write(tmp_path / "a.safetensors", f"a/{SHADOW}", f"{strange}/{SHADOW}", MEAN)
    code = cmd("map", path, "--python").out
    compile(code, "printed", "exec")
    variables = [SimpleNamespace(op=SimpleNamespace(name=n)) for n in ("a", MEAN, strange, "more")]
    compat = SimpleNamespace(
        v1=SimpleNamespace(global_variables=lambda: variables, train=SimpleNamespace(Saver=dict))
    )
    tensorflow = ModuleType("tensorflow")
    tensorflow.compat = compat  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    made: dict[str, Any] = {}
    exec(code, made)
    names = {restore: variable.op.name for restore, variable in made["saver"].items()}
    assert names == {f"a/{SHADOW}": "a", f"{strange}/{SHADOW}": strange, MEAN: MEAN}
