"""Many files, many tensors, empty, tiny and huge ones, and names made to do harm."""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import bits_equal, cmd, raw_safetensors, read_checkpoint, write_checkpoint, write_run

SHADOW = "/ExponentialMovingAverage"
MIB = 1 << 20
# Peak memory is that of the process itself: ru_maxrss of a child starts at its parent's.
MEASURED = """
import sys
from ema_cli.cli import main
code = main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak.split()[1], file=sys.stderr)
sys.exit(code)
"""


def child(
    *words: Any, before: Callable[[], None] | None = None, program: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run ema-avg in a process of its own."""
    start = ["-c", program] if program else ["-m", "ema_cli"]
    return subprocess.run(
        [sys.executable, *start, *words],
        preexec_fn=before,
        capture_output=True,
        text=True,
        timeout=120,
    )


def few_files() -> None:
    """``ulimit -n 256``."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))


def write_shards(folder: Path, tensors: dict[str, Any]) -> None:
    """Write a folder with one tensor per shard, and its index."""
    count = len(tensors)
    names = [f"model-{k:05}-of-{count:05}.safetensors" for k in range(1, count + 1)]
    for shard, (name, value) in zip(names, tensors.items(), strict=True):
        write_checkpoint(folder / shard, {name: value})
    weight_map = dict(zip(tensors, names, strict=True))
    index = {"metadata": {"total_size": 4 * count}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# ---------------------------------------------------------------------------- how many


@pytest.mark.parametrize("workers", [1, 16])
def test_500_checkpoints_with_256_open_files(tmp_path: Path, workers: int) -> None:
    """500 checkpoints, every tenth in 30 shards, are averaged under ``ulimit -n 256``."""
    run = tmp_path / "run"
    names = [f"t{k:02}" for k in range(30)]
    for step in range(1, 501):
        tensors = {name: np.float32(step + place) for place, name in enumerate(names)}
        if step % 10 == 0:
            write_shards(run / f"checkpoint-{step}", tensors)
        else:
            write_checkpoint(run / f"checkpoint-{step}" / "model.safetensors", tensors)
    out = tmp_path / "out.safetensors"
    words = ["run", run, "-o", out, "--average", "mean", "--format", "safetensors"]
    done = child(*words, "--workers", str(workers), before=few_files)
    assert done.returncode == 0, done.stderr
    found = read_checkpoint(out)
    for place, name in enumerate(names):
        assert float(found[name + SHADOW]) == pytest.approx(250.5 + place, rel=1e-5)


def test_300_shards_with_256_open_files(tmp_path: Path) -> None:
    """More shards than open files, on the way in and on the way out."""
    run = tmp_path / "run"
    for step in (1, 2, 3):
        write_shards(run / f"checkpoint-{step}", {f"t{k}": np.float32(step) for k in range(300)})
    out = tmp_path / "out"
    done = child("run", run, "-o", out, "--average", "mean", before=few_files)
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("*.safetensors"))) == 300
    for path in out.glob("*.safetensors"):
        assert [float(value) for value in read_checkpoint(path).values()] == [2.0]


def test_20000_small_tensors(tmp_path: Path) -> None:
    """Many tensors are an ordinary checkpoint: all there, all right, statistics and all."""
    rng = np.random.default_rng(5)
    values = [
        {f"layer{k}/w": row for k, row in enumerate(rng.normal(size=(20_000, 3)).astype("f4"))}
        for _ in range(3)
    ]
    run, out = write_run(tmp_path / "run", values), tmp_path / "out.safetensors"
    cmd("run", run, "-o", out, "--decay", "0.5", "--names", "variable")
    found = read_checkpoint(out)
    assert list(found) == list(values[0])
    half = np.float32(0.5)
    first, second, third = (np.stack(list(value.values())) for value in values)
    shadow = first - (first - second) * half
    shadow = shadow - (shadow - third) * half
    assert bits_equal(np.stack(list(found.values())), shadow)


