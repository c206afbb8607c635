"""What the tests of states share: runs to be averaged, states made of them, their files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from helpers import write_checkpoint

import ema_cli
from ema_cli.checksums import crc32c
from ema_cli.continuing import StateResult
from ema_cli.errors import EmaError

FIXTURES = ROOT / "fixtures"
Files = dict[str, bytes]
Document = dict[str, Any]


def without_barriers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what only matters when the power goes, and takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(os, "fdatasync", lambda fd: None, raising=False)


# ---------------------------------------------------------------------------- runs


def values(k: int) -> dict[str, np.ndarray]:
    """Return the k-th checkpoint of a small training: two averaged tensors, and a copied one."""
    chance = np.random.default_rng(k)
    return {
        "kernel": chance.standard_normal((3, 5)).astype(np.float32),
        "bias": np.float32([k, -k / 3]),
        "seen": np.int64(64 * k),
    }


def write_steps(folder: Path, steps: Iterable[int], **extra: Any) -> list[Path]:
    """Write small checkpoints for some steps; returns their paths."""
    return [
        write_checkpoint(folder / f"model-{step}.safetensors", {**values(step), **extra})
        for step in steps
    ]


def paths_of(run: Path | str, **given: Any) -> list[str]:
    """Return the checkpoints of a run in order."""
    return [checkpoint.path for checkpoint in ema_cli.plan_run(run, **given).run.checkpoints]


# ---------------------------------------------------------------------------- states


def update(state: Path, runs: Any, **given: Any) -> StateResult:
    """Mix what is new into a state."""
    result = ema_cli.average_run(runs, state=state, **given)
    assert isinstance(result, StateResult)
    return result


def files_of(path: Path) -> Files:
    """Return the files of a checkpoint: of a folder, under a prefix, or the one there is."""
    if path.is_dir():
        return {found.name: found.read_bytes() for found in sorted(path.iterdir())}
    if path.exists():
        return {"": path.read_bytes()}
    beside = sorted(path.parent.glob(f"{path.name}.*"))
    return {p.name[len(path.name) :]: p.read_bytes() for p in beside if p.suffix != ".json"}


def made(make: Callable[[Path], object], out: Path) -> Files | str:
    """Return the files of an output that `make` writes, or which error it is instead."""
    out.parent.mkdir(parents=True)
    try:
        make(out)
    except EmaError as error:
        return f"{type(error).__name__}: {error.message}"
    return files_of(out)


def exported(state: Path, out: Path, **given: Any) -> Files:
    """Return the files of what a state exports to a new path."""
    shutil.rmtree(out.parent / "exported", ignore_errors=True)
    found = made(lambda path: ema_cli.export(state, path, **given), out.parent / "exported" / "x")
    assert isinstance(found, dict), found
    return found


def tree(folder: Path) -> Files:
    """Return every file below a folder, but for what only tells people who holds a lock."""
    return {
        os.path.relpath(path, folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "LOCK"
    }


def what_counts(state: Path) -> Files:
    """Return the files that the generation that counts consists of."""
    root = document(state, "ROOT")
    ledger = (state / "ledger").read_bytes()[: root["ledger"][0]]
    generation, slot = root["generation"], f"slot.{root['slot']}"
    last = state / f"last-{generation}"
    inside = {f"last/{name}": data for name, data in tree(last).items()} if last.exists() else {}
    names = ("FORMAT", "ROOT", "plan", f"manifest-{generation}", slot)
    return {"ledger": ledger, **inside, **{name: (state / name).read_bytes() for name in names}}


def slot_of(state: Path) -> Path:
    """Return the slot that counts."""
    return state / f"slot.{document(state, 'ROOT')['slot']}"


# ---------------------------------------------------------------------------- small files


def document(state: Path, name: str) -> Any:
    """Return the one document in a small file of a state."""
    [only] = documents(state, name)
    return only


def documents(state: Path, name: str) -> list[Any]:
    """Return the documents in a small file of a state."""
    return [json.loads(line[9:]) for line in (state / name).read_bytes().splitlines()]


def sealed(found: Any) -> bytes:
    """Return a document as a line with its checksum; what is bytes already is no document."""
    text = found
    if not isinstance(found, bytes):
        text = json.dumps(found, separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (crc32c(text), text)


def rewrite(
    state: Path,
    *,
    root: Mapping[str, Any] | bytes | None = None,
    plan: Any = None,
    manifest: Any = None,
    ledger: Sequence[Any] | None = None,
) -> None:
    """Replace small files of a state by documents, or raw JSON, with checksums that fit.

    `root` holds the members that differ, or is the whole document as raw JSON.
    """
    now = document(state, "ROOT")
    for key, name, found in (("plan", "plan", plan), ("manifest", manifest_of(state), manifest)):
        if found is not None:
            data = sealed(found)
            (state / name).write_bytes(data)
            now[key] = crc32c(data)
    if ledger is not None:
        data = b"".join(map(sealed, ledger))
        (state / "ledger").write_bytes(data)
        now["ledger"] = [len(data), crc32c(data)]
    told = root if isinstance(root, bytes) else {**now, **(root or {})}
    (state / "ROOT").write_bytes(sealed(told))


def manifest_of(state: Path) -> str:
    """Return what the manifest that counts is called."""
    return f"manifest-{document(state, 'ROOT')['generation']}"
