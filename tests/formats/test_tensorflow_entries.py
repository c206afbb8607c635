"""The messages and the slice keys of a TensorFlow index: vectors, round trips, hostile ones."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ema_cli.formats.tensorflow import entries
from ema_cli.formats.tensorflow.entries import (
    DTYPE_NAMES,
    DTYPE_NUMBERS,
    SHARD_LIMIT,
    Entry,
    Header,
    crc_offset,
    encode_entry,
    encode_header,
    parse_entry,
    parse_header,
)
from ema_cli.formats.tensorflow.ordered import EVERYTHING, Range, parse_slice_key, slice_key
from ema_cli.formats.tensorflow.table import read
from ema_cli.formats.tensorflow.wire import Malformed, put_bytes, put_number, put_varint

DATA = Path(__file__).resolve().parent.parent / "data" / "tensorflow"
ALL = 0, -1

# ---------------------------------------------------------------------------- header

HEADERS = {
    "0801 1a020801": Header(1, False),
    "0803 1a020801": Header(3, False),
    "0801 1001 1a020801": Header(1, True),
    "08c801 1a020801": Header(200, False),
}


@pytest.mark.parametrize("code", HEADERS)
def test_a_header_has_the_bytes_tensorflow_writes(code: str) -> None:
    """Both ways; the minimum consumer 0 and the byte order 0 are left out."""
    assert encode_header(HEADERS[code]) == bytes.fromhex(code)
    assert parse_header(bytes.fromhex(code)) == HEADERS[code]


def test_a_header_may_say_more() -> None:
    """Fields unknown today, an older minimum, and versions that are not ours."""
    assert parse_header(bytes.fromhex("0801")) == Header(1, False)
    version = bytes.fromhex("0809 1001 1802 1a020304")
    more = put_number(1, 7) + put_bytes(3, version) + put_bytes(9, b"later")
    assert parse_header(more) == Header(7, False)


HOSTILE_HEADERS = {
    "nothing": (b"", "1 to 100,000 data files, found 0"),
    "no shards": (bytes.fromhex("0800 1a020801"), "found 0"),
    "too many shards": (put_number(1, SHARD_LIMIT + 1), "found 100,001"),
    "negative shards": (put_number(1, -1), "found -1"),
    "byte order": (bytes.fromhex("0801 1002"), "byte order 0 or 1, found 2"),
    "newer": (put_number(1, 1) + put_bytes(3, put_number(2, 2)), "newer TensorFlow"),
    "bad consumer": (put_number(1, 1) + put_bytes(3, b"\x18\1"), "newer TensorFlow"),
    "bad consumers": (put_number(1, 1) + put_bytes(3, b"\x1a\2\0\1"), "newer TensorFlow"),
    "packed, cut short": (put_number(1, 1) + put_bytes(3, b"\x1a\1\x80"), "past the end"),
    "no message": (bytes.fromhex("0801 1801"), "wire type 0"),
    "no number": (bytes.fromhex("0a0101"), "wire type 2"),
}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_a_hostile_header_is_refused(name: str) -> None:
    """Each with what was expected."""
    value, text = HOSTILE_HEADERS[name]
    with pytest.raises(Malformed, match=text):
        parse_header(value)


# ---------------------------------------------------------------------------- entries

# As TensorFlow wrote them: plain, scalar, empty, a whole with its slices, one of the slices.
ENTRIES = {
    "0801 1208 1202080a 12020814 1801 20e412 28a006 3578563412": Entry(
        1, (10, 20), 1, 2404, 800, 0x12345678
    ),
    "0809 1200 2060 2808 35eab2043e": Entry(9, (), 0, 96, 8, 0x3E04B2EA),
    "0801 1206 1200 12020803 35d8ea82a2": Entry(1, (0, 3), crc=0xA282EAD8),
    "0801 1208 12020806 1202080a 3a06 0a021003 0a00 3a08 0a0408031003 0a00": Entry(
        1, (6, 10), slices=(((0, 3), ALL), ((3, 3), ALL))
    ),
    "0801 1205 120308a846 3a05 0a0310ff3f 3a08 0a0608ff3f10a906": Entry(
        1, (9000,), slices=(((0, 8191),), ((8191, 809),))
    ),
    "0801 1204 12020805 3a04 0a021000": Entry(1, (5,), slices=(((0, 0),),)),
    "0801 1200 3a00": Entry(1, (), slices=((),)),
}


@pytest.mark.parametrize("code", ENTRIES)
def test_an_entry_has_the_bytes_tensorflow_writes(code: str) -> None:
    """Both ways: zeros left out, the shape and the length of an extent never."""
    value = bytes.fromhex(code)
    assert parse_entry(value) == ENTRIES[code]
    assert encode_entry(ENTRIES[code]) == value


@pytest.mark.parametrize("name", ["single.index", "merged.index"])
def test_entries_of_tensorflow_come_back(name: str) -> None:
    """Every entry in TensorFlow's own files is encoded as it was."""
    raw = (DATA / name).read_bytes()
    for key, value, _ in read(raw):
        if not key:
            assert encode_header(parse_header(value)) == value
            continue
        found = parse_entry(value)
        at = crc_offset(value)
        if not found.slices:
            assert int.from_bytes(value[at : at + 4], "little") == found.crc
            assert encode_entry(found) == value
        else:
            # After a merge the whole has the number of a shard, which means nothing.
            assert at == -1
            assert encode_entry(found) == value.replace(b"\x18\1", b"")


