"""TensorFlow's tables: read as they are, written byte for byte, every broken one refused.

``tests/data/tensorflow/single.index`` is what SaveV2 of TensorFlow 2.21 wrote for tensors of each
dtype, of strings, of a list and with odd names; ``merged.index`` is what MergeV2Checkpoints made
of two checkpoints that each held parts of four tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ema_cli.checksums import crc32c, masked
from ema_cli.formats.tensorflow import entries, ordered
from ema_cli.formats.tensorflow.block import Block, Item, shared_bytes
from ema_cli.formats.tensorflow.entries import DTYPE_NUMBERS, Entry, Header
from ema_cli.formats.tensorflow.snappy import decompress
from ema_cli.formats.tensorflow.table import FOOTER_BYTES, MAGIC, blocks, build, read
from ema_cli.formats.tensorflow.wire import Malformed, put_varint

DATA = Path(__file__).resolve().parent.parent / "data" / "tensorflow"
SMALL = ["single.index", "merged.index"]

Pairs = list[tuple[bytes, bytes]]


# ---------------------------------------------------------------------------- by hand


def trailer(content: bytes, kind: int = 0) -> bytes:
    """Return a block with the type and the checksum that follow it."""
    content += bytes([kind])
    return content + masked(crc32c(content)).to_bytes(4, "little")


def handle(offset: int, size: int) -> bytes:
    """Return the handle of a block."""
    return put_varint(offset) + put_varint(size)


def footer(metaindex: bytes, index: bytes) -> bytes:
    """Return the footer with two handles."""
    return (metaindex + index).ljust(40, b"\0") + MAGIC


def entry(shared: int, unshared: bytes, value: bytes = b"", longer: int = 0) -> bytes:
    """Return an entry of a block, whose value is `longer` than it says."""
    sizes = put_varint(shared) + put_varint(len(unshared)) + put_varint(len(value) + longer)
    return sizes + unshared + value


def block(entries_in_it: Iterable[bytes], restarts: Sequence[int] = (0,)) -> bytes:
    """Return a block of these entries."""
    numbers = (*restarts, len(restarts))
    return b"".join(entries_in_it) + b"".join(n.to_bytes(4, "little") for n in numbers)


def assembled(contents: Sequence[bytes], kinds: Sequence[int] = ()) -> bytes:
    """Return a table of data blocks, a metaindex and an index block, which come last."""
    out, handles = b"", []
    kinds = [*kinds, *[0] * (len(contents) - len(kinds))]
    for content, kind in zip(contents, kinds, strict=True):
        handles.append(handle(len(out), len(content)))
        out += trailer(content, kind)
    return out + footer(*handles[-2:])


def table(*contents: bytes, separators: Sequence[bytes] = (), kinds: Sequence[int] = ()) -> bytes:
    """Return a table of these data blocks, each with its separator (z, zz, ...)."""
    names = separators or [b"z" * (k + 1) for k in range(len(contents))]
    index, at = Block(1), 0
    for name, content in zip(names, contents, strict=True):
        index.add(name, handle(at, len(content)))
        at += len(trailer(content))
    return assembled([*contents, block([]), index.finish()], kinds)


def parts(raw: bytes) -> list[bytes]:
    """Return the content of each block of a table."""
    return [raw[offset : offset + size] for offset, size in blocks(raw)]


def pairs_of(raw: bytes) -> Pairs:
    """Return the keys and values of a table."""
    return [(key, value) for key, value, _ in read(raw)]


# ---------------------------------------------------------------------------- TensorFlow's own


@pytest.mark.parametrize("name", SMALL)
def test_a_table_of_tensorflow_is_written_as_it_was_read(name: str) -> None:
    """Every byte of TensorFlow's own files comes back, and each value lies where its item says."""
    raw = (DATA / name).read_bytes()
    items = list(read(raw))
    assert build((key, value) for key, value, _ in items) == raw
    assert all(raw[offset : offset + len(value)] == value for _, value, offset in items)
    assert items[0].key == b""
    assert blocks(raw)[-1][0] + blocks(raw)[-1][1] + 5 == len(raw) - FOOTER_BYTES


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_read(kind: type) -> None:
    """What a caller read the file into makes no difference."""
    raw = (DATA / "single.index").read_bytes()
    assert list(read(kind(raw))) == list(read(raw))
    assert blocks(kind(raw)) == blocks(raw)


