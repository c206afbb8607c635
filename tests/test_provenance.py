"""What a plan announces is what a run writes, and ``OUT.ema.json`` keeps telling the truth."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastcrc import crc32
from helpers import cmd, read_checkpoint, write_checkpoint, write_run

import ema_cli
from ema_cli.engine import Progress

SHADOW = "/ExponentialMovingAverage"
SHARED = ("average", "inputs", "averaged", "copied", "left_out")


def announced(*words: Any) -> dict[str, Any]:
    """The result document of ``plan --json``."""
    return json.loads(cmd("plan", *words, "--json").out.splitlines()[-1])


def provenance(out: Path) -> dict[str, Any]:
    """The document beside an output."""
    return json.loads(Path(f"{out}.ema.json").read_bytes())


def files_of(out: Path) -> dict[str, Path]:
    """The files of an output by the names its provenance knows them by."""
    return {path.name: path for path in out.iterdir()} if out.is_dir() else {"": out}


def tensors_of(out: Path) -> dict[str, np.ndarray]:
    """All tensors of an output, whatever number of files it has."""
    found: dict[str, np.ndarray] = {}
    for name, path in files_of(out).items():
        if name.endswith(".safetensors") or not name:
            found |= read_checkpoint(path)
    return found


CASES = [
    ({}, []),
    ({"decay": 0.9}, ["--decay", "0.9"]),
    ({"names": "variable"}, ["--names", "variable"]),
    ({"keep_variables": True, "names": "shadow"}, ["--keep-variables", "--names", "shadow"]),
    ({"zero_debias": True, "decay": "0.9"}, ["--zero-debias", "--decay", "0.9"]),
    ({"statistics": "copy"}, ["--statistics", "copy"]),
    ({"optimizer": "keep"}, ["--optimizer", "keep"]),
    ({"optimizer": "drop", "names": "variable"}, ["--optimizer", "drop", "--names", "variable"]),
    ({"dtype": "float16"}, ["--dtype", "float16"]),
    ({"select": [("exclude", "hidden1*")]}, ["--exclude", "hidden1*"]),
    ({"average": ["mean@last=5"]}, ["--average", "mean@last=5"]),
    ({"steps": "500:1500:500"}, ["--steps", "500:1500:500"]),
    (
        {"format": "safetensors-folder", "max_shard_size": "4KB"},
        ["--format", "safetensors-folder", "--max-shard-size", "4KB"],
    ),
    ({"format": "safetensors"}, ["--format", "safetensors"]),
]


@pytest.mark.parametrize("kind", ["files", "folders"])
@pytest.mark.parametrize(("keywords", "words"), CASES, ids=[str(case[1]) for case in CASES])
def test_a_run_does_what_its_plan_says(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    kind: str,
    keywords: dict[str, Any],
    words: list[str],
) -> None:
    """Files, sizes, inputs, weights, tensors, bytes read and written: all as announced."""
    run = request.getfixturevalue("digits_run" if kind == "files" else "digits_bf16")
    out = tmp_path / "out"
    plan = announced(run, "-o", out, *words)
    events: list[Progress] = []
    result = ema_cli.average_run(run, out, on_event=events.append, **keywords)

    kept = provenance(out)
    (average,) = plan["averages"]
    assert {key: kept[key] for key in SHARED} == {key: average[key] for key in SHARED}
    listed = {file["name"]: file["bytes"] for file in average["output"]["files"]}
    assert listed == {name: path.stat().st_size for name, path in files_of(out).items()}
    assert result.outputs[0].nbytes == sum(listed.values()) == plan["costs"]["write_bytes"]
    assert {event.total for event in events} == {events[-1].read} == {plan["costs"]["read_bytes"]}
    assert [event.read for event in events] == sorted(event.read for event in events)
    rows = [(row["path"], row["step"], row["weight"]) for row in kept["inputs"]]
    assert [row[1] for row in rows] == result.plan.run.steps
    assert sum(row[2] for row in rows) == pytest.approx(kept["average"]["weight_sum"])


@pytest.mark.parametrize(("keywords", "words"), CASES, ids=[str(case[1]) for case in CASES])
def test_every_tensor_is_averaged_copied_or_left_out(
    digits_run: Path, tmp_path: Path, keywords: dict[str, Any], words: list[str]
) -> None:
    """Each tensor of the last checkpoint has one fate, told in the provenance and true."""
    out = tmp_path / "out"
    ema_cli.average_run(digits_run, out, **keywords)
    kept, written = provenance(out), set(tensors_of(out))
    last = kept["inputs"][-1]["path"]
    copied = [row["tensor"] for row in kept["copied"]]
    left_out = [row["tensor"] for row in kept["left_out"]]
    told = [*kept["averaged"], *copied, *left_out]
    assert sorted(told) == sorted(read_checkpoint(last))
    assert all(row["reason"] for row in kept["copied"] + kept["left_out"])
    assert set(copied) <= written
    assert not set(left_out) & written
    suffix = SHADOW if kept["output"]["names"] == "shadow" else ""
    assert {name + suffix for name in kept["averaged"]} <= written


def test_provenance_names_headers_checksums_and_versions(tmp_path: Path) -> None:
    """Digests of input headers, a checksum per 64 MiB of output, and what computed it."""
    run = write_run(tmp_path / "run", [{"w": np.full(17 << 20, k, np.float32)} for k in (1, 2)])
    out = tmp_path / "o.safetensors"
    cmd("run", run, "-o", out, "--decay", "0.5")
    kept, raw = provenance(out), out.read_bytes()
    (file,) = kept["output"]["files"]
    step = 64 << 20
    assert kept["output"]["checksum_bytes"] == step
    parts = [raw[start : start + step] for start in range(0, len(raw), step)]
    assert file["crc32c"] == [f"{crc32.iscsi(part):08x}" for part in parts]
    assert len(parts) == 2
    for row in kept["inputs"]:
        (source,) = row["files"]
        data = Path(source["path"]).read_bytes()
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        assert source["bytes"] == len(data)
        digests = {hashlib.sha256(header).hexdigest(), hashlib.sha256(header[8:]).hexdigest()}
        assert source["header"] in digests
    assert {"ema-avg", "python", "numpy"} <= set(kept["tool"])


# ---------------------------------------------------------------------------- unchanged


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three small checkpoints."""
    return write_run(tmp_path / "run", [{"w": np.full(4, k, np.float32)} for k in (1, 2, 3)])


