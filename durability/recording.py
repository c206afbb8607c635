"""From what strace saw to a list of operations on a directory, whole with the bytes written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from durability.simulate import (
    ROOT,
    Link,
    New,
    Operation,
    Rename,
    Said,
    Size,
    Sync,
    Unlink,
    Write,
    content,
)
from durability.strace import Call

OUT = "/memfd:out"  # where the command's standard output went


@dataclass
class _Open:
    inode: int
    position: int = 0
    append: bool = False


class Recorder:
    """Follows the calls of one process after the other on one directory.

    Attributes:
        operations: so far.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self.operations: list[Operation] = []
        self._directories: dict[int, dict[str, int]] = {ROOT: {}}
        self._files: dict[int, bytes] = {}
        self._open: dict[int, _Open] = {}
        self._line = b""
        self._next = ROOT + 1

    def process(self, calls: Iterable[Call]) -> None:
        """Add what one process did."""
        self._open = {}
        for call in calls:
            handler = _HANDLERS.get(call.name)
            if handler is not None and (not call.failed or handler is Recorder._fsync):
                handler(self, call)

    def adopt(self) -> None:
        """Begin with what is in the directory, all of it durable."""
        for folder, folders, files in os.walk(self._root):
            for name in (*folders, *files):
                path = os.path.join(folder, name)
                place = self._find("", path)
                assert place is not None
                inode = self._new(directory=name in folders)
                self._name(place, inode)
                if name in files:
                    with open(path, "rb") as file:
                        self._put(inode, 0, file.read())
        for inode in (*self._files, *self._directories):
            self.operations.append(Sync(inode, ""))

    # Names

    def _find(self, base: str, path: str) -> tuple[int, str] | None:
        """Return the directory of a path and its name there; None for what is elsewhere."""
        whole = os.path.normpath(os.path.join(base or self._root, path))
        if whole == self._root:
            return ROOT, ""
        if not whole.startswith(self._root + "/"):
            return None
        inode = ROOT
        *above, name = whole[len(self._root) + 1 :].split("/")
        for part in above:
            inode = self._directories[inode][part]
        return inode, name

    def _at(self, call: Call, position: int) -> tuple[int, str] | None:
        """Return what a pair of a directory's descriptor and a path is about."""
        return self._find(call.named(position), call.text(position + 1))

    def _path_of(self, inode: int) -> str:
        todo = [("", ROOT)]
        while todo:
            path, directory = todo.pop()
            for name, child in self._directories[directory].items():
                if child == inode:
                    return path + name
                if child in self._directories:
                    todo.append((f"{path}{name}/", child))
        return "" if inode == ROOT else "(deleted)"

    def _new(self, directory: bool) -> int:
        inode = self._next
        self._next += 1
        if directory:
            self._directories[inode] = {}
        else:
            self._files[inode] = b""
        self.operations.append(New(inode, directory))
        return inode

    def _name(self, place: tuple[int, str], inode: int) -> None:
        self._directories[place[0]][place[1]] = inode
        self.operations.append(Link(*place, inode))

    # Calls

    def _openat(self, call: Call) -> None:
        place = self._at(call, 0)
        if place is None:
            return
        flags = call.args[2]
        inode = self._directories[place[0]].get(place[1]) if place[1] else ROOT
        if inode is None:
            inode = self._new(directory=False)
            self._name(place, inode)
        elif b"O_TRUNC" in flags and self._files[inode]:
            self._change(Size(inode, 0, grow=False))
        self._open[call.result] = _Open(inode, append=b"O_APPEND" in flags)

    def _close(self, call: Call) -> None:
        self._open.pop(call.fd(0), None)

    def _dup(self, call: Call) -> None:
        if call.name == "fcntl" and not call.args[1].startswith(b"F_DUPFD"):
            return
        self._open.pop(call.result, None)
        if call.fd(0) in self._open:
            self._open[call.result] = self._open[call.fd(0)]

    def _mkdir(self, call: Call) -> None:
        place = self._find("", call.text(0)) if call.name == "mkdir" else self._at(call, 0)
        if place is not None:
            self._name(place, self._new(directory=True))

    def _unlink(self, call: Call) -> None:
        place = self._at(call, 0) if call.name == "unlinkat" else self._find("", call.text(0))
        if place is not None:
            del self._directories[place[0]][place[1]]
            self.operations.append(Unlink(*place))

    def _rename(self, call: Call) -> None:
        if call.name == "rename":
            source, target = self._find("", call.text(0)), self._find("", call.text(1))
        else:
            source, target = self._at(call, 0), self._at(call, 2)
        if source is None or target is None:
            if source or target:
                raise ValueError(f"a rename into or out of the directory: {call}")
            return
        inode = self._directories[source[0]].pop(source[1])
        self._directories[target[0]][target[1]] = inode
        self.operations.append(Rename(*target, inode, *source))

    def _link(self, call: Call) -> None:
        if call.name == "link":
            source, target = self._find("", call.text(0)), self._find("", call.text(1))
        else:
            source, target = self._at(call, 0), self._at(call, 2)
        if source is not None and target is not None:
            self._name(target, self._directories[source[0]][source[1]])
        elif target is not None:
            raise ValueError(f"a link from elsewhere is not modelled: {call}")

    # Data

    def _change(self, *operations: Write | Size) -> None:
        for operation in operations:
            self._files[operation.inode] = content(self._files[operation.inode], [operation])
            self.operations.append(operation)

    def _put(self, inode: int, offset: int, data: bytes) -> None:
        end = offset + len(data)
        before = self._files[inode]
        self.operations.append(Write(inode, offset, data))
        grow = Size(inode, end, grow=True)
        self._files[inode] = content(before, [Write(inode, offset, data), grow])
        if end > len(before):
            self.operations.append(grow)

    def _write(self, call: Call) -> None:
        if call.named(0).startswith(OUT):
            self._line += call.data(1)[: call.result]
            *lines, self._line = self._line.split(b"\n")
            self.operations += [Said(line.decode(errors="replace")) for line in lines]
        opened = self._open.get(call.fd(0))
        if opened is None:
            return
        if opened.append:
            opened.position = len(self._files[opened.inode])
        self._put(opened.inode, opened.position, self._whole(call))
        opened.position += call.result

    def _pwrite(self, call: Call) -> None:
        opened = self._open.get(call.fd(0))
        if opened is not None:
            position = 3
            self._put(opened.inode, call.number(position), self._whole(call))

    def _whole(self, call: Call) -> bytes:
        data = call.data(1)
        if len(data) < call.result:
            raise ValueError(f"strace cut the data of {call.name}: {len(data)} of {call.result}")
        return data[: call.result]

    def _read(self, call: Call) -> None:
        if call.fd(0) in self._open:
            self._open[call.fd(0)].position += call.result

    def _lseek(self, call: Call) -> None:
        if call.fd(0) in self._open:
            self._open[call.fd(0)].position = call.result

    def _truncate(self, call: Call) -> None:
        if call.name == "truncate":
            place = self._find("", call.text(0))
            inode = None if place is None else self._directories[place[0]][place[1]]
        else:
            opened = self._open.get(call.fd(0))
            inode = None if opened is None else opened.inode
        if inode is not None and call.number(1) != len(self._files[inode]):
            self._change(Size(inode, call.number(1), grow=False))

    def _fallocate(self, call: Call) -> None:
        opened = self._open.get(call.fd(0))
        if opened is None:
            return
        mode, offset, length = call.args[1], call.number(2), call.number(3)
        if b"PUNCH_HOLE" in mode or b"ZERO_RANGE" in mode:
            stop = min(offset + length, len(self._files[opened.inode]))
            self._change(Write(opened.inode, offset, bytes(max(stop - offset, 0))))
        elif mode != b"0" and b"KEEP_SIZE" not in mode:
            raise ValueError(f"not modelled: {call}")
        if b"KEEP_SIZE" not in mode and offset + length > len(self._files[opened.inode]):
            self._change(Size(opened.inode, offset + length, grow=True))

    def _copy_file_range(self, call: Call) -> None:
        target = self._open.get(call.fd(2))
        if target is None:
            return
        source = self._open.get(call.fd(0))
        offset, n = call.number(1), call.result
        if source is not None:
            data = self._files[source.inode][offset : offset + n]
        else:
            with open(call.named(0), "rb") as file:
                file.seek(offset)
                data = file.read(n)
        self._put(target.inode, call.number(3), data)

    def _fsync(self, call: Call) -> None:
        opened = self._open.get(call.fd(0))
        if opened is not None and not call.unfinished:
            path = self._path_of(opened.inode)
            self.operations.append(Sync(opened.inode, path, call.failed))

    def _refuse(self, call: Call) -> None:
        if any(path.startswith(self._root) for path in call.paths):
            raise ValueError(f"not modelled: {call}")


