"""``OUT.ema.json``: where an output came from, and whether it is still the output it tells of."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ema_cli import durable
from ema_cli.checksums import CRC32C, KINDS, shift_all
from ema_cli.errors import EmaError, storage_errors
from ema_cli.files import open_input, page_buffer, read_exact, read_small

SUFFIX = ".ema.json"
SCHEMA = 1
# One checksum per this many bytes of an output file.
CHECKSUM_BYTES = 64 << 20
_LIMIT = 256 << 20
_LEVELS = 16
_SAMPLES = 16
_SAMPLE_BYTES = 4096
_BLOCK = 1 << 20
_OF_PREFIX = (".index", ".data-")


def path_for(output: str) -> str:
    """Return where the provenance of `output` (a file, a folder or a prefix) lies."""
    return output.rstrip("/") + SUFFIX


def _staged_for(output: str) -> str:
    """Return where `stage` puts the provenance until the output is published."""
    return durable.beside(path_for(output), durable.TEMPORARY_SUFFIX)


def fingerprint(files: Sequence[tuple[str, str]]) -> str:
    """Return a digest that recognises an output without reading all of it.

    SHA-256 over the name, the size and 16 evenly spread samples of 4 KiB of each (name, path).
    It recognises; the checksums in the provenance prove.
    """
    digest = hashlib.sha256()
    buffer = bytearray(_SAMPLE_BYTES)
    for name, path in files:
        fd = open_input(path)
        try:
            n_bytes = os.fstat(fd).st_size
            digest.update(f"{name}\0{n_bytes}\0".encode("utf-8", "surrogateescape"))
            last = max(n_bytes - _SAMPLE_BYTES, 0)
            for k in range(_SAMPLES):
                offset = last * k // (_SAMPLES - 1)
                view = memoryview(buffer)[: min(_SAMPLE_BYTES, n_bytes - offset)]
                read_exact(fd, view, offset, path)
                digest.update(view)
        finally:
            os.close(fd)
    return digest.hexdigest()


def files_of(output: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the (name, path) pairs of an output whose files are called `names`.

    A name that begins as those of a prefix do follows it; others lie in the folder.
    """
    return [(name, _path_of(output, name)) for name in names]


def _path_of(output: str, name: str) -> str:
    if name.startswith(_OF_PREFIX):
        return output + name
    return os.path.join(output, name) if name else output


def cuts(n_bytes: int, extents: Iterable[tuple[int, int]] = ()) -> list[list[int]]:
    """Return where a file is cut for its checksums, one list for each `CHECKSUM_BYTES` of it.

    Neighbours in a list are the ends of a stretch; `extents` are further (offset, length)
    stretches that are wanted, each made of one or several.
    """
    ends = {0, n_bytes, *range(0, n_bytes, CHECKSUM_BYTES)}
    for offset, length in extents:
        ends.update((offset, offset + length))
    ordered = sorted(ends)
    firsts = [bisect.bisect_left(ordered, start) for start in range(0, n_bytes, CHECKSUM_BYTES)]
    lasts = [*firsts[1:], len(ordered) - 1] if firsts else []
    return [ordered[a : b + 1] for a, b in zip(firsts, lasts, strict=True)]


def checksums(path: str, ends: Sequence[int], kind: str = CRC32C) -> list[int]:
    """Return the checksum of each stretch of a file between neighbouring `ends`."""
    crc_of = KINDS[kind]
    buffer = page_buffer(min(_BLOCK, ends[-1] - ends[0]))
    found = []
    fd = open_input(path)
    try:
        start = stop = ends[0]  # of the block in the buffer
        for first, last in itertools.pairwise(ends):
            crc, at = 0, first
            while at < last:
                if at == stop:
                    start, stop = at, min(at + len(buffer), ends[-1])
                    read_exact(fd, buffer[: stop - start], start, path)
                end = min(last, stop)
                crc = crc_of(buffer[at - start : end - start], crc)
                at = end
            found.append(crc)
    finally:
        os.close(fd)
    return found


