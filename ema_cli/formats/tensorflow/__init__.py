"""TensorFlow checkpoints (TensorBundle): a table of entries beside files of raw bytes.

``PREFIX.index`` is a sorted table (`table`) whose entries (`entries`) tell dtype, shape, place and
checksum of each tensor in ``PREFIX.data-?????-of-?????``. Source: tensor_bundle.proto and
tensor_bundle.cc of TensorFlow.

What reads and writes them is imported when a checkpoint is met: a run of other formats starts
without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ema_cli.blueprint import Draft, Entry, Layout, Patch
from ema_cli.formats.known import Known
from ema_cli.formats.tensorflow.places import (
    IN_SAVED_MODEL,
    META_SUFFIX,
    NAME,
    STATE_FILE,
    STEM,
    SUFFIX,
    V1,
    files_of,
    is_v1,
    prefix_in,
    prefix_of,
    prefixes,
    saved_model_in,
    state_in,
    stem_of,
    v1_refusal,
)
from ema_cli.tensors import Checkpoint, DType, Extent, Tensor

__all__ = [
    "IN_SAVED_MODEL",
    "META_SUFFIX",
    "NAME",
    "STATE_FILE",
    "STEM",
    "SUFFIX",
    "V1",
    "can_name",
    "files_of",
    "fresh",
    "is_v1",
    "opaque_checksums",
    "prefix_in",
    "prefix_of",
    "prefixes",
    "read",
    "renamed",
    "representable",
    "saved_model_in",
    "seal",
    "state_in",
    "stem_of",
    "template",
    "template_known_as",
    "v1_refusal",
]


def read(path: str, known: Known, key: str = "") -> Checkpoint:
    """Return the checkpoint that `path` means; see `bundle.read`. Nothing has a `key` there."""
    from ema_cli.formats.tensorflow import bundle

    del key
    return bundle.read(path, known)


def representable(dtype: DType) -> bool:
    """Whether a TensorFlow checkpoint can hold this dtype."""
    from ema_cli.formats.tensorflow.entries import DTYPE_NUMBERS

    return dtype.name in DTYPE_NUMBERS


def can_name(name: str) -> bool:
    """Whether a tensor can have this name; see `drafting.can_name`."""
    from ema_cli.formats.tensorflow import drafting

    return drafting.can_name(name)


def template(last: Checkpoint, averaged: Sequence[Tensor], unknown: str) -> Draft:
    """Return the files of `last`; see `drafting.template`."""
    from ema_cli.formats.tensorflow import drafting

    del averaged, unknown
    return drafting.template(last)


def template_known_as(layout: Layout) -> tuple[object, ...]:
    """Return the key in `Known` of an output whose index differs in checksums only."""
    from ema_cli.formats.tensorflow import bundle

    return bundle.known_as(layout.files[-1].nbytes)


def fresh(wanted: Sequence[Entry], last: Checkpoint, limit: int | None) -> Draft:
    """Return one new shard and its index; see `drafting.fresh`. `limit` is for other formats."""
    from ema_cli.formats.tensorflow import drafting

    del limit
    return drafting.fresh(wanted, last)


def renamed(wanted: Sequence[Entry], source: Checkpoint) -> Draft:
    """Return a new index over copies of the data files; see `drafting.renamed`."""
    from ema_cli.formats.tensorflow import drafting

    return drafting.renamed(wanted, source)


def seal(layout: Layout, checksums: Mapping[Extent, int]) -> list[Patch]:
    """Return the index file; see `drafting.seal`."""
    from ema_cli.formats.tensorflow import drafting

    return drafting.seal(layout, checksums)


def opaque_checksums(checkpoint: Checkpoint, tensor: Tensor) -> tuple[int, int]:
    """Return the checksums of strings or variants; see `opaque.opaque_checksums`."""
    from ema_cli.formats.tensorflow import opaque

    return opaque.opaque_checksums(checkpoint, tensor)
