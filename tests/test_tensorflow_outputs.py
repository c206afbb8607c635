"""TensorFlow checkpoints as outputs: their tensors, their names, their bits."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BF16, bits_equal, cmd, dtype_of, read_checkpoint, write_checkpoint
from tensorflow_bundles import (
    ALL,
    NUMBER_OF,
    Opaque,
    Rows,
    Sliced,
    listing,
    read_bundle,
    rows_of,
    shard_file,
    strings,
    tensorflow_run,
    write_bundle,
)

import ema_cli
from ema_cli import engine, worker
from ema_cli.cli import main

SHADOW = "/ExponentialMovingAverage"
Model = dict[str, Any]


def tensors(k: int) -> Model:
    """A network with statistics, an optimizer, counters, and a variable in slices."""
    rng = np.random.default_rng(k)
    return {
        "net/kernel": rng.normal(size=(4, 6)).astype("f4"),
        "net/kernel/Momentum": rng.normal(size=(4, 6)).astype("f4"),
        "net/bias": rng.normal(size=6).astype(BF16),
        "bn/moving_mean": rng.normal(size=6).astype("f4"),
        "emb": Sliced(rng.normal(size=(5, 4)).astype("f4"), [((0, 3), ALL), ((3, 2), ALL)]),
        "global_step": np.int64(k * 100),
        "labels": strings([b"a", b"bc"]),
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints of it."""
    return tensorflow_run(tmp_path / "run", [tensors(k) for k in (1, 2, 3)])


def written(run: Path, out: Path, *words: str) -> dict[str, Any]:
    """What a run writes, read back by hand."""
    cmd("run", run, "-o", out, *words)
    return read_bundle(out)


def left_out(out: Path) -> dict[str, str]:
    """The tensors an output has no place for, with the reason, as its provenance tells."""
    rows = json.loads(Path(f"{out}.ema.json").read_bytes())["left_out"]
    return {row["tensor"]: row["reason"] for row in rows}


def halves(run: Path, tensor: str) -> np.ndarray:
    """The average of a tensor with decay 0.5 in float32, narrowed once."""
    first, *rest = (read_bundle(run / f"model.ckpt-{k}")[tensor] for k in (100, 200, 300))
    shadow = first.astype("f4")
    for value in rest:
        shadow = shadow - (shadow - value.astype("f4")) * np.float32(0.5)
    return shadow.astype(first.dtype)


# ---------------------------------------------------------------------------- fresh


def test_a_fresh_output_is_what_saver_would_write(run: Path, tmp_path: Path) -> None:
    """One shard, tensors in the order of their names without gaps, the index TensorFlow's own."""
    found = written(run, tmp_path / "out", "--decay", "0.5")
    expected = [
        "bn/moving_mean",
        f"bn/moving_mean{SHADOW}",
        f"emb{SHADOW}",
        "global_step",
        "labels",
        f"net/bias{SHADOW}",
        f"net/kernel{SHADOW}",
    ]
    assert sorted(found) == expected
    for tensor in ("net/kernel", "net/bias", "emb", "bn/moving_mean"):
        assert bits_equal(found[tensor + SHADOW], halves(run, tensor)), tensor
    assert bits_equal(found["bn/moving_mean"], found[f"bn/moving_mean{SHADOW}"])
    assert int(found["global_step"]) == 300
    assert found["labels"] == [b"a", b"bc"]
    end = 0
    _, rows = rows_of(tmp_path / "out")
    places = [row for _, row in sorted(rows.items()) if not row.slices]
    for row in sorted(places, key=lambda row: row.offset):
        assert (row.shard, row.offset) == (0, end)
        end += row.size
    assert end == shard_file(tmp_path / "out").stat().st_size
    whole = [k for k in expected if k != f"emb{SHADOW}"]
    assert sorted(whole, key=lambda k: rows[k.encode()].offset) == whole
    again = {
        name: Sliced(value, rows[name.encode()].slices) if rows[name.encode()].slices else value
        for name, value in found.items()
    }
    again["labels"] = strings([b"a", b"bc"])
    by_hand = write_bundle(tmp_path / "by hand", {name: again[name] for name in expected})
    for suffix in (".index", ".data-00000-of-00001"):
        assert (
            Path(f"{tmp_path}/out{suffix}").read_bytes() == Path(f"{by_hand}{suffix}").read_bytes()
        )


