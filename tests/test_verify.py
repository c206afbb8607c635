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
from conformance import CASES, ROWS, convert, every_dtype, write_source
from forging import WISHES, files_of, flipped, forge, output, provenance_of, source
from helpers import cmd, write_run

import ema_cli
from ema_cli.engine import Progress
from ema_cli.errors import InputError, UsageError
from ema_cli.verification import comparing

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"

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
            "kind": "output",
            "file_count": len(files_of(out)),
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
        "ema:.9",
        f"w=weights:{weights}",
    ]
    out = tmp_path / "o-{average}.safetensors"
    done = ema_cli.average_run(digits_run, out, average=specs, num_updates="count")
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