_HANDLERS: dict[str, Callable[[Recorder, Call], None]] = {
    "openat": Recorder._openat,
    "close": Recorder._close,
    **dict.fromkeys(("dup", "dup2", "dup3", "fcntl"), Recorder._dup),
    **dict.fromkeys(("mkdir", "mkdirat"), Recorder._mkdir),
    **dict.fromkeys(("unlink", "unlinkat", "rmdir"), Recorder._unlink),
    **dict.fromkeys(("rename", "renameat", "renameat2"), Recorder._rename),
    **dict.fromkeys(("link", "linkat"), Recorder._link),
    **dict.fromkeys(("write", "writev"), Recorder._write),
    **dict.fromkeys(("pwrite64", "pwritev", "pwritev2"), Recorder._pwrite),
    **dict.fromkeys(("read", "readv"), Recorder._read),
    "lseek": Recorder._lseek,
    **dict.fromkeys(("truncate", "ftruncate"), Recorder._truncate),
    "fallocate": Recorder._fallocate,
    "copy_file_range": Recorder._copy_file_range,
    **dict.fromkeys(("fsync", "fdatasync"), Recorder._fsync),
    **dict.fromkeys(
        ("sendfile", "splice", "symlink", "symlinkat", "sync", "syncfs"), Recorder._refuse
    ),
    **dict.fromkeys(("open", "openat2", "creat"), Recorder._refuse),
}
