"""Headers are bounded in memory and in work, whatever they claim."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import raw_safetensors
from hostile import FILE, MIB, Hostile, entry, many_tensors
from hostile_folders import FIRST, INDEX, of_index

READ = """
import resource, sys
from ema_cli import formats
from ema_cli.errors import InputError
try:
    print(len(formats.read(sys.argv[1], {}).index.tensors), "tensors")
except InputError as error:
    print(error.message)
try:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
except FileNotFoundError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def read_in_child(path: Path) -> tuple[str, int]:
    """Return what reading `path` in a process of its own said, and its peak memory in bytes.

    The peak comes from /proc where there is one: ru_maxrss of a child starts at its parent's.
    """
    done = subprocess.run(
        [sys.executable, "-c", READ, path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    *said, peak = done.stdout.splitlines()
    return "\n".join(said), int(peak) * 1024


def base() -> int:
    """Peak memory of a child that reads nothing."""
    return read_in_child(Path("/nonexistent"))[1]


def test_a_header_of_60_mb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """900,000 tensors in a header of 60 MB cost no more memory than a file that is not there."""
    said, peak = read_in_child(many_tensors(tmp_path / FILE))
    assert "expected a header of at most 16.0 MiB" in said
    assert peak < base() + 8 * MIB


def test_the_largest_legal_header_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """A header just under the limit, small tensors only, takes 12 times its size at most."""
    count = 16 * MIB // 67
    path = many_tensors(tmp_path / FILE, count)
    assert 15 * MIB < path.stat().st_size < 16 * MIB
    said, peak = read_in_child(path)
    assert said == f"{count} tensors"
    assert peak < base() + 12 * 16 * MIB


def _bomb(name: str, header: bytes, *words: str) -> Hostile:
    def build(folder: Path) -> Path:
        (folder / FILE).write_bytes(raw_safetensors(header))
        return folder / FILE

    return Hostile(name, build, words)


_PAIRS = b",".join(b'"k%07d":"v"' % k for k in range(150_000))
_NAMES = b",".join(b'"t%07d":"%b"' % (k, FIRST.encode()) for k in range(150_000))

BOMBS = (
    _bomb("16 million brackets", b'{"a":' + b"[" * (15 * MIB), "an entry is longer"),
    _bomb("16 million spaces", b"{" + b" " * (15 * MIB), "not JSON"),
    _bomb("7 million empty lists", b'{"a":[' + b"[]," * (5 * MIB) + b"[]]}", FILE),
    _bomb("a name of 15 MB", b'{"%b":{}}' % (b"n" * (15 * MIB)), "expected the fields"),
    _bomb(
        "a shape of 7 million ones",
        b'{"a":{"dtype":"F32","shape":[1%b],"data_offsets":[0,4]}}' % (b",1" * (7 * MIB)),
        FILE,
    ),
    _bomb(
        "150,000 metadata keys, the last one twice",
        b'{"__metadata__":{%b,"k0149999":"v"}}' % _PAIRS,
        "'k0149999' twice",
    ),
    of_index(
        "150,000 listed tensors, the last one twice",
        b'{"weight_map":{%b,"t0149999":"%b"}}' % (_NAMES, FIRST.encode()),
        INDEX,
        "'t0149999' stands twice",
    ),
)


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.name)
def test_a_bomb_is_refused_in_bounded_memory_and_work(tmp_path: Path, bomb: Hostile) -> None:
    """Sixteen MiB of malice take less than 150 MiB and far less than a minute."""
    said, peak = read_in_child(bomb.build(tmp_path))
    for word in bomb.words:
        assert word in said
    assert said.isprintable()
    assert len(said) < 2000
    assert peak < base() + 150 * MIB


def test_a_shape_that_claims_terabytes_allocates_nothing(tmp_path: Path) -> None:
    """The size a header claims is compared with the file, never allocated."""
    path = tmp_path / FILE
    header = {"a": entry(shape=[1 << 40], offsets=[0, 4 << 40])}
    path.write_bytes(raw_safetensors(header, bytes(8)))
    said, peak = read_in_child(path)
    assert "truncated: the tensors need 4,398,046,511,104 bytes" in said
    assert peak < base() + 8 * MIB
