"""PyTorch files: some that torch.save wrote, some put together here, and what drafts become."""

from __future__ import annotations

import base64
import dataclasses
import json
import lzma
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ema_cli.blueprint import Draft, Layout
from ema_cli.formats import torch, zips
from ema_cli.formats.torch.encoding import encode
from ema_cli.formats.torch.nodes import ITEM_SIZES, Ordered, StorageRef, TensorRef
from ema_cli.formats.zips import NewMember
from ema_cli.tensors import Checkpoint, Tensor

_GOLDEN = Path(__file__).parent / "golden" / "torch_files.json"


class Golden(NamedTuple):
    """A file that PyTorch wrote, and (dtype, shape, bytes in C order) of its model's tensors."""

    content: bytes
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]]


def _goldens() -> dict[str, Golden]:
    found = {}
    for name, said in json.loads(_GOLDEN.read_text(encoding="utf-8"))["files"].items():
        tensors = {
            tensor: (dtype, tuple(shape), base64.b64decode(raw))
            for tensor, (dtype, shape, raw) in said["tensors"].items()
        }
        found[name] = Golden(lzma.decompress(base64.b85decode(said["file"])), tensors)
    return found


GOLDENS = _goldens()


# ---------------------------------------------------------------------------- making files


def ref(
    key: str = "0",
    shape: tuple[int, ...] = (2, 3),
    dtype: str = "float32",
    strides: tuple[int, ...] | None = None,
    **more: Any,
) -> TensorRef:
    """Return a tensor in a storage of its own size, unless `numel` says another."""
    c_order = tuple(int(np.prod(shape[k + 1 :])) for k in range(len(shape)))
    numel = more.pop("numel", int(np.prod(shape)))
    storage = StorageRef(key, more.pop("held", dtype), numel, "cpu")
    return TensorRef(storage, dtype, more.pop("offset", 0), shape, strides or c_order, **more)


def members_of(content: bytes, path: Path) -> dict[str, bytes]:
    """Return the members of an archive by their names without its own; writes beside `path`."""
    beside = path.with_name("members.zip")
    beside.write_bytes(content)
    with beside.open("rb") as file:
        archive = zips.read_archive(file.fileno(), str(beside), 0, len(content), what="a file")
    return {
        m.name.partition("/")[2]: content[m.offset : m.offset + m.nbytes] for m in archive.members
    }


def archive_of(members: Mapping[str, bytes], stem: str = "archive") -> bytes:
    """Return an archive as torch.save writes it, of members of any name and content."""
    new = [NewMember(f"{stem}/{name}", data, len(data)) for name, data in members.items()]
    laid = zips.lay_out(new, torch=True)
    content = bytearray(laid.total)
    for at, data in laid.literals:
        content[at : at + len(data)] = data
    return bytes(content)


def saved(root: Any, **members: bytes) -> bytes:
    """Return a file of a tree; each storage holds its key, again and again."""
    storages: dict[str, StorageRef] = {}
    _collect(root, storages)
    held = {f"data/{s.key}": (s.key.encode() * s.nbytes)[: s.nbytes] for s in storages.values()}
    return archive_of({"data.pkl": encode(root), "byteorder": b"little", **held, **members})


def _collect(node: Any, found: dict[str, StorageRef]) -> None:
    if isinstance(node, TensorRef):
        found.setdefault(node.storage.key, node.storage)
    elif isinstance(node, dict | list | tuple):
        for child in node.values() if isinstance(node, dict) else node:
            _collect(child, found)


def state_of(**tensors: TensorRef) -> Ordered:
    """Return a state_dict."""
    return Ordered(tensors)


# ---------------------------------------------------------------------------- reading, writing


def read(path: Path, content: bytes, known: Any = None, key: str = "") -> Checkpoint:
    """Write a file and read it."""
    path.write_bytes(content)
    return torch.read(str(path), {} if known is None else known, key)


def values(content: bytes, tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's elements in C order."""
    return _view(bytearray(content), tensor).tobytes()


def _view(content: bytearray, tensor: Tensor) -> np.ndarray[Any, Any]:
    width = ITEM_SIZES[tensor.dtype.name]
    strides = [s * width for s in tensor.strides] or None
    return np.ndarray(tensor.shape, f"V{width}", content, tensor.extent.offset, strides)


def written(draft: Draft, last: Checkpoint, parts: Mapping[str, bytes]) -> bytes:
    """Return the file of a draft, whose tensors get these bytes in C order, sealed."""
    (file,) = draft.files
    content = bytearray(Path(file.copy_of).read_bytes() if file.copy_of else file.nbytes)
    assert len(content) == file.nbytes
    for at, data in file.literals:
        content[at : at + len(data)] = data
    for name, raw in parts.items():
        view = _view(content, draft.places[name])
        view[...] = np.frombuffer(raw, view.dtype).reshape(view.shape)
    sums = {e: zlib.crc32(content[e.offset : e.offset + e.nbytes]) for e in draft.sums}
    layout = Layout("", "torch", "file", "variable", (), (file,), {}, (), last)
    for patch in torch.seal(dataclasses.replace(layout, own=draft.own), sums):
        content[patch.offset : patch.offset + len(patch.data)] = patch.data
    return bytes(content)
