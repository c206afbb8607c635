"""PyTorch files made of storages and views, and read again with Python's own zipfile and pickle."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ema_cli.formats import zips
from ema_cli.formats.torch.encoding import encode
from ema_cli.formats.torch.nodes import Ordered, StorageRef, TensorRef

Array = np.ndarray[Any, Any]

# What torch calls the storages of a dtype.
STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
}


class View(NamedTuple):
    """A tensor: a view of a storage; strides and offset in elements."""

    storage: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0


def c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor whose elements follow each other."""
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * max(n, 1))
    return tuple(reversed(strides)) if shape else ()


def shown(view: View, storages: Mapping[str, Array]) -> Array:
    """Return a copy of what a view shows, as NumPy has it."""
    base = storages[view.storage]
    strides = [stride * base.itemsize for stride in view.strides]
    made = np.lib.stride_tricks.as_strided(base[view.offset :], view.shape, strides)
    return np.array(made, order="C")


def write_views(
    path: Path,
    storages: Mapping[str, Array],
    tensors: Mapping[str, View],
    around: Mapping[str, Any] | None = None,
) -> Path:
    """Write a file as `torch.save` does: a state_dict, or one under "model" with more around it."""
    refs = {
        key: StorageRef(key, base.dtype.name, len(base), "cpu") for key, base in storages.items()
    }
    state = Ordered(
        (name, TensorRef(refs[v.storage], refs[v.storage].dtype, v.offset, v.shape, v.strides))
        for name, v in tensors.items()
    )
    root = state if around is None else {"model": state, **around}
    parts = {"data.pkl": encode(root), ".format_version": b"1", ".storage_alignment": b"64"}
    parts["byteorder"] = b"little"
    parts |= {f"data/{key}": base.tobytes() for key, base in storages.items()}
    parts |= {"version": b"3\n", ".data/serialization_id": b"7" * 40}
    members = [zips.NewMember(f"archive/{name}", raw, len(raw)) for name, raw in parts.items()]
    laid = zips.lay_out(members, torch=True)
    raw = bytearray(laid.total)
    for offset, data in laid.literals:
        raw[offset : offset + len(data)] = data
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


def storage_place(path: Path, key: str) -> tuple[int, int]:
    """Return the offset of a storage in a file, and its length in bytes."""
    raw = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        info = archive.getinfo(f"archive/data/{key}")
        at = info.header_offset
        name, extra = (int.from_bytes(raw[at + k : at + k + 2], "little") for k in (26, 28))
        return at + 30 + name + extra, info.file_size


class _Loader(pickle.Unpickler):
    """Makes NumPy arrays of the tensors in an archive, whose CRCs zipfile checks."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        super().__init__(io.BytesIO(archive.read(pickled)))
        self._archive, self._stem = archive, pickled.removesuffix("/data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if module == "torch" and name in STORAGES:
            return name
        raise AssertionError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Array:
        _, kind, key, _, numel = pid
        raw = self._archive.read(f"{self._stem}/data/{key}")
        found = np.frombuffer(raw, STORAGES[kind])
        assert len(found) == numel
        return found


def _rebuilt(base: Array, offset: int, shape: Any, strides: Any, *_: Any) -> Array:
    return shown(View("", tuple(shape), tuple(strides), offset), {"": base})


def load(path: Path) -> Any:
    """Return what a file holds, tensors as arrays."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return _Loader(archive).load()


def load_storages(path: Path) -> dict[str, bytes]:
    """Return the bytes of each storage in a file."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
        return {name.rpartition("/")[2]: archive.read(name) for name in names}
