"""The simulated disk bites: what is not synced is lost, in any combination."""

from __future__ import annotations

import random
from pathlib import Path

from durability.recording import Recorder
from durability.simulate import (
    ROOT,
    SECTOR,
    Disk,
    Link,
    New,
    Operation,
    Rename,
    Size,
    Sync,
    Tree,
    Unlink,
    Write,
    identity,
)
from durability.strace import parse

DIRECTORY, FILE, OTHER = 1, 2, 3


def after(*operations: Operation) -> Disk:
    disk = Disk()
    for operation in operations:
        disk.apply(operation)
    return disk


def nothing_kept(*operations: Operation) -> Tree:
    return after(*operations).crash(None, 0.0)


def everything_kept(*operations: Operation) -> Tree:
    return after(*operations).crash(None, 1.0)


def written(inode: int, name: str, data: bytes) -> list[Operation]:
    return [
        New(inode, directory=False),
        Link(ROOT, name, inode),
        Write(inode, 0, data),
        Size(inode, len(data), grow=True),
    ]


NEW = written(FILE, "a", b"old")
DURABLE = [*NEW, Sync(FILE, "a"), Sync(ROOT, "")]


def test_what_is_synced_stays() -> None:
    assert nothing_kept(*DURABLE) == {"a": b"old"}


def test_unsynced_data_is_lost() -> None:
    assert nothing_kept(*NEW, Sync(ROOT, "")) == {"a": b""}


def test_an_unsynced_name_is_lost_though_the_file_is_synced() -> None:
    assert nothing_kept(*NEW, Sync(FILE, "a")) == {}


def test_a_rename_without_a_directory_sync_is_lost() -> None:
    replaced = [*DURABLE, *written(OTHER, "a.tmp", b"new"), Sync(OTHER, "a.tmp")]
    rename = Rename(ROOT, "a", OTHER, ROOT, "a.tmp")
    assert nothing_kept(*replaced, rename) == {"a": b"old"}
    assert everything_kept(*replaced, rename) == {"a": b"new"}
    assert nothing_kept(*replaced, rename, Sync(ROOT, "")) == {"a": b"new"}


def test_a_rename_can_survive_without_the_data_of_its_file() -> None:
    replaced = [*DURABLE, *written(OTHER, "a.tmp", b"new")]
    rename = Rename(ROOT, "a", OTHER, ROOT, "a.tmp")
    assert nothing_kept(*replaced, rename, Sync(ROOT, "")) == {"a": b""}


def test_a_directory_sync_does_not_make_the_directory_itself_durable() -> None:
    made = [New(DIRECTORY, directory=True), Link(ROOT, "d", DIRECTORY)]
    inside = [New(FILE, directory=False), Link(DIRECTORY, "f", FILE), Sync(DIRECTORY, "d")]
    assert nothing_kept(*made, *inside) == {}
    assert nothing_kept(*made, *inside, Sync(ROOT, "")) == {"d": None, "d/f": b""}


def test_an_unlink_is_lost_and_kept() -> None:
    assert nothing_kept(*DURABLE, Unlink(ROOT, "a")) == {"a": b"old"}
    assert everything_kept(*DURABLE, Unlink(ROOT, "a")) == {}


def test_sectors_survive_one_by_one() -> None:
    disk = after(*DURABLE, Size(FILE, 3 * SECTOR, grow=True), Sync(FILE, "a"))
    disk.apply(Write(FILE, 100, b"x" * (2 * SECTOR)))
    rng = random.Random(1)
    seen = set()
    for _ in range(200):
        data = disk.crash(rng, 0.5)["a"]
        assert data is not None
        seen.add(tuple(b"x" in data[k * SECTOR : (k + 1) * SECTOR] for k in range(3)))
    assert len(seen) == 8


def test_a_size_can_survive_without_the_data() -> None:
    disk = after(*written(FILE, "a", b"data"), Sync(ROOT, ""))
    rng = random.Random(1)
    assert {disk.crash(rng, 0.5)["a"] for _ in range(100)} == {b"", b"\0\0\0\0", b"data"}


def test_truncation_throws_away_what_came_before() -> None:
    shrunk = [*DURABLE, Size(FILE, 1, grow=False), Size(FILE, 3, grow=True)]
    assert everything_kept(*shrunk) == {"a": b"o\0\0"}
    assert nothing_kept(*shrunk) == {"a": b"old"}


def test_what_a_failed_sync_lost_no_later_one_brings_back() -> None:
    failed = [*NEW, Sync(FILE, "a", failed=True), Sync(FILE, "a"), Sync(ROOT, "")]
    assert everything_kept(*failed) == {"a": b"\0\0\0"}
    assert everything_kept(*failed, Write(FILE, 0, b"new")) == {"a": b"new"}


def test_equal_trees_have_equal_identities() -> None:
    assert identity({"a": b"1", "d": None}) == identity({"d": None, "a": b"1"})
    assert identity({"a": b"1"}) != identity({"a": b"2"})
    assert identity({"a": b""}) != identity({"a": None})


def hexadecimal(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def test_a_log_becomes_operations(tmp_path: Path) -> None:
    lines = [
        'openat(AT_FDCWD</w>, "a", O_RDWR|O_CREAT|O_CLOEXEC, 0600) = 3</w/a>',
        'pwrite64(3</w/a>, "data", 4, 2) = 4',
        "fallocate(3</w/a>, 0, 0, 9) = 0",
        "fsync(3</w/a>) = 0",
        "close(3</w/a>) = 0",
        'rename("a", "missing/b") = -1 ENOENT (No such file or directory)',
        'rename("a", "b") = 0',
        'openat(AT_FDCWD</w>, "elsewhere", O_RDONLY) = -1 ENOENT (No such file or directory)',
        'openat(AT_FDCWD</w>, ".", O_RDONLY|O_DIRECTORY) = 3</w>',
        "fsync(3</w>) = 0",
        'unlinkat(3</w>, "b", 0) = 0',
    ]
    path = str(tmp_path / "log")
    with open(path, "w") as file:
        for line in lines:
            parts = line.split('"')
            parts[1::2] = [hexadecimal(text) for text in parts[1::2]]
            whole = '"'.join(parts)
            for place in ("/w/a", "/w"):
                whole = whole.replace(f"<{place}>", f"<{hexadecimal(place)}>")
            file.write(f"77 {whole}\n")
    recorder = Recorder("/w")
    recorder.process(parse(path))
    assert recorder.operations == [
        New(1, directory=False),
        Link(ROOT, "a", 1),
        Write(1, 2, b"data"),
        Size(1, 6, grow=True),
        Size(1, 9, grow=True),
        Sync(1, "a"),
        Rename(ROOT, "b", 1, ROOT, "a"),
        Sync(ROOT, ""),
        Unlink(ROOT, "b"),
    ]


def test_a_call_in_which_the_process_was_killed_did_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log"
    name, cwd = hexadecimal("/w/a"), hexadecimal("/w")
    path.write_text(
        f'77 openat(AT_FDCWD<{cwd}>, "{name}", O_RDWR|O_CREAT, 0600) = 3<{name}>\n'
        f"77 fsync(3<{name}>) = -1 EIO (Input/output error) (INJECTED)\n"
        f"77 fsync(3<{name}>) = ?\n"
        "77 +++ killed by SIGKILL +++\n"
    )
    recorder = Recorder("/w")
    recorder.process(parse(str(path)))
    assert recorder.operations[2:] == [Sync(1, "a", failed=True)]
    assert [call.ordinal for call in parse(str(path))] == [1, 1, 2]
