"""Reading PyTorch files of both kinds: where tensors lie, and what is refused."""

from __future__ import annotations

import contextlib
import gc
import io
import re
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from torch_files import GOLDENS, archive_of, members_of, read, ref, saved, state_of, values

from ema_cli.errors import DamagedFile, EmaError, InputError, UnsupportedInput
from ema_cli.formats import torch
from ema_cli.formats.torch.encoding import encode
from ema_cli.tensors import Extent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pt"


# ---------------------------------------------------------------------------- what torch wrote


@pytest.mark.parametrize("name", [name for name in GOLDENS if name != "negative"])
def test_tensors_lie_where_torch_put_them(name: str, path: Path) -> None:
    content, expected = GOLDENS[name]
    by_name = read(path, content).index.by_name
    found = {
        name: (by_name[name].dtype.name, by_name[name].shape, values(content, by_name[name]))
        for name in expected
    }
    assert found == expected


def test_views_have_strides_and_the_extent_they_reach_over(path: Path) -> None:
    index = read(path, GOLDENS["tensors"].content).index
    by_name, start = index.by_name, index.by_name["base"].extent.offset
    places = {
        name: (t.extent.offset - start, t.extent.nbytes, t.strides)
        for name in ("base", "transposed", "row", "column", "box")
        if (t := by_name[name])
    }
    assert places == {
        "base": (0, 240, ()),
        "transposed": (0, 240, (1, 10)),
        "row": (80, 40, ()),
        "column": (12, 204, (10,)),
        "box": (48, 100, (10, 1)),
    }
    assert by_name["expanded"].strides == (1, 0)
    assert by_name["channels_last"].strides == (0, 1, 8, 2)  # the first has length 1
    assert list(index.tensors) == sorted(index.tensors, key=lambda t: t.extent[:2])


def test_checksums_are_those_of_whole_storages(path: Path) -> None:
    content = GOLDENS["tensors"].content
    checkpoint = read(path, content)
    index = checkpoint.index
    assert index.checksum == "crc32"
    assert index.records == tuple(sorted(set(index.records)))
    found = [zlib.crc32(content[e.offset : e.offset + e.nbytes]) for e in index.records]
    assert checkpoint.checksums is not None
    assert checkpoint.checksums.dtype == np.uint32
    assert checkpoint.checksums.tolist() == found
    assert sum(e == Extent(0, index.by_name["base"].extent.offset, 240) for e in index.records) == 1


@pytest.mark.parametrize("name", ["unchecked", "stream"])
def test_files_without_checksums(name: str, path: Path) -> None:
    checkpoint = read(path, GOLDENS[name].content)
    assert checkpoint.checksums is None
    assert checkpoint.index.records == ()


def test_the_model_inside_a_training_checkpoint(path: Path) -> None:
    checkpoint = read(path, GOLDENS["training"].content)
    index = checkpoint.index
    assert checkpoint.told_step == (12, "entry num_updates")
    assert index.roles.keys() == index.by_name.keys()
    roles = {name: role.value for name, role in index.roles.items()}
    assert roles["first.weight"] == "variable"
    assert roles["norm.running_var"] == "statistics"
    assert roles["optimizer/state/0/exp_avg"] == "optimizer state"
    assert roles["thing/inside"] == roles["best/0"] == "beside the model"
    assert index.roles_from == "the entry model"


def test_a_module_has_the_names_of_its_state(path: Path) -> None:
    index = read(path, GOLDENS["module"].content).index
    beside = {name for name, role in index.roles.items() if role.value == "beside the model"}
    assert beside == {"passing", "attribute"}
    assert index.by_name.keys() - beside == GOLDENS["module"].tensors.keys()


def test_what_cannot_be_averaged_is_not_listed(path: Path) -> None:
    index = read(path, GOLDENS["kinds"].content).index
    assert list(index.by_name) == ["w"]
    (caution,) = index.cautions
    assert caution.code == "not-averaged"
    assert caution.message.startswith("5 tensors of the model cannot be averaged")


def test_a_negative_of_the_model_is_known_as_such(path: Path) -> None:
    content = GOLDENS["negative"].content
    index = read(path, content).index
    assert index.negated == {"negative"}
    assert index.cautions == ()
    stored = np.frombuffer(values(content, index.by_name["negative"]), "<f4")
    assert stored.tolist() == [2, -4]
    assert index.by_name["negative"].strides == (2,)


