"""Reads HDF5 files: the index of a checkpoint from what the child process lists.

What lies in the file as one is addressed there. What is chunked, compressed, compact or not stored
at all, and numbers of another byte order than the rest, spill to a file of their own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ema_cli.errors import DamagedFile, UnsupportedInput
from ema_cli.files import open_input, open_unchanged, read_exact, stamp
from ema_cli.formats.hdf5 import isolation, keras, spilling
from ema_cli.formats.hdf5.config import NO_CONFIG, Config, parse
from ema_cli.formats.hdf5.isolation import Window
from ema_cli.formats.hdf5.keras import Told
from ema_cli.formats.hdf5.names import NAME, UNMARKED, Shadows, natural, tensor_name
from ema_cli.formats.hdf5.structure import Dataset, Structure, structure_of
from ema_cli.formats.known import Known
from ema_cli.tensors import DTYPES, Checkpoint, Extent, Index, Stamp, Tensor, swap_width
from ema_cli.text import shorten

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SIGNATURE_AT = (0, *(512 << k for k in range(24)))

MODEL_CONFIG = "model_config"
# What is not a tensor is remembered byte for byte up to this size, to know the file's like again.
_HOLES_LIMIT = 64 << 20
_REMEMBERED = 4
_PIECE = 1 << 20
_LARGEST_STEP = 1 << 62
SPILLED = 1  # the ordinal of the file of what spills


@dataclass(frozen=True, eq=False)
class Own:
    """What is kept with an index.

    Attributes:
        structure: of the HDF5 file.
        window: where it lies in the checkpoint's file.
        inflated: whether it has to be inflated first.
        datasets: by tensor name.
        shadows: where shadows lie.
    """

    structure: Structure
    window: Window
    inflated: bool
    datasets: Mapping[str, Dataset]
    shadows: Shadows


class Source(NamedTuple):
    """An HDF5 file, open: a file, what it is called, and where in it."""

    fd: int
    path: str
    window: Window


def read(path: str, known: Known) -> Checkpoint:
    """Return the checkpoint in the HDF5 file `path`: its checked structure, no tensor data.

    Raises `InputError`.
    """
    fd = open_input(path)
    try:
        file = stamp(fd, path)
        source = Source(fd, path, Window(0, file.size))
        structure = listed(source, known)
        identity = (NAME, structure.digest, file.size)
        if identity not in known:
            text = structure.root.get(MODEL_CONFIG)
            config = parse(path, text, f"attribute {MODEL_CONFIG}") if text else NO_CONFIG
            known[identity] = index_of(NAME, path, structure, source.window, config, MODEL_CONFIG)
        index, told = known[identity]
        step = told_step(source, index, told)
    finally:
        os.close(fd)
    return checkpoint_of(path, file, index, structure.digest, step)


def checkpoint_of(
    path: str, file: Stamp, index: Index, digest: str, step: tuple[int, str] | None
) -> Checkpoint:
    """Return the checkpoint of one file, and of what spills."""
    spilled = len(index.names) > 1
    n_bytes = spilling.size_of(t.extent for t in index.tensors if t.extent.file == SPILLED)
    files = (file, Stamp("", n_bytes, 0, 0)) if spilled else (file,)
    digests = (digest, "") if spilled else (digest,)
    return Checkpoint(path, files, index, digests, told_step=step)


# ---------------------------------------------------------------------------- structures


class _Remembered(NamedTuple):
    """A structure, the (offset, nbytes) of all that is no tensor, and what its bytes are."""

    structure: Structure
    holes: tuple[tuple[int, int], ...]
    digest: str


def listed(source: Source, known: Known) -> Structure:
    """Return the structure of an HDF5 file.

    The checkpoints of a run differ in their tensors' bytes only, and need to be listed once.
    """
    check_signature(source)
    key = (NAME, "remembered", source.window.nbytes)
    remembered: list[_Remembered] = known.setdefault(key, [])
    for one in remembered:
        if _digest(source, one.holes) == one.digest:
            return one.structure
    document, raw = isolation.list_file(*source)
    structure = structure_of(source.path, document, raw, source.window.nbytes)
    holes = _holes(structure, source.window.nbytes)
    direct = all(dataset.direct for dataset in structure.datasets if dataset.nbytes)
    small = sum(n_bytes for _, n_bytes in holes) <= _HOLES_LIMIT
    if direct and small and len(remembered) < _REMEMBERED:
        remembered.append(_Remembered(structure, holes, _digest(source, holes)))
    return structure


def sniff(start: memoryview) -> bool:
    """Whether a file that begins with these bytes may be an HDF5 file."""
    return any(start[at : at + len(_SIGNATURE)] == _SIGNATURE for at in _SIGNATURE_AT)


def check_signature(source: Source) -> None:
    """Raise `DamagedFile` unless HDF5's signature stands where it may."""
    _, path, (offset, nbytes) = source
    for at in _SIGNATURE_AT:
        if at + len(_SIGNATURE) > nbytes:
            break
        if _bytes(source, offset + at, len(_SIGNATURE)) == _SIGNATURE:
            return
    raise DamagedFile(path, f"expected the signature of HDF5, found none in {nbytes:,} bytes")


