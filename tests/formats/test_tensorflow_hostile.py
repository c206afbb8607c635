"""Broken and hostile TensorFlow checkpoints: each refused by name, in little memory."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import cmd
from tensorflow_bundles import (
    Row,
    Rows,
    block,
    crc32c,
    listing,
    masked,
    read_bundle,
    shard_file,
    write_bundle,
)
from tensorflow_hostile import EVERY, Hostile, of_block, sound

import ema_cli
from ema_cli.cli import main
from ema_cli.errors import EXIT_CODES, EmaError, InputError
from ema_cli.formats import read
from ema_cli.formats.tensorflow import entries, table
from ema_cli.reading import TensorReader
from ema_cli.tensors import Checkpoint

each_defect = pytest.mark.parametrize("hostile", EVERY, ids=lambda hostile: hostile.name)


def test_what_they_are_made_of_is_sound(tmp_path: Path) -> None:
    """Without its defect each of them would be read."""
    prefix = write_bundle(tmp_path / "m-1", sound())
    assert {t.name for t in read(str(prefix), {}).index.tensors} == set(read_bundle(prefix))
    raw = Path(f"{prefix}.index").read_bytes()
    Path(f"{prefix}.index").write_bytes(
        of_block(block([(key, value) for key, value, _ in table.read(raw)]))
    )
    assert {t.name for t in read(str(prefix), {}).index.tensors} == set(sound())


@each_defect
def test_it_is_refused_with_the_file_and_the_tensor(tmp_path: Path, hostile: Hostile) -> None:
    """One line that names what is wrong; code 12 from every command; nothing is written."""
    prefix = hostile.build(tmp_path)
    with pytest.raises(InputError) as caught:
        read(str(prefix), {})
    message = caught.value.message
    assert message.startswith(str(prefix))
    assert message.isprintable()
    for word in hostile.words:
        assert word in message
    before = sorted(os.listdir(tmp_path))
    for words in (("run", prefix, "-o", tmp_path / "out"), ("inspect", prefix)):
        outcome = cmd(*words, code=12)
        assert message in outcome.err
    assert sorted(os.listdir(tmp_path)) == before


@each_defect
def test_beside_good_checkpoints_it_is_passed_over(tmp_path: Path, hostile: Hostile) -> None:
    """The average of the others is what it would be without it, and the code is 3."""
    for step in (100, 200):
        write_bundle(tmp_path / "run" / f"model.ckpt-{step}", {"w": np.float32([step])})
    hostile.build(tmp_path / "run")
    outcome = cmd("run", tmp_path / "run", "-o", tmp_path / "out", "--average", "mean", code=3)
    assert "model.ckpt-300" in outcome.err
    assert list(read_bundle(tmp_path / "out")["w/ExponentialMovingAverage"]) == [150]


# ---------------------------------------------------------------------------- memory

READ_ALL = """
import sys
from ema_cli.errors import InputError
from ema_cli.formats import read
read(sys.argv[1], {})
def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1])
before = peak()
for path in sys.argv[2:]:
    try:
        read(path, {})
    except InputError:
        continue
    raise SystemExit(path)
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs VmHWM of Linux")
def test_no_defect_takes_memory(tmp_path: Path) -> None:
    """What an index claims is never allocated: all of them together stay below 8 MiB more."""
    good = write_bundle(tmp_path / "good", sound())
    paths = [hostile.build(tmp_path / str(k)) for k, hostile in enumerate(EVERY)]
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, good, *paths], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 << 10


def test_a_claim_that_the_file_could_hold_is_not_allocated_either(tmp_path: Path) -> None:
    """A hole of 64 GiB is a sound file; its index says so in no more memory than any other."""

    def claim(rows: Rows) -> None:
        rows[b"w"] = Row(1, (1 << 34,), 0, 0, 1 << 36, rows[b"w"].crc)

    prefix = write_bundle(tmp_path / "m-1", {"w": np.float32(1)}, change=claim)
    os.truncate(shard_file(prefix), 1 << 36)
    assert read(str(prefix), {}).index.nbytes == 1 << 36
    assert cmd("plan", prefix).code == 0


# ---------------------------------------------------------------------------- any index


def resealed(raw: bytes, places: list[tuple[int, int]]) -> bytes:
    """The index with the checksums that its blocks must have."""
    made = bytearray(raw)
    for start, length in places:
        end = start + length + 1
        if end + 4 <= len(made):
            made[end : end + 4] = masked(crc32c(bytes(made[start:end]))).to_bytes(4, "little")
    return bytes(made)


