"""Sealed lines: JSON that carries its own CRC-32C, so that a torn or rotten one is never believed.

One line is eight hex digits, a space, JSON in ASCII and a newline; the digits are the CRC-32C of
the JSON.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from typing import Any

from ema_cli.checksums import crc32c
from ema_cli.errors import DamagedState, storage_errors
from ema_cli.text import size

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

    Raises `DamagedState`, also where it is not there.
    """
    data = contents(path, limit)
    documents = unseal_all(data, path)
    if len(documents) != 1:
        raise DamagedState(path, f"expected one line, found {len(documents)}")
    return documents[0], crc32c(data)


def contents(path: str, limit: int = LIMIT) -> bytes:
    """Return the bytes of a small file of a state; raises `DamagedState` when it is none.

    Links are not followed: nobody who wrote into a state chooses what else is read.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with storage_errors(path, "cannot read"):
        try:
            fd = os.open(path, flags)
        except (FileNotFoundError, IsADirectoryError):
            raise DamagedState(path, "expected a file, found none") from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a pipe or a socket
                raise DamagedState(path, "expected a regular file") from error
            raise
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise DamagedState(path, "expected a regular file")
            if status.st_size > limit:
                raise DamagedState(path, f"expected at most {size(limit)}")
            return file.read(limit)