def index_of(tensors: Iterable[tuple[bytes, str, tuple[int, ...], bytes]]) -> bytes:
    """Return the index of a checkpoint of these tensors, saved in this order."""
    found = [(b"", entries.encode_header(Header(1, False)))]
    end = 0
    for name, dtype, shape, data in tensors:
        crc = masked(crc32c(data))
        one = Entry(DTYPE_NUMBERS[dtype], shape, 0, end, len(data), crc)
        found.append((name, entries.encode_entry(one)))
        end += len(data)
    return build(sorted(found))


def test_twenty_thousand_entries_are_written_as_by_tensorflow() -> None:
    """The digest is that of what SaveV2 wrote for zeros of these names and shapes."""
    names = [f"model/layer_{k % 100:03d}/block_{k}/kernel".encode() for k in range(20_000)]
    raw = index_of(
        (name, "float32", (k % 7, 3), bytes(12 * (k % 7))) for k, name in enumerate(names)
    )
    assert len(raw) == 741_152
    digest = "79364e2b190ec614d5f9e8e3670d8a538bb5e35ee999cedcb63172766b2bc4fd"
    assert hashlib.sha256(raw).hexdigest() == digest
    items = list(read(raw))
    assert len(items) == 20_001
    assert len(blocks(raw)) == 5
    by_name = {key: entries.parse_entry(value) for key, value, _ in items[1:]}
    assert [by_name[name].shape for name in names] == [(k % 7, 3) for k in range(20_000)]


def odd_names() -> list[bytes]:
    """Return 4,000 names of any bytes, some long enough to share hundreds of bytes."""
    digests = [hashlib.sha512(str(k).encode()).digest() for k in range(4000)]
    return [digest * (1 + digest[0] % 6) for digest in digests]


def test_separators_are_shortened_as_by_tensorflow() -> None:
    """The digest is that of what SaveV2 wrote for these names, int64 scalars k = 0, 1, ...."""
    raw = index_of(
        (name, "int64", (), k.to_bytes(8, "little")) for k, name in enumerate(odd_names())
    )
    digest = "b43abd2c0ed1b40a1955019b1f280885f0e8574fec29036f3341a9995b2e561d"
    assert hashlib.sha256(raw).hexdigest() == digest
    assert len(list(read(raw))) == 4001


def test_huge_entries_get_blocks_as_by_tensorflow() -> None:
    """Names of half a megabyte, names of ff only: the digest is SaveV2's, int32 scalars 1 to 7."""
    names = [b"a" * 600_000, b"b", b"b\xff", b"b\xff" + b"c" * 530_000]
    names += [b"\xff" * 3, b"\xff" * 300_000, b"\xff" * 300_001]
    raw = index_of(
        (name, "int32", (), k.to_bytes(4, "little")) for k, name in enumerate(names, start=1)
    )
    digest = "f29fe006094a470c8cb9062c2da25c3341c84a521cfd3a4f3817f0f6c4a60bc2"
    assert hashlib.sha256(raw).hexdigest() == digest
    assert [item.key for item in read(raw)] == [b"", *names]


# ---------------------------------------------------------------------------- any table


def test_an_empty_block_has_the_known_bytes() -> None:
    """The metaindex block of every table of TensorFlow."""
    empty = bytes.fromhex("00000000 01000000 00 c0f2a1b0")
    assert trailer(Block(16).finish()) == empty
    assert build([]) == empty + trailer(Block(1).finish()) + footer(handle(0, 8), handle(13, 8))
    assert list(read(build([]))) == []


keys = st.binary(max_size=6) | st.binary(max_size=3).map(lambda b: b * 100)


@given(pairs=st.dictionaries(keys, st.binary(max_size=200), max_size=60))
@example(pairs={b"": b""})
@example(pairs={b"\xff" * 9: b"", b"\xff" * 10: b"x"})
def test_what_is_built_is_read(pairs: dict[bytes, bytes]) -> None:
    """Any keys and values, empty ones and long shared beginnings included."""
    expected = sorted(pairs.items())
    raw = build(expected)
    assert pairs_of(raw) == expected
    assert all(raw[offset : offset + len(value)] == value for _, value, offset in read(raw))


