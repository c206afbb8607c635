"""The formats by name, and what a path holds, told by content rather than by suffix.

A format is an index: parse the headers, check everything, say where each tensor lies. One reader
(`ema_cli.worker`) then serves all formats, and writing is the mirror image: a format says where
each tensor of an output will lie, and which bytes seal it once the data is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ema_cli.blueprint import Draft, Entry, Layout
from ema_cli.errors import InputError
from ema_cli.files import open_input, read_exact
from ema_cli.formats import foreign, safetensors, sharded, tensorflow
from ema_cli.formats.known import Known
from ema_cli.tensors import Checkpoint, DType, Extent, Tensor
from ema_cli.text import shorten

__all__ = ["FORMATS", "Format", "Known", "detect", "read", "read_as"]


class Format(NamedTuple):
    """One row of the table.

    Attributes:
        title: for people.
        kind: what the path of a checkpoint names: a ``file``, a ``folder``, or the ``prefix`` of
            several files.
        suffix: of a single file, or of the file that tells of the others; empty for a folder.
        read: path and what was parsed before, to a checkpoint.
        representable: whether it can hold a dtype.
        can_name: whether a tensor can have a name.
        template: the structure of a checkpoint, to be filled anew.
        fresh: a new structure for entries like those of a checkpoint, in shards of a size.
        stem: what an output is called, before its step, in a directory that was named alone.
        renamed: a new index over the bytes of a checkpoint, where the format keeps them apart.
        seal: (ordinal of a file, its bytes) once the checksum of every extent is known.
        known_as: what a template output's index is known as to `read`, if it came back unchanged.
        opaque_checksums: for a tensor of variable width, the CRC-32C of its bytes as they lie, and
            the one its index must hold.
        reference_check: opens finished files as those will who load them.
    """

    title: str
    kind: str
    suffix: str
    read: Callable[[str, Known], Checkpoint]
    representable: Callable[[DType], bool]
    can_name: Callable[[str], bool]
    template: Callable[[Checkpoint], Draft]
    fresh: Callable[[Sequence[Entry], Checkpoint, int | None], Draft]
    stem: str = ""
    renamed: Callable[[Sequence[Entry], Checkpoint], Draft] | None = None
    seal: Callable[[Layout, Mapping[Extent, int]], tuple[int, bytes]] | None = None
    known_as: Callable[[Layout], tuple[Any, ...]] | None = None
    opaque_checksums: Callable[[Checkpoint, Tensor], tuple[int, int]] | None = None
    reference_check: Callable[[Iterable[str]], None] | None = None


FORMATS: Mapping[str, Format] = {
    safetensors.NAME: Format(
        "safetensors file",
        "file",
        safetensors.SUFFIX,
        safetensors.read,
        safetensors.representable,
        safetensors.can_name,
        safetensors.template,
        safetensors.fresh,
        known_as=safetensors.template_known_as,
        reference_check=safetensors.reference_check,
    ),
    sharded.NAME: Format(
        "Hugging Face folder",
        "folder",
        "",
        sharded.read,
        safetensors.representable,
        safetensors.can_name,
        sharded.template,
        sharded.fresh,
        reference_check=safetensors.reference_check,
    ),
    tensorflow.NAME: Format(
        "TensorFlow checkpoint",
        "prefix",
        tensorflow.SUFFIX,
        tensorflow.read,
        tensorflow.representable,
        tensorflow.can_name,
        tensorflow.template,
        tensorflow.fresh,
        stem=tensorflow.STEM,
        renamed=tensorflow.renamed,
        seal=tensorflow.seal,
        known_as=tensorflow.template_known_as,
        opaque_checksums=tensorflow.opaque_checksums,
    ),
}


def detect(path: str) -> str | None:
    """Return the name of the format of `path`, or None when it is no checkpoint we know.

    Raises `InputError` when it cannot be looked at.
    """
    if os.path.isdir(path):
        if sharded.is_checkpoint(path):
            return sharded.NAME
        found = tensorflow.prefix_in(path) or tensorflow.prefix_of(path)
        return tensorflow.NAME if found else None
    if path.endswith(sharded.INDEX_SUFFIX):
        return sharded.NAME
    if path.endswith(safetensors.SUFFIX):
        return safetensors.NAME
    if tensorflow.prefix_of(path) is not None:
        return tensorflow.NAME
    start, file_size = _start(path)
    return safetensors.NAME if safetensors.sniff(start, file_size) else None


def _start(path: str) -> tuple[bytes, int]:
    fd = open_input(path)
    try:
        n_bytes = os.fstat(fd).st_size
        start = bytearray(min(n_bytes, 16))
        read_exact(fd, memoryview(start), 0, path)
        return bytes(start), n_bytes
    finally:
        os.close(fd)


def read(path: str, known: Known) -> Checkpoint:
    """Return the checkpoint at `path`: headers only, fully checked. Raises `InputError`."""
    name = detect(path)
    if name is None:
        raise _unreadable(path)
    return read_as(name, path, known)


def read_as(name: str, path: str, known: Known) -> Checkpoint:
    """Return the checkpoint at `path`, whose format `detect` said is `name`."""
    if name == safetensors.NAME:
        foreign.refuse_disguise(path, _start(path)[0])
    return FORMATS[name].read(path, known)


def _unreadable(path: str) -> InputError:
    """Return the error that says what `path` is and what would convert it."""
    shown = shorten(path, 1000)
    if tensorflow.is_v1(path):
        return tensorflow.v1_refusal(path)
    known = foreign.recognise(path)
    if known is not None:
        return foreign.unread(path, known)
    if os.path.isdir(path):
        several = [os.path.basename(prefix) for prefix in tensorflow.prefixes(path)]
        if several:
            return InputError(
                f"{shown}: expected one checkpoint, found {len(several)}: "
                f"{', '.join(shorten(name) for name in several[:3])} …",
                "name one of them",
            )
        _, weights = sharded.contents(path)
        found = f"{len(weights)} and no index" if weights else "none"
        return InputError(
            f"{shown}: expected a checkpoint folder with an index or exactly one "
            f"{safetensors.SUFFIX} file, found {found}"
        )
    return InputError(
        f"{shown}: not a checkpoint: expected a safetensors file or folder, or a TensorFlow prefix"
    )