def test_copied_statistics_stand_under_their_own_names_only(run: Path, tmp_path: Path) -> None:
    """As TensorFlow's restore asks for them by default."""
    found = written(run, tmp_path / "out", "--statistics", "copy")
    assert bits_equal(found["bn/moving_mean"], tensors(3)["bn/moving_mean"])
    assert f"bn/moving_mean{SHADOW}" not in found


@pytest.mark.parametrize("words", [["--optimizer", "keep"], []])
def test_optimizer_state_is_kept_on_request(run: Path, tmp_path: Path, words: list[str]) -> None:
    """A fresh output drops it and says so."""
    found = written(run, tmp_path / "out", *words)
    assert ("net/kernel/Momentum" in found) == bool(words)
    assert ("net/kernel/Momentum" in left_out(tmp_path / "out")) != bool(words)


def test_a_template_keeps_optimizer_state_unless_asked(run: Path, tmp_path: Path) -> None:
    """The structure of the last checkpoint, or what is left of it."""
    kept = written(run, tmp_path / "kept", "--names", "variable")
    assert set(kept) == set(tensors(1))
    assert bits_equal(kept["net/kernel/Momentum"], tensors(3)["net/kernel/Momentum"])
    words = ["--names", "variable", "--optimizer", "drop"]
    assert set(written(run, tmp_path / "dropped", *words)) == set(tensors(1)) - {
        "net/kernel/Momentum"
    }


def test_names_and_rules(run: Path, tmp_path: Path) -> None:
    """``--keep-variables``, ``--name`` and ``--rule`` as for every other format."""
    found = written(run, tmp_path / "a", "--keep-variables", "--name", "avg")
    assert {"net/kernel", "net/kernel/avg", "emb", "emb/avg"} <= set(found)
    assert bits_equal(found["net/kernel"], tensors(3)["net/kernel"])
    found = written(run, tmp_path / "b", "--rule", "^net/", "model/")
    assert f"model/kernel{SHADOW}" in found
    assert not [name for name in found if name.startswith("net/")]
    outcome = cmd("run", run, "-o", tmp_path / "c", "--rule", ".*", "", code=13)
    assert "can hold" in outcome.err
    cmd("run", run, "-o", tmp_path / "c", "--rule", "^(emb|net/kernel)/", "x/", code=13)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_another_dtype(run: Path, tmp_path: Path, dtype: str) -> None:
    """Averaged tensors only; TensorFlow cannot restore float16 in slices, so it is whole."""
    found = written(run, tmp_path / "out", "--decay", "0.5", "--dtype", dtype)
    for tensor in ("net/kernel", "emb"):
        assert bits_equal(found[tensor + SHADOW], halves(run, tensor).astype(dtype_of(dtype)))
    assert found["global_step"].dtype == np.int64
    _, rows = rows_of(tmp_path / "out")
    assert len(rows[f"emb{SHADOW}".encode()].slices) == (0 if dtype == "float16" else 2)


def test_zero_debias_writes_tensorflows_slots(run: Path, tmp_path: Path) -> None:
    """``biased`` and ``local_step`` beside each shadow, in its dtype."""
    found = written(run, tmp_path / "out", "--decay", "0.5", "--zero-debias")
    for tensor in ("net/kernel", "net/bias", "emb"):
        biased, count = (found[f"{tensor}{SHADOW}/{part}"] for part in ("biased", "local_step"))
        shadow = found[tensor + SHADOW]
        assert biased.dtype == count.dtype == shadow.dtype
        assert (biased.shape, count.shape, float(count)) == (shadow.shape, (), 3)
        if tensor != "net/bias":
            assert bits_equal(shadow, biased / np.float32(0.875))


def test_big_endian_zero_debias(tmp_path: Path) -> None:
    """The counter too is written in the byte order of the input."""
    values = [{"w": np.float32([k])} for k in (1, 2, 3)]
    run = tensorflow_run(tmp_path / "run", values, big_endian=True)
    found = written(run, tmp_path / "out", "--decay", "0.5", "--zero-debias")
    assert float(found[f"w{SHADOW}/local_step"]) == 3
    assert float(found[f"w{SHADOW}/biased"][0]) == 2.125