def _bytes(source: Source, offset: int, nbytes: int) -> bytearray:
    data = bytearray(nbytes)
    read_exact(source.fd, memoryview(data), offset, source.path)
    return data


def _holes(structure: Structure, nbytes: int) -> tuple[tuple[int, int], ...]:
    """Return what lies between the tensors; all offsets are those of the HDF5 file."""
    holes = []
    end = 0
    for offset, count in sorted({(d.offset, d.stored) for d in structure.datasets if d.direct}):
        if offset > end:
            holes.append((end, offset - end))
        end = offset + count
    return (*holes, (end, nbytes - end))


def _digest(source: Source, holes: Iterable[tuple[int, int]]) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE))
    for offset, n_bytes in holes:
        for start in range(0, n_bytes, _PIECE):
            piece = buffer[: min(_PIECE, n_bytes - start)]
            read_exact(source.fd, piece, source.window.offset + offset + start, source.path)
            digest.update(piece)
    return digest.hexdigest()


# ---------------------------------------------------------------------------- index


def index_of(
    format_name: str,
    path: str,
    structure: Structure,
    window: Window,
    config: Config,
    config_name: str,
    *,
    inflated: bool = False,
    records: tuple[Extent, ...] = (),
) -> tuple[Index, Told]:
    """Return the index of an HDF5 file, and what its datasets are for.

    Args:
        format_name: of the index.
        path: of the file, for errors.
        structure: what it holds.
        window: where it lies in the file.
        config: the model's configuration.
        config_name: where that stands.
        inflated: whether nothing of it lies in the file as it is.
        records: the bytes of which the container keeps checksums.
    """
    structure = _marked(path, structure, config)
    shadows = structure.shadows
    names = {d.path: tensor_name(d.path, shadows) for d in structure.datasets}
    if len(set(names.values())) != len(names):
        raise DamagedFile(path, "expected different names, found a shadow's twice")
    plain = tuple(d for d in structure.datasets if names[d.path] == d.path)
    told = keras.told(structure._replace(datasets=plain), config, config_name)
    big = _all_big(structure.datasets)
    tensors = _tensors(structure.datasets, names, window, big and not inflated, inflated)
    spilled = any(tensor.extent.file == SPILLED for tensor in tensors)
    keys = ("keras_version", "backend")
    datasets = {names[d.path]: d for d in structure.datasets}
    index = Index(
        format_name,
        tensors,
        ("", "") if spilled else ("",),
        {key: shorten(structure.root[key]) for key in keys if key in structure.root},
        big_endian=big and not inflated,
        roles=told.roles,
        roles_from=told.source,
        full_names=told.full_names,
        own=Own(structure, window, inflated, datasets, shadows),
        records=records,
        checksum="crc32",
        cautions=told.cautions,
        lies_as={name: dataset for dataset, name in names.items() if name != dataset},
    )
    return index, told


