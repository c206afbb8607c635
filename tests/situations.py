"""A day's work with `--json`, of which every line is held to the schemas: the situations."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from helpers import cmd, write_checkpoint, write_run

ROOT = Path(__file__).resolve().parent.parent
SHADOW = "ExponentialMovingAverage"
HALF = ("--decay", "0.5")
TF = "fixtures/tensorflow/graph"
SINK = "sink-{step}-{average}.safetensors"
HOSTILE = "we\nird\t[red]\x1b[31m/\N{SNOWMAN}"
NOT_UTF8 = os.fsdecode(b"r\xffn")

# What is run, in order; a number is the exit code, 0 without one.
SITUATIONS: dict[str, tuple[str | int, ...]] = {
    "version": ("--version",),
    "version, the other way round": ("--json", "--version"),
    "before a command": ("--json", "plan", "run", 2),
    "no such command": ("nosuch", 2),
    "no such option": ("plan", "run", "--decya", "1", 2),
    "nothing to average": ("plan", "empty", 10),
    "no such run": ("plan", "none", 12),
    "plan": ("plan", "run", *HALF),
    "plan with options": (
        *("plan", "run", "--average", "a=mean@last=2", "--average", "w=weights:weights.txt"),
        *("--include", "w", "--exclude", "b", "--rule", "^x", "y", "-o", "-{average}.safetensors"),
    ),
    "plan with a warning": ("plan", "run", "--decay", "0.999"),
    "plan of an output that exists": ("plan", "run", *HALF, "-o", "mine.safetensors"),
    "plan of a damaged run": ("plan", "damaged", *HALF, 3),
    "plan of what has to be unpacked": ("plan", "fixtures/npz/compressed", *HALF),
    "dry run": ("run", "run", *HALF, "-n", "-o", "never.safetensors"),
    "strict": ("plan", "run", "--decay", "0.999", "--strict", 2),
    "run": ("run", "run", *HALF, "-o", "average.safetensors", "--names", "shadow"),
    "run again": ("run", "run", *HALF, "-o", "average.safetensors", "--names", "shadow"),
    "run, quietly": ("run", "damaged", *HALF, "-q", "-o", "quiet.npz", 3),
    "run without an output": ("run", "run", *HALF, 2),
    "run onto another file": ("run", "run", *HALF, "-o", "mine.safetensors", 14),
    "run of non-finite values": ("run", "infinite", *HALF, "-o", "never.safetensors", 17),
    "run of hostile names": ("run", "hostile", *HALF, "-o", "hostile.safetensors"),
    "run of names that are no UTF-8": ("run", NOT_UTF8, *HALF, "-o", f"{NOT_UTF8}.safetensors"),
    "run of a checkpoint without a step": (
        *("run", "a.safetensors", "b.safetensors", "--order", "given", *HALF),
        *("-o", "given.safetensors"),
    ),
    "run of TensorFlow's": ("run", TF, *HALF, "-o", "tf/model"),
    "run of PyTorch's": ("run", "fixtures/torch/run", *HALF, "-o", "model.pt"),
    "run of Hugging Face's": ("run", "fixtures/digits/bf16", *HALF, "-o", "folder"),
    "run of NumPy's": ("run", "fixtures/npz/run", *HALF, "-o", "model.npz"),
    "run of Keras's": ("run", "fixtures/keras/archive", *HALF, "-o", "model.keras"),
    "run with statistics": (
        *("run", "spiky", "--average", "all=mean", "--average", "half=ema:0.5", "--stats"),
        *("-o", "spiky-{average}.npz", "--plot", "spiky.svg"),
    ),
    "run that refuses outliers": (
        *("run", "spiky", *HALF, "--outliers", "error", "-o", "never.npz", 13),
    ),
    "run again from its provenance": (
        *("run", "--from", "average.safetensors.ema.json", "-o", "again.safetensors"),
    ),
    "inspect of a run": ("inspect", "damaged", 3),
    "inspect of a run without steps": ("inspect", "gaps"),
    "inspect of a checkpoint": ("inspect", "metadata.safetensors"),
    "inspect of an output": ("inspect", "average.safetensors"),
    "inspect of slices": ("inspect", "fixtures/tensorflow/partitioned/model.ckpt-0"),
    "inspect of hostile names": ("inspect", "hostile/model-step-100.safetensors"),
    "inspect of nothing": ("inspect", "none", 12),
    "map": ("map", "run/model-step-100.safetensors", 13),
    "map that finds everything": ("map", "average.safetensors"),
    "map of other names": ("map", "run/model-step-100.safetensors", "--for", "a.safetensors", 13),
    "map as code": ("map", "average.safetensors", "--python"),
    "map of hostile names": ("map", "hostile/model-step-100.safetensors", 13),
    "diff": ("diff", "run/model-step-100.safetensors", "run/model-step-200.safetensors", 13),
    "diff of infinities": ("diff", "a.safetensors", "infinite/model-step-200.safetensors", 13),
    "diff of equal ones": ("diff", "average.safetensors", "average.safetensors"),
    "diff of other names": ("diff", "average.safetensors", "hostile.safetensors", 13),
    "map of nothing": ("map", "none", 12),
    "diff of nothing": ("diff", "none", "a.safetensors", 12),
    "rename, dry": ("rename", "shadows.safetensors", "-o", "p.npz", "--names", "variable", "-n"),
    "rename": ("rename", "shadows.safetensors", "-o", "plain.npz", "--names", "variable"),
    "rename of nothing": ("rename", "a.safetensors", "-o", "x.safetensors", 13),
    "run with a state": ("run", "run", *HALF, "--state", "state"),
    "run with a state again": ("run", "run", *HALF, "--state", "state", "-o", "state.npz"),
    "run with a state of a damaged run": ("run", "damaged", *HALF, "--state", "other", 3),
    "run with other settings": ("run", "run", "--decay", "0.25", "--state", "state", 16),
    "plan with a state": ("plan", "run", *HALF, "--state", "state"),
    "watch": (
        *("watch", "damaged", "--state", "watched", "--decay", "0.999", "-o", SINK),
        *("--interval", "0.1", "--idle-timeout", "0.2", 3),
    ),
    "watch of what is behind": (
        *("watch", "later", "--state", "watched", "--decay", "0.999"),
        *("--interval", "0.1", "--idle-timeout", "0.2"),
    ),
    "watch that is refused": ("watch", "run", "--state", "state", "--decay", "0.1", 16),
    "inspect of a state": ("inspect", "watched"),
    "export": ("export", "state", "-o", "exported.safetensors"),
    "export of nothing": ("export", "none", "-o", "x.npz", 12),
    "verify": ("verify", "average.safetensors", "--full"),
    "verify without sources": ("verify", "orphan.safetensors", 3),
    "verify of a state": ("verify", "state"),
    "verify of a damaged output": ("verify", "broken.safetensors", 12),
}


class Done(NamedTuple):
    """What a situation was and did."""

    words: tuple[str, ...]
    code: int
    out: str

    @property
    def documents(self) -> list[dict[str, Any]]:
        """The lines of stdout."""
        return [json.loads(line, parse_constant=_refuse) for line in self.out.splitlines()]


def _refuse(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


def values(k: float) -> dict[str, Any]:
    """A small checkpoint."""
    return {"w": np.float32([k, -k, 1]), "b": np.float16([k]), "global_step": np.int64(k * 100)}


def _spiky() -> Iterator[dict[str, Any]]:
    """A walk with one step that is far too long, and one that was saved twice."""
    random = np.random.default_rng(0)
    walk = {"a/w": random.normal(size=64), "b/w": random.normal(size=64)}
    for k in range(14):
        if k != 4:
            walk = {name: v + 0.01 * random.normal(size=64) for name, v in walk.items()}
        spike = 9 if k == 9 else 0
        yield {name: (v + spike).astype(np.float32) for name, v in walk.items()}


def prepare() -> None:
    """Make what the situations need in the current directory."""
    Path("fixtures").symlink_to(ROOT / "fixtures")
    Path("empty").mkdir()
    write_run(Path("run"), [values(k) for k in (1, 2, 3, 4)])
    write_run(Path("damaged"), [values(k) for k in (1, 2, 3)])
    for path in Path("damaged").iterdir():
        os.utime(path, (1, 1))
    cut = Path("damaged/model-step-200.safetensors")
    cut.write_bytes(cut.read_bytes()[:-1])
    os.utime(cut, (1, 1))
    Path("damaged/notes.txt").write_text("nothing")
    write_run(Path("infinite"), [{"w": np.float32([k, np.inf, np.nan])} for k in (1, 2)])
    names = {HOSTILE: np.float32([1]), "b": np.float32([2])}
    write_run(Path("hostile"), [names, names])
    write_run(Path(NOT_UTF8), [values(1), values(2)])
    write_run(Path("gaps"), [values(k) for k in (1, 2, 3, 9, 10)])
    for name in ("a", "b"):
        write_checkpoint(f"{name}.safetensors", {"w": np.float32([1, 2, 3])})
    for number in (5, 6):
        os.rename(f"gaps/model-step-{number - 1}00.safetensors", f"gaps/model-step-{number}000.x")
        os.rename(f"gaps/model-step-{number}000.x", f"gaps/model-step-{number}000.safetensors")
    write_checkpoint("mine.safetensors", values(7))
    write_checkpoint("metadata.safetensors", values(7), {"format": "np"})
    write_run(Path("spiky"), list(_spiky()))
    one = np.float32([1])
    shadows = {"a": one, f"a/{SHADOW}": one, f"a/{SHADOW}/biased": one, "c": one}
    write_checkpoint("shadows.safetensors", shadows)
    Path("weights.txt").write_text("100 1\n200 2\n300 3\n400 4\n")
    write_run(Path("gone"), [values(k) for k in (1, 2)])
    for name in ("orphan", "broken"):
        cmd("run", "gone", *HALF, "-o", f"{name}.safetensors")
    with open("broken.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    for path in Path("gone").iterdir():
        path.unlink()
    Path("later").mkdir()


def _fall_behind() -> None:
    """A checkpoint turns up whose step lies before what the state has averaged."""
    for step in (50, 400):
        path = write_checkpoint(f"later/model-step-{step}.safetensors", values(step / 100))
        os.utime(path, (1, 1))


def spend() -> dict[str, Done]:
    """Carry out every situation in the current directory, in order."""
    prepare()
    done = {}
    for name, given in SITUATIONS.items():
        *words, code = given if isinstance(given[-1], int) else (*given, 0)
        if name == "watch of what is behind":
            _fall_behind()
        texts = [str(word) for word in words]
        outcome = cmd(*texts, *([] if "--json" in texts else ["--json"]), code=int(code))
        done[name] = Done(tuple(texts), int(code), outcome.out)
    return done
