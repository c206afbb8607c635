"""``ema-avg verify``: sound outputs of every format are found sound, and nothing else is."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conformance import CASES, ROWS, convert, every_dtype, make_run, write_source
from forging import edit, files_of, flipped, forge, provenance_of
from helpers import cmd, read_checkpoint, write_checkpoint, write_run

import ema_cli
from ema_cli import comparing
from ema_cli.engine import Progress
from ema_cli.errors import EmaError, InputError, UnsupportedInput, UsageError

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
WISHES = {
    "template": ["--names", "variable"],
    "fresh": ["--names", "shadow", "--keep-variables"],
    "debiased": ["--names", "shadow", "--zero-debias"],
    "widened": ["--names", "variable", "--dtype", "float64", "--rule", "^", "m/"],
}


def source(row: str, folder: Path) -> Path:
    """A run of a format, made of checkpoints that tell nothing of where they came from."""
    folder.mkdir()
    for path in make_run(row, folder):
        provenance_of(path).unlink(missing_ok=True)
    return folder


def output(row: str, folder: Path, *words: str) -> Path:
    """An output in a format, of three checkpoints in it beside it."""
    run = source(row, folder / "run")
    out = folder / CASES[row].called.format(9)
    cmd("run", run, "-o", out, "--format", row, "--decay", "0.5", *words)
    return out


# ---------------------------------------------------------------------------- sound outputs


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("wishes", WISHES)
def test_every_format_is_recomputed_bit_for_bit(row: str, wishes: str, tmp_path: Path) -> None:
    """Copied structures, new ones, counters and other dtypes: all blocks are equal."""
    out = output(row, tmp_path, *WISHES[wishes])
    size = sum(path.stat().st_size for path in files_of(out))
    for words in (["--full"], ["--sample", "0.5%"], []):
        told = json.loads(cmd("verify", out, "--json", *words).out)
        blocks = told.pop("blocks")
        assert blocks["recomputed"] == blocks["total"] > 0
        assert told == {
            "type": "result",
            "schema": 1,
            "command": "verify",
            "path": str(out),
            "files": len(files_of(out)),
            "bytes": size,
            "checksums": "equal",
            "not_recomputed": None,
        }


RUNS = [
    "digits/bf16",
    "tensorflow/graph",
    "tensorflow/partitioned",
    "keras/weights",
    "keras/archive",
    "npz/compressed",
    "torch/run",
    "torch/lightning",
    "torch/legacy",
    "torch/hf",
]


@pytest.mark.parametrize("name", RUNS)
def test_what_real_frameworks_saved(name: str, tmp_path: Path) -> None:
    """Slices, shards, compressed members, nested models, streams: in their format and another."""
    for number, words in enumerate(([], ["--format", "safetensors"], ["--statistics", "copy"])):
        out = tmp_path / f"out-{number}"
        ema_cli.average_run(FIXTURES / name, out, decay="0.9/step", **_keywords(words))
        found = ema_cli.verify(out, full=True)
        assert (found.not_recomputed, found.checksums) == (None, "equal")
        assert found.recomputed == found.total > 0


def _keywords(words: list[str]) -> dict[str, Any]:
    return {words[0].removeprefix("--"): words[1]} if words else {}


def test_each_of_several_averages(digits_run: Path, tmp_path: Path) -> None:
    """Windows, given weights, shapes: an output of several is made again alone."""
    weights = tmp_path / "weights.txt"
    weights.write_text("# taken by hand\n100 1\ndigits-step-0300.safetensors, 2.5\n")
    specs = [
        "a=mean@last=5",
        "lr:cosine",
        "power:0.1",
        "half-life:300@200:",
        f"w=weights:{weights}",
    ]
    out = tmp_path / "o-{average}.safetensors"
    done = ema_cli.average_run(digits_run, out, average=specs, num_updates="count", like="torch")
    weights.unlink()
    for written in done.outputs:
        assert ema_cli.verify(written.path).not_recomputed is None
    assert len(done.outputs) == len(specs)


@pytest.mark.parametrize("like", ["torch", "keras"])
def test_the_arithmetic_of_other_frameworks(digits_bf16: Path, tmp_path: Path, like: str) -> None:
    """What was computed as they do is recomputed as they do."""
    ema_cli.average_run(digits_bf16, tmp_path / "out", decay=0.9, like=like)
    assert ema_cli.verify(tmp_path / "out", full=True).not_recomputed is None


@pytest.mark.parametrize("target", ROWS)
def test_renamed_copies(target: str, tmp_path: Path) -> None:
    """They are compared with the source they were copied from."""
    held = tmp_path / "a" / "model.npz"
    run = source("safetensors", tmp_path / "run")
    convert(run / "model-step-100.safetensors", "npz", held)
    out = convert(held, target, tmp_path / CASES[target].called.format(1), [("^", "v/")])
    if CASES[target].made_like:  # whose own source was one for a moment
        assert ema_cli.verify(out).not_recomputed
        return
    found = ema_cli.verify(out, full=True)
    assert (found.not_recomputed, found.recomputed) == (None, found.total)
    os.utime(held, ns=(1, 1))
    assert f"{held}: changed since" in str(ema_cli.verify(out).not_recomputed)
    again = tmp_path / "again" / CASES[target].called.format(1)
    convert(out, target, again, [("^v/", "")])  # of the same format
    assert ema_cli.verify(again, full=True).not_recomputed is None


def test_every_dtype_is_compared(tmp_path: Path) -> None:
    """Strings, packed and quantised numbers of renamed copies, in a copy and in a new file."""
    for path in write_source(tmp_path / "in", every_dtype()):
        out = tmp_path / f"out-{path.name}"
        ema_cli.rename(path, out, rule=[("^", "m/")])
        assert ema_cli.verify(out, full=True).not_recomputed is None
        assert ema_cli.verify(out, full=True).checksums == "equal"


def test_a_prefix_is_named_in_many_ways(tmp_path: Path) -> None:
    """By its index, its folder, its provenance; a folder with a slash."""
    out = output("tensorflow", tmp_path)
    inside = tmp_path / "alone"
    inside.mkdir()
    for path in (*files_of(out), provenance_of(out)):
        shutil.copy(path, inside)
    for name in (out, f"{out}.index", provenance_of(out), inside, f"{inside}/"):
        assert ema_cli.verify(name).not_recomputed is None, name
    folder = output("safetensors-folder", tmp_path / "b")
    assert ema_cli.verify(f"{folder}/").path == str(folder)


def test_processes_and_progress(tmp_path: Path) -> None:
    """Any executor will do; events count up to what there was to read."""
    values = [{"w": np.full(300_000, k, np.float32), "n": np.arange(9)} for k in range(3)]
    run, out = write_run(tmp_path / "run", values), tmp_path / "o.safetensors"
    ema_cli.average_run(run, out, decay=0.5)
    events: list[Progress] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        found = ema_cli.verify(out, full=True, executor=pool, on_event=events.append)
    assert found.recomputed == found.total == 6
    read = [event.read for event in events]
    assert read == sorted(read)
    assert {event.total for event in events} == {read[-1]}


# ---------------------------------------------------------------------------- samples


def test_a_sample_is_spread_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many blocks as asked for, at least 64, all different, none far from the next."""
    for total in (0, 1, 63, 64, 65, 1000, 12_345, 1_000_000):
        for share in (1e-9, 0.001, 0.01, 0.5, 1.0):
            chosen = list(comparing.sampled(total, share))
            assert len(chosen) == min(total, max(64, int(np.ceil(total * share))))
            assert sorted(set(chosen)) == chosen
            assert not chosen or (chosen[0] >= 0 and chosen[-1] < total)
            gaps = np.diff([-1, *chosen, total])
            assert gaps.max() <= 2 * total / max(len(chosen), 1) + 2
    monkeypatch.setattr(comparing, "LEAST_BLOCKS", 1)
    assert len({tuple(comparing.sampled(100, 0.01)) for _ in range(100)}) > 10


