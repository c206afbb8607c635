"""The formats by name, and what a path holds, told by content rather than by suffix.

A format is an index: parse the headers, check everything, say where each tensor lies. One reader
(`ema_cli.worker`) then serves all formats, and writing is the mirror image: a format says where
each tensor of an output will lie, and which bytes seal it once the data is there.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ema_cli.blueprint import Draft, Entry, Layout, Patch
from ema_cli.checksums import CRC32, CRC32C
from ema_cli.errors import InputError, UsageError
from ema_cli.formats import folders, foreign, hdf5, npz, safetensors, tensorflow, torch
from ema_cli.formats.detection import detect, start_of
from ema_cli.formats.known import Known
from ema_cli.hints import near_path
from ema_cli.tensors import Checkpoint, DType, Extent, Tensor
from ema_cli.text import shorten, with_article

__all__ = ["FORMATS", "Format", "Known", "detect", "read", "read_as"]


class Format(NamedTuple):
    """One row of the table.

    Attributes:
        title: for people.
        kind: what the path of a checkpoint names: a ``file``, a ``folder``, or the ``prefix`` of
            several files.
        suffix: of a single file, or of the file that tells of the others; empty for a folder.
        also: other suffixes of such files.
        read: path, what was parsed before, and where the model is inside, to a checkpoint.
        representable: whether it can hold a dtype.
        can_name: whether a tensor can have a name.
        template: the structure of a checkpoint, to be filled anew where these tensors are, and
            what becomes of unknown objects in it; None when it cannot hold the tensors as they are.
        fresh: a new structure for entries like those of a checkpoint, in shards of a size.
        stem: what an output is called, before its step, in a directory that was named alone.
        renamed: a new index over the bytes of a checkpoint, where the format keeps them apart.
        seal: what only the data decides, once the checksums it asks for are known.
        checksum: what those checksums are.
        plain_names: whether those who load it know variables only, and no shadows.
        nested: whether a checkpoint holds a model among other things.
        spill: writes the bytes of tensors that cannot be read where they lie to a file.
        known_as: what a template output's index is known as to `read`, if it came back unchanged.
        opaque_checksums: for a tensor of variable width, the CRC-32C of its bytes as they lie, and
            the one its index must hold.
        reference_check: opens finished files as those will who load them.
    """

    title: str
    kind: str
    suffix: str
    read: Callable[[str, Known, str], Checkpoint]
    representable: Callable[[DType], bool]
    can_name: Callable[[str], bool]
    template: Callable[[Checkpoint, Sequence[Tensor], str], Draft | None]
    fresh: Callable[[Sequence[Entry], Checkpoint, int | None], Draft]
    stem: str = ""
    renamed: Callable[[Sequence[Entry], Checkpoint], Draft] | None = None
    seal: Callable[[Layout, Mapping[Extent, int]], Sequence[Patch]] | None = None
    checksum: str = CRC32C
    nested: bool = False
    also: tuple[str, ...] = ()
    plain_names: bool = False
    spill: Callable[[Checkpoint, Collection[str], str], None] | None = None
    known_as: Callable[[Layout], tuple[Any, ...] | None] | None = None
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
    folders.SAFETENSORS.name: Format(
        "Hugging Face folder",
        "folder",
        "",
        folders.SAFETENSORS.read,
        safetensors.representable,
        safetensors.can_name,
        folders.SAFETENSORS.template,
        folders.SAFETENSORS.fresh,
        reference_check=safetensors.reference_check,
        plain_names=True,
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
    torch.NAME: Format(
        "PyTorch file",
        "file",
        torch.SUFFIXES[0],
        torch.read,
        torch.representable,
        torch.can_name,
        torch.template,
        torch.fresh,
        also=torch.SUFFIXES[1:2],
        seal=torch.seal,
        checksum=CRC32,
        nested=True,
        plain_names=True,
        known_as=torch.template_known_as,
    ),
    folders.TORCH.name: Format(
        "Hugging Face folder of PyTorch files",
        "folder",
        "",
        folders.TORCH.read,
        torch.representable,
        torch.can_name,
        folders.TORCH.template,
        folders.TORCH.fresh,
        seal=folders.TORCH.seal,
        checksum=CRC32,
        nested=True,
        plain_names=True,
    ),
    hdf5.NAME: Format(
        "HDF5 file",
        "file",
        hdf5.SUFFIXES[0],
        hdf5.read,
        hdf5.representable,
        hdf5.can_name,
        hdf5.template,
        hdf5.fresh,
        also=hdf5.SUFFIXES[1:],
        spill=hdf5.spill,
        plain_names=True,
    ),
    hdf5.KERAS: Format(
        "Keras file",
        "file",
        hdf5.KERAS_SUFFIX,
        hdf5.read_keras,
        hdf5.representable,
        hdf5.can_name,
        hdf5.template_keras,
        hdf5.fresh_keras,
        seal=hdf5.seal_keras,
        checksum=CRC32,
        spill=hdf5.spill_keras,
        plain_names=True,
    ),
    npz.NAME: Format(
        "NumPy archive",
        "file",
        npz.SUFFIX,
        npz.read,
        npz.representable,
        npz.can_name,
        npz.template,
        npz.fresh,
        seal=npz.seal,
        checksum=CRC32,
        spill=npz.spill,
    ),
}


def read(path: str, known: Known, key: str = "") -> Checkpoint:
    """Return the checkpoint at `path`: headers only, fully checked. Raises `InputError`.

    `key` is where the model is inside a checkpoint that holds more.
    """
    name = detect(path)
    if name is None:
        raise _unreadable(path)
    return read_as(name, path, known, key)


def read_as(name: str, path: str, known: Known, key: str = "") -> Checkpoint:
    """Return the checkpoint at `path`, whose format `detect` said is `name`."""
    if name == safetensors.NAME:
        foreign.refuse_disguise(path, start_of(path)[0])
    row = FORMATS[name]
    if row.kind == "file" and os.path.isdir(path):
        path = folders.only_file(path) or path
    if key and not row.nested:
        raise UsageError(
            f"--key {shorten(key)}: {shorten(path, 1000)} is {with_article(row.title)}, "
            "which holds nothing but one model",
            "leave out --key",
        )
    checkpoint = row.read(path, known, key)
    return dataclasses.replace(checkpoint, key=key) if key else checkpoint


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
        weights = folders.weights_in(path)
        found = f"{len(weights)} and no index" if weights else "none"
        return InputError(
            f"{shown}: expected a checkpoint folder with an index or exactly one file of weights, "
            f"found {found}",
            "average the checkpoints of a run with ema-avg run, or name one file of weights",
        )
    return InputError(
        f"{shown}: not a checkpoint: expected a safetensors, PyTorch, Keras or NumPy file, a "
        "folder of one of them, or a TensorFlow prefix",
        near_path(path) if not os.path.lexists(path) else "",
    )