def test_dtypes_have_the_numbers_of_tensorflow() -> None:
    """Tensors of the file are named for their dtypes; resources and references have no name."""
    items = list(read((DATA / "single.index").read_bytes()))
    found = {key: DTYPE_NAMES[parse_entry(value).dtype] for key, value, _ in items[1:]}
    assert (found[b"strings"], found[b"list"]) == ("string", "variant")
    for name in set(DTYPE_NUMBERS) - {"string", "variant"}:
        assert found[name.removesuffix("_byte").encode()] == name
    assert len(DTYPE_NUMBERS) == len(DTYPE_NAMES) == 32
    assert 0 not in DTYPE_NAMES
    assert 20 not in DTYPE_NAMES
    assert max(DTYPE_NAMES) == 33


sizes = st.sampled_from([0, 1, 127, 128, 1 << 20, (1 << 63) - 1])
slices_of = st.tuples(sizes, sizes) | st.just(EVERYTHING)


@st.composite
def any_entry(draw: st.DrawFn) -> Entry:
    """Draw an entry that can be written: with slices, or with a place and a checksum."""
    shape = tuple(draw(st.lists(sizes, max_size=5)))
    dtype = draw(st.integers(1, 40))
    if draw(st.booleans()):
        extents = st.tuples(*[slices_of] * len(shape))
        return Entry(dtype, shape, slices=tuple(draw(st.lists(extents, min_size=1, max_size=3))))
    place = draw(sizes), draw(sizes), draw(sizes)
    return Entry(dtype, shape, *place, draw(st.integers(0, (1 << 32) - 1)))


@given(entry=any_entry())
def test_what_is_encoded_is_parsed(entry: Entry) -> None:
    """Any entry, and its checksum lies where `crc_offset` says."""
    value = encode_entry(entry)
    assert parse_entry(value) == entry
    at = crc_offset(value)
    assert (at < 0) == (not entry.crc)
    if entry.crc:
        assert value[at : at + 4] == entry.crc.to_bytes(4, "little")
        other = value[:at] + b"\x78\x56\x34\x12" + value[at + 4 :]
        assert parse_entry(other) == entry._replace(crc=0x12345678)


SHAPE = put_bytes(2, b"")


