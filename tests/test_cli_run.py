"""``ema-avg run``: what it says, where it says it, and what the options make of the output."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from helpers import bits_equal, cmd, read_checkpoint, write_checkpoint, write_run

SHADOW = "/ExponentialMovingAverage"


def tensors(k: int, **more: Any) -> dict[str, Any]:
    """Checkpoint k: every floating value is k, so an average of 1, 2, 3 is known by heart."""
    return {
        "w": np.full((2, 3), k, np.float32),
        "w/Adam": np.full((2, 3), 100 + k, np.float32),
        "bn/moving_mean": np.full(3, k, np.float32),
        "global_step": np.int64(100 * k),
        **more,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints with the values 1, 2, 3; with decay 0.5 their average is 2.25."""
    return write_run(tmp_path / "run", [tensors(k) for k in (1, 2, 3)])


# ---------------------------------------------------------------------------- what it says


def test_stdout_is_one_line_per_output_with_the_path_last(run: Path, tmp_path: Path) -> None:
    """Two averages: two lines, in the order asked for, each ending with its path."""
    out = tmp_path / "o-{average}.safetensors"
    said = cmd("run", run, "-o", out, "--average", "b=mean", "--average", "a=ema:0.5").out
    expected = [str(tmp_path / f"o-{label}.safetensors") for label in ("b", "a")]
    assert [line.split()[-1] for line in said.splitlines()] == expected


def test_stderr_tells_what_the_result_is_made_of(run: Path, tmp_path: Path) -> None:
    """Used, passed over, averaged, copied, left out, first and last weight, bytes, seconds."""
    (run / "notes.txt").write_text("mine")
    err = cmd("run", run, "-o", tmp_path / "o.safetensors", "--decay", "0.5").err
    assert "3 checkpoints averaged" in err
    assert f"passed over: {run / 'notes.txt'}: not a checkpoint" in err
    assert "2 tensors averaged, 1 copied, 1 left out" in err
    assert "25.0 % (step 100)" in err
    assert "50.0 % (step 300)" in err
    assert "read 116 bytes of 3 checkpoints in" in err  # 3 x (24 + 12) and one int64
    assert err.rstrip().endswith(" s")


def test_the_loading_line_for_shadows_is_a_command_that_runs(run: Path, tmp_path: Path) -> None:
    """The last hint of a run with shadow names is a finished ``ema-avg map`` command."""
    err = cmd("run", run, "-o", tmp_path / "it's o.safetensors", "--decay", "0.5").err
    line = next(line for line in err.splitlines() if "check it: " in line)
    words = shlex.split(line.split("check it: ")[1])
    assert words[0] == "ema-avg"
    assert f"w{SHADOW}" in cmd(*words[1:]).out


def test_the_loading_line_for_variables_is_code_that_loads_it(run: Path, tmp_path: Path) -> None:
    """With plain names the line is Python, and evaluating it gives the tensors."""
    out = tmp_path / "it's o.safetensors"
    err = cmd("run", run, "-o", out, "--decay", "0.5", "--names", "variable").err
    line = next(line for line in err.splitlines() if "load it: " in line)
    loaded = eval(line.split("load it: ")[1], {"safetensors": safetensors})
    assert loaded["w"].tolist() == [[2.25] * 3] * 2


def test_quiet_leaves_stderr_to_errors(run: Path, tmp_path: Path) -> None:
    """``-q``: no summary and no warning; the path stays on stdout, an error on stderr."""
    out = tmp_path / "o.safetensors"
    outcome = cmd("run", run, "-o", out, "--decay", "0.99", "-q")
    assert not outcome.err
    assert outcome.out.split()[-1] == str(out)
    assert "exists" in cmd("run", run, "-o", out, "--decay", "0.5", "-q", code=14).err


@pytest.mark.parametrize("command", ["run", "plan"])
def test_piped_output_has_no_escapes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Nothing but text reaches a pipe, even when the environment asks for colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    outcome = cmd(command, run, "-o", tmp_path / "o.safetensors", "--decay", "0.99")
    assert outcome.out and outcome.err
    assert "\x1b" not in outcome.out + outcome.err
    assert "\r" not in outcome.out + outcome.err


# ---------------------------------------------------------------------------- names


def averaged(run: Path, *options: str) -> dict[str, np.ndarray]:
    """The output of a run with decay 0.5 and these options."""
    out = run.parent / "out.safetensors"
    cmd("run", run, "-o", out, "--decay", "0.5", *options)
    return read_checkpoint(out)


def test_shadow_names_by_default_with_statistics_under_both(run: Path) -> None:
    """A single file gets shadow names; statistics stand under their own name as well."""
    found = averaged(run)
    statistics = "bn/moving_mean"
    assert set(found) == {f"w{SHADOW}", statistics, statistics + SHADOW, "global_step"}
    assert found[f"w{SHADOW}"].tolist() == [[2.25] * 3] * 2
    assert bits_equal(found[statistics], found[statistics + SHADOW])
    assert found["global_step"] == 300