@pytest.mark.parametrize("names", ["shadow", "variable"])
def test_empty_tensors_and_scalars(tmp_path: Path, names: str) -> None:
    """A tensor without elements stays one, a scalar is averaged as any other."""
    shapes: dict[str, tuple[int, ...]] = {"a": (0,), "b": (), "c": (3, 0, 2), "d": (1, 1, 1)}
    values = [{n: np.full(s, k, np.float32) for n, s in shapes.items()} for k in (1, 2, 3)]
    out = tmp_path / "out.safetensors"
    cmd("run", write_run(tmp_path / "run", values), "-o", out, "--decay", "0.5", "--names", names)
    suffix = SHADOW if names == "shadow" else ""
    found = read_checkpoint(out)
    assert {name: found[name + suffix].shape for name in shapes} == shapes
    assert float(found["b" + suffix]) == float(found["d" + suffix].item()) == 2.25


def test_nothing_but_empty_tensors(tmp_path: Path) -> None:
    """A checkpoint whose tensors all are empty has an average, without a byte of data."""
    run = write_run(tmp_path / "run", [{"w": np.zeros((0, 4), np.float32)}] * 2)
    cmd("run", run, "-o", tmp_path / "out.safetensors", "--decay", "0.5")
    assert read_checkpoint(tmp_path / "out.safetensors")[f"w{SHADOW}"].shape == (0, 4)


