"""Tensors read block by block, from a checkpoint's file or from an array in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np

from ema_cli import formats
from ema_cli.errors import Disagreement
from ema_cli.files import check_unchanged, open_input, read_exact
from ema_cli.kernel import Array
from ema_cli.naming import STEP_NAMES
from ema_cli.steps import step_from_name, stored_step
from ema_cli.tensors import DTYPES, Checkpoint, DType, Tensor, numpy_dtype
from ema_cli.text import shorten

Source = str | os.PathLike[str] | Mapping[str, Any]


class TensorReader:
    """One tensor of a checkpoint; packed dtypes are read as bytes. A context that closes it.

    Attributes:
        dtype: NumPy dtype of the blocks.
        elements: how many there are.
    """

    def __init__(self, checkpoint: Checkpoint, tensor: Tensor) -> None:
        self._stamp = checkpoint.files[tensor.extent.file]
        self._offset = tensor.extent.offset
        packed = tensor.dtype.bits < 8
        self.dtype = np.dtype(np.uint8) if packed else numpy_dtype(tensor.dtype.name)
        self.elements = tensor.extent.nbytes // self.dtype.itemsize
        self._fd = open_input(self._stamp.path)

    def __enter__(self) -> TensorReader:
        check_unchanged(self._fd, self._stamp)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def block(self, start: int, count: int) -> Array:
        """Return a new flat array of `count` elements from element `start`."""
        array: Array = np.empty(count, self.dtype)
        offset = self._offset + start * self.dtype.itemsize
        read_exact(self._fd, array.view(np.uint8).data, offset, self._stamp.path)
        return array


class ArrayReader:
    """A NumPy array read as `TensorReader` reads a file."""

    def __init__(self, array: Array) -> None:
        self._flat = np.ascontiguousarray(array).reshape(-1)
        self.dtype = self._flat.dtype
        self.elements = self._flat.size

    def __enter__(self) -> ArrayReader:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def block(self, start: int, count: int) -> Array:
        """Return a new flat array of `count` elements from element `start`."""
        block: Array = self._flat[start : start + count].copy()
        return block


class Values:
    """The tensors of one checkpoint, wherever they are.

    Attributes:
        where: for messages.
        specs: dtype and shape of each tensor, in order.
    """

    def __init__(self, source: Source) -> None:
        self._checkpoint: Checkpoint | None = None
        self._arrays: dict[str, Array] = {}
        if isinstance(source, Mapping):
            self.where = "the mapping"
            self._arrays = {name: _native(np.asarray(value)) for name, value in source.items()}
            self.specs = {name: _spec(name, array) for name, array in self._arrays.items()}
        else:
            self._checkpoint = formats.read(os.fspath(source), {})
            self.where = shorten(self._checkpoint.path, 1000)
            tensors = self._checkpoint.index.tensors
            self.specs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}

    def open(self, name: str) -> TensorReader | ArrayReader:
        """Return a reader of one tensor."""
        if self._checkpoint is None:
            return ArrayReader(self._arrays[name])
        return TensorReader(self._checkpoint, self._checkpoint.index.by_name[name])

    def step(self) -> int:
        """Return the training step: stored, or told by the name. Raises `Disagreement`."""
        if self._checkpoint is not None:
            stored = stored_step(self._checkpoint)
            step = stored.value if stored else step_from_name(self._checkpoint.name)
            if step is not None:
                return step
        for name in STEP_NAMES:
            if name in self._arrays and self._arrays[name].size == 1:
                return int(self._arrays[name].reshape(-1)[0])
        raise Disagreement(f"{self.where}: no step: expected a scalar called global_step")


def _native(array: Array) -> Array:
    """Return the array in this machine's byte order."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _spec(name: str, array: Array) -> tuple[DType, tuple[int, ...]]:
    dtype = array.dtype.name
    if dtype not in DTYPES:
        raise TypeError(f"'{shorten(name)}': no checkpoint can hold dtype {array.dtype}")
    return DTYPES[dtype], array.shape