def _marked(path: str, structure: Structure, config: Config) -> Structure:
    """Return the structure with the dtype of what Keras's older layout does not mark."""
    unmarked = next((d for d in structure.datasets if d.dtype == UNMARKED), None)
    if unmarked is None:
        return structure
    if not config.bfloat16:
        raise UnsupportedInput(
            f"{shorten(path, 1000)}: dataset '{shorten(unmarked.path)}': expected numbers, found 2 "
            "opaque bytes, and nothing says whether they are bfloat16",
            "save the model again, as .keras or .weights.h5",
        )
    datasets = [
        d._replace(dtype="bfloat16") if d.dtype == UNMARKED else d for d in structure.datasets
    ]
    return structure._replace(datasets=tuple(datasets))


def _all_big(datasets: Sequence[Dataset]) -> bool:
    """Whether all numbers are big-endian and lie in the file as they are."""
    ordered = [d for d in datasets if d.nbytes and swap_width(d.dtype)]
    return bool(ordered) and all(d.big and d.direct for d in ordered)


def _tensors(
    datasets: Sequence[Dataset],
    names: Mapping[str, str],
    window: Window,
    big: bool,
    inflated: bool,
) -> tuple[Tensor, ...]:
    """Return the tensors in the order of their bytes, with a place for what spills."""
    found = []
    spilled: dict[int, Extent] = {}
    end = 0
    for dataset in sorted(datasets, key=lambda d: natural(d.path)):
        ordered = dataset.big == big or not swap_width(dataset.dtype)
        if not dataset.nbytes:
            extent = Extent(0, window.offset, 0)
        elif dataset.direct and ordered and not inflated:
            extent = Extent(0, window.offset + dataset.offset, dataset.stored)
        elif dataset.address in spilled:
            extent = spilled[dataset.address]
        else:
            extent = spilled[dataset.address] = Extent(SPILLED, end, dataset.nbytes)
            end = spilling.aligned(end + dataset.nbytes)
        dtype = DTYPES[dataset.dtype]
        found.append(Tensor(names[dataset.path], dtype, dataset.shape, extent))
    found.sort(key=lambda tensor: tensor.extent[:2])
    return tuple(found)


# ---------------------------------------------------------------------------- data


def spill(checkpoint: Checkpoint, names: Collection[str], path: str) -> None:
    """Write the named tensors to their places in the file `path`; see `spilling`."""
    file = checkpoint.files[0]
    fd = open_unchanged(file)
    try:
        spill_from(Source(fd, file.path, own_of(checkpoint.index).window), checkpoint, names, path)
    finally:
        os.close(fd)


def spill_from(source: Source, checkpoint: Checkpoint, names: Collection[str], path: str) -> None:
    """Write the named tensors of an open HDF5 file to their places in the file `path`."""
    datasets = own_of(checkpoint.index).datasets
    by_name = checkpoint.index.by_name
    wanted = {by_name[name].extent: datasets[name] for name in names if by_name[name].nbytes}
    spilling.write_datasets(*source, ((d, extent) for extent, d in wanted.items()), path)


def own_of(index: Index) -> Own:
    """Return what is kept with an index of an HDF5 file."""
    own = index.own
    assert isinstance(own, Own)  # noqa: S101  # made by `index_of`
    return own


def told_step(source: Source, index: Index, told: Told) -> tuple[int, str] | None:
    """Return what the optimizer counted, and the tensor that says so."""
    if not told.step:
        return None
    dataset = own_of(index).datasets[told.step]
    n_bytes = dataset.nbytes
    if dataset.direct:
        data = bytes(_bytes(source, source.window.offset + dataset.offset, n_bytes))
        value = int.from_bytes(data, "big" if dataset.big else "little", signed=True)
    else:
        [found] = isolation.read_boxes(*source, dataset.path, [((), ())], [n_bytes], 0)
        value = int.from_bytes(found, "little", signed=True)
    return (value, told.step) if 0 <= value < _LARGEST_STEP else None
