"""What a second look at the contract found, kept found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import cmd, read_checkpoint, write_checkpoint, write_run

import ema_cli
import ema_cli.api
from ema_cli.errors import OutputExists


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four small checkpoints of one run."""
    return write_run(tmp_path / "run", [{"w": np.float32([k, k])} for k in range(4)])


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two Hugging Face folders of one shard that is listed in an index."""
    for step in (100, 200):
        folder = tmp_path / "hf" / f"checkpoint-{step}"
        name = "model-00001-of-00001.safetensors"
        write_checkpoint(folder / name, {"w": np.float32([step])}, {"format": "pt"})
        index = {"metadata": {"total_size": 4}, "weight_map": {"w": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path / "hf"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_appears_while_we_work_is_not_overwritten(
    run: Path, folders: Path, tmp_path: Path, kind: str
) -> None:
    """Without overwrite an output that somebody made meanwhile stays whole: 14."""
    out = tmp_path / ("out.safetensors" if kind == "file" else "out")
    precious = out if kind == "file" else out / "precious.txt"

    def appear(event: object) -> None:
        precious.parent.mkdir(exist_ok=True)
        precious.write_text("mine")

    with pytest.raises(OutputExists):
        ema_cli.average_run(run if kind == "file" else folders, out, on_event=appear)
    assert precious.read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if ".ema-avg." in path.name]


@pytest.mark.parametrize("words", [["--average", "mean@last=2"], ["--last", "2"]])
def test_a_checkpoint_that_is_not_used_is_an_input_too(run: Path, words: list[str]) -> None:
    """An output may not replace any checkpoint of the run, chosen or not."""
    victim = run / "model-step-100.safetensors"
    before = victim.read_bytes()
    cmd("run", run, *words, "-o", victim, "--overwrite", code=14)
    assert victim.read_bytes() == before


def test_unchanged_means_every_byte(run: Path, tmp_path: Path) -> None:
    """A byte changed between the samples of the fingerprint is noticed by the checksums."""
    big = write_run(tmp_path / "big", [{"w": np.full(1 << 20, k, np.float32)} for k in range(2)])
    out = tmp_path / "out.safetensors"
    cmd("run", big, "-o", out)
    assert cmd("run", big, "-o", out).out.startswith("unchanged")
    with out.open("r+b") as file:
        file.seek(1_000_001)
        file.write(b"rot")
    cmd("run", big, "-o", out, code=14)


def test_unchanged_is_about_non_finite_values_too(tmp_path: Path) -> None:
    """What was let pass once is not passed on to a stricter run."""
    values = [{"w": np.float32([1])}, {"w": np.float32([np.nan])}]
    run = write_run(tmp_path / "run", values)
    out = tmp_path / "out.safetensors"
    cmd("run", run, "-o", out, "--non-finite", "allow")
    cmd("run", run, "-o", out, code=14)
    cmd("run", run, "-o", out, "--overwrite", code=17)


def test_one_shard_with_an_index_keeps_its_index(folders: Path, tmp_path: Path) -> None:
    """Loaders look for the index; a template has it whatever the number of shards."""
    cmd("run", folders, "-o", tmp_path / "out", "--average", "mean")
    original = folders / "checkpoint-200" / "model.safetensors.index.json"
    copied = tmp_path / "out" / "model.safetensors.index.json"
    assert copied.read_bytes() == original.read_bytes()


def test_a_directory_has_no_given_order(run: Path) -> None:
    """--order given would be the order of names, which is never the order of steps."""
    assert "given order" in cmd("plan", run, "--order", "given", code=2).err


def test_a_glob_needs_a_directory(run: Path) -> None:
    """--glob beside named checkpoints would do nothing."""
    paths = sorted(run.iterdir())
    cmd("plan", paths[0], paths[1], "--glob", "*", code=2)


@pytest.mark.parametrize("how", ["glob", "index", "shard"])
def test_quantised_models_are_refused_however_they_are_named(folders: Path, how: str) -> None:
    """The config beside the weights counts, not only that of a folder that was named."""
    for folder in folders.iterdir():
        (folder / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    last = folders / "checkpoint-200"
    words = {
        "glob": [folders, "--glob", "checkpoint-*/*.safetensors"],
        "index": [last / "model.safetensors.index.json"],
        "shard": [last / "model-00001-of-00001.safetensors"],
    }[how]
    assert "quantised" in cmd("plan", *words, code=12).err


def test_weights_at_the_root_stay_unnumbered_with_a_step_inside(folders: Path) -> None:
    """The final weights of a numbered run hold the last step too; they are no second one."""
    write_checkpoint(folders / "model.safetensors", {"w": np.float32([1]), "step": np.array(200)})
    assert "unnumbered" in cmd("plan", folders).err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--names", "variable", "--rule", "^w$", "__metadata__"], 13),
        (["--names", "variable", "--rule", "^w$", "\udcff"], 13),
        (["--name", "\udcff"], 2),
        (["--name", ""], 2),
    ],
)
def test_names_no_checkpoint_can_hold_are_refused_before_any_work(
    run: Path, tmp_path: Path, words: list[str], code: int
) -> None:
    """Names, not temporary files, are to blame."""
    err = cmd("run", run, "-o", tmp_path / "o.safetensors", *words, code=code)
    assert ".ema-avg.tmp" not in err.err


def test_a_plan_tells_that_its_output_exists(run: Path, tmp_path: Path) -> None:
    """What would stop the run is a warning of the plan."""
    out = tmp_path / "out.safetensors"
    cmd("run", run, "-o", out)
    assert "output-exists" in cmd("plan", run, "-o", out).err
    assert "output-exists" not in cmd("run", run, "-o", out, "-n", "--overwrite").err


def test_a_dry_run_needs_no_output(run: Path) -> None:
    """`run -n` is `plan`; without -n an output is asked for."""
    assert cmd("run", run, "-n").out == cmd("plan", run).out
    assert "-o average.safetensors" in cmd("run", run, code=2).err


def test_a_renaming_that_renames_nothing_is_an_error(run: Path, tmp_path: Path) -> None:
    """Neither no option nor a pattern that matches nothing gives a silent copy."""
    source = run / "model-step-100.safetensors"
    cmd("rename", source, "-o", tmp_path / "a.safetensors", code=13)
    cmd("rename", source, "-o", tmp_path / "a.safetensors", "--rule", "nothing", "x", code=13)
    folder = tmp_path / "folder"
    cmd("rename", source, "-o", folder, "--format", "safetensors-folder")
    assert read_checkpoint(folder / "model.safetensors").keys() == {"w"}


def test_a_dry_renaming_writes_nothing(run: Path, tmp_path: Path) -> None:
    """`rename -n` tells every new name and leaves the disk alone."""
    source, out = run / "model-step-100.safetensors", tmp_path / "a.safetensors"
    told = cmd("rename", source, "-o", out, "--names", "shadow", "-n").err
    assert "renamed: w to w/ExponentialMovingAverage" in told
    assert sorted(tmp_path.iterdir()) == [run]


@pytest.mark.parametrize("name", ["step=1e3", "ckpt-1e5", "step-1,200", "100k"])
def test_numbers_we_cannot_read_are_no_steps(tmp_path: Path, name: str) -> None:
    """Better to ask for --step-from than to take 1 for 1e3."""
    path = write_checkpoint(tmp_path / "run" / f"{name}.safetensors", {"w": np.float32([1])})
    write_checkpoint(tmp_path / "run" / "step-7.safetensors", {"w": np.float32([1])})
    assert "--step-from" in cmd("plan", path.parent, code=13).err


def test_a_provenance_that_waits_is_found_by_a_scan(run: Path) -> None:
    """Killed between the two renames, an output is recognised all the same."""
    out = run / "model-step-900.safetensors"
    cmd("run", run, "-o", out)
    record = Path(f"{out}.ema.json")
    record.rename(run / f".{record.name}.ema-avg.tmp")
    assert "an output of ema-avg" in cmd("plan", run).err


def test_a_folder_moved_aside_is_unchanged_at_once(folders: Path, tmp_path: Path) -> None:
    """The same command after a kill says so, without --overwrite."""
    out = tmp_path / "out"
    cmd("run", folders, "-o", out)
    out.rename(tmp_path / ".out.ema-avg.old")
    assert cmd("run", folders, "-o", out).out.startswith("unchanged")


def test_a_copy_goes_into_a_directory_that_is_made_for_it(run: Path, tmp_path: Path) -> None:
    """`rename` makes missing directories as `run` does."""
    out = tmp_path / "new" / "deep" / "a.safetensors"
    cmd("rename", run / "model-step-100.safetensors", "-o", out, "--names", "shadow")
    assert read_checkpoint(out).keys() == {"w/ExponentialMovingAverage"}


def test_what_fails_while_a_signal_unwinds_is_the_signal(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error raised on the way out of a Ctrl-C is not reported as an internal one."""

    def interrupted(*args: object, **kwargs: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("release unlocked lock")

    monkeypatch.setattr(ema_cli.api, "plan_run", interrupted)
    assert "interrupted" in cmd("plan", run, code=130).err
