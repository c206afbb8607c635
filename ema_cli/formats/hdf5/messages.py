"""How this process and the one that opens HDF5 files talk: JSON documents over a socket, and bytes.

Each document has its length as u32le before it and holds, under ``payload``, how many bytes follow.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

PAYLOAD = "payload"
DOCUMENT_LIMIT = 64 << 20
_LENGTH_BYTES = 4


class Closed(Exception):
    """The other side is gone, or what it says makes no sense."""


class TooLong(Exception):
    """A document is longer than it may be."""


def send(
    connection: socket.socket,
    document: Mapping[str, Any],
    fds: list[int],
    limit: int = DOCUMENT_LIMIT,
) -> None:
    """Send a document, and open files with it. Raises `OSError`, `TooLong`."""
    raw = json.dumps(document).encode("ascii")
    if len(raw) > limit:
        raise TooLong(f"what it holds takes more than {limit:,} bytes to tell")
    head = len(raw).to_bytes(_LENGTH_BYTES, "little")
    if fds:
        socket.send_fds(connection, [head], fds)
    else:
        connection.sendall(head)
    connection.sendall(raw)


def receive(connection: socket.socket, limit: int = DOCUMENT_LIMIT) -> bytes:
    """Return the next document as JSON. Raises `Closed`."""
    head = bytearray(_LENGTH_BYTES)
    fill(connection, memoryview(head))
    return _rest(connection, head, limit)


def receive_with_files(connection: socket.socket, most: int) -> tuple[bytes, list[int]]:
    """Return the next document as JSON, and at most so many files that come with it."""
    first, fds, _, _ = socket.recv_fds(connection, _LENGTH_BYTES, most)
    if not first:
        raise Closed
    head = bytearray(_LENGTH_BYTES)
    head[: len(first)] = first
    fill(connection, memoryview(head)[len(first) :])
    return _rest(connection, head, DOCUMENT_LIMIT), fds


def _rest(connection: socket.socket, head: bytearray, limit: int) -> bytes:
    n_bytes = int.from_bytes(head, "little")
    if n_bytes > limit:
        raise Closed
    document = bytearray(n_bytes)
    fill(connection, memoryview(document))
    return bytes(document)


def decode(raw: bytes) -> dict[str, Any]:
    """Return a document. Raises `Closed`."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        raise Closed from None
    if type(document) is not dict:
        raise Closed
    return document


def fill(connection: socket.socket, buffer: memoryview) -> None:
    """Fill `buffer` with the next bytes. Raises `Closed`."""
    done = 0
    while done < len(buffer):
        got = connection.recv_into(buffer[done:])
        if got == 0:
            raise Closed
        done += got
