"""What is verified: an output with its headers, and what its provenance claims of it.

A claim is hostile until checked: anybody may have written it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ema_cli import files, provenance
from ema_cli.errors import DamagedFile, InputError
from ema_cli.formats import FORMATS, detect, read, tensorflow
from ema_cli.hints import near_path
from ema_cli.tensors import Checkpoint, Stamp
from ema_cli.text import shorten

_LIMIT = 256 << 20
_CRC = re.compile(r"[0-9a-f]{8}")


class DamagedOutput(DamagedFile):
    """An output is not what was written, or not what its sources give."""

    @property
    def hint(self) -> str:
        """What can be done about a damaged output."""
        return "copy it again from where it was written, or make it again with --overwrite"


class Claim(NamedTuple):
    """What a provenance says of one file: its name, size and the checksum of each 64 MiB."""

    name: str
    nbytes: int
    crcs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Output:
    """What is verified.

    Attributes:
        path: as its files are named after it.
        checkpoint: what its own headers say.
        files: those its provenance names, or else those of the checkpoint.
        provenance: where that lies, or would.
        document: the provenance, or None without any.
        claims: what it says of each of the files; empty without any.
    """

    path: str
    checkpoint: Checkpoint
    files: tuple[Stamp, ...]
    provenance: str
    document: Mapping[str, Any] | None = None
    claims: tuple[Claim, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(stamp.size for stamp in self.files)


def opened(path: str, key: str) -> Output:
    """Return the output at `path`, or whose provenance lies there: its headers are sound.

    `key` is where the model is inside it, unless its provenance tells. Raises `InputError` when it
    is none, or when its provenance is damaged or tells of other files.
    """
    path = path.removesuffix(provenance.SUFFIX)
    path = path.rstrip("/") or path
    document = _document(path)
    if document is not None:
        return _claimed(path, document, key)
    if not os.path.lexists(path) and tensorflow.prefix_of(path) is None:
        raise InputError(f"{shorten(path, 1000)}: no such file or directory", near_path(path))
    checkpoint = read(path, {}, key)
    if checkpoint.path.rstrip("/") != path:  # a file of it was named, or the folder it lies in
        document = _document(checkpoint.path)
        if document is not None:
            return _claimed(checkpoint.path, document, key)
    paths = [stamp.path for stamp in checkpoint.files if stamp.path]
    if checkpoint.index_file and checkpoint.index_file not in paths:
        paths.append(checkpoint.index_file)
    stamps = tuple(files.stamp_of(path) for path in paths)
    where = provenance.path_for(checkpoint.path)
    return Output(checkpoint.path, checkpoint, stamps, where)


def _document(output: str) -> Mapping[str, Any] | None:
    """Return what claims to be the provenance of an output, whether it is true or not."""
    where = provenance.path_for(output)
    known = provenance.load(output)
    if known is not None or not os.path.lexists(where):
        return known
    try:
        document = json.loads(files.read_small(where, _LIMIT))
    except (ValueError, RecursionError):
        raise DamagedFile(where, "no provenance: it is not JSON") from None
    if not isinstance(document, dict):
        raise DamagedFile(where, "no provenance: it is no object")
    return document


def _claimed(path: str, document: Mapping[str, Any], key: str) -> Output:
    where = provenance.path_for(path)
    claims = _claims(document, where)
    pairs = provenance.files_of(path, [claim.name for claim in claims])
    stamps = []
    for claim, (_, file) in zip(claims, pairs, strict=True):
        stamps.append(files.stamp_of(file))
        if stamps[-1].size != claim.nbytes:
            raise DamagedOutput(
                file,
                f"expected {claim.nbytes:,} bytes as {shorten(where, 1000)} tells, "
                f"found {stamps[-1].size:,}",
            )
    # A renamed copy is flat; what is given is the key of its source.
    key = "" if "renamed" in document else key or _recorded_key(path, document)
    checkpoint = read(path, {}, key)
    _check_told(checkpoint, stamps, where)
    return Output(path, checkpoint, tuple(stamps), where, document, tuple(claims))


def _claims(document: Mapping[str, Any], where: str) -> list[Claim]:
    """Return what a provenance says of each file. Raises `DamagedFile` when it says nothing."""
    try:
        output = document["output"]
        good = document["schema"] == provenance.SCHEMA and type(output["fingerprint"]) is str
        good = good and output["checksum_bytes"] == provenance.CHECKSUM_BYTES
        rows = output["files"] if good else None
    except (LookupError, TypeError):
        rows = None
    # Of a renamed copy the data may be a copy of files, which are not read again for it.
    copied = "renamed" in document
    if not isinstance(rows, list) or not rows or not all(_is_claim(row, copied) for row in rows):
        raise DamagedFile(where, "no provenance: it tells of no files and their checksums")
    return [
        Claim(row["name"], row["bytes"], tuple(int(crc, 16) for crc in row["crc32c"]))
        for row in rows
    ]


def _is_claim(row: object, copied: bool) -> bool:
    if not isinstance(row, dict):
        return False
    name, n_bytes, crcs = row.get("name"), row.get("bytes"), row.get("crc32c")
    if type(name) is not str or type(n_bytes) is not int or not isinstance(crcs, list):
        return False
    if "/" in name or "\0" in name or name in (".", "..") or not 0 <= n_bytes < 1 << 63:
        return False
    count = -(-n_bytes // provenance.CHECKSUM_BYTES)
    hexadecimal = all(type(crc) is str and _CRC.fullmatch(crc) for crc in crcs)
    return hexadecimal and (len(crcs) == count or (copied and not crcs))


def _recorded_key(path: str, document: Mapping[str, Any]) -> str:
    """Return where the model is inside an output that has the structure of its last source."""
    request, name = document.get("request"), detect(path)
    key = request.get("key") if isinstance(request, dict) else None
    template = document["output"].get("layout") == "template"
    nested = name is not None and FORMATS[name].nested
    return key if type(key) is str and template and nested else ""


def _check_told(checkpoint: Checkpoint, stamps: Sequence[Stamp], where: str) -> None:
    """Raise `DamagedOutput` for a file of the checkpoint of which its provenance says nothing."""
    told = {os.path.realpath(stamp.path) for stamp in stamps}
    for path in (*(stamp.path for stamp in checkpoint.files), checkpoint.index_file):
        if path and os.path.realpath(path) not in told:
            raise DamagedOutput(path, f"{shorten(where, 1000)} tells nothing of it")
