"""Graph collections held against what TensorFlow says of the same graph, and hostile files."""

from __future__ import annotations

import gzip
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ema_cli.formats.tensorflow import metagraph, spans
from ema_cli.formats.tensorflow.metagraph import (
    Collections,
    Listed,
    read_collections,
    read_untrainable,
)
from ema_cli.formats.tensorflow.wire import (
    Malformed,
    fields,
    message,
    put_bytes,
    put_number,
    put_varint,
)

DATA = Path(__file__).resolve().parent.parent / "data" / "tensorflow" / "graphs"
EXPECTED: dict[str, dict[str, Any]] = json.loads((DATA / "collections.json").read_text())
GIB = 1 << 30


def content_of(name: str) -> bytes:
    """Return the bytes of a file that TensorFlow wrote."""
    return gzip.decompress((DATA / f"{name}.gz").read_bytes())


def reader(content: bytes) -> Callable[[int, int], bytes]:
    """Return the function that reads `content`."""
    return lambda offset, count: content[offset : offset + count]


def collections_of(content: bytes, saved_model: bool = False) -> Collections:
    return read_collections(reader(content), len(content), saved_model=saved_model)


def rows(listed: tuple[Listed, ...]) -> list[list[Any]]:
    return [[*entry[:4], list(entry.shape)] for entry in listed]


# ---------------------------------------------------------------------------- building


def collection(key: str, *values: bytes, field: int = 2) -> bytes:
    """Return the field of a MetaGraphDef for a collection of variables, or of names (1)."""
    entries = b"".join(put_bytes(1, value) for value in values)
    return put_bytes(4, put_bytes(1, key.encode()) + put_bytes(2, put_bytes(field, entries)))


def variable(name: str, part_of: bytes = b"", trainable: bool = True) -> bytes:
    """Return a VariableDef."""
    sliced = put_bytes(4, part_of) if part_of else b""
    return put_bytes(1, name.encode()) + sliced + put_number(7, trainable)


def trainable_in(content: bytes) -> tuple[Listed, ...]:
    return collections_of(content).trainable


# ---------------------------------------------------------------------------- real files


@pytest.mark.parametrize("name", EXPECTED)
def test_collections_are_those_of_the_graph(name: str) -> None:
    found = collections_of(content_of(name), saved_model=name.endswith(".pb"))
    expected = EXPECTED[name]
    assert rows(found.trainable) == expected["trainable_variables"]
    assert rows(found.moving_average) == expected["moving_average_variables"]
    if "variables" in expected:
        assert found.variables is not None
        assert rows(found.variables) == expected["variables"]
    else:
        assert found.variables is None


def test_the_real_files_hold_partitions_and_untrained_variables() -> None:
    found = collections_of(content_of("resource.meta"))
    assert [entry.key for entry in found.trainable if entry.partition] == ["net/emb"] * 3
    assert {entry.shape for entry in found.trainable if entry.partition} == {(7, 2)}
    assert found.variables is not None
    untrained = {entry.key for entry in found.variables if not entry.trainable}
    assert {"net/frozen", "global_step", "net/emb/ExponentialMovingAverage"} <= untrained


def test_a_saved_model_of_tensorflow_2_records_what_is_not_trainable() -> None:
    content = content_of("module_saved_model.pb")
    recorded = json.loads((DATA / "graphs.json").read_text())["module_saved_model"]["untrainable"]
    assert recorded
    assert read_untrainable(reader(content), len(content)) == set(recorded)
    assert collections_of(content, saved_model=True) == Collections((), (), None)


def test_only_what_is_asked_for_is_fetched() -> None:
    content = content_of("resource.meta")
    asked = []

    def read(offset: int, count: int) -> bytes:
        asked.append((offset, count))
        return content[offset : offset + count]

    other = collection("while_context", bytes(5 << 20)) + collection("k" * (5 << 20))
    content = other + content + other
    read_collections(read, len(content))
    assert sum(count for _, count in asked) < 400_000


# ---------------------------------------------------------------------------- forms