def test_other_orders_and_unknown_fields_are_read() -> None:
    """Protobuf promises no order, and lets later versions say more."""
    crc = bytes.fromhex("3501020304")
    fields = [put_number(5, 8), crc, put_number(1, 9), SHAPE, put_number(4, 3), put_bytes(99, b"x")]
    expected = Entry(9, (), 0, 3, 8, 0x04030201)
    chance = random.Random(4)
    for _ in range(50):
        chance.shuffle(fields)
        value = b"".join(fields)
        assert parse_entry(value) == expected
        assert value[crc_offset(value) :].startswith(crc[1:])


def test_of_repeated_numbers_the_last_counts() -> None:
    """As in any protobuf reader; also for the checksum, wherever it is."""
    first, last = bytes.fromhex("3501020304"), bytes.fromhex("3505060708")
    value = put_number(1, 3) + SHAPE + first + put_number(5, 7) + put_number(5, 4) + last
    assert parse_entry(value) == Entry(3, (), size=4, crc=0x08070605)
    assert crc_offset(value) == len(value) - 4
    assert crc_offset(value + b"\x40\1\x79" + bytes(8)) == len(value) - 4


def test_a_dimension_may_have_a_name() -> None:
    """Nobody writes them any more, but they are in the message."""
    dimension = put_number(1, 4) + put_bytes(2, b"batch")
    assert parse_entry(b"\x08\1" + put_bytes(2, put_bytes(2, dimension))).shape == (4,)
    known = put_bytes(2, dimension) + b"\x18\0"
    assert parse_entry(b"\x08\1" + put_bytes(2, known)).shape == (4,)


def dims(*found: int) -> bytes:
    """Return the shape field with these dimensions."""
    return put_bytes(2, b"".join(put_bytes(2, put_number(1, n)) for n in found))


HOSTILE_ENTRIES = {
    "no field number": (b"\0\0", "has number 0"),
    "cut short": (b"\x08", "past the end"),
    "dtype of the wrong type": (b"\x0a\0" + SHAPE, "wire type 2"),
    "shape of the wrong type": (b"\x08\1\x10\1", "wire type 0"),
    "shard of the wrong type": (b"\x08\1\x12\0\x1d\1\0\0\0", "wire type 5"),
    "crc of the wrong type": (b"\x08\1\x12\0\x30\1", "wire type 0"),
    "slices of the wrong type": (b"\x08\1\x12\0\x38\1", "wire type 0"),
    "a group": (b"\x08\1\x12\0\x43", "wire type 3"),
    "a negative dtype": (put_number(1, -1) + SHAPE, "holds -1"),
    "a negative dimension": (b"\x08\1" + dims(2, -2), "holds -2"),
    "a dimension of the wrong type": (b"\x08\1" + put_bytes(2, b"\x10\1"), "wire type 0"),
    "a size of the wrong type": (b"\x08\1" + put_bytes(2, put_bytes(2, b"\x0a\0")), "wire type"),
    "a name of the wrong type": (b"\x08\1" + put_bytes(2, put_bytes(2, b"\x10\1")), "wire type"),
    "unknown rank": (b"\x08\1" + put_bytes(2, b"\x18\1"), "unknown rank"),
    "33 dimensions": (b"\x08\1" + dims(*range(33)), "at most 32 dimensions"),
    "two shapes": (b"\x08\1" + SHAPE + SHAPE, "one shape"),
    "a negative shard": (b"\x08\1" + SHAPE + put_number(3, -1), "holds -1"),
    "a negative offset": (b"\x08\1" + SHAPE + put_number(4, -5), "holds -5"),
    "a negative size": (b"\x08\1" + SHAPE + put_number(5, -(1 << 63)), "holds -9,2"),
    "65 bits": (b"\x08\1" + SHAPE + b"\x20" + b"\xff" * 9 + b"\2", "64 bits"),
    "eleven bytes": (b"\x08\1" + SHAPE + b"\x20" + b"\xff" * 10 + b"\0", "longer than 10"),
    "a crc of three bytes": (b"\x08\1" + SHAPE + b"\x35\1\1\1", "needs 4 bytes"),
    "a shape of 127 bytes": (b"\x08\1\x12\x7f", "needs 127 bytes"),
    "a shape of 2^63 bytes": (b"\x08\1\x12" + put_varint(1 << 63), "bytes, 0 follow"),
    "a slice of too few": (b"\x08\1" + dims(2, 2) + put_bytes(7, b"\x0a\0"), "of 2 dimensions"),
    "a slice of too many": (b"\x08\1" + SHAPE + put_bytes(7, b"\x0a\0"), "of 0 dimensions"),
    "a negative start": (
        b"\x08\1" + dims(2) + put_bytes(7, put_bytes(1, put_number(1, -1) + b"\x10\1")),
        "holds -1",
    ),
    "a negative length": (
        b"\x08\1" + dims(2) + put_bytes(7, put_bytes(1, put_number(2, -1))),
        "holds -1",
    ),
    "a start alone": (
        b"\x08\1" + dims(2) + put_bytes(7, put_bytes(1, put_number(1, 1))),
        "has no length",
    ),
    "an extent of the wrong type": (b"\x08\1" + dims(2) + put_bytes(7, b"\x08\1"), "wire type 0"),
}


