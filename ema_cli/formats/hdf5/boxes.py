"""Reads boxes of a dataset into little-endian bytes in C order, for the child process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ema_cli.formats.hdf5 import library
from ema_cli.formats.hdf5.library import Refused, dataset_at, h5s, h5t

BOX_BYTES = 256 << 20


def read_boxes(file: Any, path: str, boxes: list[Any]) -> Iterator[memoryview]:
    """Yield the bytes of each box, a (starts, lengths) pair, of the dataset at `path`."""
    dataset = dataset_at(file, path)
    library.storage(dataset, path)
    kind = dataset.get_type()
    if not library.classified(dataset, kind, path).dtype:
        raise Refused("expected numbers", path)
    into = library.memory_type(kind)
    for starts, lengths in boxes:
        yield _read(dataset, path, into, tuple(starts), tuple(lengths))


def _read(
    dataset: Any, path: str, kind: Any, starts: tuple[int, ...], lengths: tuple[int, ...]
) -> memoryview:
    values = np.empty(lengths, np.dtype(f"V{kind.get_size()}"))
    if values.nbytes > BOX_BYTES:
        raise Refused(f"expected a box of at most {BOX_BYTES:,} bytes", path)
    space = dataset.get_space()
    if starts:
        space.select_hyperslab(starts, lengths)
        memory = h5s.create_simple(lengths)
    else:
        memory = h5s.create(h5s.SCALAR)
    dataset.read(memory, space, values, kind)
    # HDF5's own bfloat16 is read as it lies.
    if kind.get_class() == h5t.FLOAT and kind.get_order() == h5t.ORDER_BE:
        values.view("u2").byteswap(inplace=True)
    return values.reshape(-1).view(np.uint8).data
