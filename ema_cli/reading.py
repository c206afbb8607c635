"""Tensors read block by block, from a checkpoint's file or from an array in memory."""

from __future__ import annotations

import os
from types import TracebackType

import numpy as np

from ema_cli.files import check_unchanged, open_input, read_exact
from ema_cli.kernel import Array
from ema_cli.tensors import DTYPES, Checkpoint, Tensor, numpy_dtype


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


def dtype_name(array: Array) -> str | None:
    """Return the name in `DTYPES` of an array's dtype, or None when no checkpoint can hold it."""
    name = array.dtype.name
    return name if name in DTYPES and array.dtype.isnative else None
