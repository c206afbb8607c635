"""NumPy's .npz files held against NumPy: what it saves is read, and what we lay out it loads."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ema_cli.blueprint import AVERAGE, COPY, Draft, Entry, Layout
from ema_cli.errors import DamagedFile, InputChanged, InputError, UnsupportedInput
from ema_cli.formats import npz, zips
from ema_cli.formats.npz import can_name, representable, sniff
from ema_cli.tensors import DTYPES, Checkpoint, numpy_dtype

Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]

few = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CODES = ("?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16")


def saved(path: Path, arrays: Arrays, *, compressed: bool = False) -> str:
    """Save arrays with NumPy; keyword names of its own are no obstacle."""
    with zipfile.ZipFile(path, "w", 8 if compressed else 0) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
    return str(path)


def spilled(checkpoint: Checkpoint, path: Path) -> bytes:
    """Return the bytes of the spill file, none without one."""
    if len(checkpoint.files) == 1:
        return b""
    path.write_bytes(bytes(checkpoint.files[1].size))
    npz.spill(checkpoint, [tensor.name for tensor in checkpoint.index.tensors], str(path))
    content = path.read_bytes()
    assert len(content) == checkpoint.files[1].size
    return content


def verify(checkpoint: Checkpoint, content: bytes) -> None:
    """Do what the engine does with the bytes that have a checksum."""
    if checkpoint.checksums is None:
        return
    for (file, offset, nbytes), crc in zip(
        checkpoint.index.extents, checkpoint.checksums, strict=True
    ):
        assert file == 0
        if zlib.crc32(content[offset : offset + nbytes]) != crc:
            raise DamagedFile(checkpoint.path, "checksum mismatch")


def loaded(path: str, spill: Path, known: Any = None) -> Arrays:
    """Return the arrays as they are read here, everything verified."""
    checkpoint = npz.read(path, {} if known is None else known)
    content = Path(path).read_bytes()
    verify(checkpoint, content)
    sources = (content, spilled(checkpoint, spill))
    found = {}
    for name, dtype, shape, (file, offset, nbytes), slices, strides in checkpoint.index.tensors:
        assert not slices
        kind = numpy_dtype(dtype.name).newbyteorder(">" if checkpoint.index.big_endian else "<")
        flat = np.frombuffer(sources[file][offset : offset + nbytes], kind)
        assert len(flat) == math.prod(shape)
        steps = [stride * kind.itemsize for stride in strides]
        array = np.lib.stride_tricks.as_strided(flat, shape, steps or None)
        found[name] = array.reshape(shape)
    return found


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare names, shapes, dtypes but for their byte order, and bytes."""
    assert set(found) == set(expected)
    for name, right in expected.items():
        array = np.asanyarray(right)
        assert found[name].shape == array.shape
        assert found[name].dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
        little = array.dtype.newbyteorder("<")
        assert found[name].astype(little).tobytes() == array.astype(little).tobytes()


def some() -> Arrays:
    """Return arrays of many kinds, native and in C order."""
    return {
        "block/kernel": np.arange(12, dtype="<f4").reshape(3, 4),
        "scalar": np.array(2.5, "<f2"),
        "none": np.zeros((0, 3), "<i8"),
        "flags": np.array([True, False]),
        "": np.array([1 + 2j]),
        "ü": np.arange(5, dtype="<u2"),
        "../climbs": np.array([3], "i1"),
    }


# ---------------------------------------------------------------------------- reading


