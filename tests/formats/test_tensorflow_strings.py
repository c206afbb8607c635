"""Checksums of strings and variants as TensorFlow stores them, in pieces and in either order."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ema_cli.checksums import crc32c, masked
from ema_cli.formats.tensorflow import strings
from ema_cli.formats.tensorflow.strings import (
    PIECE_BYTES,
    decode,
    string_checksums,
    variant_checksums,
)
from ema_cli.formats.tensorflow.wire import Malformed, put_varint


def reader(data: bytes) -> strings.Read:
    """Return a function that reads pieces of the data, never too large ones."""

    def read(offset: int, count: int) -> bytes:
        assert 0 < count <= PIECE_BYTES <= 1 << 20
        return data[offset : offset + count]

    return read


def stored(found: Sequence[bytes], order: str = "<") -> tuple[bytes, int]:
    """Return the bytes of a string tensor and the CRC its entry must hold, unmasked."""
    crc = crc32c(b"".join(struct.pack(order + "I", len(one)) for one in found))
    checksum = struct.pack(order + "I", masked(crc))
    body = b"".join(found)
    data = b"".join(put_varint(len(one)) for one in found) + checksum + body
    return data, crc32c(body, crc32c(checksum, crc))


def stored_variants(found: Sequence[bytes], order: str = "<") -> tuple[bytes, int]:
    """Return the same for a tensor of variants that are serialized like this."""
    data, crc = b"", 0
    for one in found:
        crc = crc32c(one, crc32c(struct.pack(order + "Q", len(one)), crc))
        checksum = struct.pack(order + "I", masked(crc))
        crc = crc32c(checksum, crc)
        data += put_varint(len(one)) + one + checksum
    return data, crc


# ---------------------------------------------------------------------------- TensorFlow's own

# Bytes, elements, and the masked checksum of the entry, as SaveV2 of TensorFlow 2.21 wrote them.
STRINGS = {
    "two": ("0200 78270b34 6162", [b"ab", b""], 0x4DB08891),
    "three": ("02008001 1f21874a 6162" + "78" * 128, [b"ab", b"", b"x" * 128], 0x6B253118),
    "none": ("d8ea82a2", [], 0x640CC1F6),
}
# A tensor of two TensorLists, [[0, 1]] and [[0, 1], [2, 3]].
LISTS = (
    "3e0a1674656e736f72666c6f773a3a54656e736f724c69737412100001ffffffffffffffffff01120208021a1208"
    "011204120208022a08000000000000803f5adf9809520a1674656e736f72666c6f773a3a54656e736f724c697374"
    "12100001ffffffffffffffffff01120208021a1208011204120208022a08000000000000803f1a12080112041202"
    "08022a0800000040000040408ab33102"
)


@pytest.mark.parametrize("name", STRINGS)
def test_strings_of_tensorflow_have_their_checksum(name: str) -> None:
    """The one of the entry and the one of the bytes, and the strings themselves."""
    code, found, crc = STRINGS[name]
    data = bytes.fromhex(code)
    expected = crc32c(data), string_checksums(reader(data), len(data), len(found))[1]
    assert string_checksums(reader(data), len(data), len(found)) == expected
    assert masked(expected[1]) == crc
    assert decode(data, len(found)) == found
    assert stored(found) == (data, expected[1])


def test_variants_of_tensorflow_have_their_checksum() -> None:
    """One checksum runs through all elements, and the entry has its last value."""
    data = bytes.fromhex(LISTS)
    found = variant_checksums(reader(data), len(data), 2)
    assert found[0] == crc32c(data)
    assert masked(found[1]) == 0x61A7A59E
    assert stored_variants([data[1:63], data[68:150]]) == (data, found[1])


def test_nothing_has_no_checksum() -> None:
    """TensorFlow reads neither; for variants it writes this."""
    assert string_checksums(reader(b""), 0, 0) == (0, 0)
    assert variant_checksums(reader(b""), 0, 0) == (0, 0)
    assert decode(b"", 0) == []


# ---------------------------------------------------------------------------- any tensor

some = st.lists(st.binary(max_size=5) | st.integers(120, 300).map(bytes), max_size=20)


@given(found=some, big=st.booleans())
@example(found=[b""] * 400, big=False)
@example(found=[bytes(20_000)], big=True)
def test_strings_come_back(found: list[bytes], big: bool) -> None:
    """Any strings in either byte order."""
    data, crc = stored(found, ">" if big else "<")
    result = string_checksums(reader(data), len(data), len(found), big_endian=big)
    assert result == (crc32c(data), crc)
    assert decode(data, len(found)) == found


@given(found=some, big=st.booleans())
def test_variants_are_verified(found: list[bytes], big: bool) -> None:
    """Any variants in either byte order; what they hold is not looked at."""
    data, crc = stored_variants(found, ">" if big else "<")
    result = variant_checksums(reader(data), len(data), len(found), big_endian=big)
    assert result == (crc32c(data), crc)


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64])
def test_the_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Lengths and checksums may lie across the end of one."""
    monkeypatch.setattr(strings, "PIECE_BYTES", piece)
    found = [b"ab", b"", bytes(130), b"c" * 17_000, b"d"]
    for checksums, (data, crc) in (
        (string_checksums, stored(found)),
        (variant_checksums, stored_variants(found)),
    ):
        assert checksums(reader(data), len(data), len(found)) == (crc32c(data), crc)
    assert decode(stored(found)[0], len(found)) == found


