"""Holds the bytes of an output against the checksums that its provenance, or it itself, keeps."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping

from ema_cli import provenance, spilling
from ema_cli.checksums import CRC32
from ema_cli.errors import DamagedFile
from ema_cli.formats import FORMATS
from ema_cli.tensors import Extent
from ema_cli.text import shorten
from ema_cli.verification.checking import Summed, Unsummed
from ema_cli.verification.claims import DamagedOutput, Output
from ema_cli.verifying import check_sums

# Tensors that are named where bytes of several are damaged.
_SHOWN = 3


def is_unclaimed(output: Output) -> bool:
    """Whether there are bytes of which no provenance has a checksum."""
    return not output.claims or any(c.nbytes and not c.crcs for c in output.claims)


def stored(output: Output) -> list[Unsummed]:
    """Return the stretches of which the provenance has checksums."""
    return [
        Unsummed(file, stamp.path, (ends[0], ends[-1]))
        for file, (stamp, claim) in enumerate(zip(output.files, output.claims, strict=False))
        for ends in (provenance.cuts(claim.nbytes) if claim.crcs else ())
    ]


def check_stored(output: Output, found: Iterable[Summed]) -> None:
    """Raise `DamagedOutput` for a stretch whose checksum is not the one in the provenance."""
    for one in found:
        start, end = one.task.ends
        expected = output.claims[one.task.file].crcs[start // provenance.CHECKSUM_BYTES]
        if one.crcs != [expected]:
            where = f"as {shorten(output.provenance, 1000)} tells"
            raise _damage(output, one.task.path, (start, end), (expected, one.crcs[0]), where)
    document = output.document
    if document is not None:
        names = [claim.name for claim in output.claims]
        pairs = provenance.files_of(output.path, names)
        if provenance.fingerprint(pairs) != document["output"]["fingerprint"]:
            raise DamagedFile(output.provenance, "its fingerprint is not that of this output")


def kept(output: Output) -> list[Unsummed]:
    """Return the stretches that show the checksums the checkpoint itself keeps, if it must."""
    checkpoint = output.checkpoint
    if not is_unclaimed(output) or checkpoint.checksums is None:
        return []
    wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for extent in _summed_extents(output):
        wanted[extent.file].append(extent[1:])
    return [
        Unsummed(file, checkpoint.files[file].path, tuple(ends), checkpoint.index.checksum)
        for file, extents in wanted.items()
        for ends in provenance.cuts(checkpoint.files[file].size, extents)
    ]


def _summed_extents(output: Output) -> list[Extent]:
    """Return the extents whose recorded checksum is one of their bytes as they lie."""
    index = output.checkpoint.index
    opaque = {tensor.extent for tensor in index.tensors if not tensor.dtype.bits}
    return [e for e in index.ordinals if e.nbytes and (index.records or e not in opaque)]


def check_kept(output: Output, found: Iterable[Summed]) -> None:
    """Raise `DamagedOutput` where the checkpoint's own checksums are not those of its bytes."""
    checkpoint, index = output.checkpoint, output.checkpoint.index
    parts: dict[int, dict[int, tuple[Unsummed, list[int]]]] = defaultdict(dict)
    for one in found:
        parts[one.task.file][one.task.ends[0]] = one.task, one.crcs
    if not parts or checkpoint.checksums is None:
        return
    files_of = {file: _joined(rows) for file, rows in parts.items()}
    for extent in _summed_extents(output):
        start, end = extent.offset, extent.offset + extent.nbytes
        crc = files_of[extent.file].between(start, end)
        expected = int(checkpoint.checksums[index.ordinals[extent]])
        if crc != expected:
            path = checkpoint.files[extent.file].path
            raise _damage(output, path, (start, end), (expected, crc), "as it keeps itself")
    read = FORMATS[index.format].opaque_checksums
    for tensor in index.tensors:
        if read is not None and not tensor.dtype.bits and tensor.extent.nbytes:
            error = check_sums(checkpoint, tensor, {tensor.extent: read(checkpoint, tensor)[1]})
            if error is not None:
                raise error


def is_summed(output: Output) -> bool:
    """Whether all that a provenance has no checksum of has one in the checkpoint itself."""
    checkpoint = output.checkpoint
    zipped = FORMATS[checkpoint.index.format].checksum == CRC32
    packed = bool(spilling.spilled(checkpoint, checkpoint.index.by_name))
    return not is_unclaimed(output) or checkpoint.checksums is not None or (zipped and packed)


def unpack(output: Output) -> None:
    """Unpack what is compressed, which verifies it, unless a provenance has checksums of it."""
    if is_unclaimed(output):
        with spilling.readable(output.checkpoint, output.checkpoint.index.by_name):
            pass


def _joined(rows: Mapping[int, tuple[Unsummed, list[int]]]) -> provenance.Stretches:
    """Return the checksums of all stretches of a file."""
    ordered = [rows[start] for start in sorted(rows)]
    edges = [end for task, _ in ordered for end in task.ends[:-1]] + [ordered[-1][0].ends[-1]]
    crcs = [crc for _, crcs in ordered for crc in crcs]
    return provenance.Stretches(crcs, edges, ordered[0][0].kind)


def _damage(
    output: Output, path: str, place: tuple[int, int], crcs: tuple[int, int], where: str
) -> DamagedOutput:
    """Return the error for bytes that have another checksum than `where` tells."""
    start, end = place
    expected, found = crcs
    inside = _inside(output, path, start, end)
    shown = ", ".join(f"'{shorten(name)}'" for name in inside[:_SHOWN])
    more = f" and {len(inside) - _SHOWN:,} more" if len(inside) > _SHOWN else ""
    return DamagedOutput(
        path,
        f"bytes {start:,} to {end:,}: expected checksum {expected:08x} {where}, found {found:08x}"
        + (f", in the bytes of {shown}{more}" if inside else ", in the bytes of no tensor"),
    )


def _inside(output: Output, path: str, start: int, end: int) -> list[str]:
    """Return the tensors that have bytes in a stretch of a file."""
    checkpoint = output.checkpoint
    paths = [os.path.realpath(stamp.path) if stamp.path else "" for stamp in checkpoint.files]
    real = os.path.realpath(path)
    file = paths.index(real) if real in paths else -1
    return [
        tensor.name
        for tensor in checkpoint.index.tensors
        if any(
            e.file == file and e.offset < end and start < e.offset + e.nbytes
            for e in tensor.extents
        )
    ]
