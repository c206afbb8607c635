"""Outputs of every format, and outputs that lie: bytes were changed, provenance made to agree."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conformance import CASES, make_run
from helpers import cmd

from ema_cli import provenance
from ema_cli.checksums import crc32c


def provenance_of(out: Path) -> Path:
    """Return where the provenance of an output lies."""
    return Path(provenance.path_for(os.fspath(out)))


def document_of(out: Path) -> dict[str, Any]:
    """Return the provenance of an output."""
    found: dict[str, Any] = json.loads(provenance_of(out).read_bytes())
    return found


def files_of(out: Path) -> list[Path]:
    """Return the files of an output, as its provenance names them."""
    names = [file["name"] for file in document_of(out)["output"]["files"]]
    return [Path(path) for _, path in provenance.files_of(os.fspath(out), names)]


def edit(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the provenance of an output."""
    document = document_of(out)
    change(document)
    provenance_of(out).write_text(json.dumps(document))


def forge(out: Path) -> None:
    """Make the provenance of an output agree with what its files hold now."""

    def agree(document: dict[str, Any]) -> None:
        described = document["output"]
        pairs = provenance.files_of(os.fspath(out), [f["name"] for f in described["files"]])
        for file, (_, path) in zip(described["files"], pairs, strict=True):
            data = Path(path).read_bytes()
            steps = range(0, len(data), provenance.CHECKSUM_BYTES)
            file["bytes"] = len(data)
            parts = (data[at : at + provenance.CHECKSUM_BYTES] for at in steps)
            file["crc32c"] = [f"{crc32c(part):08x}" for part in parts]
        described["fingerprint"] = provenance.fingerprint(pairs)

    edit(out, agree)


@contextmanager
def flipped(path: Path, offset: int, bit: int = 0) -> Iterator[None]:
    """Have one bit of a file changed, in place, as long as the context lasts."""
    raw = path.read_bytes()
    changed = bytearray(raw)
    changed[offset] ^= 1 << bit
    path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(raw)


# ---------------------------------------------------------------------------- making

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
    folder.mkdir(exist_ok=True)
    run = source(row, folder / "run")
    out = folder / CASES[row].called.format(9)
    cmd("run", run, "-o", out, "--format", row, "--decay", "0.5", *words)
    return out
