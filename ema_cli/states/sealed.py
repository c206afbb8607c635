"""Sealed lines: JSON that carries its own CRC-32C, so that a torn or rotten one is never believed.

One line is eight hex digits, a space, JSON in ASCII and a newline; the digits are the CRC-32C of
the JSON.
"""

from __future__ import annotations

import json
from typing import Any

from ema_cli.checksums import crc32c
from ema_cli.errors import DamagedState, EmaError
from ema_cli.files import read_small

# Of a whole file of sealed lines: a manifest of a million tensors, a ledger of a million lines.
LIMIT = 1 << 30


def seal(document: Any) -> bytes:
    """Return the sealed line of a JSON document."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")
    return b"%08x %s\n" % (crc32c(text), text)


def unseal(line: bytes, where: str) -> Any:
    """Return the document of a sealed line without its newline. Raises `DamagedState`."""
    digits, space, text = line[:8], line[8:9], line[9:]
    if space != b" " or digits != b"%08x" % crc32c(text):
        raise DamagedState(where, "expected a line that fits its checksum, found another")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedState(where, "expected JSON") from error


def unseal_all(data: bytes, where: str) -> list[Any]:
    """Return the documents of some sealed lines, the last one complete too."""
    if data and not data.endswith(b"\n"):
        raise DamagedState(where, "expected whole lines, found a torn one")
    lines = data.split(b"\n")[:-1]
    return [unseal(line, f"{where}: line {k}") for k, line in enumerate(lines, start=1)]


def read(path: str, limit: int = LIMIT) -> tuple[Any, int]:
    """Return the one document in the file `path`, and the CRC-32C of all its bytes.

    Raises `DamagedState`, or `FileNotFoundError` as the cause of one where it is not there.
    """
    data = contents(path, limit)
    documents = unseal_all(data, path)
    if len(documents) != 1:
        raise DamagedState(path, f"expected one line, found {len(documents)}")
    return documents[0], crc32c(data)


def contents(path: str, limit: int = LIMIT) -> bytes:
    """Return the bytes of a small file of a state; raises `DamagedState` when it is none."""
    try:
        return read_small(path, limit)
    except EmaError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DamagedState(path, "expected a file, found none") from error.__cause__
        raise