# ---------------------------------------------------------------------------- how big


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs VmHWM of Linux")
def test_gigabytes_in_a_hundred_megabytes_of_memory(tmp_path: Path) -> None:
    """1 GiB to average behind 4 GiB to leave out: right at both ends, in little memory."""
    elements, skipped = 1 << 28, (1 << 32) + 64
    run = tmp_path / "run"
    run.mkdir()
    header = {
        "w/Adam": {"dtype": "U8", "shape": [skipped], "data_offsets": [0, skipped]},
        "w": {"dtype": "F32", "shape": [elements]},
    }
    header["w"]["data_offsets"] = [skipped, skipped + 4 * elements]
    head = raw_safetensors(json.dumps(header).encode().ljust(240))
    for step, value in ((1, 2.0), (2, 4.0)):
        with (run / f"model-step-{step}.safetensors").open("wb") as file:
            file.write(head)
            file.truncate(len(head) + skipped + 4 * elements)
            for place in (0, elements // 2, elements - 1):
                file.seek(len(head) + skipped + 4 * place)
                file.write(np.float32(value).tobytes())
    out = tmp_path / "out.safetensors"
    words = ["run", run, "-o", out, "--decay", "0.5", "--dtype", "bfloat16"]
    try:
        done = child(*words, program=MEASURED)
        assert done.returncode == 0, done.stderr
        assert int(done.stderr.splitlines()[-1]) * 1024 < 150 * MIB
        with out.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            assert out.stat().st_size == start + 2 * elements
            for place, expected in ((0, 3.0), (1, 0.0), (elements // 2, 3.0), (elements - 1, 3.0)):
                file.seek(start + 2 * place)
                bits = int.from_bytes(file.read(2), "little") << 16
                assert np.uint32(bits).view(np.float32) == expected
    finally:
        out.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- names


NAMES = [
    "[red]w[/red]",
    "[bold",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "two\nlines\r\tand more",
    "nul\x00inside",
    "'",
    '"',
    "$(touch pwned)`x`",
    "emoji 😀 \u200d",
    "\u202etxt.exe",
    "שלום",
    "\u2028separator",
    "-o",
    "--help",
    "{step}{average}%s",
    "../../etc/passwd",
    "n" * 10_000,
    " ",
]
UNSAFE = {chr(n) for n in (*range(32), *range(127, 160), 0x202E, 0x2028)} - {"\n", "\t"}


def assert_safe(*texts: str) -> None:
    """No control character, and lines no name could have broken off."""
    for text in texts:
        assert not UNSAFE & set(text)
        assert not [line for line in text.splitlines() if line.startswith(("lines", "separator"))]


def test_tensor_names_that_would_do_harm_are_shown_escaped(tmp_path: Path) -> None:
    """Markup, escapes, newlines, quotes: the values are right and nothing reaches a terminal."""
    values = [
        {name: np.float32(10 * k + n) for n, name in enumerate(NAMES)} | {"i": np.int32(k)}
        for k in (1, 2, 3)
    ]
    run, out = write_run(tmp_path / "run", values), tmp_path / "out.safetensors"
    done = cmd("run", run, "-o", out, "--average", "mean", "-v")
    found = read_checkpoint(out)
    assert set(found) == {name + SHADOW for name in NAMES} | {"i"}
    for n, name in enumerate(NAMES):
        assert float(found[name + SHADOW]) == pytest.approx(20 + n)
    said = [done, cmd("plan", run, "-v"), cmd("inspect", out), cmd("map", out)]
    last = run / "model-step-300.safetensors"
    said += [cmd("diff", last, run / "model-step-100.safetensors", code=13)]
    said += [cmd("map", last, code=13), cmd("diff", last, out, code=13)]
    said += [cmd("run", run, "-o", tmp_path / "x.safetensors", "--exclude", n) for n in NAMES[-1:]]
    renamed = tmp_path / "renamed.safetensors"
    said += [cmd("rename", out, "-o", renamed, "--names", "variable", "-v")]
    for outcome in said:
        assert_safe(outcome.out, outcome.err)
    assert any("[red]w[/red]" in outcome.out for outcome in said)
    assert set(read_checkpoint(renamed)) == {*NAMES, "i"}


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_errors_about_such_names_are_safe_and_short(tmp_path: Path, name: str) -> None:
    """A disagreement about a harmful name is one line and a hint, however long the name."""
    run = write_run(tmp_path / "run", [{name: np.zeros(2, "f4")}, {name: np.zeros(3, "f4")}])
    outcome = cmd("plan", run, code=13)
    assert_safe(outcome.err)
    assert len(outcome.err.splitlines()) == 3
    assert len(outcome.err) < 2000
    document = json.loads(cmd("plan", run, "--json", code=13).out)
    assert_safe(document["message"], document["hint"])


FILES = [name for name in NAMES if not {"\0", "/", "{"} & set(name) and len(name) < 200]
FILES += [os.fsdecode(b"bad\xff\xfeutf8"), os.fsdecode(b"\xc3\x28"), "q" * 200]


@pytest.mark.parametrize("name", FILES, ids=range(len(FILES)))
def test_file_names_that_would_do_harm_work(tmp_path: Path, name: str) -> None:
    """Run directory, checkpoints and output called so: the result is right, the talk safe."""
    folder = tmp_path / f"{name}dir"
    for k in (1, 2, 3):
        write_checkpoint(folder / f"{name}-step-{k}.safetensors", {"w": np.float32(k)})
    (folder / f"foreign {name}").write_bytes(b"x")
    out = tmp_path / f"{name} o.safetensors"
    words = ["run", folder, "-o", out, "--average", "mean"]
    said = [cmd(*words), cmd(*words), cmd("plan", folder), cmd("inspect", folder)]
    assert float(read_checkpoint(out)[f"w{SHADOW}"]) == 2.0
    said += [cmd(*words, "--last", "2", code=14), cmd("plan", folder / f"{name}none", code=12)]
    said += [cmd("inspect", out), cmd("inspect", folder / f"{name}-step-1.safetensors")]
    for outcome in said:
        assert_safe(outcome.out, outcome.err)
        outcome.out.encode()
        outcome.err.encode()
    rows = json.loads(cmd("plan", folder, "--json").out)["averages"][0]["inputs"]
    assert [row["path"] for row in rows] == [
        str(folder / f"{name}-step-{k}.safetensors") for k in (1, 2, 3)
    ]


def test_commands_in_hints_are_quoted_for_the_shell(tmp_path: Path) -> None:
    """A path with blanks and quotes stands in a hint as one word of a shell."""
    folder = tmp_path / "it's $(my) run"
    write_run(folder, [{"w": np.float32(k)} for k in (1, 2, 3)])
    err = cmd("plan", folder, "--decay", "0.999").err
    hint = next(line for line in err.splitlines() if line.startswith("hint: "))
    assert shlex.split(hint)[3] == str(folder)