def test_samples_find_damage_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of twenty blocks four are taken: sooner or later the wrong one is among them."""
    monkeypatch.setattr(comparing, "LEAST_BLOCKS", 4)
    values = [{"w": np.full(20 << 16, k, np.float32)} for k in range(2)]
    run, out = write_run(tmp_path / "run", values), tmp_path / "o.safetensors"
    ema_cli.average_run(run, out, decay=0.5)
    found = ema_cli.verify(out)
    assert (found.recomputed, found.total) == (4, 20)
    with flipped(out, -4 * (7 << 16)):
        forge(out)
        answers = []
        for _ in range(60):
            try:
                ema_cli.verify(out)
                answers.append("")
            except InputError as error:
                answers.append(str(error))
        assert 1 <= sum(map(bool, answers)) < 60
        with pytest.raises(InputError, match=r"'w.*': element 851,968: its sources give 0\.5"):
            ema_cli.verify(out, full=True)


@pytest.mark.parametrize("word", ["1%", "0.5%", "100%", " 1 %", "0.000001%"])
def test_shares(word: str, tmp_path: Path) -> None:
    """A percentage above 0 and up to 100."""
    assert cmd("verify", output("safetensors", tmp_path), "--sample", word).out[:8] == "verified"


@pytest.mark.parametrize("word", ["0", "0%", "0.0%", "1", "101%", "-1%", "all", "", "1e2%", "nan%"])
def test_what_is_no_share(word: str, tmp_path: Path) -> None:
    """A usage error, 2, in the command and in the function."""
    assert "--full" in cmd("verify", tmp_path, f"--sample={word}", code=2).err
    with pytest.raises(UsageError):
        ema_cli.verify(tmp_path, sample=word)


# ---------------------------------------------------------------------------- damage


@pytest.mark.parametrize("row", ROWS)
def test_any_flipped_bit_is_found(row: str, tmp_path: Path) -> None:
    """In averages, copies, headers, indexes and side files; the first is named with its place."""
    out = output(row, tmp_path)
    for path in files_of(out):
        size = path.stat().st_size
        for offset in {*range(0, size, max(size // 40, 1)), size - 1}:
            with flipped(path, offset, offset % 8):
                cmd("verify", out, code=12)
    assert cmd("verify", out).code == 0


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("wishes", ["template", "debiased"])
def test_any_bit_that_provenance_agrees_with_is_found(
    row: str, wishes: str, tmp_path: Path
) -> None:
    """Bytes and checksums altered alike: what the sources give tells; no byte goes uncompared."""
    out = output(row, tmp_path, *WISHES[wishes])
    for path in files_of(out):
        size = path.stat().st_size
        for offset in range(size % 11, size, max(size // 60, 1)):
            with flipped(path, offset, offset % 8):
                forge(out)
                with pytest.raises(InputError):
                    ema_cli.verify(out, full=True, workers=1)
    forge(out)
    assert ema_cli.verify(out, full=True).not_recomputed is None


def test_damage_is_told_with_its_place(tmp_path: Path) -> None:
    """The file, the bytes and the tensors in them; the element and both values."""
    out = output("safetensors", tmp_path, "--names", "variable")
    size = out.stat().st_size
    with flipped(out, size - 1):
        told = cmd("verify", out, code=12).err
        assert f"{out}: bytes 0 to {size} have the checksum" in told
        assert "'dense/bias', 'dense/kernel', 'scale' and 1 more" in told.replace("lies ", "")
        forge(out)
        told = cmd("verify", out, code=12).err
        assert "tensor 'steps_done': element 0: its sources give 129, found" in told
        assert "--overwrite" in told
    with out.open("ab") as file:
        file.write(b"\0")
    assert f"expected {size} bytes as {out}.ema.json tells" in cmd("verify", out, code=12).err
    os.truncate(out, size - 1)
    cmd("verify", out, code=12)
    out.unlink()
    cmd("verify", out, code=12)


def test_other_averages_with_forged_provenance(tmp_path: Path) -> None:
    """Only recomputing can find them: decay 0.6 where 0.5 is told."""
    out = output("safetensors", tmp_path)
    other = tmp_path / "other.safetensors"
    ema_cli.average_run(tmp_path / "run", other, decay=0.6)
    kernel = "dense/kernel/ExponentialMovingAverage"
    one, two = (float(read_checkpoint(path)[kernel][0, 0]) for path in (out, other))
    shutil.copy(other, out)
    assert "have the checksum" in cmd("verify", out, code=12).err
    forge(out)
    told = cmd("verify", out, code=12).err
    assert "its sources give" in told
    assert one != two


def test_swapped_provenance(tmp_path: Path) -> None:
    """That of another output of the same size is none of this one."""
    one = output("safetensors", tmp_path)
    two = tmp_path / "two.safetensors"
    ema_cli.average_run(tmp_path / "run", two, decay=0.6)
    assert one.stat().st_size == two.stat().st_size
    provenance_of(two).replace(provenance_of(one))
    assert "have the checksum" in cmd("verify", one, code=12).err


def test_a_shard_nobody_tells_of(digits_bf16: Path, tmp_path: Path) -> None:
    """Files of the checkpoint that provenance does not name are no part of what was written."""
    out = tmp_path / "out"
    ema_cli.average_run(digits_bf16, out, decay=0.5)
    edit(out, lambda document: document["output"]["files"].pop(0))
    assert "tells nothing of it" in cmd("verify", out, code=12).err


def test_a_state_is_no_output(tmp_path: Path) -> None:
    """It is told by the file that says what it is."""
    (tmp_path / "FORMAT").write_bytes(b"ema-avg state 1\n")
    with pytest.raises(UnsupportedInput, match="a state"):
        ema_cli.verify(tmp_path)


# ---------------------------------------------------------------------------- without provenance


@pytest.mark.parametrize("row", ROWS)
def test_without_provenance_its_own_checksums_count(row: str, tmp_path: Path) -> None:
    """Exit 3 and what could be checked; a flipped bit of a tensor is found where it is summed."""
    out = output(row, tmp_path)
    provenance_of(out).unlink()
    told = cmd("verify", out, code=3).out.splitlines()
    word = "checked" if CASES[row].checked else "opened"
    assert told[0].startswith(f"{word}  {out}: ")
    assert told[1] == f"not recomputed: {out}.ema.json: no such file"
    found = ema_cli.verify(out)
    assert (found.checksums == "equal") is CASES[row].checked
    if CASES[row].checked:
        checkpoint = ema_cli.inspect(out)
        for tensor in checkpoint.index.tensors:
            path = Path(checkpoint.files[tensor.extent.file].path)
            with flipped(path, tensor.extent.offset), pytest.raises(EmaError) as caught:
                ema_cli.verify(out)
            assert caught.value.exit_code == 12
            assert tensor.name in str(caught.value)


def test_compressed_archives_and_strings_without_provenance(tmp_path: Path) -> None:
    """What has to be unpacked is verified by it, and strings by the checksum they have."""
    packed = tmp_path / "packed.npz"
    np.savez_compressed(packed, w=np.arange(5000.0), v=np.float32([1]))
    assert ema_cli.verify(packed).checksums == "equal"
    raw = packed.read_bytes()
    for offset in range(60, len(raw) - 200, 97):
        with flipped(packed, offset), pytest.raises(EmaError):
            ema_cli.verify(packed)
    bundle = write_source(tmp_path / "in", every_dtype())[1]
    assert ema_cli.verify(bundle).checksums == "equal"
    data = Path(f"{bundle}.data-00000-of-00001")
    missed = []
    for offset in range(data.stat().st_size):
        with flipped(data, offset):
            try:
                ema_cli.verify(bundle)
                missed.append(offset)
            except InputError:
                pass
    assert missed == []


def test_what_is_no_checkpoint_at_all(tmp_path: Path) -> None:
    """A path that is not there, and one that is something else: 12."""
    assert "no such file" in cmd("verify", tmp_path / "nothing", code=12).err
    write_checkpoint(tmp_path / "a.safetensors", {"w": np.float32([1])})
    (tmp_path / "text").write_text("hello")
    cmd("verify", tmp_path / "text", code=12)
