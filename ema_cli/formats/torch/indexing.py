"""Makes an index of what a PyTorch file holds: where the elements of each tensor lie.

A tensor is a view of a storage: it has an offset and strides there, and several may share one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ema_cli.errors import DamagedFile
from ema_cli.formats.known import Known
from ema_cli.formats.torch import models
from ema_cli.formats.torch.models import Named
from ema_cli.formats.torch.nodes import Global, StorageRef, TensorRef
from ema_cli.formats.torch.policy import Verdict, judge
from ema_cli.formats.torch.survey import Survey
from ema_cli.tensors import DTYPES, Checkpoint, Extent, Index, Stamp, Tensor
from ema_cli.text import shorten

NAME = "torch"
CHECKSUM = "crc32"

# NumPy 1 holds no more than 32 dimensions, NumPy 2 no more than 64.
DIMENSION_LIMIT = 32
_SIZE_LIMIT = 1 << 63


class Stored(NamedTuple):
    """Where a storage lies.

    Attributes:
        offset: of its first byte in the file.
        nbytes: how many.
        crc: CRC-32 of them, 0 where there is none.
        crc_at: the offsets where that stands.
    """

    offset: int
    nbytes: int
    crc: int = 0
    crc_at: tuple[int, ...] = ()


@dataclass(frozen=True)
class Contents:
    """What a file holds, whichever of the two kinds it is.

    Attributes:
        parse: returns what its pickle says and the names it mentions; called once, if at all.
        storages: by key.
        big_endian: its byte order.
        digest: SHA-256 of all but the storages.
        alike: the same without checksums, equal where only storages differ; or empty.
        checked: whether it has checksums.
        cloned: whether a copy in which only storages differ is as good as the file itself.
    """

    parse: Callable[[], tuple[Any, Sequence[Global]]]
    storages: Mapping[str, Stored]
    big_endian: bool
    digest: str
    alike: str
    checked: bool
    cloned: bool

    @functools.cached_property
    def _said(self) -> tuple[Any, Sequence[Global]]:
        return self.parse()

    @property
    def root(self) -> Any:
        """What its pickle says."""
        return self._said[0]

    @property
    def globals(self) -> Sequence[Global]:
        """The names its pickle mentions."""
        return self._said[1]


class Own(NamedTuple):
    """What is kept of a file to write one like it.

    Attributes:
        model: the path of the model in it.
        verdict: what else than PyTorch's own objects its pickle makes.
    """

    model: tuple[str, ...]
    verdict: Verdict


def checkpoint_of(file: Stamp, contents: Contents, known: Known, key: str) -> Checkpoint:
    """Return the checkpoint of a file; `key` is the path of the model inside, or empty."""
    same = same_as(contents, file.size, key)
    if not contents.alike or same not in known:
        survey = Survey(file.path, contents.root)
        model = models.find(survey, key)
        named = models.named(survey, model)
        tensors = tensors_of(file.path, contents, named)
        index = _index(contents, model, named, tensors)
        known[same] = known.setdefault(_identity(index), index)
        known[*same, "step"] = models.told_step(contents.root)
    index = known[same]
    crc_of = {(one.offset, one.nbytes): one.crc for one in contents.storages.values()}
    crcs = np.array([crc_of[record[1:]] for record in index.records], np.uint32)
    return Checkpoint(
        file.path,
        (file,),
        index,
        (contents.digest,),
        checksums=crcs if index.records else None,
        told_step=known.get((*same, "step")),
    )


def same_as(contents: Contents, file_size: int, key: str) -> tuple[Any, ...]:
    """Return the key in `Known` of files that differ in the bytes of their storages only."""
    return NAME, contents.alike, file_size, key


def _identity(index: Index) -> tuple[Any, ...]:
    """Return all that decides an index; steps and checksums differ between checkpoints."""
    return (
        NAME,
        index.tensors,
        index.records,
        index.big_endian,
        index.own,
        tuple(index.roles.items()),
        index.cautions,
        index.listed,
        index.negated,
    )


def _index(
    contents: Contents,
    model: tuple[str, ...],
    named: Sequence[Named],
    tensors: tuple[Tensor, ...],
) -> Index:
    kept = {tensor.name for tensor in tensors}
    listed = tuple(one.name for one in named if one.name in kept)
    missing = [one.name for one in named if one.of_model and one.name not in kept]
    nested = any(not one.of_model for one in named)
    stored = sorted(contents.storages.values()) if contents.checked else []
    records = [Extent(0, one.offset, one.nbytes) for one in stored if one.nbytes]
    return Index(
        NAME,
        tensors,
        ("",),
        big_endian=contents.big_endian,
        roles={one.name: one.role for one in named if one.name in kept} if nested else {},
        roles_from=_roles_from(model) if nested else "",
        own=Own(model, judge(contents.globals)),
        records=tuple(records),
        checksum=CHECKSUM,
        cautions=tuple(models.cautions(contents.root, model, missing)),
        listed=listed if listed != tuple(tensor.name for tensor in tensors) else (),
        negated=frozenset(one.name for one in named if is_negated(one)),
    )


def _roles_from(model: tuple[str, ...]) -> str:
    return f"the entry {shorten('/'.join(model))}" if model else "their place in the file"


# ---------------------------------------------------------------------------- tensors


def tensors_of(path: str, contents: Contents, named: Sequence[Named]) -> tuple[Tensor, ...]:
    """Return the tensors whose values are what is stored, in the order of their bytes."""
    dtypes: dict[str, str] = {}
    tensors = []
    for one in named:
        if (models.is_plain(one.node) and one.node.dtype in DTYPES) or is_negated(one):
            _check_dtype(path, one, dtypes)
            tensors.append(_tensor(path, one.name, one.node, contents.storages))
    tensors.sort(key=_position)
    return tuple(tensors)


def _position(tensor: Tensor) -> tuple[int, ...]:
    return tensor.extent[:2]


def _check_dtype(path: str, one: Named, dtypes: dict[str, str]) -> None:
    key, dtype = one.node.storage.key, one.node.dtype
    first = dtypes.setdefault(key, dtype)
    if first != dtype:
        raise DamagedFile(
            path, f"storage '{shorten(key)}' is read as {first} and as {dtype}", one.name
        )


def is_negated(one: Named) -> bool:
    """Whether the negative of a tensor of the model is stored."""
    node = one.node
    known = isinstance(node, TensorRef) and one.of_model and node.dtype in DTYPES
    return known and node.neg and not node.conj and DTYPES[node.dtype].floating


def _tensor(path: str, name: str, ref: TensorRef, storages: Mapping[str, Stored]) -> Tensor:
    dtype = DTYPES[ref.dtype]
    stored = located(path, name, ref.storage, storages)
    width, shape = dtype.bits // 8, ref.shape
    if len(shape) > DIMENSION_LIMIT:
        raise DamagedFile(
            path, f"expected at most {DIMENSION_LIMIT} dimensions, found {len(shape)}", name
        )
    if math.prod([n for n in shape if n]) * width >= _SIZE_LIMIT:
        raise DamagedFile(path, f"the size of shape {list(shape)} overflows 64 bits", name)
    if 0 in shape:
        return Tensor(name, dtype, shape, Extent(0, stored.offset, 0))
    reach = sum((n - 1) * stride for n, stride in zip(shape, ref.strides, strict=True))
    extent = Extent(0, stored.offset + ref.offset * width, (reach + 1) * width)
    return Tensor(name, dtype, shape, extent, (), normal_strides(shape, ref.strides))


def located(path: str, name: str, storage: StorageRef, storages: Mapping[str, Stored]) -> Stored:
    """Return where a storage lies; raises `DamagedFile` when it is not there, whole."""
    stored = storages.get(storage.key)
    if stored is None:
        raise DamagedFile(path, f"its storage '{shorten(storage.key)}' is missing", name)
    if stored.nbytes != storage.nbytes:
        raise DamagedFile(
            path,
            f"expected {storage.nbytes:,} bytes of storage '{shorten(storage.key)}', "
            f"found {stored.nbytes:,}",
            name,
        )
    return stored


def normal_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor, () for C order; those of dimensions of length 1 are 0."""
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return tuple(s if n != 1 else 0 for n, s in zip(shape, strides, strict=True))
        expected *= length
    return ()