def state(path: Path) -> tuple[int, int, bytes]:
    """What tells that nobody wrote a file."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, path.read_bytes()


def test_the_same_run_again_is_unchanged(run: Path, tmp_path: Path) -> None:
    """An output that equals the plan is answered ``unchanged``, 0, and nothing is written."""
    out = tmp_path / "o.safetensors"
    words = ["run", run, "-o", out, "--decay", "0.5"]
    cmd(*words)
    before = state(out), state(Path(f"{out}.ema.json"))
    again = cmd(*words)
    assert again.out.split()[0] == "unchanged"
    assert again.out.split()[-1] == str(out)
    document = json.loads(cmd(*words, "--json").out.splitlines()[-1])
    assert document["outputs"][0]["status"] == "unchanged"
    assert document["read_bytes"] == 0
    assert (state(out), state(Path(f"{out}.ema.json"))) == before
    assert cmd(*words, "--overwrite").out.split()[0] == "written"
    assert state(out)[0] != before[0][0]


def test_unchanged_survives_a_move_of_the_run(run: Path, tmp_path: Path) -> None:
    """Inputs count by name, size, time and header: another directory is no other plan."""
    out = tmp_path / "o.safetensors"
    cmd("run", run, "-o", out, "--decay", "0.5")
    moved = run.rename(tmp_path / "moved")
    assert cmd("run", moved, "-o", out, "--decay", "0.5").out.startswith("unchanged")


@pytest.mark.parametrize(
    "words",
    [
        ["--decay", "0.6"],
        ["--decay", "0.5", "--last", "2"],
        ["--decay", "0.5", "--dtype", "float16"],
        ["--decay", "0.5", "--names", "variable"],
        ["--decay", "0.5", "--num-updates", "count"],
        ["--decay", "0.5", "--init", "zeros"],
        ["--decay", "0.5", "--rule", "w", "v"],
        ["--average", "mean"],
    ],
)
def test_other_options_are_no_unchanged_output(run: Path, tmp_path: Path, words: list[str]) -> None:
    """Whatever changes the bytes changes the answer from ``unchanged`` to refusal, 14."""
    out = tmp_path / "o.safetensors"
    cmd("run", run, "-o", out, "--decay", "0.5")
    before = state(out)
    assert "--overwrite" in cmd("run", run, "-o", out, *words, code=14).err
    assert state(out) == before


def test_a_changed_input_is_another_plan(run: Path, tmp_path: Path) -> None:
    """Rewriting an input with other values, same size, is noticed."""
    out = tmp_path / "o.safetensors"
    cmd("run", run, "-o", out, "--decay", "0.5")
    write_checkpoint(run / "model-step-200.safetensors", {"w": np.full(4, 9, np.float32)})
    cmd("run", run, "-o", out, "--decay", "0.5", code=14)


@pytest.mark.parametrize(
    "damage",
    [
        None,
        b"",
        b"{}",
        b"[]",
        b'{"schema": 1, "output": {"files": [{"name": "../../etc"}], "fingerprint": ""}}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_provenance_that_does_not_hold_is_no_provenance(
    run: Path, tmp_path: Path, damage: bytes | None
) -> None:
    """Missing, damaged or hostile provenance, or an edited output: an existing output, 14."""
    out = tmp_path / "o.safetensors"
    cmd("run", run, "-o", out, "--decay", "0.5")
    if damage is None:
        raw = bytearray(out.read_bytes())
        raw[-1] ^= 1
        out.write_bytes(raw)
    else:
        Path(f"{out}.ema.json").write_bytes(damage)
    cmd("run", run, "-o", out, "--decay", "0.5", code=14)
    assert json.loads(cmd("inspect", out, "--json").out)["provenance"] is None


def test_only_the_missing_one_of_several_outputs_is_written(run: Path, tmp_path: Path) -> None:
    """Two averages of which one is there: one ``unchanged``, one ``written``."""
    words = ["--average", "a=mean", "--average", "b=ema:0.5"]
    out = tmp_path / "o-{average}.safetensors"
    cmd("run", run, "-o", out, *words)
    kept, gone = tmp_path / "o-a.safetensors", tmp_path / "o-b.safetensors"
    before, expected = state(kept), gone.read_bytes()
    gone.unlink()
    lines = cmd("run", run, "-o", out, *words).out.splitlines()
    assert [line.split()[0] for line in lines] == ["unchanged", "written"]
    assert state(kept) == before
    assert gone.read_bytes() == expected


def test_only_what_is_missing_is_read(run: Path, tmp_path: Path) -> None:
    """With one of two outputs there, the bytes read that are told are those of the other."""
    words = ["--average", "a=mean", "--average", "b=mean@last=2"]
    out = tmp_path / "o-{average}.safetensors"
    cmd("run", run, "-o", out, *words)
    (tmp_path / "o-b.safetensors").unlink()
    result = json.loads(cmd("run", run, "-o", out, *words, "--json").out.splitlines()[-1])
    assert [output["status"] for output in result["outputs"]] == ["unchanged", "written"]
    assert result["read_bytes"] == 2 * 16


def test_a_folder_is_unchanged_only_while_all_its_files_are(
    digits_bf16: Path, tmp_path: Path
) -> None:
    """A folder output is recognised whole: an edited side file makes it another."""
    out = tmp_path / "averaged"
    cmd("run", digits_bf16, "-o", out, "--decay", "0.5")
    assert cmd("run", digits_bf16, "-o", out, "--decay", "0.5").out.startswith("unchanged")
    copied = tmp_path / "copy"
    shutil.copytree(out, copied)
    os.rename(f"{out}.ema.json", f"{copied}.ema.json")
    assert cmd("run", digits_bf16, "-o", copied, "--decay", "0.5").out.startswith("unchanged")
    (copied / "config.json").write_text("{}")
    cmd("run", digits_bf16, "-o", copied, "--decay", "0.5", code=14)