@st.composite
def arrays(draw: Any) -> Arrays:
    """Return arrays of any dtype, byte order, memory order and shape."""
    names = draw(st.lists(st.text("ab/.ü\n", max_size=5), max_size=5, unique=True))
    found = {}
    for name in names:
        order = draw(st.sampled_from("<>"))
        kind = np.dtype(order + draw(st.sampled_from(CODES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        count = math.prod(shape)
        raw = draw(st.binary(min_size=count * kind.itemsize, max_size=count * kind.itemsize))
        array = np.frombuffer(raw, kind).reshape(shape)
        found[name] = array if draw(st.booleans()) else np.asfortranarray(array)
    return found


@few
@given(arrays(), st.booleans())
def test_what_numpy_saves_is_read(tmp_path: Path, arrays: Arrays, compressed: bool) -> None:
    """Values come back whatever the byte order, the memory order and the compression."""
    path = saved(tmp_path / "a.npz", arrays, compressed=compressed)
    assert_same(loaded(path, tmp_path / "spill"), arrays)
    with np.load(path) as oracle:
        assert_same({name: oracle[name] for name in oracle.files}, arrays)


def test_savez_and_savez_compressed(tmp_path: Path) -> None:
    """The functions that people call."""
    arrays = {name: array for name, array in some().items() if name}
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez_compressed(tmp_path / "b.npz", **arrays)
    for name in "ab":
        assert_same(loaded(str(tmp_path / f"{name}.npz"), tmp_path / "spill"), arrays)


def test_stored_arrays_lie_in_the_file(tmp_path: Path) -> None:
    """Nothing is spilled that can be read in place; the checksums are those of the data."""
    path = saved(tmp_path / "a.npz", some())
    checkpoint = npz.read(path, {})
    index = checkpoint.index
    assert (len(checkpoint.files), index.names, index.checksum) == (1, ("",), "crc32")
    assert index.extents == tuple(t.extent for t in index.tensors if t.extent.nbytes)
    content = Path(path).read_bytes()
    expected = [zlib.crc32(content[at : at + n]) for _, at, n in index.extents]
    assert checkpoint.checksums is not None
    assert checkpoint.checksums.tolist() == expected
    assert checkpoint.checksums.dtype == np.uint32


def test_deflated_arrays_are_spilled(tmp_path: Path) -> None:
    """They lie one after another in a last file that is yet to be made."""
    path = saved(tmp_path / "a.npz", some(), compressed=True)
    checkpoint = npz.read(path, {})
    nbytes = sum(array.nbytes for array in some().values())
    assert checkpoint.files[1] == ("", nbytes, 0, 0)
    assert (checkpoint.index.names, checkpoint.digests[1]) == (("", ""), "")
    assert checkpoint.checksums is None
    end = 0
    for tensor in checkpoint.index.tensors[1:]:
        assert tensor.extent[:2] == (1, end)
        end += tensor.extent.nbytes
    assert checkpoint.index.tensors[0].name == "none"
    assert checkpoint.index.tensors[0].extent[::2] == (0, 0)


def test_only_what_is_asked_for_is_spilled(tmp_path: Path) -> None:
    """The rest of the spill file stays as it was."""
    arrays = {name: np.full(5, k, "f4") for k, name in enumerate("abc", 1)}
    checkpoint = npz.read(saved(tmp_path / "a.npz", arrays, compressed=True), {})
    spill = tmp_path / "spill"
    spill.write_bytes(bytes(60))
    npz.spill(checkpoint, {"b"}, str(spill))
    assert np.frombuffer(spill.read_bytes(), "f4").tolist() == [0] * 5 + [2] * 5 + [0] * 5


def test_spilling_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements that two pieces share are swapped whole."""
    monkeypatch.setattr(zips, "_PIECE", 7)
    mixed = {
        "big": np.arange(50, dtype=">f8"),
        "pairs": np.arange(20, dtype=">c8"),
        "little": np.arange(50, dtype="<i4"),
    }
    for compressed in (False, True):
        path = saved(tmp_path / "a.npz", mixed, compressed=compressed)
        assert_same(loaded(path, tmp_path / "spill"), mixed)


def test_byte_orders(tmp_path: Path) -> None:
    """One order for all is read in place; only where they differ the big-endian ones spill."""
    big = {"a": np.arange(3, dtype=">f4"), "b": np.arange(3, dtype="u1")}
    checkpoint = npz.read(saved(tmp_path / "a.npz", big), {})
    assert (checkpoint.index.big_endian, len(checkpoint.files)) == (True, 1)
    mixed = {**big, "c": np.arange(3, dtype="<f4"), "d": np.zeros(0, ">f8")}
    checkpoint = npz.read(saved(tmp_path / "b.npz", mixed), {})
    assert (checkpoint.index.big_endian, checkpoint.files[1].size) == (False, 12)
    assert {t.name for t in checkpoint.index.tensors if t.extent.file} == {"a"}
    assert len(checkpoint.index.records) == 3
    verify(checkpoint, (tmp_path / "b.npz").read_bytes())
    empty = {"a": np.zeros(0, ">f8"), "c": np.arange(3, dtype="<f4")}
    assert not npz.read(saved(tmp_path / "c.npz", empty), {}).index.big_endian


def test_fortran_order(tmp_path: Path) -> None:
    """It becomes strides where it differs from C order, and only there."""
    shapes = [(2, 3, 4), (4, 1, 3), (1, 5), (5,), (), (0, 3), (3, 1)]
    made = {str(shape): np.asfortranarray(np.zeros(shape, "f4")) for shape in shapes}
    index = npz.read(saved(tmp_path / "a.npz", made), {}).index
    strides = {name: index.by_name[name].strides for name in made}
    assert strides["(2, 3, 4)"] == (1, 2, 6)
    assert (strides["(4, 1, 3)"][0], strides["(4, 1, 3)"][2]) == (1, 4)
    assert {name for name, found in strides.items() if found} == {"(2, 3, 4)", "(4, 1, 3)"}


@pytest.mark.parametrize("shape", ["(6,)", "(1, 6, 1)", "(6, 1)"])
def test_fortran_order_that_is_c_order(tmp_path: Path, shape: str) -> None:
    """NumPy does not say so, but others may."""
    raw = of_header(header(order="True", shape=shape))
    assert read_bytes(tmp_path / "a.npz", raw).index.tensors[0].strides == ()


def test_checkpoints_of_a_run_share_an_index(tmp_path: Path) -> None:
    """What their data alone changes is not in it; any header that differs makes another."""
    known: Any = {}
    one, two = (
        npz.read(saved(tmp_path / f"{k}.npz", {"a": np.full(4, k, "f4")}), known) for k in (1, 2)
    )
    assert one.index is two.index
    assert one.digests != two.digests
    assert one.checksums is not None
    assert one.checksums.tolist() != two.checksums.tolist()
    for other in (np.zeros(4, "i4"), np.zeros((2, 2), "f4")):
        path = saved(tmp_path / "other.npz", {"a": other})
        assert npz.read(path, known).index is not one.index


def test_nothing_but_arrays(tmp_path: Path) -> None:
    """An archive without members is one of no arrays; one with another member is none."""
    path = saved(tmp_path / "a.npz", {})
    assert npz.read(path, {}).index.tensors == ()
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("a/data.pkl", b"")
    with pytest.raises(DamagedFile, match=r"a/data\.pkl"):
        npz.read(str(tmp_path / "b.npz"), {})


def test_a_file_that_changes_is_not_spilled(tmp_path: Path) -> None:
    """What is spilled is of the file that was planned with."""
    path = saved(tmp_path / "a.npz", {"a": np.zeros(9)}, compressed=True)
    checkpoint = npz.read(path, {})
    saved(tmp_path / "a.npz", {"a": np.zeros(99)}, compressed=True)
    with pytest.raises(InputChanged):
        npz.spill(checkpoint, ["a"], os.devnull)


# ---------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("compressed", [False, True])
def test_truncated(tmp_path: Path, compressed: bool) -> None:
    """No prefix of a file is read."""
    raw = Path(saved(tmp_path / "a.npz", {"a": np.arange(3)}, compressed=compressed)).read_bytes()
    path = tmp_path / "cut.npz"
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(InputError, match=r"cut\.npz: "):
            npz.read(str(path), {})


@pytest.mark.parametrize("compressed", [False, True])
def test_flipped_bits(tmp_path: Path, compressed: bool) -> None:
    """A flipped bit is found when the data is read, if not before, or changes nothing."""
    right = {"a": np.arange(3, dtype="f4"), "b": np.asfortranarray(np.ones((2, 3)))}
    raw = Path(saved(tmp_path / "a.npz", right, compressed=compressed)).read_bytes()
    path = tmp_path / "flipped.npz"
    for at, bit in itertools.product(range(len(raw)), (1, 0x20)):
        flipped = bytearray(raw)
        flipped[at] ^= bit
        path.write_bytes(flipped)
        with contextlib.suppress(InputError):
            assert_same(loaded(str(path), tmp_path / "spill"), right)


def of_header(
    text: str, data: bytes = bytes(24), *, version: bytes = b"\1\0", method: int = 0
) -> bytes:
    """Return a file with one array `w` of this header."""
    width = 2 if version == b"\1\0" else 4
    member = b"\x93NUMPY" + version + len(text).to_bytes(width, "little")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("w.npy", member + text.encode("latin-1") + data)
    return buffer.getvalue()


def header(descr: str = "'<f4'", order: str = "False", shape: str = "(2, 3)") -> str:
    """Return the text of a header."""
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


def read_bytes(path: Path, raw: bytes) -> Checkpoint:
    """Return the checkpoint in a file of these bytes."""
    path.write_bytes(raw)
    return npz.read(str(path), {})


@pytest.mark.parametrize(
    "text",
    [
        header(),
        header() + " " * 90 + "\n",
        header(shape="(2L, 3L)"),
        header(shape="( 2,3,)"),
        header('"<f4"'),
        "{'shape': (2, 3), 'descr': '<f4', 'fortran_order': False}",
        "{'shape' : (2, 3)\n, \"descr\":'<f4' ,'fortran_order':False , }",
    ],
)
@pytest.mark.parametrize("version", [b"\1\0", b"\2\0", b"\3\0"])
def test_headers(tmp_path: Path, text: str, version: bytes) -> None:
    """What NumPy, or somebody like it, writes."""
    raw = of_header(text, np.arange(6, dtype="<f4").tobytes(), version=version)
    (tensor,) = read_bytes(tmp_path / "a.npz", raw).index.tensors
    assert (tensor.name, tensor.dtype.name, tensor.shape) == ("w", "float32", (2, 3))
    assert raw[tensor.extent.offset :][:24] == np.arange(6, dtype="<f4").tobytes()


def test_a_long_header(tmp_path: Path) -> None:
    """One longer than others are is read, stored or deflated, up to the limit of NumPy."""
    for method, length in itertools.product((0, 8), (10_000, 10_001)):
        raw = of_header(header().ljust(length), method=method)
        with (
            contextlib.nullcontext()
            if length == 10_000
            else pytest.raises(DamagedFile, match="at most 10,000 bytes, found 10,001")
        ):
            assert read_bytes(tmp_path / "a.npz", raw).index.by_name["w"].shape == (2, 3)


INTEGERS = r"shape: expected a tuple of integers from 0 to 2\^63 - 1, found"
KEYS = "expected a .npy header of descr, fortran_order and shape, each once, found"
DAMAGED = {
    "a negative dimension": (header(shape="(-2, 3)"), INTEGERS),
    "a dimension that is True": (header(shape="(True, 6)"), INTEGERS),
    "a float": (header(shape="(2.0, 3)"), INTEGERS),
    "a huge one": (header(shape=f"({1 << 63},)"), INTEGERS),
    "9,000 digits": (header(shape=f"({'9' * 9000},)"), INTEGERS),
    "an octal": (header(shape="(02, 3)"), INTEGERS),
    "no tuple": (header(shape="(6)"), INTEGERS),
    "two commas": (header(shape="(2,,3)"), INTEGERS),
    "a comma alone": (header(shape="(,)"), INTEGERS),
    "a list": (header(shape="[2, 3]"), INTEGERS),
    "a call": (header(shape="__import__('os').getpid()"), INTEGERS),
    "500 brackets": (header(shape="(" * 500), INTEGERS),
    "33 dimensions": (header(shape="(" + "1," * 33 + ")"), "at most 32 dimensions, found 33"),
    "an overflow": (header(shape=f"({1 << 62}, 16)"), "overflows 64 bits"),
    "an overflow times 0": (header(shape=f"(0, {1 << 62}, 16)"), "overflows 64 bits"),
    "more than there is": (header(shape="(2, 4)"), "needs 32 bytes, but 24 follow"),
    "8 TB": (header(shape=f"({1 << 41},)"), "needs 8,796,093,022,208 bytes, but 24 follow"),
    "trailing data": (header(shape="(5,)"), "needs 20 bytes, but 24 follow"),
    "an order that is 0": (header(order="0"), "fortran_order: expected True or False, found 0"),
    "an order of more": (header(order="Falsehood"), KEYS),
    "a dtype that is none": (header("None"), "descr: expected a dtype in quotes, found None"),
    "an unknown dtype": (header("'<q9'"), "unknown dtype '<q9'"),
    "no byte order": (header("'f4'"), "unknown dtype 'f4'"),
    "no byte order for 4 bytes": (header("'|f4'"), "unknown dtype '|f4'"),
    "a dtype and more": (header("'<f4,<f4'"), "unknown dtype"),
    "nothing": ("", KEYS),
    "an indent": (" " + header(), KEYS),
    "no dict": ("(1, 2)\n", KEYS),
    "an empty dict": ("{}", KEYS),
    "a key twice": (header()[:-2] + "'descr': '<f4'}", KEYS),
    "a key too many": (header()[:-2] + "'x': 1}", KEYS),
    "a key too few": ("{'descr': '<f4', 'shape': (2, 3)}", KEYS),
    "no comma": ("{'descr': '<f4' 'shape': (2, 3), 'fortran_order': False}", KEYS),
    "unfinished": (header()[:-2], KEYS),
    "a statement behind": (header() + "import os\n", KEYS),
    "no text": (header() + "\xff\xfe", KEYS),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_headers(tmp_path: Path, case: str) -> None:
    """The header is read by a parser that knows no Python; each flaw is told in one line."""
    text, reason = DAMAGED[case]
    with pytest.raises(DamagedFile, match=f"a.npz: tensor 'w': .*{reason.replace('|', '.')}") as e:
        read_bytes(tmp_path / "a.npz", of_header(text))
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "{'shape': (" + "1" + " " * 9900,
        "{'shape': (" + "1," * 4900,
        "{" + " " * 9900,
        "{'" + "a" * 9900,
        "{'descr': '" + "<" * 9900,
        "{'descr': 'f'" + " \n" * 4900,
    ],
)
def test_headers_are_parsed_in_linear_time(tmp_path: Path, text: str) -> None:
    """A thousand arrays of the worst headers take no longer than they should."""
    member = b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode()
    for _ in range(200):
        with pytest.raises(DamagedFile):
            npz.npy.parse("a.npz", "w", member)


@pytest.mark.parametrize(
    ("descr", "reason"),
    [
        ("'|O'", "Python objects"),
        ("'<U7'", "text"),
        ("'|S7'", "text"),
        ("'<M8[s]'", "dates"),
        ("'<m8[ns]'", "dates"),
        ("'|V2'", "bytes without a type"),
        ("'<f16'", "long doubles"),
        ("'<c32'", "long doubles"),
        ("[('a', '<f4')]", "structured"),
    ],
)
def test_what_is_no_number(tmp_path: Path, descr: str, reason: str) -> None:
    """Arrays of anything else are refused by name, with what would help."""
    with pytest.raises(UnsupportedInput, match=f"tensor 'w': expected numbers.*{reason}") as caught:
        read_bytes(tmp_path / "a.npz", of_header(header(descr)))
    assert caught.value.hint


def test_bfloat16_as_numpy_saves_it(tmp_path: Path) -> None:
    """The hint says what became of it."""
    path = saved(tmp_path / "a.npz", {"w": np.zeros(2, numpy_dtype("bfloat16"))})
    with pytest.raises(UnsupportedInput) as caught:
        npz.read(path, {})
    assert "bfloat16" in caught.value.hint


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (b"", "expected a .npy array"),
        (b"\x80\4N.", "expected a .npy array"),
        (b"\x93NUMPY", "expected .npy version"),
        (b"\x93NUMPY\1", "expected .npy version"),
        (b"\x93NUMPY\4\0\0\0\0\0", r"version 1\.0, 2\.0 or 3\.0, found 4\.0"),
        (b"\x93NUMPY\1\0\1", "truncated"),
        (b"\x93NUMPY\2\0\1\0\0", "truncated"),
        (b"\x93NUMPY\1\0\x90\0{}", "truncated"),
        (b"\x93NUMPY\2\0\0\0\0\1{}", "at most 10,000 bytes"),
    ],
)
@pytest.mark.parametrize("method", [0, 8])
def test_members_that_are_no_arrays(
    tmp_path: Path, member: bytes, reason: str, method: int
) -> None:
    """A member is looked at no further than it goes."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("w.npy", member)
    with pytest.raises(DamagedFile, match=f"tensor 'w': .*{reason}"):
        npz.read(str(tmp_path / "a.npz"), {})


def test_a_wrong_crc_of_a_deflated_array(tmp_path: Path) -> None:
    """It is found while the array is spilled."""
    path = Path(saved(tmp_path / "a.npz", {"w": np.arange(9)}, compressed=True))
    with zipfile.ZipFile(path) as archive:
        crc = archive.infolist()[0].CRC
    path.write_bytes(path.read_bytes().replace(crc.to_bytes(4, "little"), b"1234"))
    checkpoint = npz.read(str(path), {})
    with pytest.raises(DamagedFile, match="CRC-32"):
        spilled(checkpoint, tmp_path / "spill")


# ---------------------------------------------------------------------------- writing


def layout_of(draft: Draft, last: Checkpoint) -> Layout:
    """Return the layout of a draft."""
    return Layout(
        "out.npz", npz.NAME, "file", "variable", (), tuple(draft.files), draft.places, (), last,
        sums=draft.sums, own=draft.own,
    )  # fmt: skip


def filled(draft: Draft, last: Checkpoint, data: Mapping[str, bytes]) -> bytes:
    """Return the output with the bytes of its tensors, sealed as the engine does."""
    (file,) = draft.files
    image = bytearray(Path(file.copy_of).read_bytes() if file.copy_of else file.nbytes)
    assert len(image) == file.nbytes
    for offset, literal in file.literals:
        image[offset : offset + len(literal)] = literal
    for name, content in data.items():
        ordinal, offset, nbytes = draft.places[name].extent
        assert (ordinal, nbytes) == (0, len(content))
        image[offset : offset + nbytes] = content
    crcs = {e: zlib.crc32(image[e.offset : e.offset + e.nbytes]) for e in draft.sums}
    for patch in npz.seal(layout_of(draft, last), crcs):
        assert patch.file == 0
        image[patch.offset : patch.offset + len(patch.data)] = patch.data
    return bytes(image)


def entries_of(arrays: Arrays) -> Sequence[Entry]:
    """Return entries that copy these arrays."""
    return [
        Entry(name, DTYPES[array.dtype.name], array.shape, COPY, name)
        for name, array in arrays.items()
    ]


def made_fresh(arrays: Arrays, last: Checkpoint) -> bytes:
    """Return a new file with these arrays."""
    draft = npz.fresh(entries_of(arrays), last, None)
    return filled(draft, last, {name: array.tobytes() for name, array in arrays.items()})


def test_a_fresh_file_is_as_numpy_saves_it(tmp_path: Path) -> None:
    """Byte for byte, in the order given, and it reads back as it was laid out."""
    path = saved(tmp_path / "a.npz", some())
    last = npz.read(path, {})
    raw = made_fresh(some(), last)
    assert raw == Path(path).read_bytes()
    assert npz.fresh(entries_of(some()), last, None).places == last.index.by_name


@few
@given(arrays())
def test_numpy_loads_a_fresh_file(tmp_path: Path, arrays: Arrays) -> None:
    """All dtypes and shapes, with sound checksums."""
    little = {
        name: np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).reshape(array.shape)
        for name, array in arrays.items()
        if can_name(name)
    }
    last = npz.read(saved(tmp_path / "last.npz", {}), {})
    path = tmp_path / "fresh.npz"
    path.write_bytes(made_fresh(little, last))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with np.load(path) as found:
        assert_same({name: found[name] for name in found.files}, little)
    assert_same(loaded(str(path), tmp_path / "spill"), little)


def test_a_fresh_file_keeps_the_byte_order(tmp_path: Path) -> None:
    """Where all of the last checkpoint is big-endian, what is copied need not be swapped."""
    big = {"a": np.arange(3, dtype=">f4"), "b": np.arange(3, dtype="u1")}
    last = npz.read(saved(tmp_path / "last.npz", big), {})
    path = tmp_path / "fresh.npz"
    path.write_bytes(made_fresh(big, last))
    assert npz.read(str(path), {}).index.big_endian
    with np.load(path) as found:
        assert_same(found, big)


def test_a_template_is_a_copy_with_new_bytes(tmp_path: Path) -> None:
    """Only what is averaged changes, and the two places of its checksum."""
    arrays = {**some(), "order": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
    path = saved(tmp_path / "a.npz", arrays)
    last = npz.read(path, {})
    names = ["block/kernel", "order", "none"]
    draft = npz.template(last, [last.index.by_name[name] for name in names], "refuse")
    assert draft is not None
    assert draft.files[0].copy_of == path
    assert draft.places == last.index.by_name
    data = {"block/kernel": np.full(12, 7, "<f4").tobytes(), "order": np.full(6, 8.0).tobytes()}
    raw = filled(draft, last, data)
    (tmp_path / "out.npz").write_bytes(raw)
    with zipfile.ZipFile(tmp_path / "out.npz") as archive:
        assert archive.testzip() is None
    expected = {**arrays, "block/kernel": np.full((3, 4), 7, "<f4"), "order": np.full((2, 3), 8.0)}
    with np.load(tmp_path / "out.npz") as found:
        assert_same({name: found[name] for name in found.files}, expected)
    out = npz.read(str(tmp_path / "out.npz"), {})
    assert out.index.tensors == last.index.tensors
    before = Path(path).read_bytes()
    changed = [at for at in range(len(raw)) if raw[at] != before[at]]
    extents = [last.index.by_name[name].extent for name in names]
    inside = {at for _, start, n in extents for at in range(start, start + n)}
    assert len([at for at in changed if at not in inside]) <= 16


def test_a_template_where_it_can_be(tmp_path: Path) -> None:
    """What is averaged has to be stored as it is, and nothing deflated."""
    arrays = {"a": np.arange(3, dtype="<f4"), "b": np.arange(3, dtype=">f4")}
    last = npz.read(saved(tmp_path / "a.npz", arrays, compressed=True), {})
    assert npz.template(last, last.index.tensors, "refuse") is None
    assert npz.template(last, [], "refuse") is None
    last = npz.read(saved(tmp_path / "b.npz", arrays), {})
    a, b = (last.index.by_name[name] for name in "ab")
    assert npz.template(last, [a, b], "refuse") is None
    draft = npz.template(last, [a], "refuse")
    assert draft is not None
    raw = filled(draft, last, {"a": np.full(3, 5, "<f4").tobytes()})
    (tmp_path / "out.npz").write_bytes(raw)
    with np.load(tmp_path / "out.npz") as found:
        assert_same(found, {**arrays, "a": np.full(3, 5, "<f4")})


def test_what_can_be_said() -> None:
    """NumPy's own dtypes, and names under which numpy.load finds the array."""
    said = {name for name, dtype in DTYPES.items() if representable(dtype)}
    assert said == {np.dtype(code).name for code in CODES}
    assert all(map(can_name, ["", "a", "a/b", "../x", "ü", "a b", "x" * 65_531]))
    assert not any(map(can_name, ["a\0b", "\ud800", "a.npy", "x" * 65_532]))


def test_names_that_numpy_mistakes(tmp_path: Path) -> None:
    """The reason why no array is called NAME.npy: NumPy hands out the array NAME for it."""
    arrays = {"a": np.zeros(1), "a.npy": np.ones(1)}
    with np.load(saved(tmp_path / "a.npz", arrays)) as found:
        assert found["a.npy"] == 0
    assert_same(loaded(str(tmp_path / "a.npz"), tmp_path / "spill"), arrays)


def test_telling_it_from_other_archives(tmp_path: Path) -> None:
    """By the magic."""
    path = Path(saved(tmp_path / "a.npz", some()))
    assert sniff(path.read_bytes()[:16])
    assert sniff(Path(saved(tmp_path / "b.npz", {})).read_bytes()[:16])
    assert not sniff(b"\x93NUMPY\1\0")


def test_averaged_parts_need_no_copy(tmp_path: Path) -> None:
    """An entry may be in another dtype than its source, and new in name."""
    last = npz.read(saved(tmp_path / "a.npz", some()), {})
    entry = Entry("new", DTYPES["float64"], (3, 4), AVERAGE, "block/kernel")
    draft = npz.fresh([entry], last, None)
    (tmp_path / "out.npz").write_bytes(filled(draft, last, {"new": np.ones((3, 4)).tobytes()}))
    with np.load(tmp_path / "out.npz") as found:
        assert_same(found, {"new": np.ones((3, 4))})
