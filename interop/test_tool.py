"""The tool beside TensorFlow: it neither needs nor loads it, and leaves it nothing to undo."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf
from support import EVALUATION, GRAPH, KERAS, PARTITIONED, latest, tool

FRAMEWORKS = ("tensorflow", "keras", "google", "h5py", "torch", "jax")

# Runs a command where importing a framework is an error; prints which were imported all the same.
BLOCKED = f"""
import sys
FRAMEWORKS = {FRAMEWORKS!r}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FRAMEWORKS:
            raise ImportError(f"{{name}} was asked for")

sys.meta_path.insert(0, Blocker())
from ema_cli.cli import main
code = main(sys.argv[1:])
loaded = {{name.partition(".")[0] for name in sys.modules}} & set(FRAMEWORKS)
sys.exit(f"loaded: {{loaded}}" if loaded else code)
"""


def test_the_environment_has_tensorflow() -> None:
    """Else the tests below would prove nothing; and it is the release that is asked for."""
    text = (Path(__file__).parent / "requirements.txt").read_text(encoding="utf-8")
    assert f"tensorflow-cpu=={tf.__version__}" in text.splitlines()
    assert importlib.util.find_spec("keras") is not None


COMMANDS = {
    "run": ("run", GRAPH, "-o", "OUT/average", "--decay", "0.9"),
    "run in parts": ("run", PARTITIONED, "-o", "OUT/average", "--names", "variable"),
    "run of objects": ("run", KERAS / "compiled", "-o", "OUT/average", "--average", "mean"),
    "run of an export": ("run", KERAS / "savedmodel", "-o", "OUT/average"),
    "plan": ("plan", GRAPH),
    "inspect": ("inspect", KERAS / "compiled" / "ckpt-4"),
    "map": ("map", GRAPH / "digits.ckpt-300", "--for", EVALUATION),
    "diff": ("diff", GRAPH / "digits.ckpt-300", GRAPH / "digits.ckpt-300"),
    "rename": ("rename", GRAPH / "digits.ckpt-300", "-o", "OUT/renamed", "--names", "variable"),
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS.keys())
def test_no_command_imports_a_framework(tmp_path: Path, words: tuple[str | Path, ...]) -> None:
    """Though they are installed beside it: a process in which they cannot be imported works."""
    arguments = [str(word).replace("OUT", str(tmp_path)) for word in words]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_python_interface_imports_no_framework(tmp_path: Path) -> None:
    """Neither the class nor the functions."""
    program = (
        "import sys, ema_cli\n"
        f"ema = ema_cli.ExponentialMovingAverage(0.9, store={str(tmp_path / 'store')!r})\n"
        f"ema.apply({str(GRAPH / 'digits.ckpt-0')!r})\n"
        f"ema_cli.average_run({str(GRAPH)!r}, {str(tmp_path / 'out')!r}, decay=0.9)\n"
        f"ema_cli.restore_map({str(tmp_path / 'out')!r}, program={str(EVALUATION)!r})\n"
        "print(sorted(name for name in sys.modules if '.' not in name))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True
    )
    assert not set(FRAMEWORKS) & set(json.loads(done.stdout.replace("'", '"')))


# ---------------------------------------------------------------------------- state files


def test_the_state_file_of_an_output_names_every_output(tmp_path: Path) -> None:
    """`get_checkpoint_state` lists them, the last one written is the latest, paths are relative."""
    for last in (2, 3):
        out = f"{tmp_path}/out/model.ckpt-{{step}}-of-{last}"
        tool("run", GRAPH, "-o", out, "--average", "mean", "--last", str(last))
    names = [str(tmp_path / "out" / f"model.ckpt-300-of-{last}") for last in (2, 3)]
    state = tf.train.get_checkpoint_state(str(tmp_path / "out"))
    assert state.model_checkpoint_path == names[1]
    assert list(state.all_model_checkpoint_paths) == names
    (tmp_path / "out").rename(tmp_path / "moved")
    assert latest(tmp_path / "moved") == str(tmp_path / "moved" / "model.ckpt-300-of-3")


def test_the_state_file_of_a_training_stays(tmp_path: Path) -> None:
    """An average written beside the checkpoints of a training is never resumed from by mistake."""
    v = tf.Variable([1.0, 2.0])
    manager = tf.train.CheckpointManager(tf.train.Checkpoint(v=v), str(tmp_path), max_to_keep=None)
    for _ in range(3):
        v.assign_add([1.0, 1.0])
        manager.save()
    before = (tmp_path / "checkpoint").read_bytes()
    tool("run", tmp_path, "-o", tmp_path / "average", "--average", "mean")
    assert (tmp_path / "checkpoint").read_bytes() == before
    assert latest(tmp_path) == manager.latest_checkpoint
    tf.train.Checkpoint(v=v).restore(str(tmp_path / "average")).assert_consumed()
    assert v.numpy().tolist() == [3.0, 4.0]