@given(a=st.binary(max_size=9), b=st.binary(max_size=9), common=st.binary(max_size=300))
def test_the_common_beginning_is_found(a: bytes, b: bytes, common: bytes) -> None:
    """As a comparison byte by byte finds it."""
    a, b = common + a, common + b
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert shared_bytes(a, b) == expected


def test_keys_out_of_order_are_not_written() -> None:
    """A mistake of ours, not a hostile file."""
    for names in ([b"b", b"a"], [b"a", b"a"], [b"", b""]):
        with pytest.raises(ValueError, match="must increase"):
            build((name, b"") for name in names)


def test_restarts_may_come_at_any_interval() -> None:
    """LevelDB can be told another interval; readers go by the restarts that are there."""
    for interval in (1, 2, 16, 1000):
        one = Block(interval)
        expected = [(b"key%03d" % k, b"%d" % k) for k in range(40)]
        for key, value in expected:
            one.add(key, value)
        assert pairs_of(table(one.finish())) == expected


# ---------------------------------------------------------------------------- hostile tables

AB = block([entry(0, b"a", b"1"), entry(1, b"b", b"2")])
GOOD = table(AB)
# 1 MB is shared by 500 keys of 8 bytes each.
BOMB = block([entry(0, b"k" * 1_000_000), *[entry(1_000_000 + k, b"k") for k in range(500)]])


def test_the_table_by_hand_is_good() -> None:
    """What the hostile ones below are made of; the empty key can only come first."""
    assert list(read(GOOD)) == [Item(b"a", b"1", 4), Item(b"ab", b"2", 9)]
    assert pairs_of(table(block([entry(0, b""), entry(0, b"a")]))) == [(b"", b""), (b"a", b"")]