def test_plain_names_are_listed_without_their_output_number() -> None:
    names = (b"net/w:0", b"net/b", b"net/w:1", b"\xff:0")
    found = trainable_in(collection("trainable_variables", *names, field=1))
    assert [entry.name for entry in found] == ["net/w", "net/b", "net/w:1", "\udcff"]
    assert [entry.key for entry in found] == [entry.name for entry in found]
    assert not any(entry.trainable for entry in found)


def test_a_variable_listed_twice_counts_once() -> None:
    content = collection("moving_average_variables", *[variable("w:0")] * 2, variable("b:0"))
    found = collections_of(content).moving_average
    assert [entry.name for entry in found] == ["w", "b"]


def test_whether_a_variable_is_trainable_is_as_recorded() -> None:
    said = variable("no:0", trainable=False) + b"\x38\x00"
    content = collection(
        "variables", variable("yes:0"), variable("unsaid:0", trainable=False), said
    )
    found = collections_of(content).variables or ()
    assert [entry.name for entry in found if entry.trainable] == ["yes"]
    assert len(found) == 3


def test_an_empty_collection_is_not_an_absent_one() -> None:
    assert collections_of(collection("variables")).variables == ()
    assert collections_of(put_bytes(4, put_bytes(1, b"variables"))).variables == ()
    assert collections_of(b"").variables is None


@pytest.mark.parametrize("packed", [False, True])
def test_the_shape_of_a_partition_may_be_packed(packed: bool) -> None:
    shape = (3, 0, 1 << 40)
    values = [put_varint(size) for size in shape]
    listed = b"".join(b"\x10" + value for value in values)
    encoded = put_bytes(2, b"".join(values)) if packed else listed
    definition = variable("emb/part_0:0", put_bytes(1, b"emb") + encoded)
    (found,) = trainable_in(collection("trainable_variables", definition))
    assert found == Listed("emb/part_0", "emb", trainable=True, partition=True, shape=shape)


def test_a_key_may_follow_its_value() -> None:
    value = put_bytes(2, put_bytes(2, put_bytes(1, variable("w:0"))))
    content = put_bytes(4, value + put_bytes(1, b"trainable_variables"))
    assert [entry.name for entry in trainable_in(content)] == ["w"]


def test_other_kinds_of_collections_and_fields_are_passed_over() -> None:
    numbers = put_bytes(4, put_bytes(1, b"variables") + put_bytes(2, put_bytes(3, b"\x0a\x01\x07")))
    others = b"\x61" + bytes(8) + b"\x6d" + bytes(4) + b"\x70\x01"
    assert collections_of(others + numbers + others).variables == ()


# ---------------------------------------------------------------------------- hostile files


HOSTILE = {
    "no name": (collection("variables", b""), "has no name"),
    "an output, no name": (collection("variables", variable(":0")), "has no name"),
    "a partition of nothing": (
        collection("variables", variable("w:0", put_number(2, 3))),
        "does not name",
    ),
    "a negative dimension": (
        collection("variables", variable("w:0", put_bytes(1, b"w") + put_number(2, -1))),
        "negative dimension",
    ),
    "many dimensions": (
        collection(
            "variables", variable("w:0", put_bytes(1, b"w") + put_bytes(2, bytes([1]) * 999))
        ),
        "at most 254 dimensions",
    ),
    "a name that is a number": (collection("variables", put_number(1, 7)), "wire type 0"),
    "an entry that is a number": (put_number(4, 7), "wire type 0"),
    "a key that is a number": (put_bytes(4, put_number(1, 7)), "wire type 0"),
    "a value that is a number": (put_bytes(4, put_number(2, 7)), "wire type 0"),
    "a length past the end": (b"\x22\xff\x01", "needs 255 bytes"),
    "a length past the entry": (put_bytes(4, b"\x0a\x05abc") + bytes(9), "needs 5 bytes"),
    "an enormous length": (b"\x12" + put_varint(-1), "needs 18,446,744,073,709,551,615 bytes"),
    "a group": (b"\x0b\x0c", "wire type 3"),
    "field 0": (b"\x02\x00", "number 0"),
    "a tag without end": (b"\xff" * 30, "longer than 10 bytes"),
    "half a number": (b"\x08\x80", "past the end"),
    "half a fixed number": (b"\x0d\x00", "needs 4 bytes"),
}


