"""A second reader of state directories, written from the description of the format alone.

It shares no code with the tool, so that an error in one of them shows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastcrc import crc32

SMALL = 64 << 20
PART = 4 << 20  # of a slot, for one checksum


class Damage(Exception):
    """The directory breaks the format."""


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of `data`."""
    return int(crc32.iscsi(data))


def sealed(line: bytes, what: str) -> Any:
    """Return the document in a sealed line: its checksum in hexadecimal, a space, JSON."""
    if not line.endswith(b"\n") or line.count(b"\n") != 1 or line[8:9] != b" ":
        raise Damage(f"{what}: not one sealed line")
    body = line[9:-1]
    if line[:8] != b"%08x" % crc32c(body):
        raise Damage(f"{what}: checksum")
    return json.loads(body)


def _bytes(directory: str, name: str) -> bytes:
    try:
        with open(os.path.join(directory, name), "rb") as file:
            return file.read(SMALL)
    except OSError as error:
        raise Damage(f"{name}: {error}") from error


def tensors(data: bytes, what: str) -> dict[str, bytes]:
    """Return dtype, shape and bytes of each tensor in a safetensors file, as one string each."""
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= len(data) - 8:
        raise Damage(f"{what}: header length")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    end = 0
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        end = max(end, stop)
        kind = f"{entry['dtype']} {entry['shape']} ".encode()
        found[name] = kind + data[start:stop]
    if end != len(data):
        raise Damage(f"{what}: {len(data)} bytes, tensors end at {end}")
    return found


def contents(directory: str) -> Mapping[str, str]:
    """Return the SHA-256 of each tensor of the slot that ROOT names, without checking anything."""
    slot = f"slot.{sealed(_bytes(directory, 'ROOT'), 'ROOT')['slot']}"
    found = tensors(_bytes(directory, slot), slot)
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


@dataclass(frozen=True)
class Facts:
    """What a whole, undamaged state says.

    Attributes:
        generation: how many commits there were.
        slot: the file that counts.
        applied: the steps of the checkpoints that are averaged, in order.
        missed: those of the checkpoints that are not.
        contents: the SHA-256 of each tensor in the slot.
    """

    generation: int
    slot: str
    applied: tuple[int, ...]
    missed: tuple[int, ...]
    contents: Mapping[str, str]


def check(directory: str) -> Facts | None:
    """Check every byte that counts; None for a state that was never finished. Raises `Damage`."""
    if not os.path.lexists(os.path.join(directory, "ROOT")):
        return None
    if _bytes(directory, "FORMAT") != b"ema-avg state 1\n":
        raise Damage("FORMAT: not that of version 1")
    raw = _bytes(directory, "ROOT")
    if len(raw) > 4096:
        raise Damage("ROOT: longer than a sector")
    root = sealed(raw, "ROOT")
    plan = _bytes(directory, "plan")
    sealed(plan, "plan")
    if crc32c(plan) != root["plan"]:
        raise Damage("plan: not the one ROOT tells of")
    name = f"manifest-{root['generation']}"
    data = _bytes(directory, name)
    if crc32c(data) != root["manifest"]:
        raise Damage(f"{name}: not the one ROOT tells of")
    manifest = sealed(data, name)
    rows = _ledger(directory, *root["ledger"])
    slot = f"slot.{root['slot']}"
    found = _slot(directory, slot, manifest["checksums"])
    if manifest["skeleton"] is not None:
        _skeleton(os.path.join(directory, f"last-{root['generation']}"), manifest["skeleton"])
    applied = tuple(row["step"] for row in rows if not row["missed"])
    missed = tuple(row["step"] for row in rows if row["missed"])
    return Facts(root["generation"], slot, applied, missed, found)


def _ledger(directory: str, length: int, crc: int) -> list[Any]:
    data = _bytes(directory, "ledger")[:length]
    if len(data) != length or crc32c(data) != crc:
        raise Damage(f"ledger: {len(data)} bytes of {length}, or other ones")
    return [sealed(line + b"\n", "ledger") for line in data.split(b"\n")[:-1]]


def _slot(directory: str, name: str, checksums: list[int]) -> Mapping[str, str]:
    data = _bytes(directory, name)
    parts = [data[start : start + PART] for start in range(0, len(data), PART)]
    if [crc32c(part) for part in parts] != checksums:
        raise Damage(f"{name}: checksum")
    found = tensors(data, name)
    return {tensor: hashlib.sha256(value).hexdigest() for tensor, value in found.items()}


def _skeleton(directory: str, skeleton: Any) -> None:
    for file in skeleton["files"]:
        data = _bytes(directory, file["name"])
        kept = b"".join(data[offset : offset + length] for offset, length in file["pieces"])
        if len(data) != file["size"] or crc32c(kept) != file["crc"]:
            raise Damage(f"last checkpoint: {file['name']}: not as it was kept")