@pytest.mark.parametrize("name", HOSTILE_ENTRIES)
def test_a_hostile_entry_is_refused(name: str) -> None:
    """Each with the field and what it holds."""
    value, text = HOSTILE_ENTRIES[name]
    with pytest.raises(Malformed, match=text):
        parse_entry(value)


def outcome(parse: object, value: bytes) -> object:
    """Return what a function makes of the bytes, or that it refused them."""
    try:
        return parse(value)  # type: ignore[operator]
    except Malformed:
        return Malformed


def test_mutated_entries_are_refused_or_read() -> None:
    """Nothing but `Malformed` escapes, and the fast way reads what the general one does."""
    chance = random.Random(8)
    good = [encode_entry(entry) for entry in ENTRIES.values()]
    refused = 0
    for _ in range(5000):
        value = bytearray(chance.choice(good))
        for _ in range(chance.choice([1, 1, 2, 3])):
            at = chance.randrange(len(value))
            byte = chance.choice([0, 1, 8, 0x12, 0x20, 0x35, 0x7F, 0x80, 0xFF])
            value[at : at + chance.randrange(2)] = bytes([byte] * chance.randrange(3))
            value += b"\0" * (not value)
        found = outcome(parse_entry, bytes(value))
        assert found == outcome(entries._parse_entry, bytes(value))
        at = outcome(crc_offset, bytes(value))
        if isinstance(found, Entry) and isinstance(at, int):
            stored = value[at : at + 4] if at >= 0 else b""
            assert int.from_bytes(stored, "little") == found.crc
        refused += found is Malformed
        outcome(parse_header, bytes(value))
    assert 1000 < refused < 5000


# ---------------------------------------------------------------------------- slice keys

SIGNED = {
    0: "80",
    5: "85",
    63: "bf",
    64: "c040",
    67: "c043",
    -1: "7f",
    8191: "dfff",
    8192: "e02000",
    1 << 20: "f0100000",
    3_000_000: "f02dc6c0",
    1 << 55: "ff8080000000000000",
}


@pytest.mark.parametrize("number", SIGNED)
def test_numbers_have_the_codes_of_tensorflow(number: int) -> None:
    """As starts; -1 is a length, which stands after the start of a whole dimension."""
    extent = (number, 1) if number >= 0 else EVERYTHING
    code = SIGNED[number] + "81" if number >= 0 else "80" + SIGNED[number]
    key = bytes.fromhex("00 61 0001 0101" + code)
    assert slice_key(b"a", [extent]) == key
    assert parse_slice_key(key) == (b"a", (extent,))


def test_the_smallest_number_has_ten_bytes() -> None:
    """No slice begins there, but it is what the code was made for."""
    key = slice_key(b"", [(-(1 << 63), 0)])
    assert key == bytes.fromhex("00 0001 0101 003f8000000000000000 80")
    assert parse_slice_key(key) is None


