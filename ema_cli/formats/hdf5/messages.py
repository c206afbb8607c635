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
_FDS = 2


class Closed(Exception):
    """The other side is gone, or what it says makes no sense."""


class TooLong(Exception):
    """A document is longer than is ever sent."""


def send(connection: socket.socket, document: Mapping[str, Any], fds: list[int]) -> None:
    """Send a document, and open files with it. Raises `OSError`, `TooLong`."""
    raw = json.dumps(document).encode("ascii")
    if len(raw) > DOCUMENT_LIMIT:
        raise TooLong(f"what it holds takes more than {DOCUMENT_LIMIT:,} bytes to tell")
    head = len(raw).to_bytes(_LENGTH_BYTES, "little")
    if fds:
        socket.send_fds(connection, [head], fds)
    else:
        connection.sendall(head)
    connection.sendall(raw)


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Return the next document as JSON, and the files that came with it. Raises `Closed`."""
    head, fds, _, _ = socket.recv_fds(connection, _LENGTH_BYTES, _FDS)
    raw = bytearray(_LENGTH_BYTES)
    raw[: len(head)] = head
    if not head:
        raise Closed
    fill(connection, memoryview(raw)[len(head) :])
    n_bytes = int.from_bytes(raw, "little")
    if n_bytes > DOCUMENT_LIMIT:
        raise Closed
    document = bytearray(n_bytes)
    fill(connection, memoryview(document))
    return bytes(document), fds


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