HOSTILE = {
    "nothing": (b"", "at least 48 bytes"),
    "no magic": (GOOD[:-1] + b"\0", "magic number"),
    "truncated": (GOOD[1:], "begins before|has checksum|ends at"),
    "only a footer": (footer(handle(0, 0), handle(0, 0)), "begins before|ends at byte"),
    "index over the footer": (footer(handle(0, 8), handle(13, 99)).rjust(99, b"\0"), "ends at"),
    "blocks far away": (footer(handle(1 << 63, 1 << 63), handle(2, 3)), "begins before"),
    "handles of 80 bits": (b"\xff" * 40 + MAGIC, "64 bits|longer than"),
    "footer with more": (GOOD[:-9] + b"\1" + MAGIC, "more than two handles"),
    "index before the metaindex": (
        GOOD[:-FOOTER_BYTES] + footer(*[handle(*extent) for extent in blocks(GOOD)[:0:-1]]),
        "begins before",
    ),
    "index of data blocks": (assembled([block([]), AB]), "varint|ends after"),
    "a handle with more": (
        assembled([AB, block([]), block([entry(0, b"z", handle(0, len(AB)) + b"\0")])]),
        "ends after",
    ),
    "a block twice": (
        assembled(
            [AB, block([]), block([entry(0, name, handle(0, len(AB))) for name in (b"y", b"z")])]
        ),
        "begins before",
    ),
    "index out of order": (table(AB, AB, separators=[b"z", b"y"]), "not above"),
    "keys above their separator": (table(AB, separators=[b"aa"]), "above its separator"),
    "keys below the block before": (table(AB, AB, separators=[b"x", b"y"]), "not above"),
    "unknown compression": (table(AB, kinds=[2]), "unknown compression 2"),
    "not snappy": (table(AB, kinds=[1]), "compressed block|literal|copy"),
    "no restarts": (table(AB[:-8] + bytes(4)), "claims 0 restarts"),
    "more restarts than bytes": (table(AB[:-4] + b"\xff\xff\xff\xff"), "restarts"),
    "more restarts than entries": (table(block([entry(0, b"a")], range(3))), "restarts"),
    "a block of three bytes": (table(b"\0\0\0"), "restarts"),
    "an empty block": (table(b""), "restarts"),
    "restarts out of order": (
        table(block([entry(0, b"a"), entry(0, b"b"), entry(0, b"c")], [0, 8, 4])),
        "a restart at 4",
    ),
    "a restart outside": (table(block([entry(0, b"a"), entry(0, b"b")], [0, 8])), "a restart at 8"),
    "the first restart": (table(block([entry(0, b"a"), entry(0, b"b")], [4])), "at 0, found 4"),
    "a restart inside an entry": (
        table(block([entry(0, b"a", b"xyz"), entry(0, b"b")], [0, 4])),
        "runs past",
    ),
    "a restart that shares": (
        table(block([entry(0, b"a"), entry(1, b"b")], [0, 4])),
        "shares bytes with another",
    ),
    "shared with nothing": (table(block([entry(1, b"a")])), "shares"),
    "shared too much": (table(block([entry(0, b"a"), entry(2, b"b")])), "shares 2 bytes"),
    "equal keys": (table(block([entry(0, b"a"), entry(1, b"")])), "not above"),
    "falling keys": (table(block([entry(0, b"b"), entry(0, b"a")])), "not above"),
    "two empty keys": (table(block([entry(0, b""), entry(0, b"")])), "not above"),
    "the empty key later": (table(AB, block([entry(0, b"")])), "not above"),
    "a value too long": (table(block([entry(0, b"a", b"1", longer=1)])), "runs past"),
    "a value of 32 GiB": (table(block([entry(0, b"a", b"1", longer=1 << 34)])), "runs past"),
    "a length without end": (table(block([b"\0" + b"\xff" * 9])), "longer than 5 bytes"),
    "an entry cut short": (table(block([b"\0"])), "runs past"),
    "keys that multiply": (table(BOMB), "share more bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_table_is_refused(name: str) -> None:
    """Each with the invariant that it breaks."""
    raw, text = HOSTILE[name]
    with pytest.raises(Malformed, match=text):
        list(read(raw))


def test_every_byte_of_a_table_counts() -> None:
    """A flipped bit anywhere is found, wherever it is."""
    for raw in (GOOD, (DATA / "merged.index").read_bytes()):
        for at in range(len(raw)):
            damaged = bytearray(raw)
            damaged[at] ^= 1 << at % 8
            with pytest.raises(Malformed):
                list(read(damaged))


def test_checksums_are_verified_before_the_first_item() -> None:
    """Also those of blocks that come later, and when only the blocks are asked for."""
    raw = bytearray(table(AB, block([entry(0, b"zzz")]), separators=[b"z", b"zzzz"]))
    assert len(blocks(raw)) == 4
    raw[blocks(raw)[1][0]] ^= 1
    for found in (blocks, lambda data: next(read(data))):
        with pytest.raises(Malformed, match="has checksum"):
            found(raw)


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Return the bytes with a few of them changed, added or left out."""
    found = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 3, 8])):
        at = chance.randrange(len(found) + 1)
        byte = chance.choice([0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF, chance.randrange(256)])
        kind = chance.randrange(4)
        if kind < 2 and at < len(found):
            found[at] = byte
        elif kind == 2:
            found[at:at] = bytes([byte]) * chance.choice([1, 1, 2, 5, 11])
        else:
            del found[at : at + chance.choice([1, 1, 2, 4])]
    return bytes(found)


@pytest.mark.parametrize("name", SMALL)
def test_mutated_tables_are_refused_or_read(name: str) -> None:
    """Checksums are made to fit, so that the change reaches the parsers; nothing else escapes."""
    chance = random.Random(name)
    contents = parts((DATA / name).read_bytes())
    refused = 0
    for _ in range(2500):
        changed = list(contents)
        place = chance.choice([0, 0, 0, 1, 2])
        changed[place] = mutated(changed[place], chance)
        raw = assembled(changed)
        if chance.random() < 0.1:
            raw = mutated(raw, chance)
        try:
            for key, value, offset in read(raw):
                assert raw[offset : offset + len(value)] == value
                if key:
                    entries.parse_entry(value)
                    entries.crc_offset(value)
                    ordered.parse_slice_key(key)
                else:
                    entries.parse_header(value)
        except Malformed:
            refused += 1
    assert 1000 < refused < 2500


# ---------------------------------------------------------------------------- snappy

# What the snappy library makes of TEXT: literals, copies, and one that overlaps itself.
TEXT = b"model/layer_1/kernel model/layer_2/kernel " * 3 + bytes(70) + bytes(range(64))
COMPRESSED = bytes.fromhex(
    "8402506d6f64656c2f6c617965725f312f6b65726e656c202e150000324e1500fe2a00112a0000fe01000901f03e"
    "0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e"
    "2f303132333435363738393a3b3c3d3e3f"
)


def literal(data: bytes) -> bytes:
    """Return a literal element."""
    count = len(data) - 1
    if count < 60:
        return bytes([count << 2]) + data
    width = (count.bit_length() + 7) // 8
    return bytes([59 + width << 2]) + count.to_bytes(width, "little") + data


def copy(offset: int, count: int, kind: int) -> bytes:
    """Return a copy element with an offset of 11, 16 or 32 bits."""
    if kind == 1:
        return bytes([offset >> 8 << 5 | count - 4 << 2 | 1, offset & 0xFF])
    return bytes([count - 1 << 2 | kind]) + offset.to_bytes(kind * kind // 2, "little")


def test_a_block_of_the_snappy_library_is_decompressed() -> None:
    """A vector that the reference implementation made."""
    assert decompress(COMPRESSED) == TEXT
    assert decompress(memoryview(COMPRESSED), len(TEXT)) == TEXT
    with pytest.raises(Malformed, match="at most 259"):
        decompress(COMPRESSED, len(TEXT) - 1)


@given(data=st.data())
def test_any_elements_are_decompressed(data: st.DataObject) -> None:
    """As an interpreter that copies byte by byte does it."""
    expected, elements = bytearray(), b""
    for _ in range(data.draw(st.integers(0, 8))):
        if not expected or data.draw(st.booleans()):
            count = data.draw(st.sampled_from([1, 2, 59, 60, 61, 62, 256, 257, 70_000]))
            text = data.draw(st.binary(min_size=1, max_size=9))
            text = (text * count)[:count]
            elements += literal(text)
            expected += text
        else:
            kind = data.draw(st.integers(1, 3))
            longest = min(len(expected), {1: 2047, 2: 65_535, 3: 1 << 32}[kind])
            offset = data.draw(st.integers(1, longest))
            count = data.draw(st.integers(4, 11) if kind == 1 else st.integers(1, 64))
            elements += copy(offset, count, kind)
            for _ in range(count):
                expected.append(expected[-offset])
    assert decompress(put_varint(len(expected)) + elements) == expected


SNAPPY_BOMBS = {
    "nothing": (b"", "runs past"),
    "a length of 4 GiB": (put_varint((1 << 32) - 1), "at most"),
    "a length of six bytes": (b"\x80" * 5 + b"\0", "longer than 5"),
    "less than it claims": (put_varint(9) + literal(b"abc"), "but holds 3"),
    "more than it claims": (put_varint(2) + literal(b"abc"), "holds more"),
    "a copy of more": (put_varint(5) + literal(b"abc") + copy(1, 64, 2), "holds more"),
    "a literal cut short": (put_varint(9) + literal(b"abc")[:-1], "a literal needs"),
    "a literal of 4 GiB": (put_varint(9) + b"\xfc\xff\xff\xff\xff", "a literal needs"),
    "a length cut short": (put_varint(9) + b"\xfc\xff\xff", "inside an element"),
    "a copy from before": (put_varint(9) + literal(b"abc") + copy(4, 4, 1), "4 bytes back"),
    "a copy of itself": (put_varint(9) + literal(b"abc") + copy(0, 4, 2), "0 bytes back"),
    "a copy cut short": (put_varint(9) + literal(b"abc") + copy(1, 4, 3)[:-1], "inside"),
}


@pytest.mark.parametrize("name", SNAPPY_BOMBS)
def test_a_hostile_block_is_refused(name: str) -> None:
    """Each with the invariant that it breaks."""
    content, text = SNAPPY_BOMBS[name]
    with pytest.raises(Malformed, match=text):
        decompress(content)


def test_compressed_tables_are_read() -> None:
    """LevelDB compresses by default; where a value lies in the file cannot be said then."""
    raw = (DATA / "single.index").read_bytes()
    content = parts(raw)[0]
    compressed = table(put_varint(len(content)) + literal(content), kinds=[1])
    assert list(read(compressed)) == [Item(key, value, -1) for key, value in pairs_of(raw)]


def test_mutated_compressed_blocks_are_refused_or_read() -> None:
    """Nothing but `Malformed` escapes, and no more comes out than is allowed."""
    chance = random.Random(3)
    for _ in range(2000):
        with contextlib.suppress(Malformed):
            assert len(decompress(mutated(COMPRESSED, chance), 1000)) <= 1000
