"""PyTorch files: zip archives (`archive`) and the older stream format (`legacy`, read only).

What a file holds is told by a pickle, which is never run: `machine` makes inert records of it.
`models` finds the model among what is there, `indexing` tells where its elements lie.

What reads and writes such files is imported when one is met: a run of other formats starts
without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ema_cli.blueprint import Draft, Entry, Layout, Patch
from ema_cli.formats.known import Known
from ema_cli.tensors import Checkpoint, DType, Extent, Tensor

NAME = "torch"
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")

# The first bytes of a zip archive, with members and without.
_ZIP = (b"PK\3\4", b"PK\5\6")


def sniff(start: bytes) -> bool:
    """Whether a file that begins so (64 bytes or more) may be a PyTorch file."""
    if start.startswith(_ZIP):
        return True
    from ema_cli.formats.torch import legacy

    return legacy.sniff(start)


def read(path: str, known: Known, key: str = "") -> Checkpoint:
    """Return the checkpoint in a file; see `reading.read`."""
    from ema_cli.formats.torch import reading

    return reading.read(path, known, key)


def representable(dtype: DType) -> bool:
    """Whether PyTorch has this dtype."""
    from ema_cli.formats.torch import drafting

    return drafting.representable(dtype)


def can_name(name: str) -> bool:
    """Whether a tensor of a state_dict can have this name."""
    from ema_cli.formats.torch import drafting

    return drafting.can_name(name)


def template(last: Checkpoint, averaged: Sequence[Tensor], unknown: str = "refuse") -> Draft | None:
    """Return a copy of `last` with other storages; see `drafting.template`."""
    from ema_cli.formats.torch import drafting

    return drafting.template(last, averaged, unknown)


def template_known_as(layout: Layout) -> tuple[object, ...] | None:
    """Return the key in `Known` of a copy, whose pickle is that of the last checkpoint."""
    from ema_cli.formats.torch import indexing, reading

    if not layout.files[0].copy_of:
        return None
    contents = reading.contents_of(layout.last.files[0])
    return indexing.same_as(contents, layout.files[0].nbytes, layout.last.key)


def fresh(wanted: Sequence[Entry], last: Checkpoint, limit: int | None) -> Draft:
    """Return a new state_dict; see `drafting.fresh`. `limit` is for other formats."""
    from ema_cli.formats.torch import drafting

    del limit
    return drafting.fresh(wanted, last)


def seal(layout: Layout, checksums: Mapping[Extent, int]) -> list[Patch]:
    """Return the checksums of the storages, in their places; see `drafting.seal`."""
    from ema_cli.formats.torch import drafting

    return drafting.seal(layout, checksums)