def mutated_bytes(raw: bytes, chance: random.Random) -> bytes:
    """Some bytes of its blocks changed, others taken out or put in, all checksums right again."""
    places = table.blocks(raw)
    made = bytearray(raw)
    for _ in range(chance.choice((1, 1, 2, 5))):
        start, length = chance.choice((places[0], places[0], places[-1]))
        made[start + chance.randrange(length + 1)] = chance.choice(
            (0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256))
        )
    return resealed(bytes(made), places)


def mutated_items(raw: bytes, chance: random.Random) -> bytes:
    """Some keys and values changed, in a table that is sound."""
    items = {key: value for key, value, _ in table.read(raw)}
    for _ in range(chance.choice((1, 1, 2, 4))):
        key = chance.choice(sorted(items))
        value = bytearray(items.pop(key))
        if chance.random() < 0.2:
            key = bytes(byte ^ (chance.random() < 0.1) for byte in key)
        for _ in range(chance.choice((0, 1, 1, 3))):
            at = chance.randrange(len(value) + 1)
            piece = chance.randbytes(chance.choice((0, 1, 1, 2, 9)))
            value[at : at + chance.choice((0, 1, len(piece)))] = piece
        items[key] = bytes(value)
    return table.build(sorted(items.items()))


def read_through(prefix: Path) -> Checkpoint:
    """Read an index, and then every byte of every tensor it tells of."""
    checkpoint = read(str(prefix), {})
    for tensor in checkpoint.index.tensors:
        with TensorReader(checkpoint, tensor) as reader:
            reader.block(0, reader.elements)
    return checkpoint


@pytest.mark.parametrize(("mutated", "count"), [(mutated_bytes, 3500), (mutated_items, 1500)])
def test_no_index_leads_to_another_exception(
    tmp_path: Path, mutated: Callable[[bytes, random.Random], bytes], count: int
) -> None:
    """5,000 changed indexes whose checksums are right: read, or refused as an input."""
    chance = random.Random(1)
    prefix = write_bundle(tmp_path / "m-1", sound(), shards=2, gap=2)
    path = Path(f"{prefix}.index")
    raw = path.read_bytes()
    read_through(prefix)
    taken = 0
    for _ in range(count):
        path.write_bytes(mutated(raw, chance))
        try:
            read_through(prefix)
            taken += 1
            if taken % 8 == 0:
                ema_cli.plan_run([prefix], tmp_path / "out", average=["mean"])
        except EmaError as error:
            assert error.exit_code in (10, 12, 13)
            assert error.message.isprintable()
    assert 25 < taken < count / 2


def test_no_index_makes_a_run_fail_in_another_way(tmp_path: Path) -> None:
    """The whole command over changed indexes: a code that is documented, and never 1."""
    chance = random.Random(2)
    prefix = write_bundle(tmp_path / "m-1", sound())
    path = Path(f"{prefix}.index")
    raw = path.read_bytes()
    codes = set()
    for k in range(120):
        path.write_bytes(mutated_items(raw, chance))
        out = tmp_path / f"out{k}"
        before = listing(tmp_path)
        code = main(["run", str(prefix), "-o", str(out), "--average", "mean", "-q"])
        codes.add(code)
        assert code in set(EXIT_CODES) - {1, 2}
        if code:
            assert listing(tmp_path) == before
    assert {0, 12} <= codes


def test_no_prefix_of_an_index_is_an_index(tmp_path: Path) -> None:
    """Cut short at any byte it is refused."""
    prefix = write_bundle(tmp_path / "m-1", sound())
    path = Path(f"{prefix}.index")
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(InputError):
            read(str(prefix), {})


@pytest.mark.parametrize("tensor", ["a\x1b[31m", "a\n", "a\x9b2J"])
def test_no_name_reaches_the_terminal(tmp_path: Path, tensor: str) -> None:
    """Nor does that of the other tensor, when it is the one that overlaps."""

    def overlap(rows: Rows) -> None:
        rows[b"b"].offset = 4

    tensors = {tensor: np.float32([1, 2]), "b": np.float32([1, 2])}
    prefix = write_bundle(tmp_path / "m-1", tensors, change=overlap)
    outcome = cmd("inspect", prefix, code=12)
    assert "overlap" in outcome.err
    assert outcome.err.replace("\n", "").isprintable()
    assert len(outcome.err.splitlines()) == 3


def test_an_encoded_entry_is_what_the_tests_break() -> None:
    """The rows of these tests begin as entries that are read."""
    row = Row(1, (2, 3), 0, 4, 24, 5)
    assert entries.parse_entry(row.encoded()) == entries.Entry(1, (2, 3), 0, 4, 24, 5)
