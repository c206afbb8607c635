"""``--from OUT.ema.json``: the same bytes from the same checkpoints, or an error that says why."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cmd, read_checkpoint, write_checkpoint, write_run

import ema_cli
from ema_cli import record
from ema_cli.errors import DamagedFile, InputChanged, InputError, UsageError

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
FAMILIES = [
    ("digits/run", "a.safetensors", {"decay": 0.9}),
    ("digits/run", "a.npz", {"decay": 0.9, "names": "variable", "optimizer": "drop"}),
    ("digits/bf16", "folder", {"decay": 0.9, "shadow_dtype": "same"}),
    ("digits/bf16", "one.safetensors", {"average": ["mean@last=5"], "dtype": "float32"}),
    ("tensorflow/graph", "tf/avg.ckpt-{step}", {"decay": 0.9, "num_updates": "step"}),
    ("tensorflow/partitioned", "tf/avg.ckpt", {"decay": 0.5, "zero_debias": True}),
    ("torch/run", "a.pt", {"decay": 0.9, "like": "torch"}),
    ("torch/gan", "a.pt", {"average": ["mean"], "key": "netG"}),
    ("torch/hf", "hf", {"average": ["mean"]}),
    ("torch/lightning", "a.ckpt", {"decay": 0.5}),
    ("keras/weights", "a.weights.h5", {"decay": 0.5, "like": "keras"}),
    ("keras/archive", "a.keras", {"average": ["mean"]}),
    ("npz/run", "a.npz", {"average": ["half-life:30"]}),
]
SCHEDULES: list[dict[str, Any]] = [
    {},
    {"decay": "0.99/step"},
    {"decay": 0.9, "num_updates": "count", "init": "zeros"},
    {"average": ["half-life:100@100:300"]},
    {"average": ["lr:cosine"]},
    {"average": ["power:0.1"]},
    {"average": ["weights:WEIGHTS"]},
    {"average": ["w=weights:WEIGHTS@last=4"]},
    {"average": ["mean@last=2"], "non_finite": "allow"},
    {"decay": 0.9, "select": [("exclude", "*"), ("include", "b")]},
    {"decay": 0.9, "last": 3},
    {"decay": 0.9, "steps": "200:"},
    {"decay": 0.9, "names": "shadow", "name": "avg", "keep_variables": True},
    {"decay": 0.9, "rule": [("^", "m/")], "dtype": "float64"},
    {"decay": 0.9, "format": "safetensors-folder", "max_shard_size": "20"},
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four checkpoints, and weights for them."""
    values = [{"a": np.float32([k, k / 3]), "b": np.float32(k * k)} for k in (1, 2, 3, 4)]
    (tmp_path / "WEIGHTS").write_text("100 0.25\n200 3\n300 0.5\nmodel-step-400.safetensors 1\n")
    return write_run(tmp_path / "run", values)


def bytes_of(written: str) -> dict[str, bytes]:
    """The files of an output by their names, but for its provenance and TensorFlow's state."""
    path = Path(written)
    files = sorted(path.rglob("*")) if path.is_dir() else sorted(path.parent.glob(f"{path.name}*"))
    return {
        file.name: file.read_bytes()
        for file in files
        if file.is_file() and not file.name.endswith(".ema.json") and file.name != "checkpoint"
    }


def again(written: str, output: Path, **given: Any) -> str:
    """Average once more what `written` was made of; returns the path of the new output."""
    result = ema_cli.average_run(provenance=f"{written}.ema.json", output=output, **given)
    [one] = result.outputs
    return one.path


def document_of(written: str | Path) -> dict[str, Any]:
    """The provenance of an output."""
    found: dict[str, Any] = json.loads(Path(f"{written}.ema.json").read_text())
    return found


@pytest.mark.parametrize(
    ("family", "name", "given"), FAMILIES, ids=[f"{f}-{n}" for f, n, _ in FAMILIES]
)
def test_every_family_comes_out_the_same(
    tmp_path: Path, family: str, name: str, given: dict[str, Any]
) -> None:
    """Byte for byte, and the new provenance differs in where the output lies only."""
    for folder in ("one/tf", "two/tf"):
        (tmp_path / folder).mkdir(parents=True)
    result = ema_cli.average_run(FIXTURES / family, tmp_path / "one" / name, **given)
    first = result.outputs[0].path
    second = again(first, tmp_path / "two" / name)
    assert bytes_of(first) == bytes_of(second) != {}
    one, two = document_of(first), document_of(second)
    assert one["output"].pop("path") == first
    assert two["output"].pop("path") == second
    assert one == two