def test_a_negative_beside_the_model_stays_where_it_is(path: Path) -> None:
    root = {"model": state_of(w=ref()), "optimizer": {"x": ref("1", neg=True)}}
    assert list(read(path, saved(root)).index.by_name) == ["w"]


# ---------------------------------------------------------------------------- sharing


def test_checkpoints_of_a_run_share_an_index(path: Path) -> None:
    known: dict[object, object] = {}
    first = read(path, saved({"model": state_of(w=ref()), "step": 100}), known)
    second = read(path, saved({"model": state_of(w=ref()), "step": 200}), known)
    assert first.index is second.index
    assert first.digests != second.digests
    assert (first.told_step, second.told_step) == ((100, "entry step"), (200, "entry step"))


@pytest.mark.parametrize(
    "other",
    [
        {"model": state_of(w=ref(shape=(3, 2))), "step": 1},
        {"model": state_of(v=ref()), "step": 1},
        {"model": state_of(w=ref(dtype="int32")), "step": 1},
        {"model": state_of(w=ref(strides=(1, 2))), "step": 1},
        {"state_dict": state_of(w=ref()), "step": 1},
        {"state_dict": state_of(w=ref()), "averaging_state": 1},
    ],
)
def test_others_do_not(other: object, path: Path) -> None:
    known: dict[object, object] = {}
    first = read(path, saved({"model": state_of(w=ref()), "step": 1}), known)
    assert read(path, saved(other), known).index is not first.index


def test_garbage_is_collected_again_afterwards(path: Path) -> None:
    for content in (GOLDENS["state"].content, b"nothing"):
        with contextlib.suppress(InputError):
            read(path, content)
        assert gc.isenabled()


# ---------------------------------------------------------------------------- damaged archives

PLAIN = {"data.pkl": encode({"w": ref()}), "byteorder": b"little", "data/0": bytes(24)}