def test_a_string_of_more_than_4_gib() -> None:
    """Its length enters the checksum as 64 bits; memory holds one piece of it."""
    length = (1 << 32) + 5
    head = put_varint(3) + put_varint(length)
    crc = crc32c(struct.pack("<IQ", 3, length))
    head += struct.pack("<I", masked(crc))
    zeros = bytes(PIECE_BYTES)
    size = len(head) + 3 + length

    def read(offset: int, count: int) -> bytes:
        return (head[offset:] + zeros)[:count] if offset < len(head) else zeros[:count]

    entry = crc32c(head[-4:], crc)
    whole = crc32c(head)
    left = 3 + length
    while left:
        piece = memoryview(zeros)[:left]
        entry, whole = crc32c(piece, entry), crc32c(piece, whole)
        left -= len(piece)
    assert string_checksums(read, size, 2) == (whole, entry)


# ---------------------------------------------------------------------------- hostile tensors

GOOD, _ = stored([b"ab", b"", b"xyz"])
VARIANTS, _ = stored_variants([b"ab", b"", b"xyz"])

HOSTILE = {
    "2^33 elements": (string_checksums, GOOD, 1 << 33, "8,589,934,592 elements need"),
    "no room for the checksum": (string_checksums, b"\0\0\0\0", 1, "need 5 bytes or more"),
    "no bytes": (string_checksums, b"", 1, "need 5 bytes or more, found 0"),
    "bytes, but no elements": (string_checksums, b"\0", 0, "need 4 bytes or more"),
    "fewer elements": (string_checksums, GOOD, 2, "expected the checksum"),
    "more elements": (string_checksums, GOOD, 4, "expected the checksum|claim"),
    "no end": (string_checksums, b"\x80" * 9, 1, "ends after 9 bytes"),
    "ends in the checksum": (string_checksums, b"\x80" * 7 + b"\0\0", 1, "ends after 9 bytes"),
    "a length of 11 bytes": (string_checksums, b"\xff" * 20, 1, "longer than 10 bytes"),
    "a length of 70 bits": (string_checksums, b"\xff" * 9 + b"\x7f" + bytes(9), 1, "claim"),
    "2^62 bytes": (string_checksums, put_varint(1 << 62) + bytes(9), 1, "claim 4,6"),
    "too long": (string_checksums, stored([b"abc"])[0][:-1], 1, "claim 3 bytes, 2 follow"),
    "too short": (string_checksums, stored([b"abc"])[0] + b"d", 1, "claim 3 bytes, 4 follow"),
    "2^33 variants": (variant_checksums, VARIANTS, 1 << 33, "8,589,934,592 elements need"),
    "fewer variants": (variant_checksums, VARIANTS, 2, "8 bytes follow the last variant"),
    "variants without elements": (variant_checksums, VARIANTS, 0, "follow the last variant"),
    "no room for a variant": (variant_checksums, b"\0\0\0\0", 1, "need 5 bytes"),
    "a variant of 2^63": (variant_checksums, put_varint(1 << 63) + bytes(9), 1, "claims 9,2"),
    "a variant of 70 bits": (variant_checksums, b"\xff" * 9 + b"\x7f" + bytes(9), 1, "claims"),
    "a variant over its checksum": (variant_checksums, b"\1abcd", 1, "claims 1 bytes, 4 follow"),
    "a variant without end": (variant_checksums, b"\x80" * 9, 1, "ends after 9"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tensor_is_refused(name: str) -> None:
    """Each with what is wrong; none makes us hold more than a piece."""
    checksums, data, elements, text = HOSTILE[name]
    with pytest.raises(Malformed, match=text):
        checksums(reader(data), len(data), elements)


@pytest.mark.parametrize("elements", [0, 2, 4, 1 << 33])
def test_wrong_lengths_are_not_decoded(elements: int) -> None:
    """The strings must fill the tensor."""
    with pytest.raises(Malformed):
        decode(GOOD, elements)


def test_every_byte_counts() -> None:
    """A flipped bit is found in it, or changes the checksum of the entry."""
    for checksums, data in ((string_checksums, GOOD), (variant_checksums, VARIANTS)):
        expected = checksums(reader(data), len(data), 3)
        for at in range(len(data)):
            damaged = bytearray(data)
            damaged[at] ^= 0x10
            try:
                found = checksums(reader(bytes(damaged)), len(data), 3)
            except Malformed:
                continue
            assert found[1] != expected[1]


def test_a_file_that_shrinks_is_noticed() -> None:
    """Whoever reads may return less than was asked for."""
    with pytest.raises(Malformed, match="ends after 5 bytes"):
        string_checksums(lambda offset, count: GOOD[:5], len(GOOD), 3)


def refuses(read: Callable[..., object], *given_to: object) -> bool:
    """Return whether a call ends with `Malformed`; anything else escapes."""
    try:
        read(*given_to)
    except Malformed:
        return True
    return False


def test_mutated_tensors_are_refused_or_read() -> None:
    """Nothing but `Malformed` escapes."""
    chance = random.Random(6)
    refused = 0
    for _ in range(5000):
        data = bytearray(chance.choice([GOOD, VARIANTS]))
        for _ in range(chance.choice([1, 1, 2, 3])):
            at = chance.randrange(len(data))
            byte = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
            data[at : at + chance.randrange(2)] = bytes([byte] * chance.randrange(3))
            data += b"\0" * (not data)
        elements = chance.choice([3, 3, 3, 0, 1, 2, 4, 1 << 60])
        for read in (string_checksums, variant_checksums):
            refused += refuses(read, reader(bytes(data)), len(data), elements)
        refused += refuses(decode, bytes(data), elements)
    assert 5000 < refused < 15_000