@pytest.mark.parametrize("defect", HOSTILE)
def test_hostile_files_are_refused(defect: str) -> None:
    content, words = HOSTILE[defect]
    with pytest.raises(Malformed, match=words):
        collections_of(content)


def test_a_file_shorter_than_it_was_is_refused() -> None:
    content = content_of("resource.meta")
    with pytest.raises(Malformed, match="bytes at 0, found 1,000"):
        read_collections(reader(content[:1000]), len(content))


def test_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    content = collection("variables", *(variable(f"v{number}") for number in range(20)))
    monkeypatch.setattr(metagraph, "ENTRY_LIMIT", 20)
    assert collections_of(content).variables
    monkeypatch.setattr(metagraph, "ENTRY_LIMIT", 19)
    with pytest.raises(Malformed, match="at most 19 variables"):
        collections_of(content)
    monkeypatch.setattr(spans, "FIELD_LIMIT", 100)
    with pytest.raises(Malformed, match="at most 100 fields"):
        collections_of(put_number(1, 1) * 101)


def sparse(path: Path, pieces: dict[int, bytes], size: int) -> int:
    """Write a file of `size` bytes that holds nothing but `pieces`, and return it opened."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.truncate(fd, size)
    for offset, piece in pieces.items():
        os.pwrite(fd, piece, offset)
    return fd


def test_gigabytes_are_walked_in_little_memory(tmp_path: Path) -> None:
    graph = b"\x12" + put_varint(2 * GIB)
    context = put_bytes(1, b"cond_context") + b"\x12" + put_varint(GIB)
    entry = b"\x22" + put_varint(len(context) + GIB) + context
    real = content_of("resource.meta")
    at = len(graph) + 2 * GIB
    end = at + len(entry) + GIB
    fd = sparse(tmp_path / "model.meta", {0: graph, at: entry, end: real}, end + len(real))
    try:
        tracemalloc.start()
        found = read_collections(lambda offset, count: os.pread(fd, count, offset), end + len(real))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        os.close(fd)
    assert found == collections_of(real)
    assert peak < 1 << 20


def test_a_collection_of_more_than_64_mib_is_refused_unread(tmp_path: Path) -> None:
    size = (64 << 20) + 1
    value = put_bytes(1, b"variables") + b"\x12" + put_varint(size)
    start = b"\x22" + put_varint(len(value) + size) + value
    fd = sparse(tmp_path / "model.meta", {0: start}, len(start) + size)
    try:
        with pytest.raises(Malformed, match="at most 67,108,864 bytes"):
            read_collections(
                lambda offset, count: os.pread(fd, min(count, 1 << 20), offset), len(start) + size
            )
    finally:
        os.close(fd)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Return `content` with a few bytes changed, taken out, repeated or cut off."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(changed))
        kind = rng.randrange(4)
        if kind == 0:
            changed[at] = rng.choice((0, 0xFF, 0x7F, 0x80, changed[at] ^ 1 << rng.randrange(8)))
        elif kind == 1:
            del changed[at : at + rng.randrange(1, 9)]
        elif kind == 2:
            changed[at:at] = changed[at : at + rng.randrange(1, 30)]
        else:
            del changed[max(at, 1) :]
        changed = changed or bytearray(1)
    return bytes(changed)


def test_mutations_raise_nothing_else() -> None:
    rng = random.Random(5)
    # Nearly all of a real file is skipped, so what is not is also changed on its own.
    meta = content_of("reference.meta")
    wanted = b"".join(
        put_bytes(4, bytes(message(field))) for field in fields(meta) if field[0] == 4
    )
    objects = content_of("module_saved_model.pb")
    refused = 0
    for turn in range(2000):
        content = mutated((meta, wanted, wanted, objects)[turn % 4], rng)
        try:
            if turn % 4 == 3:
                read_untrainable(reader(content), len(content))
            else:
                collections_of(content)
        except Malformed:
            refused += 1
    assert 200 < refused < 2000
