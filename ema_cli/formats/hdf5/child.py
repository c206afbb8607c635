"""The process that opens HDF5 files, and does nothing else.

The HDF5 library is large, written in C, and follows what a file says: to other files, to plug-ins,
now and then to a crash. So it runs here, where nothing can be opened, gets files as open
descriptors, and tells what it found as plain data, which the other side checks once more.
"""

from __future__ import annotations

import codecs
import contextlib
import gc
import os
import socket
from typing import Any

from ema_cli.formats.hdf5 import boxes, building, library, listing, messages, sandbox
from ema_cli.formats.hdf5.windows import Sheet, Window

# For what comes between two requests.
_IDLE_SECONDS, _IDLE_BYTES = 60, 1 << 30
_FILES = 1


def main(fd: int) -> None:
    """Answer requests over the socket `fd` until it is closed."""
    connection = socket.socket(fileno=fd)
    _warm_up()
    confined = sandbox.confine()
    try:
        messages.send(connection, {"library": library.version(), "confined": confined}, [])
        while True:
            raw, fds = messages.receive_with_files(connection, _FILES)
            try:
                _answer(connection, messages.decode(raw), fds)
            finally:
                for each in fds:
                    os.close(each)
    except (messages.Closed, OSError):
        pass
    # Without the library's own way out, which has crashed over files that were half open.
    os._exit(0)


def _warm_up() -> None:
    """Use what is imported on first use, while files can still be opened."""
    for encoding in ("ascii", "utf-8", "latin-1"):
        codecs.lookup(encoding)
    groups: list[Any] = [["a", None, {"name": "b", "weight_names": ["c"]}]]
    request = {"groups": groups, "datasets": [["a/x", "float32", [2], None]], "strings": []}
    first = building.Built({**request, "big": False}, None)
    file = library.open_file(first.sheet)
    listing.listed(file)
    list(boxes.read_boxes(file, "a/x", [([0], [2])]))
    groups[0][1] = "a"
    building.Built({**request, "big": True}, file).document()
    file.close()
    with contextlib.suppress(OSError):
        library.open_file(Sheet())
    gc.collect()
    gc.freeze()
    gc.disable()  # thousands of short-lived objects, all of them needed until the answer is sent


def _answer(connection: socket.socket, request: dict[str, Any], fds: list[int]) -> None:
    sandbox.allow(request["seconds"], request["memory"])
    answer = {"list": _list, "read": _read, "build": _build}[request["do"]]
    try:
        answer(connection, request, fds)
    except library.Refused as error:
        reason, at = error.args
        messages.send(connection, {"unsupported": reason, "at": at}, [])
    except MemoryError:
        messages.send(connection, {"damaged": "reading it takes too much memory"}, [])
    except messages.TooLong as error:
        messages.send(connection, {"damaged": str(error)}, [])
    except (messages.Closed, ConnectionError):
        raise
    except Exception as error:
        # Whatever the library says of a damaged file comes as one of many exceptions.
        messages.send(connection, {"damaged": f"HDF5: {_said(error)}"}, [])
    finally:
        sandbox.allow(_IDLE_SECONDS, _IDLE_BYTES)
    gc.collect()


def _said(error: Exception) -> str:
    """Return the text of an exception; that of a KeyError comes quoted."""
    return str(error.args[0]) if error.args else type(error).__name__


def _file(request: dict[str, Any], fds: list[int]) -> Any:
    return library.open_file(Window(fds[0], *request["window"]))


def _list(connection: socket.socket, request: dict[str, Any], fds: list[int]) -> None:
    file = _file(request, fds)
    try:
        document = listing.listed(file)
    finally:
        file.close()
    messages.send(connection, document, [], request["limit"])


def _read(connection: socket.socket, request: dict[str, Any], fds: list[int]) -> None:
    file = _file(request, fds)
    try:
        for data in boxes.read_boxes(file, request["path"], request["boxes"]):
            messages.send(connection, {messages.PAYLOAD: len(data)}, [])
            connection.sendall(data)
    finally:
        file.close()


def _build(connection: socket.socket, request: dict[str, Any], fds: list[int]) -> None:
    source = _file(request, fds) if fds else None
    built = building.Built(request, source)
    if source is not None:
        source.close()
    document = built.document()
    total = sum(n_bytes for _, n_bytes in document["literals"])
    messages.send(connection, {**document, messages.PAYLOAD: total}, [], request["limit"])
    for _, data in built.literals():
        connection.sendall(data)
