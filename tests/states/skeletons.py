"""What the tests of skeletons share: keeping the structure of a checkpoint, reading it again."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT

from ema_cli import formats
from ema_cli.layout import Wishes, lay_out
from ema_cli.naming import SHADOW_NAME
from ema_cli.selection import select
from ema_cli.states.skeleton import Skeleton, keep, read
from ema_cli.tensors import Checkpoint, Index

FIXTURES = ROOT / "fixtures"


class Pair(NamedTuple):
    """A checkpoint and what was kept of it."""

    source: Checkpoint
    skeleton: Skeleton
    directory: Path

    def read(self) -> Checkpoint:
        """Return what the skeleton tells, by way of a document."""
        document = json.loads(json.dumps(self.skeleton.to_json()))
        return read(Skeleton.from_json(document, "document"), os.fspath(self.directory))

    def pieces(self, ordinal: int = 0) -> list[tuple[int, int]]:
        """Return (start, stop) of what is kept of a file."""
        return [(at, at + count) for at, count in self.skeleton.files[ordinal].pieces]

    def raw(self, ordinal: int = 0) -> bytes:
        """Return a file of the skeleton, zeros where it has holes."""
        return (self.directory / self.skeleton.files[ordinal].name).read_bytes()


def kept(path: Path, held: Collection[str] | None = None, key: str = "") -> Pair:
    """Keep the structure of a checkpoint, without the bytes of all tensors or those named."""
    source = formats.read(os.fspath(path), {}, key)
    return kept_of(source, source.index.by_name if held is None else held, path)


def kept_of(source: Checkpoint, held: Collection[str], path: Path) -> Pair:
    """Keep the structure of a checkpoint that was read, beside it."""
    directory = path.parent / "state" / "last-1"
    directory.parent.mkdir(exist_ok=True)
    return Pair(source, keep(source, held, os.fspath(directory)), directory)


def copy_of(fixture: str, folder: Path) -> Path:
    """Copy the folder a fixture lies in, to be changed; returns the fixture's path there."""
    above = (FIXTURES / fixture).parent
    return Path(shutil.copytree(above, folder / "source")) / Path(fixture).name


def same(first: Checkpoint, second: Checkpoint) -> None:
    """Check that two checkpoints hold the same in the same places."""
    for field in dataclasses.fields(Index):
        if field.name != "own":
            old, new = getattr(first.index, field.name), getattr(second.index, field.name)
            assert old == new, field.name
    for field in ("digests", "told_step", "key"):
        assert getattr(first, field) == getattr(second, field), field
    assert [file.size for file in first.files] == [file.size for file in second.files]
    assert bool(first.index_file) == bool(second.index_file)
    assert second.checksums is None


def layouts(checkpoint: Checkpoint) -> list[object]:
    """Return what outputs of several kinds are laid out like, but for their paths."""
    found: list[object] = []
    selection = select(checkpoint.index, (), "average", SHADOW_NAME)
    for wishes in (
        Wishes(names="variable", unknown="keep"),
        Wishes(names="shadow", unknown="drop"),
        Wishes(names="shadow", format="safetensors"),
        Wishes(names="variable", unknown="keep", dtype="float64"),
    ):
        layout = lay_out("x", checkpoint, selection, wishes, None)
        files = [(f.name, f.nbytes, f.literals, bool(f.copy_of)) for f in layout.files]
        found.append(
            (files, layout.places, layout.entries, layout.template, layout.sums, layout.left_out)
        )
    return found