class Stretches(NamedTuple):
    """The checksums of the stretches of a file between neighbouring `edges`."""

    crcs: list[int]
    edges: list[int]
    kind: str

    def between(self, start: int, end: int) -> int:
        """Return the checksum of the bytes between two edges."""
        first, last = bisect.bisect_left(self.edges, start), bisect.bisect_left(self.edges, end)
        if last - first == 1:
            return self.crcs[first]
        after = end - np.array(self.edges[first + 1 : last + 1], np.int64)
        shifted = shift_all(np.array(self.crcs[first:last], np.uint32), after, self.kind)
        return int(np.bitwise_xor.reduce(shifted, initial=0))


def proves(document: Mapping[str, Any], output: str) -> bool:
    """Whether every byte of `output` is as `document` records it: reads all of it."""
    try:
        recorded = document["output"]["files"]
        paths = [path for _, path in files_of(output, [file["name"] for file in recorded])]
        for file, path in zip(recorded, paths, strict=True):
            found = [checksums(path, ends)[0] for ends in cuts(file["bytes"])]
            if [f"{crc:08x}" for crc in found] != file["crc32c"]:
                return False
    except (EmaError, LookupError, TypeError):
        return False
    return True


def staged_files(output: str) -> list[tuple[str, int]]:
    """Return the (path, size) of each file of an output whose provenance is staged."""
    try:
        document = json.loads(read_small(_staged_for(output), _LIMIT))
        files = document["output"]["files"]
        pairs = [(file["name"], file["bytes"]) for file in files if _bare(file["name"])]
    except (EmaError, ValueError, LookupError, TypeError, RecursionError):
        return []
    return [(_path_of(output, name), n_bytes) for name, n_bytes in pairs]


def load(output: str) -> Mapping[str, Any] | None:
    """Return the provenance of `output` if there is one and it still tells the truth."""
    paths = (path_for(output), _staged_for(output))  # staged by a process killed just before
    documents = (_read(path, output) for path in paths if os.path.isfile(path))
    return next((document for document in documents if document is not None), None)


def _read(path: str, output: str) -> Mapping[str, Any] | None:
    """Return the document at `path` if it is true of `output`."""
    try:
        document = json.loads(read_small(path, _LIMIT))
        described = document["output"]
        names = [file["name"] for file in described["files"]]
        if document["schema"] != SCHEMA or not all(_bare(name) for name in names):
            return None
        if fingerprint(files_of(output, names)) != described["fingerprint"]:
            return None
    except (EmaError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return document if isinstance(document, dict) and _shallow(document, _LEVELS) else None


def _shallow(value: Any, levels: int) -> bool:
    """Whether a document is nested no deeper than ours are, which others need not be."""
    if not isinstance(value, dict | list):
        return True
    inside = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_shallow(item, levels - 1) for item in inside)


def _bare(name: Any) -> bool:
    return type(name) is str and "/" not in name and "\0" not in name and name not in (".", "..")


def stage(output: str, document: Mapping[str, Any]) -> str:
    """Write the provenance of an output that is about to be published; returns where."""
    # One line per entry of the document: readable, and encoded at full speed.
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in document.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    staged = durable.stage(path_for(output), text.encode("ascii"))
    try:
        # Its name too: an output that is there without it would be nobody's.
        durable.sync_directory(os.path.dirname(staged))
    except BaseException:
        durable.remove(staged)
        raise
    return staged


def publish(staged: str, output: str) -> None:
    """Give a staged document its name, unless another process has recovered it already."""
    path = path_for(output)
    with storage_errors(path, "cannot publish"), contextlib.suppress(FileNotFoundError):
        os.replace(staged, path)


def recover(output: str) -> None:
    """Finish what a process left that was killed between publishing an output and its provenance.

    The staged document gets its name if it tells the truth about the output.
    """
    staged = _staged_for(output)
    if not os.path.isfile(staged) or os.path.islink(staged):
        return
    if _read(staged, output) is not None:
        publish(staged, output)


def digest_of(document: Any) -> str:
    """Return the SHA-256 of a JSON document in canonical form."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
