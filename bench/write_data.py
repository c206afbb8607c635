"""Child process that writes data sets: finite random floats, cheaply and in little memory.

What the tool can convert is converted by it from safetensors files of the same values.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.datasets import DATA, HDF5, INDEX, MIB, TENSORFLOW, DataSet, beside, catalogue
from ema_cli.api import rename
from ema_cli.checksums import crc32c, masked
from ema_cli.formats.tensorflow import table
from ema_cli.formats.tensorflow.entries import (
    DTYPE_NUMBERS,
    Entry,
    Header,
    encode_entry,
    encode_header,
)

Words = npt.NDArray[np.unsignedinteger[Any]]
BLOCK_BYTES = 16 * MIB
# One row per dtype: word type, bits of sign and mantissa, shift to the exponent, and a first
# exponent such that eight consecutive ones give magnitudes from 2^-7 up to 2, never infinity.
LAYOUTS: dict[str, tuple[type[np.unsignedinteger[Any]], int, int, int]] = {
    "F32": (np.uint32, 0x807F_FFFF, 23, 120),
    "BF16": (np.uint16, 0x807F, 7, 120),
}
TENSORFLOW_DTYPES = {"F32": DTYPE_NUMBERS["float32"], "BF16": DTYPE_NUMBERS["bfloat16"]}


def random_block(dtype: str) -> Words:
    """Return one block of words that are finite floats; all checkpoints derive from it."""
    word, mantissa, shift, first_exponent = LAYOUTS[dtype]
    items = BLOCK_BYTES // np.dtype(word).itemsize
    block: Words = np.random.default_rng(2024).integers(0, np.iinfo(word).max, items, dtype=word)
    exponents = (((block >> shift) & 7) + first_exponent) << shift
    return ((block & mantissa) | exponents).astype(word)


def payload(data_set: DataSet, base: Words, seed: int) -> Iterator[memoryview]:
    """Yield the tensor data: the base block again and again, its mantissas flipped by a key."""
    rng = np.random.default_rng(seed)
    word, mantissa, _, _ = LAYOUTS[data_set.dtype]
    scratch = np.empty_like(base)
    left = data_set.payload_bytes
    while left:
        key = word(int(rng.integers(0, mantissa, endpoint=True)) & mantissa)
        np.bitwise_xor(base, key, out=scratch)
        block = scratch.data.cast("B")[: min(left, BLOCK_BYTES)]
        yield block
        left -= len(block)


def header(data_set: DataSet) -> bytes:
    """Return what precedes the tensor data, the same in all checkpoints as in a real run."""
    size = data_set.tensor_bytes
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for i in range(data_set.tensors):
        entries[data_set.names.format(i)] = {
            "dtype": data_set.dtype,
            "shape": data_set.shape,
            "data_offsets": [i * size, (i + 1) * size],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index(data_set: DataSet, crcs: list[int]) -> bytes:
    """Return the index of a TensorFlow checkpoint whose tensors have these checksums."""
    dtype, size = TENSORFLOW_DTYPES[data_set.dtype], data_set.tensor_bytes
    items = [(b"", encode_header(Header(1, False)))]
    for i, crc in enumerate(crcs):
        entry = Entry(dtype, data_set.shape, 0, i * size, size, masked(crc))
        items.append((data_set.names.format(i).encode(), encode_entry(entry)))
    return table.build(items)


def tensor_checksums(data_set: DataSet, block: memoryview) -> list[int]:
    """Return the checksum of each tensor in a block, which ends where one does."""
    size = data_set.tensor_bytes
    assert not len(block) % size
    return [crc32c(block[at : at + size]) for at in range(0, len(block), size)]


def write_safetensors(data_set: DataSet, path: Path, blocks: Iterator[memoryview]) -> None:
    """Write a checkpoint as one file."""
    with partial(path).open("wb") as file:
        file.write(header(data_set))
        for block in blocks:
            file.write(block)
    os.replace(partial(path), path)


def write_tensorflow(data_set: DataSet, prefix: Path, blocks: Iterator[memoryview]) -> None:
    """Write a checkpoint as TensorFlow does: data in the order of names, checksums in the index."""
    crcs = []
    with partial(prefix).open("wb") as file:
        for block in blocks:
            file.write(block)
            crcs += tensor_checksums(data_set, block)
    os.replace(partial(prefix), beside(prefix, DATA))
    partial(prefix).write_bytes(index(data_set, crcs))
    os.replace(partial(prefix), beside(prefix, INDEX))


def partial(path: Path) -> Path:
    """Return where a file lies until it is complete, lest an interrupted one be used."""
    return beside(path, ".partial")


def write_data_set(data_set: DataSet, data: Path) -> None:
    """Write all checkpoints; those of one place in their runs hold the same values."""
    base = random_block(data_set.dtype)
    write = write_tensorflow if data_set.format == TENSORFLOW else write_safetensors
    data_set.folder(data).mkdir(parents=True, exist_ok=True)
    for seed, path in enumerate(data_set.checkpoint_paths(data)):
        write(data_set, path, payload(data_set, base, seed))


def convert_data_set(source: DataSet, data_set: DataSet, data: Path) -> None:
    """Write all checkpoints as the tool converts those of another run, which is made if missing."""
    if not source.is_complete(data):
        write_data_set(source, data)
    data_set.folder(data).mkdir(parents=True, exist_ok=True)
    rule = [(r"\.", "/")] if data_set.format == HDF5 else []
    paths = zip(source.paths(data), data_set.paths(data), strict=True)
    for original, path in paths:
        target = partial(path)
        rename(original, target, rule=rule, format=data_set.format, overwrite=True)
        beside(target, ".ema.json").unlink()  # no training leaves such a record behind
        os.replace(target, path)


def main() -> int:
    """Write the data sets named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.write_data", description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("keys", nargs="+", choices=list(catalogue(quick=False)))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    sets = catalogue(quick=options.quick)
    for key in options.keys:
        data_set = sets[key]
        if data_set.source:
            convert_data_set(sets[data_set.source], data_set, options.data)
        else:
            write_data_set(data_set, options.data)
    os.sync()
    return 0


if __name__ == "__main__":
    sys.exit(main())