@pytest.mark.parametrize("given", SCHEDULES, ids=str)
def test_every_schedule_comes_out_the_same(
    run: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    """Windows, tables of weights that are gone, selections; and no later checkpoint counts."""
    weights = str(tmp_path / "WEIGHTS")
    specs = [spec.replace("WEIGHTS", weights) for spec in given.get("average", ())]
    result = ema_cli.average_run(run, tmp_path / "one", **{**given, "average": specs})
    first = result.outputs[0].path
    (tmp_path / "WEIGHTS").unlink()
    write_checkpoint(run / "model-step-500.safetensors", {"a": np.float32([9, 9]), "b": 9.0})
    second = again(first, tmp_path / "two")
    assert bytes_of(first).keys() == bytes_of(second).keys() or Path(first).is_file()
    assert list(bytes_of(first).values()) == list(bytes_of(second).values())
    assert document_of(first)["plan"] == document_of(second)["plan"]


def test_several_averages_have_a_provenance_each(run: Path, tmp_path: Path) -> None:
    """One of them is made again, under its label."""
    result = ema_cli.average_run(
        run, tmp_path / "{average}.safetensors", average=["mean", "fast=ema:0.5"]
    )
    for written in result.outputs:
        second = again(written.path, tmp_path / "again-{average}.safetensors")
        assert Path(second).name == f"again-{Path(written.path).name}"
        assert bytes_of(written.path).popitem()[1] == bytes_of(second).popitem()[1]


def test_names_within_a_run_are_known_again(tmp_path: Path) -> None:
    """A table of weights may call checkpoints by their paths in the run."""
    for k in (1, 2):
        write_checkpoint(tmp_path / f"run/at-{k}/m.safetensors", {"a": np.float32([k])})
    (tmp_path / "w").write_text("at-1/m.safetensors 1\nat-2/m.safetensors 3\n")
    given = {"average": [f"weights:{tmp_path / 'w'}"], "glob": "*/m.safetensors"}
    given["names"] = "variable"
    ema_cli.average_run(tmp_path / "run", tmp_path / "o.safetensors", **given)
    second = again(str(tmp_path / "o.safetensors"), tmp_path / "p.safetensors")
    assert read_checkpoint(second)["a"].tolist() == [1.75]


@pytest.fixture
def out(run: Path, tmp_path: Path) -> Path:
    """An output of the four checkpoints."""
    path = tmp_path / "o.safetensors"
    ema_cli.average_run(run, path, decay=0.5)
    return path


def test_the_command_takes_the_output_or_its_provenance(out: Path, tmp_path: Path) -> None:
    """``run --from``, ``plan --from`` and a dry run; what is there already is unchanged."""
    cmd("run", "--from", f"{out}.ema.json", "-o", tmp_path / "p.safetensors")
    assert (tmp_path / "p.safetensors").read_bytes() == out.read_bytes()
    told = cmd("run", "--from", out, "-o", tmp_path / "p.safetensors").out
    assert told.startswith("unchanged")
    told = cmd("plan", "--from", out).out
    rows = [line.split("\t") for line in told.splitlines() if line.count("\t") == 3]
    assert [row[1] for row in rows[1:]] == ["100", "200", "300", "400"]
    assert cmd("run", "-n", "--from", out).out == told
    assert ema_cli.plan_run(provenance=out).run.steps == [100, 200, 300, 400]


def test_what_the_output_looks_like_may_be_said_again(run: Path, tmp_path: Path) -> None:
    """Options of the output override what is recorded, default words too; suffixes count."""
    first = tmp_path / "o.safetensors"
    ema_cli.average_run(run, first, decay=0.5, names="shadow", dtype="float64")
    cmd("run", "--from", first, "-o", tmp_path / "p.safetensors", "--names", "variable")
    found = read_checkpoint(tmp_path / "p.safetensors")
    assert set(found) == {"a", "b"}
    assert found["a"].dtype == np.float64
    plain = tmp_path / "p.safetensors"  # whose recorded names are those that were given
    cmd("run", "--from", plain, "-o", tmp_path / "q.npz", "--dtype", "float32")
    with np.load(tmp_path / "q.npz") as arrays:
        assert set(arrays.files) == {"a", "b"}
        assert arrays["a"].dtype == np.float32
    cmd("run", "--from", plain, "-o", tmp_path / "s.safetensors", "--names", "auto")
    assert set(read_checkpoint(tmp_path / "s.safetensors")) == {
        f"{name}/ExponentialMovingAverage" for name in "ab"
    }
    cmd("run", "--from", first, "-o", tmp_path / "same", "-q")
    assert (tmp_path / "same").read_bytes() == first.read_bytes()
    cmd("run", "--from", first, "-o", tmp_path / "d", "--format", "safetensors-folder")
    assert (tmp_path / "d").is_dir()
    ema_cli.average_run(provenance=first, output=tmp_path / "r.safetensors", names="variable")
    assert set(read_checkpoint(tmp_path / "r.safetensors")) == {"a", "b"}


def test_what_was_written_without_a_suffix_keeps_its_format(tmp_path: Path, run: Path) -> None:
    """A format that was asked for is asked for again, unless the new suffix tells another."""
    ema_cli.average_run(run, tmp_path / "o", decay=0.5, format="npz")
    again(str(tmp_path / "o"), tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == (tmp_path / "o").read_bytes()
    again(str(tmp_path / "o"), tmp_path / "q.safetensors")
    assert read_checkpoint(tmp_path / "q.safetensors")


BESIDE = [
    ["RUN"],
    ["--last", "2"],
    ["--glob", "*"],
    ["--steps", "1:"],
    ["--step-from", "x"],
    ["--order", "given"],
    ["--key", "a"],
    ["--state", "STATE"],
    ["--decay", "0.5"],
    ["--average", "mean"],
    ["--num-updates", "none"],
    ["--include", "a"],
    ["--exclude", "a"],
    ["--like", "tensorflow"],
    ["--non-finite", "error"],
    ["--init", "first"],
    ["--zero-debias"],
    ["--name", "x"],
    ["--statistics", "copy"],
    ["--shadow-dtype", "auto"],
]


@pytest.mark.parametrize("words", BESIDE, ids=lambda words: words[0])
@pytest.mark.parametrize("command", ["run", "plan"])
def test_what_is_decided_cannot_be_given(
    run: Path, out: Path, tmp_path: Path, command: str, words: list[str]
) -> None:
    """RUN and every option of inputs and averages: a usage error that names it."""
    given = [str(run) if word == "RUN" else word for word in words]
    told = cmd(command, "--from", out, "-o", tmp_path / "p", *given, code=2).err
    assert f"--from: {words[0]} beside it" in told
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    "keyword",
    [
        {"runs": "x"},
        {"runs": ["x"]},
        {"last": 2},
        {"decay": 0.9},
        {"average": ["mean"]},
        {"select": [("include", "a")]},
        {"state": "s"},
        {"zero_debias": True},
        {"name": "x"},
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [ema_cli.average_run, ema_cli.plan_run])
def test_keywords_cannot_either(
    function: Callable[..., Any], out: Path, tmp_path: Path, keyword: dict[str, Any]
) -> None:
    """The functions refuse the same."""
    with pytest.raises(UsageError, match=f"--from: {next(iter(keyword))} beside it"):
        function(provenance=out, output=tmp_path / "p", **keyword)


def test_something_has_to_be_averaged() -> None:
    """Neither a run nor a provenance is a usage error."""
    assert "RUN" in cmd("run", "-o", "x", code=2).err
    assert "RUN" in cmd("plan", code=2).err
    with pytest.raises(UsageError, match="runs: expected"):
        ema_cli.plan_run()
    with pytest.raises(UsageError, match="runs: expected"):
        ema_cli.average_run(output="x", state="s")


def test_settings_from_elsewhere_do_not_change_what_is_replayed(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the environment nor a file is asked for what the provenance tells."""
    (tmp_path / "c.toml").write_text('[run]\nlast = 2\naverage = "mean"\nname = "x"\n')
    for name, value in {"DECAY": "0.1", "NAMES": "shadow", "STATE": "s", "INCLUDE": "a"}.items():
        monkeypatch.setenv(f"EMA_AVG_RUN_{name}", value)
    second = tmp_path / "p.safetensors"
    cmd("run", "--config", tmp_path / "c.toml", "--from", out, "-o", second)
    assert second.read_bytes() == out.read_bytes()
    assert document_of(second)["request"] == document_of(out)["request"]


def test_overwrite_and_strict_are_never_taken_from_it(run: Path, tmp_path: Path) -> None:
    """They are said each time; warnings count as they do for a run."""
    first = tmp_path / "o.safetensors"
    ema_cli.average_run(run, first, decay=0.999, overwrite=True)
    (tmp_path / "p.safetensors").write_bytes(b"mine")
    cmd("run", "--from", first, "-o", tmp_path / "p.safetensors", code=14)
    told = cmd("run", "--from", first, "-o", tmp_path / "q", "--strict", code=2).err
    assert "first-dominates" in told
    cmd("run", "--from", first, "-o", tmp_path / "p.safetensors", "--overwrite")
    assert (tmp_path / "p.safetensors").read_bytes() == first.read_bytes()
    hint = cmd("run", "--from", first, code=2).err
    assert f"ema-avg run --from {first} -o" in hint


# ---------------------------------------------------------------------------- sources


def test_sources_that_moved_with_the_output_are_found(run: Path, out: Path, tmp_path: Path) -> None:
    """Beside the output, under their names; their times may be others, which is noted."""
    new = tmp_path / "elsewhere"
    shutil.copytree(run, new)
    shutil.copy(f"{out}.ema.json", new)
    shutil.rmtree(run)
    for path in new.glob("model*"):
        os.utime(path, (1, 1))
    told = cmd("run", "--from", new / f"{out.name}.ema.json", "-o", tmp_path / "p.safetensors").err
    assert "4 checkpoints of another time than recorded" in told
    assert (tmp_path / "p.safetensors").read_bytes() == out.read_bytes()


def test_a_source_that_is_gone_is_named(run: Path, out: Path, tmp_path: Path) -> None:
    """Exit code 12, and nothing is written."""
    (run / "model-step-300.safetensors").unlink()
    told = cmd("run", "--from", out, "-o", tmp_path / "p", code=12).err
    assert f"{run}/model-step-300.safetensors: no such checkpoint" in told
    assert not (tmp_path / "p").exists()


def test_relative_paths_say_where_they_are_looked_for(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provenance made in one directory does not work in another."""
    monkeypatch.chdir(tmp_path)
    cmd("run", "run", "-o", "o.safetensors", "--decay", "0.5")
    cmd("run", "--from", "o.safetensors", "-o", "p.safetensors")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    told = cmd("run", "--from", "../o.safetensors", "-o", "p.safetensors", code=12).err
    assert "in the directory where the output was made" in told


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a": np.float32([3, 1, 1]), "b": np.float32(9)}, "expected [0-9]+ bytes, found"),
        ({"a": np.float32([3, 1]), "c": np.float32(9)}, "expected the header it had"),
    ],
)
def test_a_source_that_changed_is_named(
    run: Path, out: Path, tmp_path: Path, tensors: dict[str, Any], words: str
) -> None:
    """By its size, or by its header; before anything else is found wrong with it."""
    write_checkpoint(run / "model-step-300.safetensors", tensors)
    with pytest.raises(InputChanged, match=f"model-step-300.safetensors: changed since.*{words}"):
        ema_cli.average_run(provenance=out, output=tmp_path / "p")


def test_a_source_of_other_files_is_named(tmp_path: Path) -> None:
    """A folder that got another shard."""
    run = tmp_path / "run"
    shutil.copytree(FIXTURES / "digits" / "bf16", run)
    ema_cli.average_run(run, tmp_path / "o", decay=0.5, last=2)
    folder = run / "checkpoint-2000"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    one = sorted(set(index["weight_map"].values()))[0]
    (folder / one).rename(folder / "other.safetensors")
    index["weight_map"] = {
        k: "other.safetensors" if v == one else v for k, v in index["weight_map"].items()
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputChanged, match="expected the files it had"):
        ema_cli.average_run(provenance=tmp_path / "o", output=tmp_path / "p")


def test_recorded_steps_count(run: Path, out: Path, tmp_path: Path) -> None:
    """A name need not tell them any more."""
    document = document_of(out)
    for k, row in enumerate(document["inputs"]):
        new = str(tmp_path / "beside" / f"{'dcba'[k]}.safetensors")
        Path(new).parent.mkdir(exist_ok=True)
        shutil.move(row["path"], new)
        row["path"] = row["files"][0]["path"] = new
    where = tmp_path / "renamed.ema.json"
    where.write_text(json.dumps(document))
    plan = ema_cli.plan_run(provenance=where)
    assert plan.run.steps == [100, 200, 300, 400]
    ema_cli.average_run(provenance=where, output=tmp_path / "p.safetensors")
    assert (tmp_path / "p.safetensors").read_bytes() == out.read_bytes()


def test_an_export_of_a_state_can_be_averaged_again(run: Path, tmp_path: Path) -> None:
    """From its sources, without the state."""
    cmd("run", run, "--state", tmp_path / "s", "--decay", "0.5", "-o", tmp_path / "a.safetensors")
    cmd("export", tmp_path / "s", "-o", tmp_path / "b.safetensors")
    shutil.rmtree(tmp_path / "s")
    for name in "ab":
        first = tmp_path / f"{name}.safetensors"
        second = again(str(first), tmp_path / f"{name}2.safetensors")
        assert Path(second).read_bytes() == first.read_bytes()


# ---------------------------------------------------------------------------- documents


def test_what_is_no_provenance_is_refused(run: Path, tmp_path: Path) -> None:
    """Nothing there, no JSON, no object, another schema."""
    with pytest.raises(InputError, match=r"expected an OUT\.ema\.json"):
        ema_cli.plan_run(provenance=run)
    with pytest.raises(InputError, match=r"(?i)no such file"):
        ema_cli.plan_run(provenance=tmp_path / "x.ema.json")
    for text in ("", "{", "[]", "null", '{"schema": 2}', "[" * 100_000):
        (tmp_path / "x.ema.json").write_text(text)
        with pytest.raises(DamagedFile, match="no provenance"):
            ema_cli.plan_run(provenance=tmp_path / "x.ema.json")


def test_of_a_renamed_copy_nothing_was_averaged(out: Path, tmp_path: Path) -> None:
    """The error says so."""
    cmd("rename", out, "-o", tmp_path / "r.safetensors", "--rule", "^", "m.")
    told = cmd("plan", "--from", tmp_path / "r.safetensors", code=12).err
    assert "found that of a renamed copy" in told


def test_a_document_without_a_request_is_too_old(out: Path, tmp_path: Path) -> None:
    """As earlier versions wrote."""
    document = document_of(out)
    del document["request"]
    (tmp_path / "x.ema.json").write_text(json.dumps(document))
    assert "earlier version" in cmd("plan", "--from", tmp_path / "x.ema.json", code=12).err


def test_values_from_memory_cannot_be_averaged_again(out: Path, tmp_path: Path) -> None:
    """The class writes no paths."""
    document = document_of(out)
    for row in document["inputs"]:
        row["path"], row["files"] = "", []
    (tmp_path / "x.ema.json").write_text(json.dumps(document))
    assert "values in memory" in cmd("plan", "--from", tmp_path / "x.ema.json", code=12).err


def test_a_document_is_enough(out: Path, tmp_path: Path) -> None:
    """Its output may be gone, or be another by now."""
    before = out.read_bytes()
    out.write_bytes(b"something else")
    second = again(str(out), tmp_path / "p.safetensors")
    assert Path(second).read_bytes() == before


WRONG: list[Any] = [None, True, -1, 1.5, 10**400, "", "x\0", [], {}, [None], [[]], [{}], {"a": 1}]


def test_hostile_documents_are_errors_of_ours(out: Path, tmp_path: Path) -> None:
    """Every member of the inputs and the output in turn is something else, or missing."""
    text = json.dumps(document_of(out))
    ways: list[tuple[Any, ...]] = [("inputs",), ("output",), ("request",), ("schema",)]
    document = json.loads(text)
    ways += [("inputs", 1), *(("inputs", 1, key) for key in document["inputs"][1])]
    ways += [("inputs", 1, "files", 0, key) for key in document["inputs"][1]["files"][0]]
    ways += [("output", key) for key in document["output"]]
    refused = 0
    for way in ways:
        for value in [*WRONG, "missing"]:
            changed = json.loads(text)
            place = changed
            for key in way[:-1]:
                place = place[key]
            place[way[-1]] = value
            if value == "missing" and isinstance(place, dict):
                del place[way[-1]]
            (tmp_path / "x.ema.json").write_text(json.dumps(changed))
            try:
                plan = ema_cli.plan_run(provenance=tmp_path / "x.ema.json")
            except InputError:
                refused += 1
            else:
                assert plan.run.steps
    assert refused > 120


def test_the_plan_digest_is_that_of_the_output(out: Path) -> None:
    """What would be written is what was written."""
    plan = ema_cli.plan_run(provenance=out)
    [outcome] = plan.outcomes
    digest = record.plan_digest(record.describe(plan, outcome), outcome)
    assert digest == document_of(out)["plan"]
