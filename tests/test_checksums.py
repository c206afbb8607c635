"""CRC-32C: published values, and the checksum of a whole from its parts in any order."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_cli.checksums import Running, crc32c, masked, shift, shift_all, unmasked_all

# RFC 3720, B.4, and the check value of the Rocksoft model.
VECTORS = {
    b"": 0x00000000,
    b"123456789": 0xE3069283,
    bytes(32): 0x8A9136AA,
    b"\xff" * 32: 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    bytes(reversed(range(32))): 0x113FDB5C,
}
# Four bytes that a checksum cannot tell from nothing.
INVISIBLE = bytes.fromhex("ab9be09b")

crcs = st.integers(0, (1 << 32) - 1)
lengths = st.integers(0, (1 << 47) - 1) | st.integers(0, 300)


@pytest.mark.parametrize("data", VECTORS)
def test_published_values(data: bytes) -> None:
    """For bytes, bytearrays and views, whole or continued at any place."""
    assert crc32c(data) == VECTORS[data]
    assert crc32c(bytearray(data)) == crc32c(memoryview(data)) == VECTORS[data]
    for cut in range(len(data) + 1):
        assert crc32c(data[cut:], crc32c(data[:cut])) == VECTORS[data]


def test_masks() -> None:
    """As LevelDB stores them: of the check value, of nothing, and around the ends of 32 bits."""
    assert masked(0xE3069283) == 0xC78AB0E5
    assert masked(0) == 0xA282EAD8


@given(crc=crcs)
def test_a_mask_comes_off_again(crc: int) -> None:
    """For each number of an array."""
    stored = np.array([masked(crc), masked(crc ^ 1)], np.uint32)
    assert unmasked_all(stored).tolist() == [crc, crc ^ 1]
    assert unmasked_all(stored).dtype == np.uint32


# ---------------------------------------------------------------------------- shifting


@given(a=st.binary(max_size=200), b=st.binary(max_size=200))
def test_a_whole_follows_from_two_parts(a: bytes, b: bytes) -> None:
    """crc(AB) = shift(crc(A), |B|) ^ crc(B)."""
    assert crc32c(a + b) == shift(crc32c(a), len(b)) ^ crc32c(b)


@given(crc=crcs, first=lengths, second=lengths)
def test_shifts_add_up(crc: int, first: int, second: int) -> None:
    """However long: by one length after the other is by both at once; by nothing is nothing."""
    assert shift(shift(crc, first), second) == shift(crc, first + second)
    assert shift(crc, 0) == crc
    assert shift(0, first) == 0
    assert shift(crc, first) ^ shift(crc ^ 1, first) == shift(1, first)


@pytest.mark.parametrize("exponent", [0, 3, 4, 12, 20, 24])
def test_long_shifts_are_those_of_as_many_zeros(exponent: int) -> None:
    """2^24 bytes read against 2^24 bytes computed."""
    n_bytes = 1 << exponent
    zeros = bytes(n_bytes)
    assert shift(0x12345678, n_bytes) == crc32c(zeros, 0x12345678) ^ crc32c(zeros)


@given(pairs=st.lists(st.tuples(crcs, lengths), max_size=40))
def test_many_shifts_at_once_are_those_of_each(pairs: list[tuple[int, int]]) -> None:
    """Empty lists, zero lengths and lengths of 2^47 among them."""
    found = shift_all(
        np.array([crc for crc, _ in pairs], np.uint32), np.array([n for _, n in pairs], np.int64)
    )
    assert found.tolist() == [shift(crc, n) for crc, n in pairs]
    assert found.dtype == np.uint32


def test_shifting_changes_no_input() -> None:
    """The arrays that were given are as they were."""
    given_crcs, given_lengths = np.array([1, 2, 3], np.uint32), np.array([9, 0, 70], np.int64)
    shift_all(given_crcs, given_lengths)
    assert given_crcs.tolist() == [1, 2, 3]
    assert given_lengths.tolist() == [9, 0, 70]


# ---------------------------------------------------------------------------- parts


@st.composite
def splits(draw: st.DrawFn) -> tuple[bytes, list[list[tuple[int, int]]]]:
    """Some bytes, and their stretches dealt to readers who each read upwards, with gaps."""
    data = draw(
        st.binary(max_size=60) | st.lists(st.sampled_from([b"\0", INVISIBLE])).map(b"".join)
    )
    cuts = sorted(draw(st.sets(st.integers(0, len(data)), max_size=8)) | {0, len(data)})
    stretches = list(pairwise(cuts))
    hands: list[list[tuple[int, int]]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for stretch in stretches:
        hands[draw(st.integers(0, len(hands) - 1))].append(stretch)
    return data, draw(st.permutations(hands))


@given(split=splits(), offset=st.integers(0, 1 << 40))
def test_any_split_into_parts_combines_to_the_whole(
    split: tuple[bytes, list[list[tuple[int, int]]]], offset: int
) -> None:
    """Stretches of any length, read in any order by several readers, at any place of a file."""
    data, hands = split
    crc = n_bytes = 0
    for hand in hands:
        running = Running()
        for start, end in hand:
            running.add(offset + start, memoryview(data)[start:end])
        crc ^= running.contribution(offset + len(data))
        n_bytes += running.nbytes
    assert n_bytes == len(data)
    assert crc == crc32c(data)


def test_a_part_that_is_nothing_contributes_nothing() -> None:
    """Neither one without bytes nor one that was never begun."""
    assert Running().contribution(1 << 40) == 0
    running = Running()
    running.add(7, memoryview(b""))
    assert (running.contribution(1 << 40), running.nbytes) == (0, 0)


def test_bytes_whose_checksum_is_nothing_are_bytes() -> None:
    """A checksum of 0 in the middle is no sign that nothing was read."""
    assert crc32c(INVISIBLE) == 0
    running = Running()
    running.add(0, memoryview(INVISIBLE))
    running.add(4, memoryview(b"abc"))
    assert running.crc == crc32c(INVISIBLE + b"abc")
    assert running.nbytes == 7


def test_each_flipped_bit_is_seen() -> None:
    """In any part of a whole that is combined of parts."""
    data = bytes(range(24))
    whole = crc32c(data)
    for bit in range(8 * len(data)):
        other = bytearray(data)
        other[bit // 8] ^= 1 << bit % 8
        parts = [(0, 7), (7, 8), (8, 24)]
        found = 0
        for start, end in parts:
            found ^= shift(crc32c(bytes(other[start:end])), len(data) - end)
        assert found != whole