# ---------------------------------------------------------------------------- tied tensors

TIED = {"--exclude": ["--exclude", "b"], "a view of integers": []}


@pytest.mark.parametrize("case", TIED)
def test_bytes_with_two_names_are_not_averaged_and_copied(tmp_path: Path, case: str) -> None:
    """Where one of them is copied, both cannot stay in one place: a refusal, or two places."""

    def tie(rows: Rows) -> None:
        dtype = NUMBER_OF["uint32" if case == "a view of integers" else "float32"]
        rows[b"b"] = replace(rows[b"a"], dtype=dtype)

    values = [{"a": np.full(4, k, np.float32), "c": np.float32([k])} for k in (1, 2, 3)]
    run = tensorflow_run(tmp_path / "run", values, change=tie)
    words = ["run", str(run), "-o", str(tmp_path / "out"), "--average", "mean"]
    if main([*words, "--names", "variable", *TIED[case]]) == 0:
        found = read_bundle(tmp_path / "out")
        assert list(found["a"]) == [2] * 4
        assert found["b"].tobytes() == np.full(4, 3, np.float32).tobytes()


def test_bytes_with_two_names_are_averaged_once(tmp_path: Path) -> None:
    """Tied weights stay tied in the structure of the input."""

    def tie(rows: Rows) -> None:
        rows[b"b"] = replace(rows[b"a"])

    values = [{"a": np.full(4, k, np.float32), "c": np.float32([k])} for k in (1, 2, 3)]
    run = tensorflow_run(tmp_path / "run", values, change=tie)
    for names, suffix in (("variable", ""), ("shadow", SHADOW)):
        found = written(run, tmp_path / names, "--average", "mean", "--names", names)
        assert bits_equal(found[f"a{suffix}"], found[f"b{suffix}"])
        assert list(found[f"b{suffix}"]) == [2] * 4
    assert shard_file(tmp_path / "variable").stat().st_size == 20


# ---------------------------------------------------------------------------- conversions


def test_to_safetensors_and_back(run: Path, tmp_path: Path) -> None:
    """What safetensors cannot hold is told in the plan; the rest comes back whole."""
    outcome = cmd("run", run, "-o", tmp_path / "a.safetensors", "--decay", "0.5", "-v")
    assert "labels" in left_out(tmp_path / "a.safetensors")
    assert "labels: a safetensors file cannot hold string" in outcome.err
    middle = read_checkpoint(tmp_path / "a.safetensors")
    words = ["--names", "variable", "--name", "none", "--include", f"*{SHADOW}"]
    words = ["--format", "tensorflow", "--average", "mean", *words]
    cmd("run", tmp_path / "a.safetensors", "-o", tmp_path / "b", *words)
    found = read_bundle(tmp_path / "b")
    assert found.keys() == middle.keys()
    direct = written(run, tmp_path / "c", "--decay", "0.5")
    for name, value in middle.items():
        assert bits_equal(found[name], value), name
        assert bits_equal(direct[name], value), name
    assert set(direct) - set(found) == {"labels"}


def test_what_no_safetensors_file_can_hold(tmp_path: Path) -> None:
    """Each with its reason; the same of a format the other way."""
    made = {
        "w": np.float32([1]),
        "q": Opaque(11, (2,), b"ab"),
        "c": np.complex128([1j]),
        "i": np.int32([1]).astype(dtype_of("int4")),
        "s": strings([b"x"]),
    }
    prefix = write_bundle(tmp_path / "m-1", made)
    cmd("run", prefix, "-o", tmp_path / "a.safetensors")
    told = left_out(tmp_path / "a.safetensors")
    kinds = {"q": "qint8", "c": "complex128", "i": "int4", "s": "string"}
    assert told == {n: f"a safetensors file cannot hold {kind}" for n, kind in kinds.items()}
    odd = np.ones(4, dtype_of("float8_e8m0fnu"))
    path = write_checkpoint(tmp_path / "odd-1.safetensors", {"w": np.float32([1]), "e": odd})
    cmd("run", path, "-o", tmp_path / "t", "--format", "tensorflow", "--exclude", "e")
    assert left_out(tmp_path / "t") == {"e": "a TensorFlow checkpoint cannot hold float8_e8m0fnu"}


