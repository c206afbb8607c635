"""``ema-avg verify`` of what is damaged, forged, or has nothing but itself to tell of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conformance import CASES, ROWS, every_dtype, write_source
from forging import WISHES, edit, files_of, flipped, forge, output, provenance_of
from helpers import cmd, read_checkpoint

import ema_cli
from ema_cli.errors import DamagedState, EmaError, InputError

# ---------------------------------------------------------------------------- damage


@pytest.mark.parametrize("row", ROWS)
def test_any_flipped_bit_is_found(row: str, tmp_path: Path) -> None:
    """In averages, copies, headers, indexes and side files; the first is named with its place."""
    out = output(row, tmp_path)
    for path in files_of(out):
        size = path.stat().st_size
        for offset in {*range(0, size, max(size // 40, 1)), size - 1}:
            with flipped(path, offset, offset % 8):
                cmd("verify", out, code=12)
    assert cmd("verify", out).code == 0


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("wishes", ["template", "debiased"])
def test_any_bit_that_provenance_agrees_with_is_found(
    row: str, wishes: str, tmp_path: Path
) -> None:
    """Bytes and checksums altered alike: what the sources give tells; no byte goes uncompared."""
    out = output(row, tmp_path, *WISHES[wishes])
    for path in files_of(out):
        size = path.stat().st_size
        for offset in range(size % 11, size, max(size // 60, 1)):
            with flipped(path, offset, offset % 8):
                forge(out)
                with pytest.raises(InputError):
                    ema_cli.verify(out, full=True, workers=1)
    forge(out)
    assert ema_cli.verify(out, full=True).not_recomputed is None


def test_damage_is_told_with_its_place(tmp_path: Path) -> None:
    """The file, the bytes and the tensors in them; the element and both values."""
    out = output("safetensors", tmp_path, "--names", "variable")
    size = out.stat().st_size
    with flipped(out, size - 1):
        told = cmd("verify", out, code=12).err
        assert f"{out}: bytes 0 to {size}: expected checksum " in told
        assert "in the bytes of 'dense/kernel', 'dense/bias', 'scale' and 1 more\n" in told
        forge(out)
        told = cmd("verify", out, code=12).err
        assert "tensor 'steps_done': element 0: its sources give 129, found" in told
        assert "--overwrite" in told
    with out.open("ab") as file:
        file.write(b"\0")
    assert f"expected {size} bytes as {out}.ema.json tells" in cmd("verify", out, code=12).err
    os.truncate(out, size - 1)
    cmd("verify", out, code=12)
    out.unlink()
    cmd("verify", out, code=12)


def test_other_averages_with_forged_provenance(tmp_path: Path) -> None:
    """Only recomputing can find them: decay 0.6 where 0.5 is told."""
    out = output("safetensors", tmp_path)
    other = tmp_path / "other.safetensors"
    ema_cli.average_run(tmp_path / "run", other, decay=0.6)
    kernel = "dense/kernel/ExponentialMovingAverage"
    one, two = (float(read_checkpoint(path)[kernel][0, 0]) for path in (out, other))
    shutil.copy(other, out)
    assert "expected checksum" in cmd("verify", out, code=12).err
    forge(out)
    told = cmd("verify", out, code=12).err
    assert "its sources give" in told
    assert one != two


def test_swapped_provenance(tmp_path: Path) -> None:
    """That of another output of the same size is none of this one."""
    one = output("safetensors", tmp_path)
    two = tmp_path / "two.safetensors"
    ema_cli.average_run(tmp_path / "run", two, decay=0.6)
    assert one.stat().st_size == two.stat().st_size
    provenance_of(two).replace(provenance_of(one))
    assert "expected checksum" in cmd("verify", one, code=12).err


def test_a_shard_nobody_tells_of(digits_bf16: Path, tmp_path: Path) -> None:
    """Files of the checkpoint that provenance does not name are no part of what was written."""
    out = tmp_path / "out"
    ema_cli.average_run(digits_bf16, out, decay=0.5)
    edit(out, lambda document: document["output"]["files"].pop(0))
    assert "tells nothing of it" in cmd("verify", out, code=12).err


def test_a_state_is_no_output(tmp_path: Path) -> None:
    """It is told by the file that says what it is."""
    (tmp_path / "FORMAT").write_bytes(b"ema-avg state 1\n")
    with pytest.raises(DamagedState, match="ROOT"):
        ema_cli.verify(tmp_path)


# ---------------------------------------------------------------------------- without provenance


@pytest.mark.parametrize("row", ROWS)
def test_without_provenance_its_own_checksums_count(row: str, tmp_path: Path) -> None:
    """Exit 3 and what could be checked; a flipped bit of a tensor is found where it is summed."""
    out = output(row, tmp_path)
    provenance_of(out).unlink()
    told = cmd("verify", out, code=3).out.splitlines()
    word = "checked" if CASES[row].checked else "opened"
    assert told[0].startswith(f"{word}  {out}: ")
    assert told[1] == f"not recomputed: {out}.ema.json: no such file"
    found = ema_cli.verify(out)
    assert (found.checksums == "equal") is CASES[row].checked
    if CASES[row].checked:
        checkpoint = ema_cli.inspect(out)
        for tensor in checkpoint.index.tensors:
            path = Path(checkpoint.files[tensor.extent.file].path)
            with flipped(path, tensor.extent.offset), pytest.raises(EmaError) as caught:
                ema_cli.verify(out)
            assert caught.value.exit_code == 12
            assert tensor.name in str(caught.value) or "and 1 more" in str(caught.value)


def test_compressed_archives_and_strings_without_provenance(tmp_path: Path) -> None:
    """What has to be unpacked is verified by it, and strings by the checksum they have."""
    packed = tmp_path / "packed.npz"
    np.savez_compressed(packed, w=np.arange(5000.0), v=np.float32([1]))
    assert ema_cli.verify(packed).checksums == "equal"
    raw = packed.read_bytes()
    for offset in range(60, len(raw) - 200, 97):
        with flipped(packed, offset), pytest.raises(EmaError):
            ema_cli.verify(packed)
    bundle = write_source(tmp_path / "in", every_dtype())[1]
    assert ema_cli.verify(bundle).checksums == "equal"
    data = Path(f"{bundle}.data-00000-of-00001")
    missed = []
    for offset in range(data.stat().st_size):
        with flipped(data, offset):
            try:
                ema_cli.verify(bundle)
                missed.append(offset)
            except InputError:
                pass
    assert missed == []


def test_what_is_no_checkpoint_at_all(tmp_path: Path) -> None:
    """A path that is not there, and one that is something else: 12."""
    assert "no such file" in cmd("verify", tmp_path / "nothing", code=12).err
    (tmp_path / "text").write_text("hello")
    cmd("verify", tmp_path / "text", code=12)
