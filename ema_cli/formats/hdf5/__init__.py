"""HDF5 files and Keras's archives with one inside. What reads them is imported on first use.

The HDF5 library is used by a process of its own only, see `ema_cli.formats.hdf5.child`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ema_cli.blueprint import Draft, Entry, Layout, Patch
from ema_cli.formats.hdf5.names import KERAS, NAME
from ema_cli.formats.known import Known
from ema_cli.tensors import Checkpoint, DType, Extent, Tensor

__all__ = [
    "KERAS",
    "KERAS_SUFFIX",
    "NAME",
    "SUFFIXES",
    "can_name",
    "fresh",
    "fresh_keras",
    "read",
    "read_keras",
    "representable",
    "seal_keras",
    "sniff",
    "spill",
    "spill_keras",
    "template",
    "template_keras",
]

SUFFIXES = (".h5", ".hdf5")
KERAS_SUFFIX = ".keras"

_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def sniff(start: bytes) -> bool:
    """Whether a file that begins with `start` is an HDF5 file that has nothing before it."""
    return start.startswith(_SIGNATURE)


def representable(dtype: DType) -> bool:
    """Whether a dataset can have this dtype."""
    from ema_cli.formats.hdf5.structure import READABLE

    return dtype.name in READABLE


def can_name(name: str) -> bool:
    """Whether a tensor can have this name; see `names.can_name`."""
    from ema_cli.formats.hdf5 import names

    return names.can_name(name)


def read(path: str, known: Known, key: str = "") -> Checkpoint:
    """Return the checkpoint in an HDF5 file; see `reading.read`. `key` is for other formats."""
    from ema_cli.formats.hdf5 import reading

    del key
    return reading.read(path, known)


def spill(checkpoint: Checkpoint, names: Collection[str], path: str) -> None:
    """Write tensors that do not lie in the file as one to another; see `reading.spill`."""
    from ema_cli.formats.hdf5 import reading

    reading.spill(checkpoint, names, path)


def template(last: Checkpoint, averaged: Sequence[Tensor], unknown: str = "") -> Draft | None:
    """Return a copy of the file of `last`; see `drafting.template`. `unknown` is for others."""
    from ema_cli.formats.hdf5 import drafting

    del unknown
    return drafting.template(last, averaged)


def fresh(wanted: Sequence[Entry], last: Checkpoint, limit: int | None) -> Draft:
    """Return a new file; see `drafting.fresh`. `limit` is for formats with shards."""
    from ema_cli.formats.hdf5 import archive, drafting

    del limit
    make = archive.fresh_weights if last.index.format == KERAS else drafting.fresh
    return make(wanted, last)


def read_keras(path: str, known: Known, key: str = "") -> Checkpoint:
    """Return the checkpoint in a ``.keras`` archive; see `archive.read`."""
    from ema_cli.formats.hdf5 import archive

    del key
    return archive.read(path, known)


def spill_keras(checkpoint: Checkpoint, names: Collection[str], path: str) -> None:
    """Write tensors of an archive that cannot be read in place; see `archive.spill`."""
    from ema_cli.formats.hdf5 import archive

    archive.spill(checkpoint, names, path)


def template_keras(last: Checkpoint, averaged: Sequence[Tensor], unknown: str = "") -> Draft | None:
    """Return a copy of the archive of `last`; see `archive.template`."""
    from ema_cli.formats.hdf5 import archive

    del unknown
    return archive.template(last, averaged)


def fresh_keras(wanted: Sequence[Entry], last: Checkpoint, limit: int | None) -> Draft:
    """Return a new archive with the configuration of `last`; see `archive.fresh`."""
    from ema_cli.formats.hdf5 import archive

    del limit
    return archive.fresh(wanted, last)


def seal_keras(layout: Layout, checksums: Mapping[Extent, int]) -> Sequence[Patch]:
    """Return the checksums of an archive's new bytes; see `archive.seal`."""
    from ema_cli.formats.hdf5 import archive

    return archive.seal(layout, checksums)