def test_names_one_format_cannot_hold(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 have no place in JSON; nothing is written."""
    prefix = write_bundle(tmp_path / "m-1", {b"\xff": np.float32([1])})
    outcome = cmd("run", prefix, "-o", tmp_path / "a.safetensors", code=13)
    assert "\\xff" in outcome.err or "udcff" in outcome.err
    path = write_checkpoint(tmp_path / "m-1.safetensors", {"": np.float32([1])})
    words = ["--names", "variable", "--format", "tensorflow"]
    cmd("run", path, "-o", tmp_path / "t", *words, code=13)
    assert not list(tmp_path.glob("[at].*"))


# ---------------------------------------------------------------------------- ways of working


def outputs(folder: Path) -> dict[str, bytes]:
    """The bytes of an output without its provenance."""
    found = listing(folder)
    return {name: data for name, data in found.items() if not name.endswith(".ema.json")}


@pytest.mark.parametrize("names", ["shadow", "variable"])
def test_the_bytes_do_not_depend_on_how_the_work_is_cut(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    """Workers, tasks and blocks of any size."""
    words = {"average": ["ema:0.5"], "names": names}
    ema_cli.average_run(run, tmp_path / "a" / "out", **words)
    expected = outputs(tmp_path / "a")
    assert len(expected) == 3
    for k, (workers, task, block) in enumerate([(1, 7, 3), (2, 8, 8), (5, 1, 1), (3, 64, 5)]):
        monkeypatch.setattr(engine, "TASK_ELEMENTS", task)
        monkeypatch.setattr(engine, "BLOCK_ELEMENTS", block)
        monkeypatch.setattr(worker, "COPY_BLOCK", 8 * block)
        ema_cli.average_run(run, tmp_path / str(k) / "out", workers=workers, **words)
        assert outputs(tmp_path / str(k)) == expected


def test_a_process_pool_gives_the_same(run: Path, tmp_path: Path) -> None:
    """Tasks are plain data, checksums of what was read among their results."""
    spawn = multiprocessing.get_context("spawn")
    ema_cli.average_run(run, tmp_path / "a" / "out", decay=0.5)
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        ema_cli.average_run(run, tmp_path / "b" / "out", decay=0.5, executor=pool)
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")


def test_several_averages_in_one_pass(run: Path, tmp_path: Path) -> None:
    """Each a prefix of its own, with the bits it has alone; one state file lists them."""
    both = ["mean", "ema:0.5"]
    out = tmp_path / "both" / "{average}"
    ema_cli.average_run(run, out, average=both)
    for average in both:
        label = average.replace(":", "-")
        ema_cli.average_run(run, tmp_path / "one" / label, average=[average])
        for suffix in (".index", ".data-00000-of-00001"):
            alone = Path(f"{tmp_path}/one/{label}{suffix}").read_bytes()
            assert Path(f"{tmp_path}/both/{label}{suffix}").read_bytes() == alone


def test_progress_counts_every_byte(run: Path, tmp_path: Path) -> None:
    """Of slices and of strings too."""
    events: list[Any] = []
    for names in ("shadow", "variable"):
        result = ema_cli.average_run(run, tmp_path / names, names=names, on_event=events.append)
        assert events[-1].read == events[-1].total == result.read
        files = [shard_file(tmp_path / names), Path(f"{tmp_path / names}.index")]
        assert result.outputs[0].nbytes == sum(path.stat().st_size for path in files)


def test_a_run_that_was_moved_gives_the_same(run: Path, tmp_path: Path) -> None:
    """Where the files lie is no part of the output."""
    ema_cli.average_run(run, tmp_path / "a" / "out", decay=0.5)
    shutil.move(run, tmp_path / "moved")
    ema_cli.average_run(tmp_path / "moved", tmp_path / "b" / "out", decay=0.5)
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")