def test_variable_names_are_plain(run: Path) -> None:
    """``--names variable`` keeps the structure of the last checkpoint, optimizer included."""
    found = averaged(run, "--names", "variable")
    assert list(found) == list(tensors(3))
    assert bits_equal(found["w/Adam"], tensors(3)["w/Adam"])
    assert found["w"].tolist() == [[2.25] * 3] * 2


def test_the_name_of_the_shadows_is_a_choice(run: Path) -> None:
    """``--name`` replaces the word after the variable."""
    assert "w/polyak" in averaged(run, "--name", "polyak")


def test_keep_variables_writes_the_last_raw_values_beside(run: Path) -> None:
    """``--keep-variables``: the variable holds the last value, its shadow the average."""
    found = averaged(run, "--keep-variables")
    assert found["w"].tolist() == [[3.0] * 3] * 2
    assert found[f"w{SHADOW}"].tolist() == [[2.25] * 3] * 2


def test_keep_variables_needs_shadow_names(run: Path, tmp_path: Path) -> None:
    """With plain names the averages stand where the raw values would: exit 2."""
    options = ("--keep-variables", "--names", "variable")
    cmd("run", run, "-o", tmp_path / "o.safetensors", *options, code=2)


def test_rules_rename_one_after_the_other(run: Path) -> None:
    """Each ``--rule`` is applied to the names the one before it left."""
    rules = ("--rule", r"^(w)/.*", r"\1.ema", "--rule", "ema", "mean")
    assert "w.mean" in averaged(run, *rules)


def test_rules_that_give_two_tensors_one_name_are_refused(run: Path, tmp_path: Path) -> None:
    """A collision of names is exit 13 and names both tensors."""
    options = ("--names", "variable", "--rule", "^(w|bn/moving_mean)$", "x")
    err = cmd("run", run, "-o", tmp_path / "o.safetensors", *options, code=13).err
    assert "'w'" in err
    assert "'bn/moving_mean'" in err


@pytest.mark.parametrize(("pattern", "replacement"), [("(", ""), ("w", r"\2"), ("[", "x")])
def test_a_bad_rule_is_a_usage_error(run: Path, pattern: str, replacement: str) -> None:
    """A pattern or replacement that ``re`` refuses is exit 2, not a crash."""
    cmd("run", run, "-o", run.parent / "o.safetensors", "--rule", pattern, replacement, code=2)


# ---------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtype_is_of_the_averaged_tensors_only(run: Path, dtype: str) -> None:
    """``--dtype`` converts averages; what is copied keeps its own type."""
    found = averaged(run, "--dtype", dtype)
    assert found[f"w{SHADOW}"].dtype.name == dtype
    assert found[f"w{SHADOW}"].astype(np.float32).tolist() == [[2.25] * 3] * 2
    assert found["global_step"].dtype == np.int64


@pytest.mark.parametrize(("choice", "kept"), [("auto", False), ("drop", False), ("keep", True)])
def test_optimizer_state_in_a_new_layout(run: Path, choice: str, kept: bool) -> None:
    """New names drop the optimizer's state unless it is asked for; then it is the last one's."""
    found = averaged(run, "--optimizer", choice)
    assert ("w/Adam" in found) is kept
    if kept:
        assert found["w/Adam"].tolist() == [[103.0] * 3] * 2


def test_statistics_can_be_copied_as_tensorflow_does(run: Path) -> None:
    """``--statistics copy`` takes them from the last checkpoint, without a shadow."""
    found = averaged(run, "--statistics", "copy")
    assert found["bn/moving_mean"].tolist() == [3.0] * 3
    assert f"bn/moving_mean{SHADOW}" not in found


def test_zero_debias_writes_what_tensorflow_saves(run: Path) -> None:
    """The biased shadow and the update count stand beside the debiased value."""
    found = averaged(run, "--zero-debias")
    assert found[f"w{SHADOW}/biased"].tolist() == [[2.125] * 3] * 2  # 0 -> 0.5 -> 1.25 -> 2.125
    assert found[f"w{SHADOW}/local_step"].shape == ()
    assert found[f"w{SHADOW}/local_step"] == 3
    np.testing.assert_allclose(found[f"w{SHADOW}"], 2.125 / (1 - 0.5**3), rtol=1e-6)
    plain = averaged(run, "--zero-debias", "--names", "variable", "--overwrite")
    assert set(plain) == set(tensors(3))


def test_our_own_shadows_in_the_inputs_are_replaced_and_others_copied(tmp_path: Path) -> None:
    """A stale shadow of our name gives way, and the plan says so; other shadows are copied."""
    stale = {f"w{SHADOW}": np.full((2, 3), -1, np.float32), "w/polyak": np.float32(7)}
    run = write_run(tmp_path / "run", [tensors(k, **stale) for k in (1, 2, 3)])
    assert averaged(run)[f"w{SHADOW}"].tolist() == [[2.25] * 3] * 2
    assert "1 tensor (replaced by this average)" in cmd("plan", run, "--decay", "0.5").out
    renamed = averaged(run, "--name", "polyak", "--overwrite")
    assert renamed["w/polyak"].shape == (2, 3)
    assert renamed[f"w{SHADOW}"].tolist() == [[-1.0] * 3] * 2


