"""PyTorch files made of storages and views, and read again with Python's own zipfile and pickle."""

from __future__ import annotations

import io
import itertools
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from exact import tensorflow_coefficient
from helpers import read_checkpoint

import ema_cli
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
    *,
    big_endian: bool = False,
    checked: bool = True,
) -> Path:
    """Write a file as `torch.save` does: a state_dict, or one under "model" with more around it.

    `big_endian` as a machine of that kind does; `checked`: with CRCs, else with zeros.
    """
    refs = {
        key: StorageRef(key, base.dtype.name, len(base), "cpu") for key, base in storages.items()
    }
    state = Ordered(
        (name, TensorRef(refs[v.storage], refs[v.storage].dtype, v.offset, v.shape, v.strides))
        for name, v in tensors.items()
    )
    root = state if around is None else {"model": state, **around}
    parts = {"data.pkl": encode(root), ".format_version": b"1", ".storage_alignment": b"64"}
    parts["byteorder"] = b"big" if big_endian else b"little"
    order = ">" if big_endian else "<"
    for key, base in storages.items():
        swapped = base.view(f"u{base.itemsize}").astype(f"{order}u{base.itemsize}")
        parts[f"data/{key}"] = swapped.tobytes()
    parts |= {"version": b"3\n", ".data/serialization_id": b"7" * 40}
    members = [zips.NewMember(f"archive/{name}", raw, len(raw)) for name, raw in parts.items()]
    laid = zips.lay_out(members, torch=True)
    raw = bytearray(laid.total)
    for offset, data in laid.literals:
        raw[offset : offset + len(data)] = data
    for at in itertools.chain(*laid.crc_at) if not checked else ():
        raw[at : at + 4] = bytes(4)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


def span(view: View) -> int:
    """Return how many elements its storage needs."""
    if 0 in view.shape:
        return view.offset
    pairs = zip(view.shape, view.strides, strict=True)
    return view.offset + 1 + sum((n - 1) * stride for n, stride in pairs)


class ViewRun:
    """A run of three files, ``model-1.pt`` and so on; the storages of each, to compare with."""

    def __init__(
        self,
        folder: Path,
        views: Mapping[str, View] | Sequence[Mapping[str, View]],
        dtype: Any = np.float32,
    ) -> None:
        self.folder = folder
        self.views = [views] * 3 if isinstance(views, Mapping) else list(views)
        self.storages = [_filled(one, k, dtype) for k, one in enumerate(self.views)]
        for k in range(3):
            self.write(k)

    def path(self, k: int) -> Path:
        """Return the path of checkpoint `k`, counted from 0."""
        return self.folder / f"model-{k + 1}.pt"

    def write(self, k: int) -> None:
        """Write a checkpoint again, whose storages were changed."""
        write_views(self.path(k), self.storages[k], self.views[k])

    def values(self, name: str) -> list[Array]:
        """Return what each checkpoint has of a tensor."""
        pairs = zip(self.views, self.storages, strict=True)
        return [shown(views[name], storages) for views, storages in pairs]

    def expected(self, name: str) -> Array:
        """Return the average of decay 0.9 by NumPy, whole arrays at a time."""
        values = self.values(name)
        wide = np.dtype(np.float32) if values[0].itemsize == 2 else values[0].dtype
        c = wide.type(float(tensorflow_coefficient(0.9, None)))
        shadow = values[0].astype(wide)
        for value in values[1:]:
            shadow = np.asarray(shadow - np.asarray(shadow - value.astype(wide)) * c)
        return shadow.astype(values[0].dtype)

    def averaged(self, out: Path, **options: Any) -> dict[str, Array]:
        """Average with decay 0.9; returns what is in the output, read by other means than ours."""
        ema_cli.average_run(self.folder, out, decay=0.9, names="variable", **options)
        if out.suffix == ".pt":
            return dict(load(out))
        if out.suffix == ".npz":
            with np.load(out) as archive:
                return dict(archive)
        return read_checkpoint(out)


def _filled(views: Mapping[str, View], seed: int, dtype: Any) -> dict[str, Array]:
    """Return storages of random numbers, with some more elements than the views need."""
    needed: dict[str, int] = {}
    for view in views.values():
        needed[view.storage] = max(needed.get(view.storage, 0), span(view) + 3)
    rng = np.random.default_rng(seed)
    return {key: rng.normal(size=n).astype(dtype) for key, n in needed.items()}


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
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda array, requires_grad, hooks: array
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
