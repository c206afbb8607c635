"""A state that an earlier version made opens, is intact, is exported and goes on, for ever.

`golden/make_state.py` tells what is in it, and computed with NumPy what has to come of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden.make_state import (
    CONSUMED,
    EMA,
    MEAN,
    SETTINGS,
    STEPS,
    averages,
    checkpoint,
    digests,
    write,
)
from helpers import bits_equal, cmd, read_checkpoint
from stores import slot_of, tree, update

import ema_cli
from ema_cli.states import summary

GOLDEN = Path(__file__).parent.parent / "golden" / "state-1"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy, as git leaves it: other times, other modes, no holes."""
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "golden", copy_function=shutil.copyfile))
    (folder / "state" / "LOCK").unlink(missing_ok=True)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, ns=(1, 1))
    return folder


def exports(state: Path, out: Path) -> dict[str, dict[str, str]]:
    """Return the SHA-256 of the tensors of every average, and of the biased shadows."""
    ema_cli.export(state, out / "{average}.safetensors", names="variable")
    found = {
        label: {
            name: hashlib.sha256(array.tobytes()).hexdigest()
            for name, array in read_checkpoint(out / f"{label}.safetensors").items()
        }
        for label in (MEAN, EMA)
    }
    ema_cli.export(state, out / "shadows.safetensors", names="shadow", average=[EMA])
    biased = {
        name.partition("/")[0]: hashlib.sha256(array.tobytes()).hexdigest()
        for name, array in read_checkpoint(out / "shadows.safetensors").items()
        if name.endswith("/biased")
    }
    return {**found, "biased": biased}


def test_it_is_as_it_was_committed() -> None:
    """Nobody changed it, and what is expected of it was not made by the package."""
    files = {
        os.path.relpath(path, GOLDEN): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in GOLDEN.rglob("*")
        if path.is_file() and path.name not in ("expected.json", "LOCK")
    }
    assert files == EXPECTED["files"]
    assert (GOLDEN / "state" / "FORMAT").read_text() == "ema-avg state 1\n"
    assert EXPECTED["after"] == {str(n): digests(STEPS[:n]) for n in (3, 5)}
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 40_000
    for step in STEPS[CONSUMED:]:
        found = read_checkpoint(GOLDEN / "run" / f"model-{step}.safetensors")
        assert all(bits_equal(found[name], array) for name, array in checkpoint(step).items())


def test_it_opens_and_is_intact(golden: Path) -> None:
    """Every checksum; what it averages, up to which step, with which weights."""
    state = golden / "state"
    with ThreadPoolExecutor(1) as executor:
        found = summary.check(str(state), executor)
    assert (found.step, [row.step for row in found.applied]) == (300, [100, 200, 300])
    assert [average.label for average in found.averages] == [MEAN, EMA]
    assert found.settings == ("--average", "mean", "--average", "smooth=ema:0.75", "--zero-debias")
    mean, smooth = found.weights
    assert np.allclose(mean, [1 / 3] * 3, rtol=1e-15)
    assert np.allclose(smooth, np.array([9, 12, 16]) / 37, rtol=1e-15)
    assert "step 300" in cmd("inspect", state).err
    assert cmd("verify", state).code == 0


def test_it_is_exported(golden: Path, tmp_path: Path) -> None:
    """To the bits that NumPy computed, without a byte of it changed."""
    before = tree(golden)
    assert exports(golden / "state", tmp_path / "out") == EXPECTED["after"]["3"]
    assert tree(golden) == before
    look: dict[str, Any] = {"names": "variable", "dtype": "float32"}
    ema_cli.export(golden / "state", tmp_path / "x.npz", average=[EMA], **look)
    assert bits_equal(np.load(tmp_path / "x.npz")["weight"], averages(STEPS[:3])[EMA]["weight"])


@pytest.mark.parametrize("groups", [[2], [1, 1]], ids=["at once", "one by one"])
def test_it_goes_on(groups: list[int], golden: Path, tmp_path: Path) -> None:
    """To the bits that NumPy computed, and that a state of today makes of all five."""
    state, paths = golden / "state", sorted((golden / "run").iterdir())
    for count in groups:
        done = update(state, paths[:count], **SETTINGS)
        assert (len(done.applied), done.notes) == (count, ())
        del paths[:count]
    assert exports(state, tmp_path / "out") == EXPECTED["after"]["5"]
    today = tmp_path / "today"
    for step in STEPS:
        update(today, write(tmp_path / "all" / f"model-{step}.safetensors", step), **SETTINGS)
    assert slot_of(state).read_bytes() == slot_of(today).read_bytes()
    ema_cli.average_run(tmp_path / "all", tmp_path / "run-{average}.safetensors", **SETTINGS)
    ema_cli.export(state, tmp_path / "state-{average}.safetensors")
    for label in (MEAN, EMA):
        made = [
            (tmp_path / f"{kind}-{label}.safetensors").read_bytes() for kind in ("run", "state")
        ]
        assert made[0] == made[1]


def test_it_is_made_today_as_it_was(golden: Path, tmp_path: Path) -> None:
    """The same files, but for what tells when and with which versions; or there is a new format."""
    state, run = tmp_path / "state", tmp_path / "run"
    paths = [write(run / f"model-{step}.safetensors", step) for step in STEPS[:CONSUMED]]
    update(state, paths[0], **SETTINGS)
    update(state, paths, **SETTINGS)
    now, then = tree(state), tree(golden / "state")
    assert now.keys() == then.keys()
    told = ("ROOT", "plan", "ledger")
    assert {k: v for k, v in now.items() if k not in told} == {
        k: v for k, v in then.items() if k not in told
    }
    for name in told:
        a, b = (keys_of(json.loads(files[name].splitlines()[0][9:])) for files in (now, then))
        assert a == b, name


def keys_of(document: Any) -> Any:
    """Return the members of a document, without their values."""
    if isinstance(document, dict):
        return {name: keys_of(value) for name, value in document.items()}
    return type(document).__name__