SLICE_KEYS = {
    "00 656d622f636f6c73 0001 0102 80 85 c043 c043": (b"emb/cols", ((0, 5), (67, 67))),
    "00 7700ffff00 0001 0102 8083 807f": (b"w\0\xff", ((0, 3), ALL)),
    "00 0001 00": (b"", ()),
    "00 00ff00ffff00ff00 0001 00": (b"\0\0\xff\xff", ()),
}


@pytest.mark.parametrize("code", SLICE_KEYS)
def test_slice_keys_are_those_of_tensorflow(code: str) -> None:
    """Names with the bytes 00 and ff among them."""
    key = bytes.fromhex(code)
    assert slice_key(*SLICE_KEYS[code]) == key
    assert parse_slice_key(key) == SLICE_KEYS[code]


BOUNDS = [0, 1, 63, 64, 65, 8191, 8192, 1 << 20, (1 << 55) - 1, 1 << 55, (1 << 62) - 1, 1 << 62]
bounds = st.sampled_from([*BOUNDS, (1 << 63) - 1]) | st.integers(0, (1 << 63) - 1)
ranges = st.tuples(bounds, bounds) | st.just(EVERYTHING)
odd_names = st.binary(max_size=9) | st.lists(st.sampled_from([0, 1, 255, 97])).map(bytes)


@given(name=odd_names, extents=st.lists(ranges, max_size=5).map(tuple))
@example(name=b"\0\xff", extents=(EVERYTHING,) * 32)
def test_what_is_coded_is_parsed(name: bytes, extents: tuple[Range, ...]) -> None:
    """Any name, any number of 63 bits."""
    assert parse_slice_key(slice_key(name, extents)) == (name, extents)


@given(a=st.tuples(odd_names, bounds), b=st.tuples(odd_names, bounds))
def test_keys_are_in_the_order_of_what_they_say(a: tuple[bytes, int], b: tuple[bytes, int]) -> None:
    """That is what the code is for."""
    keys = [slice_key(name, [(start, 1)]) for name, start in (a, b)]
    assert (keys[0] < keys[1]) == (a < b)


@given(key=st.binary(max_size=30).map(lambda rest: b"\0" + rest))
def test_only_what_is_written_is_a_slice_key(key: bytes) -> None:
    """Any bytes: either they are coded again as they were, or they are a name like any other."""
    found = parse_slice_key(key)
    assert found is None or slice_key(*found) == key


NOT_SLICE_KEYS = {
    "a plain name": b"dense/kernel",
    "nothing": b"",
    "a zero": b"\0",
    "no end of the name": b"\0abc",
    "an escape that is none": b"\0a\0\2\0\1\0",
    "ff alone": b"\0a\xffb\0\1\0",
    "no rank": b"\0a\0\1",
    "fewer numbers": b"\0a\0\1\1\2\x80\x81",
    "more numbers": b"\0a\0\1\1\1\x80\x81\x80\x81",
    "half an extent": b"\0a\0\1\1\1\x80",
    "a number cut short": b"\0a\0\1\1\1\x80\xc0",
    "a rank with zeros": b"\0a\0\1\2\0\1\x80\x81",
    "a rank of 255 bytes": b"\0a\0\1\xff\1\x80\x81",
    "a long form of 5": b"\0a\0\1\1\1\xc0\5\x81",
    "eleven bytes": b"\0a\0\1\1\1" + b"\xff\xe0" + bytes(9) + b"\x81",
    "2^63": b"\0a\0\1\1\1" + b"\xff\xc0\x80" + bytes(7) + b"\x81",
    "a negative start": b"\0a\0\1\1\1\x7f\x81",
    "a negative length": b"\0a\0\1\1\1\x80\x7e",
    "a start without length": b"\0a\0\1\1\1\x81\x7f",
}


@pytest.mark.parametrize("name", NOT_SLICE_KEYS)
def test_other_keys_are_names(name: str) -> None:
    """A user may call a tensor anything; only what TensorFlow writes is the key of a slice."""
    assert parse_slice_key(NOT_SLICE_KEYS[name]) is None