BROKEN = {
    "no pickle": ({"a": b""}, "one NAME/data.pkl, found 0: it holds archive/a"),
    "two pickles": ({**PLAIN, "deeper/data.pkl": b""}, "one NAME/data.pkl, found 2"),
    "a pickle too deep": ({"deeper/data.pkl": PLAIN["data.pkl"]}, "one NAME/data.pkl, found 1"),
    "no byte order": (
        {**PLAIN, "byteorder": b"lottle"},
        "byte order little or big, found 'lottle'",
    ),
    "a missing storage": ({"data.pkl": PLAIN["data.pkl"]}, "storage '0' is missing"),
    "a short storage": (
        {**PLAIN, "data/0": bytes(23)},
        "expected 24 bytes of storage '0', found 23",
    ),
    "a long storage": (
        {**PLAIN, "data/0": bytes(25)},
        "expected 24 bytes of storage '0', found 25",
    ),
    "bytes after the pickle": ({**PLAIN, "data.pkl": PLAIN["data.pkl"] + b"N."}, "2 bytes follow"),
    "two dtypes": (
        {
            **PLAIN,
            "data.pkl": encode(
                [ref(held="", numel=24, dtype=d, shape=(2,)) for d in ("uint16", "uint32")]
            ),
        },
        "storage '0' is read as uint16 and as uint32",
    ),
    "a shape beyond 64 bits": (
        {
            **PLAIN,
            "data.pkl": encode({"w": ref(shape=(1 << 40, 1 << 40), strides=(0, 0), numel=6)}),
        },
        "overflows 64 bits",
    ),
    "an empty shape beyond 64 bits": (
        {
            **PLAIN,
            "data.pkl": encode({"w": ref(shape=(1 << 40, 0, 1 << 40), strides=(1, 1, 1), numel=6)}),
        },
        "overflows 64 bits",
    ),
    "33 dimensions": (
        {**PLAIN, "data.pkl": encode({"w": ref(shape=(1,) * 33, numel=6)})},
        "at most 32 dimensions, found 33",
    ),
    "a lone surrogate": ({**PLAIN, "data.pkl": encode({"\udc80": ref()})}, "a lone surrogate"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_archive_is_told(name: str, path: Path) -> None:
    members, reason = BROKEN[name]
    with pytest.raises(DamagedFile, match=reason):
        read(path, archive_of(members))


def test_the_sound_archive_is_read(path: Path) -> None:
    assert list(read(path, archive_of(PLAIN)).index.by_name) == ["w"]


def test_a_flipped_byte_of_the_pickle_is_found(path: Path) -> None:
    content = bytearray(GOLDENS["state"].content)
    content[content.index(b"first.weight")] ^= 1
    with pytest.raises(DamagedFile, match=r"zip member 'archive/data.pkl': expected CRC-32"):
        read(path, bytes(content))


def test_big_endian_files_say_so(path: Path) -> None:
    assert read(path, archive_of({**PLAIN, "byteorder": b"big"})).index.big_endian
    without = {name: data for name, data in PLAIN.items() if name != "byteorder"}
    assert not read(path, archive_of(without)).index.big_endian


def test_compressed_storages_are_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in PLAIN.items():
            archive.writestr(f"archive/{name}", data)
    with pytest.raises(UnsupportedInput, match="'archive/data/0' is compressed"):
        torch.read(str(path), {})


def test_a_compressed_pickle_is_read(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in PLAIN.items():
            kind = zipfile.ZIP_DEFLATED if name == "data.pkl" else zipfile.ZIP_STORED
            archive.writestr(f"archive/{name}", data, kind)
    assert list(torch.read(str(path), {}).index.by_name) == ["w"]


@pytest.mark.parametrize("member", ["constants.pkl", "code/__torch__.py"])
def test_torchscript_is_refused_with_what_converts_it(member: str, path: Path) -> None:
    with pytest.raises(UnsupportedInput, match="a TorchScript archive") as caught:
        read(path, archive_of({**PLAIN, member: b""}))
    assert "torch.jit.load(FILE).state_dict()" in caught.value.hint


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (_tar(), "a tar archive, as PyTorch before 0.1.10 wrote it"),
        (encode({"a": 1}), "a pickle that torch.save did not write"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"", "found neither"),
        (b"\x80", "found neither"),
    ],
)
def test_what_else_is_called_pt(content: bytes, said: str, path: Path) -> None:
    with pytest.raises(InputError, match=said):
        read(path, content)


def test_sniffing() -> None:
    for name in GOLDENS:
        assert torch.sniff(GOLDENS[name].content[:64])
    assert not torch.sniff(encode({"a": 1})[:64])
    assert not torch.sniff(b"\x80")
    assert not torch.sniff(b"")


# ---------------------------------------------------------------------------- damaged streams

STREAM = GOLDENS["stream"].content


@pytest.mark.parametrize("end", range(15, len(STREAM), 41))
def test_a_truncated_stream_is_told(end: int, path: Path) -> None:
    with pytest.raises(DamagedFile):
        read(path, STREAM[:end])


def test_a_stream_ends_where_its_last_storage_does(path: Path) -> None:
    with pytest.raises(DamagedFile, match=f"trailing bytes: expected {len(STREAM):,} bytes"):
        read(path, STREAM + b"\0")


def test_a_stream_counts_the_elements_of_each_storage(path: Path) -> None:
    at = read(path, STREAM).index.by_name["base"].extent.offset - 8
    content = bytearray(STREAM)
    assert content[at] == 60
    content[at] = 61
    with pytest.raises(DamagedFile, match="expected 60 elements, found 61"):
        read(path, bytes(content))


def test_a_stream_that_begins_with_a_long_pickle(path: Path) -> None:
    """Its length is told by nothing, so more and more of the file is read."""
    magic, rest = STREAM[:15], STREAM[15:]
    keys = re.search(rb"little_endian", rest)
    assert keys is not None
    # sys_info grows beyond the first stretch that is read.
    long = b"X\x0a\0\0\0type_sizes" + b"X" + (3 << 20).to_bytes(4, "little") + bytes(3 << 20)
    head = rest.index(b"\x80\x02}")
    grown = rest[:head] + b"\x80\x02}(" + b"X\x0d\0\0\0little_endian\x88" + long + b"u."
    after = rest.index(b".", rest.index(b"little_endian")) + 1
    assert read(path, magic + grown + rest[after:]).index.by_name.keys() == (
        GOLDENS["stream"].tensors.keys()
    )


@pytest.mark.parametrize("name", ["state", "stream", "training"])
def test_flipped_bytes_raise_our_errors_only(name: str, path: Path) -> None:
    content = GOLDENS[name].content
    for at in range(0, len(content), 29):
        changed = bytearray(content)
        changed[at] ^= 0x55
        try:
            read(path, bytes(changed))
        except EmaError as error:
            assert error.exit_code in (2, 12, 13)


def test_members_of_says_what_an_archive_holds(path: Path) -> None:
    """Of the helper: its members are those that zipfile sees."""
    content = GOLDENS["state"].content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        expected = {i.filename.partition("/")[2]: archive.read(i) for i in archive.infolist()}
    assert members_of(content, path) == expected
