"""The attacks are what they say they are, by the word of others who read these formats."""

from __future__ import annotations

import io
import pickletools
import zipfile
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from attacks import READ, Attack
from hdf5_making import lay_canaries
from keras_attacks import KERAS_ATTACKS
from link_attacks import LINK_ATTACKS
from npz_attacks import NPZ_ATTACKS, B, W, sound
from pickle_attacks import CALLS, DOTTED, HIDDEN, MAKERS, PICKLE_ATTACKS
from raw_pickle import checkpoint, legacy_checkpoint, members
from raw_zip import archive, deflated, many, zeros
from torch_attacks import TORCH_ATTACKS
from zip_attacks import ZIP_ATTACKS


def built(folder: Path, attack: Attack) -> Path:
    """Write an attack."""
    inside = folder / "in"
    inside.mkdir()
    lay_canaries(inside)
    return attack.build(inside)


def named(table: tuple[Attack, ...], name: str) -> Attack:
    """Return an attack."""
    return next(attack for attack in table if attack.name == name)


def test_what_npz_attacks_are_made_of_is_sound() -> None:
    """Without a lie, NumPy and zipfile read what the builders of zip files make."""
    for parts in (sound(), [deflated(part.name, part.data) for part in sound()]):
        raw = archive(parts, end64={}, comment=b"made by hand")
        with zipfile.ZipFile(io.BytesIO(raw)) as file:
            assert file.testzip() is None
        found = np.load(io.BytesIO(raw))
        assert found["w"].tolist() == W.tolist()
        assert found["b"].tolist() == B.tolist()
    with zipfile.ZipFile(io.BytesIO(many(70_000, b"x"))) as file:
        assert len(file.infolist()) == 70_000
        assert file.read("00069999.npy") == b"x"


def test_bombs_are_bombs() -> None:
    """A thousandth of their size, and of the size they say."""
    packed = zeros(64)
    assert len(packed) * 1000 < 64 << 20
    assert zlib.decompress(packed, -15) == bytes(64 << 20)


@pytest.mark.parametrize(
    "attack",
    [attack for attack in (*NPZ_ATTACKS, *ZIP_ATTACKS) if attack.ends is READ],
    ids=lambda attack: attack.name,
)
def test_what_is_read_is_sound_to_numpy(tmp_path: Path, attack: Attack) -> None:
    """Where we read a file, NumPy reads the same."""
    found = np.load(built(tmp_path, attack))
    for name, value in (attack.values or {}).items():
        np.testing.assert_array_equal(found[name], value)


def pickle_of(path: Path) -> bytes:
    """Return the pickle of a torch file."""
    with zipfile.ZipFile(path) as file:
        return file.read("archive/data.pkl")


@pytest.mark.parametrize(
    "attack", [*CALLS, *HIDDEN, *DOTTED, *MAKERS[:6]], ids=lambda attack: attack.name
)
def test_calls_are_calls(tmp_path: Path, attack: Attack) -> None:
    """Python's own disassembler finds the pickle sound, and the name in it."""
    raw = pickle_of(built(tmp_path, attack))
    listing = io.StringIO()
    pickletools.dis(raw, listing)
    words = [word for text in attack.words for word in text.split(".") if word]
    assert all(word in listing.getvalue() for word in words)


def test_what_torch_attacks_are_made_of_is_sound() -> None:
    """Without a lie, the pickles and the zip files are sound."""
    for raw in (checkpoint(), legacy_checkpoint()):
        pickletools.dis(raw, io.StringIO())
    with zipfile.ZipFile(io.BytesIO(archive(members(checkpoint())))) as file:
        assert file.testzip() is None


def opcodes(raw: bytes) -> set[str]:
    """Return the opcodes of a pickle."""
    return {opcode.name for opcode, _, _ in pickletools.genops(raw)}


@pytest.mark.parametrize("name", ["INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ", "NEWOBJ_EX"])
def test_an_opcode_is_there(tmp_path: Path, name: str) -> None:
    """An attack that is named after an opcode has it."""
    assert name in opcodes(pickle_of(built(tmp_path, named(PICKLE_ATTACKS, name))))


def test_broken_pickles_are_broken(tmp_path: Path) -> None:
    """Most of those that are no pickles are none to Python's disassembler either."""
    broken = 0
    bare = [attack for attack in TORCH_ATTACKS if attack.items == (79,)]
    for k, attack in enumerate(bare):
        (tmp_path / str(k)).mkdir()
        raw = pickle_of(built(tmp_path / str(k), attack))
        try:
            pickletools.dis(raw, io.StringIO())
        except ValueError:
            broken += 1
    assert broken > len(bare) * 2 / 3


def _links(file: Any) -> set[type]:
    found = set()

    def look(group: Any) -> None:
        for name in group:
            link = group.get(name, getlink=True)
            found.add(type(link))
            if isinstance(link, h5py.HardLink) and isinstance(group[name], h5py.Group):
                look(group[name])

    look(file)
    return found


@pytest.mark.parametrize(
    "attack", [a for a in LINK_ATTACKS if a.items in ((87,), (90,))], ids=lambda attack: attack.name
)
def test_links_are_links(tmp_path: Path, attack: Attack) -> None:
    """The library finds the link that leads elsewhere."""
    with h5py.File(built(tmp_path, attack), "r") as file:
        kinds = _links(file)
    assert (h5py.ExternalLink if attack.items == (87,) else h5py.SoftLink) in kinds


@pytest.mark.parametrize(
    "attack", [a for a in LINK_ATTACKS if a.items in ((88,), (89,))], ids=lambda attack: attack.name
)
def test_storage_elsewhere_is_elsewhere(tmp_path: Path, attack: Attack) -> None:
    """The library says that the bytes lie in other files."""
    with h5py.File(built(tmp_path, attack), "r") as file:
        dataset = file["layers/dense/vars/1"]
        if attack.items == (88,):
            assert dataset.id.get_create_plist().get_external_count() > 0
        else:
            assert dataset.is_virtual


def test_the_library_would_read_the_canary(tmp_path: Path) -> None:
    """What external storage is for: without our checks, another file's bytes are weights."""
    path = built(tmp_path, named(KERAS_ATTACKS, "external storage"))
    with h5py.File(path, "r") as file:
        assert file["layers/dense/vars/1"][...].tobytes() == bytes(range(16))