def test_one_checkpoint_is_its_own_average_and_warns(tmp_path: Path) -> None:
    """The result is that checkpoint, bit for bit, and a warning says so."""
    value = {"w": np.float32([1e-45, -0.0, 3.3])}
    path = write_checkpoint(tmp_path / "model-step-7.safetensors", value)
    out = tmp_path / "o.safetensors"
    assert "[one-checkpoint]" in cmd("run", path, "-o", out, "--decay", "0.9").err
    assert bits_equal(read_checkpoint(out)[f"w{SHADOW}"], value["w"])


# ---------------------------------------------------------------------------- folders


SHARDS = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
INDEX = "model.safetensors.index.json"


def test_a_folder_keeps_the_structure_of_the_last_one(digits_bf16: Path, tmp_path: Path) -> None:
    """Headers and index of the last checkpoint, byte for byte; what is copied stays itself."""
    out, last = tmp_path / "averaged", digits_bf16 / "checkpoint-2000"
    cmd("run", digits_bf16, "-o", out, "--decay", "0.5")
    assert {path.name for path in out.iterdir()} == {*SHARDS, INDEX, "config.json"}
    assert (out / INDEX).read_bytes() == (last / INDEX).read_bytes()
    for shard in SHARDS:
        raw = (last / shard).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        assert (out / shard).read_bytes()[:start] == raw[:start]
        before, after = read_checkpoint(last / shard), read_checkpoint(out / shard)
        same = {name for name in before if bits_equal(before[name], after[name])}
        assert same == {name for name in before if name.endswith("num_batches_tracked")}


def test_side_files_come_along_by_allow_list(digits_bf16: Path, tmp_path: Path) -> None:
    """What a folder needs to load is copied: small files, no links, no training state."""
    run = tmp_path / "run"
    shutil.copytree(digits_bf16, run, ignore=shutil.ignore_patterns("checkpoint-[3-9]*"))
    last = run / "checkpoint-2000"
    wanted = ["config.json", "config_extra.json", "generation_config.json", "tokenizer.json"]
    wanted += ["tokenizer.model", "tokenizer_config.json", "vocab.txt", "merges.txt"]
    wanted += ["special_tokens_map.json", "chat_template.jinja", "modeling_mine.py"]
    unwanted = ["optimizer.pt", "trainer_state.json", "rng_state.pth", "training_args.bin"]
    unwanted += ["scheduler.pt", "notes.txt", "README.md"]
    for name in wanted + unwanted:
        (last / name).write_text('{"global_step": 2000}')
    (last / "config_dir.json").mkdir()
    os.mkfifo(last / "pipe.py")
    os.truncate(last / "tokenizer.json", (64 << 20) + 1)
    (last / "vocab.json").symlink_to("/etc/hostname")
    out = tmp_path / "averaged"
    said = cmd("plan", run, "-o", out, "--decay", "0.5").out
    cmd("run", run, "-o", out, "--decay", "0.5")
    expected = set(wanted) - {"tokenizer.json"}
    assert {path.name for path in out.iterdir()} == {*SHARDS, INDEX, *expected}
    assert all((out / name).read_bytes() == (last / name).read_bytes() for name in expected)
    assert all(f"beside the weights: {name}\n" in said for name in expected)
    assert not any(f"weights: {name}\n" in said for name in [*unwanted, "vocab.json"])


@pytest.mark.parametrize("form", ["safetensors", "safetensors-folder"])
@pytest.mark.parametrize("source", ["files", "folders"])
def test_formats_convert_into_each_other(
    request: pytest.FixtureRequest, tmp_path: Path, source: str, form: str
) -> None:
    """Whatever the form, the tensors have the bits of the default output; shards obey the limit."""
    run = request.getfixturevalue("digits_run" if source == "files" else "digits_bf16")
    words = ["--decay", "0.5", "--names", "variable", "--optimizer", "drop"]
    plain, out = tmp_path / "plain", tmp_path / "out"
    cmd("run", run, "-o", plain, *words)
    limit = ["--max-shard-size", "4KB"] if form.endswith("folder") else []
    cmd("run", run, "-o", out, *words, "--format", form, *limit)

    def tensors(path: Path) -> dict[str, np.ndarray]:
        files = path.glob("*.safetensors") if path.is_dir() else [path]
        return {name: value for file in files for name, value in read_checkpoint(file).items()}

    wanted, found = tensors(plain), tensors(out)
    assert set(found) == set(wanted)
    assert all(bits_equal(found[name], wanted[name]) for name in wanted)
    if limit:
        sizes = [sum(v.nbytes for v in read_checkpoint(p).values()) for p in out.glob("*.safe*rs")]
        largest = max(value.nbytes for value in found.values())
        assert len(sizes) > 1
        assert max(sizes) <= max(4000, largest)
        weight_map = json.loads((out / INDEX).read_bytes())["weight_map"]
        assert all(name in read_checkpoint(out / shard) for name, shard in weight_map.items())
